// The completions of one prompt in one step, side by side.
"use strict";
const groupView = (() => {
  const { make, number, signed, quantity, choice, panel } = parts;
  const SHADES = {
    sampler_log_probs: ["log-prob of the sampler", "nats", "below"],
    entropy: ["entropy of the sampler", "nats", "above"],
    advantages: ["advantage", "", "both"],
    log_ratio: ["sampler mismatch, trainer − sampler", "nats", "both"],
  };
  const MISSING = {
    entropy: "not recorded by this run",
    log_ratio: "only with objective.correction",
  };
  const state = { shade: "sampler_log_probs" };

  function text(record, row, place) {
    return record.vocabulary[record.tokens[row][place]];
  }

  function details(record, row, place) {
    const token = record.tokens[row][place];
    const rows = [
      ["token", `${JSON.stringify(text(record, row, place))}, id ${token}`],
      ["place", `${place + 1} of ${record.lengths[row]} in completion ${row}`],
    ];
    for (const [name, [words, unit, sides]] of Object.entries(SHADES)) {
      const values = record.columns[name];
      if (values) rows.push([words, quantity(values[row][place], sides, unit)]);
      if (name === "sampler_log_probs") {
        rows.push(["probability", number(Math.exp(values[row][place]))]);
      }
    }
    return rows;
  }

  function card(parent, record, row, most, show) {
    const box = make("article", parent, undefined, "card");
    box.id = `completion-${row}`;
    box.tabIndex = -1;
    const sum = record.columns.advantages[row];
    const mean = sum.length ? sum.reduce((total, value) => total + value, 0) / sum.length : 0;
    make("h4", box, `completion ${row}`);
    const facts = make("p", box, undefined, "facts");
    make("b", facts, `reward ${number(record.reward[row] ?? NaN)}`);
    make("span", facts, `advantage ${signed(mean)}`);
    make("span", facts, `${record.lengths[row]} tokens`);
    make("span", facts, record.finished[row] ? "ended" : "cut off");
    const functions = Object.entries(record.rewards);
    if (functions.length > 1) {
      const words = functions.map(([name, values]) =>
        `${name} ${values[row] === null ? "does not apply" : number(values[row])}`);
      make("p", box, words.join(" · "), "small");
    }
    const values = record.columns[state.shade];
    const texts = record.tokens[row].map((token) => record.vocabulary[token]);
    tokenViews.line(box, texts, values && values[row], most, (place) => {
      show(details(record, row, place));
    });
  }

  // parent: to draw in. place: run, step, group and maybe completion, all numbers in the index.
  async function draw(parent, place) {
    const run = rollouts.index.runs[place.run];
    const entry = run.steps[place.step];
    const record = await rollouts.step(place.run, place.step);
    const group = Math.min(place.group, record.prompts.length - 1);
    parent.replaceChildren();
    make("h2", parent, `Step ${record.rollout_step}, prompt row ${record.rows[group]}`);
    const words = `${run.name}, seed ${run.seed} · stage ${record.stage} · `
      + `optimizer step ${record.step}`;
    make("p", parent, words, "small");
    make("p", parent, record.prompts[group], "prompt boxed").tabIndex = 0;
    const known = Object.keys(SHADES).filter((name) => record.columns[name]);
    if (!known.includes(state.shade)) state.shade = known[0];
    const bar = make("div", parent, undefined, "controls");
    const options = Object.entries(SHADES).map(([name, [label]]) =>
      known.includes(name) ? [name, label] : [name, `${label}: ${MISSING[name]}`, true]);
    choice(bar, "shade tokens by", options, state.shade, (value) => {
      state.shade = value;
      draw(parent, { run: place.run, step: place.step, group }).then(() => {
        parent.querySelector("select").focus();
      });
    });
    if (entry.ledger) {
      const link = make("a", bar, "what this step changed on the probe completions");
      link.href = `#${place.run}/${record.rollout_step}/ledger`;
    }
    const [label, unit, sides] = SHADES[state.shade];
    const most = tokenViews.limit(record.columns[state.shade].flat());
    tokenViews.legend(parent, sides, most, unit, label);
    const cards = make("div", parent, undefined, "cards");
    const hint = "Choose a token: click it, or move with Tab and the arrow keys.";
    const show = panel(parent, hint, "details panel");
    const rows = record.texts.map((_, row) => row)
      .slice(group * record.group, (group + 1) * record.group);
    for (const row of rows) card(cards, record, row, most, show);
    const first = rows.find((row) => record.lengths[row] > 0);
    if (first !== undefined) show(details(record, first, 0));
    const named = parent.querySelector(`#completion-${place.completion}`);
    if (named) named.classList.add("marked");
  }

  return { draw };
})();
