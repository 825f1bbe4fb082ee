// All processes on common axes: x_t = m x0 + a y + s n. A formula takes the constants of its sliders and returns
// at(u): the triple [m, a, s] at normalised time u (0 clean, 1 the noisiest trained state), and calls(n): the times of n network calls.
const halfToEven = (v) => { const low = Math.floor(v), rest = v - low; return rest < 0.5 ? low : rest > 0.5 ? low + 1 : low + (low % 2); };
const FORMULAS = {
  resshift(c) { // (RS-3), (RS-2)
    const first = Math.min(c.min_noise_level / c.kappa, c.min_noise_level), last = c.num_train_timesteps - 1;
    return {
      at(u) { const root = first * (c.etas_end / first) ** (u ** c.power), eta = root * root; return [1 - eta, eta, c.kappa * root]; },
      calls(n) { const T = last + 1, k = Math.min(n, T); return Array.from({ length: k }, (_, i) => Math.floor(T / k * i) / last).reverse(); },
    };
  },
  variance_preserving(c) { // (DS-4), (DS-2); without a shift this is DDPM
    const T = c.num_train_timesteps, t1 = Math.round(c.truncation), alphas = [], b0 = Math.sqrt(c.beta_start), b1 = Math.sqrt(c.beta_end);
    for (let i = 0, product = 1; i < T; i++) { product *= 1 - (b0 + (b1 - b0) * i / (T - 1)) ** 2; alphas.push(product); }
    return {
      at(u) {
        const i = Math.round(u * (T - 1)), alpha = Math.sqrt(alphas[i]);
        const eta = !c.shifted ? 0 : i >= t1 ? 1 : (1 - Math.cos(Math.PI * (0.001 + 0.998 * i / (t1 - 1)))) / 2;
        return [alpha * (1 - eta), alpha * eta, Math.sqrt(1 - alphas[i])];
      },
      calls(n) {
        const k = Math.min(n, t1 - 1), stride = (t1 - 1) / k, kept = [];
        for (let i = 0, place = 0; i <= k; i++, place += stride) kept.push(halfToEven(place) / (T - 1));
        return kept.reverse().slice(0, -1);
      },
    };
  },
  straight(c) { // x_t = (1 - w) x0 + w (noise or LR), w = time after the time shift
    const place = (u) => c.time_shift * u / (1 + (c.time_shift - 1) * u);
    return {
      at(u) { const w = place(u); return c.from_lr ? [1 - w, w, 0] : [1 - w, 0, w * c.noise_scale]; },
      calls(n) { return Array.from({ length: n }, (_, i) => 1 - i / n); },
    };
  },
};

kinds.schedule = (ui) => {
  const { data, store } = ui;
  const start = data.processes.map((p) => ({ ...(p.formula || {}).constants }));
  Object.assign(store.state, { constants: start, hidden: [], calls: data.calls });
  const table = (p) => ({ // no formula: straight lines between the points of the table
    at(u) {
      const k = Math.max(1, p.t.findIndex((v) => v >= u - 1e-9)), f = (u - p.t[k - 1]) / (p.t[k] - p.t[k - 1]);
      return [p.signal, p.shift, p.noise].map((q) => q[k - 1] + f * (q[k] - q[k - 1]));
    },
    calls(n) { const known = Object.keys(p.grids).map(Number), k = Math.max(...known.filter((v) => v <= n), Math.min(...known)); return p.grids[k]; },
  });
  let made = [], madeOf = null;
  const processes = (state) => { // recomputed when a slider moves, not when the marker does
    if (madeOf !== state.constants) {
      made = data.processes.map((p, i) => (p.formula ? (madeOf && madeOf[i] === state.constants[i] ? made[i] : FORMULAS[p.formula.kind](state.constants[i])) : table(p)));
      madeOf = state.constants;
    }
    return made;
  };
  const shown = (state, i) => !state.hidden.includes(i);
  const logLambda = ([m, , s]) => (m > 1e-12 && s > 0 ? Math.log10(s / m) : null);

  // Do the formulas give what Python computed? A test reads this.
  const errors = data.processes.map((p, i) => (p.formula ? Math.max(...p.t.flatMap((u, k) => {
    const [m, a, s] = processes(store.state)[i].at(u);
    return [m - p.signal[k], a - p.shift[k], s - p.noise[k]].map(Math.abs);
  })) : 0));
  ui.body.setAttribute("data-formula-error", Math.max(...errors));

  // ---- pictures of a run
  if (data.panels) {
    ui.row("", data.panels.map((p) => ui.panel({ title: () => p.title, note: (s) => p.note[s.step], linked: true, frame: (s) => [p.frames, s.step], label: (s) => `${p.title}, ${p.note[s.step]}` })));
  }

  // ---- one row of controls for each process
  const dashes = [null, "7 3", "2 2", "9 3 2 3", "1 3", "12 4"];
  const change = (i, key, value) => store.set({ constants: store.state.constants.map((c, k) => (k === i ? { ...c, [key]: value } : c)) });
  const rows = data.processes.map((p, i) => {
    const line = svg("svg", { width: 26, height: 8, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, class: "c" + (i % 6), "stroke-dasharray": dashes[i % 6], "stroke-width": 2.4 }));
    const toggle = h("button", { type: "button", class: "process", title: "show or hide " + p.name, onclick: () => store.set({ hidden: shown(store.state, i) ? [...store.state.hidden, i] : store.state.hidden.filter((k) => k !== i) }) }, line, p.name);
    const values = h("output", { class: "values" });
    const sliders = (p.formula ? p.formula.sliders : []).map((q) => {
      const text = h("output", { class: "factor" });
      const input = h("input", { type: "range", min: q.min, max: q.max, step: q.step, value: start[i][q.key], "aria-label": `${p.name}: ${q.label}`, "data-constant": `${i}.${q.key}`, oninput: (e) => change(i, q.key, +e.target.value) });
      store.on((s) => { const v = s.constants[i][q.key]; if (+input.value !== v) input.value = v; text.textContent = number(v, q.digits); });
      return h("label", { class: "constant" }, h("span", { class: "hint" }, q.label), input, text);
    });
    const reset = sliders.length ? h("button", { type: "button", class: "reset", title: `${p.name}: the constants as released`, onclick: () => store.set({ constants: store.state.constants.map((c, k) => (k === i ? start[i] : c)) }) }, "reset") : null;
    store.on((s) => {
      toggle.setAttribute("aria-pressed", shown(s, i));
      const triple = processes(s)[i].at(data.x[s.step]), lambda = logLambda(triple);
      values.textContent = `m ${number(triple[0], 3)} · a ${number(triple[1], 3)} · σ ${number(triple[2], 3)} · λ ${lambda === null ? (triple[2] ? "∞" : "0") : number(10 ** lambda, lambda > 1 ? 1 : 3)}`;
    });
    return h("div", { class: "processrow" }, toggle, h("span", { class: "constants" }, sliders, reset), values);
  });
  ui.body.append(h("style", {}, `
    .processes { display: grid; gap: 4px; margin: 8px 0; } .processrow { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
    .process { width: 210px; justify-content: flex-start; text-align: left; } .process[aria-pressed="false"] { opacity: .45; } .process[aria-pressed="true"] { background: var(--raised); color: var(--ink); border-color: var(--line); }
    .constants { display: flex; flex-wrap: wrap; gap: 2px 12px; flex: 1; } .constant { display: inline-flex; align-items: center; gap: 4px; } .constant input { width: 92px; } .reset { min-height: 22px; padding: 0 7px; font-size: 11px; }
    .values { font-size: 11.5px; color: var(--soft); min-width: 225px; text-align: right; } .charts.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
    .mark { fill: var(--paper); stroke-width: 1.5; } .call { stroke-width: 1.6; } .seen { opacity: .45; } .charts.wide .chart { grid-row: span 2; } .dot.big { stroke-width: 2.6; }`),
  h("div", { class: "processes" }, rows));

  // ---- how many network calls
  const calls = h("input", { type: "range", min: 1, max: data.maxCalls, step: 1, value: data.calls, "aria-label": "number of network calls", class: "band", oninput: (e) => store.set({ calls: +e.target.value }) });
  const count = h("output", { class: "factor" });
  store.on((s) => { if (+calls.value !== s.calls) calls.value = s.calls; count.textContent = s.calls; });
  ui.extra.append(h("span", { class: "hint" }, "network calls"), calls, count);
  ui.keys.ArrowUp = () => store.set({ calls: Math.min(data.maxCalls, store.state.calls + 1) });
  ui.keys.ArrowDown = () => store.set({ calls: Math.max(1, store.state.calls - 1) });

  // ---- charts; time runs from left (noise) to right (clean), as sampling does
  const middle = (state) => data.x[state.step];
  const span = (state) => { // zooming follows the marker; with pictures, zoom belongs to them
    const width = data.panels ? 1 : 1 / state.view.k, low = clamp(middle(state) - width / 2, 0, 1 - width);
    return [low + width, low];
  };
  const top = (state, q) => { // a round number above the largest value
    const most = Math.max(...data.processes.map((_, i) => (shown(state, i) ? Math.max(...[0, 0.25, 0.5, 0.75, 1].map((u) => processes(state)[i].at(u)[q])) : 0)), 0.5);
    return [1, 1.5, 2, 3, 4, 6, 8, 12, 20].find((v) => v >= most * 0.999) || most;
  };
  const specs = [
    { title: "Signal m", note: "weight of the clean picture in x_t", y: (p) => p[0], domain: (s) => [0, top(s, 0)] },
    { title: "Shift a", note: "weight of the LR picture in x_t", y: (p) => p[1], domain: (s) => [0, top(s, 1)] },
    { title: "Noise σ", note: "standard deviation of the noise in x_t", y: (p) => p[2], domain: (s) => [0, top(s, 2)] },
    { title: "Noise-to-signal λ = σ / m", note: "logarithmic; 0 means as much noise as signal", y: logLambda, domain: () => [-2.2, 3.2], ylabel: "log10 λ", dots: true },
    { title: "The path without its clock", note: "how far the mean has moved when the noise is what it is", x: logLambda, y: (p) => p[1] / (p[0] + p[1] || 1), xspan: () => [2.2, -2.2], xlabel: "log10 λ", ylabel: "a / (a + m)", domain: () => [0, 1], dots: true },
    { title: "Where the network is called", note: "one tick a call; the last state lies at the right end", rug: true },
  ];
  const chart = (spec) => {
    const plot = h("div", { class: "plot" });
    const box = h("figure", { class: "chart" }, h("figcaption", {}, h("span", { class: "title" }, spec.title), h("span", { class: "note" }, spec.note)), plot);
    const m = { left: 40, right: 12, top: 16, bottom: 30 }, height = 158;
    let before = "", px, py, marker, dots;
    const layout = (state, width) => {
      const [left, right] = spec.xspan ? spec.xspan() : span(state), [low, high] = spec.rug ? [0, 1] : spec.domain(state);
      px = (v) => m.left + (v - left) / (right - left) * (width - m.left - m.right);
      py = (v) => height - m.bottom - (v - low) / (high - low) * (height - m.top - m.bottom);
      const root = svg("svg", { width, height, role: "img", "aria-label": `${spec.title}. ${spec.note}` });
      const xt = ticks(Math.min(left, right), Math.max(left, right), Math.max(3, Math.floor(width / 70))), yt = spec.rug ? { values: [] } : ticks(low, high);
      for (const v of yt.values) root.append(svg("line", { class: "grid", x1: m.left, x2: width - m.right, y1: py(v), y2: py(v) }), svg("text", { class: "tick", x: m.left - 5, y: py(v) + 3.5, "text-anchor": "end" }, number(v, yt.digits)));
      for (const v of xt.values) root.append(svg("text", { class: "tick", x: px(v), y: height - m.bottom + 13, "text-anchor": "middle" }, number(v, xt.digits)));
      root.append(svg("text", { class: "tick", x: (m.left + width - m.right) / 2, y: height - 4, "text-anchor": "middle" }, spec.xlabel || "time: noisy → clean"), svg("text", { class: "tick", x: 2, y: 9 }, spec.ylabel || ""),
        svg("line", { class: "axis", x1: m.left, x2: width - m.right, y1: height - m.bottom, y2: height - m.bottom }));
      const clip = svg("svg", { x: m.left - 4, y: m.top - 6, width: width - m.left - m.right + 8, height: height - m.top - m.bottom + 12, viewBox: `${m.left - 4} ${m.top - 6} ${width - m.left - m.right + 8} ${height - m.top - m.bottom + 12}` });
      const [from, to] = spec.xspan ? [1, 0] : span(state), times = Array.from({ length: 241 }, (_, k) => from + (to - from) * k / 240);
      dots = [];
      data.processes.forEach((p, i) => {
        if (!shown(state, i)) return;
        const process = processes(state)[i], colour = "c" + (i % 6), called = process.calls(state.calls);
        const of = (u) => { const triple = process.at(u), y = spec.y(triple), x = spec.x ? spec.x(triple) : u; return x === null || y === null ? null : [px(x), py(y)]; };
        const run = data.run && data.run.process === i ? data.x : null;
        if (spec.rug) {
          const y = m.top + (i + 0.5) / data.processes.length * (height - m.top - m.bottom), size = 0.32 * (height - m.top - m.bottom) / data.processes.length;
          clip.append(svg("line", { class: "grid", x1: px(from), x2: px(to), y1: y, y2: y }));
          for (const u of called) clip.append(svg("line", { class: "call " + colour, x1: px(u), x2: px(u), y1: y - size, y2: y + size }));
          for (const u of run || []) clip.append(svg("circle", { class: "mark " + colour, cx: px(u), cy: y, r: 2.6 }));
          dots.push({ of: (u) => [px(u), y], node: svg("circle", { class: "dot big " + colour, r: 4 }) });
        } else {
          let d = "", pen = "M";
          for (const u of times) {
            const at = of(u);
            if (!at) { pen = "M"; continue; }
            d += `${pen}${at[0].toFixed(1)} ${clamp(at[1], -400, 600).toFixed(1)}`;
            pen = "L";
          }
          clip.append(svg("path", { class: "curve " + colour, "stroke-dasharray": dashes[i % 6], d }));
          for (const u of spec.dots ? run || called : run || []) { const at = of(u); if (at) clip.append(svg("circle", { class: "mark " + colour, cx: at[0], cy: at[1], r: 2.4 })); }
          dots.push({ of, node: svg("circle", { class: "dot big " + colour, r: 4 }) });
        }
      });
      marker = spec.xspan ? null : svg("line", { class: "marker", y1: m.top, y2: height - m.bottom });
      clip.append(...(marker ? [marker] : []), ...dots.map((q) => q.node));
      root.append(clip);
      if (!spec.xspan) pick(root, left, right, width);
      plot.replaceChildren(root);
    };
    const pick = (root, left, right, width) => { // press or drag in a chart: go to the nearest step
      const go = (e) => {
        const u = left + (e.clientX - root.getBoundingClientRect().left - m.left) / (width - m.left - m.right) * (right - left);
        ui.go(nearest(data.x, u));
      };
      root.addEventListener("pointerdown", go);
      root.addEventListener("pointermove", (e) => { if (e.buttons & 1) go(e); });
      root.classList.add("pick");
    };
    store.on((state) => {
      const width = (ui.sizes.get(plot) || { width: 0 }).width;
      if (!width) return;
      const key = JSON.stringify([width, state.constants, state.hidden, state.calls, spec.xspan ? 0 : span(state)]);
      if (key !== before) { before = key; layout(state, width); }
      const u = middle(state);
      if (marker) { marker.setAttribute("x1", px(u)); marker.setAttribute("x2", px(u)); }
      for (const { of, node } of dots) {
        const at = of(u);
        node.setAttribute("visibility", at ? "visible" : "hidden");
        if (at) { node.setAttribute("cx", at[0]); node.setAttribute("cy", at[1]); }
      }
    });
    ui.resize.observe(plot);
    return box;
  };
  ui.body.append(h("div", { class: "charts wide" }, specs.map(chart)));
};
kinds.schedule.formulas = FORMULAS;
