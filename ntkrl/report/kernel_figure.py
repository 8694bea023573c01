"""Figure and table of the kernels in a `kernel.npz`, as `ntkrl kernel` writes it."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from ntkrl import durable_files
from ntkrl.report.figure_text import POINTS, TickNumbers, families, fitted
from ntkrl.report.plotting import (
    MARKERS,
    PALETTE,
    REFERENCE_GREY,
    WIDTH_INCHES,
    dress,
    figure_bytes,
    label_bar,
    titled_figure,
)

Arrays = Mapping[str, np.ndarray]

PARTS = ("head", "body", "cross", "full")
NAMES = {"head": "head, R", "body": "body, G", "cross": "cross", "full": "full, K"}
COLORS = {"head": PALETTE[0], "body": PALETTE[1], "cross": PALETTE[2], "full": "#000000"}
KEY_LINES = 16
"""Most contexts, or else prompts, named below the heat map."""
KEY_CHARACTERS = 110
"""Of a text in the key; of a longer one the middle is left out."""
KEY_SIZE, KEY_SPACING = 9, 1.35
"""Points, and height of a line in these."""
ANNOTATED_CONTEXTS = 12
"""Most contexts whose cosines are written into the cells."""


def write_kernel(path: Path, arrays: Arrays) -> None:
    """Draw the arrays of a kernel.npz into a PNG."""
    with durable_files.replacing(path) as file:
        file.write(figure_bytes(draw_kernel(arrays), "png"))


def draw_kernel(arrays: Arrays) -> Figure:
    """Draw the cosines of features, the largest eigenvalues, and the shares of the parts."""
    count = len(arrays["positions"])
    title = f"Neural tangent kernel of {count} context{'s' if count > 1 else ''}"
    key = _key(arrays)
    inches = KEY_SIZE * KEY_SPACING / POINTS * (1 + key.count("\n")) + 0.15 if key else 0.01
    figure = titled_figure(title, 9.4 + inches)
    heights = (4.4, inches, 2.6, 2.1)
    top, below, middle, bottom = np.asarray(figure.subfigures(4, 1, height_ratios=heights))
    _draw_cosines(_titled(top, "Head kernel R, as cosines of features φ"), arrays)
    style = {"fontsize": KEY_SIZE, "linespacing": KEY_SPACING, "fontfamily": families()}
    below.text(0.03, 1.0, key, va="top", **style)
    spectrum = _titled(middle, "Largest eigenvalues")
    shares = _titled(bottom, "Shares of the parts in the kernel")
    for axis, name, draw in (
        (spectrum, "eigenvalues_full", _draw_spectrum),
        (shares, "share_body", _draw_shares),
    ):
        if name in arrays:
            draw(axis, arrays)
        else:
            axis.set_axis_off()
            axis.text(0.5, 0.5, "not computed", ha="center", fontsize=12)
    return figure


def format_kernel(arrays: Arrays) -> str:
    """Format parts and groups of a kernel as a table: mean traces, shares, norms, λ₁."""
    titles = ("mean tr K(o,o)", "share", "mean tr K(o,u)", "share", "norm", "largest λ")
    lines = [f"{'part':<14}" + "".join(f"{title:>15}" for title in titles)]
    lines.append("-" * len(lines[0]))
    for part in PARTS:
        if f"trace_{part}" in arrays:
            cells = _traces(arrays[f"trace_{part}"], arrays.get("trace_full"))
            for name in (f"frobenius_{part}", f"eigenvalues_{part}"):
                cells.append(float(arrays[name].flat[0]) if name in arrays else np.nan)
            lines.append(_line(NAMES[part], cells))
    if "layers" in arrays:
        lines.append("")
        for name, trace in zip(arrays["layers"], arrays["trace_layers"], strict=True):
            lines.append(_line(str(name), _traces(trace, arrays["trace_full"])))
    off = arrays["cosines"][~np.eye(len(arrays["cosines"]), dtype=bool)]
    if off.size:
        lines.append(
            f"\ncosines of the features of two contexts: mean {off.mean():.3f}, from "
            f"{off.min():.3f} to {off.max():.3f}"
        )
    return "\n".join(lines)


def _traces(part: np.ndarray, full: np.ndarray | None) -> list[float]:
    """Return mean and share of a part's traces on, and then off the diagonal; NaN for none."""
    cells = []
    for entries in (np.eye(len(part), dtype=bool), ~np.eye(len(part), dtype=bool)):
        some = entries.any()
        cells.append(float(part[entries].mean()) if some else np.nan)
        share = np.nan
        if some and full is not None:
            share = float(part[entries].sum() / full[entries].sum())
        cells.append(share)
    return cells


def _line(name: str, cells: list[float]) -> str:
    texts = ["–" if np.isnan(cell) else f"{cell:.3g}" for cell in cells]
    return f"{name:<14.14}" + "".join(f"{text:>15}" for text in texts)


def _titled(figure: SubFigure, title: str) -> Axes:
    figure.suptitle(title, fontsize=12, x=0.02, ha="left")
    return figure.subplots()


def _draw_cosines(axis: Axes, arrays: Arrays) -> None:
    """Draw the cosines as a heat map; two colours around 0 where signs differ."""
    cosines = arrays["cosines"]
    count, signed = len(cosines), cosines.min() < 0
    # a step below the lowest, to distinguish it from white; a single cosine of 1 starts at 0
    low = -1.0 if signed else float(np.floor(20 * cosines.min() - 0.5) / 20)
    low = low if count > 1 else 0.0
    image = axis.imshow(
        cosines, cmap="RdBu_r" if signed else "Blues", vmin=low, vmax=1.0, interpolation="nearest"
    )
    axis.tick_params(labelsize=10, length=2)
    axis.set_xlabel("context u", fontsize=12)
    axis.set_ylabel("context o", fontsize=12)
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02, format=TickNumbers())
    bar.ax.tick_params(labelsize=10)
    bar.outline.set_visible(False)
    axis.spines[:].set_visible(False)
    _label_contexts(axis, arrays)
    if count <= ANNOTATED_CONTEXTS:
        size = 9 if count <= 8 else 7
        for o, u in np.ndindex(count, count):
            dark = abs(cosines[o, u] - (0.0 if signed else low)) > 0.6 * (1.0 - max(low, 0.0))
            color = "white" if dark else "black"
            text = _two_digits(float(cosines[o, u]))
            axis.text(u, o, text, ha="center", va="center", fontsize=size, color=color)


def _label_contexts(axis: Axes, arrays: Arrays) -> None:
    """Number the contexts as in the arrays, and draw lines between those of different prompts."""
    count, starts = len(arrays["rows"]), _starts(arrays)
    every = 1 if count <= KEY_LINES else -(-count // 80) * 5
    axis.set_xticks(range(0, count, every))
    axis.set_yticks(range(0, count, every))
    if len(starts) < count:
        for start in starts[1:]:
            axis.axhline(start - 0.5, color="white", linewidth=1.0)
            axis.axvline(start - 0.5, color="white", linewidth=1.0)


def _starts(arrays: Arrays) -> np.ndarray:
    """Return the first context of each prompt."""
    rows = arrays["rows"]
    return np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])


def _key(arrays: Arrays) -> str:
    """Return the texts of the contexts by number, or of the prompts by range; "" for too many."""
    rows, count, starts = arrays["rows"], len(arrays["rows"]), _starts(arrays)
    texts = _without_shared_start([str(text) for text in arrays["texts"]])
    if len(starts) == count:
        pairs = [(str(i), texts[row]) for i, row in enumerate(rows)]
    elif count <= KEY_LINES:
        endings = [repr(str(ending)) for ending in arrays["endings"]]
        pairs = [(str(i), f"{endings[i]} in: {texts[row]}") for i, row in enumerate(rows)]
    else:
        ends = np.r_[starts[1:], count] - 1
        pairs = [(f"{a}–{b}", texts[rows[a]]) for a, b in zip(starts, ends, strict=True)]
    if len(pairs) > KEY_LINES:
        return ""
    lines = [
        fitted(f"{number}: {_readable(text)}", KEY_SIZE, 0.9 * WIDTH_INCHES)
        for number, text in pairs
    ]
    return "\n".join(line.replace("\n", "\n      ") for line in lines)


def _without_shared_start(texts: list[str]) -> list[str]:
    """Return texts without their common prefix, such as a template's."""
    shared = len(os.path.commonprefix(texts)) if len(texts) > 1 else 0
    return [f"…{text[shared:]}" for text in texts] if shared > 6 else texts


def _readable(text: str) -> str:
    """Return a text on a line, without the middle of a long one; white space alone is quoted."""
    line = " ".join(text.split())
    if len(line) > KEY_CHARACTERS:
        first = KEY_CHARACTERS // 3
        line = f"{line[:first]} … {line[first - KEY_CHARACTERS :]}"
    return line if line else repr(text)


def _two_digits(value: float) -> str:
    # adding 0 removes the sign of −0
    return f"{round(float(value), 2) + 0.0:.2f}".replace("-", "−")


def _draw_spectrum(axis: Axes, arrays: Arrays) -> None:
    """Draw the largest eigenvalues of head, body and full kernel."""
    dress(axis)
    count = len(arrays["eigenvalues_full"])
    rank = np.arange(1, count + 1)
    for part, marker, size in (("full", MARKERS[0], 7), ("body", MARKERS[1], 4)):
        values = np.where(arrays[f"eigenvalues_{part}"] > 0, arrays[f"eigenvalues_{part}"], np.nan)
        axis.plot(
            rank, values, color=COLORS[part], marker=marker, markersize=size, label=NAMES[part]
        )
    # the largest has multiplicity V, so it covers every rank drawn
    head = float(arrays["eigenvalues_head"][0])
    axis.plot(
        rank, np.full(count, head), color=COLORS["head"], linestyle="--", label="head, R (V-fold)"
    )
    axis.set_yscale("log")
    axis.locator_params(axis="x", integer=True)
    axis.set_xlabel("rank", fontsize=12)
    axis.set_ylabel("eigenvalue (logit²/θ²)", fontsize=12)
    axis.legend(fontsize=11, frameon=False)


def _draw_shares(axis: Axes, arrays: Arrays) -> None:
    """Draw the parts' shares of the trace, within a context and between two."""
    dress(axis)
    axis.grid(False, axis="y")
    parts = [part for part in PARTS if f"share_{part}" in arrays]
    groups = ("one context\n(o = u)", "two contexts\n(o ≠ u)")
    height = 0.8 / len(parts)
    for i, part in enumerate(parts):
        places = np.arange(2) + (i - (len(parts) - 1) / 2) * height
        shares = arrays[f"share_{part}"]
        axis.barh(places, np.nan_to_num(shares), 0.9 * height, color=COLORS[part])
        for place, share in zip(places, shares, strict=True):
            if np.isfinite(share):
                text = f"{NAMES[part]}: {_two_digits(share)}"
                label_bar(axis, max(share, 0.0), place, text)
    axis.axvline(0, color=REFERENCE_GREY, linewidth=0.8)
    axis.set_yticks(range(2), groups)
    axis.invert_yaxis()
    axis.set_xlabel("share of Σ tr K", fontsize=12)
    low, high = axis.get_xlim()
    high = max(high, 1.0)
    ticks = np.asarray(MaxNLocator(5).tick_values(low, high))
    axis.set_xticks(ticks[(ticks >= low) & (ticks <= high)])
    axis.set_xlim(low, low + 1.32 * (high - low))  # room for the words at the bars
