"use strict";
// Draws the report from the two JSON blocks of the page. All text is set by textContent: what stands in the data is text.

const AXES = {
  step: ["steps", "step"], audio_h: ["audio hours", "audio hours"], targets: ["targets", "targets"],
  hours: ["training time", "hours of training (validation left out)"],
};
const SURE = 3; // standard errors
const live = document.documentElement.dataset.live === "yes";
let data = JSON.parse(document.getElementById("data").textContent);
let clips = JSON.parse(document.getElementById("clips").textContent);
const state = { axis: "step", hidden: new Set(), detail: null, lines: "both", marks: "some", log: false, answers: "all", off: {} };
const charts = new Map(); // id -> {figure, plot, sign, ...}
const shown = new Map(); // key of a rebuilt part -> what it was built from

// -- small things ---------------------------------------------------------------------------------------------------

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  made.append(...children.filter((c) => c !== null && c !== undefined).map((c) => (c instanceof Node ? c : String(c))));
  return made;
}
const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (number) => css(`--c${number % 8}`);
const dash = (number) => [[], [7, 4], [2, 3], [10, 3, 2, 3]][Math.floor(number / 8) % 4];

function short(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
}
const percent = (share, digits = 1) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`);
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
const last = (list) => list[list.length - 1];

function table(head, rows, label) {
  const cell = (kind, content, number, wide) => el(kind, { class: number ? "number" : wide ? "wide" : null, scope: kind === "th" ? "col" : null }, content);
  const numbers = head.map((_, i) => rows.length > 0 && rows.every((r) => typeof r[i] === "number" || /^[+\-−–]?[\d.,]*\s?[%kM]?$/.test(String(r[i]))));
  const made = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h, i) => cell("th", h, numbers[i])))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((c, i) => cell("td", typeof c === "number" ? c.toLocaleString("en") : c, numbers[i], String(c).length > 40))))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, made);
}

/** Build a part of the page again when what it shows has changed; a playing clip or an open table stays otherwise. */
function part(id, about, build) {
  const sign = JSON.stringify(about);
  if (shown.get(id) === sign) return;
  shown.set(id, sign);
  byId(id).replaceChildren(...build());
}

// -- what is shown --------------------------------------------------------------------------------------------------

const visible = () => data.runs.filter((r) => !state.hidden.has(r.name));
// unless one is chosen: the one that is training, else the last stage
const detail = () => data.runs.find((r) => r.name === state.detail) || visible().find((r) => !r.finished) || last(visible()) || data.runs[0];
const numberOf = (run) => data.runs.indexOf(run);

/** Where a step stands on the chosen axis: straight between the points that the report keeps. */
function place(run, steps) {
  const to = run.axes[state.axis];
  if (state.axis === "step") return steps;
  const from = run.axes.step;
  let i = 0;
  return steps.map((step) => {
    if (!to || step > last(from)) return to && from.length > 1 ? last(to) : null;
    while (i < from.length - 2 && from[i + 1] < step) i++;
    const width = from[i + 1] - from[i];
    return width > 0 ? to[i] + ((to[i + 1] - to[i]) * Math.max(0, step - from[i])) / width : to[i];
  });
}

function lossCurves(run, of, label, shade, marks) {
  const curves = [];
  if (of.raw && state.lines !== "smooth") curves.push({ run, label: `${label} raw`, ...of.raw, style: "thin", shade, marks });
  if (of.smooth && state.lines !== "raw") curves.push({ run, label: `${label} smoothed`, ...of.smooth, style: "line", shade, marks });
  return curves;
}

function specs() {
  const found = [], runs = visible(), one = detail();
  const add = (section, id, title, unit, curves, more = {}) => {
    const kept = curves.filter((c) => c.x && c.y.some((y) => y !== null));
    if (kept.length) found.push({ section, id, title, unit, curves: kept, ...more });
  };
  for (const stage of new Set(runs.map((r) => r.stage))) {
    const of = runs.filter((r) => r.stage === stage);
    add("loss", `loss:${stage}`, stage, "loss a target, nats", of.flatMap((run) => {
      const n = numberOf(run), curves = lossCurves(run, run.train, `${run.name} training`, n);
      curves.push({ run, label: `${run.name} validation`, ...run.val.loss, style: "dots", shade: n });
      if (run.val.alone !== null) curves.push({ run, label: `${run.name} decoder alone`, x: [0, Math.max(run.done, 1)], y: [run.val.alone, run.val.alone], style: "dashed", shade: n });
      for (const [k, [mix, curve]] of Object.entries(run.also).entries()) curves.push({ run, label: `${run.name}, mix ${mix}`, ...curve, style: "dots", shade: 5 + k });
      return curves;
    }), { log: true });
    add("listening", `listening:${stage}`, stage, "listening difference, nats a target; bars: 3 standard errors", of.flatMap((run) => [
      { run, label: `${run.name} other clip`, ...run.val.listening, style: "dots", shade: numberOf(run) },
      { run, label: `${run.name} clip alike`, ...run.val.alike, style: "dots", shade: numberOf(run), dash: [4, 4] },
    ]), { zero: true });
  }
  for (const [kind, groups] of one ? Object.entries(one.groups) : []) {
    const names = Object.entries(groups);
    add(kind, `${kind}:train`, `${one.name}: training loss`, "loss a target, nats", names.flatMap(([name, g], n) => lossCurves(one, g, name, n)), { log: true });
    add(kind, `${kind}:val`, `${one.name}: validation loss`, "loss a target, nats", names.map(([name, g], n) => ({ run: one, label: name, ...g.loss, style: "dots", shade: n })), { log: true });
    add(kind, `${kind}:listening`, `${one.name}: listening difference`, "nats a target; bars: 3 standard errors", names.map(([name, g], n) => ({ run: one, label: name, ...g.listening, style: "dots", shade: n })), { zero: true });
  }
  const each = (pick) => runs.map((run) => ({ run, label: run.name, ...pick(run), style: "line", shade: numberOf(run) }));
  add("optim", "lr", "Learning rate", "peak of the schedule", each((r) => r.train.lr));
  add("optim", "grad_norm", "Gradient norm", "over all trained parameters, before clipping", each((r) => r.train.grad_norm), { log: true });
  for (const [name, title, unit, from] of [
    ["audio_h_per_device_h", "Speed", "audio hours a device hour"], ["mfu", "MFU", "useful FLOPs over the peak"],
    ["encoder_padding", "Padding of the encoder", "share of its frames"], ["decoder_padding", "Padding of the decoder", "share of its slots"],
    ["waiting", "Waiting for data", "share of the time"], ["validation_s", "Validation", "seconds each, not part of the training time"],
    ["answers_s", "Answers in words", "seconds of each validation"], ["memory_gib", "Memory", "GiB at most so far, first device or process"],
  ]) add("speed", name, title, unit, each((r) => r.speed[name] || {}));
  return found;
}

// -- a chart --------------------------------------------------------------------------------------------------------

function eventsOf(spec) {
  if (state.marks === "none") return [];
  const runs = [...new Set(spec.curves.map((c) => c.run))];
  return runs.flatMap((run) => run.events.filter((e) => state.marks === "all" || e.event !== "checkpoint").map((e) => ({
    x: place(run, [e.step])[0], text: `${run.name}: ${words(e)}`, shade: numberOf(run),
  })));
}

const processes = (n) => `${n} ${n === 1 ? "process" : "processes"}`;

function words(e) {
  if (e.event === "resume") return `resumed at step ${e.step} on ${processes(e.world)} (before: ${e.world_before ?? "not known"})`;
  if (e.event === "start") return `started on ${processes(e.world)}`;
  if (e.event === "mix") return `mix changed from step ${e.from_step} on: ${Object.entries(e.percent || {}).map(([c, p]) => `${c} ${p} %`).join(", ")}`;
  if (e.event === "step skipped") return `step ${e.number} NOT TAKEN: ${e.because}, gradient norm ${e.grad_norm}${(e.not_finite || []).length ? `: ${e.not_finite.join(", ")}` : ""}`;
  if (e.event === "plan restarted") return `new order of data: ${e.because}`;
  if (e.event === "checkpoint") return `checkpoint (${e.seconds} s)`;
  return String(e.event);
}

function frame(spec) {
  const title = el("figcaption"), legend = el("ul", { class: "legend" });
  const plot = el("div", { class: "plot", tabindex: "0", role: "group" });
  const readout = el("output", { class: "readout" }), values = el("div");
  const more = el("details", {}, el("summary", {}, "Values as a table"), values);
  const figure = el("figure", { "data-chart": spec.id }, title, legend, plot, readout, more);
  const chart = { figure, title, legend, plot, readout, values, more, sign: "", u: null, spec };
  more.addEventListener("toggle", () => fillTable(chart));
  plot.addEventListener("keydown", (e) => onKey(chart, e));
  new ResizeObserver(() => {
    if (chart.u && plot.clientWidth > 0 && plot.clientWidth !== chart.u.width) chart.u.setSize({ width: plot.clientWidth, height: 240 });
  }).observe(plot);
  return chart;
}

function fillTable(chart) {
  if (!chart.more.open) return;
  const curves = chart.spec.curves.filter((c) => c.style !== "thin" && c.style !== "dashed");
  let steps = [...new Set(curves.flatMap((c) => c.x))].sort((a, b) => a - b);
  if (steps.length > 100) steps = steps.filter((_, i) => i % Math.ceil(steps.length / 100) === 0 || i === steps.length - 1);
  const at = curves.map((c) => new Map(c.x.map((x, i) => [x, c.se ? `${short(c.y[i])} ± ${short(SURE * c.se[i])}` : short(c.y[i])])));
  chart.values.replaceChildren(table(["step", ...curves.map((c) => c.label)], steps.map((s) => [s, ...at.map((m) => m.get(s) ?? "")]), `${chart.spec.title}, values`));
}

function onKey(chart, e) {
  const u = chart.u;
  if (!u || e.ctrlKey || e.metaKey || e.altKey) return;
  const { min, max } = u.scales.x, at = u.cursor.left >= 0 ? u.posToVal(u.cursor.left, "x") : (min + max) / 2;
  const move = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
  if (move) {
    const xs = u.data[0];
    let i = u.cursor.idx ?? 0;
    if (u.cursor.left >= 0) i = Math.min(xs.length - 1, Math.max(0, i + move * (e.shiftKey ? 10 : 1)));
    u.setCursor({ left: u.valToPos(xs[i], "x"), top: u.over.clientHeight / 2 });
  } else if (e.key === "+" || e.key === "-") {
    const half = ((max - min) / 2) * (e.key === "+" ? 0.5 : 2), full = chart.full;
    chart.zoom = e.key === "-" && 2 * half >= full[1] - full[0] ? null : [Math.max(full[0], at - half), Math.min(full[1], at + half)];
    u.setScale("x", { min: (chart.zoom || full)[0], max: (chart.zoom || full)[1] });
  } else if (e.key === "Escape") {
    chart.zoom = null;
    u.setScale("x", { min: chart.full[0], max: chart.full[1] });
  } else return;
  e.preventDefault();
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && Math.abs(xs[low - 1] - x) <= Math.abs(xs[low] - x) ? low - 1 : low;
}

function read(chart, u) {
  const left = u.cursor.left;
  if (left === undefined || left < 0) { chart.readout.textContent = ""; return; }
  const x = u.posToVal(left, "x"), off = state.off[chart.spec.id] || {};
  const parts = chart.points.filter((c) => !off[c.label] && c.at.length).map((c) => {
    const i = nearest(c.at, x);
    return `${c.label} ${short(c.y[i])}${c.se ? ` ± ${short(SURE * c.se[i])}` : ""}`;
  });
  const near = chart.events.filter((e) => Math.abs(u.valToPos(e.x, "x") - left) < 6).map((e) => e.text);
  chart.readout.textContent = [`${AXES[state.axis][0]} ${short(x)}`, ...parts, ...near].join(" · ");
}

function decorate(chart, u) {
  const { ctx, bbox } = u, ratio = devicePixelRatio, off = state.off[chart.spec.id] || {};
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  const line = (x0, y0, x1, y1) => { ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke(); };
  if (chart.spec.zero) {
    ctx.strokeStyle = css("--soft"); ctx.lineWidth = ratio; ctx.setLineDash([]);
    const y = u.valToPos(0, "y", true);
    line(bbox.left, y, bbox.left + bbox.width, y);
  }
  ctx.lineWidth = ratio;
  for (const e of chart.events) {
    const x = u.valToPos(e.x, "x", true);
    ctx.strokeStyle = ctx.fillStyle = css("--event"); ctx.setLineDash([2 * ratio, 3 * ratio]);
    line(x, bbox.top, x, bbox.top + bbox.height);
    ctx.beginPath(); ctx.moveTo(x - 4 * ratio, bbox.top); ctx.lineTo(x + 4 * ratio, bbox.top); ctx.lineTo(x, bbox.top + 7 * ratio); ctx.fill();
  }
  ctx.setLineDash([]);
  for (const c of chart.points) {
    if (!c.se || off[c.label]) continue;
    ctx.strokeStyle = color(c.shade); ctx.lineWidth = 1.5 * ratio;
    c.at.forEach((at, i) => {
      if (c.se[i] === null || c.y[i] === null) return;
      const x = u.valToPos(at, "x", true), y0 = u.valToPos(c.y[i] - SURE * c.se[i], "y", true), y1 = u.valToPos(c.y[i] + SURE * c.se[i], "y", true);
      line(x, y0, x, y1); line(x - 3 * ratio, y0, x + 3 * ratio, y0); line(x - 3 * ratio, y1, x + 3 * ratio, y1);
    });
  }
  ctx.restore();
  chart.figure.dataset.drawn = "yes";
}

function draw(chart, spec) {
  chart.spec = spec;
  const off = (state.off[spec.id] ??= {}), log = state.log && spec.log;
  const points = spec.curves.map((c) => {
    const at = place(c.run, c.x), good = at.map((x, i) => x !== null && c.y[i] !== null && (!log || c.y[i] > 0));
    const keep = (list) => list.filter((_, i) => good[i]);
    return { ...c, at: keep(at), y: keep(c.y), se: c.se ? keep(c.se) : null };
  });
  const ends = spec.curves.map((c) => [c.label, c.style, c.x.length, last(c.x), last(c.y)]);
  const sign = JSON.stringify([state.axis, log, state.marks, matchMedia("(prefers-color-scheme: dark)").matches, off, ends, spec.title, points.map((c) => [c.at, c.y, c.se, c.shade]), eventsOf(spec)]);
  if (sign === chart.sign) return;
  if (chart.axis !== state.axis) chart.zoom = null;
  Object.assign(chart, { sign, points, events: eventsOf(spec).filter((e) => e.x !== null), axis: state.axis });
  const tables = points.map((c) => [c.at, c.y]).map(([x, y]) => (x.length ? [x, y] : [[0], [null]]));
  const joined = uPlot.join(tables);
  chart.full = [joined[0][0], Math.max(last(joined[0]), joined[0][0] + 1e-9)];
  const ys = points.filter((c) => !off[c.label]).flatMap((c) => c.y.flatMap((y, i) => (c.se ? [y - SURE * (c.se[i] || 0), y + SURE * (c.se[i] || 0)] : [y])));
  let low = Infinity, high = -Infinity;
  for (const y of ys) { if (y < low) low = y; if (y > high) high = y; }
  if (spec.zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
  if (low > high) [low, high] = [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  const axis = { stroke: css("--soft"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
  const dots = (c) => c.style === "dots";
  const options = {
    width: Math.max(chart.plot.clientWidth, 200), height: 240, legend: { show: false },
    padding: [8, 12, 0, 0], cursor: { drag: { x: true, y: false }, points: { show: false } },
    scales: { x: { time: false }, y: log ? { distr: 3, log: 10 } : { range: [low - pad, high + pad] } },
    axes: [
      { ...axis, label: AXES[state.axis][1], labelSize: 18, size: 34, space: 60, values: (u, at) => at.map(short) },
      { ...axis, size: 58, values: (u, at) => at.map((v) => (v === null ? "" : short(v))) },
    ],
    series: [{}, ...points.map((c) => ({
      label: c.label, show: !off[c.label], spanGaps: true, stroke: color(c.shade), alpha: c.style === "thin" ? 0.45 : 1,
      width: c.style === "thin" ? 1 : c.style === "dashed" ? 1.3 : 2, dash: c.style === "dashed" ? [3, 4] : c.dash || dash(c.shade),
      points: { show: dots(c) || c.at.length < 2, size: 6, fill: color(c.shade) },
    }))],
    hooks: {
      draw: [(u) => decorate(chart, u)],
      setCursor: [(u) => read(chart, u)],
      setSelect: [(u) => { if (u.select.width > 2) chart.zoom = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]; }],
    },
  };
  if (chart.u) chart.u.destroy();
  chart.readout.textContent = "";
  chart.u = new uPlot(options, joined, chart.plot);
  chart.u.over.addEventListener("dblclick", () => { chart.zoom = null; });
  if (chart.zoom) chart.u.setScale("x", { min: chart.zoom[0], max: chart.zoom[1] });
  chart.title.replaceChildren(spec.title, el("small", {}, spec.unit));
  const told = points.filter((c) => c.style !== "thin" && c.y.length).map((c) => `${c.label}: from ${short(c.y[0])} to ${short(last(c.y))}`);
  chart.plot.setAttribute("aria-label", `${spec.title}, ${spec.unit}. ${told.join("; ")}. Arrow keys read values, plus and minus zoom.`);
  const names = JSON.stringify([points.map((c) => [c.label, c.style, c.shade]), sign.length && matchMedia("(prefers-color-scheme: dark)").matches]);
  if (chart.names !== names) {
    chart.names = names;
    chart.legend.replaceChildren(...points.map((c) => {
      const swatch = el("span", { class: `swatch ${c.style === "line" ? "" : c.dash ? "dashed" : c.style}`, "aria-hidden": "true" });
      swatch.style.borderColor = color(c.shade);
      const button = el("button", { type: "button", "aria-pressed": String(!off[c.label]) }, swatch, c.label);
      button.addEventListener("click", () => {
        state.off[chart.spec.id][c.label] = !state.off[chart.spec.id][c.label];
        button.setAttribute("aria-pressed", String(!state.off[chart.spec.id][c.label]));
        render();
      });
      return el("li", {}, button);
    }));
  }
  fillTable(chart);
}

// -- the parts of the page ------------------------------------------------------------------------------------------

const PARTS = [
  ["overview", "Runs"], ["loss", "Loss of each stage"], ["listening", "Does it listen?"], ["corpus", "By corpus"], ["task", "By task"],
  ["language", "By language"], ["optim", "Learning rate and gradient"], ["speed", "Where time goes"], ["mix", "Mix, asked for and had"],
  ["skips", "What was left out"], ["learns", "What learns"], ["events", "What happened"], ["config", "Settings that differ"], ["answers", "Answers"],
];
const TEXT = {
  loss: "Training loss as logged and smoothed over the last fiftieth of the rows (by targets); validation with dots; the decoder alone, without clips, dashed. Drag to zoom, double click to go back. With a chart in focus: arrow keys read values, + and − zoom.",
  listening: "How much more the same held-out answers cost when the clip is exchanged for another one. Below 3 standard errors a stage does not listen, however far its loss fell.",
  language: "A record's language is its card's only one; of several the one that the record says in its field language. Under “-” are those of which neither tells one.",
  mix: "Percent of the samples asked for, beside percent of samples and of targets that were trained on.",
};

function heard(pair) {
  if (!pair || !pair.y.length || last(pair.y) === null) return "–";
  const text = `${signed(last(pair.y))} ± ${(last(pair.se) ?? 0).toFixed(3)}`;
  const sure = last(pair.y) > SURE * (last(pair.se) ?? 0);
  return sure ? text : el("span", { class: "bad" }, `${text}: does not listen`);
}
const fell = (curve) => (curve && curve.y.length ? `${short(curve.y[0])} → ${short(last(curve.y))}` : "–");
const change = (curve) => (curve && curve.y.length > 1 && curve.y[0] ? `${(100 * (last(curve.y) / curve.y[0] - 1)).toFixed(1)} %` : "–");
function clock(s) {
  if (s === null || s === undefined) return "–";
  const m = Math.round(s / 60);
  return s < 100 ? `${Math.round(s)} s` : m < 100 ? `${m} min` : `${Math.floor(m / 60)} h ${m % 60} min`;
}

function build() {
  byId("parts").append(...PARTS.map(([id, title]) => el("a", { href: `#${id}` }, title)));
  byId("main").replaceChildren(...PARTS.map(([id, title]) => el("section", { "aria-labelledby": id }, el("h2", { id }, title),
    TEXT[id] ? el("p", { class: "soft" }, TEXT[id]) : null, el("div", { id: `${id}-text` }), el("div", { class: "grid", id: `${id}-charts` }))));
  byId("axes").append(...Object.entries(AXES).map(([axis, [label]]) => {
    const input = el("input", { type: "radio", name: "axis", value: axis, checked: axis === state.axis });
    input.addEventListener("change", () => { state.axis = axis; render(); });
    return el("label", {}, input, label);
  }));
  for (const [id, key] of [["detail", "detail"], ["lines", "lines"], ["marks", "marks"]]) {
    byId(id).addEventListener("change", (e) => { state[key] = e.target.value; render(); });
  }
  byId("log").addEventListener("change", (e) => { state.log = e.target.checked; render(); });
  byId("controls").addEventListener("submit", (e) => e.preventDefault());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
}

function controls() {
  part("runs", data.runs.map((r) => r.name), () => [el("legend", {}, "Runs"), ...data.runs.map((run) => {
    const box = el("input", { type: "checkbox", value: run.name, checked: !state.hidden.has(run.name) });
    box.addEventListener("change", () => { state.hidden[box.checked ? "delete" : "add"](run.name); render(); });
    return el("label", {}, box, run.name);
  })]);
  part("detail", data.runs.map((r) => r.name), () => data.runs.map((r) => el("option", { value: r.name }, r.name)));
  if (detail()) byId("detail").value = detail().name;
}

function texts() {
  const runs = visible(), one = detail();
  part("overview-text", runs.map((r) => [r.name, r.done, r.finished, r.val, r.notes, r.seconds, r.peak]), () => runs.length ? [
    table(["run", "validation loss", "change", "listening", "decoder alone", "steps", "state", "stage", "time"], runs.map((r) => [
      r.name, fell(r.val.loss), change(r.val.loss), heard(r.val.listening), short(r.val.alone), r.planned ? `${r.done} of ${r.planned}` : `${r.done}`,
      r.finished ? "finished" : "unfinished", r.stage, clock(r.seconds),
    ]), "Runs"),
    el("details", {}, el("summary", {}, "Notes"), el("ul", {}, ...runs.flatMap((r) => [...r.notes, ...(r.peak ? [`peak for the MFU: ${r.peak}`] : []), ...(r.commit ? [`code ${r.commit}`] : [])].map((n) => el("li", {}, `${r.name}: ${n}`))))),
  ] : [el("p", {}, data.runs.length ? "No run is chosen." : `No run below ${data.folder} has a metrics.jsonl yet.`)]);
  if (!one) return;
  for (const [kind, groups] of Object.entries(one.groups)) {
    const about = kind === "corpus" ? [["task", (g) => g.task], ["languages", (g) => g.languages.join(", ")]] : [];
    part(`${kind}-text`, [one.name, groups], () => [table([kind, ...about.map(([head]) => head), "training loss", "validation loss", "change", "listening", "clip alike"],
      Object.entries(groups).map(([name, g]) => [name, ...about.map(([, of]) => of(g)), g.smooth ? short(last(g.smooth.y)) : "–", fell(g.loss), change(g.loss), heard(g.listening), g.alike && g.alike.y.length ? `${signed(last(g.alike.y))} ± ${last(g.alike.se).toFixed(3)}` : "–"]), `By ${kind}`)]);
  }
  part("mix-text", [one.name, one.mix], () => {
    const sum = (key) => one.mix.reduce((s, r) => s + (r[key] || 0), 0) || 1;
    const [samples, targets, hours] = ["samples", "targets", "hours"].map(sum);
    return one.mix.length ? [el("h3", {}, one.name), table(["corpus", "asked", "samples", "of samples", "targets", "of targets", "hours", "epochs", "not trained on", "licence"],
      one.mix.map((r) => [r.corpus, `${r.asked.toFixed(2)} %`, r.samples, percent(r.samples / samples, 2), r.targets, percent(r.targets / targets, 2), r.hours === null ? "–" : `${short(r.hours)} (${percent(r.hours / hours)})`, r.epochs === null ? "–" : short(r.epochs), r.holes, r.licence]), "Mix")] : [el("p", {}, "Not known.")];
  });
  part("skips-text", [one.name, one.skips], () => [el("h3", {}, one.name), one.skips.length ? table(["corpus", "reason", "when", "records"],
    one.skips.map((s) => [s.corpus, s.reason, s.before ? "before the run" : "in the run", s.records]), "Records left out") : el("p", {}, "Nothing was left out.")]);
  part("learns-text", [one.name, one.learns], () => [el("h3", {}, one.name), el("pre", { tabindex: "0" }, one.learns || "trainable.txt is not there.")]);
  part("events-text", runs.map((r) => [r.name, r.events]), () => {
    const rows = runs.flatMap((r) => r.events.map((e) => [r.name, e.step, e.time ? new Date(1000 * e.time).toISOString().slice(0, 19).replace("T", " ") : "–", words(e)]));
    const few = rows.length > 200 ? rows.slice(-200) : rows;
    return [rows.length ? table(["run", "step", "time (UTC)", "event"], few, "Events") : el("p", {}, "Nothing is noted (events.jsonl)."), rows.length > few.length ? el("p", { class: "note" }, `The last 200 of ${rows.length}.`) : ""];
  });
  part("config-text", runs.map((r) => [r.name, r.config]), () => {
    const keys = [...new Set(runs.flatMap((r) => Object.keys(r.config)))];
    const differ = keys.filter((k) => new Set(runs.map((r) => r.config[k])).size > 1);
    const rows = (of) => of.map((k) => [k, ...runs.map((r) => r.config[k] ?? "–")]);
    const head = ["key", ...runs.map((r) => r.name)];
    return [runs.length < 2 ? el("p", {}, "One run is shown; choose another one to compare.") : differ.length ? table(head, rows(differ), "Settings that differ") : el("p", {}, "None."),
      el("details", {}, el("summary", {}, "All settings"), table(head, rows(keys), "All settings"))];
  });
  part("answers-text", [one.name, one.answers, state.answers, one.answers.shown.map((a) => clips[a.clip]?.length)], () => answers(one));
}

function answers(run) {
  if (!run.answers.rows) return [el("h3", {}, run.name), el("p", {}, "This run has answered nothing in words (log.answers is 0, or it has not begun).")];
  const choose = el("select", { id: "which" }, ...[["all", "all"], ["wrong", "wrong"], ["right", "right"]].map(([v, t]) => el("option", { value: v, selected: v === state.answers }, t)));
  choose.addEventListener("change", () => { state.answers = choose.value; render(); byId("which").focus(); });
  const rows = run.answers.shown.filter((a) => state.answers === "all" || a.right === (state.answers === "right"));
  return [
    el("h3", {}, `${run.name}, step ${run.answers.step}`),
    run.answers.exact.length ? table(["corpus", "exact match", "chance", "decoder alone", "clips", "choices", "mix"], run.answers.exact.map((g) => [g.corpus, percent(g.exact), percent(g.chance), percent(g.text_only), g.clips, g.choices.join(" / "), g.mix]), "Exact match") : "",
    el("p", {}, el("label", {}, "Answers shown ", choose), ` ${rows.length} of ${run.answers.rows}, from every question in turn, wrong ones first`),
    el("div", { class: "grid" }, ...rows.map((a) => {
      const found = clips[a.clip], sound = found && found.startsWith("data:audio/");
      const player = sound ? el("audio", { controls: true, preload: "metadata", src: found, "aria-label": `clip ${a.key}` }) : el("p", { class: "note" }, `No player: ${found || "no clip"}`);
      const line = (name, text) => [el("dt", {}, name), el("dd", {}, text)];
      return el("article", { class: "answer" }, player, el("dl", {}, ...line("asked", a.prompt), ...a.references.flatMap((text, n) => line(n ? "or" : "reference", text)),
        el("dt", {}, "answer"), el("dd", {}, a.output, a.cut ? el("span", { class: "soft" }, " … (cut)") : "", a.choices.length && !a.right ? el("span", { class: "bad" }, "  wrong") : ""),
        ...(a.text_only === null ? [] : line("decoder alone", a.text_only)), ...line("clip", `${a.corpus}/${a.key}`)),
        a.earlier.length ? el("details", {}, el("summary", {}, "Answered before"), el("dl", {}, ...a.earlier.flatMap(([step, said]) => line(`step ${step}`, said)))) : "");
    })),
  ];
}

function render() {
  controls();
  texts();
  const wanted = specs();
  for (const [id, chart] of charts) {
    if (!wanted.some((s) => s.id === id)) { chart.u?.destroy(); chart.figure.remove(); charts.delete(id); }
  }
  for (const [id] of PARTS) {
    const grid = byId(`${id}-charts`), of = wanted.filter((s) => s.section === id);
    of.forEach((spec, n) => {
      if (!charts.has(spec.id)) charts.set(spec.id, frame(spec));
      const figure = charts.get(spec.id).figure;
      if (grid.children[n] !== figure) grid.insertBefore(figure, grid.children[n] || null);
      draw(charts.get(spec.id), spec);
    });
    grid.hidden = !of.length;
    if (["loss", "listening", "corpus", "task", "language", "optim", "speed"].includes(id)) byId(id).parentElement.hidden = !of.length;
  }
  byId("about").textContent = `${data.folder}, read ${data.made.slice(0, 19).replace("T", " ")} UTC${live ? "; follows the runs" : ""}`;
}

// -- following running stages -----------------------------------------------------------------------------------------

async function follow() {
  try {
    const answer = await fetch(`data.json?known=${encodeURIComponent(data.version)}`, { cache: "no-store" });
    if (answer.status === 200) {
      data = await answer.json();
      const missing = data.runs.flatMap((r) => r.answers.shown).some((a) => !(a.clip in clips));
      if (missing) clips = await (await fetch("clips.json", { cache: "no-store" })).json();
      render();
    }
  } catch {
    byId("about").textContent = `${data.folder}: no answer; is make watch still running? The page shows what it read ${data.made.slice(0, 19).replace("T", " ")} UTC`;
  }
  setTimeout(follow, Number(data.poll_s || 3) * 1000);
}

build();
render();
if (live) setTimeout(follow, Number(data.poll_s || 3) * 1000);
document.documentElement.dataset.ready = "yes";
