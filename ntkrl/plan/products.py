"""FLOPs of the matrix products in HLO: a dot, or a convolution, as TPUs write one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

# as a dot says it, or a call of cuBLAS
CONTRACTED = re.compile(r'lhs_contracting_(?:dims=|dimensions":)[{[]([\d,"]*)[]}]')
WINDOW = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}

Shape = Sequence[int]


def product_flops(left: Shape, right: Shape, out: Shape, rest: str) -> float:
    """Count the FLOPs of a product: two for each pair of entries multiplied.

    In a convolution the batch axes of a product are windows, mostly dilated.

    Args:
      left, right, out: shapes of operands and result.
      rest: the instruction's attributes.
    """
    if contracted := CONTRACTED.search(rest):
        return 2.0 * math.prod([*out, *(left[int(n)] for n in re.findall(r"\d+", contracted[1]))])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    found = re.search(r"window=\{([^}]*)\}", rest)
    window = dict(entry.split("=") for entry in found[1].split()) if found else {}
    size = dict(zip(labels[3], out, strict=True))
    total = 2.0 * size["b"] * size["f"] * right[labels[2].index("i")]
    for axis in range(len(out) - 2):
        taps, stride, before, dilated, spread = (
            int(window[name].split("x")[axis].split("_")[0]) if name in window else default
            for name, default in WINDOW.items()
        )
        places = np.arange(size[str(axis)])[:, None] * stride + np.arange(taps) * spread - before
        last = (left[labels[1].index(str(axis))] - 1) * dilated
        total *= np.count_nonzero((places >= 0) & (places <= last) & (places % dilated == 0))
    return float(total)
