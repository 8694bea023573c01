// The rollouts view: filters, the list of prompts that pass them, and what the address names:
// #RUN/STEP/gGROUP, #RUN/STEP/COMPLETION, #RUN/STEP/ledger or #RUN/STEP/ledger/COMPLETION.
"use strict";
(() => {
  const { make, unpack, number, control, choice, scroller } = parts;
  const PAGE = 10;
  const ORDERS = {
    latest: ["last steps first", (a, b) => b.step - a.step || a.group - b.group],
    first: ["first steps first", (a, b) => a.step - b.step || a.group - b.group],
    best: ["highest reward first", (a, b) => b.high - a.high],
    worst: ["lowest reward first", (a, b) => a.low - b.low],
    spread: ["widest spread of rewards first", (a, b) => b.high - b.low - (a.high - a.low)],
  };
  const { runs, limits } = rollouts.index;
  const filters = document.getElementById("filters");
  const list = document.getElementById("list");
  const chosen = document.getElementById("chosen");
  const state = { run: 0, from: "", to: "", prompt: "", low: "", high: "", order: "latest", page: 0 };

  // Groups of a run: step, group, prompt, and the lowest, highest and mean reward.
  function groupsOf(run) {
    if (run.groups) return run.groups;
    const rewards = unpack(run.reward);
    run.groups = [];
    let row = 0;
    run.steps.forEach((step, place) => {
      step.prompts.forEach((prompt, group) => {
        const known = rewards.slice(row, row + step.group).filter(Number.isFinite);
        row += step.group;
        const sum = known.reduce((total, value) => total + value, 0);
        run.groups.push({
          place, step: step.rollout_step, group, prompt, rewards: known,
          low: Math.min(...known), high: Math.max(...known), mean: sum / known.length,
        });
      });
    });
    return run.groups;
  }

  function limit(text, otherwise) {
    return text.trim() === "" || Number.isNaN(Number(text)) ? otherwise : Number(text);
  }

  // Groups that pass all filters: one completion within the rewards is enough.
  function passing(run) {
    const words = state.prompt.toLowerCase();
    const prompts = run.prompts.map(({ text, row }) =>
      text.toLowerCase().includes(words) || `row ${row}` === words.trim());
    const [from, to] = [limit(state.from, 0), limit(state.to, Infinity)];
    const [low, high] = [limit(state.low, -Infinity), limit(state.high, Infinity)];
    const all = low === -Infinity && high === Infinity;
    return groupsOf(run).filter((group) =>
      group.step >= from && group.step <= to && prompts[group.prompt]
      && (all || group.rewards.some((reward) => reward >= low && reward <= high)))
      .sort(ORDERS[state.order][1]);
  }

  function drawFilters() {
    const redraw = () => {
      state.page = 0;
      drawList();
    };
    const names = runs.map((run, index) => [index, `${run.name}, seed ${run.seed}`]);
    const choose = (key) => (value) => {
      state[key] = value;
      redraw();
    };
    choice(filters, "run", names, state.run, (value) => choose("run")(Number(value)));
    const field = (words, key, mode) => {
      const input = control(filters, words, document.createElement("input"));
      Object.assign(input, { type: "text", inputMode: mode, name: key, autocomplete: "off" });
      input.className = mode === "search" ? "wide" : "narrow";
      input.addEventListener("input", () => choose(key)(input.value));
    };
    field("prompt contains, or row N", "prompt", "search");
    field("step from", "from", "numeric");
    field("to", "to", "numeric");
    field("reward from", "low", "decimal");
    field("to", "high", "decimal");
    const orders = Object.entries(ORDERS).map(([name, [words]]) => [name, words]);
    choice(filters, "order", orders, state.order, choose("order"));
    filters.addEventListener("submit", (event) => event.preventDefault());
  }

  function range(group) {
    if (!group.rewards.length) return "not known";
    return group.low === group.high ? number(group.low)
      : `${number(group.low)} … ${number(group.high)}`;
  }

  function drawList() {
    const run = runs[state.run];
    const groups = passing(run);
    const pages = Math.max(1, Math.ceil(groups.length / PAGE));
    list.replaceChildren();
    const every = run.every > 1 ? `; one step in ${run.every} was kept, and steps with a ledger` : "";
    const words = `${groups.length} of ${groupsOf(run).length} prompts with their completions`;
    make("p", list, `${words}${every}`, "small").setAttribute("role", "status");
    const table = make("table", scroller(list), undefined, "groups");
    const head = make("tr", make("thead", table));
    for (const name of ["step", "prompt", "rewards", "mean"]) make("th", head, name).scope = "col";
    const body = make("tbody", table);
    for (const group of groups.slice(state.page * PAGE, (state.page + 1) * PAGE)) {
      const row = make("tr", body);
      const link = make("a", make("th", row), group.step);
      link.href = `#${state.run}/${group.step}/g${group.group}`;
      const prompt = run.prompts[group.prompt];
      link.setAttribute("aria-label", `step ${group.step}, prompt row ${prompt.row}`);
      make("td", row, prompt.text.trim() || "∅", "text");
      make("td", row, range(group));
      make("td", row, number(group.mean));
    }
    if (pages > 1) drawPages(pages);
  }

  function drawPages(pages) {
    const bar = make("div", list, undefined, "controls");
    const turn = (words, goal) => {
      const button = make("button", bar, words);
      button.type = "button";
      button.disabled = goal < 0 || goal >= pages;
      button.addEventListener("click", () => {
        state.page = goal;
        drawList();
        [...list.querySelectorAll("button")].find(({ textContent }) => textContent === words).focus();
      });
    };
    turn("previous", state.page - 1);
    make("span", bar, `page ${state.page + 1} of ${pages}`);
    turn("next", state.page + 1);
  }

  // What an address names, or null.
  function place(hash) {
    const match = /^#(\d+)\/(\d+)\/(?:g(\d+)|(\d+)|ledger(?:\/(\d+))?)$/.exec(hash);
    if (!match || !runs[match[1]]) return null;
    const run = Number(match[1]);
    const step = runs[run].steps.findIndex((entry) => entry.rollout_step === Number(match[2]));
    if (step < 0) return null;
    const entry = runs[run].steps[step];
    const last = entry.prompts.length - 1;
    if (match[3] !== undefined) return { run, step, group: Math.min(last, Number(match[3])) };
    if (match[4] !== undefined) {
      const completion = Number(match[4]);
      return { run, step, completion, group: Math.min(last, Math.floor(completion / entry.group)) };
    }
    if (!entry.ledger) return null;
    return { run, step, ledger: true, sample: match[5] && Number(match[5]) };
  }

  let drawn = 0;
  async function show() {
    const goal = place(location.hash);
    drawn += 1;
    const turn = drawn;
    if (!goal) {
      chosen.replaceChildren();
      if (location.hash) make("p", chosen, `There is nothing at ${location.hash} here.`);
      return;
    }
    const box = document.createElement("div");
    try {
      if (goal.ledger) await ledgerView.draw(box, goal);
      else await groupView.draw(box, goal);
    } catch (error) {
      make("p", box, String(error.message), "refusal");
    }
    if (turn !== drawn) return; // something else was chosen meanwhile
    chosen.replaceChildren(box);
    const marked = box.querySelector(".marked");
    (marked || chosen).scrollIntoView({ block: marked ? "center" : "start" });
    (marked || chosen).focus({ preventScroll: true });
  }

  if (!runs.length) {
    make("p", list, "The list of completions, rollouts_view/index.js, is missing or damaged.", "refusal");
    return;
  }
  const count = runs.reduce((sum, run) => sum + run.reward.values.length, 0);
  const names = runs.map((run) => `${run.name}, seed ${run.seed}`).join("; ");
  document.getElementById("lead").textContent = `${count} completions of training: ${names}`;
  document.getElementById("limits").textContent = limits;
  drawFilters();
  drawList();
  window.addEventListener("hashchange", show);
  if (location.hash) show();
})();
