"""What the measures call their results has a unit and a meaning in the glossary."""

import jax.numpy as jnp
import numpy as np

from ntkrl.probe import (
    batch,
    classifier,
    confidence,
    coverage,
    drift,
    geometry,
    linearity,
    signal,
    weights,
)
from ntkrl.probe.squeezing import Masses, squeezing
from ntkrl.report import is_known
from ntkrl.softmax import OutputHead, logit_statistics


def test_results_are_in_the_glossary():
    """law: every name that a measure gives is known under its prefix."""
    eye, two, mask = jnp.eye(2), jnp.zeros(2, int), jnp.ones(2, bool)
    lead = weights.leading_direction(eye)
    line = linearity.extend_line(linearity.start_line(eye, 0), 2 * eye, 1)
    kernels = dict.fromkeys(("head", "trace_head", "trace_body"), np.eye(2))
    masses = Masses(*[jnp.zeros(2)] * 3)
    squeezed = squeezing(masses, masses, -jnp.ones(2))
    squeezed.pop("tokens")
    group = jnp.ones((2, 1, 2)), two[:, None], jnp.ones((2, 1)), mask[:, None]
    found = {
        "probe/": [
            *confidence.confidence_measures(logit_statistics(eye, two), mask),
            *geometry.cosine_variances(eye, two, two),
            *geometry.feature_drift(eye, eye),
            *classifier.classifier_measures(eye, eye)[0],
            *drift.kernel_drift(kernels, kernels),
        ],
        "probe/squeeze_": squeezed,
        "weights/": [*weights.update_sparsity(eye, eye)[0], *linearity.line_fit(line)[1]],
        "probe": [f"/{name}" for name in linearity.line_fit(line)[1]],
        "weights/body/mix/": weights.update_rank(eye, lead),
        "signal/": signal.GradientNoise._fields,
        "": batch.group_measures(OutputHead(eye), *group, 2),
        "diversity/support_": coverage.Support._fields,
    }
    names = [prefix + name for prefix, group in found.items() for name in group]
    assert len(names) == len(set(names)) > 30
    assert [name for name in names if not is_known(name)] == []
