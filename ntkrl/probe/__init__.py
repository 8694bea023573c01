"""What changed on a fixed set of completions, and what first-order theory said would change.

Also what the kernel of given contexts is made of, and what each sample of a step did.
"""

from ntkrl.probe.diversity import distinct_counts, pass_at_k
from ntkrl.probe.features import feature_measures
from ntkrl.probe.kernels import KernelPlan, kernel_measures, plan_kernel
from ntkrl.probe.ledger import Ledger, ledger_measures
from ntkrl.probe.step import Prober, ProbeReading

__all__ = [
    "KernelPlan",
    "Ledger",
    "ProbeReading",
    "Prober",
    "distinct_counts",
    "feature_measures",
    "kernel_measures",
    "ledger_measures",
    "pass_at_k",
    "plan_kernel",
]
