"""Slow, obvious versions of what the library computes, for comparison in float64."""

from __future__ import annotations

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


def log_softmax(logits):
    """log softmax of the last axis, in numpy float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def rloo_loss(rewards, log_probs, old, ref, mask, group, beta, clip):
    """RLOO by loops: k1 in the reward, leave-one-out, one clipped ratio per completion."""
    count, total = len(rewards), 0.0
    shaped = [
        rewards[i] - beta * sum(old[i, t] - ref[i, t] for t in np.flatnonzero(mask[i]))
        for i in range(count)
    ]
    for i in range(count):
        first = i - i % group
        others = [shaped[j] for j in range(first, first + group) if j != i]
        advantage = shaped[i] - sum(others) / len(others)
        ratio = np.exp(sum(log_probs[i, t] - old[i, t] for t in np.flatnonzero(mask[i])))
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        total += -min(ratio * advantage, clipped * advantage)
    return total / count


def grpo_loss(rewards, log_probs, old, ref, mask, group, beta, clip, epsilon=1e-4):
    """GRPO by loops: normalised advantages, token ratios, k3, mean of per-completion means."""
    count, total = len(rewards), 0.0
    for i in range(count):
        first = i - i % group
        mates = rewards[first : first + group]
        advantage = (rewards[i] - np.mean(mates)) / (np.std(mates, ddof=1) + epsilon)
        terms = []
        for t in np.flatnonzero(mask[i]):
            ratio = np.exp(log_probs[i, t] - old[i, t])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            gap = ref[i, t] - log_probs[i, t]
            kl = np.exp(gap) - gap - 1
            terms.append(-min(ratio * advantage, clipped * advantage) + beta * kl)
        total += np.mean(terms)
    return total / count
