"""Measures of kernels in steps, against dense kernels in float64."""

import numpy as np
import pytest

from ntkrl import ntk
from ntkrl.probe.kernel_steps import MEASURES, kernel_measures, kernel_steps, plan_kernel
from tests.ntk.networks import VOCAB, contexts, layered, network

HERE = contexts(True)[0]


def flat(dense):
    """`[O, U, V, V]` as one symmetric matrix."""
    return dense.transpose(0, 2, 1, 3).reshape(dense.shape[0] * dense.shape[2], -1)


@pytest.mark.usefixtures("x64")
def test_parts_of_a_capped_head():
    """oracle: slopes vary over the vocabulary, so norms and spectra take another algorithm."""
    kernel = ntk.kernel(*network("cap", False), HERE)
    result = kernel_measures(plan_kernel(*network("cap", False), HERE), 6)
    shares = np.zeros(2)
    for part in ("head", "body", "full"):
        dense = np.asarray(kernel.dense(part))
        traces = np.einsum("ouvv->ou", dense)
        np.testing.assert_allclose(result[f"trace_{part}"], traces, rtol=1e-9)
        assert result[f"frobenius_{part}"] == pytest.approx(np.linalg.norm(dense), rel=1e-9)
        values = np.linalg.eigvalsh(flat(dense))[::-1][:6]
        np.testing.assert_allclose(result[f"eigenvalues_{part}"], values, rtol=1e-8)
        shares += result[f"share_{part}"] if part != "full" else 0.0
    np.testing.assert_allclose(shares, 1.0, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_blocks_and_groups_and_a_small_head():
    """oracle: memory for one context at a time gives the same result; groups sum up."""
    here = ntk.Contexts(HERE.tokens, HERE.positions[:2], np.arange(2), HERE.mask)
    described, params = network("plain", False)
    # so small a W that the largest eigenvalue of the head kernel, V-fold, is most of the spectrum
    params = {**params, "head": 0.05 * params["head"]}
    # a quarter of 1.2 KB holds M of one pair (16 numbers of 8 bytes), not of four
    # a quarter of 1.2 KB holds M of one pair (16 numbers of 8 bytes), not of four
    plan = plan_kernel(described, params, here, layers=True, memory_gib=1.2e3 / 2**30)
    assert len(plan.pairs) == 3
    steps = []
    result = kernel_measures(plan, 8, lambda done, doing: steps.append((done, doing)))
    assert [done for done, _ in steps] == list(range(8))
    assert steps[3][1] == "norms 1/3" and steps[-1][1] == "eigenvalues of full"
    kernel = ntk.kernel(described, params, here, groups=ntk.by_layer(described, params))
    dense = np.asarray(kernel.dense())
    np.testing.assert_allclose(result["trace_full"], np.einsum("ouvv->ou", dense), rtol=1e-9)
    assert result["frobenius_full"] == pytest.approx(np.linalg.norm(dense), rel=1e-9)
    np.testing.assert_allclose(result["trace_layers"].sum(axis=0), result["trace_full"], rtol=1e-9)
    query = list(result["layers"]).index("query")
    np.testing.assert_allclose(result["trace_layers"][query], kernel.trace("query"), rtol=1e-9)
    values = np.linalg.eigvalsh(flat(dense))[::-1][:8]
    np.testing.assert_allclose(result["eigenvalues_full"], values, rtol=1e-8)
    head = np.linalg.eigvalsh(np.kron(result["head"], np.eye(VOCAB)))[::-1]
    np.testing.assert_allclose(np.repeat(result["eigenvalues_head"], VOCAB), head, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_too_many_eigenvalues():
    """law: there are O·V of them, and Lanczos finds fewer."""
    plan = plan_kernel(*network("plain", False), HERE)
    with pytest.raises(ValueError, match=r"eigenpairs must be in \[1, 27\) for these contexts"):
        kernel_measures(plan, 3 * VOCAB)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory_gib", [8.0, 1.2e3 / 2**30])
def test_a_tied_head(memory_gib):
    """oracle: norms, spectra, traces of all parts and layers, in one block of contexts or six."""
    described, params = layered(True)
    plan = plan_kernel(described, params, HERE, layers=True, memory_gib=memory_gib)
    assert len(plan.pairs) == (1 if memory_gib == 8.0 else 6)
    result = kernel_measures(plan, 7)
    kernel = ntk.kernel(described, params, HERE, groups=ntk.by_layer(described, params))
    for part in ("head", "body", "cross", "full"):
        dense = np.asarray(kernel.dense(part))
        np.testing.assert_allclose(result[f"trace_{part}"], np.einsum("ouvv->ou", dense), rtol=1e-9)
        assert result[f"frobenius_{part}"] == pytest.approx(np.linalg.norm(dense), rel=1e-10)
        if part in ("body", "full"):
            values = np.linalg.eigvalsh(flat(dense))[::-1][:7]
            np.testing.assert_allclose(result[f"eigenvalues_{part}"], values, rtol=1e-8)
    for name, trace in zip(result["layers"], result["trace_layers"], strict=True):
        dense = np.asarray(kernel.dense(str(name)))
        np.testing.assert_allclose(trace, np.einsum("ouvv->ou", dense), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_measures_are_chosen_and_cheap_ones_first():
    """law: any selection gives the arrays of all; work of a step never falls within M's."""
    described, params = layered(True)
    plan = plan_kernel(described, params, HERE)
    everything = kernel_measures(plan, 3)
    names = [step.measure for step in kernel_steps(plan, 3)]
    assert names == sorted(names, key=MEASURES.index)
    alone = [kernel_measures(plan, 3, measures=(measure,)) for measure in MEASURES]
    assert set().union(*alone) == set(everything)
    for arrays in alone:
        for name, values in arrays.items():
            np.testing.assert_allclose(values, everything[name], rtol=1e-12, err_msg=name)
    with pytest.raises(ValueError, match="measures are some of head, traces, norms, eigenvalues"):
        kernel_steps(plan, 3, ("norm",))


@pytest.mark.usefixtures("x64")
def test_layers_are_reported():
    """by hand: two layers of the traces in a block; of M in three blocks, six pairs."""
    described, params = layered(True)
    plan, count = plan_kernel(described, params, HERE, report=True), []
    steps = {step.name: step for step in kernel_steps(plan, 3, ("traces",))}
    known = steps["traces of cross"].run({})
    with ntk.listening(lambda: count.append(1)):
        steps["traces of body"].run(known)
    assert len(count) == steps["traces of body"].reports == 2
    options = {"algorithm": "layerwise", "report": True, "memory_gib": 5.5e-5}
    kernel = ntk.kernel(described, params, HERE, **options)
    count.clear()
    with ntk.listening(lambda: count.append(1)):
        kernel.body()
    assert len(count) == kernel.problem.body_reports() == 12
