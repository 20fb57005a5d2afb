"use strict";
// Filters, plots and the history of the report. Everything that is shown comes from the element with the id "data";
// the state of the page stands in its fragment, so that a link shows what its sender saw.
(() => {
  const SUBJECT = ["method", "model", "machine"];
  const PICKED = ["case", "metric", "across"];
  const MISSING = "–";

  const data = JSON.parse(document.getElementById("data").textContent);
  const past = data.history;
  const filters = document.querySelector("form.filters");
  const pick = document.querySelector("form.pick");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map(); // canvas -> vega-embed's result
  const failures = (window.reportFailures = []);

  // Numbers in words, as in the tables that were made before

  function shownBytes(value) {
    for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
      if (value >= size) return `${(value / size).toFixed(2)} ${unit}`;
    }
    return `${value.toFixed(0)} B`;
  }

  function shownSeconds(value) {
    for (const [unit, size] of [["s", 1], ["ms", 1e-3]]) {
      if (value >= size) return `${(value / size).toFixed(2)} ${unit}`;
    }
    return `${(value / 1e-6).toFixed(2)} µs`;
  }

  function unitOf(metric) {
    if (metric === "seconds" || metric.endsWith("_seconds")) return "s";
    return metric.includes("bytes") ? "B" : "";
  }

  function shown(metric, value) {
    const unit = unitOf(metric);
    if (unit === "s") return shownSeconds(value);
    return unit === "B" ? shownBytes(value) : value.toLocaleString("en", { maximumSignificantDigits: 7 });
  }

  // The state, and its fragment

  function state() {
    const asked = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries([...SUBJECT, ...PICKED, "section"].map((name) => [name, asked.get(name) ?? ""]));
  }

  function fragment(values) {
    const kept = Object.entries(values).filter(([, value]) => value);
    return `#${new URLSearchParams(kept)}`;
  }

  function chosen() {
    const values = Object.fromEntries(SUBJECT.map((name) => [name, filters.elements[name].value]));
    for (const name of PICKED) values[name] = pick.elements[name].value;
    return values;
  }

  function matches(row, values) {
    return SUBJECT.every((name) => !values[name] || row[name] === undefined || row[name] === null || row[name] === values[name]);
  }

  function setTo(select, value) {
    if ([...select.options].some((option) => option.value === value)) select.value = value;
    else select.selectedIndex = 0;
  }

  // Filters

  function filterRows(values) {
    const rows = document.querySelectorAll("tbody tr, p[data-machine], ul[data-machine]");
    let visible = 0;
    let all = 0;
    for (const row of rows) {
      row.hidden = !matches(row.dataset, values);
      if (row.localName !== "tr") continue;
      all += 1;
      visible += row.hidden ? 0 : 1;
    }
    document.getElementById("status").textContent = `${visible} of ${all} rows of all tables shown`;
  }

  function writeLinks(values) {
    const picked = fragment(values);
    document.getElementById("link").href = picked;
    history.replaceState(null, "", picked);
    const onlyFilters = Object.fromEntries(SUBJECT.map((name) => [name, values[name]]));
    for (const link of document.querySelectorAll("a[data-section]")) {
      link.href = fragment({ ...values, section: link.dataset.section });
    }
    for (const link of document.querySelectorAll("a.to-history")) {
      const own = Object.fromEntries(new URLSearchParams(link.hash.slice(1)));
      link.href = fragment({ ...onlyFilters, case: own.case, metric: own.metric, section: "history" });
    }
  }

  // Plots

  function themed(spec) {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--text").trim();
    const soft = style.getPropertyValue("--soft").trim();
    const own = JSON.parse(dark.matches ? JSON.stringify(spec).replaceAll('"#000000"', '"#FFFFFF"') : JSON.stringify(spec));
    own.background = "transparent";
    own.config.text = { color: text };
    own.config.axis = { ...own.config.axis, labelColor: text, titleColor: text, labelLimit: innerWidth < 640 ? 110 : 220 };
    own.config.legend = { ...own.config.legend, labelColor: text, titleColor: soft, columns: innerWidth < 640 ? 1 : 3 };
    return own;
  }

  function forget(canvas) {
    drawn.get(canvas)?.finalize();
    drawn.delete(canvas);
  }

  async function draw(canvas) {
    forget(canvas);
    const { name, rows, unit } = canvas.content;
    const spec = themed(data.specs[name]);
    spec.datasets = { [name]: rows };
    // Vega-Lite warns of every plot that fits its container and has a height by bands; this is the same height.
    if (spec.height.step) spec.height = spec.height.step * new Set(rows.map((row) => row.label)).size;
    for (const param of spec.params ?? []) if (param.name === "unit") param.value = unit;
    // A layer may well be empty, such as that of changes where nothing changed: only errors (1) are worth a line.
    const options = { actions: false, renderer: "svg", logLevel: 1 };
    try {
      drawn.set(canvas, await window.vegaEmbed(canvas, spec, options));
    } catch (error) {
      failures.push(String(error));
      canvas.textContent = `This plot could not be drawn (${error.message}); the table below holds its metrics.`;
    }
  }

  // Only what is looked at is drawn: a page can have dozens of plots.
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        seen.unobserve(target);
        draw(target);
      }
    }
  }, { rootMargin: "200px" });

  function panel(holder, name, title, rows, unit = "") {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    const image = document.createElement("div"); // Vega writes a role and a label of its own on what it draws in
    image.setAttribute("role", "img");
    image.setAttribute("aria-label", `${holder.getAttribute("aria-label")}: ${title}. The table below holds the same metrics.`);
    const canvas = document.createElement("div");
    canvas.className = "canvas";
    canvas.content = { name, rows, unit };
    image.append(canvas);
    figure.append(caption, image);
    holder.append(figure);
    seen.observe(canvas);
  }

  function empty(holder) {
    for (const canvas of holder.querySelectorAll(".canvas")) {
      seen.unobserve(canvas);
      forget(canvas);
    }
    holder.replaceChildren();
  }

  function drawPlots(values) {
    for (const holder of document.querySelectorAll("[data-plot]")) {
      const kind = holder.dataset.plot;
      if (kind === "history") continue;
      empty(holder);
      const panels = new Map();
      for (const row of data.plots[kind].filter((each) => matches(each, values))) {
        panels.set(row.panel, [...(panels.get(row.panel) ?? []), row]);
      }
      for (const [title, rows] of panels) panel(holder, kind, title, rows);
      if (!panels.size) holder.textContent = "No row passes the filters.";
    }
  }

  // History

  function spread(values) {
    return values.flatMap((value) => (Array.isArray(value) ? Array(value[1]).fill(value[0]) : [value]));
  }

  function seriesShown(values) {
    return past.series.filter(([machine, place]) => {
      const [, method, model] = past.cases[place];
      return matches({ machine: past.machines[machine], method, model }, values);
    });
  }

  function fill(select, names, wanted) {
    select.replaceChildren(...names.map((name) => new Option(name.replace(/^benchmarks\//, ""), name)));
    setTo(select, wanted);
  }

  function offer(values, wanted) {
    const series = seriesShown(values);
    const cases = [...new Set(series.map(([, place]) => past.cases[place][0]))];
    fill(pick.elements.case, cases, wanted.case || past.opening?.[0]);
    const one = pick.elements.case.value;
    const metrics = new Set(series.filter(([, place]) => past.cases[place][0] === one).map(([, , place]) => past.metrics[place]));
    fill(pick.elements.metric, [...metrics].sort(), wanted.metric || past.opening?.[1]);
    return series.filter(([, place, metric]) => past.cases[place][0] === one && past.metrics[metric] === pick.elements.metric.value);
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

  function drawHistory(values, wanted) {
    const holder = document.querySelector("[data-plot=history]");
    const details = document.getElementById("history-data");
    empty(holder);
    for (const old of details.querySelectorAll(".scroll")) old.remove();
    const series = offer(values, wanted);
    if (!series.length) {
      holder.textContent = "No run holds metrics that pass the filters.";
      return;
    }
    const name = pick.elements.metric.value;
    const title = `${name} of ${pick.elements.case.value.replace(/^benchmarks\//, "")}`;
    const rows = points(series);
    panel(holder, pick.elements.across.value, title, rows, unitOf(name));
    details.append(historyTable(rows, name, title));
  }

  // Together

  function update(wanted) {
    const values = chosen();
    drawHistory(values, wanted);
    filterRows(values);
    drawPlots(values);
    writeLinks(chosen());
  }

  function restore() {
    const asked = state();
    for (const name of SUBJECT) setTo(filters.elements[name], asked[name]);
    setTo(pick.elements.across, asked.across);
    update(asked);
    if (asked.section) {
      document.getElementById(asked.section)?.scrollIntoView();
      document.getElementById(`h-${asked.section}`)?.focus({ preventScroll: true });
    }
  }

  filters.addEventListener("change", () => update(chosen()));
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(() => update(chosen())));
  pick.addEventListener("change", () => {
    drawHistory(chosen(), chosen());
    filterRows(chosen());
    writeLinks(chosen());
  });
  window.addEventListener("hashchange", restore);
  dark.addEventListener("change", () => [...drawn.keys()].forEach(draw));
  restore();
  document.documentElement.dataset.ready = "true";
})();
