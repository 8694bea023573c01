"""Other implementations of a transformer's empirical NTK, each as good as its tool allows.

All use the same GPT-NeoX weights, float32, and the same contexts: the last position of each of N
sequences of T tokens, observed = updated. K(o, u) = ∂z(o)/∂θ (∂z(u)/∂θ)ᵀ over all P parameters is
`[N, N, V, V]`. Two ways, each in JAX and in torch.func, as in PyTorch's tutorial "Neural Tangent
Kernels" except that one backward pass serves all observed contexts:

    rows       V Jacobian rows per context by reverse mode, contracted over parameters
    products   V columns per updated context, each one VJP and one JVP

`time_rows` and `time_products` run a part of one, compiled before the clock starts, and
extrapolate. `score_gram` stacks vmap(grad) of every token's log π(y_t | c_t) and multiplies.

`python -m tests.bench.peers` checks all of them against the float64 oracle on a tiny model.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import func as tf

import ntkrl
from ntkrl.types import Array, Params, Policy
from tests import oracles
from tests.toys import TINY, torch_neox

TOLERANCE = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Jax:
    """The pieces in JAX, on the library's network."""

    policy: Policy = dataclasses.field(metadata={"static": True})
    params: Params

    @property
    def vocab(self) -> int:
        return self.policy.vocab_size

    @functools.partial(jax.jit, static_argnames="count")
    def rows(self, tokens_NT: Array, start: int, count: int) -> list[Array]:
        """Return the Jacobian of logits start … start + count − 1: leaves `[N count, p]`."""
        basis_CV = jax.nn.one_hot(start + jnp.arange(count), self.vocab)

        def rows_of(tokens_T: Array) -> Params:
            _, pull = jax.vjp(lambda p: self._logits(p, tokens_T[None])[0], self.params)
            return jax.vmap(pull)(basis_CV)[0]

        leaves = jax.tree.leaves(jax.vmap(rows_of)(tokens_NT))
        return [leaf.reshape(len(tokens_NT) * count, -1) for leaf in leaves]

    @jax.jit
    def contract(self, left: list[Array], right: list[Array]) -> Array:
        """Return the inner products over all leaves: `[left rows, right rows]`."""
        return functools.reduce(jnp.add, (a @ b.T for a, b in zip(left, right, strict=True)))

    @functools.partial(jax.jit, static_argnames=("count", "chunk"))
    def columns(self, tokens_NT: Array, u: int, count: int, chunk: int) -> Array:
        """Return the first columns of updated context u: `[count, N, V]`."""
        _, pull = jax.vjp(lambda p: self._logits(p, tokens_NT[u][None])[0], self.params)
        _, push = jax.linearize(lambda p: self._logits(p, tokens_NT), self.params)
        column = lambda w: push(*pull(jax.nn.one_hot(w, self.vocab)))  # noqa: E731
        return jax.lax.map(column, jnp.arange(count), batch_size=chunk)

    @functools.partial(jax.jit, static_argnames="completion")
    def token_gradients(self, tokens_NT: Array, completion: int) -> list[Array]:
        """Return ∂ log π(y_t | c_t)/∂θ of the completions' tokens: leaves `[N C, p]`."""

        def log_prob(p: Params, tokens_T: Array, t: Array) -> Array:
            phi_D = self.policy.features(p, tokens_T[None, :-1])[0, t - 1]
            return jax.nn.log_softmax(self.policy.head(p, phi_D))[tokens_T[t]]

        # only the position is mapped over in a sequence, so its tokens share one forward pass
        per_token = jax.vmap(jax.grad(log_prob), (None, None, 0))
        t_C = jnp.arange(tokens_NT.shape[1] - completion, tokens_NT.shape[1])
        gradients = jax.vmap(per_token, (None, 0, None))(self.params, tokens_NT, t_C)
        tokens = len(tokens_NT) * completion
        return [leaf.reshape(tokens, -1) for leaf in jax.tree.leaves(gradients)]

    def _logits(self, params: Params, tokens_NT: Array) -> Array:
        return self.policy.head(params, self.policy.features(params, tokens_NT)[:, -1])


class Torch:
    """The same pieces in torch.func, on transformers' GPTNeoXForCausalLM."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.vocab = model, model.config.vocab_size
        self.params = {name: leaf.detach() for name, leaf in model.named_parameters()}

    def rows(self, tokens_NT: np.ndarray, start: int, count: int) -> list[torch.Tensor]:
        def logits(p: dict, tokens_T: torch.Tensor) -> torch.Tensor:
            return self._logits(p, tokens_T[None])[0, start : start + count]

        jacobian = tf.vmap(tf.jacrev(logits), (None, 0))(self.params, torch.as_tensor(tokens_NT))
        return [leaf.flatten(0, 1).flatten(1) for leaf in jacobian.values()]

    def contract(self, left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        return functools.reduce(torch.add, (a @ b.T for a, b in zip(left, right, strict=True)))

    def columns(self, tokens_NT: np.ndarray, u: int, count: int, chunk: int) -> torch.Tensor:
        tokens_NT = torch.as_tensor(tokens_NT)
        _, pull = tf.vjp(lambda p: self._logits(p, tokens_NT[u : u + 1])[0], self.params)

        def column(e_V: torch.Tensor) -> torch.Tensor:
            return tf.jvp(lambda p: self._logits(p, tokens_NT), (self.params,), pull(e_V))[1]

        return tf.vmap(column, chunk_size=chunk)(torch.eye(self.vocab)[:count])

    def token_gradients(self, tokens_NT: np.ndarray, completion: int) -> list[torch.Tensor]:
        tokens_NT = torch.as_tensor(tokens_NT)

        def log_prob(p: dict, tokens_T: torch.Tensor, last: torch.Tensor, y: torch.Tensor):
            log_pi_V = self._logits(p, tokens_T[None], last[None])[0].log_softmax(-1)
            return log_pi_V.gather(0, y[None])[0]

        t_C = torch.arange(tokens_NT.shape[1] - completion, tokens_NT.shape[1])
        per_token = tf.vmap(tf.grad(log_prob), (None, None, 0, 0))
        per_sequence = tf.vmap(per_token, (None, 0, None, 0))
        gradients = per_sequence(self.params, tokens_NT[:, :-1], t_C - 1, tokens_NT[:, t_C])
        return [leaf.flatten(0, 1).flatten(1) for leaf in gradients.values()]

    def _logits(self, params: dict, tokens_NT: torch.Tensor, position: Any = 1) -> torch.Tensor:
        """Return `[N, V]`, at the last position, or at `position` `[1]`."""
        settings = {"use_cache": False, "logits_to_keep": position}
        return tf.functional_call(self.model, params, (tokens_NT,), settings).logits[:, 0]


def models(directory: str, seed: int = 0, **config: Any) -> tuple[Jax, Torch]:
    """Make one random GPT-NeoX, `tests.toys.TINY` but for config, in both with equal weights."""
    # eager attention: the fused one has no forward mode
    model = torch_neox(directory, seed, attn_implementation="eager", **config)
    return Jax(*ntkrl.load(directory)), Torch(model)


def random_tokens(count: int, length: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Draw N sequences of T tokens: `[N, T]`."""
    return np.random.default_rng(seed).integers(0, vocab, (count, length))


def rows(peer: Jax | Torch, tokens_NT: np.ndarray, chunk: int) -> np.ndarray:
    """Contract Jacobian rows to the full kernel `[N, N, V, V]`.

    Two chunks of rows are in memory at once, N × chunk × P numbers each. K(o, u) = K(u, o)ᵀ, as
    observed = updated, saves half of the pairs of chunks.
    """
    count = len(tokens_NT)
    kernel = np.empty((count, count, peer.vocab, peer.vocab), np.float32)
    for v, w, block in _blocks(peer, tokens_NT, chunk):
        here, there = slice(v, v + block.shape[2]), slice(w, w + block.shape[3])
        kernel[:, :, here, there] = block
        kernel[:, :, there, here] = block.transpose(1, 0, 3, 2)
    return kernel


def products(
    peer: Jax | Torch, tokens_NT: np.ndarray, chunk: int, columns: int | None = None
) -> np.ndarray:
    """Take NTK-vector products: `[N, N, V, columns]`, the first columns or all V.

    A chunk of columns is taken at once; a few times chunk × P numbers bound scratch memory.
    """
    count, columns = len(tokens_NT), peer.vocab if columns is None else columns
    kernel = np.empty((count, count, peer.vocab, columns), np.float32)
    for u in range(count):
        part = np.asarray(peer.columns(tokens_NT, u, columns, chunk))
        kernel[:, u] = part.transpose(1, 2, 0)
    return kernel


def score_gram(peer: Jax | Torch, tokens_NT: np.ndarray, completion: int) -> np.ndarray:
    """Multiply the stacked gradients of the last C < T tokens of each sequence: `[N C, N C]`.

    All N × C × P numbers are in memory, leaf by leaf: one matrix of them would be a second copy.
    """
    gradients = peer.token_gradients(tokens_NT, completion)
    return np.asarray(peer.contract(gradients, gradients))


def time_rows(peer: Jax | Torch, tokens_NT: np.ndarray, chunk: int, blocks: int = 3) -> dict:
    """Time the blocks of the first chunk of rows with the first few, and extrapolate to all.

    With n = ⌈V / chunk⌉ the kernel has n (n + 1) / 2 blocks, each one chunk of rows and one
    contraction; the median of the blocks run represents all. Returns `seconds` and `units` of the
    run, `unit_seconds` per block, and `whole_units` and `whole_seconds`, the extrapolation.
    """
    per_side = -(-peer.vocab // chunk)
    next(_blocks(peer, tokens_NT, chunk))
    marks, running = [time.perf_counter()], _blocks(peer, tokens_NT, chunk)
    for _ in zip(range(min(blocks, per_side)), running, strict=False):
        marks.append(time.perf_counter())
    each = np.diff(marks)
    return _extrapolated(each.sum(), len(each), np.median(each), per_side * (per_side + 1) // 2)


def time_products(peer: Jax | Torch, tokens_NT: np.ndarray, chunk: int, columns: int) -> dict:
    """Time some columns of every updated context, and extrapolate to V at equal cost.

    Use several chunks, so that the work done once per context is small. Returns the fields of
    `time_rows`; a unit is one column of one updated context.
    """
    products(peer, tokens_NT, chunk, columns)
    start = time.perf_counter()
    products(peer, tokens_NT, chunk, columns)
    seconds, units = time.perf_counter() - start, columns * len(tokens_NT)
    return _extrapolated(seconds, units, seconds / units, peer.vocab * len(tokens_NT))


def _extrapolated(seconds: float, units: int, each: float, total: int) -> dict:
    measured = {"seconds": float(seconds), "units": units, "unit_seconds": float(each)}
    return {**measured, "whole_units": total, "whole_seconds": float(each * total)}


def _blocks(peer: Jax | Torch, tokens_NT: np.ndarray, chunk: int) -> Iterator[tuple]:
    """Yield first row, first column and block, on and above the diagonal, row by row."""
    count = len(tokens_NT)
    made = lambda start: peer.rows(tokens_NT, start, min(chunk, peer.vocab - start))  # noqa: E731

    def block(left: list, right: list) -> np.ndarray:
        product = np.asarray(peer.contract(left, right))
        sizes = (count, product.shape[0] // count, count, product.shape[1] // count)
        return product.reshape(sizes).transpose(0, 2, 1, 3)

    for v in range(0, peer.vocab, chunk):
        left = made(v)
        yield v, v, block(left, left)
        for w in range(v + chunk, peer.vocab, chunk):
            yield v, w, block(left, made(w))


def check() -> list[str]:
    """Compare every peer, in float32, with float64 oracles on a tiny model, a line for each.

    Of the score Gram the oracle computes gᵀ K g, g = e_y − π, of the last token of each sequence;
    beyond those the two frameworks are compared with each other.

    Raises:
      AssertionError: an error beyond TOLERANCE, relative to the largest entry.
    """
    tokens_NT, errors = random_tokens(3, 7, TINY["vocab_size"]), {}
    with tempfile.TemporaryDirectory() as directory:
        peers = models(directory)
        with jax.enable_x64(True):
            dense, scores = _oracle(directory, tokens_NT)
    grams = [score_gram(peer, tokens_NT, 4) for peer in peers]
    for peer, gram in zip(peers, grams, strict=True):
        name, part = type(peer).__name__, products(peer, tokens_NT, 4, columns=8)
        errors |= {
            f"{name} rows": _error(rows(peer, tokens_NT, 23), dense),
            f"{name} rows in chunks": _error(rows(peer, tokens_NT, 8), dense),
            f"{name} products": _error(products(peer, tokens_NT, 8), dense),
            f"{name} products, 8 columns": _error(part, dense[..., :8]),
            f"{name} score Gram, last tokens": _error(gram[3::4, 3::4], scores),
        }
    errors["score Grams of both, all tokens"] = _error(*grams)
    if not all(error <= TOLERANCE for error in errors.values()):
        raise AssertionError(f"peers are off by more than {TOLERANCE}: {errors}")
    return [f"{name:32s} {error:.1e}" for name, error in errors.items()]


def _oracle(directory: str, tokens_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel at the last positions and the score Gram of the last tokens, float64."""
    policy, params = ntkrl.load(directory, jnp.float64)
    count, length = tokens_NT.shape
    contexts = SimpleNamespace(
        tokens=tokens_NT,
        positions=np.repeat([length - 1, length - 2], count),
        rows=np.tile(np.arange(count), 2),
        mask=np.ones(tokens_NT.shape, bool),
    )
    kernel = np.asarray(oracles.dense_kernel(policy, params, contexts, contexts))
    phi_ND = policy.features(params, tokens_NT)[:, -2]
    log_pi_NV = oracles.log_softmax(np.asarray(policy.head(params, phi_ND)))
    g_NV = np.eye(policy.vocab_size)[tokens_NT[:, -1]] - np.exp(log_pi_NV)
    scores_NN = np.einsum("nv,nmvw,mw->nm", g_NV, kernel[count:, count:], g_NV)
    return kernel[:count, :count], scores_NN


def _error(result: np.ndarray, expected: np.ndarray) -> float:
    assert result.shape == expected.shape, (result.shape, expected.shape)
    return float(np.abs(result - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    print("\n".join(check()))
