"""Figure and table of a kernel.npz, from made-up arrays."""

import numpy as np
import pytest

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
    top, middle, bottom = figure.subfigs
    return top.axes[0], middle.axes[0], bottom.axes[0]


def words(ticks):
    return [tick.get_text() for tick in ticks]


def test_panels_are_named():
    """by hand: titles, axis names, eigenvalues and shares of two contexts."""
    figure = draw_kernel(arrays(2))
    assert figure.get_suptitle() == "Neural tangent kernel of 2 contexts"
    titles = [sub.get_suptitle() for sub in figure.subfigs]
    assert titles[0] == "Head kernel R, as cosines of features φ" and all(titles)
    heat, spectrum, shares = axes(figure)
    assert all(axis.get_xlabel() for axis in (heat, spectrum, shares))
    assert spectrum.get_ylabel() == "eigenvalue (logit²/θ²)" and spectrum.get_yscale() == "log"
    assert words(heat.texts) == ["1.00", "0.50", "0.50", "1.00"]
    assert words(heat.get_yticklabels()) == ["…0?  0", "…1?  1"]
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
    heat = axes(draw_kernel(arrays(64)))[0]
    assert not heat.texts and "?" not in "".join(words(heat.get_yticklabels()))
    heat = axes(draw_kernel(arrays(64, np.repeat(np.arange(4), 16))))[0]
    assert words(heat.get_yticklabels()) == [f"…{i}?" for i in range(4)]
    np.testing.assert_allclose(heat.get_yticks(), [7.5, 23.5, 39.5, 55.5])
    assert len(heat.lines) == 2 * 3  # between prompts, on both axes
    few = axes(draw_kernel(arrays(4, np.repeat(np.arange(2), 2))))[0]
    assert words(few.get_yticklabels()) == ["0  0", "1  1", "2  2", "3  3"]  # tokens, numbers


def test_words_are_short_and_no_mathematics(tmp_path, recwarn):
    """by hand: 13 characters, wide ones counted twice, dollars escaped, no font warnings."""
    made = arrays(3, text="$x${} and quite some more words")
    assert words(axes(draw_kernel(made))[0].get_yticklabels())[0] == r"\$x\$0 and qui…  0"
    made["texts"] = np.array(["日本語日本語日本語日本語", "\n", "b"])
    labels = words(axes(draw_kernel(made))[0].get_yticklabels())
    assert labels == ["日本語日本語…  0", r"'\n'  1", "b  2"]
    write_kernel(tmp_path / "kernel.png", made)
    assert (tmp_path / "kernel.png").read_bytes().startswith(b"\x89PNG") and not recwarn.list


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
