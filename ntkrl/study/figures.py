"""What a study draws beside the figures of a report."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ntkrl.report import MARKERS, PALETTE, panels
from ntkrl.study import results as found
from ntkrl.study.results import Results
from ntkrl.study.similarity import KINDS, read_similarities

STEPS = {"sgd": "everything", "sgd_head": "the head alone"}


def errors(results: Results, size: str) -> Figure | None:
    """Draw the relative error of the first-order prediction over the rate of one SGD step."""
    rates, curves = np.array(results.study.sgd_rates), {}
    for arm, words in STEPS.items():
        rows = [
            results.over_seeds(size, f"{arm}_{i}", found.mean_of("predict/relative_error"))
            for i in range(len(rates))
        ]
        if np.isfinite(rows).any():
            curves[words] = np.array(rows)
    if not curves:
        return None
    figure, (axis,) = panels(1, "First-order error of one step of SGD")
    for i, (words, rows) in enumerate(curves.items()):
        axis.plot(rates, rows, color=PALETTE[i], linewidth=0.7, alpha=0.5)
        middle = np.nanmean(rows, axis=1)
        look = {"color": PALETTE[i], "marker": MARKERS[i], "linewidth": 2.2}
        axis.plot(rates, middle, label=f"moving {words}", **look)
    whole = next(iter(curves.values()))
    guide = np.nanmean(whole[0]) * rates / rates[0]
    axis.plot(rates, guide, color="#555555", linestyle="--", label="slope 1")
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("learning rate", fontsize=12)
    axis.set_ylabel("‖actual − predicted‖/‖actual‖", fontsize=12)
    axis.legend(fontsize=11, frameon=False)
    return figure


def layers(results: Results, size: str) -> Figure | None:
    """Draw the cosines of features by depth, before and after training, a panel per kind."""
    curves: dict[str, list[dict[str, list[float]]]] = {}
    for arm in ("base", "rl", "cfrl"):
        places = [results.study.place(size, arm, seed) for seed in results.study.seeds]
        held = [read_similarities(place / "similarity.json") for place in places]
        if any(one is not None for one in held):
            curves[arm] = [one for one in held if one is not None]
    if not curves:
        return None
    figure, axes = panels(len(KINDS), "Similarity of features by depth")
    for axis, kind in zip(axes, KINDS, strict=True):
        for i, (arm, held) in enumerate(curves.items()):
            rows = np.array([one[kind] for one in held])
            depth = 1 + np.arange(rows.shape[1])
            look = {"color": PALETTE[i], "marker": MARKERS[i], "linewidth": 2.2}
            axis.plot(depth, rows.mean(axis=0), label=arm, **look)
            low, high = rows.min(axis=0), rows.max(axis=0)
            axis.fill_between(depth, low, high, color=PALETTE[i], alpha=0.18, linewidth=0)
        axis.set_ylabel(f"cosine,\n{kind.replace('_', ' ')}", fontsize=12)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("layers before the final norm", fontsize=12)
    axes[-1].legend(fontsize=11, frameon=False)
    return figure
