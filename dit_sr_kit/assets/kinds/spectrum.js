// Denoising seen in the frequency domain: spectra with a ring, band-passed pictures, radial profiles, coherence.
kinds.spectrum = (ui) => {
  const { data, store } = ui, bands = data.bands;
  const band = (state) => bands[state.band];
  const choose = (b) => store.set({ band: Math.min(bands.length - 1, Math.max(0, b)) });
  const slider = h("input", { type: "range", min: 0, max: bands.length - 1, step: 1, "aria-label": "frequency band", class: "band", oninput: (e) => choose(+e.target.value) });
  const label = h("output", { class: "now" });
  store.on((s) => { slider.value = s.band; label.textContent = band(s).label; slider.setAttribute("aria-valuetext", band(s).label + " cycles per pixel"); });
  ui.extra.append(h("span", { class: "hint" }, "band"), slider, label, h("span", { class: "hint" }, "cycles/px"));
  ui.keys.ArrowUp = () => choose(store.state.band + 1);
  ui.keys.ArrowDown = () => choose(store.state.band - 1);

  const ring = (context, { width, height, ratio }, state) => { // the chosen band on the spectrum: 0.5 cycles per pixel touch the frame
    for (const edge of [band(state).low, band(state).high]) {
      if (!edge) continue;
      for (const [colour, line] of [["rgba(0,0,0,.65)", 3], ["#fff", 1.2]]) {
        context.strokeStyle = colour;
        context.lineWidth = line * ratio;
        context.beginPath();
        context.ellipse(width / 2, height / 2, edge * width, edge * height, 0, 0, 2 * Math.PI);
        context.stroke();
      }
    }
  };
  ui.row("", data.panels.map((p) => {
    const now = (s) => (p.swap && p.swap[s.reference]) || p;
    const name = (s) => now(s).frames + (p.banded ? s.band : "");
    return ui.panel({
      title: (s) => now(s).title, note: (s) => (p.notes ? band(s).notes[s.step] : p.banded ? `band ${band(s).label}` : p.note), linked: p.banded, overlay: p.banded ? null : ring,
      frame: (s) => [name(s), s.step], bar: (s) => p.banded ? band(s).bar : p.bar,
      label: (s) => `${now(s).title}, ${p.banded ? "band " + band(s).label + ", " : ""}${data.stepLabels[s.step]}`,
    });
  }));
  ui.charts(data.charts.map((c) => ui.chart({
    ...c, shade: c.shaded ? (s) => [band(s).low || 1e-9, band(s).high] : null,
    series: c.series.map((q) => (q.band === undefined ? q : { ...q, weight: (s) => s.band === q.band })),
  })));
};
