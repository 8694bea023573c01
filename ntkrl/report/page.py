"""The report page: figures as files, and one HTML file that needs nothing beside it.

The page refers to nothing outside it. Texts of runs are escaped by the template `page.html`, or
passed as JSON to the script `page.js`, which inserts them as text. Equal run directories give equal
bytes.
"""

import base64
import functools
import html
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ntkrl import durable_files
from ntkrl.report import metric_names
from ntkrl.report.captions import SIGNS
from ntkrl.report.comparisons import comparison_table
from ntkrl.report.figures import FIGURES
from ntkrl.report.plotting import FORMATS, figure_bytes
from ntkrl.report.provenance import command, facts_table
from ntkrl.report.rollouts_page import (
    RolloutsView,
    check_rollouts_view,
    remove_rollouts_view,
    resource,
    rollouts_view,
)
from ntkrl.report.runs import Run, comparable, read_runs
from ntkrl.report.step_views import EXPLANATION, step_data
from ntkrl.report.tables import (
    NO_VALUE,
    Table,
    best_of_table,
    by_label,
    number,
    similarity_table,
    spread,
    summaries,
    summary_table,
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE_BYTES = 2_800_000
"""Size that figures and step views may have together, …"""
LEAST_STEP_BYTES = 400_000
"""… of which step views get at least this much."""
GENERATOR = b'<meta name="generator" content="ntkrl">'
"""Mark of this program's pages."""
CODE = Markup("<code>{}</code>")


def write_report(run_paths: Sequence[str | os.PathLike], out_directory: str | os.PathLike) -> Path:
    """Write the figures, `index.html` and the rollouts view of a comparison of runs.

    Args:
      run_paths: run directories in any order; runs whose configs have the same name are seeds
        of one method.
      out_directory: output directory; created if needed.

    Returns:
      The path of `index.html`.

    Raises:
      ValueError: no run, a repeated run, a path that is not a run directory, or an output directory
        with files of these names that no report wrote.
    """
    all_runs = read_runs(run_paths)
    runs, refusal = comparable(all_runs)
    page = Path(out_directory) / "index.html"
    files = [page.with_name(f"{spec.stem}.{suffix}") for spec in FIGURES for suffix in FORMATS]
    durable_files.check_place(page.parent, "--out")
    _check_replaceable(page, files)
    check_rollouts_view(page.parent)
    contents: dict[Path, bytes] = {}
    images = {}
    for spec in FIGURES:
        figure = spec.draw(runs)
        if figure is not None:
            for suffix in FORMATS:
                target = page.with_name(f"{spec.stem}.{suffix}")
                contents[target] = figure_bytes(figure, suffix)
                figure.set_layout_engine("none")  # further formats keep the first one's layout
        images[spec.stem] = contents.get(page.with_name(f"{spec.stem}.png"))
    # base64 writes three bytes as four
    image_bytes = sum(len(image) * 4 // 3 for image in images.values() if image is not None)
    steps = step_section(all_runs, max(PAGE_BYTES - image_bytes, LEAST_STEP_BYTES))
    view = rollouts_view(all_runs)
    save_page(page, _compose(runs, images, refusal, [rollouts_link(view), steps]))
    # after the page, which shows that the figures beside it are a report's
    for target in files:
        if target in contents:
            with durable_files.replacing(target) as file:
                file.write(contents[target])
        else:
            target.unlink(missing_ok=True)  # of an earlier report in the same directory
    if view is None:
        remove_rollouts_view(page.parent)
    else:
        view.write(page.parent)
    return page


def save_page(page: Path, text: str) -> None:
    """Write a page of `document`.

    Raises:
      ValueError: there is a file that is not such a page.
    """
    durable_files.check_replaceable(page, _is_page, "a page of this program")
    durable_files.save_text(page, text)


def _check_replaceable(page: Path, figures: Sequence[Path]) -> None:
    """Refuse a directory whose page or figures are not those of an earlier report."""
    durable_files.check_replaceable(page, _is_page, "a page of this program")
    if not page.exists():
        for figure in figures:
            durable_files.check_replaceable(figure, lambda _: False, "of a report with a page")


def _is_page(text: bytes) -> bool:
    return GENERATOR in text[:1000]


def document(title: str, parts: Sequence[str]) -> str:
    """Return a self-contained HTML page.

    Args:
      title: of the window.
      parts: HTML of its sections.
    """
    return _html("document", title, resource("page.css"), Markup(POLICY), parts)


def heading(title: str, lead: str, refusal: str = "") -> str:
    """Return the top of a page: title, a line below it, and a warning unless empty."""
    return _html("heading", title, lead, refusal)


def table_section(table: Table) -> str:
    """Return a table as a section of a page."""
    return _html("table", table)


def figure_section(stem: str, title: str, caption: str, png: bytes | None) -> str:
    """Return a PNG as a figure of a page, or a note that it is missing."""
    image = None if png is None else base64.b64encode(png).decode("ascii")
    return _html("figure", stem, title, caption, image)


def section(title: str, parts: Sequence[str]) -> str:
    """Return a section of a page made of parts."""
    return _html("section", title, parts)


def group_section(title: str, figures: Sequence[str], table: Table | None) -> str:
    """Return figures and a table below a title, as a part of a section."""
    return _html("group", title, figures, table)


def folded_text(title: str, text: str) -> str:
    """Return preformatted text that unfolds on a click."""
    return _html("folded_text", title, text)


def step_section(runs: Sequence[Run], room: int) -> str:
    """Return the views of single steps with at most `room` bytes of data, "" without ledgers."""
    views = step_data(runs, room)
    if views is None:
        return ""
    data, limits = views
    if not data:
        return _html("no_steps", f"{room / 1e6:.1f}")
    return _html(
        "steps", EXPLANATION, limits, data, resource("view_parts.js") + resource("page.js")
    )


def rollouts_link(view: RolloutsView | None) -> str:
    """Return a section that links to a rollouts view, "" without one."""
    return "" if view is None else _html("rollouts_link", view.completions)


def _compose(
    runs: Sequence[Run], images: dict[str, bytes | None], refusal: str, steps: Sequence[str]
) -> str:
    """Put the page together from PNG bytes per figure stem and the sections of single steps."""
    base, *rows = summaries(runs)
    methods = ", ".join(row.label for row in rows)
    tables = [comparison_table(runs), similarity_table(runs), best_of_table(runs)]
    figures = [figure_section(s.stem, s.title, s.describe(runs), images[s.stem]) for s in FIGURES]
    lead = f"{methods} · {len(runs)} run{'s' if len(runs) > 1 else ''}"
    parts = [
        heading("Learning dynamics of RL post-training", lead, refusal),
        _html("summary", base, rows, SIGNS),
        table_section(summary_table([base, *rows])),
        table_section(facts_table(runs)),
        *(table_section(table) for table in tables if table is not None),
        _html("figures", figures),
        *steps,
        *map(table_section, _evaluations(runs)),
        _html("run_notes", [(run, command(run)) for run in runs]),
        _html("folded", _glossary()),
    ]
    return document(f"{methods}: learning dynamics", parts)


def _evaluations(runs: Sequence[Run]) -> list[Table]:
    """Return the metrics of `ntkrl evaluate` as a table with a column per evaluation, or none."""
    columns = by_label(runs)
    names = sorted({name for _, metrics in columns for name in metrics})
    rows = [
        (CODE.format(name), *(number(m[name]) if name in m else NO_VALUE for _, m in columns))
        for name in names
    ]
    heads = ("metric", *(label for label, _ in columns))
    return [Table("Evaluations", heads, tuple(rows))] if columns else []


def _glossary() -> Table:
    rows = []
    for name, unit, meaning, elsewhere in metric_names.entries():
        aliases = [Markup("{}\u00a0<code>{}</code>").format(*alias) for alias in elsewhere]
        rows.append((CODE.format(name), unit, meaning, Markup(", ").join(aliases)))
    return Table("Metric glossary", metric_names.COLUMNS, tuple(rows), css="glossary")


def _html(macro: str, *arguments: Any) -> Markup:
    """Render a macro of `page.html`."""
    return getattr(_template().module, macro)(*arguments)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_escape,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "spread": spread, "isfinite": math.isfinite}
    return environment.from_string(resource("page.html"))


def _escape(value: Any) -> Markup:
    """Escape like `html.escape`; Markup stays; a page cannot hold lone surrogates and NUL."""
    text = str(value if isinstance(value, Markup) else html.escape(str(value)))
    return Markup(text.encode("utf-8", "replace").decode("utf-8").replace("\0", "?"))
