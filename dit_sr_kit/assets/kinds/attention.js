// Who looks at whom: the attention of one token, over blocks, heads and steps.
// Maps arrive as bytes, one row a query: 255 times the square root of weight over the row's largest weight.
kinds.attention = (ui) => {
  const { data, store } = ui, { blocks, heads, streams, lut } = data, [rows, columns] = data.grid, n = rows * columns;
  const levels = new Map(), table = () => ui.frames.luts[lut];
  const key = (s) => (s.block * heads.length + s.head) * data.count + s.step;
  const map = (s) => { // decoded when it is first shown
    if (!levels.has(key(s))) levels.set(key(s), bytes(data.maps[key(s)].levels));
    return levels.get(key(s));
  };
  const query = (s, a) => a * n + s.token;
  const part = (s, a, b) => map(s).subarray(query(s, a) * streams.length * n + b * n, query(s, a) * streams.length * n + (b + 1) * n);
  const share = (s, a, b) => data.maps[key(s)].share[b][query(s, a)];
  const distance = (list, token) => {
    let sum = 0, far = 0;
    list.forEach((v, j) => { sum += v * v; far += v * v * Math.hypot(Math.floor(j / columns) - Math.floor(token / columns), j % columns - token % columns); });
    return sum ? far / sum : null;
  };

  // controls
  const wrap = (i, length) => (i + length) % length;
  const move = (down, right) => {
    const r = clamp(Math.floor(store.state.token / columns) + down, 0, rows - 1), c = clamp(store.state.token % columns + right, 0, columns - 1);
    store.set({ token: r * columns + c });
  };
  const select = (label, names, name) => {
    const box = h("select", { "aria-label": label, class: name, onchange: (e) => store.set({ [name]: +e.target.value }) }, names.map((text, i) => h("option", { value: i }, text)));
    store.on((s) => { box.value = s[name]; });
    return [h("span", { class: "hint" }, label), box];
  };
  const where = (s) => `row ${Math.floor(s.token / columns) + 1}, column ${s.token % columns + 1}`;
  const place = h("output", { class: "now token", "aria-live": "polite" });
  store.on((s) => { place.textContent = where(s); });
  ui.extra.append(...select("block", blocks, "block"), ...select("head", heads, "head"), h("span", { class: "hint" }, "token"), place);
  ui.extra.parentNode.querySelector(".zoom").remove(); // cells gain nothing from a larger view
  Object.assign(ui.keys, {
    ArrowUp: () => store.set({ block: Math.max(0, store.state.block - 1) }), ArrowDown: () => store.set({ block: Math.min(blocks.length - 1, store.state.block + 1) }),
    n: () => store.set({ head: wrap(store.state.head + 1, heads.length) }),
    w: () => move(-1, 0), s: () => move(1, 0), a: () => move(0, -1), d: () => move(0, 1),
  });

  // panels
  const square = (context, { width, height, ratio }, token) => {
    const w = width / columns, t = height / rows, x = token % columns * w, y = Math.floor(token / columns) * t;
    for (const [colour, line] of [["rgba(0,0,0,.75)", 4], ["#fff", 1.6]]) {
      context.strokeStyle = colour;
      context.lineWidth = line * ratio;
      context.strokeRect(x, y, w, t);
    }
  };
  const cells = (context, box, list) => list.forEach((v, j) => {
    const t = table(), x = Math.round(j % columns * box.width / columns), y = Math.round(Math.floor(j / columns) * box.height / rows);
    context.fillStyle = `rgb(${t[3 * v]},${t[3 * v + 1]},${t[3 * v + 2]})`;
    context.fillRect(x, y, Math.round((j % columns + 1) * box.width / columns) - x, Math.round((Math.floor(j / columns) + 1) * box.height / rows) - y);
  });
  const choosable = (figure) => { // click, drag, or arrow keys while the panel has the focus
    const canvas = figure.querySelector("canvas");
    const pick = (e) => {
      const box = canvas.getBoundingClientRect();
      const r = clamp(Math.floor((e.clientY - box.top) / box.height * rows), 0, rows - 1), c = clamp(Math.floor((e.clientX - box.left) / box.width * columns), 0, columns - 1);
      store.set({ token: r * columns + c });
    };
    canvas.style.cursor = "crosshair";
    canvas.style.touchAction = "pan-y pinch-zoom";
    canvas.setAttribute("tabindex", "0");
    canvas.setAttribute("role", "application");
    canvas.addEventListener("pointerdown", pick);
    canvas.addEventListener("pointermove", (e) => { if (e.buttons & 1) pick(e); });
    const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    canvas.addEventListener("keydown", (e) => {
      if (!arrows[e.key] || e.ctrlKey || e.metaKey || e.altKey) return;
      move(...arrows[e.key]);
      e.preventDefault();
      e.stopPropagation();
    });
    return figure;
  };
  streams.forEach((from, a) => {
    const picture = data.pictures[a], panels = [choosable(ui.panel({
      title: () => picture.title, note: (s) => `query: ${from.name} token, ${where(s)}`,
      frame: (s) => [picture.frames, s.step], overlay: (context, box, s) => square(context, box, s.token),
      label: (s) => `${picture.title}; the query is the ${from.name} token in ${where(s)} of ${rows} by ${columns}. Arrow keys move it.`,
    }))];
    streams.forEach((to, b) => panels.push(choosable(ui.panel({
      title: () => `${from.short} → ${to.short}`,
      note: (s) => { const d = distance(part(s, a, b), s.token); return `share ${number(share(s, a, b), 2)}` + (d === null ? "" : ` · distance ${number(d, 1)} tokens`); },
      frame: () => [data.plain, 0],
      bar: (s) => ({ lut, low: "0", high: number(data.maps[key(s)].top[query(s, a)], 4) }),
      overlay: (context, box, s) => { cells(context, box, part(s, a, b)); square(context, box, s.token); },
      label: (s) => `${from.name} to ${to.name}, ${blocks[s.block]}, head ${heads[s.head]}, ${data.stepLabels[s.step]}, ${where(s)}: share ${number(share(s, a, b), 2)}`,
    }))));
    ui.row(`Query: ${from.name} token`, panels);
  });

  // curves: over the steps for this block and head, over the depth for this step and head
  const values = (q, still, s) => {
    if (q.token) { // the chosen token's own share, read from the maps
      const [a, b] = q.token, list = Array.from({ length: still ? blocks.length : data.count }, (_, i) => i);
      return list.map((i) => share({ ...s, [still ? "block" : "step"]: i }, a, b));
    }
    return still ? q.table[s.head].map((list) => list[s.step]) : q.table[s.head][s.block];
  };
  const live = (spec) => ui.chart({ ...spec, series: spec.series.map((q) => ({ ...q,
    get values() { return values(q, spec.still, store.state); }, get frames() { return [values(q, spec.still, store.state)]; } })) });
  ui.charts(data.charts.map(live));
};
