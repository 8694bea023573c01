"""How kernels move in training, from what `kernel_measures` and `ntk.score_gram` give.

The head kernel is (Gram matrix of features) ⊗ I_V, so what is said of its `[O, O]` matrix holds of
all of it. The body kernel is read through its traces over the vocabulary: what turns within V×V
blocks and leaves their traces alone is not seen; `ntk.alignment` and `ntk.cka` see it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


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
    """Compare two results of `kernel_measures` on the same contexts.

    Args:
      now, start: with `head` and `trace_body` `[O, O]`, and `trace_head`.

    Returns:
      `body_to_head` Σ_o tr G(o, o)/Σ_o tr R(o, o) now (≥ 0), and for P = head, body
      `laziness_P` and `cka_P`, of the body on traces (see this module).

    Source: body_to_head of Tomihari 2601.04670: it grows with ‖W‖².
    """
    found = {"body_to_head": float(np.trace(now["trace_body"]) / np.trace(now["trace_head"]))}
    for part, name in (("head", "head"), ("body", "trace_body")):
        found[f"laziness_{part}"] = laziness(now[name], start[name])
        found[f"cka_{part}"] = centred_alignment(now[name], start[name])
    return found


def layer_shares(names: np.ndarray, traces: np.ndarray) -> dict[str, float]:
    """Return the share of each group of parameters in Σ_o tr K(o, o).

    Args:
      names: `[G]` groups, and traces `[G, O, O]`: `layers` and `trace_layers` of
        `kernel_measures`.
      traces: see names.

    Returns:
      Shares by group; they add up to 1.
    """
    sums_G = np.einsum("goo->g", np.asarray(traces, float))
    return dict(zip(map(str, names), (sums_G / sums_G.sum()).tolist(), strict=True))


def advantage_alignment(
    gram: np.ndarray, traces: np.ndarray, advantages: np.ndarray, score_squares: np.ndarray
) -> float:
    """Return aᵀ K a/(tr K ‖a‖²) with a the stacked A_o g_o `[O·V]`, g = e_y − π.

    At most 1; 1/(O·V) for a multiple of the identity. Large where the kernel's leading directions
    are those the advantages push in.

    Args:
      gram: `[O, O]` of `ntk.score_gram`, g_oᵀ K(o, u) g_u, without weights.
      traces: `[O, O]` of `ntk.Kernel.trace` of the same part.
      advantages: A `[O]`.
      score_squares: ‖g_o‖² = 1 − 2π(y) + Σ π² `[O]`.

    Source: ours, after Cristianini et al. 2001.
    """
    a_O = np.asarray(advantages, float)
    push = a_O @ np.asarray(gram, float) @ a_O
    return float(push / (np.trace(traces) * np.sum(a_O**2 * np.asarray(score_squares, float))))
