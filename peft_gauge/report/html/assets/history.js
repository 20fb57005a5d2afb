
// History: a search, a tree of cases and their metrics, and one metric over all runs

const MOST_HITS = 12;
const finder = document.querySelector("input[name=find]");

function spread(values) {
  return values.flatMap((value) => (Array.isArray(value) ? Array(value[1]).fill(value[0]) : [value]));
}

function seriesShown(values) {
  return past.series.filter(([machine, place]) => {
    const [, method, model] = past.cases[place];
    return matches({ machine: past.machines[machine], method, model }, values);
  });
}

// The metrics of each case that passes the filters
function offeredMetrics(values) {
  const found = new Map();
  for (const [, place, metric] of seriesShown(values)) {
    const one = past.cases[place][0];
    if (!found.has(one)) found.set(one, new Set());
    found.get(one).add(past.metrics[metric]);
  }
  return new Map([...found].map(([one, metrics]) => [one, [...metrics].sort()]));
}

function short(name) {
  return name.replace(/^benchmarks\//, "");
}

function leaf(one, metric, label) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  if (one === chosenMetric.case && metric === chosenMetric.metric) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => showMetric(one, metric));
  item.append(button);
  return item;
}

function showMetric(one, metric) {
  Object.assign(chosenMetric, { case: one, metric });
  for (const old of document.querySelectorAll(".tree [aria-current]")) old.removeAttribute("aria-current");
  document.activeElement?.closest?.(".tree button")?.setAttribute("aria-current", "true");
  drawHistory(chosen());
  filterRows(chosen());
  writeLinks(chosen());
}

// A branch is filled when it opens: a history can have thousands of leaves.
function branch(title, number, fillIt) {
  const item = document.createElement("li");
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = `${title} (${number})`;
  const list = document.createElement("ul");
  details.append(summary, list);
  details.addEventListener("toggle", () => {
    if (details.open && !list.children.length) fillIt(list);
  });
  item.append(details);
  return item;
}

function growTree(offered) {
  const modules = new Map();
  for (const one of offered.keys()) {
    const module = short(one).split("::")[0];
    modules.set(module, [...(modules.get(module) ?? []), one]);
  }
  document.getElementById("tree").replaceChildren(
    ...[...modules].map(([module, cases]) =>
      branch(module, cases.length, (list) => {
        const branches = cases.map((one) =>
          branch(short(one).split("::").slice(1).join("::") || one, offered.get(one).length, (leaves) =>
            leaves.replaceChildren(...offered.get(one).map((metric) => leaf(one, metric, metric)))),
        );
        list.replaceChildren(...branches);
      }),
    ),
  );
}

function search(offered) {
  const words = finder.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = document.getElementById("hits");
  const told = document.getElementById("found");
  hits.replaceChildren();
  told.textContent = "";
  if (!words.length) return;
  const found = [];
  for (const [one, metrics] of offered) {
    for (const metric of metrics) {
      const text = `${one} ${metric} ${inWords(metric)}`.toLowerCase();
      if (words.every((word) => text.includes(word))) found.push([one, metric]);
    }
  }
  // The shortest names first: a metric before its details.
  found.sort((a, b) => a[1].length - b[1].length);
  hits.replaceChildren(...found.slice(0, MOST_HITS).map(([one, metric]) => leaf(one, metric, `${metric} of ${short(one)}`)));
  told.textContent = found.length > MOST_HITS ? `${MOST_HITS} of ${found.length} metrics` : `${found.length} metrics`;
}

function points(series) {
  const rows = [];
  for (const [machine, place, metric, at, values, lows, highs] of series) {
    const name = past.metrics[metric];
    const changes = new Map(past.changes.filter(([, c, f]) => c === place && f === metric).map(([run, , , verdict]) => [run, verdict]));
    const all = spread(values);
    past.at[at].forEach((index, i) => {
      const [owner, run, when, commit, versions] = past.runs[index];
      rows.push({
        machine: past.machines[machine], run, when, commit: commit ?? MISSING, versions: past.differing[versions],
        libraries: past.versions[versions], value: all[i], low: lows?.[i] ?? null, high: highs?.[i] ?? null,
        shown: shown(name, all[i]), change: owner === machine ? (changes.get(index) ?? null) : null,
      });
    });
  }
  return rows;
}

function cell(content, tag = "td") {
  const made = document.createElement(tag);
  if (typeof content === "object" && content !== null) made.append(content);
  else made.textContent = content ?? MISSING;
  if (tag === "th") made.scope = "row";
  return made;
}

function metricCell(name, value) {
  if (value === null) return MISSING;
  const made = document.createElement("data");
  made.value = String(value);
  made.textContent = shown(name, value);
  return made;
}

function historyTable(rows, name, title) {
  const table = document.createElement("table");
  table.id = "t-history";
  table.createCaption().textContent = title;
  const head = table.createTHead().insertRow();
  for (const heading of ["run", "machine", "ended (UTC)", "value", "95 % interval from", "to", "change", "libraries", "commit"]) {
    const made = document.createElement("th");
    made.scope = "col";
    made.textContent = heading;
    head.append(made);
  }
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    line.dataset.machine = row.machine;
    const metrics = [row.value, row.low, row.high].map((value) => metricCell(name, value));
    line.append(cell(row.run, "th"), cell(row.machine), cell(row.when.slice(0, 16).replace("T", " ")), ...metrics.map((each) => cell(each)), cell(row.change), cell(row.libraries), cell(row.commit));
  }
  const holder = document.createElement("div");
  holder.className = "scroll";
  holder.tabIndex = 0;
  holder.setAttribute("role", "region");
  holder.setAttribute("aria-label", title);
  holder.append(table);
  return holder;
}

// The chosen metric if a case that passes the filters has it, else the case's or the page's first one
function settle(offered) {
  if (!offered.has(chosenMetric.case)) chosenMetric.case = offered.has(past.opening?.[0]) ? past.opening[0] : ([...offered.keys()][0] ?? "");
  const metrics = offered.get(chosenMetric.case) ?? [];
  if (metrics.includes(chosenMetric.metric)) return;
  const usual = [past.opening?.[1], "step_over_control", "step_seconds", "tensor_peak_bytes"];
  chosenMetric.metric = usual.find((name) => metrics.includes(name)) ?? metrics[0] ?? "";
}

function drawHistory(values) {
  const holder = document.querySelector("[data-plot=history]");
  const details = document.getElementById("history-data");
  empty(holder);
  for (const old of details.querySelectorAll(".scroll")) old.remove();
  const offered = offeredMetrics(values);
  settle(offered);
  const series = seriesShown(values).filter(
    ([, place, metric]) => past.cases[place][0] === chosenMetric.case && past.metrics[metric] === chosenMetric.metric,
  );
  if (!series.length) {
    holder.textContent = "No run has a metric that passes the filters.";
    return;
  }
  const name = chosenMetric.metric;
  const title = `${name} of ${short(chosenMetric.case)}`;
  const rows = points(series);
  const unit = unitOf(name);
  const axis = { title: inWords(name) + ({ B: " (bytes)", s: " (seconds)" }[unit] ?? ""), unit };
  const across = picked.across.value;
  panel(holder, across, title, rows, across === "history" ? { y: axis } : { x: axis });
  details.append(historyTable(rows, name, title));
}
