"""The figures of a report: their order, titles and captions.

Captions are for a person who knows reinforcement learning and not neural tangent kernels.
"""

import dataclasses
import functools
from collections.abc import Sequence

from matplotlib.figure import Figure

from ntkrl.report import curves, ledger_figures
from ntkrl.report.captions import changes
from ntkrl.report.plotting import PALETTE
from ntkrl.report.runs import Run
from ntkrl.report.tables import PAIRS

FAMILIES = ("own", "other", "reference", "rejected", "paraphrased", "shuffled")
FAMILY_LOG_PROBS: dict[str, curves.Line] = {
    f"probe/{family}/log_prob": (family, color, "-")
    for family, color in zip(FAMILIES, PALETTE, strict=True)
}
LEDGER_SHARES: dict[str, curves.Line] = {
    "ledger/head_share": ("R (head)", ledger_figures.COLORS["R"], "-"),
    "ledger/body_share": ("G (body)", ledger_figures.COLORS["G"], "-"),
    "ledger/momentum_share": ("momentum", ledger_figures.COLORS["momentum"], "-"),
    "ledger/decay_share": ("decay", ledger_figures.COLORS["decay"], "-"),
    "ledger/kl_share": ("KL, in R and G", "#56B4E9", "--"),
    "ledger/curvature_share": ("curvature", ledger_figures.COLORS["curvature"], "-"),
}


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """One figure of the report.

    stem: name of its file, without suffix.
    title: heading of the figure.
    caption: definition of what it shows, true of any runs.
    plot: its drawing function.
    metrics: names and words of metrics whose changes are listed below the caption.
    """

    stem: str
    title: str
    caption: str
    plot: curves.Plot
    metrics: tuple[tuple[str, str], ...] = ()

    def draw(self, runs: Sequence[Run]) -> Figure | None:
        """Draw the runs; None where no run has data for the figure."""
        return self.plot(self.title, runs)

    def describe(self, runs: Sequence[Run]) -> str:
        """Return the caption, with what the runs measured."""
        return f"{self.caption} {changes(runs, self.metrics)}".strip()


FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        "reward",
        "Reward in training and on held-out prompts",
        "Bold lines with markers: mean reward on held-out prompts. Thin lines: mean reward of "
        "the completions trained on at each step. Dashed lines: ends of stages.",
        curves.reward,
        (("eval/reward", "held-out reward"),),
    ),
    FigureSpec(
        "entropy",
        "Entropy of the next-token distribution",
        "How undecided the policy is per token. On its own samples the text changes along with "
        "the policy; on the probe set the text is fixed, so only the policy changes. 0: always "
        "the same token; ln V: all V tokens alike.",
        curves.metric_panels(("entropy", "own samples"), ("probe/entropy", "probe set")),
        (("entropy", "own samples"), ("probe/entropy", "probe set")),
    ),
    FigureSpec(
        "confidence",
        "Confidence: probability of the likeliest token",
        "Mean probability of the likeliest next token, on the policy's own samples and on the "
        "fixed text of the probe set.",
        curves.metric_panels(("confidence", "own samples"), ("probe/confidence", "probe set")),
        (("confidence", "own samples"), ("probe/confidence", "probe set")),
    ),
    FigureSpec(
        "distinct_solutions",
        "Diversity of answers to held-out prompts",
        "How many different successful completions the samples of one prompt contain, and which "
        "fraction of the samples differ at all. To be read beside the reward.",
        curves.metric_panels(
            ("eval/distinct_solutions", "distinct solutions"),
            ("eval/distinct_completions", "distinct texts"),
        ),
        (
            ("eval/reward", "held-out reward"),
            ("eval/distinct_solutions", "distinct solutions"),
            ("eval/distinct_completions", "distinct texts"),
        ),
    ),
    FigureSpec(
        "feature_cosines",
        "Similarity of features between tokens",
        "Features are the vectors the classifier (the last linear layer) reads. The panels show "
        "their mean cosine for pairs of positions in the same response, in other responses to "
        "the same prompt, and for other prompts. The classifier's part of a step of SGD at one "
        "position changes the logits at another by the same vector times the inner product of "
        "their features.",
        curves.metric_panels(*((f"probe/cosine_{kind}", words) for kind, words in PAIRS.items())),
    ),
    FigureSpec(
        "head_share",
        "Predicted change of one step: head and body",
        "The change that one optimizer step makes to the probe tokens' log-probabilities is "
        "predicted to first order and split in two: the part of the classifier (R) and the part "
        "of all other layers (G); a classifier tied to the embedding adds a cross part. Shares "
        "add up to 1. One below 0 or above 1 means that the parts oppose each other. In a stage "
        "that trains an untied classifier alone its share is 1 by construction.",
        curves.metric_panels(
            ("predict/head_share", "head part, R"),
            ("predict/body_share", "body part, G"),
            ("predict/cross_share", "cross part"),
            levels=(0.0, 1.0),
        ),
    ),
    FigureSpec(
        "predicted_actual",
        "Predicted and actual change in one step",
        "Each point is one probe token at one step, all probed steps and runs of a method "
        "together. On the diagonal the first-order prediction is exact; the shares of the figure "
        "above are parts of this prediction. Relative error: length of the difference over "
        "length of the actual change.",
        curves.prediction,
    ),
    FigureSpec(
        "features_classifier",
        "How far features and classifier move",
        "Feature distortion is the mean distance of the probe set's features from those of the "
        "starting model; the classifier norm is that of its weight matrix.",
        curves.metric_panels(
            ("probe/feature_distortion", "feature distortion"),
            ("probe/head_norm", "classifier norm"),
        ),
        (
            ("probe/feature_distortion", "feature distortion"),
            ("probe/head_norm", "classifier norm"),
        ),
    ),
    FigureSpec(
        "straightness",
        "Linearity of the trajectory",
        "Mean R² of linear regressions on the step, of the log-probs of probe tokens and of 4096 "
        "weights, over all steps so far (1: each changes at a constant rate); cosine between the "
        "leading singular directions of the weight updates at this ledger and the one before (1: "
        "the same direction); and the squared mean of the samples' gradients over their variance "
        "(well below 1 over the number of samples: the gradient is hardly above the noise).",
        curves.metric_panels(
            ("probe/linearity", "log-probs on a line"),
            ("weights/linearity", "weights on a line"),
            ("weights/direction_cosine", "ΔW, same direction"),
            ("signal/signal_to_noise", "gradient signal"),
        ),
    ),
    FigureSpec(
        "neighbours",
        "Influence among completions of a prompt",
        "Influence through the classifier alone. CHES: similarity of the features of a prompt's "
        "best and worst completion, less that of the best one with itself. Good → "
        "good and bad → good: effect of completions above and below the mean reward on the "
        "log-probs of tokens of those above it. Good → bad: effect of good completions on the "
        "tokens of bad ones.",
        curves.metric_panels(
            ("probe/ches_normalised", "similarity (CHES)"),
            ("probe/head_sum_positive", "good → good"),
            ("probe/head_sum_negative", "bad → good"),
            ("probe/head_sum_wrong", "good → bad"),
        ),
    ),
    FigureSpec(
        "ledger_log_prob",
        "What moved the log-probs in one step",
        "The step of the last ledger as a sum: each bar starts where the one above ends, and the "
        "bars add up to the measured change (actual). Terms of the loss are split into R, the "
        "part of the classifier, and G, the part of the rest of the network. Momentum: gradients "
        "of earlier steps; curvature: the remainder of the first-order prediction. Means over "
        "probe tokens.",
        functools.partial(ledger_figures.waterfalls, "log_prob"),
    ),
    FigureSpec(
        "ledger_entropy",
        "What moved the entropy in one step",
        "The same decomposition of the entropy on the probe set: a negative bar lowers it.",
        functools.partial(ledger_figures.waterfalls, "entropy"),
    ),
    FigureSpec(
        "ledger_shares",
        "Shares of the measured change",
        "The same parts over training, as shares of the measured change of log-probs. R, G, "
        "momentum, decay, curvature (and what the optimizer adds) give 1 together; below 0 a "
        "part works against the change. KL is a part of R and G.",
        curves.method_panels("share", LEDGER_SHARES, levels=(0.0, 1.0)),
    ),
    FigureSpec(
        "probe_families",
        "Log-probability by kind of probe completion",
        "Mean log-probability of the tokens of the policy's own first samples, of samples of other "
        "prompts, of reference and rejected answers, of paraphrases and of shuffled tokens.",
        curves.method_panels("mean log π (nats)", FAMILY_LOG_PROBS),
        tuple((metric, words) for metric, (words, _, _) in FAMILY_LOG_PROBS.items()),
    ),
    FigureSpec(
        "influence",
        "Which sample moved which probe completion",
        "Rows are completions of the minibatch of the last ledger, by advantage; columns are probe "
        f"completions. Red raises, blue lowers their log-probability. At most "
        f"{ledger_figures.MAX_SAMPLES} samples, those with the largest total; the first seed of a "
        "method.",
        ledger_figures.influence,
    ),
    FigureSpec(
        "feature_similarity",
        "Similarity of probe completions' features",
        "Mean cosine of the features of any two probe completions, at the first and the last "
        "probe, of the first seed. 1: features of one direction; 0: orthogonal ones.",
        ledger_figures.similarity,
    ),
    FigureSpec(
        "sampling_curves",
        "What many samples of one prompt reach",
        "Pass@k: chance that one of k samples succeeds; best of N: mean of the largest reward of "
        "N. Dashed: starting model, bold: last evaluation. Bands: 95 % bootstrap over seeds; with "
        "few seeds they are too narrow.",
        curves.sampling,
        (("eval/pass@1", "pass@1"), ("eval/pass@k", "pass@k")),
    ),
)
