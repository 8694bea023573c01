// Parts of the report's views that scripts draw. Every text comes from the run and is set as text.
"use strict";
const parts = (() => {
  function make(tag, parent, text, className) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    parent.append(element);
    return element;
  }

  // Arrays come as whole numbers of a unit, null where a value is not known.
  function unpack(packed) {
    return packed.values.map((value) => value === null ? NaN : value * packed.unit);
  }

  function number(value) {
    if (!Number.isFinite(value)) return "not known";
    const text = Math.abs(value) > 0 && Math.abs(value) < 1e-3
      ? value.toExponential(1) : String(Number(value.toPrecision(3)));
    return text.replace(/-/g, "−");
  }

  function signed(value) {
    return (value > 0 ? "+" : "") + number(value);
  }

  // A sign where both are possible: sides is "below", "above" or "both".
  function quantity(value, sides, unit) {
    return `${sides === "both" ? signed(value) : number(value)} ${unit}`.trim();
  }

  // Red raises, blue lowers; see-through, so that text stays readable on light and dark.
  function tint(element, value, limit) {
    const share = limit > 0 && Number.isFinite(value) ? Math.min(1, Math.abs(value) / limit) : 0;
    const color = value > 0 ? "215, 70, 50" : "30, 120, 220";
    element.style.backgroundColor = `rgba(${color}, ${(0.7 * share).toFixed(3)})`;
  }

  function control(parent, words, element) {
    const label = make("label", parent, words);
    label.append(element);
    return element;
  }

  function choice(parent, words, options, chosen, change) {
    const select = control(parent, words, document.createElement("select"));
    for (const [value, text, disabled] of options) {
      const option = make("option", select, text);
      option.value = value;
      option.selected = String(value) === String(chosen);
      option.disabled = Boolean(disabled);
    }
    select.addEventListener("change", () => change(select.value));
    return select;
  }

  // A box that scrolls sideways, with a hint while its content is wider.
  function scroller(parent) {
    const hint = make("p", parent, "wider than the screen: scroll sideways →", "hint");
    const box = make("div", parent, undefined, "scroll");
    box.tabIndex = 0;
    new ResizeObserver(() => {
      hint.classList.toggle("shown", box.scrollWidth > box.clientWidth + 1);
    }).observe(box);
    return box;
  }

  // A panel below a hint; returns the function that shows names and values in it. A value is a
  // text or an element.
  function panel(parent, hint, className) {
    make("p", parent, hint, "small");
    const box = make("div", parent, undefined, className);
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "values");
    box.setAttribute("aria-live", "polite");
    return (rows) => {
      const list = document.createElement("dl");
      for (const [name, value] of rows) {
        make("dt", list, name);
        make("dd", list).append(value);
      }
      box.replaceChildren(list);
    };
  }

  return { make, unpack, number, signed, quantity, tint, control, choice, scroller, panel };
})();
