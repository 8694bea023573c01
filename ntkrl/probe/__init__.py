"""What changed on a fixed set of completions, and what first-order theory said would change."""

from ntkrl.probe.diversity import distinct_counts, pass_at_k
from ntkrl.probe.features import feature_measures
from ntkrl.probe.step import Prober, ProbeReading

__all__ = ["ProbeReading", "Prober", "distinct_counts", "feature_measures", "pass_at_k"]
