"""The figures of a report: pure functions from runs to a Figure, or None when there is no data.

`FIGURES` fixes their order, titles and captions. Captions are for a person who knows
reinforcement learning and not neural tangent kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ntkrl.report import curves, influence, waterfall
from ntkrl.report.plotting import (
    REFERENCE_GREY,
    WIDTH_INCHES,
    Look,
    draw_curves,
    draw_stages,
    draw_thin,
    dress,
    finish,
    has,
    label_steps,
    looks,
    name_values,
    panels,
    shown,
)
from ntkrl.report.runs import Run, by_name

MAX_POINTS = 3000
"""Points drawn per scatter panel; its numbers are computed from all of them."""


def reward(runs: Sequence[Run]) -> Figure | None:
    """Draw training reward (thin) and held-out reward (bold) over steps."""
    if not has(runs, "reward") and not has(runs, "eval/reward"):
        return None
    figure, (axis,) = panels(1, "Reward in training and on held-out prompts")
    draw_thin(axis, runs, "reward")
    draw_curves(axis, runs, "eval/reward")
    name_values(axis, "reward", "mean reward")
    draw_stages([axis], runs)
    label_steps(axis)
    thin = Line2D([], [], color=REFERENCE_GREY, linewidth=0.8)
    return finish(figure, runs, [(thin, "thin: training batches")])


def entropy(runs: Sequence[Run]) -> Figure | None:
    """Draw policy entropy on own samples and on the probe set."""
    rows = (("entropy", "own samples"), ("probe/entropy", "probe set"))
    return _stacked(runs, "Entropy of the next-token distribution", rows)


def confidence(runs: Sequence[Run]) -> Figure | None:
    """Draw the mean largest probability on own samples and on the probe set."""
    rows = (("confidence", "own samples"), ("probe/confidence", "probe set"))
    return _stacked(runs, "Confidence: probability of the likeliest token", rows)


def distinct(runs: Sequence[Run]) -> Figure | None:
    """Draw distinct solutions and distinct completions per held-out prompt."""
    rows = (
        ("eval/distinct_solutions", "distinct solutions"),
        ("eval/distinct_completions", "distinct texts"),
    )
    return _stacked(runs, "Diversity of answers to held-out prompts", rows)


def cosines(runs: Sequence[Run]) -> Figure | None:
    """Draw the mean feature cosine of three kinds of token pairs."""
    rows = (
        ("probe/cosine_within_response", "same response"),
        ("probe/cosine_across_responses", "same prompt"),
        ("probe/cosine_across_prompts", "other prompts"),
    )
    return _stacked(runs, "Similarity of features between tokens", rows)


def shares(runs: Sequence[Run]) -> Figure | None:
    """Draw the shares of head, body (and cross part) of the predicted change."""
    rows = (
        ("predict/head_share", "head part, R"),
        ("predict/body_share", "body part, G"),
        ("predict/cross_share", "cross part"),
    )
    figure = _stacked(runs, "Who causes the change: head or body", rows)
    if figure is not None:
        for axis in figure.axes:
            for level in (0.0, 1.0):
                axis.axhline(level, color=REFERENCE_GREY, linewidth=0.8)
    return figure


def prediction(runs: Sequence[Run]) -> Figure | None:
    """Scatter predicted against actual change of probe tokens, one panel per method."""
    groups = {name: [run for run in group if run.probes] for name, group in by_name(runs).items()}
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        return None
    size = (WIDTH_INCHES, 4.4 * len(groups) + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(
        "Predicted and actual change in one step", fontsize=13, x=0.02, ha="left", fontweight="bold"
    )
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        _scatter(axis, name, looks(runs)[name], *pooled_changes(group))
    return figure


def features(runs: Sequence[Run]) -> Figure | None:
    """Draw feature distortion and the norm of the classifier."""
    rows = (
        ("probe/feature_distortion", "feature distortion"),
        ("probe/head_norm", "classifier norm"),
    )
    return _stacked(runs, "How far features and classifier move", rows)


def neighbours(runs: Sequence[Run]) -> Figure | None:
    """Draw what a prompt's other completions do to the good ones through the head."""
    rows = (
        ("probe/ches_normalised", "alike (CHES)"),
        ("probe/head_sum_positive", "help"),
        ("probe/head_sum_negative", "harm"),
        ("probe/head_sum_wrong", "spill"),
    )
    return _stacked(runs, "What completions of one prompt do to each other", rows)


def paths(runs: Sequence[Run]) -> Figure | None:
    """Draw how straight log-probs and weights move, and how noisy their direction is."""
    rows = (
        ("probe/linearity", "log-probs on a line"),
        ("weights/linearity", "weights on a line"),
        ("weights/direction_cosine", "ΔW, same direction"),
        ("signal/signal_to_noise", "gradient signal"),
    )
    return _stacked(runs, "How straight training runs", rows)


def pooled_changes(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Join the probe tokens of all probed steps of the runs.

    Args:
      runs: runs of which at least one has probes.

    Returns:
      predicted: `[n]` nats, head + body (+ cross).
      actual: `[n]` nats.
    """
    predicted, actual = [], []
    for run in runs:
        for step in sorted(run.probes):
            arrays = run.probes[step]
            total = arrays["predicted_head"] + arrays["predicted_body"]
            if "predicted_cross" in arrays:
                total = total + arrays["predicted_cross"]
            predicted.append(total)
            actual.append(arrays["actual"])
    return np.concatenate(predicted).astype(float), np.concatenate(actual).astype(float)


def agreement(predicted: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """Return correlation and ‖actual − predicted‖ / ‖actual‖, NaN where undefined."""
    varies = predicted.size > 1 and predicted.std() > 0 and actual.std() > 0
    correlation = float(np.corrcoef(predicted, actual)[0, 1]) if varies else float("nan")
    norm = np.linalg.norm(actual)
    error = float(np.linalg.norm(actual - predicted) / norm) if norm > 0 else float("nan")
    return correlation, error


def _scatter(axis: Axes, name: str, look: Look, predicted: np.ndarray, actual: np.ndarray) -> None:
    """Draw one panel with equal scales and the diagonal."""
    correlation, error = agreement(predicted, actual)
    dress(axis)
    every = -(-predicted.size // MAX_POINTS)
    axis.scatter(
        predicted[::every], actual[::every], s=9, alpha=0.35, color=look.color, linewidths=0
    )
    larger = np.maximum(np.abs(predicted), np.abs(actual))
    # A few tokens move many times more than the rest; drawing them all would hide the rest.
    limit = min(larger.max(initial=0), 2 * np.quantile(larger, 0.99)) if larger.size else 0.0
    limit = 1.05 * float(limit) if limit > 0 else 1.0
    outside = int((larger > limit).sum())
    if outside:
        words = f"{outside} of {larger.size} tokens outside"
        axis.text(0.97, 0.03, words, fontsize=10, ha="right", transform=axis.transAxes)
    axis.plot([-limit, limit], [-limit, limit], color=REFERENCE_GREY, linewidth=1)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axis.locator_params(nbins=5)
    axis.ticklabel_format(style="sci", scilimits=(-2, 3))
    axis.set_xlabel("predicted Δ log π (nats)", fontsize=12)
    axis.set_ylabel("actual Δ log π (nats)", fontsize=12)
    title = f"{shown(name)}: correlation {correlation:.3f}, rel. error {error:.2f}"
    axis.set_title(title, fontsize=11, loc="left", pad=16)


def _stacked(runs: Sequence[Run], title: str, rows: Sequence[tuple[str, str]]) -> Figure | None:
    """Draw one panel per metric that some run has; markers where values are few."""
    rows = [(metric, words) for metric, words in rows if has(runs, metric)]
    if not rows:
        return None
    figure, axes = panels(len(rows), title)
    for axis, (metric, words) in zip(axes, rows, strict=True):
        draw_curves(axis, runs, metric, marked="/" in metric)
        name_values(axis, metric, words)
    draw_stages(axes, runs)
    label_steps(axes[-1])
    return finish(figure, runs)


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """One figure of the report.

    stem: name of its file, without suffix.
    title: what it shows.
    caption: how to read it, in plain words.
    draw: the function of this module.
    """

    stem: str
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], Figure | None]


FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        "reward",
        "Reward in training and on held-out prompts",
        "Bold lines with markers: mean reward on held-out prompts. Thin lines: mean reward of "
        "the completions trained on at each step. Training the classifier alone (the first "
        "stage of CF-RL) is expected to move the reward little; what counts is how fast it "
        "rises afterwards, and where both methods are after the same number of steps.",
        reward,
    ),
    FigureSpec(
        "entropy",
        "Entropy of the next-token distribution",
        "How undecided the policy is per token. On its own samples the text changes along with "
        "the policy; on the probe set the text is fixed, so only the policy changes. A steady "
        "fall means that the policy narrows down.",
        entropy,
    ),
    FigureSpec(
        "confidence",
        "Confidence: probability of the likeliest token",
        "Mean probability of the likeliest next token. Where features are alike, reinforcing a "
        "token at one position pushes it up at the others too, whether or not it belongs there; "
        "tokens that are sampled often gain most.",
        confidence,
    ),
    FigureSpec(
        "distinct_solutions",
        "Diversity of answers to held-out prompts",
        "How many different successful completions the samples of one prompt contain, and which "
        "fraction of the samples differ at all. If reward rises while distinct solutions fall, "
        "the policy became surer of fewer answers.",
        distinct,
    ),
    FigureSpec(
        "feature_cosines",
        "Similarity of features between tokens",
        "Features are the vectors the classifier (the last linear layer) reads. The panels show "
        "their mean cosine for pairs of positions in the same response, in other responses to "
        "the same prompt, and for other prompts. The nearer to 1, the more the classifier's part "
        "of an update at one position pushes the same token up everywhere else.",
        cosines,
    ),
    FigureSpec(
        "head_share",
        "Who causes the change: head or body",
        "The change that one optimizer step makes to the probe tokens' log-probabilities is "
        "predicted to first order and split in two: the part of the classifier (R) and the part "
        "of all other layers (G); a classifier tied to the embedding adds a cross part. Shares "
        "add up to 1. One below 0 or above 1 means that the parts oppose each other. While the "
        "classifier is trained alone its share is 1 by construction.",
        shares,
    ),
    FigureSpec(
        "predicted_actual",
        "Predicted and actual change in one step",
        "Each point is one probe token at one step, all probed steps and runs of a method "
        "together. On the diagonal the first-order prediction is exact. Far from it the step "
        "was too large for the shares above to be trusted. Relative error: length of the "
        "difference over length of the actual change.",
        prediction,
    ),
    FigureSpec(
        "features_classifier",
        "How far features and classifier move",
        "Feature distortion is the mean distance of the probe set's features from those of the "
        "starting model; the classifier norm is that of its weight matrix. In supervised "
        "fine-tuning, training the classifier first helps by distorting features less. Compare "
        "with the reward figure before giving the same account of a difference in RL.",
        features,
    ),
    FigureSpec(
        "straightness",
        "How straight training runs",
        "How well straight lines in the step explain the log-probs of probe tokens, and 4096 "
        "weights, so far (mean R², 1: each rises or falls at one rate); cosine of the direction "
        "in which weight matrices have moved most with that at the ledger before (1: the same); "
        "and the squared mean of the samples' gradients over their variance (well below 1 over "
        "the number of samples: the batch hardly tells the gradient from noise).",
        paths,
    ),
    FigureSpec(
        "neighbours",
        "What completions of one prompt do to each other",
        "All through the classifier alone. Alike: how near the features of a prompt's best and "
        "worst completion lie; above 0, pushing the worst down takes the best along. Help and "
        "harm: what completions above and below the mean do to the log-probs of tokens of those "
        "above it; where harm outweighs help, good answers are held down. Spill: what good "
        "answers do for the tokens of bad ones.",
        neighbours,
    ),
    FigureSpec(
        "ledger_log_prob",
        "What moved the log-probs in one step",
        "The last step whose ledger was kept, as a sum: each bar starts where the one above "
        "ends, and all together give the measured change (actual). Terms of the loss are split "
        "by road: R through the classifier, G through the rest of the network. Momentum is what "
        "earlier steps still do, curvature what first order leaves out. Means over probe tokens.",
        waterfall.log_prob_waterfall,
    ),
    FigureSpec(
        "ledger_entropy",
        "What moved the entropy in one step",
        "The same account of the entropy on the probe set. A part to the left of its start "
        "narrows the policy; whether samples, the KL term or momentum do it calls for different "
        "remedies.",
        waterfall.entropy_waterfall,
    ),
    FigureSpec(
        "ledger_shares",
        "Shares of the measured change",
        "The same parts over training, as shares of the measured change of log-probs. R, G, "
        "momentum, decay, curvature (and what the optimizer adds) give 1 together; below 0 a "
        "part works against the change. KL is a part of R and G.",
        curves.ledger_shares,
    ),
    FigureSpec(
        "probe_families",
        "Log-probability by kind of probe completion",
        "Mean log-probability of the tokens of the policy's own first samples, of samples of other "
        "prompts, of reference and rejected answers, of paraphrases and of shuffled tokens. If "
        "shuffled text falls with all others, mass moves to what no completion holds; if samples "
        "of other prompts rise, updates spill over.",
        curves.families,
    ),
    FigureSpec(
        "influence",
        "Which sample moved which probe completion",
        "Rows are completions of the last accounted minibatch, by advantage; columns are probe "
        f"completions. Red raises, blue lowers their log-probability. At most "
        f"{influence.MAX_SAMPLES} samples, those with the largest total; the first seed of a "
        "method.",
        influence.influence,
    ),
    FigureSpec(
        "feature_similarity",
        "Similarity of probe completions' features",
        "Mean cosine of the features of any two probe completions, at the first and the last "
        "probe, of the first seed. Where a column is near 1, the classifier's part of an update "
        "spills over to that completion.",
        influence.similarity,
    ),
    FigureSpec(
        "sampling_curves",
        "What many samples of one prompt reach",
        "Pass@k: chance that one of k samples succeeds; best of N: mean of the largest reward of "
        "N. Dashed: starting model, bold: last evaluation. If bold lies above at the left and "
        "below at the right, the policy became surer of fewer answers. Bands: 95 % bootstrap "
        "over seeds; with few seeds they are too narrow.",
        curves.sampling,
    ),
)
