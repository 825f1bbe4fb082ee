// One or more runs on one slider. A run with another number of steps is aligned by its progress.
kinds.trajectory = (ui) => {
  const { data } = ui;
  for (const row of data.rows) {
    const at = (state) => Math.round(state.step / Math.max(1, data.count - 1) * (row.count - 1));
    ui.row(row.label, row.panels.map((p) => {
      const now = (state) => (p.swap && p.swap[state.reference]) || p;
      const text = (value, state) => (Array.isArray(value) ? value[at(state)] : value) || "";
      return ui.panel({
        title: (s) => text(now(s).title, s), note: (s) => text(now(s).note, s), linked: p.linked, bar: () => p.bar,
        frame: (s) => [now(s).frames, at(s)],
        label: (s) => `${row.label ? row.label + ", " : ""}${text(now(s).title, s)}, ${text(now(s).note, s)}, ${data.stepLabels[s.step]}`,
      });
    }));
  }
  ui.charts(data.charts.map((c) => ui.chart(c)));
};
