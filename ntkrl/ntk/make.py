"""The front door of the kernels: check what was given, and return a lazy Kernel.

>>> kernel = ntk.kernel(policy, params, ntk.last_positions(tokens))
>>> kernel.trace("head").shape  # [O, U]
(2, 2)
>>> change = kernel.apply(jnp.ones((2, policy.vocab_size)))  # one VJP, one JVP
>>> block = kernel.dense(rows=[5, 8], columns=[0, 1])  # [O, U, 2, 2]
>>> print(kernel.estimate().algorithm)  # what body() will do, before it runs
layerwise
"""

from __future__ import annotations

from ntkrl import trees
from ntkrl.jaxpr import is_traced
from ntkrl.ntk import parts
from ntkrl.ntk.contexts import Contexts, check_contexts
from ntkrl.ntk.estimates import ALGORITHMS
from ntkrl.ntk.kernel import Kernel
from ntkrl.ntk.network import Network, as_network, check_params, check_policy_head
from ntkrl.ntk.rows import RowsKernel
from ntkrl.numerics import GIB
from ntkrl.types import Params, Policy


def kernel(
    model: Policy | Network,
    params: Params,
    observed: Contexts,
    updated: Contexts | None = None,
    *,
    groups: trees.Patterns = (),
    precondition: Params | None = None,
    algorithm: str = "auto",
    forward_mode: bool = True,
    memory_gib: float = 8.0,
) -> Kernel:
    """Return the kernel between observed and updated contexts, lazily.

    Args:
      model: a Policy, or an `ntk.Network` of your own.
      params: its params tree, floating point, one dtype.
      observed: O contexts whose logits are watched.
      updated: U contexts whose loss moves the params; None for the observed ones, which makes the
        kernel symmetric and halves the work.
      groups: ordered `(pattern, name)` list that covers the parameters, for instance
        `ntk.by_layer(model, params)`; each name is then a part. A stacked leaf is spelled once per
        layer (`layers/3/mlp/up/kernel`) or for all layers at once (`layers/mlp/up/kernel`).
      precondition: tree like params, the diagonal P of J P Jᵀ (for Adam 1 / (√ν + ε)).
      algorithm: how feature Jacobians are contracted: "jvp_vjp", "jacobian" or "layerwise", or
        "auto" for the cheapest of them by their estimates; "dense" is the brute-force
        oracle, V Jacobian rows per context.
      forward_mode: False for networks without forward-mode derivatives (fused attention): every
        JVP becomes a VJP of a VJP.
      memory_gib: what a call may use beyond the params (GiB, all devices together); chunks are
        made to fit, and larger results are refused.

    Returns:
      A Kernel; nothing large is computed yet.

    Raises:
      ValueError: contexts out of range or on padding; params that are not floating point, not of
        one dtype or not finite; a head that does not fit; unknown algorithm; groups
        that do not cover.
    """
    network = _checked(model, params, algorithm, memory_gib)
    ids = isinstance(model, Policy)
    here = check_contexts(observed, "observed", network, params, ids)
    same = updated is None or updated is observed
    there = here if same else check_contexts(updated, "updated", network, params, ids)
    if precondition is not None:
        precondition = parts.checked_precondition(precondition, params)
    form = RowsKernel if algorithm == "dense" else Kernel
    return form(
        network,
        params,
        here,
        there,
        groups=parts.check_groups(groups, network, params),
        precondition=precondition,
        algorithm=algorithm,
        forward_mode=forward_mode,
        budget=int(memory_gib * GIB),
        symmetric=same,
    )


def _checked(model: Policy | Network, params: Params, algorithm: str, memory_gib: float) -> Network:
    network = as_network(model)
    check_params(network, params)
    if isinstance(model, Policy) and not is_traced(params):
        check_policy_head(model, network, params)
    if algorithm not in ("auto", "dense", *ALGORITHMS):
        raise ValueError(
            f"algorithm {algorithm!r} is unknown; known are auto, {', '.join(ALGORITHMS)}, dense."
        )
    if not memory_gib > 0:
        raise ValueError(f"memory_gib must be positive, not {memory_gib}.")
    return network
