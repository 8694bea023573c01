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
.figures {
  display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
}
figure {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden;
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
.scale { display: flex; gap: 8px; align-items: center; margin: 4px 0; font-size: 0.9rem; }
.ramp {
  width: 96px; height: 12px; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgba(30, 120, 220, 0.7), transparent, rgba(215, 70, 50, 0.7));
}
.bars { width: 100%; }
.bars th, .bars td { padding: 3px 10px; border: 0; text-align: left; overflow-wrap: normal; }
.bars td:nth-child(2) { text-align: right; }
.bars .bar { width: 55%; min-width: 100px; }
.bar span { display: block; height: 14px; }
.map th, .map td { border: 1px solid var(--line); padding: 2px 6px; min-width: 0; }
.map td { width: 26px; min-width: 26px; height: 26px; cursor: pointer; }
.map thead th { text-align: center; }
.map th:first-child { position: sticky; left: 0; background: var(--card); min-width: 5.5em; }
.chosen, .map td:focus { outline: 2px solid var(--ink); outline-offset: -2px; }
.tokens, .prompt, .details dd { white-space: pre-wrap; }
.prompt { color: var(--soft); margin: 6px 0; }
.tokens { font-family: ui-monospace, Menlo, Consolas, monospace; line-height: 1.9; margin: 6px 0; }
.tokens span { cursor: pointer; padding: 3px 0; }
.details {
  border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  padding: 4px 14px; margin: 8px 0; height: 16em; overflow: auto;
}
.details dl { display: grid; grid-template-columns: minmax(5em, auto) 1fr; gap: 2px 14px; }
@media (max-width: 600px) {
  .details.long { height: 22em; }
  .long dl { display: block; }
}
.details dt { color: var(--soft); max-width: 14em; }
.details dd { margin: 0; }
summary { cursor: pointer; font-weight: 600; margin: 28px 0 8px; }
code { font-size: 0.9em; }
"""
