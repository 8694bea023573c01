"""Statistics of next-token distributions from features and output head, in chunks.

Logits exist for one chunk of positions × vocabulary rows at a time, also in the backward pass.
Imports `ntkrl.types` and `ntkrl.numerics` only.
"""

from ntkrl.softmax.online_sums import TokenStatistics
from ntkrl.softmax.tiling import (
    OutputHead,
    Tile,
    logits,
    slice_tile,
    tile_count,
    tile_logits,
)
from ntkrl.softmax.token_statistics import (
    DEFAULT_OPTIONS,
    SoftmaxOptions,
    logit_statistics,
    token_statistics,
)
