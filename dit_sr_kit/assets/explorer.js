// The ES module of every explorer. fragment.py puts `const STYLE = "..."` in front of it and the module of
// one kind (kinds/*.js) behind it. A page without a kernel calls define(); anywidget calls the default export.
// A kind is a function of `ui`: it adds panels, charts and controls, and reads everything from `ui.data`.
/* global STYLE */
export const kinds = {};

// ---------------------------------------------------------------- small tools
const SVG = "http://www.w3.org/2000/svg";
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));

function make(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return node;
}
export const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

const ICONS = {
  play: "M4 2.5v11l9-5.5z", pause: "M4 3h3v10H4zM9 3h3v10H9z",
  back: "M10.5 3v10L4 8z", next: "M5.5 3v10L12 8z",
};
const icon = (name) => svg("svg", { viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true" },
  svg("path", { d: ICONS[name], fill: "currentColor" }));

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (digits > 2 && size !== 0 && size < 1e-4)) return value.toExponential(1).replace("-", "−");
  const text = value.toFixed(size >= 100 ? Math.min(digits, 1) : digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

function ticks(low, high, wanted = 4) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((v) => v >= raw);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) out.push(Math.round(v / step) * step);
  return { values: out, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// ---------------------------------------------------------------- state
function makeStore(initial) {
  const listeners = [];
  const store = {
    state: initial,
    on: (f) => listeners.push(f),
    set(patch) {
      const changed = Object.keys(patch).some((k) => store.state[k] !== patch[k]);
      if (!changed) return;
      Object.assign(store.state, patch);
      store.draw();
    },
    draw: () => listeners.forEach((f) => f(store.state)),
  };
  return store;
}

// ---------------------------------------------------------------- frames
// data.frames: name -> { lut, uris: [base64 of WebP] }. A grey frame with a lut is coloured here, once.
class Frames {
  constructor(data) {
    this.groups = data.frames || {};
    this.luts = Object.fromEntries(Object.entries(data.luts || {}).map(([k, v]) => [k, bytes(v)]));
    this.pictures = new Map();
  }
  get(name, index) {
    const group = this.groups[name];
    return group && this.pictures.get(name + "#" + Math.min(index, group.uris.length - 1));
  }
  async load(first, progress) {
    const jobs = [];
    for (const [name, group] of Object.entries(this.groups))
      group.uris.forEach((uri, i) => jobs.push({ name, i, uri, lut: this.luts[group.lut], rank: group.uris.length > 1 ? Math.abs(i - first) : 0 }));
    jobs.sort((a, b) => a.rank - b.rank);
    for (let at = 0; at < jobs.length; at += 12) {
      await Promise.all(jobs.slice(at, at + 12).map(async (j) => this.pictures.set(j.name + "#" + j.i, await picture(j.uri, j.lut))));
      progress();
    }
  }
}

const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

async function picture(uri, lut) {
  const bitmap = await createImageBitmap(new Blob([bytes(uri)], { type: "image/webp" }));
  if (!lut) return bitmap;
  const canvas = h("canvas", { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let p = 0, d = image.data; p < d.length; p += 4) {
    const at = 3 * d[p + 1];
    d[p] = lut[at]; d[p + 1] = lut[at + 1]; d[p + 2] = lut[at + 2];
  }
  return createImageBitmap(image);
}

// ---------------------------------------------------------------- panels
// spec: { title(s), note(s), frame(s) -> [group, index], linked, bar(s) -> {lut, low, high}, overlay(ctx, side, s), label(s) }
function makePanel(ui, spec) {
  const canvas = h("canvas", { role: "img" });
  const title = h("span", { class: "title" }), note = h("span", { class: "note" }), bar = h("div", { class: "bar" });
  const figure = h("figure", { class: "panel" + (spec.linked ? " linked" : "") }, h("figcaption", {}, title, note), canvas, bar);
  const context = canvas.getContext("2d");
  let shownBar = null;
  const draw = (state) => {
    title.textContent = spec.title(state);
    note.textContent = spec.note ? spec.note(state) : "";
    if (spec.bar) {
      const b = spec.bar(state), key = JSON.stringify(b);
      if (key !== shownBar) { shownBar = key; bar.replaceChildren(...(b ? colourBar(ui, b) : [])); }
    }
    const [group, index] = spec.frame(state);
    canvas.setAttribute("aria-label", (spec.label || spec.title)(state));
    const image = ui.frames.get(group, index);
    const ratio = globalThis.devicePixelRatio || 1;
    const box = ui.sizes.get(canvas) || { width: 0, height: 0 };
    const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
    if (!image || !width || !height) return;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    const { x, y, k } = spec.linked ? state.view : { x: 0.5, y: 0.5, k: 1 };
    const sw = image.width / k, sh = image.height / k, sx = x * image.width - sw / 2, sy = y * image.height - sh / 2;
    context.imageSmoothingEnabled = width / sw < 1.9; // below two screen pixels a pixel, uneven pixels look worse than soft ones
    context.imageSmoothingQuality = "high";
    context.clearRect(0, 0, width, height);
    context.drawImage(image, sx, sy, sw, sh, 0, 0, width, height);
    if (spec.overlay) spec.overlay(context, { width, height, ratio }, state);
    if (spec.linked && state.cursor && state.cursor.canvas !== canvas) {
      const cx = ((state.cursor.x - x) * k + 0.5) * width, cy = ((state.cursor.y - y) * k + 0.5) * height, r = 6 * ratio;
      for (const [colour, line] of [["rgba(0,0,0,.7)", 3], ["#fff", 1.2]]) {
        context.strokeStyle = colour; context.lineWidth = line * ratio;
        context.beginPath();
        context.moveTo(cx - r, cy); context.lineTo(cx + r, cy); context.moveTo(cx, cy - r); context.lineTo(cx, cy + r);
        context.stroke();
      }
    }
  };
  if (spec.linked) linkZoom(ui, canvas);
  ui.store.on(draw);
  ui.resize.observe(canvas);
  return figure;
}

function colourBar(ui, { lut, low, high }) {
  const table = ui.frames.luts[lut];
  const stops = [0, 32, 64, 96, 128, 160, 192, 224, 255].map((i) => `rgb(${table[3 * i]},${table[3 * i + 1]},${table[3 * i + 2]})`);
  return [h("span", {}, low), h("i", { style: `background:linear-gradient(90deg,${stops.join(",")})` }), h("span", {}, high)];
}

function zoomTo(ui, k, x = ui.store.state.view.x, y = ui.store.state.view.y) {
  k = clamp(k, 1, 16);
  const half = 0.5 / k;
  ui.store.set({ view: { k, x: clamp(x, half, 1 - half), y: clamp(y, half, 1 - half) } });
}

function linkZoom(ui, canvas) {
  const place = (event) => { // where the pointer is, in fractions of the whole picture
    const box = canvas.getBoundingClientRect(), v = ui.store.state.view;
    return { x: v.x + ((event.clientX - box.left) / box.width - 0.5) / v.k, y: v.y + ((event.clientY - box.top) / box.height - 0.5) / v.k };
  };
  const zoomAt = (event, factor) => {
    const p = place(event), v = ui.store.state.view, k = clamp(v.k * factor, 1, 16);
    zoomTo(ui, k, p.x + (v.x - p.x) * v.k / k, p.y + (v.y - p.y) * v.k / k);
  };
  let drag = null;
  canvas.addEventListener("pointerdown", (e) => { drag = { at: [e.clientX, e.clientY], view: ui.store.state.view }; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointermove", (e) => {
    if (drag) {
      const box = canvas.getBoundingClientRect(), v = drag.view;
      zoomTo(ui, v.k, v.x - (e.clientX - drag.at[0]) / box.width / v.k, v.y - (e.clientY - drag.at[1]) / box.height / v.k);
    }
    ui.store.set({ cursor: { ...place(e), canvas } });
  });
  canvas.addEventListener("pointerleave", () => ui.store.set({ cursor: null }));
  canvas.addEventListener("dblclick", (e) => zoomAt(e, e.shiftKey ? 0.5 : 2));
  canvas.addEventListener("wheel", (e) => { // a plain wheel scrolls the page
    if (!e.ctrlKey && !e.metaKey) return;
    e.preventDefault();
    zoomAt(e, Math.exp(-e.deltaY / 250));
  }, { passive: false });
}

// ---------------------------------------------------------------- charts
// spec: { title, note, x, xlabel, ylabel, xlog, xticks, domain, lines: [{value, label}], shade(s) -> [low, high],
//         series: [{ name, values | frames (one list a step), x, shown, digits, color, dash, weight(s) }], moving: bool }
function makeChart(ui, spec) {
  const box = h("figure", { class: "chart" });
  const plot = h("div", { class: "plot" }), legend = h("ul", { class: "legend" });
  box.append(h("figcaption", {}, h("span", { class: "title" }, spec.title), h("span", { class: "note" }, spec.note || "")), plot, legend);
  const all = spec.series.flatMap((q) => q.frames ? q.frames.flat() : q.values).concat((spec.lines || []).map((l) => l.value)).filter((v) => v !== null);
  let [low, high] = spec.domain || [Math.min(...all), Math.max(...all)];
  if (!spec.domain) { const pad = Math.max((high - low) * 0.06, 0.01); low -= pad; high += pad; }
  const warp = spec.xlog ? Math.log2 : (v) => v;
  const xs = spec.series.flatMap((q) => q.x || spec.x), xlow = warp(Math.min(...xs)), xhigh = warp(Math.max(...xs));
  const m = { left: 38, right: 10, top: 16, bottom: 30 }, height = 158;
  let width = 0, px, py, paths, dots, marker, shade;
  const values = spec.series.map(() => h("b"));
  legend.append(...spec.series.map((q, i) => h("li", {}, svg("svg", { width: 18, height: 8, "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 18, y1: 4, y2: 4, class: "c" + q.color, "stroke-dasharray": q.dash, "stroke-width": 2 })), q.name, values[i])));
  if (spec.legend === false) legend.remove();

  const line = (q, list) => {
    let d = "", pen = "M";
    list.forEach((v, i) => {
      if (v === null) { pen = "M"; return; }
      d += `${pen}${px((q.x || spec.x)[i]).toFixed(1)} ${py(clamp(v, low - (high - low), high + (high - low))).toFixed(1)}`;
      pen = "L";
    });
    return d;
  };
  const layout = () => { // everything that does not move with the step
    px = (v) => m.left + (warp(v) - xlow) / (xhigh - xlow || 1) * (width - m.left - m.right);
    py = (v) => height - m.bottom - (v - low) / (high - low) * (height - m.top - m.bottom);
    const root = svg("svg", { width, height, role: "img", "aria-label": `${spec.title}. ${spec.note || ""}` });
    const yt = ticks(low, high), xt = spec.xticks ? { values: spec.xticks.map((t) => t[0]) } : ticks(xlow, xhigh, Math.max(3, Math.min(8, Math.floor(width / 60))));
    if (spec.whole) xt.values = [xlow, ...xt.values.filter((v) => Number.isInteger(v) && (v - xlow) / (xhigh - xlow || 1) > 0.05)];
    shade = svg("rect", { class: "shade", y: m.top, height: height - m.top - m.bottom, x: 0, width: 0 });
    root.append(shade);
    for (const v of yt.values) root.append(
      svg("line", { class: "grid", x1: m.left, x2: width - m.right, y1: py(v), y2: py(v) }),
      svg("text", { class: "tick", x: m.left - 5, y: py(v) + 3.5, "text-anchor": "end" }, number(v, yt.digits)));
    xt.values.forEach((v, i) => root.append(
      svg("text", { class: "tick", x: px(v), y: height - m.bottom + 13, "text-anchor": "middle" }, spec.xticks ? spec.xticks[i][1] : number(v, spec.whole ? 0 : xt.digits))));
    root.append(svg("text", { class: "tick", x: (m.left + width - m.right) / 2, y: height - 4, "text-anchor": "middle" }, spec.xlabel || ""),
      svg("text", { class: "tick", x: 2, y: 9 }, spec.ylabel || ""),
      svg("line", { class: "axis", x1: m.left, x2: width - m.right, y1: height - m.bottom, y2: height - m.bottom }));
    for (const l of spec.lines || []) root.append(
      svg("line", { class: "reference", x1: m.left, x2: width - m.right, y1: py(l.value), y2: py(l.value) }),
      svg("text", { class: "tick label", x: width - m.right, y: py(l.value) - 3, "text-anchor": "end" }, l.label));
    const clip = svg("svg", { x: 0, y: m.top - 4, width, height: height - m.top - m.bottom + 8, viewBox: `0 ${m.top - 4} ${width} ${height - m.top - m.bottom + 8}` });
    paths = spec.series.map((q) => svg("path", { class: "curve c" + q.color, "stroke-dasharray": q.dash, d: q.frames ? "" : line(q, q.values) }));
    marker = svg("line", { class: "marker", y1: m.top, y2: height - m.bottom });
    dots = spec.series.map((q) => svg("circle", { class: "dot c" + q.color, r: 3.2 }));
    clip.append(...paths);
    root.append(clip);
    if (!spec.still) { root.append(marker, ...dots); pick(root); }
    plot.replaceChildren(root);
  };
  const pick = (root) => {
    const go = (e) => {
      const at = e.clientX - root.getBoundingClientRect().left;
      const gaps = ui.data.x.map((v) => Math.abs(px(v) - at));
      ui.go(gaps.indexOf(Math.min(...gaps)));
    };
    root.addEventListener("pointerdown", (e) => { root.setPointerCapture(e.pointerId); go(e); });
    root.addEventListener("pointermove", (e) => { if (e.buttons & 1) go(e); });
    root.classList.add("pick");
  };
  const draw = (state) => {
    const now = (ui.sizes.get(plot) || { width: 0 }).width;
    if (!now) return;
    if (now !== width) { width = now; layout(); }
    const at = ui.data.x[state.step];
    if (spec.shade) {
      const [a, b] = spec.shade(state).map((v) => px(clamp(v, 2 ** xlow, 2 ** xhigh)));
      shade.setAttribute("x", a); shade.setAttribute("width", Math.max(0, b - a));
    }
    marker.setAttribute("x1", px(at)); marker.setAttribute("x2", px(at));
    spec.series.forEach((q, i) => {
      if (q.frames) paths[i].setAttribute("d", line(q, q.frames[Math.min(state.step, q.frames.length - 1)]));
      if (q.weight) { const w = q.weight(state); paths[i].style.strokeWidth = w ? 2.6 : 1.2; paths[i].style.opacity = dots[i].style.opacity = w ? 1 : 0.45; }
      if (spec.still) return;
      const qx = q.x || spec.x, n = nearest(qx, at), v = q.values[n];
      dots[i].setAttribute("cx", px(qx[n]));
      dots[i].setAttribute("visibility", v === null || v < low || v > high ? "hidden" : "visible");
      if (v !== null) dots[i].setAttribute("cy", py(v));
      values[i].textContent = number((q.shown || q.values)[n], q.digits === undefined ? 2 : q.digits) + (q.unit || "");
    });
  };
  ui.store.on(draw);
  ui.resize.observe(plot);
  return box;
}

const nearest = (list, at) => list.reduce((best, v, i) => (Math.abs(v - at) < Math.abs(list[best] - at) ? i : best), 0);

// ---------------------------------------------------------------- the shell around a kind
function toolbar(ui) {
  const { data, store } = ui, last = data.count - 1;
  const button = (label, title, press, ...content) => h("button", { type: "button", "aria-label": label, title, onclick: press }, ...content);
  const play = button("play", "play or pause (space)", () => ui.play(!store.state.playing), icon("play"));
  const slider = h("input", { type: "range", min: 0, max: last, step: 1, value: 0, "aria-label": data.sliderLabel || "step", class: "steps", oninput: (e) => ui.go(+e.target.value) });
  const label = h("output", { class: "now" });
  const references = (data.references || []).map((r) => {
    const b = button(r.title, `${r.title}: click, or hold ${r.key.toUpperCase()}`, () => store.set({ reference: store.state.reference === r.key ? null : r.key }), r.label, h("kbd", { "aria-hidden": "true" }, r.key.toUpperCase()));
    store.on((s) => { b.setAttribute("aria-pressed", s.reference === r.key); });
    return b;
  });
  let shown = null;
  store.on((s) => {
    slider.value = s.step;
    label.textContent = data.stepLabels[s.step];
    slider.setAttribute("aria-valuetext", data.stepLabels[s.step]);
    if (shown !== s.playing) {
      shown = s.playing;
      play.replaceChildren(icon(shown ? "pause" : "play"));
      play.setAttribute("aria-label", shown ? "pause" : "play");
    }
  });
  const zoom = h("span", { class: "zoom" }, button("zoom out", "zoom out (−)", () => zoomTo(ui, store.state.view.k / 2), "−"));
  const factor = h("output", { class: "factor", title: "zoom" });
  store.on((s) => { factor.textContent = "×" + number(s.view.k, s.view.k % 1 ? 1 : 0); });
  zoom.append(factor, button("zoom in", "zoom in (+): also double-click, or Ctrl and wheel; drag to move", () => zoomTo(ui, store.state.view.k * 2), "+"),
    button("whole picture", "whole picture (0)", () => zoomTo(ui, 1, 0.5, 0.5), "fit"));
  ui.extra = h("span", { class: "extra" });
  return h("div", { class: "tools" },
    h("div", { class: "toolrow" }, play, button("step back", "step back (left arrow)", () => ui.go(store.state.step - 1), icon("back")),
      button("step forward", "step forward (right arrow)", () => ui.go(store.state.step + 1), icon("next")), slider, label),
    h("div", { class: "toolrow" }, ui.extra, references.length ? h("span", { class: "references", role: "group", "aria-label": data.referenceLabel || "show instead" }, h("span", { class: "hint" }, data.referenceLabel || "show instead"), references) : null, zoom));
}

function keyboard(ui, wrapper) {
  const { store, data } = ui, held = new Set();
  const actions = {
    ArrowLeft: () => ui.go(store.state.step - 1), ArrowRight: () => ui.go(store.state.step + 1),
    Home: () => ui.go(0), End: () => ui.go(data.count - 1), " ": () => ui.play(!store.state.playing),
    "+": () => zoomTo(ui, store.state.view.k * 2), "=": () => zoomTo(ui, store.state.view.k * 2),
    "-": () => zoomTo(ui, store.state.view.k / 2), 0: () => zoomTo(ui, 1, 0.5, 0.5), ...ui.keys,
  };
  wrapper.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const key = e.key.length === 1 ? e.key.toLowerCase() : e.key;
    const target = e.target, onButton = target.tagName === "BUTTON" && (key === " " || key === "Enter");
    const onOther = (target.tagName === "SELECT" || (target.type === "range" && !target.classList.contains("steps"))) && key !== " ";
    const reference = (data.references || []).find((r) => r.key === key);
    if (onButton || (onOther && !reference)) return;
    if (reference) { if (!e.repeat) { held.add(key); store.set({ reference: key }); } }
    else if (actions[key]) actions[key]();
    else return;
    e.preventDefault();
    e.stopPropagation();
  });
  const release = (key) => { if (held.delete(key) && store.state.reference === key) store.set({ reference: null }); };
  wrapper.addEventListener("keyup", (e) => release(e.key.toLowerCase()));
  wrapper.addEventListener("focusout", () => [...held].forEach(release));
}

function isDark(node) { // by the background that is really behind us: notebooks, sites and editors each name it differently
  for (let n = node; n; n = n.parentNode || n.host) {
    if (!(n instanceof Element)) continue;
    const c = (getComputedStyle(n).backgroundColor.match(/[\d.]+/g) || []).map(Number);
    if (c.length === 3 || c[3] > 0.5) return 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2] < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// Build an explorer inside a shadow root. Returns { state, destroy }.
export function mount(host, data, before = {}) {
  const root = host.shadowRoot || host.attachShadow({ mode: "open" });
  const wrapper = h("div", { class: "explorer", role: "group", tabindex: 0, "aria-label": `${data.title}. ${data.question}`, "data-kind": data.kind });
  const state = { step: clamp(before.step ?? data.start ?? 0, 0, data.count - 1), view: before.view || { x: 0.5, y: 0.5, k: 1 }, reference: null, playing: false, cursor: null, ...data.state };
  const ui = { data, store: makeStore(state), frames: new Frames(data), keys: {}, body: h("div", { class: "body" }) };
  let timer = null;
  ui.sizes = new Map(); // measured when they change: asking at each step would lay the page out again each time
  ui.resize = new ResizeObserver((entries) => { for (const e of entries) ui.sizes.set(e.target, e.contentRect); ui.store.draw(); });
  ui.go = (step) => ui.store.set({ step: clamp(step, 0, data.count - 1) });
  ui.play = (on) => {
    clearInterval(timer);
    if (on && ui.store.state.step === data.count - 1) ui.go(0);
    ui.store.set({ playing: on });
    if (on) timer = setInterval(() => (ui.store.state.step < data.count - 1 ? ui.go(ui.store.state.step + 1) : ui.play(false)), 450);
  };
  ui.panel = (spec) => makePanel(ui, spec);
  ui.chart = (spec) => makeChart(ui, spec);
  ui.row = (label, panels) => ui.body.append(h("div", { class: "row", style: `--n:${panels.length};--aspect:${data.width}/${data.height}` }, label ? h("div", { class: "rowlabel" }, label) : null, h("div", { class: "panels" }, panels)));
  ui.charts = (charts) => { if (charts.length) ui.body.append(h("div", { class: "charts" }, charts)); };

  const tools = toolbar(ui);
  kinds[data.kind](ui);
  const list = (items) => h("ul", {}, items.map((t) => h("li", {}, t)));
  wrapper.append(
    h("div", { class: "head" }, h("div", { class: "name", role: "heading", "aria-level": 3 }, data.title), h("div", { class: "question" }, data.question),
      data.facts ? h("div", { class: "facts" }, data.facts) : null),
    tools, ui.body,
    h("div", { class: "boxes" },
      h("section", { class: "how" }, h("div", { class: "boxname" }, "How to read it"), list(data.how_to_read)),
      h("section", { class: "limits" }, h("div", { class: "boxname" }, "What it does not show"), list(data.limits))),
    h("div", { class: "keys" }, "Keys: ", h("kbd", {}, "←"), h("kbd", {}, "→"), " step · ", h("kbd", {}, "Home"), h("kbd", {}, "End"), " first, last · ", h("kbd", {}, "Space"), " play · ",
      h("kbd", {}, "+"), h("kbd", {}, "−"), h("kbd", {}, "0"), " zoom", ...(data.keys || []).map((t) => " · " + t)));
  keyboard(ui, wrapper);
  root.replaceChildren(h("style", {}, STYLE), wrapper);

  const theme = () => wrapper.setAttribute("data-theme", isDark(host) ? "dark" : "light");
  theme();
  const media = matchMedia("(prefers-color-scheme: dark)"), watch = new MutationObserver(() => setTimeout(theme, 50));
  media.addEventListener("change", theme);
  wrapper.addEventListener("pointerenter", theme);
  for (const n of [document.documentElement, document.body]) watch.observe(n, { attributes: true });

  ui.store.draw();
  ui.frames.load(state.step, () => ui.store.draw()).then(
    () => host.setAttribute("data-ready", "true"),
    (error) => { host.setAttribute("data-ready", "failed"); wrapper.append(h("p", { class: "error" }, `A picture could not be decoded: ${error}`)); });
  return {
    state: ui.store.state,
    destroy() { ui.play(false); ui.resize.disconnect(); watch.disconnect(); media.removeEventListener("change", theme); },
  };
}

// ---------------------------------------------------------------- host 1: a page, with or without a kernel
export function define(name) {
  const build = (element) => {
    if (element.shadowRoot) return; // built already
    const source = element.querySelector('script[type="application/json"]');
    if (source && source.nextElementSibling) mount(element, JSON.parse(source.textContent)); // the marker after it: the text is complete
  };
  if (!customElements.get(name))
    customElements.define(name, class extends HTMLElement { connectedCallback() { build(this); } });
  const sweep = () => document.querySelectorAll(name).forEach(build);
  sweep();
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", sweep);
}

// ---------------------------------------------------------------- host 2: anywidget
function render({ model, el }) {
  const host = h("div", { "data-lm-suppress-shortcuts": "true", class: "dit-sr-explorer" });
  el.append(host);
  let shown = null;
  const show = () => {
    const data = model.get("data");
    host.removeAttribute("data-ready");
    const before = shown ? { ...shown.state } : {};
    if (shown) shown.destroy();
    shown = data && data.kind ? mount(host, data, { view: before.view, step: before.step }) : null;
  };
  show();
  model.on("change:data", show);
  return () => { model.off("change:data", show); if (shown) shown.destroy(); };
}
export default { render };
