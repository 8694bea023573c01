"""Slow, obvious versions of the library's computations, for comparison in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def dense_kernel(policy, params, observed, updated):
    """K by V Jacobian rows per context: `[O, U, V, V]`."""

    def jacobian(contexts):
        rows = jnp.arange(len(contexts.positions)) if contexts.rows is None else contexts.rows

        def logits(p):
            phi = policy.features(p, contexts.tokens, contexts.mask)
            return policy.head(p, phi[rows, contexts.positions])

        leaves = jax.tree.leaves(jax.jit(jax.jacrev(logits))(params))
        return jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=-1)

    return jnp.einsum("ovp,uwp->ouvw", jacobian(observed), jacobian(updated))


def group_kernel(policy, params, observed, updated, keep):
    """K restricted to the leaves whose name `keep` accepts: `[O, U, V, V]`."""
    from ntkrl import trees

    chosen, rest = trees.partition(params, [keep(name) for name in trees.names(params)])

    class Restricted:
        features = staticmethod(
            lambda p, tokens, mask: policy.features(trees.merge(p, rest), tokens, mask)
        )
        head = staticmethod(lambda p, phi: policy.head(trees.merge(p, rest), phi))

    return dense_kernel(Restricted, chosen, observed, updated)


def role_jacobians(features, head, params, contexts):
    """∂z/∂θ in the head's and in the features' role: two dicts `{name: [O, V, P]}`."""
    from ntkrl import trees

    rows = jnp.arange(len(contexts.positions)) if contexts.rows is None else contexts.rows

    def logits(head_role, features_role):
        phi = features(features_role, contexts.tokens, contexts.mask)
        return head(head_role, phi[rows, contexts.positions])

    result = jax.jit(jax.jacrev(logits, argnums=(0, 1)))(params, params)
    return tuple(
        {n: np.asarray(a).reshape(*a.shape[:2], -1) for n, a in trees.named_leaves(role).items()}
        for role in result
    )


def part_kernel(part, observed, updated, weight, bias=None, keep=None, precondition=None):
    """A part of K `[O, U, V, V]` from role Jacobians; `keep(name)` chooses leaves of a group."""
    out, bias_only, inside = {weight}, {bias} - {None}, None
    terms = {
        "head": [(0, 0, out | bias_only)],
        "output": [(0, 0, out)],
        "body": [(1, 1, inside)],
        "input": [(1, 1, out)],
        "output_input": [(0, 1, out)],
        "input_output": [(1, 0, out)],
        "cross": [(0, 1, out), (1, 0, out)],
        "full": [(0, 0, inside), (1, 1, inside), (0, 1, inside), (1, 0, inside)],
    }
    total = 0.0
    for here, there, names in terms["full" if keep else part]:
        for name, jacobian in observed[here].items():
            if (names is None or name in names) and (keep is None or keep(name)):
                scale = 1.0 if precondition is None else precondition[name].ravel()
                total += np.einsum("ovp,uwp->ouvw", jacobian * scale, updated[there][name])
    return total


def kernel_by_gradients(kernel, part="full"):
    """A part or group of an `ntk.Kernel` by stacked gradients of all logits: `[O, U, V, V]`."""
    from ntkrl import ntk, trees

    problem = kernel.problem
    network, params = problem.network, problem.params

    def jacobians(contexts):
        """Per leaf the gradients `[O, V, P]` in the head's and in the features' role."""

        def logits(head_role, features_role):
            return network.logits(head_role, ntk.features_at(network, features_role, contexts))

        roles = jax.jit(jax.jacrev(logits, argnums=(0, 1)))(params, params)
        return [
            [a.reshape(*a.shape[:2], -1) for a in pair]
            for pair in zip(*map(jax.tree.leaves, roles), strict=True)
        ]

    observed, updated = jacobians(problem.observed), jacobians(problem.updated)
    roles, weights = problem.part(part)
    head_roles = {network.head.weight: roles.output, network.head.bias: roles.bias}
    total = 0.0
    for index, (name, leaf) in enumerate(trees.named_leaves(params).items()):
        (head_o, features_o), (head_u, features_u) = observed[index], updated[index]
        weight = jnp.ones((), leaf.dtype) if weights is None else weights[index]
        weight_P = jnp.broadcast_to(weight, leaf.shape).ravel()
        for a, b, included in (
            (head_o, head_u, head_roles[name] if name in head_roles else False),
            (features_o, features_u, roles.body),
            (head_o, features_u, roles.output_input),
            (features_o, head_u, roles.input_output),
        ):
            if included:
                total += jnp.einsum("ovp,p,uwp->ouvw", a, weight_P, b, precision="highest")
    return np.asarray(total)


def log_softmax(logits):
    """log softmax of the last axis, in numpy float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
