
// Plots: a spec of each kind, with the rows, the axes and the colours of the panel that is chosen

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map(); // canvas -> vega-embed's result
const failures = (window.reportFailures = []);
const NARROW = 640;
// Places of a label around its point, the best first; to the left of the point if the first number is negative.
const OFFSETS = [[9, -10], [9, 0], [9, 12], [0, -14], [0, 14], [-9, -10], [-9, 0], [-9, 12], [9, -24], [9, 24], [0, 26], [-9, 24], [-9, -24]];

function themed(spec) {
  let text = JSON.stringify(spec);
  if (dark.matches) for (const [light, other] of Object.entries(data.dark)) text = text.replaceAll(`"${light}"`, `"${other}"`);
  const own = JSON.parse(text);
  const narrow = innerWidth < NARROW;
  if (narrow && typeof own.height === "number") own.height *= 0.75;
  if (narrow && own.height?.step) own.height.step -= 4;
  own.config.axis.labelLimit = narrow ? 150 : 240;
  return own;
}

// As `plots.fitted` in Python: titles, ends and ticks of the panel's axes, and legends of only what occurs.
function fit(node, axes, rows) {
  if (Array.isArray(node)) for (const each of node) fit(each, axes, rows);
  if (Array.isArray(node) || typeof node !== "object" || node === null) return;
  for (const each of Object.values(node)) fit(each, axes, rows);
  const encoding = node.encoding ?? {};
  for (const [name, axis] of Object.entries(axes)) {
    const channel = encoding[name];
    if (!channel) continue;
    channel.title = axis.title;
    channel.axis = { ...channel.axis, labelExpr: data.units[axis.unit] };
    channel.scale = channel.scale?.type === "log" ? { ...channel.scale } : { ...channel.scale, zero: false };
    if (!axis.domain) continue;
    channel.axis.values = axis.ticks;
    Object.assign(channel.scale, { domain: axis.domain, nice: false });
  }
  for (const name of ["color", "shape", "strokeDash"]) {
    const { scale, field } = encoding[name] ?? {};
    if (!scale) continue;
    const kept = scale.domain.map((_, i) => i).filter((i) => rows.some((row) => row[field] === scale.domain[i]));
    scale.range = kept.map((i) => scale.range[i]);
    scale.domain = kept.map((i) => scale.domain[i]);
  }
}

function svgElement(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// The colours and shapes of a spec as a list in place of the plot's legend: a list wraps, and can be heard
function takeLegend(spec) {
  const found = new Map();
  for (const { encoding } of spec.layer) {
    const { color, shape } = encoding ?? {};
    if (!color?.scale || color.legend === null) continue;
    color.scale.domain.forEach((name, i) => {
      if (!found.get(name)?.shape) found.set(name, { colour: color.scale.range[i], shape: shape?.scale?.range[i] });
    });
  }
  for (const { encoding } of spec.layer) {
    for (const name of ["color", "shape", "strokeDash"]) if (encoding?.[name]?.scale) encoding[name].legend = null;
  }
  return [...found].map(([name, { colour, shape }]) => {
    const item = document.createElement("li");
    const mark = svgElement("svg", { class: "dot", viewBox: "-7 -7 14 14", "aria-hidden": "true" });
    mark.append(svgElement("path", { d: data.shapes[shape ?? "square"], style: `fill: ${colour}` }));
    item.append(mark, name);
    return item;
  });
}

function forget(canvas) {
  drawn.get(canvas)?.finalize();
  drawn.delete(canvas);
}

async function draw(canvas) {
  forget(canvas);
  canvas.dataset.drawn = "";
  const { name, rows, axes } = canvas.content;
  const spec = themed(data.specs[name]);
  fit(spec, axes, rows);
  spec.datasets = { [name]: rows };
  canvas.closest("figure").querySelector(".legend").replaceChildren(...takeLegend(spec));
  // Vega-Lite warns of every plot that fits its container and has a height by bands; this is the same height.
  const band = { versions: "versions" }[name] ?? "name";
  if (spec.height.step) spec.height = spec.height.step * new Set(rows.map((row) => row[band])).size;
  // A layer may well be empty, such as that of changes where nothing changed: only errors (1) are worth a line.
  const options = { actions: false, renderer: "svg", logLevel: 1 };
  try {
    const made = await window.vegaEmbed(canvas, spec, options);
    drawn.set(canvas, made);
    if (name === "quality") {
      await made.view.runAsync(); // a first run measures the axes, and this one fits the plot between them
        untangle(canvas);
      made.view.addSignalListener("width", () => setTimeout(() => untangle(canvas)));
    }
  } catch (error) {
    failures.push(String(error));
    canvas.textContent = `This plot could not be drawn (${error.message}); the table below holds its numbers.`;
  }
  canvas.dataset.drawn = "true";
}

const box = ({ left, top, right, bottom }) => ({ left, top, right, bottom });

// Small boxes along a line
function along(path) {
  const matrix = path.getScreenCTM();
  const steps = Math.ceil(path.getTotalLength() / 4);
  return Array.from({ length: steps + 1 }, (_, i) => {
    const { x, y } = path.getPointAtLength(i * 4).matrixTransform(matrix);
    return { left: x - 1, top: y - 1, right: x + 1, bottom: y + 1 };
  });
}

// Move the names of points so that none covers a point, an interval, the line or another name, or leaves the frame; one
// without room is hidden: the tooltip and the table have it.
function untangle(canvas) {
  const frame = canvas.querySelector(".background").getBoundingClientRect();
  const marks = canvas.querySelectorAll(".mark-symbol.role-mark path, .mark-rule.role-mark line");
  const taken = [...marks].map((each) => box(each.getBoundingClientRect()));
  for (const line of canvas.querySelectorAll(".mark-line.role-mark path")) taken.push(...along(line));
  for (const label of canvas.querySelectorAll(".mark-text.role-mark text")) {
    // Where Vega put it: it moves a name again only if its point has moved.
    if (label.getAttribute("transform") !== label.dataset.moved) label.dataset.from = label.getAttribute("transform");
    const [x, y] = label.dataset.from.match(/-?[\d.]+/g).map(Number);
    const placed = OFFSETS.some(([dx, dy]) => {
      label.setAttribute("transform", `translate(${x - 9 + dx},${y + dy})`);
      label.setAttribute("text-anchor", dx > 0 ? "start" : dx < 0 ? "end" : "middle");
      const own = box(label.getBoundingClientRect());
      const inside = own.left >= frame.left && own.right <= frame.right && own.top >= frame.top && own.bottom <= frame.bottom;
      if (!inside || taken.some((other) => own.left < other.right && other.left < own.right && own.top < other.bottom && other.top < own.bottom)) return false;
      taken.push(own);
      return true;
    });
    label.style.visibility = placed ? "" : "hidden";
    label.dataset.moved = label.getAttribute("transform");
  }
}

// Only what is looked at is drawn.
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) {
      seen.unobserve(target);
      draw(target);
    }
  }
}, { rootMargin: "200px" });

function panel(holder, name, title, rows, axes) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  const image = document.createElement("div"); // Vega writes a role and a label of its own on what it draws in
  image.setAttribute("role", "img");
  image.setAttribute("aria-label", `${holder.getAttribute("aria-label")} ${title}. The table below holds the same numbers.`);
  const canvas = document.createElement("div");
  canvas.className = "canvas";
  canvas.content = { name, rows, axes };
  image.append(canvas);
  const legend = document.createElement("ul");
  legend.className = "legend";
  figure.append(caption, image, legend);
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

// The panels of a kind that pass the filters, those of the chosen step first
function offered(kind, rows, values) {
  const all = data.panels[kind];
  const names = [...new Set(rows.map((row) => row.panel))];
  const own = names.filter((name) => all[name].where === values.setup);
  return [...own, ...names.filter((name) => all[name].where !== values.setup)];
}

function drawPanel(kind, values, wanted) {
  const holder = document.querySelector(`[data-plot=${kind}]`);
  if (!holder) return;
  const passing = rowsOf[kind].filter((row) => matches(row, values));
  empty(holder);
  if (!passing.length) {
    holder.textContent = "No row passes the filters.";
    fill(picked[kind], [], "");
    return;
  }
  fill(picked[kind], offered(kind, passing, values).map((name) => [name]), wanted);
  const name = picked[kind].value;
  panel(holder, kind, name, passing.filter((row) => row.panel === name), data.panels[kind][name].axes);
}

// Sweeps: one plot, for a task and a cost
function drawQuality(values, task, cost) {
  const holder = document.querySelector("[data-plot=quality]");
  if (!holder) return;
  const passing = rowsOf.quality.filter((row) => matches(row, values));
  empty(holder);
  if (!passing.length) {
    holder.textContent = "No row passes the filters.";
    for (const name of ["quality", "cost"]) fill(picked[name], [], "");
    return;
  }
  const tasks = [...new Set(passing.map(taskOf))];
  const methods = (name) => new Set(passing.filter((row) => taskOf(row) === name && row.look === row.label).map((row) => row.label)).size;
  const model = values.setup.split(/ on |, planned/)[0];
  const best = tasks.map((name) => [passing.some((row) => taskOf(row) === name && row.model === model) ? methods(name) : methods(name) / 100, name]);
  const opening = best.reduce((one, other) => (other[0] > one[0] ? other : one))[1];
  fill(picked.quality, tasks.map((name) => [name]), task || opening);
  const own = passing.filter((row) => taskOf(row) === picked.quality.value);
  fill(picked.cost, [...new Set(own.map((row) => row.cost))].map((name) => [name, data.costs[name]]), cost);
  const rows = own.filter((row) => row.cost === picked.cost.value);
  panel(holder, "quality", rows[0].panel, rows, data.panels.quality[rows[0].panel].axes);
}

function taskOf(row) {
  const machines = new Set(rowsOf.quality.map((each) => each.machine));
  return machines.size > 1 ? `${row.task}, ${row.machine}` : row.task;
}
