// Tokens shaded by a number each, and the legend of the shades.
"use strict";
const tokenViews = (() => {
  const { make, number, tint } = parts;
  const SHOWN = 1500; // tokens of a completion before a button shows the rest

  // The largest size but for one token in a hundred, so that one outlier does not pale the others.
  function limit(values) {
    const sizes = values.filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
    return sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) : 0;
  }

  // sides: "below" for values ≤ 0, "above" for values ≥ 0, "both".
  function legend(parent, sides, most, unit, words) {
    const line = make("p", parent, undefined, "scale legend");
    if (sides !== "above") make("span", line, `${number(-most)} or lower`);
    else make("span", line, "0");
    make("span", line, undefined, `ramp ${sides}`);
    if (sides !== "below") make("span", line, `${number(most)} or higher`);
    else make("span", line, "0");
    make("span", line, unit ? `${words} (${unit})` : words);
  }

  function shown(text) {
    return text.replace(/\n/g, "⏎\n") || "∅";
  }

  // One tab stop for a line of tokens: arrows move in it. `choose` runs with a token's place when
  // that is focused or clicked.
  function line(parent, texts, values, most, choose) {
    const box = make("p", parent, undefined, "tokens");
    const cells = [];
    let first = 0;
    function add(from, to) {
      texts.slice(from, to).forEach((text, offset) => {
        const cell = make("span", box, shown(text));
        const place = from + offset;
        cell.tabIndex = place === first ? 0 : -1;
        if (values) {
          tint(cell, values[place], most);
          cell.title = number(values[place]);
        }
        cell.addEventListener("focus", () => {
          cells[first].tabIndex = -1;
          first = place;
          cell.tabIndex = 0;
          for (const other of document.querySelectorAll(".tokens .chosen")) {
            other.classList.remove("chosen");
          }
          cell.classList.add("chosen");
          choose(place);
        });
        cell.addEventListener("click", () => cell.focus());
        cell.addEventListener("keydown", (event) => {
          const last = cells.length - 1;
          const goal = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last };
          if (!(event.key in goal) || !cells[goal[event.key]]) return;
          event.preventDefault();
          cells[goal[event.key]].focus();
        });
        cells.push(cell);
      });
    }
    add(0, SHOWN);
    if (texts.length > SHOWN) {
      const more = make("button", parent, `show all ${texts.length} tokens`);
      more.type = "button";
      more.addEventListener("click", () => {
        add(SHOWN, texts.length);
        more.remove();
      });
    }
    return cells;
  }

  return { limit, legend, line };
})();
