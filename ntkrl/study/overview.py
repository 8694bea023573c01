"""Sections of a study's page: figures and paired comparisons of groups of arms."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from ntkrl import report
from ntkrl.study.results import Results

DOTS_PER_INCH = 82
COLORS = 16
"""Resolution and palette of the figures: a page of a dozen stays below 300 kB."""


class ArmGroup(NamedTuple):
    """Arms that are compared with each other.

    title: of the section.
    arms: their names.
    figures: stems of `report.FIGURES`.
    """

    title: str
    arms: tuple[str, ...]
    figures: tuple[str, ...]


def group_sections(results: Results, group: str, arm_groups: Sequence[ArmGroup]) -> list[str]:
    """Return a section per group of arms, of those with runs of two arms or more."""
    sections = []
    for title, arms, stems in arm_groups:
        runs = [run for arm in arms for run in results.runs(group, arm) if run is not None]
        if len({run.name for run in runs}) < 2:
            continue
        figures = []
        for spec in report.FIGURES:
            figure = spec.draw(runs) if spec.stem in stems else None
            if figure is not None:
                figures.append(figure_html(f"{group}-{title}-{spec.stem}", figure, spec.caption))
        sections.append(report.group_section(title, figures, report.comparison_table(runs)))
    return sections


def figure_html(name: str, figure: Figure, caption: str) -> str:
    """Return a figure for the page, in few colours to keep the page small."""
    buffer, stem = io.BytesIO(), name.replace(" ", "_")
    with Image.open(io.BytesIO(report.figure_bytes(figure, "png", DOTS_PER_INCH))) as image:
        palette = image.convert("RGB").quantize(COLORS, Image.Quantize.FASTOCTREE)
        palette.save(buffer, "png", optimize=True)
    return report.figure_section(stem, stem, caption, buffer.getvalue())
