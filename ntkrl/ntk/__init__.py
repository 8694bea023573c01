"""Exact empirical kernels of language models and first-order predictions; no RL inside.

The NTK of next-token logits between two contexts is V×V; it is never formed unasked. A model of
your own needs a function for its features and the name of its head's matrix:

    >>> import jax, jax.numpy as jnp
    >>> from ntkrl import ntk
    >>> params = {
    ...     "embed": jax.random.normal(jax.random.key(0), (50, 8)),
    ...     "mix": jax.random.normal(jax.random.key(1), (8, 8)),
    ...     "head": jax.random.normal(jax.random.key(2), (50, 8)),
    ... }
    >>> def features(params, tokens):  # [N, T] -> [N, T, D]
    ...     running = jnp.cumsum(params["embed"][tokens], axis=1)
    ...     return jnp.tanh(running @ params["mix"])
    >>> network = ntk.Network(features, ntk.Head("head"))
    >>> tokens = jnp.array([[3, 1, 4], [1, 5, 9]])
    >>> kernel = ntk.kernel(network, params, ntk.last_positions(tokens))
    >>> kernel.head.shape, kernel.body().shape  # R = head ⊗ I, G = W M Wᵀ
    ((2, 2), (2, 2, 8, 8))
    >>> R, G = kernel.dense("head"), kernel.dense("body")
    >>> bool(jnp.allclose(R + G, kernel.dense(), rtol=1e-4))
    True

Models of this package are passed as they come: `ntk.kernel(policy, params, contexts)`.
"""

from ntkrl.ntk.contexts import Contexts, every_position, last_positions
from ntkrl.ntk.eigen import eigenpairs
from ntkrl.ntk.kernel import Factored, Kernel
from ntkrl.ntk.make import kernel
from ntkrl.ntk.network import Head, Network
from ntkrl.ntk.parts import PARTS, by_layer, by_module
from ntkrl.ntk.predict import predict
from ntkrl.ntk.roads import ROADS, Estimate
from ntkrl.ntk.scores import score_gram
from ntkrl.ntk.spectrum import alignment, cka, frobenius

__all__ = [
    "PARTS",
    "ROADS",
    "Contexts",
    "Estimate",
    "Factored",
    "Head",
    "Kernel",
    "Network",
    "alignment",
    "by_layer",
    "by_module",
    "cka",
    "eigenpairs",
    "every_position",
    "frobenius",
    "kernel",
    "last_positions",
    "predict",
    "score_gram",
]
