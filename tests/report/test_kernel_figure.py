"""Figure and table of a kernel.npz, from made-up arrays."""

import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from ntkrl.report.kernel_figure import draw_kernel, format_kernel, write_kernel


def arrays(count, rows=None, sign=1.0, tied=False, text="What is {}?"):
    """Kernels of round numbers: cosines 0.5 · sign off the diagonal, shares 1 : 3 (: −1)."""
    rows = np.arange(count) if rows is None else rows
    cosines = 0.5 * sign * np.ones((count, count)) + (1 - 0.5 * sign) * np.eye(count)
    result = {"rows": rows, "positions": np.zeros(count, int), "cosines": cosines}
    result["texts"] = np.array([text.format(i) for i in range(rows.max() + 1)])
    result["endings"] = np.array([f" {i}" for i in range(count)])
    weights = {"head": 1.0, "body": 3.0} | ({"cross": -1.0} if tied else {})
    total = sum(weights.values())
    for part, weight in weights.items():
        result[f"trace_{part}"] = weight * np.ones((count, count))
        result[f"share_{part}"] = np.array(
            [weight / total, weight / total if count > 1 else np.nan]
        )
        result[f"frobenius_{part}"] = np.array(10 * weight)
    result["trace_full"] = total * np.ones((count, count))
    result["eigenvalues_head"] = np.linspace(4.0, 1.0, count)
    result["eigenvalues_body"] = np.array([100.0, 10.0, 0.0])
    result["eigenvalues_full"] = np.array([104.0, 14.0, 4.0])
    return result


def axes(figure):
    """Heat map, spectrum and shares (without the colour bar)."""
    top, _, middle, bottom = figure.subfigs
    return top.axes[0], middle.axes[0], bottom.axes[0]


def words(ticks):
    return [tick.get_text() for tick in ticks]


def key(figure):
    """Lines below the heat map."""
    return figure.subfigs[1].texts[0].get_text().split("\n")


def test_panels_are_named():
    """by hand: titles, axis names, eigenvalues and shares of two contexts."""
    figure = draw_kernel(arrays(2))
    assert figure.get_suptitle() == "Neural tangent kernel of 2 contexts"
    titles = [sub.get_suptitle() for sub in figure.subfigs]
    assert titles[0] == "Head kernel R, as cosines of features φ" and all(titles[2:])
    heat, spectrum, shares = axes(figure)
    assert all(axis.get_xlabel() for axis in (heat, spectrum, shares))
    assert spectrum.get_ylabel() == "eigenvalue (logit²/θ²)" and spectrum.get_yscale() == "log"
    assert words(heat.texts) == ["1.00", "0.50", "0.50", "1.00"]
    assert words(heat.get_yticklabels()) == ["0", "1"] and key(figure) == ["0: …0?", "1: …1?"]
    full, body, head = spectrum.lines
    np.testing.assert_array_equal(full.get_ydata(), [104, 14, 4])
    np.testing.assert_array_equal(body.get_ydata(), [100, 10, np.nan])  # 0 has no logarithm
    np.testing.assert_array_equal(head.get_ydata(), [4, 4, 4])  # the largest, V-fold
    assert words(shares.texts) == ["head, R: 0.25"] * 2 + ["body, G: 0.75"] * 2


def test_colours_part_at_zero_where_signs_differ():
    """by hand: diverging from −1 to 1, or one colour from a step below the lowest cosine."""
    (image,) = axes(draw_kernel(arrays(3, sign=-1.0)))[0].images
    assert image.get_cmap().name == "RdBu_r" and image.get_clim() == (-1.0, 1.0)
    (image,) = axes(draw_kernel(arrays(3)))[0].images
    assert image.get_cmap().name == "Blues" and image.get_clim() == pytest.approx((0.45, 1.0))
    assert axes(draw_kernel(arrays(1)))[0].images[0].get_clim() == (0.0, 1.0)


def test_many_contexts_are_numbered_or_named_by_prompt():
    """by hand: 64 prompts by number without words; 64 positions of 4 prompts by their prompt."""
    figure = draw_kernel(arrays(64))
    heat = axes(figure)[0]
    assert not heat.texts and key(figure) == [""]
    assert heat.get_xticks().tolist() == heat.get_yticks().tolist() == list(range(0, 64, 5))
    figure = draw_kernel(arrays(64, np.repeat(np.arange(4), 16)))
    assert key(figure) == ["0–15: …0?", "16–31: …1?", "32–47: …2?", "48–63: …3?"]
    assert len(axes(figure)[0].lines) == 2 * 3  # between prompts, on both axes
    few = draw_kernel(arrays(4, np.repeat(np.arange(2), 2)))
    assert key(few)[1:3] == ["1: ' 1' in: …0?", "2: ' 2' in: …1?"]
    figure = draw_kernel(arrays(12))
    assert len(axes(figure)[0].texts) == 144 and len(key(figure)) == 12


def test_texts_are_readable_and_no_mathematics(tmp_path, recwarn):
    """by hand: long texts without their middle, dollars escaped, white space quoted, no warning."""
    made = arrays(3, text="$x${} and quite some more words")
    assert key(draw_kernel(made))[0] == r"0: \$x\$0 and quite some more words"
    long = "The first words of a prompt " + "word " * 80 + "and the last words, 日本語?"
    made["texts"] = np.array([long, "\n", "b"])
    first, second, *rest = key(draw_kernel(made))
    assert first.startswith("0: The first words of a prompt") and " … " in first + second
    assert second.endswith("and the last words, 日本語?") and rest == [r"1: '\n'", "2: b"]
    write_kernel(tmp_path / "kernel.png", made)
    assert (tmp_path / "kernel.png").read_bytes().startswith(b"\x89PNG") and not recwarn.list


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
@pytest.mark.parametrize("count", [4, 12, 64])
def test_numbers_and_texts_have_room(count):
    """law: by matplotlib's own renderer, with long texts that are not ASCII."""
    text = "Ein längerer Text, der die Achse nicht verschieben darf, mit 数字 {0} und mehr " * 2
    figure = draw_kernel(arrays(count, sign=-1.0, text=text))
    FigureCanvasAgg(figure).draw()
    heat = axes(figure)[0]
    cells = [each.get_window_extent() for each in heat.texts]
    assert len(cells) == (count**2 if count <= 12 else 0)
    pitch = heat.get_window_extent().width / count
    assert all(cell.width <= pitch for cell in cells)
    boxes = [tick.get_window_extent() for tick in heat.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    ticks = {label for tick in figure.findobj(Tick) for label in tick.findobj(Text)}
    for each in set(figure.findobj(Text)) - ticks:
        if each.get_text().strip():
            box = each.get_window_extent()
            assert -1 <= box.x0 and box.x1 <= figure.bbox.width + 1, each.get_text()
    assert heat.get_window_extent().width > 0.5 * figure.bbox.width


def test_cross_part_and_layers():
    """by hand: shares 1/3, 1, −1/3; a row per part and per layer; missing values are a dash."""
    made = arrays(2, tied=True)
    made |= {"layers": np.array(["layer 0"]), "trace_layers": 1.5 * np.ones((1, 2, 2))}
    shares = axes(draw_kernel(made))[2]
    assert words(shares.texts)[-2:] == ["cross: −0.33"] * 2
    made["share_cross"][0] = -0.001
    assert words(axes(draw_kernel(made))[2].texts)[-2] == "cross: 0.00"
    rows = [line.split() for line in format_kernel(made).splitlines()]
    assert ["head,", "R", "1", "0.333", "1", "0.333", "10", "4"] in rows
    assert ["cross", "-1", "-0.333", "-1", "-0.333", "-10", "–"] in rows
    assert ["full,", "K", "3", "1", "3", "1", "–", "104"] in rows
    assert ["layer", "0", "1.5", "0.5", "1.5", "0.5"] in rows
    assert rows[-1][-5:] == ["0.500,", "from", "0.500", "to", "0.500"]


def test_a_single_context_has_no_other():
    """by hand: no share and no cosine between two contexts."""
    assert words(axes(draw_kernel(arrays(1)))[2].texts) == ["head, R: 0.25", "body, G: 0.75"]
    text = format_kernel(arrays(1))
    assert "cosines" not in text and "nan" not in text
