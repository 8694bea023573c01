// Data of the rollouts view: an index, and files of steps that are loaded when they are shown.
// The files are classic scripts, which a page opened from a disk may load. Each calls
// `ntkrlData(name, text)` with JSON.
"use strict";
const rollouts = (() => {
  const waiting = new Map();
  const loaded = new Map();
  const KEPT = 6; // files in memory
  let index = { runs: [], limits: "" };

  function receive(name, text) {
    const value = JSON.parse(text);
    if (name === "index") index = value;
    else if (waiting.has(name)) waiting.get(name)(value);
    waiting.delete(name);
  }

  function load(name) {
    if (!loaded.has(name)) {
      loaded.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        waiting.set(name, resolve);
        script.addEventListener("error", () => {
          loaded.delete(name);
          reject(new Error(`rollouts_view/${name}.js is missing: copy the report's directory with it`));
        });
        script.addEventListener("load", () => {
          script.remove();
          if (!waiting.has(name)) return;
          loaded.delete(name); // it passed on nothing
          reject(new Error(`rollouts_view/${name}.js is damaged: write the report again`));
        });
        script.src = `rollouts_view/${name}.js`;
        document.head.append(script);
      }));
      if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
    }
    return loaded.get(name);
  }

  // The completions of a step, with what each token has by its place in its completion.
  async function step(run, number) {
    const entry = index.runs[run].steps[number];
    const records = await load(entry.file);
    return unpacked(records[entry.place]);
  }

  function unpacked(record) {
    if (record.columns) return record;
    const ends = [];
    record.lengths.reduce((sum, length) => ends.push(sum + length) && sum + length, 0);
    const cut = (values) => ends.map((end, row) => values.slice(end - record.lengths[row], end));
    record.tokens = cut(record.tokens);
    record.columns = {};
    for (const name of ["sampler_log_probs", "entropy", "advantages", "log_ratio"]) {
      const packed = record[name];
      if (Array.isArray(packed)) {
        record.columns[name] = record.lengths.map((n, row) => Array(n).fill(packed[row]));
      } else if (packed) {
        record.columns[name] = cut(parts.unpack(packed));
      }
    }
    return record;
  }

  return { receive, load, step, get index() { return index; } };
})();
const ntkrlData = rollouts.receive;
