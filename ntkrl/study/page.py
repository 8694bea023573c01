"""A study as a page, and as Markdown: verdicts, figures, how it was run."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from ntkrl import runtime
from ntkrl.report import FIGURES, Run, document, figure_bytes
from ntkrl.study import figures
from ntkrl.study.claims import FAILS, HOLDS, PARTLY, UNKNOWN, Verdict
from ntkrl.study.results import Results

QUESTIONS = {
    1: "Are features of different contexts alike, and does RL change that?",
    2: "Does first-order theory predict what a step does?",
    3: "Does RL make the policy surer and less diverse, and is it R that does?",
    4: "Is classifier-first RL better?",
    5: "Is it for LP-FT's reasons?",
    6: "What do many samples of one prompt reach?",
}
WHOLE = (
    *("reward", "entropy", "confidence", "distinct_solutions", "feature_cosines", "head_share"),
    "sampling_curves",
)
SHORT = ("reward", "confidence", "distinct_solutions")
DOTS_PER_INCH = 110
COLOURS = 64
MARKS = {HOLDS: "●", PARTLY: "◐", FAILS: "○", UNKNOWN: "-", "": ""}
COLUMNS = {"claim": 11, "verdict": 6, "tested on": 7, "measured, 95 % interval over seeds": 14}
"""Headings of a question's table, and how narrow each may be (em); phones scroll to the rest."""
OWN = {
    "errors": (
        figures.errors,
        "Thin lines: seeds. Where the error grows as the rate, the theory is the right first "
        "order and what is left is curvature.",
    ),
    "layers": (
        figures.layers,
        "What the head would read if the network ended after so many layers; mean over seeds, "
        "band from lowest to highest. Same completions for all.",
    ),
}
GROUPS = {
    "RL and classifier first": (("rl", "cfrl"), WHOLE),
    "Length of stage 1": (("rl", "cfrl_short", "cfrl", "cfrl_long"), SHORT),
    "Objectives": (("rl", "grpo", "reinforce"), SHORT),
    "Diverse features": (("rl", "whitened"), (*SHORT, "feature_cosines", "head_share")),
    "Signs of advantages": (("rl", "positive", "negative"), SHORT),
    "Supervised control": (("sft", "sft_first"), ("reward", "features_classifier")),
    "Learned reward": (("rlhf", "rlhf_first"), WHOLE),
}
"""What is drawn together: arms, and the report's figures of them."""


def write_page(results: Results, verdicts: Sequence[Verdict], command: str) -> Path:
    """Write `index.html` and `verdicts.md` in the study's directory.

    Args:
      results: the runs.
      verdicts: from `claims.verdicts`.
      command: that made them.

    Returns:
      The page.
    """
    study = results.study
    seeds = f"{len(study.seeds)} seeds, each with a base model of its own"
    parts: list[str] = [
        "<h1>Study: learning dynamics of RL post-training</h1>",
        f'<p class="lead">{len(verdicts)} numbers · {seeds} · <code>{command}</code></p>',
        _missing(results),
        *(_question(number, verdicts) for number in QUESTIONS),
        *(_size(results, size) for size in study.sizes),
        _rates(study.root / study.tuned / "rates.json"),
        _commands(study.root / "commands.txt"),
    ]
    page = study.root / "index.html"
    runtime.save_text(
        page,
        document("Study: learning dynamics of RL post-training", [Markup(part) for part in parts]),
    )
    runtime.save_text(study.root / "verdicts.md", markdown(verdicts, command))
    return page


def markdown(verdicts: Sequence[Verdict], command: str) -> str:
    """Return the verdicts as a Markdown table."""
    rows = [
        f"Written by `{command}`; what a verdict takes stands in `ntkrl/study/claims.py`.",
        "",
        "| # | claim | tested on | measured, 95 % interval over seeds | verdict |",
        "|---|---|---|---|---|",
    ]
    for one in verdicts:
        cells = (str(one.question), one.claim, one.task, one.number, one.verdict)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _missing(results: Results) -> str:
    lost = results.missing
    if not lost:
        return ""
    return f'<p class="refusal">Not run, or not finished: {_text("; ".join(lost))}.</p>'


def _question(number: int, verdicts: Sequence[Verdict]) -> str:
    rows = [
        f'<tr><th scope="row">{_text(one.claim)}</th>'
        f"<td>{MARKS[one.verdict]} {_text(one.verdict)}</td>"
        f"<td>{_text(one.task)}</td><td>{_text(one.number)}</td></tr>"
        for one in verdicts
        if one.question == number
    ]
    heads = "".join(
        f'<th scope="col" style="min-width: {width}em">{word}</th>'
        for word, width in COLUMNS.items()
    )
    return (
        f"<section><h2>{number}. {_text(QUESTIONS[number])}</h2>\n"
        '<div class="scroll" tabindex="0"><table class="glossary">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n"
        "</table></div></section>"
    )


def _size(results: Results, size: str) -> str:
    found = [f"<section><h2>Figures: {_text(size)}</h2>"]
    own = []
    for stem, (draw, caption) in OWN.items():
        figure = draw(results, size)
        if figure is not None:
            own.append(_figure(f"{size}-{stem}", figure, caption))
    if own:
        found.append('<div class="figures">\n' + "\n".join(own) + "\n</div>")
    for title, (arms, stems) in GROUPS.items():
        runs = [run for arm in arms for run in _runs(results, size, arm)]
        if len({run.name for run in runs}) > 1:
            drawn = "\n".join(_drawn(runs, f"{size}-{title}", stems))
            found.append(f'<h3>{_text(title)}</h3>\n<div class="figures">\n{drawn}\n</div>')
    return "\n".join([*found, "</section>"])


def _runs(results: Results, size: str, arm: str) -> Iterator[Run]:
    for seed in results.study.seeds:
        run = results.run(size, arm, seed)
        if run is not None:
            yield run


def _drawn(runs: Sequence[Run], prefix: str, stems: Sequence[str]) -> Iterator[str]:
    draws: dict[str, tuple[Callable[[Sequence[Run]], Figure | None], str]] = {
        spec.stem: (spec.draw, spec.caption) for spec in FIGURES
    }
    for stem in stems:
        draw, caption = draws[stem]
        figure = draw(runs)
        if figure is not None:
            yield _figure(f"{prefix}-{stem}".replace(" ", "_"), figure, caption)


def _figure(name: str, figure: Figure, caption: str) -> str:
    data = base64.b64encode(_small(figure_bytes(figure, "png", DOTS_PER_INCH))).decode("ascii")
    return (
        f'<figure id="{_text(name)}"><img alt="{_text(name)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'
    )


def _small(picture: bytes) -> bytes:
    """Return a PNG in few colours: a page of many stays small enough to be kept."""
    held = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE).save(
            held, "png", optimize=True
        )
    return held.getvalue()


def _rates(path: Path) -> str:
    if not path.exists():
        return ""
    told, rows = json.loads(path.read_text(encoding="utf-8")), []
    for arm, found in told.items():
        for row in found["tried"]:
            rates = {key: value for key, value in row.items() if key != "reward"}
            words = ", ".join(f"{key} {value:g}" for key, value in rates.items())
            mark = " ← chosen" if rates == found["chosen"] else ""
            rows.append(
                f'<tr><th scope="row">{_text(arm)}</th><td>{words}{mark}</td>'
                f"<td>{row['reward']:.3f}</td></tr>"
            )
    return (
        '<section><h2>Rates tried, on targets and seeds of their own</h2><div class="scroll" '
        'tabindex="0"><table><thead><tr><th scope="col">grid</th><th scope="col">rates</th>'
        '<th scope="col">held-out reward</th></tr></thead><tbody>'
        + "\n".join(rows)
        + "</tbody></table></div></section>"
    )


def _commands(path: Path) -> str:
    if not path.exists():
        return ""
    lines = dict.fromkeys(path.read_text(encoding="utf-8").splitlines())
    return (
        "<details><summary>Every command</summary><pre class='scroll'>"
        + _text("\n".join(lines))
        + "</pre></details>"
    )
