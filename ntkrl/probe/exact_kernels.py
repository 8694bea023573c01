"""Drift of the kernel of some contexts in training, and its alignment with advantages.

Drift of the body kernel is measured on its traces over the vocabulary: rotations within V×V blocks
do not show (`ntk.alignment` and `ntk.cka` show them).
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ntkrl import ntk
from ntkrl.probe.kernel_steps import select
from ntkrl.scoring import head_of
from ntkrl.softmax import token_statistics
from ntkrl.types import Array, Params, Policy


def batch_alignment(
    policy: Policy,
    params: Params,
    contexts: ntk.Contexts,
    targets: Array,
    advantages: np.ndarray,
    memory_gib: float = 8.0,
) -> float:
    """Return `advantage_alignment` of the full kernel at some tokens of a batch.

    Args:
      policy, params: of the network.
      contexts: O contexts.
      targets, advantages: `[O]` tokens that follow, and their advantages, not all 0.
      memory_gib: what a kernel may use beyond the params (GiB).
    """
    gram = ntk.score_gram(policy, params, contexts, targets, memory_gib=memory_gib)
    head, diagonal = head_of(policy, params), []
    for number in range(contexts.count):  # pairs o = u alone
        context = select(contexts, slice(number, number + 1))
        kernel = ntk.kernel(policy, params, context, memory_gib=memory_gib)
        target = jnp.asarray(targets[number : number + 1])
        statistics = token_statistics(head, kernel.problem.head_inputs[0].features, target)
        square = 1 - 2 * jnp.exp(statistics.log_probs[0]) + statistics.sum_squares[0]
        diagonal.append((float(kernel.trace()[0, 0]), float(square)))
    traces, squares = np.asarray(diagonal).T
    return advantage_alignment(np.asarray(gram), np.diag(traces), advantages, squares)


def laziness(now: np.ndarray, start: np.ndarray) -> float:
    """Return ‖K_t − K_0‖_F/‖K_0‖_F of `[O, O]` kernels, ≥ 0: how far training left the lazy regime.

    Source: Chizat et al. 1812.07956.
    """
    now, start = np.asarray(now, float), np.asarray(start, float)
    return float(np.linalg.norm(now - start) / np.linalg.norm(start))


def centred_alignment(now: np.ndarray, start: np.ndarray) -> float:
    """Return ⟨H K_t H, H K_0 H⟩/(‖H K_t H‖ ‖H K_0 H‖), H = I − 11ᵀ/O: CKA of `[O, O]` kernels.

    In [0, 1] for positive semi-definite kernels; blind to scale. NaN where centring leaves nothing,
    as with a single context.

    Source: Kornblith et al. 1905.00414.
    """
    first, second = (
        k - k.mean(0, keepdims=True) - k.mean(1, keepdims=True) + k.mean()
        for k in (np.asarray(now, float), np.asarray(start, float))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.sum(first * second) / (np.linalg.norm(first) * np.linalg.norm(second)))


def kernel_drift(
    now: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Compare two results of `kernel_measures` or `kernel_traces` on the same contexts.

    Returns:
      `body_to_head` Σ_o tr G(o, o)/Σ_o tr R(o, o) now (≥ 0), and for P = head, body
      `laziness_P` and `cka_P`, of the body on traces (see this module).

    Source: body_to_head of Tomihari 2601.04670: it grows with ‖W‖².
    """
    ratio = np.trace(now["trace_body"]) / np.trace(now["trace_head"])
    measures = {"body_to_head": float(ratio)}
    for part, name in (("head", "head"), ("body", "trace_body")):
        measures[f"laziness_{part}"] = laziness(now[name], start[name])
        measures[f"cka_{part}"] = centred_alignment(now[name], start[name])
    return measures


def layer_shares(names: np.ndarray, traces: np.ndarray) -> dict[str, float]:
    """Return the share of each group of parameters in Σ_o tr K(o, o); shares add up to 1.

    Args:
      names, traces: `[G]` and `[G, O, O]`, `layers` and `trace_layers` of `kernel_measures`.
    """
    sums_G = np.einsum("goo->g", np.asarray(traces, float))
    return dict(zip(map(str, names), (sums_G / sums_G.sum()).tolist(), strict=True))


def advantage_alignment(
    gram: np.ndarray, traces: np.ndarray, advantages: np.ndarray, score_squares: np.ndarray
) -> float:
    """Return aᵀ K a/(tr K ‖a‖²) with a the stacked A_o g_o `[O·V]`, g = e_y − π.

    At most 1; 1/(O·V) for a multiple of the identity. Large where the kernel's leading directions
    are those of the policy gradient.

    Args:
      gram: `[O, O]` of `ntk.score_gram`, g_oᵀ K(o, u) g_u, without weights.
      traces: `[O, O]` of `ntk.Kernel.trace` of the same part.
      advantages: A `[O]`.
      score_squares: ‖g_o‖² = 1 − 2π(y) + Σ π² `[O]`.

    Source: ours, after Cristianini et al. 2001.
    """
    a_O = np.asarray(advantages, float)
    form = a_O @ np.asarray(gram, float) @ a_O
    return float(form / (np.trace(traces) * np.sum(a_O**2 * np.asarray(score_squares, float))))
