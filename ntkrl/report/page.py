"""The report page: figures as files, and one HTML file that needs nothing beside it.

The page refers to nothing outside; every text from a run is escaped, or data to a script that sets
it as text. Equal run directories give equal bytes.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ntkrl.report import glossary
from ntkrl.report.compare import comparison_section
from ntkrl.report.embed import step_views
from ntkrl.report.figures import FIGURES, FigureSpec
from ntkrl.report.runs import Run, comparable, read_runs
from ntkrl.report.style import CSS
from ntkrl.report.table import COLUMNS, Row, Stat, number, spread, summary_rows, table_notes
from ntkrl.report.tables import as_html, tables

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
DOTS_PER_INCH = 180
FORMATS = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}
"""Figures' files, and what they must not say so that equal runs give equal bytes."""


def write_report(run_paths: Sequence[str | os.PathLike], out_directory: str | os.PathLike) -> Path:
    """Write the figures and `index.html` of a comparison of runs.

    Args:
      run_paths: run directories in any order; runs whose configs have the same name are seeds
        of one method.
      out_directory: where to write; made when it is not there.

    Returns:
      The path of `index.html`.

    Raises:
      ValueError: no run, a run given twice, or a path that is no run directory.
    """
    given = read_runs(run_paths)
    runs, refusal = comparable(given)
    out = Path(out_directory)
    out.mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes | None] = {}
    for spec in FIGURES:
        drawn = render(spec, runs)
        for suffix in FORMATS:
            target = out / f"{spec.stem}.{suffix}"
            if drawn is None:
                target.unlink(missing_ok=True)  # of an earlier report in the same place
            else:
                target.write_bytes(drawn[suffix])
        images[spec.stem] = None if drawn is None else drawn["png"]
    page = out / "index.html"
    # base64 writes three bytes as four
    taken = sum(len(image) * 4 // 3 for image in images.values() if image is not None)
    views = step_views(given, taken)
    page.write_text(compose(runs, images, refusal, views), encoding="utf-8")
    return page


def render(spec: FigureSpec, runs: Sequence[Run]) -> dict[str, bytes] | None:
    """Draw one figure in every format, None when no run has data for it."""
    figure = spec.draw(runs)
    if figure is None:
        return None
    drawn = {"png": saved(figure, "png")}
    figure.set_layout_engine("none")  # what the first has laid out stays
    return drawn | {"svg": saved(figure, "svg")}


def saved(figure: Figure, suffix: str, dots_per_inch: int = DOTS_PER_INCH) -> bytes:
    """Return a figure as file of a format; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "ntkrl"}):
        # texts of runs may hold characters the font lacks; their boxes say so
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=suffix, dpi=dots_per_inch, metadata=FORMATS[suffix])
    return buffer.getvalue()


def compose(
    runs: Sequence[Run], images: dict[str, bytes | None], refusal: str = "", views: str = ""
) -> str:
    """Put the page together.

    Args:
      runs: the runs, ordered.
      images: PNG per figure stem, None for a figure without data.
      refusal: what is not compared and why.
      views: the section of single steps.

    Returns:
      The HTML text.
    """
    rows = summary_rows(runs)
    methods = ", ".join(row.label for row in rows[1:])
    parts = [
        "<h1>Learning dynamics of RL post-training</h1>",
        f'<p class="lead">{_text(methods)} · {len(runs)} run{"s" if len(runs) > 1 else ""}</p>',
        f'<p class="refusal">{_text(refusal)}</p>' if refusal else "",
        _summary(rows),
        _table(rows),
        comparison_section(runs),
        *map(as_html, tables(runs)),
        _figures(images),
        views,
        _evaluations(runs),
        _notes(runs),
        _glossary(),
    ]
    return document(f"{methods}: learning dynamics", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page of its own: no script or picture from elsewhere.

    Args:
      title: in words.
      parts: HTML of its sections.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>\n{CSS}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _summary(rows: Sequence[Row]) -> str:
    items = [f"<li>{_sentence(row)}</li>" for row in rows[1:]]
    comparison = _comparison(rows[1:])
    if comparison:
        items.append(f"<li>{comparison}</li>")
    noise = rows[0].noise
    if math.isfinite(noise):
        items.append(
            f"<li>One evaluation of the starting model varies by ± {number(noise)} from sampling "
            "alone: a change of that size in one run is no evidence.</li>"
        )
    return (
        '<section><h2>What to look for</h2>\n<ul class="summary">\n'
        + "\n".join(items)
        + "\n</ul>\n<p>Three questions to the figures: does the reward rise faster after the "
        "classifier stage; does entropy fall while it rises; and is the change of token "
        "probabilities carried by the classifier (R) or by the rest of the network (G)?</p>"
        "</section>"
    )


def _sentence(row: Row) -> str:
    """One method in one sentence; what was not measured is left out or said so."""
    runs = f"{row.runs} run{'s' if row.runs > 1 else ''}"
    parts = []
    if row.reward_end.count:
        gain = f" ({row.gain:+.1f} noise units)" if math.isfinite(row.gain) else ""
        parts.append(
            f"held-out reward {number(row.reward_start.mean)} → "
            f"<strong>{_text(spread(row.reward_end))}</strong>{gain}"
        )
    else:
        parts.append("no held-out evaluation after the start")
    parts.extend(_change("probe entropy", row.entropy_start, row.entropy, " nats"))
    parts.extend(_change("confidence", row.confidence_start, row.confidence, ""))
    if row.head_share.count:
        parts.append(f"R share of the predicted change {_text(spread(row.head_share))} on average")
    open_runs = f"; {row.unfinished} of {row.runs} not finished" if row.unfinished else ""
    return f"<b>{_text(row.label)}</b> ({runs}{open_runs}): {'; '.join(parts)}."


def _change(words: str, start: Stat, end: Stat, unit: str) -> list[str]:
    if not end.count:
        return []
    return [f"{words} {number(start.mean)} → {number(end.mean)}{unit}"]


def _comparison(rows: Sequence[Row]) -> str:
    """Compare the two best methods by their last held-out reward."""
    ranked = sorted(
        (row for row in rows if row.reward_end.count), key=lambda row: -row.reward_end.mean
    )
    if len(ranked) < 2:
        return ""
    first, second = ranked[:2]
    ahead = first.reward_end.mean - second.reward_end.mean
    text = (
        f"Highest last held-out reward: <b>{_text(first.label)}</b>, {number(ahead)} above "
        f"{_text(second.label)}"
    )
    spreads = [row.reward_end.sd for row in (first, second)]
    if all(math.isfinite(sd) for sd in spreads):
        return f"{text}; sd over seeds {number(spreads[0])} and {number(spreads[1])}."
    return f"{text}; without several seeds of both, their spread is not known."


def _table(rows: Sequence[Row]) -> str:
    heads = "".join(f'<th scope="col">{_text(column.title)}</th>' for column in COLUMNS)
    body = []
    for row in rows:
        cells = [_text(column.cell(row)) for column in COLUMNS]
        body.append(
            f'<tr><th scope="row">{cells[0]}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells[1:])
            + "</tr>"
        )
    notes = "".join(f"<p>{_text(note)}</p>" for note in table_notes(rows))
    return (
        '<section><h2>Comparison</h2>\n<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n"
        f'</table></div>\n<div class="small">{notes}</div></section>'
    )


def _figures(images: dict[str, bytes | None]) -> str:
    shown = [_figure(spec, images[spec.stem]) for spec in FIGURES]
    return (
        '<section><h2>Figures</h2>\n<p class="small">With several seeds: thin line per seed, '
        "bold mean, band from lowest to highest unless named otherwise.</p>\n"
        '<div class="figures">\n' + "\n".join(shown) + "\n</div></section>"
    )


def _figure(spec: FigureSpec, image: bytes | None) -> str:
    if image is None:
        return (
            f'<figure class="missing" id="{spec.stem}"><figcaption><b>{_text(spec.title)}</b>: '
            "missing, no run has data for it.</figcaption></figure>"
        )
    data = base64.b64encode(image).decode("ascii")
    return (
        f'<figure id="{spec.stem}"><img alt="{_text(spec.title)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{_text(spec.caption)}</figcaption>'
        "</figure>"
    )


def _evaluations(runs: Sequence[Run]) -> str:
    """Show what `ntkrl evaluate` measured, a column each."""
    found = [(run, name, told) for run in runs for name, told in run.evaluations.items()]
    if not found:
        return ""
    heads = "".join(
        f'<th scope="col">{_text(f"{run.name}, seed {run.seed}: {name}")}</th>'
        for run, name, _ in found
    )
    rows = []
    for metric in sorted({metric for _, _, told in found for metric in told}):
        cells = [number(told[metric]) if metric in told else "–" for _, _, told in found]
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row"><code>{_text(metric)}</code></th>{values}</tr>')
    return (
        '<section><h2>Evaluations</h2>\n<div class="scroll" tabindex="0"><table>\n'
        f'<thead><tr><th scope="col">metric</th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div></section>"
    )


def _notes(runs: Sequence[Run]) -> str:
    items = []
    for run in runs:
        notes = "; ".join(run.notes) if run.notes else "complete"
        items.append(
            f"<li><b>{_text(run.name)}</b>, seed {run.seed} "
            f"(<code>{_text(run.path.name)}</code>): {_text(notes)}.</li>"
        )
    return "<section><h2>Runs</h2>\n<ul>\n" + "\n".join(items) + "\n</ul></section>"


def _glossary() -> str:
    rows = "\n".join(
        f'<tr><th scope="row"><code>{_text(entry.name)}</code></th><td>{_text(entry.unit)}</td>'
        f"<td>{_text(entry.meaning)}</td><td>{_elsewhere(entry)}</td></tr>"
        for entry in glossary.entries()
    )
    columns = "".join(f'<th scope="col">{column}</th>' for column in glossary.COLUMNS)
    return (
        "<details><summary>Metric glossary</summary>\n"
        '<div class="scroll" tabindex="0"><table class="glossary">\n'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></details>"
    )


def _elsewhere(entry: glossary.Entry) -> str:
    named = [f"{_text(style)}\u00a0<code>{_text(name)}</code>" for style, name in entry.elsewhere]
    return ", ".join(named)
