// The page's data, its filters, and its state in the address: a link shows what its sender saw.
const SUBJECT = ["method", "model", "machine"];
const PANELS = ["times", "memory", "quality", "planned", "sequence"];
const PICKED = ["setup", ...PANELS, "cost", "case", "metric", "across"];
const MISSING = "–";

const data = JSON.parse(document.getElementById("data").textContent);
const past = data.history;
const filters = document.querySelector("form.filters");
const picked = Object.fromEntries(PICKED.map((name) => [name, document.querySelector(`select[name=${name}]`)]));
const chosenMetric = { case: "", metric: "" }; // what the history shows; the tree and the search set it
const rowsOf = Object.fromEntries(Object.entries(data.rows).map(([kind, fields]) => [kind, unpacked(fields)]));

function unpacked(fields) {
  const names = Object.keys(fields);
  const lists = names.map((name) => (Array.isArray(fields[name]) ? fields[name] : fields[name].at.map((i) => fields[name].texts[i])));
  return (lists[0] ?? []).map((_, i) => Object.fromEntries(names.map((name, n) => [name, lists[n][i]])));
}

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

function inWords(metric) {
  return metric.replace(/_(seconds|bytes)$/, "").replace("_over_control", " / base forward").replaceAll("_", " ");
}

// The state, and its fragment

function asked() {
  const given = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries([...SUBJECT, ...PICKED, "section"].map((name) => [name, given.get(name) ?? ""]));
}

function fragment(values) {
  return `#${new URLSearchParams(Object.entries(values).filter(([, value]) => value))}`;
}

function chosen() {
  const values = Object.fromEntries(SUBJECT.map((name) => [name, filters.elements[name].value]));
  for (const name of PICKED) values[name] = picked[name]?.value ?? chosenMetric[name] ?? "";
  return values;
}

function matches(row, values) {
  return SUBJECT.every((name) => !values[name] || row[name] === undefined || row[name] === null || row[name] === values[name]);
}

function setTo(select, value) {
  if ([...select.options].some((option) => option.value === value)) select.value = value;
  else select.selectedIndex = 0;
}

function fill(select, options, wanted) {
  select.replaceChildren(...options.map(([value, label]) => new Option(label ?? value, value)));
  setTo(select, wanted);
}
