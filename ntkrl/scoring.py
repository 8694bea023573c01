"""Statistics of completions under a policy: log-probs, entropy, arg-max mass; logits in chunks."""

from ntkrl import trees
from ntkrl.softmax import (
    DEFAULT_OPTIONS,
    OutputHead,
    SoftmaxOptions,
    TokenStatistics,
    token_statistics,
)
from ntkrl.types import Array, Params, Policy


def head_of(policy: Policy, params: Params) -> OutputHead:
    """Return the arrays of a policy's head."""
    leaves = trees.named_leaves(params)
    bias = None if policy.head_bias is None else leaves[policy.head_bias]
    return OutputHead(leaves[policy.head_weight], bias, policy.head_scale, policy.head_soft_cap)


def completion_features(
    policy: Policy, params: Params, tokens: Array, mask: Array, completion_length: int
) -> Array:
    """Return the features that predict each completion token.

    Args:
      policy, params: the network.
      tokens: `[B, T]` prompt then completion.
      mask: `[B, T]` bool, True on real tokens.
      completion_length: C, columns that belong to the completion, in [1, T).

    Returns:
      `[B, C, D]`; entry c comes from the column before completion token c.
    """
    features_BTD = policy.features(params, tokens, mask)
    length = tokens.shape[1]
    return features_BTD[:, length - completion_length - 1 : length - 1]


def score(
    policy: Policy,
    params: Params,
    tokens: Array,
    mask: Array,
    completion_length: int,
    options: SoftmaxOptions = DEFAULT_OPTIONS,
) -> TokenStatistics:
    """Compute log-prob, entropy, Σπ² and arg-max mass of every completion token.

    Args:
      policy, params, tokens, mask, completion_length: as in `completion_features`.
      options: the sampling temperature (for comparable ratios), and chunk sizes.

    Returns:
      TokenStatistics of `[B, C]` arrays (nats); entries on padding are finite and meaningless.
    """
    features_BCD = completion_features(policy, params, tokens, mask, completion_length)
    targets_BC = tokens[:, -completion_length:]
    return token_statistics(head_of(policy, params), features_BCD, targets_BC, options)
