"""The study's page and its Markdown table: verdicts, figures, rates and every command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ntkrl import report, study
from ntkrl.configs.evidence.claims import Plan, head_share
from ntkrl.configs.evidence.similarity import DEPTH, KINDS, read_similarities
from ntkrl.configs.evidence.verdict import FAILS, HOLDS, PARTLY, UNKNOWN, Verdict
from ntkrl.evaluation import powers
from ntkrl.study import ArmGroup, Results

TITLE = "Study: learning dynamics of RL post-training"
QUESTIONS = {
    1: "Are features of different contexts alike, and does RL change that?",
    2: "Does first-order theory predict what a step does?",
    3: "Does RL make the policy surer and less diverse, and is it R that does?",
    4: "Is classifier-first RL better?",
    5: "Is it for LP-FT's reasons?",
    6: "What do many samples of one prompt reach?",
}
MARKS = {HOLDS: "●", PARTLY: "◐", FAILS: "○", UNKNOWN: "-", "": ""}
MEASURED = "measured, 95 % interval over seeds"
GROUPS = (
    ArmGroup("RL and classifier first", ("rl", "cfrl"), ("reward", "confidence", "head_share")),
    ArmGroup("Length of stage 1", ("rl", "cfrl_short", "cfrl", "cfrl_long"), ("reward",)),
    ArmGroup("Objectives", ("rl", "grpo", "reinforce"), ("reward",)),
    ArmGroup("Diverse features", ("rl", "whitened"), ("confidence",)),
    ArmGroup("Without the mean feature", ("rl", "shrunk"), ("confidence",)),
    ArmGroup("Tied head", ("tied_rl", "tied_cfrl"), ("reward", "confidence")),
    ArmGroup("Signs of advantages", ("rl", "positive", "negative"), ("confidence",)),
    ArmGroup("Supervised control", ("sft", "sft_first"), ("features_classifier",)),
    ArmGroup("Learned reward", ("rlhf", "rlhf_first"), ("reward",)),
)
STEP_ARMS = {
    "sgd": "SGD on everything",
    "sgd_head": "SGD on the head alone",
    "adam": "Adam on everything",
}
MEASURES: dict[str, study.Measure] = {
    "seconds": study.training_seconds,
    "head_share": head_share,
}
"""Numbers of every run in `runs.jsonl`, beside the metrics."""


def metrics(samples: int) -> tuple[str, ...]:
    """Return the metrics of every run in `runs.jsonl`: those that the claims read, and more."""
    return (
        *("eval/reward", "eval/distinct_completions", "reward", "loss"),
        *("probe/confidence", "probe/entropy", "probe/head_norm"),
        *("probe/feature_distortion_relative", "probe/cosine_within_response"),
        *("probe/cosine_across_responses", "probe/cosine_across_prompts"),
        *("predict/correlation", "predict/relative_error", "predict/head_share"),
        *("predict/entropy_head_share", "predict/arg_max_head_share"),
        *("diversity/distinct_answers", "diversity/support_kept"),
        *("diversity/support_lost", "diversity/support_gained"),
        *(f"diversity/best_of_{n}" for n in powers(samples)),
    )


def markdown(verdicts: Sequence[Verdict], command: str) -> str:
    """Return the verdicts as a Markdown table."""
    rows = [
        f"Written by `{command}`; criteria of the verdicts: `configs/evidence/claims.py`.",
        "",
        f"| # | claim | tested on | {MEASURED} | verdict |",
        "|---|---|---|---|---|",
    ]
    for question, task, claim, number, verdict in verdicts:
        cells = (str(question), claim, task, number, verdict)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def write_page(results: Results, plan: Plan, verdicts: Sequence[Verdict], command: str) -> Path:
    """Write `index.html` in the study's directory, and return its path."""
    arms = {
        size: [arm for arm in plan.arms[size] if arm not in plan.step_rates] for size in plan.sizes
    }
    missing = [
        text
        for size in plan.sizes
        for arm in arms[size]
        for text in results.missing(size, arm, plan.seeds_of(arm))
    ]
    warning = f"Not run, or not finished: {'; '.join(missing)}." if missing else ""
    parts = [
        report.heading(
            TITLE, f"{len(verdicts)} numbers · {len(results.seeds)} seeds · {command}", warning
        ),
        *(report.table_section(_question(number, verdicts)) for number in QUESTIONS),
    ]
    for size in plan.sizes:
        figures = [
            study.figure_html(f"{size}-{name}", figure, caption)
            for name, figure, caption in (
                ("errors", _errors(results, plan, size), ERRORS_CAPTION),
                ("layers", _layers(results, size), LAYERS_CAPTION),
            )
            if figure is not None
        ]
        groups = [group for group in GROUPS if set(group.arms) <= set(arms[size])]
        sections = study.group_sections(results, size, groups)
        single = [report.group_section("Theory and features", figures, None)] if figures else []
        parts.append(report.section(f"Figures: {size}", [*single, *sections]))
    parts += _rates(results.root)
    commands = study.started_commands(results.root)
    if commands:
        parts.append(report.folded_text("Every command", "\n".join(commands)))
    page = results.root / "index.html"
    report.save_page(page, report.document(TITLE, parts))
    return page


def _question(number: int, verdicts: Sequence[Verdict]) -> report.Table:
    rows = tuple(
        (row.claim, f"{MARKS[row.verdict]} {row.verdict}", row.task, row.number)
        for row in verdicts
        if row.question == number
    )
    heads = ("claim", "verdict", "tested on", MEASURED)
    return report.Table(f"{number}. {QUESTIONS[number]}", heads, rows, css="glossary verdicts")


def _rates(root: Path) -> list[str]:
    """Return the tables of the rates tried."""
    parts = []
    for path in sorted(root.glob("*/rates.json")):
        rows = []
        for arm, table in json.loads(path.read_text(encoding="utf-8")).items():
            for row in table["tried"]:
                rates = {key: value for key, value in row.items() if key != "reward"}
                words = ", ".join(f"{key} {value:g}" for key, value in rates.items())
                mark = " ← chosen" if rates == table["chosen"] else ""
                rows.append((arm, words + mark, f"{row['reward']:.3f}"))
        heads = ("grid", "rates", "held-out reward")
        title = "Rates tried, on targets and seeds of their own"
        parts.append(report.table_section(report.Table(title, heads, tuple(rows))))
    return parts


ERRORS_CAPTION = (
    "Thin lines: seeds. Where the error grows as the rate, the theory is the right first order and "
    "the remainder is curvature."
)


def _errors(results: Results, plan: Plan, size: str) -> Figure | None:
    """Draw the relative error of the first-order prediction over the rate of one step."""
    measure, curves = study.mean_of("predict/relative_error"), {}
    for arm, rates in plan.step_rates.items():
        rows = [results.over_seeds(size, f"{arm}_{i}", measure) for i in range(len(rates))]
        if np.isfinite(rows).any():
            curves[STEP_ARMS[arm]] = np.array(rates), np.array(rows)
    if not curves:
        return None
    figure, (axis,) = report.panels(1, "First-order error of one step")
    for i, (words, (rates, rows)) in enumerate(curves.items()):
        axis.plot(rates, rows, color=report.PALETTE[i], linewidth=0.7, alpha=0.5)
        style = {"color": report.PALETTE[i], "marker": report.MARKERS[i], "linewidth": 2.2}
        axis.plot(rates, np.nanmean(rows, axis=1), label=words, **style)
    rates, rows = next(iter(curves.values()))
    guide = np.nanmean(rows[0]) * rates / rates[0]
    axis.plot(rates, guide, color="#555555", linestyle="--", label="slope 1")
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("learning rate", fontsize=12)
    axis.set_ylabel("‖actual − predicted‖/‖actual‖", fontsize=12)
    axis.legend(fontsize=11, frameon=False)
    return figure


LAYERS_CAPTION = (
    "The head's input if the network ended after so many layers; mean over seeds, band from lowest "
    "to highest. Same completions for all."
)


def _layers(results: Results, size: str) -> Figure | None:
    """Draw the cosines of features by depth, before and after training, a panel per kind."""
    by_arm = {arm: read_similarities(results, size, arm) for arm in ("base", "rl", "cfrl")}
    by_arm = {arm: seeds for arm, seeds in by_arm.items() if seeds}
    if not by_arm:
        return None
    figure, axes = report.panels(len(KINDS), "Similarity of features by depth")
    for axis, kind in zip(axes, KINDS, strict=True):
        for i, (arm, seeds) in enumerate(by_arm.items()):
            rows, depth = np.array([seed[kind] for seed in seeds]), seeds[0][DEPTH]
            style = {"color": report.PALETTE[i], "marker": report.MARKERS[i], "linewidth": 2.2}
            axis.plot(depth, rows.mean(axis=0), label=arm, **style)
            low, high = rows.min(axis=0), rows.max(axis=0)
            axis.fill_between(depth, low, high, color=report.PALETTE[i], alpha=0.18, linewidth=0)
        axis.set_ylabel(f"cosine,\n{kind.replace('_', ' ')}", fontsize=12)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("layers before the final norm", fontsize=12)
    axes[-1].legend(fontsize=11, frameon=False)
    return figure
