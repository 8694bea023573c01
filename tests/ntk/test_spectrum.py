"""Eigenpairs, norms and alignments against the dense matrix, and the Gram matrix of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import ntk
from tests.ntk.networks import TOKENS, VOCAB, close, contexts, expected, layered, network

pytestmark = pytest.mark.usefixtures("x64")


def flat(kernel, part="full"):
    """The kernel as one matrix."""
    dense = np.asarray(kernel.dense(part)).transpose(0, 2, 1, 3)
    return dense.reshape(dense.shape[0] * VOCAB, -1)


@pytest.mark.parametrize("part", ["full", "body"])
def test_eigenpairs_equal_dense_ones(part):
    """oracle: numpy's eigenvalues of the dense matrix; vectors satisfy K x = λ x."""
    result, params = layered(True)
    kernel = ntk.kernel(result, params, contexts(True)[0])
    values, vectors = ntk.eigenpairs(kernel, 5, part)
    matrix = flat(kernel, part)
    close(values, np.linalg.eigvalsh(matrix)[::-1][:5])
    stacked = np.asarray(vectors).reshape(5, -1)
    close(stacked @ matrix, np.asarray(values)[:, None] * stacked, 1e-9)
    close(stacked @ stacked.T, np.eye(5), 1e-9)


@pytest.mark.parametrize(
    ("kind", "tied", "part", "count"),
    [
        ("plain", False, "full", 26),
        ("bias", False, "full", 7),
        ("plain", False, "head", 11),
        ("plain", False, "body", 14),
        ("cap", False, "full", 6),
        ("plain", True, "full", 8),
    ],
)
def test_repeated_eigenvalues_stand_as_often_as_they_occur(kind, tied, part, count):
    """oracle: numpy's, where the head's eigenvalues are V − D-fold and a context is there twice."""
    result, params = network(kind, tied)
    where = ntk.Contexts(jnp.asarray(TOKENS), jnp.array([3, 4, 3]), jnp.array([1, 0, 1]))
    kernel = ntk.kernel(result, params, where)
    values, vectors = ntk.eigenpairs(kernel, count, part)
    matrix = flat(kernel, part)
    close(values, np.linalg.eigvalsh(matrix)[::-1][:count])
    stacked = np.asarray(vectors).reshape(count, -1)
    close(stacked @ matrix, np.asarray(values)[:, None] * stacked, 1e-9)
    close(stacked @ stacked.T, np.eye(count), 1e-9)


@pytest.mark.parametrize(("kind", "tied"), [("plain", False), ("bias", False), ("all", True)])
def test_norms_and_alignments(kind, tied):
    """oracle: entries of both dense matrices; the second kernel is the network somewhere else."""
    result, params = network(kind, tied)
    elsewhere = jax.tree.map(lambda leaf: leaf * 0.7 + 0.1, params)
    first, second = (ntk.kernel(result, p, *contexts(False)) for p in (params, elsewhere))
    for part in ("full", "body", "head"):
        a, b = flat(first, part), flat(second, part)
        close(ntk.frobenius(first, part), np.linalg.norm(a))
        aligned = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        close(ntk.alignment(first, second, part), aligned, 1e-9)
        centred = [_centred(k, part) for k in (first, second)]
        aligned = np.sum(centred[0] * centred[1])
        aligned /= np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
        close(ntk.cka(first, second, part), aligned, 1e-9)
    assert abs(float(ntk.cka(first, first)) - 1) < 1e-12


@pytest.mark.parametrize("kind", ["plain", "scale", "bias"])
def test_factors_of_a_tied_head(kind):
    """oracle: entries, norms, alignment, CKA, spectra of all parts with cross terms, padded."""
    result, params = network(kind, True)
    between = ntk.kernel(result, params, *contexts(True))
    where = contexts(True)[0]
    elsewhere = jax.tree.map(lambda leaf: leaf * 0.7 + 0.1, params)
    kernel, moved = (ntk.kernel(result, p, where) for p in (params, elsewhere))
    for part in ("full", "cross", "output_input", "head", "body"):
        factors = ntk.factored(between, part)
        written = np.einsum("vc,oucd,wd->ouvw", factors.weight, factors.body, factors.weight)
        written += np.asarray(factors.head)[..., None, None] * np.eye(VOCAB)
        close(written, expected(kind, True, True, part))
    for part in ("full", "cross"):
        factors, matrix = ntk.factored(kernel, part), flat(kernel, part)
        assert factors.weight.shape[1] > 4  # with unit vectors of the tokens
        close(ntk.frobenius(kernel, part), np.linalg.norm(matrix))
        close(ntk.frobenius(factors), np.linalg.norm(matrix))
        for count in (5, 26):
            values, vectors = ntk.eigenpairs(factors, count)
            close(values, np.linalg.eigvalsh(matrix)[::-1][:count])
            stacked = np.asarray(vectors).reshape(count, -1)
            close(stacked @ matrix, np.asarray(values)[:, None] * stacked, 1e-9)
        a, b = matrix, flat(moved, part)
        aligned = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        close(ntk.alignment(kernel, moved, part), aligned, 1e-9)
        a, b = (_centred(k, part) for k in (kernel, moved))
        aligned = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        close(ntk.cka(kernel, moved, part), aligned, 1e-9)


def _centred(kernel, part):
    dense = np.asarray(kernel.dense(part))
    dense = dense - dense.mean(axis=0, keepdims=True)
    return dense - dense.mean(axis=1, keepdims=True)


def log_prob_gradients(network, params, where, targets):
    """∇ log π(y | c) per context, stacked, by brute force."""

    def log_probs(p):
        phi = network.features(p, where.tokens, where.mask)[where.rows, where.positions]
        log_probs = jax.nn.log_softmax(network.logits(p, phi))
        return log_probs[jnp.arange(len(targets)), targets]

    leaves = jax.tree.leaves(jax.jacrev(log_probs)(params))
    return np.concatenate([leaf.reshape(len(targets), -1) for leaf in leaves], axis=1)


@pytest.mark.parametrize(
    ("algorithm", "tied"), [("auto", True), ("jvp_vjp", False), ("layerwise", False)]
)
def test_score_gram_equals_stacked_gradients(tied, algorithm):
    """oracle: ⟨∇ log π, ∇ log π⟩ of 15 tokens; chunks, weights and sequence sums as well."""
    result, params = layered(tied)
    where = ntk.every_position(jnp.asarray(TOKENS))
    targets = np.random.default_rng(0).integers(0, VOCAB, 15)
    stacked = log_prob_gradients(result, params, where, targets)
    gram = ntk.score_gram(result, params, where, targets, algorithm=algorithm)
    close(gram, stacked @ stacked.T)
    close(ntk.score_gram(result, params, where, targets, algorithm=algorithm, chunk=2), gram, 1e-12)
    weights = np.random.default_rng(1).normal(size=15)
    sums = (stacked * weights[:, None]).reshape(3, 5, -1).sum(axis=1)
    settings = {"weights": jnp.asarray(weights), "by": "sequence", "algorithm": algorithm}
    close(ntk.score_gram(result, params, where, targets, **settings), sums @ sums.T)


def test_last_positions_follow_the_mask():
    """by hand: the last real token of each row, padded left and right."""
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]], bool)
    assert ntk.last_positions(jnp.asarray(TOKENS), mask).positions.tolist() == [3, 1, 4]
    assert ntk.last_positions(jnp.asarray(TOKENS)).positions.tolist() == [4, 4, 4]
    every = ntk.every_position(jnp.asarray(TOKENS), mask)
    assert list(zip(every.rows.tolist(), every.positions.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 1),
        (2, 4),
    ]
    with pytest.raises(ValueError, match="rows 1 are all padding"):
        ntk.last_positions(jnp.asarray(TOKENS), mask * np.array([[1], [0], [1]], bool))
