"""Texts of figures: numbers of ticks, and lines that fit."""

import dataclasses

import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from ntkrl.report import read_run
from ntkrl.report.figure_text import MAX_CHARACTERS, fitted, plain, short_exponent, tick_texts
from ntkrl.report.figures import FIGURES
from tests.report.conftest import write_run

LONG_NAMES = (
    "classifier first, then all parameters, with a very long warm-up and the KL in the loss",
    "a_name_without_any_space_" * 6,
    "日本語の名前 " * 8 + "$x$ <b>",
)
SHAPES = {"reward", "predicted_actual", "ledger_shares", "influence", "feature_similarity"}
"""Figures of different layouts; the other ones repeat them and are drawn by the slow suite."""
STAGE = "the classifier alone, until the reward of the last forty steps stands still"
every_figure = pytest.mark.parametrize(
    "stems",
    [
        pytest.param(SHAPES, id="some"),
        pytest.param({s.stem for s in FIGURES} - SHAPES, id="rest", marks=pytest.mark.slow),
    ],
)


def test_numbers_of_ticks_by_hand():
    """By hand: three digits, or as many as distinguish the ticks; no offset, no power apart."""
    assert tick_texts([0, 0.25, 0.5]) == ["0", "0.25", "0.5"]
    assert tick_texts([-2e-5, 0, 2e-5]) == ["−2e−5", "0", "2e−5"]
    # matplotlib writes these as 1, 2 and 3 with "1e−5 + 1e1" at the end of the axis
    assert tick_texts([10.00001, 10.00002, 10.00003]) == ["10.00001", "10.00002", "10.00003"]
    # 1e-17 in place of 0 is rounding
    assert tick_texts(np.linspace(-0.3, 0.3, 5)) == ["−0.3", "−0.15", "0", "0.15", "0.3"]
    assert short_exponent("1e-05") == "1e-5" and short_exponent("2e+10") == "2e10"


def test_lines_by_hand():
    """By hand: broken between words, inside a word only where it is longer than a line."""
    assert fitted("a b", 11, 3.0) == "a b"
    lines = fitted("reward " * 12, 11, 2.0).split("\n")
    assert len(lines) > 2 and {word for line in lines for word in line.split()} == {"reward"}
    assert len(fitted("m" * 80, 11, 2.0).split("\n")) > 3
    assert fitted("costs $5\n\x1b[31m", 11, 3.0) == r"costs \$5 ?[31m"
    assert fitted("", 11, 3.0) == ""
    assert len(plain("x" * 999)) == MAX_CHARACTERS and plain("x" * 999).endswith("…")


@pytest.fixture
def named_runs(tmp_path):
    """Methods of long names, one with a stage of a long name."""
    runs = []
    for number, name in enumerate(LONG_NAMES):
        run = read_run(write_run(tmp_path / str(number), "rl", 0, staged=number == 0))
        rename = {"classifier": STAGE}
        lines = [
            line | ({"stage": rename.get(line["stage"], "all")} if "stage" in line else {})
            for line in run.metrics
        ]
        runs.append(dataclasses.replace(run, name=name, metrics=lines))
    return runs


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
@every_figure
def test_long_names_are_complete_and_inside(named_runs, stems):
    """Law: by matplotlib's own renderer, every text lies inside its figure, and none is cut."""
    for spec in (spec for spec in FIGURES if spec.stem in stems):
        figure = spec.draw(named_runs)
        figure.set_dpi(60)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = figure.bbox.width, figure.bbox.height
        ticks = {label for tick in figure.findobj(Tick) for label in tick.findobj(Text)}
        for text in set(figure.findobj(Text)) - ticks:
            if not text.get_visible() or not text.get_text().strip():
                continue
            assert "…" not in text.get_text(), spec.stem
            box = text.get_window_extent(canvas.get_renderer())
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, (spec.stem, text.get_text(), box)
        axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
        assert all(axis.get_window_extent().height > 20 for axis in axes), spec.stem


@every_figure
def test_no_axis_has_an_offset(run_paths, stems):
    """Law: metrics that differ in their sixth digit have ticks that are read without a sum."""
    runs = [read_run(path) for path in run_paths]
    for run in runs:
        for line in run.metrics:
            numbers = [name for name, v in line.items() if isinstance(v, float) and "@" not in name]
            line |= {name: 10 + 1e-5 * line[name] for name in numbers}
    for spec in (spec for spec in FIGURES if spec.stem in stems):
        figure = spec.draw(runs)
        FigureCanvasAgg(figure).draw()
        for axis in figure.axes:
            for side in (axis.xaxis, axis.yaxis):
                assert side.get_offset_text().get_text() == "", spec.stem
                labels = [label.get_text() for label in side.get_ticklabels() if label.get_text()]
                assert len(set(labels)) == len(labels), (spec.stem, labels)
