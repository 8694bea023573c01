"""Tests of the figures."""

import dataclasses

import numpy as np
import pytest

from ntkrl.report import read_run
from ntkrl.report.curves import agreement, pooled_changes
from ntkrl.report.figures import FIGURES
from ntkrl.report.plotting import coinciding, looks, shown

DRAW = {spec.stem: spec.draw for spec in FIGURES}


@pytest.fixture
def runs(run_paths):
    """The four synthetic runs, read."""
    return [read_run(path) for path in run_paths]


def test_every_figure_is_drawn_and_labelled(runs):
    """Law: every figure has data, a title, and named axes with units or plain words."""
    for spec in FIGURES:
        figure = spec.draw(runs)
        assert figure.get_suptitle() == spec.title
        bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
        assert all(bar.get_ylabel() or bar.get_xlabel() for bar in bars)
        axes = [axis for axis in figure.axes if axis not in bars]
        assert all(axis.get_ylabel() for axis in axes) and axes[-1].get_xlabel()
    assert len({spec.stem for spec in FIGURES}) == len(FIGURES)


def test_no_data_no_figure(runs):
    """Law: without metrics, probes and ledgers every figure is None."""
    for run in runs:
        run.metrics.clear()
        run.probes.clear()
        run.ledgers.clear()
    assert [spec.draw(runs) for spec in FIGURES] == [None] * len(FIGURES)


def test_mean_and_stage_line_by_hand(runs):
    """By hand: the bold line is the mean of seeds, and a dashed line marks the stage's end."""
    (axis,) = DRAW["reward"](runs).axes
    bold = [line for line in axis.lines if line.get_linewidth() == 2.2]
    assert len(bold) == 2
    np.testing.assert_array_equal(bold[1].get_xdata(), [0, 5, 10, 15, 20])
    # Seeds are 0.1 apart: mean 0.15 + 0.02 · step.
    np.testing.assert_allclose(bold[1].get_ydata(), [0.15, 0.25, 0.35, 0.45, 0.55])
    assert any(list(line.get_xdata()) == [8, 8] for line in axis.lines)
    assert [text.get_text() for text in axis.texts] == ["stage “classifier” ends"]


def test_stages_of_several_lengths_are_named_once(runs):
    """By hand: two dashed lines, one name; names on top of each other cannot be read."""
    cfrl = next(run for run in runs if run.name == "cfrl")
    lines = [
        {**line, "stage": "classifier" if line["step"] <= 12 else "all"} for line in cfrl.metrics
    ]
    longer = dataclasses.replace(cfrl, name="longer", metrics=lines)
    (axis,) = DRAW["reward"]([*runs, longer]).axes
    dashed = {line.get_xdata()[0] for line in axis.lines if line.get_linewidth() == 1.1}
    assert dashed == {8, 12}
    assert [text.get_text() for text in axis.texts] == ["stage “classifier” ends"]


def test_cross_share_has_a_panel_when_there_is_one(runs):
    """By hand: two panels without a tied head, three with."""
    assert len(DRAW["head_share"](runs).axes) == 2
    runs[0].metrics[-1]["predict/cross_share"] = 0.1
    assert len(DRAW["head_share"](runs).axes) == 3


def test_curves_of_parts_by_hand(runs):
    """By hand: a panel per method, a line per family or part that is there, mean over seeds."""
    runs[0].metrics[-1]["probe/own/log_prob"] = -2.0
    upper, lower = DRAW["probe_families"](runs).axes
    assert [len(axis.lines) for axis in (upper, lower)] == [2 + 1, 2]  # cfrl's stage ends too
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [-1, -1, -1, -1, -1.5])
    np.testing.assert_allclose(lower.lines[1].get_ydata(), [-5, -5.5, -6, -6.5, -7])
    words = [text.get_text() for text in DRAW["ledger_shares"](runs).legends[0].get_texts()]
    assert words == ["R (head)", "G (body)", "momentum", "decay", "KL, in R and G", "curvature"]


def test_similarity_by_hand(runs):
    """By hand: completions are numbered from 1; colours reach as far as the cosines do."""
    for count, step in ((5, 5), (25, 10)):
        cosines = 0.31 * np.eye(count) - 0.02
        for run in runs:
            run.probes[step]["cosines"] = cosines
    first, last = DRAW["feature_similarity"](runs[:1]).axes[:2]
    assert [tick.get_text() for tick in first.get_xticklabels()] == [*"12345"]
    assert [tick.get_text() for tick in last.get_yticklabels()] == ["1", "10", "20"]
    assert last.get_yticks().tolist() == [0, 9, 19]
    assert last.images[0].get_clim() == (-0.3, 0.3)
    for run in runs:
        for step in (5, 10):
            run.probes[step]["cosines"] = 0.5 + 0.1 * np.eye(5)
    assert DRAW["feature_similarity"](runs[:1]).axes[0].images[0].get_clim() == (0.45, 0.6)


def test_sampling_curves_by_hand(runs):
    """By hand: dashed at step 0, bold at the last step, a band over two seeds 0.1 apart."""
    pass_at, best_of = DRAW["sampling_curves"](runs[:2]).axes
    assert pass_at.get_xlabel() == "samples per prompt, k"
    start, end = best_of.lines
    np.testing.assert_array_equal(end.get_xdata(), [1, 2, 4])
    np.testing.assert_allclose(start.get_ydata(), [0.15, 0.25, 0.45])
    np.testing.assert_allclose(end.get_ydata(), [0.35, 0.45, 0.65])
    band = best_of.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [0.3, 0.7])
    np.testing.assert_allclose(pass_at.lines[1].get_ydata(), [0.5, 0.75, 0.9375])
    del runs[0].metrics[1:]
    (start,) = DRAW["sampling_curves"](runs[:1]).axes[0].lines  # the start must not pose as the end
    assert start.get_linestyle() == "--"


def test_prediction_by_hand(runs):
    """By hand: predicted w, actual 1.25 w: correlation 1 and error 0.25 / 1.25 = 0.2."""
    predicted, actual = pooled_changes([run.probes for run in runs[:2]])
    assert predicted.shape == (2 * 2 * 50,)
    assert agreement(predicted, actual) == pytest.approx((1.0, 0.2))
    titles = [axis.get_title(loc="left") for axis in DRAW["predicted_actual"](runs).axes]
    assert titles == [f"{n}: correlation 1.000, rel. error 0.200" for n in ("cfrl", "rl")]


def test_cross_part_is_part_of_the_prediction(runs):
    """By hand: head 0.3 w + body 0.7 w + cross 0.25 w is the actual 1.25 w."""
    for arrays in runs[0].probes.values():
        arrays["predicted_cross"] = arrays["actual"] - arrays["actual"] / 1.25
    assert agreement(*pooled_changes([runs[0].probes])) == pytest.approx((1.0, 0.0), abs=1e-12)


def test_constant_change_has_no_correlation():
    """By hand: nothing moved, so correlation and relative error are undefined, not errors."""
    assert np.isnan(agreement(np.zeros(3), np.zeros(3))).all()


def test_coinciding_by_hand():
    """By hand: the mean is taken only where all seeds were measured."""
    curves = [
        (np.array([0, 1, 3]), np.array([1.0, 2.0, 4.0])),
        (np.array([1, 2, 3]), np.array([5.0, 6.0, 7.0])),
    ]
    steps, values = coinciding(curves)
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(values, [[2.0, 4.0], [5.0, 7.0]])


def test_looks(runs):
    """Law: a method keeps its style whatever the order of runs; two methods differ."""
    assert looks(runs) == looks(runs[::-1])
    assert len(set(looks(runs).values())) == 2


def test_dollars_are_not_mathematics():
    """By hand: a dollar sign is escaped after shortening, other text is left alone."""
    assert shown("a$b$") == r"a\$b\$"
    assert shown("abcdef", 4) == "abc…"
