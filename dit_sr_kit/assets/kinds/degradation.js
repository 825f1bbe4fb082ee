// A chain of faults and one slider for each of them. The chosen stage moves; the others stay as the record has them,
// so that stage i at strength k needs the pictures of stage i and of all behind it: the groups "i.j".
kinds.degradation = (ui) => {
  const { data, store } = ui, { panels, sliders } = data, last = panels.length - 1;
  const choose = (stage, step) => store.set({ stage: clamp(stage, 0, sliders.length - 1), step });

  // ---- sliders
  const rows = sliders.map((q, i) => {
    const text = h("output", { class: "values" });
    const name = h("button", { type: "button", class: "stage", title: `move ${q.title}`, onclick: () => choose(i, data.drawn) }, q.title);
    const input = h("input", { type: "range", min: 0, max: data.count - 1, step: 1, value: data.drawn, "aria-label": `strength of ${q.title}`, "data-stage": i, oninput: (e) => choose(i, +e.target.value) });
    store.on((s) => {
      const at = s.stage === i ? s.step : data.drawn;
      if (+input.value !== at) input.value = at;
      input.setAttribute("aria-valuetext", `${data.stepLabels[at]}, ${q.notes[at]}`);
      name.setAttribute("aria-pressed", s.stage === i);
      text.textContent = `× ${number(data.x[at], data.x[at] % 1 ? 1 : 0)} · ${q.notes[at]}`;
    });
    return h("div", { class: "stagerow" }, name, input, text);
  });
  ui.body.append(h("style", {}, `
    .stages { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 3px 18px; margin: 8px 0; }
    .stagerow { display: flex; align-items: center; gap: 8px; min-width: 0; } .stage { width: 78px; flex: none; } .stagerow input { flex: 1 1 90px; min-width: 70px; }
    .values { flex: 1 1 150px; font-size: 11.5px; color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
    .chosen .title { text-decoration: underline; text-underline-offset: 3px; } .behind canvas { outline: 1px solid var(--accent); outline-offset: 1px; }`),
  h("div", { class: "stages", role: "group", "aria-label": "strength of each stage" }, rows));
  Object.assign(ui.keys, { ArrowUp: () => choose(store.state.stage - 1, data.drawn), ArrowDown: () => choose(store.state.stage + 1, data.drawn) });

  // ---- the chain, one row for each part
  const picture = (j) => {
    const note = (s) => (j === sliders[s.stage].panel ? sliders[s.stage].notes[s.step] : panels[j].note);
    const shown = (s) => (s.reference === "b" && j === last ? data.without.title : `${j + 1} · ${panels[j].title}${j === last ? ": LR" : ""}`);
    const figure = ui.panel({
      title: shown, linked: true, note: (s) => (s.reference === "b" && j === last ? data.without.note : note(s)),
      frame: (s) => (s.reference === "b" && j === last ? ["bicubic", 0] : j < sliders[s.stage].panel ? [`base.${j}`, 0] : [`${s.stage}.${j}`, s.step]),
      label: (s) => `${shown(s)}: ${note(s)}; ${sliders[s.stage].title} at ${data.stepLabels[s.step]}`,
    });
    store.on((s) => {
      figure.classList.toggle("chosen", j === sliders[s.stage].panel);
      figure.classList.toggle("behind", j >= sliders[s.stage].panel && s.step !== data.drawn);
    });
    return figure;
  };
  const first = ui.panel({ title: () => "HR", note: () => "before everything", linked: true, frame: () => ["hr", 0] });
  const parts = []; // [names, figures]: the target joins the first round, short parts share a row
  panels.forEach((p, j) => {
    const part = parts[parts.length - 1];
    if (part && (part.names.includes(p.part) || p.part === "round 1")) part.figures.push(picture(j));
    else parts.push({ names: [p.part], figures: part ? [picture(j)] : [first, picture(j)] });
    const now = parts[parts.length - 1];
    if (!now.names.includes(p.part)) now.names.push(p.part);
  });
  const most = Math.max(4, ...parts.map((p) => p.figures.length));
  for (let i = parts.length - 1; i > 1; i--) {
    if (parts[i].figures.length + parts[i - 1].figures.length > most) continue;
    parts[i - 1].names.push(...parts[i].names);
    parts[i - 1].figures.push(...parts[i].figures);
    parts.splice(i, 1);
  }
  for (const p of parts) {
    const label = p.names.join(", ");
    ui.row(label[0].toUpperCase() + label.slice(1), p.figures);
    ui.body.lastChild.style.setProperty("--n", most);
  }

  // ---- what it costs
  const dashes = [null, "7 3", "2 2", "9 3 2 3"];
  const along = { title: "Along the chain", note: "each picture, enlarged, against HR", ylabel: "PSNR, dB", xlabel: "stage", whole: true, still: true, x: panels.map((_, j) => j + 1) };
  const every = sliders.flatMap((q) => q.scores.flat()).concat(data.base).filter((v) => v !== null && v < 60);
  ui.charts([
    ui.chart({ ...along, domain: [Math.min(...every) - 1, Math.max(...every) + 1], series: [
      { name: "as drawn", values: data.base, color: 1, dash: "4 3" },
      { name: "now", color: 0, get values() { return sliders[store.state.stage].scores[store.state.step]; }, get frames() { return [this.values]; } }] }),
    ui.chart({ title: `LR against ${data.without.title}`, note: "one curve a stage, over its strength", ylabel: "PSNR, dB", xlabel: "strength", x: data.x,
      series: sliders.map((q, i) => ({ name: q.title, values: q.far, digits: 1, color: i % 6, dash: dashes[Math.floor(i / 6)], weight: (s) => s.stage === i })) }),
  ]);
};
