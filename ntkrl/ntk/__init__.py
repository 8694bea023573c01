"""Exact empirical kernels of language models and first-order predictions; no RL inside.

The NTK of next-token logits between two contexts is V×V; it is formed on request only. A
custom model needs a function for its features and the name of its head's matrix:

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

Models of this package are passed directly: `ntk.kernel(policy, params, contexts)`.
"""

from ntkrl.ntk.contexts import (
    Contexts,
    GroupedContexts,
    check_contexts,
    every_position,
    features_at,
    group_by_sequence,
    last_positions,
)
from ntkrl.ntk.estimates import ALGORITHMS, Estimate, cheapest
from ntkrl.ntk.factors import Factored, can_factor, factored
from ntkrl.ntk.kernel import Kernel
from ntkrl.ntk.log_probs import BODY_GROUP, TokenChanges, predict, predict_changes, score_gram
from ntkrl.ntk.make import kernel, kernel_program
from ntkrl.ntk.network import Head, Network, as_network
from ntkrl.ntk.parts import PARTS, by_layer, by_module, group_weights
from ntkrl.ntk.problem import KernelOptions
from ntkrl.ntk.reports import listening
from ntkrl.ntk.spectrum import alignment, cka, eigenpairs, frobenius
