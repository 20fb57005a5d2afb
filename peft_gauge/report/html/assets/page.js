
// The filters act on everything: setups, tables, changes, claims, plots and the history

function filterRows(values) {
  const rows = document.querySelectorAll("tbody tr, p[data-machine], li[data-machine]");
  let visible = 0;
  let all = 0;
  for (const row of rows) {
    row.hidden = !matches(row.dataset, values);
    if (row.localName !== "tr") continue;
    all += 1;
    visible += row.hidden ? 0 : 1;
  }
  document.getElementById("status").textContent = `${visible} of ${all} rows of all tables shown`;
  filterChanges(values);
  filterClaims();
}

// Of the changes that pass, only the first few: the table below holds all.
function filterChanges(values) {
  const list = document.querySelector("ul.changes");
  if (!list) return;
  let left = Number(list.dataset.shown);
  const passing = [...list.children].filter(
    ({ dataset }) => matches(dataset, values) && (!values.machine || dataset.machines.split("\n").includes(values.machine)),
  );
  for (const item of list.children) item.hidden = true;
  for (const item of passing) {
    item.hidden = left <= 0;
    left -= 1;
  }
  document.getElementById("no-change").hidden = passing.length > 0;
}

function filterClaims() {
  const claims = [...document.querySelectorAll("details.claim")];
  if (!claims.length) return;
  for (const claim of claims) claim.hidden = ![...claim.querySelectorAll("tbody tr")].some((row) => !row.hidden);
  for (const group of document.querySelectorAll("#t-claims > details")) {
    group.hidden = ![...group.querySelectorAll("details.claim")].some((claim) => !claim.hidden);
  }
  document.getElementById("no-claim").hidden = claims.some((claim) => !claim.hidden);
  const rows = [...document.querySelectorAll("details.claim tbody tr")].filter((row) => !row.hidden);
  for (const told of document.querySelectorAll("[data-verdict]")) {
    const name = told.dataset.verdict;
    const number = rows.filter((row) => row.querySelector(".v").classList.contains(name)).length;
    told.value = String(number);
    told.textContent = number.toLocaleString("en");
    document.querySelector(`[data-share=${name}]`).style.width = `${rows.length ? (100 * number) / rows.length : 0}%`;
  }
}

// One setup is shown: the chosen one if it passes the filters, else the first that does.
function showSetup(values, wanted) {
  if (!picked.setup) return;
  const blocks = [...document.querySelectorAll("article.setup")];
  const passing = blocks.filter((block) => {
    const { machine, model, methods, where } = block.dataset;
    return matches({ machine, model }, values) && (!values.method || methods.split(" ").includes(values.method)) && where;
  });
  fill(picked.setup, passing.map((block) => [block.dataset.where]), wanted);
  const one = passing.find((block) => block.dataset.where === picked.setup.value);
  for (const block of blocks) block.hidden = block !== one;
  document.getElementById("no-setup").hidden = Boolean(one);
  for (const card of one?.querySelectorAll(".card") ?? []) {
    const own = [...card.querySelectorAll(".one")];
    for (const each of own) each.hidden = !values.method || each.dataset.method !== values.method;
    const all = card.querySelector(".all");
    if (all) all.hidden = own.some((each) => !each.hidden);
  }
}

function writeLinks(values) {
  const link = fragment(values);
  document.getElementById("link").href = link;
  history.replaceState(null, "", link);
  const onlyFilters = Object.fromEntries(SUBJECT.map((name) => [name, values[name]]));
  for (const each of document.querySelectorAll("a[data-section]")) {
    each.href = fragment({ ...values, section: each.dataset.section });
  }
  for (const each of document.querySelectorAll("a.to-history")) {
    const own = Object.fromEntries(new URLSearchParams(each.hash.slice(1)));
    each.href = fragment({ ...onlyFilters, case: own.case, metric: own.metric, section: "history" });
  }
}

// Sorting: a click on a heading sorts by its column, the next one the other way; what is missing comes last

function sortKey(row, column) {
  const own = row.cells[column];
  const value = own.querySelector("data")?.value ?? own.querySelector("[data-sort]")?.dataset.sort;
  if (value !== undefined) return Number(value);
  const text = own.textContent.trim();
  return text === MISSING ? null : text;
}

function sortBy(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const keyed = [...table.tBodies[0].rows].map((row) => [sortKey(row, column), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

// Together

function update(wanted) {
  showSetup(chosen(), wanted.setup);
  const values = chosen();
  for (const kind of PANELS.filter((kind) => kind !== "quality")) if (picked[kind]) drawPanel(kind, values, wanted[kind]);
  drawQuality(values, wanted.quality, wanted.cost);
  Object.assign(chosenMetric, { case: wanted.case, metric: wanted.metric });
  drawHistory(values);
  const offered = offeredMetrics(values);
  growTree(offered);
  search(offered);
  filterRows(values);
  writeLinks(chosen());
}

function restore() {
  const wanted = asked();
  for (const name of SUBJECT) setTo(filters.elements[name], wanted[name]);
  setTo(picked.across, wanted.across);
  update(wanted);
  if (wanted.section) {
    document.getElementById(wanted.section)?.scrollIntoView();
    document.getElementById(`h-${wanted.section}`)?.focus({ preventScroll: true });
  }
}

// Another step means other panels: those of the step that was chosen.
function pickedAnother(event) {
  const name = event.target.name;
  if (name === "find") return;
  const values = chosen();
  if (name === "setup") update({ ...values, times: "", memory: "", quality: "", cost: "" });
  else if (name === "quality" || name === "cost") drawQuality(values, values.quality, name === "quality" ? "" : values.cost);
  else if (name === "across") drawHistory(values);
  else drawPanel(name, values, values[name]);
  filterRows(chosen());
  writeLinks(chosen());
}

filters.addEventListener("change", () => update(chosen()));
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("reset", () => setTimeout(() => update(chosen())));
for (const form of document.querySelectorAll("form.pick")) {
  form.addEventListener("change", pickedAnother);
  form.addEventListener("submit", (event) => event.preventDefault());
}
finder.addEventListener("input", () => search(offeredMetrics(chosen())));
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
window.addEventListener("hashchange", restore);
dark.addEventListener("change", () => [...drawn.keys()].forEach(draw));
let resized = 0;
window.addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => [...drawn.keys()].forEach(draw), 100);
});
restore();
document.documentElement.dataset.ready = "true";
