"""Every form of every part for every head, against brute-force Jacobians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import ntk
from ntkrl.ntk.tied import is_lookup
from tests.ntk.networks import HEADS, VOCAB, close, contexts, expected, network
from tests.oracles import kernel_by_gradients

pytestmark = pytest.mark.usefixtures("x64")

KINDS = [(kind, tied) for kind in HEADS for tied in (False, True)]
FEW = [("plain", False), ("plain", True), ("all", False), ("all", True)]


def parts_of(tied):
    """Parts that are not zero by definition."""
    return ntk.PARTS if tied else ("head", "output", "body", "full")


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_dense_parts_equal_brute_force(kind, tied):
    """oracle: each role's Jacobian by V rows per context, padded on both sides."""
    result, params = network(kind, tied)
    kernel = ntk.kernel(result, params, *contexts(True))
    assert kernel.problem.tied == tied
    for part in parts_of(tied):
        close(kernel.dense(part), expected(kind, tied, True, part))
    if not tied:
        for part in ("cross", "input", "output_input", "input_output"):
            assert not kernel.dense(part).any()


@pytest.mark.parametrize(("kind", "tied"), FEW)
def test_forms_are_contractions_of_the_dense_kernel(kind, tied):
    """oracle: apply, bilinear, trace, diagonal and chosen entries, part by part."""
    result, params = network(kind, tied)
    kernel = ntk.kernel(result, params, *contexts(True))
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(3, VOCAB)), rng.normal(size=(4, VOCAB))
    for part in parts_of(tied):
        dense = expected(kind, tied, True, part)
        size = np.abs(dense).max() * VOCAB
        close(kernel.apply(right, part), np.einsum("ouvw,uw->ov", dense, right), scale=size)
        bilinear = np.einsum("ov,ouvw,uw->ou", left, dense, right)
        close(kernel.bilinear(left, right, part), bilinear, scale=size)
        close(kernel.trace(part), np.einsum("ouvv->ou", dense), scale=size)
        close(kernel.diagonal(part), np.einsum("ouvv->ouv", dense), scale=size)
        few = kernel.dense(part, rows=[2, 7], columns=[0, 7, 8])
        close(few, dense[:, :, [2, 7]][..., [0, 7, 8]], scale=size)
        many = kernel.dense(part, rows=list(range(6)), columns=[1])
        close(many, dense[:, :, :6][..., [1]], scale=size)


@pytest.mark.parametrize("used", ["looked up", "looked up and averaged"])
def test_cross_terms_of_a_table(used):
    """oracle: rows looked up take a closed form, any other use of the table another; all equal."""
    _, params = network("plain", True)
    params = {name: params[name] for name in ("embed", "mlp")}

    def features(params, tokens):
        x = jnp.cumsum(params["embed"][tokens], axis=1)
        x = x + jnp.mean(params["embed"]) if used.endswith("averaged") else x
        return x + jnp.tanh(x @ params["mlp"])

    tied = ntk.Network(features, ntk.Head("embed"))
    kernel = ntk.kernel(tied, params, *contexts(False))
    problem = kernel.problem
    closed = is_lookup(problem.features.of_head(), params, problem.updated)
    assert closed == (used == "looked up")
    dense = kernel_by_gradients(kernel) - kernel.dense("head") - kernel.dense("body")
    close(kernel.dense("cross"), dense)
    close(kernel.dense("cross", rows=[3, 1], columns=[2]), dense[:, :, [3, 1]][..., [2]])
    close(kernel.trace("cross"), np.einsum("ouvv->ou", dense))
    close(kernel.diagonal("cross"), np.einsum("ouvv->ouv", dense))
    right = np.random.default_rng(4).normal(size=(4, VOCAB))
    bilinear = np.einsum("ov,ouvw,uw->ou", right[:3], dense, right)
    close(kernel.bilinear(right[:3], right, "cross"), bilinear)


@pytest.mark.parametrize(("kind", "tied"), [("plain", False), ("all", True)])
def test_bilinear_by_sequence(kind, tied):
    """law: aggregated over sequences = sums of the contexts' entries (updated rows 0, 1, 1, 2)."""
    result, params = network(kind, tied)
    kernel = ntk.kernel(result, params, *contexts(False))
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(3, VOCAB)), rng.normal(size=(4, VOCAB))
    single = np.asarray(kernel.bilinear(left, right))
    reference = np.stack([single[:, 1], single[:, 2] + single[:, 3], single[:, 0]], axis=1)
    close(kernel.bilinear(left, right, by="sequence"), reference)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_factored_form(kind):
    """by hand: diag(left) (head I + W M Wᵀ) diag(right) is the kernel of an untied head."""
    result, params = network(kind, False)
    factored = ntk.factored(ntk.kernel(result, params, *contexts(False)))
    full = np.einsum("vd,oude,we->ouvw", factored.weight, factored.body, factored.weight)
    full += np.asarray(factored.head)[..., None, None] * np.eye(VOCAB)
    if factored.left is not None:
        full *= np.asarray(factored.left)[:, None, :, None]
        full *= np.asarray(factored.right)[None, :, None, :]
    assert (factored.left is None) == (kind == "plain")
    close(full, expected(kind, False, False, "full"))


@pytest.mark.parametrize(("kind", "tied"), [("plain", False), ("all", True)])
def test_groups_add_up_to_full(kind, tied):
    """oracle and law: a group is its parameters in all roles; a partition adds up to full."""
    result, params = network(kind, tied)
    groups = (("embed", "table"), ("query|mlp", "matrices"), (".*", "rest"))
    kernel = ntk.kernel(result, params, *contexts(True), groups=groups)
    members = {"table": {"embed"}, "matrices": {"query", "mlp"}}
    members["rest"] = set(params) - members["table"] - members["matrices"]
    total = 0.0
    for name, leaves in members.items():
        reference = expected(kind, tied, True, name, keep=lambda n, leaves=leaves: n in leaves)
        close(kernel.dense(name), reference)
        close(
            kernel.trace(name), np.einsum("ouvv->ou", reference), scale=np.abs(reference).max() * 9
        )
        total += np.asarray(kernel.dense(name))
    close(total, kernel.dense())


@pytest.mark.parametrize(("kind", "tied"), [("plain", False), ("all", True)])
def test_preconditioned_kernel(kind, tied):
    """oracle: J P Jᵀ for a diagonal P; its head part is diagonal and not a multiple of I."""
    result, params = network(kind, tied)
    rng = np.random.default_rng(3)
    scale = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape)), params)
    factors = {name: np.asarray(leaf) for name, leaf in scale.items()}
    kernel = ntk.kernel(result, params, *contexts(True), precondition=scale)
    right = rng.normal(size=(4, VOCAB))
    for part in parts_of(tied):
        reference = expected(kind, tied, True, part, precondition=factors)
        size = np.abs(reference).max() * VOCAB
        close(kernel.dense(part), reference)
        close(kernel.apply(right, part), np.einsum("ouvw,uw->ov", reference, right), scale=size)
        bilinear = np.einsum("ow,ouvw,uv->ou", right[:3], np.swapaxes(reference, 2, 3), right)
        close(kernel.bilinear(right[:3], right, part), bilinear, scale=size)
        close(kernel.trace(part), np.einsum("ouvv->ou", reference), scale=size)
    with pytest.raises(ValueError, match=r"not a multiple of I; use diagonal\('head'\)"):
        _ = kernel.head


def test_shift_of_all_logits_is_invisible():
    """law: Σ_v g_v = 0, so adding a constant to all logits changes no score's kernel."""
    result, params = network("bias", False)
    kernel = ntk.kernel(result, params, *contexts(False))
    rng = np.random.default_rng(5)
    left, right = rng.normal(size=(3, VOCAB)), rng.normal(size=(4, VOCAB))
    left, right = (side - side.mean(axis=1, keepdims=True) for side in (left, right))
    dense = np.asarray(kernel.dense())
    shifted = dense + 3.0 + rng.normal(size=(3, 4, 1, VOCAB)) + rng.normal(size=(3, 4, VOCAB, 1))
    reference = np.einsum("ov,ouvw,uw->ou", left, shifted, right)
    close(kernel.bilinear(left, right), reference)


def test_symmetric_kernel_is_symmetric_and_positive():
    """law: without updated contexts K = Kᵀ, no eigenvalue is negative, and the work is shared."""
    result, params = network("all", True)
    observed, _ = contexts(True)
    kernel = ntk.kernel(result, params, observed)
    dense = np.asarray(kernel.dense())
    close(dense, dense.transpose(1, 0, 3, 2))
    close(dense, ntk.kernel(result, params, observed, ntk.Contexts(*_fields(observed))).dense())
    values = np.linalg.eigvalsh(dense.transpose(0, 2, 1, 3).reshape(3 * VOCAB, -1))
    assert values.min() > -1e-10 * values.max()
    body = np.asarray(kernel.body())
    close(body, body.transpose(1, 0, 3, 2))


def _fields(contexts):
    return contexts.tokens, contexts.positions, contexts.rows, contexts.mask
