"""What changed on a fixed set of completions, and what first-order theory said would change.

Also what the kernel of given contexts is made of, what each sample of an optimizer step did (the
ledger), and measures of learning dynamics as pure functions, by subject:

    confidence, squeezing    of next-token distributions: entropy and what moves it, who gains
    divergence               between two policies on the same contexts
    geometry, drift          of features and kernels; sums the head kernel sees
    classifier, weights, linearity  of the head's matrix, of updates, of paths over checkpoints
    signal                   what a batch holds to learn from
    diversity, coverage      of texts and samples
"""

from ntkrl.probe import (
    classifier,
    confidence,
    coverage,
    divergence,
    diversity,
    drift,
    geometry,
    linearity,
    signal,
    squeezing,
    weights,
)
from ntkrl.probe.batch import step_measures
from ntkrl.probe.diversity import distinct_counts, pass_at_k
from ntkrl.probe.features import feature_measures
from ntkrl.probe.kernels import (
    KernelPlan,
    batch_alignment,
    kernel_measures,
    kernel_traces,
    plan_kernel,
)
from ntkrl.probe.settings import CADENCES, COLUMNS, DRAWN, FAMILIES, ProbeSettings
from ntkrl.probe.step import Prober, ProbeReading

__all__ = [
    "CADENCES",
    "COLUMNS",
    "DRAWN",
    "FAMILIES",
    "KernelPlan",
    "ProbeReading",
    "ProbeSettings",
    "Prober",
    "batch_alignment",
    "classifier",
    "confidence",
    "coverage",
    "distinct_counts",
    "divergence",
    "diversity",
    "drift",
    "feature_measures",
    "geometry",
    "kernel_measures",
    "kernel_traces",
    "linearity",
    "pass_at_k",
    "plan_kernel",
    "signal",
    "squeezing",
    "step_measures",
    "weights",
]
