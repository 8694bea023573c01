"""The style sheet of the report page, inlined so that the page is one file."""

CSS = """\
:root { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #f6f8fa; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b1; --line: #30363d; --paper: #0d1117; --card: #161b22; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 1120px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 12px 0 4px; }
h2 { font-size: 1.15rem; margin: 28px 0 8px; }
.lead, .small { color: var(--soft); }
.lead { margin: 0; }
.small, figcaption { font-size: 0.9rem; }
.small p { margin: 4px 0; }
ul { padding-left: 1.2em; margin: 8px 0; }
li { margin: 4px 0; }
.scroll {
  overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
}
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td { white-space: nowrap; }
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
thead th { vertical-align: bottom; color: var(--soft); min-width: 4.5em; overflow-wrap: normal; }
th:first-child { text-align: left; min-width: 6.5em; }
.glossary th, .glossary td { text-align: left; vertical-align: top; white-space: normal; }
.glossary td { min-width: 6em; overflow-wrap: normal; }
.figures { columns: 440px; column-gap: 16px; }
figure {
  margin: 0 0 16px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; break-inside: avoid;
}
figure img { display: block; width: 100%; height: auto; background: #ffffff; padding: 8px; }
figcaption { padding: 10px 14px 12px; color: var(--ink); }
.missing { border-style: dashed; }
.refusal { border-left: 4px solid #d55e00; padding: 6px 12px; }
#steps h3 { font-size: 1rem; margin: 20px 0 6px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; }
.controls label { display: flex; gap: 8px; align-items: center; max-width: 100%; }
.controls label, .bars th { overflow-wrap: normal; }
.controls select { font: inherit; min-width: 0; max-width: 100%; }
.controls input { min-width: 0; }
.scale {
  display: flex; gap: 8px; align-items: center; margin: 4px 0; font-size: 0.9rem;
  white-space: nowrap;
}
.ramp {
  flex: 0 1 96px; min-width: 24px; height: 12px; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgba(30, 120, 220, 0.7), transparent, rgba(215, 70, 50, 0.7));
}
.bars { width: 100%; }
.bars th, .bars td { padding: 3px 10px; border: 0; text-align: left; overflow-wrap: normal; }
.bars th:first-child { width: 9em; }
.bars :is(th, td):nth-child(2) { width: 8em; text-align: right; white-space: nowrap; }
.bars .bar {
  min-width: 9em;
  background: linear-gradient(var(--line), var(--line)) center / 1px 100% no-repeat content-box;
}
.bars td span { display: block; height: 14px; }
.bars th span { display: inline-block; width: 50%; text-align: center; }
.map th, .map td { border: 1px solid var(--line); padding: 2px; min-width: 0; }
.map td { width: 26px; min-width: 26px; height: 26px; cursor: pointer; scroll-margin: 15em 7em; }
.map thead th { text-align: center; font-size: 0.8rem; }
.map .over {
  max-width: 0; overflow: hidden; text-align: left; text-overflow: ellipsis; white-space: nowrap;
}
.map .side {
  position: sticky; left: 0; background: var(--card); min-width: 5.5em; padding: 2px 8px;
  text-align: left;
}
.chosen { outline: 2px solid var(--ink); outline-offset: -2px; }
:is(.map td, .tokens span):focus:not(.chosen) { outline: none; }
.tokens, .prompt, .details dd { white-space: pre-wrap; }
.prompt { color: var(--soft); margin: 6px 0; }
.tokens { font-family: ui-monospace, Menlo, Consolas, monospace; line-height: 1.9; margin: 6px 0; }
.tokens span { cursor: pointer; padding: 3px 0; }
.details {
  border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  padding: 4px 14px; margin: 8px 0; height: 16em; overflow: auto;
}
.details.long {
  position: sticky; bottom: 8px; height: 9em; box-shadow: 0 0 12px var(--line);
}
.details dl { display: grid; grid-template-columns: minmax(5em, auto) 1fr; gap: 2px 14px; }
.details.long dl { grid-template-columns: auto 1fr auto 2fr; }
.details dt { color: var(--soft); max-width: 14em; }
.details dd { margin: 0; }
@media (max-width: 800px) {
  .details.long { height: 16em; font-size: 0.9rem; }
  .details.long dl { display: block; }
  .long dd { margin: 0 0 4px 1em; }
}
summary { cursor: pointer; font-weight: 600; margin: 28px 0 8px; }
code { font-size: 0.9em; }
"""
