// The views of single steps on the report page: influence of samples, changes token by token.
// Every text comes from the run and is set as text alone. Without scripts the figures remain.
"use strict";
(() => {
  const { make, unpack, signed, tint, control, choice, scroller, panel } = parts;
  const data = JSON.parse(document.getElementById("step-data").textContent);
  const views = document.getElementById("step-views");
  // token: place of the token whose parts are shown, null for the one that changed most
  const state = { run: 0, step: 0, completion: 0, token: null };
  Object.assign(state, { measure: "log_prob", part: "actual" });
  const MEASURES = { log_prob: "Δ log π", entropy: "ΔH" };
  const WORDS = { log_prob: "log-probability", entropy: "entropy" };
  const PARTS = {
    actual: "actual", R: "R: classifier", G: "G: the rest", momentum: "momentum",
    decay: "decay", optimizer: "optimizer", curvature: "curvature",
  };

  for (const ledger of data.runs.flatMap((run) => run.steps)) {
    for (const values of Object.values(ledger.measures)) {
      for (const part of Object.keys(values)) values[part] = unpack(values[part]);
    }
    if (ledger.rows) ledger.rows = ledger.rows.map(unpack);
  }

  function short(text) {
    return text.length <= 40 ? text : `${text.slice(0, 39)}…`;
  }

  function largest(values) {
    return values.reduce((limit, value) => Math.max(limit, Math.abs(value)), 0);
  }

  function mean(values) {
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  }

  function scale(parent, limit, unit) {
    const line = make("p", parent, undefined, "scale");
    make("span", line, `${signed(-limit)} lowers`);
    make("span", line, undefined, "ramp");
    make("span", line, `${signed(limit)} raises (${unit})`);
  }

  // Where the largest change is, up or down.
  function strongest(values) {
    return values.reduce((best, value, index) =>
      Math.abs(value) > Math.abs(values[best]) ? index : best, 0);
  }

  // One tab stop for many cells, `first` to begin with: arrows move between them, and `show` runs
  // for the cell that they reach.
  function roving(cells, columns, first, show) {
    function choose(index, event) {
      for (const other of cells) other.classList.remove("chosen");
      cells[index].classList.add("chosen");
      show(index, event);
    }
    if (cells.length) choose(first, "start");
    cells.forEach((cell, index) => {
      cell.tabIndex = index === first ? 0 : -1;
      for (const event of ["mouseenter", "focus", "click"]) {
        cell.addEventListener(event, () => choose(index, event));
      }
      cell.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
        if (!(event.key in move)) return;
        event.preventDefault();
        const next = cells[index + move[event.key]];
        if (!next) return;
        cell.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    });
  }

  const controls = make("div", views, undefined, "controls");
  const bars = make("div", views);
  const map = make("div", views);
  const tokens = make("div", views);

  function run() { return data.runs[state.run]; }
  function step() { return run().steps[state.step]; }

  function drawControls() {
    controls.replaceChildren();
    const runs = data.runs.map(({ name, seed }, index) => [index, `${name}, seed ${seed}`]);
    choice(controls, "run", runs, state.run, (value) => {
      Object.assign(state, { run: Number(value), completion: 0, token: null });
      state.step = run().steps.length - 1;
      drawControls();
      draw();
    });
    const slider = document.createElement("input");
    const last = run().steps.length - 1;
    Object.assign(slider, { type: "range", min: 0, max: last, step: 1, value: state.step });
    slider.disabled = last === 0;
    const label = control(controls, "step", slider).parentElement;
    const shown = make("output", label);
    const showStep = () => {
      shown.textContent = `${step().step} (stage ${step().stage})`;
      slider.setAttribute("aria-valuetext", shown.textContent);
    };
    showStep();
    slider.addEventListener("input", () => {
      state.step = Number(slider.value);
      showStep();
      draw();
    });
    const measures = Object.keys(MEASURES)
      .map((name) => [name, `${WORDS[name]}, ${MEASURES[name]}`]);
    choice(controls, "measure", measures, state.measure, (value) => {
      state.measure = value;
      draw();
    });
  }

  function drawParts() {
    bars.replaceChildren();
    const measure = MEASURES[state.measure];
    make("h3", bars, `What the step was made of: mean ${measure} of the probe tokens`);
    const entries = Object.entries(step().measures[state.measure]);
    const means = entries.map(([, values]) => mean(values));
    const limit = largest(means);
    const table = make("table", scroller(bars), undefined, "bars");
    const head = make("tr", make("thead", table));
    for (const name of ["part", "mean (nats)"]) make("th", head, name).scope = "col";
    const sides = make("th", head, undefined, "bar");
    sides.scope = "col";
    for (const side of ["lowers", "raises"]) make("span", sides, side);
    const body = make("tbody", table);
    entries.forEach(([part], index) => {
      const row = make("tr", body);
      make("th", row, PARTS[part]).scope = "row";
      make("td", row, signed(means[index]));
      const bar = make("span", make("td", row, undefined, "bar"));
      const width = limit > 0 ? 50 * Math.abs(means[index]) / limit : 0;
      bar.style.width = `${width}%`;
      bar.style.marginLeft = `${means[index] < 0 ? 50 - width : 50}%`;
      tint(bar, means[index], Math.abs(means[index]));
    });
  }

  // The map's head: families of probe completions that stand together, and numbers.
  function drawColumns(head) {
    const [families, numbers] = [1, 2].map(() => make("tr", head));
    const samples = make("th", families, "A", "side");
    Object.assign(samples, { scope: "col", rowSpan: 2 });
    let last = null;
    run().completions.forEach(({ family }, index) => {
      if (last && last.textContent === family) {
        last.colSpan += 1;
      } else {
        last = make("th", families, undefined, "family");
        make("span", last, family);
        last.scope = "colgroup";
      }
      make("th", numbers, index + 1).scope = "col";
    });
  }

  function drawMap() {
    map.replaceChildren();
    make("h3", map, "Which sample moved which probe completion: Δ log π, summed over its tokens");
    if (!step().rows) {
      make("p", map, "The ledger of this step keeps samples together (probe.ledger_by), so there "
        + "is no map.", "small");
      return;
    }
    const limit = largest(step().rows.flat());
    scale(map, limit, "nats");
    make("p", map, "Rows: samples of the minibatch, by advantage A. Columns: probe completions, by kind "
      + "and number.", "small");
    const table = make("table", scroller(map), undefined, "map");
    table.setAttribute("role", "grid");
    drawColumns(make("thead", table));
    const body = make("tbody", table);
    const cells = [];
    step().rows.forEach((values, index) => {
      const row = make("tr", body);
      make("th", row, signed(step().samples[index].advantage), "side").scope = "row";
      for (const value of values) {
        const cell = make("td", row);
        cell.setAttribute("aria-label", `${signed(value)} nats`);
        tint(cell, value, limit);
        cells.push(cell);
      }
    });
    const hint = "Point at a cell, tap it, or move with the arrow keys; a click shows the probe "
      + "completion below, token by token.";
    const show = panel(map, hint, "details long");
    const columns = run().completions.length;
    roving(cells, columns, strongest(step().rows.flat()), (index, event) => {
      const column = index % columns;
      const sample = step().samples[Math.floor(index / columns)];
      const probe = run().completions[column];
      show([
        ["sum of Δ log π", `${signed(step().rows[Math.floor(index / columns)][column])} nats`],
        ["sample", `${sample.prompt}\n→ ${sample.completion}`],
        ["its advantage", signed(sample.advantage)],
        [`probe completion ${column + 1}, ${probe.family}`, `${probe.prompt}\n→ ${probe.text}`],
      ]);
      if (event === "click" && probe.tokens && state.completion !== column) {
        Object.assign(state, { completion: column, token: null });
        drawTokens();
      }
    });
  }

  function drawTokens() {
    tokens.replaceChildren();
    make("h3", tokens, `A probe completion, token by token: ${MEASURES[state.measure]} of each`);
    const bar = make("div", tokens, undefined, "controls");
    const completions = run().completions
      .map((probe, index) => [index, `${index + 1} · ${probe.family} · ${short(probe.text)}`])
      .filter(([index]) => run().completions[index].tokens);
    choice(bar, "completion", completions, state.completion, (value) => {
      Object.assign(state, { completion: Number(value), token: null });
      drawTokens();
    });
    const measured = step().measures[state.measure];
    const options = Object.keys(measured).map((part) => [part, PARTS[part]]);
    choice(bar, "part", options, state.part, (value) => {
      state.part = value;
      drawTokens();
    });
    const probe = run().completions[state.completion];
    const values = measured[state.part].slice(probe.start, probe.start + probe.tokens.length);
    const limit = largest(values);
    scale(tokens, limit, "nats");
    make("p", tokens, probe.prompt, "prompt");
    const line = make("p", tokens, undefined, "tokens");
    const cells = probe.tokens.map((text, index) => {
      const cell = make("span", line, text.replace(/\n/g, "⏎\n") || "∅");
      tint(cell, values[index], limit);
      return cell;
    });
    const hint = "Point at a token, tap it, or move with the arrow keys; the parts of its change "
      + "add up to the actual one.";
    const show = panel(tokens, hint, "details");
    const first = state.token === null ? strongest(values) : state.token;
    roving(cells, 1, first, (index, event) => {
      if (event !== "start") state.token = index;
      const rows = Object.entries(measured).map(([part, all]) =>
        [PARTS[part], `${signed(all[probe.start + index])} nats`]);
      show([["token", JSON.stringify(probe.tokens[index])], ...rows]);
    });
  }

  function draw() {
    if (!(state.part in step().measures[state.measure])) state.part = "actual";
    drawParts();
    drawMap();
    drawTokens();
  }

  state.step = run().steps.length - 1;
  drawControls();
  draw();
})();
