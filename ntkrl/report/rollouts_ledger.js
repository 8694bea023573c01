// What one optimizer step changed on the probe completions, and which samples caused it.
"use strict";
const ledgerView = (() => {
  const { make, unpack, signed, quantity, choice, panel } = parts;
  const CAUSES = 8;
  const SHADES = {
    sum: ["R + G, Δ log π", "both"],
    R: ["R: through the classifier, Δ log π", "both"],
    G: ["G: through the rest of the network, Δ log π", "both"],
    actual: ["actual Δ log π of the step, all causes", "both"],
    log_probs: ["log-prob before the step", "below"],
    entropy: ["entropy before the step", "above"],
  };
  // sample: place in the ledger's list, "all" for their sum
  const state = { completion: 0, sample: "all", shade: "sum" };

  function unpacked(ledger) {
    if (ledger.values) return ledger;
    ledger.values = {};
    for (const name of ["actual", "log_probs", "entropy"]) {
      if (ledger[name]) ledger.values[name] = unpack(ledger[name]);
    }
    const add = (left, right) => left.map((value, place) => value + right[place]);
    for (const role of ["R", "G"]) ledger.values[role] = unpack(ledger[role]);
    ledger.values.sum = add(ledger.values.R, ledger.values.G);
    ledger.samples.forEach((sample) => {
      for (const role of ["R", "G"]) sample[role] = unpack(sample[role]);
      sample.sum = add(sample.R, sample.G);
    });
    let start = 0;
    for (const completion of ledger.completions) {
      completion.start = start;
      start += completion.tokens.length;
    }
    return ledger;
  }

  // The values that the tokens are shaded by: of the chosen sample, or of all together.
  function shaded(ledger) {
    const sample = ledger.samples[state.sample];
    return sample && sample[state.shade] ? sample[state.shade] : ledger.values[state.shade];
  }

  function sampleWords(sample) {
    const name = sample.completion === null ? "completion not kept" : `completion ${sample.completion}`;
    return `${name}, advantage ${signed(sample.advantage)}: ${sample.text.slice(0, 60)}`;
  }

  function causes(place, ledger, token) {
    const list = document.createElement("ol");
    list.className = "causes";
    const ranked = ledger.samples
      .map((sample, index) => [Math.abs(sample.sum[token]), sample, index])
      .sort((a, b) => b[0] - a[0]).slice(0, CAUSES);
    for (const [, sample] of ranked) {
      const item = make("li", list);
      const by = `R ${signed(sample.R[token])}, G ${signed(sample.G[token])} nats: `;
      make("span", item, by);
      if (sample.completion === null) {
        make("span", item, sampleWords(sample));
      } else {
        const link = make("a", item, sampleWords(sample));
        link.href = `#${place.run}/${ledger.rollout_step}/${sample.completion}`;
      }
    }
    return list;
  }

  function details(place, ledger, token) {
    const probe = ledger.completions[state.completion];
    const at = probe.start + token;
    const rows = [["token", JSON.stringify(probe.tokens[token])]];
    const chosen = ledger.samples[state.sample];
    if (chosen) {
      for (const role of ["R", "G"]) {
        rows.push([`${role} of the chosen sample`, `${signed(chosen[role][at])} nats`]);
      }
    }
    for (const [name, words] of [["actual", "actual Δ log π"], ["R", "R, all samples"],
      ["G", "G, all samples"]]) {
      rows.push([words, `${signed(ledger.values[name][at])} nats`]);
    }
    for (const name of ["log_probs", "entropy"]) {
      const [words, sides] = SHADES[name];
      if (ledger.values[name]) rows.push([words, quantity(ledger.values[name][at], sides, "nats")]);
    }
    if (ledger.samples.length) rows.push(["top causes", causes(place, ledger, at)]);
    return rows;
  }

  function controls(parent, ledger, redraw) {
    const bar = make("div", parent, undefined, "controls");
    const completions = ledger.completions.map((probe, index) =>
      [index, `${index + 1} · ${probe.family} · ${probe.text.slice(0, 40)}`]);
    choice(bar, "probe completion", completions, state.completion, (value) => {
      state.completion = Number(value);
      redraw(0);
    });
    const samples = ledger.samples.map((sample, index) => [index, sampleWords(sample)]);
    choice(bar, "moved by", [["all", "all samples of the step"], ...samples], state.sample,
      (value) => {
        state.sample = value === "all" ? "all" : Number(value);
        redraw(1);
      });
    const options = Object.entries(SHADES).filter(([name]) => ledger.values[name])
      .map(([name, [words]]) => [name, words]);
    choice(bar, "shade tokens by", options, state.shade, (value) => {
      state.shade = value;
      redraw(2);
    });
  }

  // place: run and step in the index, and maybe sample: a completion of the step.
  async function draw(parent, place) {
    const run = rollouts.index.runs[place.run];
    const ledger = unpacked(await rollouts.load(run.steps[place.step].ledger));
    if (place.sample !== undefined) {
      const index = ledger.samples.findIndex((sample) => sample.completion === place.sample);
      state.sample = index < 0 ? "all" : index;
    }
    if (!ledger.samples[state.sample]) state.sample = "all";
    if (!ledger.values[state.shade]) state.shade = "sum";
    state.completion = Math.min(state.completion, ledger.completions.length - 1);
    parent.replaceChildren();
    make("h2", parent, `Step ${ledger.rollout_step}: what it changed on the probe completions`);
    const words = `${run.name}, seed ${run.seed} · stage ${ledger.stage} · optimizer step `
      + `${ledger.step}. R is the change that a sample made through the classifier, G through the `
      + "rest of the network, both to first order.";
    make("p", parent, words, "small");
    const link = make("a", make("p", parent), "the completions of this step");
    link.href = `#${place.run}/${ledger.rollout_step}/g0`;
    if (ledger.note) make("p", parent, ledger.note, "small");
    controls(parent, ledger, (number) => {
      draw(parent, { run: place.run, step: place.step })
        .then(() => parent.querySelectorAll("select")[number].focus());
    });
    const probe = ledger.completions[state.completion];
    const values = shaded(ledger).slice(probe.start, probe.start + probe.tokens.length);
    const most = tokenViews.limit(values);
    tokenViews.legend(parent, SHADES[state.shade][1], most, "nats", SHADES[state.shade][0]);
    make("p", parent, probe.prompt, "prompt boxed").tabIndex = 0;
    const line = make("div", parent, undefined, "card");
    const hint = "Choose a token for its top causes: click it, or move with Tab and the arrow keys.";
    const show = panel(parent, hint, "details panel");
    tokenViews.line(line, probe.tokens, values, most, (token) => {
      show(details(place, ledger, token));
    });
    if (values.length) {
      const sizes = values.map((value) => Math.abs(value) || 0);
      show(details(place, ledger, sizes.indexOf(Math.max(...sizes))));
    }
  }

  return { draw };
})();
