"""The presets' formulas by loops over completions and tokens, in float64.

Each function takes rewards [B], log-probs, old and reference log-probs and mask [B, C], the group
size and the completion budget, and shares no code with the library. `tokens(i)` is the list of
tokens that count.
"""

import numpy as np


class Batch:
    """One rollout, and the few sums that formulas are written with."""

    def __init__(self, rewards, log_probs, old, ref, mask, finished, group, budget):
        self.rewards, self.log_probs, self.old, self.ref = rewards, log_probs, old, ref
        self.mask, self.finished, self.group, self.budget = mask, finished, group, budget
        self.all = range(len(rewards))

    def tokens(self, i):
        return np.flatnonzero(self.mask[i])

    def mates(self, i):
        first = i - i % self.group
        return self.rewards[first : first + self.group]

    def k1(self, i, t, of="old"):
        return getattr(self, of)[i, t] - self.ref[i, t]

    def ratio(self, i, t):
        return np.exp(self.log_probs[i, t] - self.old[i, t])

    def normalised(self, i):
        mates = self.mates(i)
        return (self.rewards[i] - np.mean(mates)) / (np.std(mates, ddof=1) + 1e-4)


def clipped(ratio, advantage, low, high):
    """min(ρA, clip(ρ)A)."""
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def reinforce(b):
    baseline = sum(b.rewards) / len(b.rewards)
    total = 0.0
    for i in b.all:
        total += (b.rewards[i] - baseline) * sum(b.log_probs[i, t] for t in b.tokens(i))
    return -total / len(b.rewards)


def reinforce_pp(b):
    returns = {}
    for i in b.all:
        for t in b.tokens(i):
            later = [s for s in b.tokens(i) if s >= t]
            returns[i, t] = b.rewards[i] - 0.01 * sum(b.k1(i, s) for s in later)
    values = np.array(list(returns.values()))
    scale = np.sqrt(values.var(ddof=1) + 1e-8)
    terms = [
        clipped(b.ratio(i, t), (value - values.mean()) / scale, 0.2, 0.2)
        for (i, t), value in returns.items()
    ]
    return -sum(terms) / len(terms)


def rloo(b):
    paid = [b.rewards[i] - 0.05 * sum(b.k1(i, t) for t in b.tokens(i)) for i in b.all]
    total = 0.0
    for i in b.all:
        first = i - i % b.group
        others = [paid[j] for j in range(first, first + b.group) if j != i]
        ratio = np.prod([b.ratio(i, t) for t in b.tokens(i)])
        total += clipped(ratio, paid[i] - sum(others) / len(others), 0.2, 0.2)
    return -total / len(b.rewards)


def ppo_clip(b):
    baseline = sum(b.rewards) / len(b.rewards)
    terms = [
        clipped(b.ratio(i, t), b.rewards[i] - baseline, 0.2, 0.2)
        for i in b.all
        for t in b.tokens(i)
    ]
    return -sum(terms) / len(terms)


def grpo(b):
    total = 0.0
    for i in b.all:
        terms = []
        for t in b.tokens(i):
            k1 = b.k1(i, t, "log_probs")
            k3 = np.exp(-k1) - 1 + k1
            terms.append(-clipped(b.ratio(i, t), b.normalised(i), 0.2, 0.2) + 0.04 * k3)
        total += sum(terms) / len(terms)
    return total / len(b.rewards)


def dr_grpo(b):
    total = 0.0
    for i in b.all:
        advantage = b.rewards[i] - np.mean(b.mates(i))
        total += sum(clipped(b.ratio(i, t), advantage, 0.2, 0.2) for t in b.tokens(i))
    return -total / (len(b.rewards) * b.budget)


def dapo(b):
    terms = [
        clipped(b.ratio(i, t), b.normalised(i), 0.2, 0.28)
        for i in b.all
        for t in b.tokens(i)
        if b.finished[i] and len(set(b.mates(i))) > 1
    ]
    return -sum(terms) / len(terms)


def gspo(b):
    total = 0.0
    for i in b.all:
        ratio = np.prod([b.ratio(i, t) for t in b.tokens(i)]) ** (1 / len(b.tokens(i)))
        total += clipped(ratio, b.normalised(i), 3e-4, 4e-4)
    return -total / len(b.rewards)


def cispo(b, frozen):
    """Return the loss; `frozen` are the log-probs of the weights, constant for the gradient."""
    terms = []
    for i in b.all:
        for t in b.tokens(i):
            weight = min(np.exp(frozen[i, t] - b.old[i, t]), 5.0)
            terms.append(weight * b.normalised(i) * b.log_probs[i, t])
    return -sum(terms) / len(terms)
