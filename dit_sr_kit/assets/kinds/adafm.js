// What the time step does to every block: scales, their frequency response, and features before and after.
// Cell maps are drawn from numbers, so that each cell is exact; a plain frame lies under them.
kinds.adafm = (ui) => {
  const { data, store } = ui, blocks = data.blocks, branches = data.branches;
  const unit = (row, s) => row.units[s.block * branches.length + s.branch];
  const choose = (block) => store.set({ block: Math.min(blocks.length - 1, Math.max(0, block)) });
  const select = h("select", { "aria-label": "block", onchange: (e) => choose(+e.target.value) }, blocks.map((name, i) => h("option", { value: i }, name)));
  const toggles = branches.map((name, i) => h("button", { type: "button", title: "branch of the block (B)", onclick: () => store.set({ branch: i }) }, name));
  store.on((s) => { select.value = s.block; toggles.forEach((b, i) => b.setAttribute("aria-pressed", s.branch === i)); });
  ui.extra.append(h("span", { class: "hint" }, "block"), select, ...toggles);
  ui.keys.ArrowUp = () => choose(store.state.block - 1);
  ui.keys.ArrowDown = () => choose(store.state.block + 1);
  ui.keys.b = () => store.set({ branch: (store.state.branch + 1) % branches.length });

  // values: rows of cells; low and high: ends of the colour scale
  const cells = (context, { width, height }, lut, values, low, high) => {
    const rows = values.length, columns = values[0].length, side = Math.min(width / columns, height / rows);
    const left = (width - columns * side) / 2, top = (height - rows * side) / 2, table = ui.frames.luts[lut];
    context.clearRect(0, 0, width, height);
    values.forEach((line, i) => line.forEach((v, j) => {
      const at = 3 * Math.round(255 * Math.min(1, Math.max(0, (v - low) / (high - low || 1))));
      context.fillStyle = `rgb(${table[at]},${table[at + 1]},${table[at + 2]})`;
      const x = Math.round(left + j * side), y = Math.round(top + i * side);
      context.fillRect(x, y, Math.round(left + (j + 1) * side) - x, Math.round(top + (i + 1) * side) - y);
    }));
    return { left, top, side };
  };
  const ring = (context, { ratio }, place, p) => { // up to 1/4 cycles per feature pixel: what R counts as low
    const x = place.left + (Math.floor(p / 2) + 0.5) * place.side, y = place.top + (Math.floor(p / 2) + 0.5) * place.side;
    for (const [colour, line] of [["rgba(0,0,0,.65)", 3], ["#fff", 1.2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line * ratio;
      context.beginPath();
      context.arc(x, y, (p * data.split + 0.12) * place.side, 0, 2 * Math.PI);
      context.stroke();
    }
  };
  const grid = (list, columns) => Array.from({ length: Math.ceil(list.length / columns) }, (_, i) => list.slice(i * columns, (i + 1) * columns));
  const whole = (half, p) => Array.from({ length: p }, (_, i) => Array.from({ length: p }, (_, j) => { // half spectrum -> centred, full
    const a = (i - Math.floor(p / 2) + p) % p, b = (j - Math.floor(p / 2) + p) % p, w = Math.floor(p / 2) + 1;
    return b < w ? half[a * w + b] : half[((p - a) % p) * w + (p - b) % p];
  }));
  const sign = (v, digits = 2) => (v > 0 ? "+" : "") + number(v, digits);
  const octaves = (list) => list.map((v) => Math.log2(Math.max(1e-6, Math.abs(v))));

  for (const row of data.rows) {
    const panels = [];
    const map = (title, note, lut, values, ends, ringed) => panels.push(ui.panel({
      title: () => title, note: (s) => note(unit(row, s), s), frame: () => [row.plain[lut], 0],
      bar: (s) => { const [low, high] = ends(unit(row, s)); return { lut, low: number(low, 1), high: sign(high, 1) }; },
      overlay: (context, box, s) => {
        const u = unit(row, s), [low, high] = ends(u), v = values(u, s);
        const place = cells(context, box, lut, v, low, high);
        if (ringed) ring(context, box, place, u.p);
      },
      label: (s) => `${row.label}, ${title}, ${blocks[s.block]}, ${branches[s.branch]}, ${data.stepLabels[s.step]}. ${note(unit(row, s), s)}`,
    }));
    if (row.picture) panels.push(ui.panel({
      title: (s) => (row.swap[s.reference] ? row.swap[s.reference].title : "Clean estimate"), linked: true,
      note: (s) => (row.swap[s.reference] ? "for comparison" : row.network),
      frame: (s) => (row.swap[s.reference] ? [row.swap[s.reference].frames, 0] : [row.picture.frames, s.step]),
      label: (s) => `${row.label}, clean estimate, ${data.stepLabels[s.step]}`,
    }));
    const ratio = (u, s) => `R = ${sign(u.ratio[s.step])} octaves`;
    const powers = (u) => u.powerEnds, mean = (u, s) => `log10 power; R = ${sign(s)} octaves`;
    if (row.kind === "adafm") {
      map("Scale S, as stored", (u) => `${u.p} × ${Math.floor(u.p / 2) + 1} gains; top left: the mean`, "coolwarm", (u, s) => grid(u.gains[s.step], Math.floor(u.p / 2) + 1), (u) => [-u.limit, u.limit], false);
      map("Response |S|, centred", ratio, "viridis", (u, s) => whole(octaves(u.gains[s.step]), u.p), (u) => u.octaveEnds, true);
    } else {
      map("1 + scale, by channel", (u, s) => `${u.gains[s.step].length} gains, one a channel`, "coolwarm", (u, s) => grid(u.gains[s.step], Math.ceil(Math.sqrt(u.gains[s.step].length))), (u) => [-u.limit, u.limit], false);
      map("Response, centred", (u, s) => `flat: mean |1 + scale| = ${number(u.rings[s.step][0] === null ? null : 2 ** u.rings[s.step][0], 2)}`, "viridis", (u, s) => whole(Array(u.p * (Math.floor(u.p / 2) + 1)).fill(u.rings[s.step][0]), u.p), (u) => u.octaveEnds, true);
    }
    map("Features before", (u, s) => mean(u, u.before.ratio[s.step]), "viridis", (u, s) => whole(u.before.powers[s.step], u.p), powers, true);
    map("Features after", (u, s) => mean(u, u.after.ratio[s.step]), "viridis", (u, s) => whole(u.after.powers[s.step], u.p), powers, true);
    ui.row(data.rows.length > 1 || !row.picture ? row.label : "", panels);
  }

  // Curves of the chosen block: a getter reads the state each time the chart is drawn.
  const live = (row, name, color, dash, lists, more = {}) => ({ name, color, dash, ...more,
    get frames() { return lists(unit(row, store.state)); }, get values() { return lists(unit(row, store.state))[0]; } });
  const series = (of) => data.rows.flatMap(of);
  const last = data.count - 1;
  ui.charts([
    ui.chart({ ...data.charts.rings, still: true, series: series((row) => (row.kind === "adafm" ? [
      live(row, `${row.label}, now`, row.color, null, (u) => u.rings),
      live(row, "first evaluation", 5, "2 2", (u) => [u.rings[0]]), live(row, "last evaluation", 2, "6 3", (u) => [u.rings[last]]),
    ] : [
      live(row, `${row.label}, mean`, row.color, null, (u) => u.rings),
      live(row, "10 % of channels below", row.color, "2 3", (u) => u.low), live(row, "90 % below", row.color, "8 3", (u) => u.high),
    ])) }),
    ui.chart({ ...data.charts.radial, still: true, series: series((row) => [
      live(row, `${row.label} before`, row.color, "3 3", (u) => u.before.radial), live(row, `${row.label} after`, row.color, null, (u) => u.after.radial)]) }),
    ui.chart({ ...data.charts.ratio, series: [...data.charts.ratio.series.map((q) => ({ ...q, weight: (s) => data.stages[s.block] === q.name })),
      live(data.rows[0], "this branch", 2, null, (u) => [u.ratio], { digits: 2 })] }),
    ui.chart({ ...data.charts.met, series: series((row) => [
      live(row, `${row.label}, this branch`, row.color, null, (u) => [u.met], { digits: 2 }),
      { name: `${row.label}, mean of all`, values: row.met, color: row.color, dash: "4 3", digits: 2 }]) }),
  ]);
};
