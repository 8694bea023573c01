"""What kernels of contexts are made of, against kernels written out in float64."""

import numpy as np
import pytest

from ntkrl import ntk
from ntkrl.probe.kernels import kernel_measures, plan_kernel
from tests.ntk.networks import VOCAB, contexts, network

pytestmark = pytest.mark.usefixtures("x64")
HERE = contexts(True)[0]


def flat(dense):
    """`[O, U, V, V]` as one symmetric matrix."""
    return dense.transpose(0, 2, 1, 3).reshape(dense.shape[0] * dense.shape[2], -1)


def test_parts_of_a_capped_head():
    """oracle: slopes vary over the vocabulary, so norms and spectra need other roads."""
    kernel = ntk.kernel(*network("cap", False), HERE)
    found = kernel_measures(plan_kernel(*network("cap", False), HERE), 6)
    shares = np.zeros(2)
    for part in ("head", "body", "full"):
        dense = np.asarray(kernel.dense(part))
        traces = np.einsum("ouvv->ou", dense)
        np.testing.assert_allclose(found[f"trace_{part}"], traces, rtol=1e-9)
        assert found[f"frobenius_{part}"] == pytest.approx(np.linalg.norm(dense), rel=1e-9)
        values = np.linalg.eigvalsh(flat(dense))[::-1][:6]
        np.testing.assert_allclose(found[f"eigenvalues_{part}"], values, rtol=1e-8)
        shares += found[f"share_{part}"] if part != "full" else 0.0
    np.testing.assert_allclose(shares, 1.0, rtol=1e-9)


def test_blocks_and_groups_and_a_small_head():
    """oracle: a memory for one context at a time gives what all at once do; groups add up."""
    here = ntk.Contexts(HERE.tokens, HERE.positions[:2], np.arange(2), HERE.mask)
    described, params = network("plain", False)
    # so small a W that the largest eigenvalue of the head kernel, V-fold, is most of the spectrum
    params = {**params, "head": 0.05 * params["head"]}
    # a quarter of 1.2 KB holds M of one pair (16 numbers of 8 bytes), not of four
    plan = plan_kernel(described, params, here, layers=True, memory_gib=1.2e3 / 2**30)
    assert len(plan.pairs) == 3 and plan.body_kernels == 3 * (1 + len(plan.kernel.problem.groups))
    steps = []
    found = kernel_measures(plan, 8, lambda done, doing: steps.append((done, doing)))
    assert [done for done, _ in steps] == list(range(plan.steps))
    assert steps[0][1] == "body" and steps[-1][1] == "eigenvalues of full"
    kernel = ntk.kernel(described, params, here, groups=ntk.by_layer(described, params))
    dense = np.asarray(kernel.dense())
    np.testing.assert_allclose(found["trace_full"], np.einsum("ouvv->ou", dense), rtol=1e-9)
    assert found["frobenius_full"] == pytest.approx(np.linalg.norm(dense), rel=1e-9)
    np.testing.assert_allclose(found["trace_layers"].sum(axis=0), found["trace_full"], rtol=1e-9)
    query = list(found["layers"]).index("query")
    np.testing.assert_allclose(found["trace_layers"][query], kernel.trace("query"), rtol=1e-9)
    values = np.linalg.eigvalsh(flat(dense))[::-1][:8]
    np.testing.assert_allclose(found["eigenvalues_full"], values, rtol=1e-8)
    head = np.linalg.eigvalsh(np.kron(found["head"], np.eye(VOCAB)))[::-1]
    np.testing.assert_allclose(np.repeat(found["eigenvalues_head"], VOCAB), head, rtol=1e-8)


def test_too_many_eigenvalues():
    """law: there are O·V of them, and Lanczos finds fewer."""
    plan = plan_kernel(*network("plain", False), HERE)
    with pytest.raises(ValueError, match=r"eigenpairs must be in \[1, 27\) for these contexts"):
        kernel_measures(plan, 3 * VOCAB)
