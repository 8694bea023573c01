"""Measures of learning dynamics as pure functions of arrays, and the probe set they are read on.

Other rooms use these names. The modules hold more, for your own analysis:

    distributions             next-token distributions: entropy, divergence, probability mass
    features, parameters      geometry of features, of weight updates and of the head's matrix
    kernel_steps              traces, norms, eigenvalues of the kernel of some contexts
    exact_kernels             its drift in training, its alignment with advantages
    batch_measures            reward variance, gradient noise, one step on its own batch
    samples                   statistics over sampled completions
"""

from ntkrl.probe.batch_measures import (
    GradientNoise,
    noise_from_squares,
    reward_signal,
    step_measures,
)
from ntkrl.probe.exact_kernels import batch_alignment, kernel_drift, layer_shares
from ntkrl.probe.features import feature_measures
from ntkrl.probe.kernel_steps import (
    MEASURES,
    KernelPlan,
    KernelStep,
    kernel_measures,
    kernel_steps,
    kernel_traces,
    on_host,
    plan_kernel,
)
from ntkrl.probe.parameters import (
    LineSums,
    SingularTriple,
    direction_cosine,
    extend_line,
    line_fit,
    sample_entries,
    start_line,
    update_ranks,
    update_sparsity,
)
from ntkrl.probe.prober import Prober, ProbeReading, completions_per_block
from ntkrl.probe.samples import (
    Support,
    best_of_n,
    crossing_interval,
    distinct_answers,
    distinct_counts,
    distinct_n,
    pass_at_k,
    pass_curves,
    self_bleu,
    support_change,
)
from ntkrl.probe.settings import (
    CADENCES,
    FAMILIES,
    FAMILY_COLUMNS,
    LEDGER_BY,
    SAMPLED_FAMILIES,
    ProbeSettings,
)
