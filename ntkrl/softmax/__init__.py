"""Next-token distributions read from features and head, without logits kept for all positions.

Imports `ntkrl.types` and `ntkrl.numerics` only.
"""

from ntkrl.softmax.moments import TokenStatistics
from ntkrl.softmax.passes import logit_statistics, token_statistics
from ntkrl.softmax.tiles import Head, logits

__all__ = ["Head", "TokenStatistics", "logit_statistics", "logits", "token_statistics"]
