// One picture and one noise, sent once. The browser mixes them exactly: a state or an answer is a weighted sum of both.
const WEIGHTS = (t, k) => { // weights of the picture x and of the standard normal noise e
  const R = Math.hypot(t, k * (1 - t)), a = t / R, s = k * (1 - t) / R; // (PR-6)
  return {
    flow: { state: [t, k * (1 - t)], picture: [1, 0], noise: [0, k], velocity: [1, -k] },
    vp: { state: [a, s], picture: [1, 0], noise: [0, 1], velocity: [-s, a] },
  };
};
const BEHIND = (t, k, floor) => { // the picture behind an answer that is wrong by d: kept * x + reach * d
  const [a, s] = WEIGHTS(t, k).vp.state, f = Math.max(t, floor), g = Math.max(a, floor);
  return {
    flow: { picture: [1, 1], noise: [t / f, (t - 1) / f], velocity: [1, 1 - t] },
    vp: { picture: [1, 1], noise: [a / g, -s / g], velocity: [1, -s] },
  };
};

kinds.targets = (ui) => {
  const { data, store } = ui, { width: W, height: H } = data, area = W * H;
  const values = (text) => Float32Array.from(new Int16Array(bytes(text).buffer), (v) => v / data.unit);
  const x = values(data.picture), e = values(data.noise), d = values(data.error);
  const mix = (p, u, q, w) => { const out = new Float32Array(3 * area); for (let i = 0; i < out.length; i++) out[i] = p * u[i] + q * w[i]; return out; };
  const deviation = (v) => { const mean = v.reduce((a, b) => a + b, 0) / v.length; return Math.sqrt(v.reduce((a, b) => a + (b - mean) ** 2, 0) / v.length); };
  const sheet = h("canvas", { width: W, height: H }), ink = sheet.getContext("2d");
  const paint = (context, box, state, v, limit) => { // mid grey is 0, the ends are -limit and +limit
    const image = ink.createImageData(W, H);
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = 127.5 * (1 + v[c * area + i] / limit);
      image.data[4 * i + 3] = 255;
    }
    ink.putImageData(image, 0, 0);
    const view = state.view, sw = W / view.k, sh = H / view.k;
    context.imageSmoothingEnabled = false;
    context.drawImage(sheet, view.x * W - sw / 2, view.y * H - sh / 2, sw, sh, 0, 0, box.width, box.height);
  };
  const panel = (title, note, draw) => ui.panel({ title, note, linked: true, frame: () => ["plain", 0], overlay: draw, label: (s) => `${title(s)}: ${note(s)}, ${data.stepLabels[s.step]}` });
  const now = (s) => WEIGHTS(data.x[s.step], data.noiseScale);
  const signed = (v, digits) => (v < 0 ? "− " : "+ ") + number(Math.abs(v), digits);

  const NAMES = data.names; // convention -> what -> name
  for (const how of ["flow", "vp"]) {
    ui.row(data.labels[how], ["state", "picture", "noise", "velocity"].map((what) => {
      const mixed = (s) => { const [p, q] = now(s)[how][what]; return mix(p, x, q, e); };
      const sum = (s) => { const [p, q] = now(s)[how][what]; return !p || !q ? "" : `${number(p, 2)} x ${signed(q, 2)} ε · `; };
      return panel(() => NAMES[how][what], (s) => `${sum(s)}deviation ${number(deviation(mixed(s)), 2)}`, (context, box, s) => {
        const [p, q] = now(s)[how][what];
        paint(context, box, s, mixed(s), Math.abs(p) + 3 * Math.abs(q));
      });
    }));
  }

  // ---- what is left of the picture when the answer is wrong
  const behind = (s, what) => BEHIND(data.x[s.step], data.noiseScale, data.floor)[s.below][what];
  ui.row("The picture behind each answer, when each answer is wrong by the same error", [
    panel(() => `Error, deviation ${number(store.state.delta, 2)}`, () => "added to every answer", (context, box, s) => paint(context, box, s, mix(s.delta, d, 0, d), 1)),
    ...["picture", "noise", "velocity"].map((what) => panel((s) => `Picture from the ${what}`,
      (s) => { const [kept, reach] = behind(s, what); return `error × ${number(Math.abs(reach), 2)}${kept < 0.999 ? ` · guard keeps ${number(100 * kept, 0)} %` : ""}`; },
      (context, box, s) => { const [kept, reach] = behind(s, what); paint(context, box, s, mix(kept, x, reach * s.delta, d), 1); })),
  ]);

  const slider = h("input", { type: "range", min: 0, max: 0.5, step: 0.02, "aria-label": "error of every answer", class: "band", oninput: (event) => store.set({ delta: +event.target.value }) });
  const text = h("output", { class: "factor" });
  const toggle = h("button", { type: "button", title: "convention of the lowest row (C)", onclick: () => swap() });
  const swap = () => store.set({ below: store.state.below === "flow" ? "vp" : "flow" });
  store.on((s) => { if (+slider.value !== s.delta) slider.value = s.delta; text.textContent = number(s.delta, 2); toggle.textContent = s.below === "flow" ? "lowest row: flow" : "lowest row: VP"; });
  ui.extra.append(h("span", { class: "hint" }, "error of every answer"), slider, text, toggle);
  ui.keys.ArrowUp = () => store.set({ delta: Math.min(0.5, Math.round(50 * store.state.delta + 1) / 50) });
  ui.keys.ArrowDown = () => store.set({ delta: Math.max(0, Math.round(50 * store.state.delta - 1) / 50) });
  ui.keys.c = swap;

  // ---- one pixel in numbers: under the pointer, or in the middle
  const line = h("output", { class: "facts pixel" });
  store.on((s) => {
    const at = s.cursor || { x: 0.5, y: 0.5 }, column = clamp(Math.floor(at.x * W), 0, W - 1), row = clamp(Math.floor(at.y * H), 0, H - 1);
    const i = area + row * W + column, m = now(s), get = (how, what) => { const [p, q] = m[how][what]; return number(p * x[i] + q * e[i], 2); };
    const term = (p, v) => `${number(p, 2)} · ${v < 0 ? `(${number(v, 2)})` : number(v, 2)}`;
    line.textContent = `Green of row ${row + 1}, column ${column + 1}: x ${number(x[i], 2)}, ε ${number(e[i], 2)}. Flow: z = ${term(m.flow.state[0], x[i])} + ${term(m.flow.state[1], e[i])} = ${get("flow", "state")}, v = ${get("flow", "velocity")}. `
      + `VP: x_t = ${term(m.vp.state[0], x[i])} + ${term(m.vp.state[1], e[i])} = ${get("vp", "state")}, v = ${get("vp", "velocity")}.`;
  });
  ui.body.append(h("style", {}, ".panels { grid-template-columns: repeat(var(--n), minmax(0, 200px)); } @container (max-width: 620px) { .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); } }"), line);
  ui.charts(data.charts.map((c) => ui.chart(c)));
};
kinds.targets.weights = WEIGHTS;
kinds.targets.behind = BEHIND;
