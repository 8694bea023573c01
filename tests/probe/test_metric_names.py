"""Results of the measures against the metric glossary."""

import jax.numpy as jnp
import numpy as np

from ntkrl import probe
from ntkrl.probe import batch_measures, distributions, features, parameters
from ntkrl.report import is_known
from ntkrl.softmax import OutputHead, logit_statistics


def test_results_are_in_the_glossary():
    """law: every name that a measure gives is known under its prefix."""
    eye, two, mask = jnp.eye(2), jnp.zeros(2, int), jnp.ones(2, bool)
    lead = parameters.leading_direction(eye)
    line = probe.extend_line(probe.start_line(eye, 0), 2 * eye, 1)
    kernels = dict.fromkeys(("head", "trace_head", "trace_body"), np.eye(2))
    pair = OutputHead(eye), jnp.ones((2, 1, 2))
    result = {
        "probe/": [
            *distributions.confidence_measures(logit_statistics(eye, two), mask),
            *features.cosine_variances(eye, two, two),
            *features.feature_drift(eye, eye),
            *parameters.classifier_measures(eye, eye),
            *probe.kernel_drift(kernels, kernels),
        ],
        "probe/squeeze_": distributions.Masses._fields,
        "weights/": [*probe.update_sparsity(eye, eye), *probe.line_fit(line)[1]],
        "probe": [f"/{name}" for name in probe.line_fit(line)[1]],
        "weights/body/mix/": parameters.update_rank(eye, lead),
        "signal/": probe.GradientNoise._fields,
        "": batch_measures.group_measures(pair, two[:, None], jnp.ones((2, 1)), mask[:, None], 2),
        "diversity/support_": probe.Support._fields,
    }
    names = [prefix + name for prefix, group in result.items() for name in group]
    assert len(names) == len(set(names)) > 30
    assert [name for name in names if not is_known(name)] == []
