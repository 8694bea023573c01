"""The report page in a real browser: its script's behaviour and its legibility."""

import json
import re

import numpy as np
import pytest

from ntkrl.report import write_report
from tests import browser
from tests.report.conftest import LENGTH, SAMPLES, ledger_arrays, write_ledger, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.find() is None, reason="needs Chromium (apt install chromium)"),
]
WIDTHS = (390, 1200)
PARTS = ("actual", "R", "G", "momentum", "decay", "optimizer", "curvature")

# text and what lies behind it, all layers down to an opaque one laid over each other
CONTRASTS = """() => {
  const channels = (color) => {
    const found = color.match(/[\\d.]+/g).map(Number);
    return found.length > 3 ? found : [...found, 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const color = channels(getComputedStyle(element).backgroundColor);
    return color[3] === 1 ? color.slice(0, 3) : over(color, behind(element.parentElement));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const shown = element.closest("option") ? element.closest("select") : element;
    if (!text || !shown.getClientRects().length || shown.closest("script, noscript")) continue;
    const ground = behind(shown);
    const pair = [light(over(channels(getComputedStyle(shown).color), ground)), light(ground)];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    found.push({ ratio, text: text.slice(0, 40), className: shown.className });
  }
  return found;
}"""
# what reaches beyond the window, or is cut off, outside the boxes that scroll
OUTSIDE = """() => [...document.querySelectorAll("body *")].filter((element) => {
  if (element.parentElement.closest(".scroll, .details, select, svg")) return false;
  const { left, right, width } = element.getBoundingClientRect();
  const cut = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0
    && !element.matches(".scroll, select, input") && getComputedStyle(element).display !== "inline";
  return width > 0 && (left < -0.5 || right > document.documentElement.clientWidth + 0.5 || cut);
}).map((element) => `${element.tagName}.${element.className}`)"""
TEXTS = "(selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent)"
CELLS = (
    """() => [...document.querySelectorAll(".map td")].map((c) => c.getAttribute("aria-label"))"""
)
TINTS = "() => [...document.querySelectorAll('.tokens span')].map((c) => c.style.backgroundColor)"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of two runs with long, odd texts; the first has a ledger by group too."""
    place = tmp_path_factory.mktemp("report")
    runs = [write_run(place / name, name, 0, name == "cfrl") for name in ("cfrl", "rl")]
    stored = json.loads((runs[0] / "probes" / "set.json").read_text())
    stored["prompts"][1] = "word" * 200
    stored["completions"][1]["tokens"] = ["\n", "", "x" * 120, *["<i>"] * (LENGTH - 3)]
    for run in runs:
        (run / "probes" / "set.json").write_text(json.dumps(stored))
    write_ledger(runs[0], 15, 0, by="group")
    return write_report(runs, place / "out")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser for all tests here."""
    with browser.Browser(browser.find(), tmp_path_factory.mktemp("profile")) as result:
        yield result


@pytest.fixture
def page(chromium, report):
    """Open the page; a test that is done with it has had no complaint."""
    opened = []

    def show(width=1200, dark=False):
        opened.append(browser.Page(chromium, report, width, dark))
        return opened[0]

    yield show
    assert opened[0].complaints() == []


@pytest.fixture
def by_sample(page):
    """The page at step 10, the last that keeps samples apart."""
    shown = page()
    move(shown, "ArrowLeft")
    return shown


def move(shown, key):
    """Press a key at the slider."""
    shown.run("() => document.querySelector('input[type=range]').focus()")
    shown.press(key)


def choose(shown, number, key="ArrowDown"):
    """Press a key at a list of choices."""
    shown.run("(n) => document.querySelectorAll('select')[n].focus()", number)
    shown.press(key)


def influence(step):
    """By hand: Σ over a completion's tokens of all terms `[B, S]`, samples by advantage."""
    arrays = ledger_arrays(step)
    terms = sum(arrays[f"log_prob/{t}/{g}"] for t in ("policy", "kl") for g in ("head", "body"))
    return terms.reshape(-1, LENGTH, SAMPLES).sum(axis=1).T[::-1]


def parts(step, measure="log_prob"):
    """By hand: `[O]` per part."""
    arrays = ledger_arrays(step)
    result = {
        role: sum(arrays[f"{measure}/{term}/{group}"].sum(axis=1) for term in ("policy", "kl"))
        for role, group in (("R", "head"), ("G", "body"))
    }
    for part in ("momentum", "decay", "optimizer"):
        result[part] = arrays[f"{measure}/{part}/head"] + arrays[f"{measure}/{part}/body"]
    return result | {part: arrays[f"{measure}/{part}"] for part in ("actual", "curvature")}


def numbers(texts):
    """Read numbers as the page writes them, without their units."""
    return [float(text.replace("−", "-").removesuffix(" nats")) for text in texts]


def close(result, expected):
    """Two digits are shown of the small, and four of the largest are sent."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result, np.ravel(expected), rtol=0.05, atol=6e-4 * scale)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_can_be_read(page, width, dark):
    """law: nothing overflows, and text contrasts ≥ 4.5 : 1 with its background."""
    shown = page(width, dark)
    move(shown, "ArrowLeft")
    shown.run("() => { for (const one of document.querySelectorAll('details')) one.open = true; }")
    for number in (1, 3):  # of a long token, and of a long prompt
        shown.point(".map td", number, click=True)
        assert shown.run("() => document.documentElement.scrollWidth") == width
        assert shown.run(OUTSIDE) == []
    texts = shown.run(CONTRASTS)
    assert len(texts) > 300 and [text for text in texts if text["ratio"] < 4.5] == []
    scheme = shown.run("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", scheme))) < 100) == dark
    assert shown.complaints() == []


def test_the_slider_moves_everything(page):
    """by hand: another step, another map and other tints, each those of its ledger."""
    shown = page()
    assert "no map" in " ".join(shown.run(TEXTS, "#step-views p")) and shown.run(CELLS) == []
    for step in (10, 5):
        move(shown, "ArrowLeft")
        assert shown.run(TEXTS, "output") == [f"{step} (stage all)"]
        close(numbers(shown.run(CELLS)), influence(step))
        actual = parts(step)["actual"][:LENGTH]
        expected = 0.7 * np.abs(actual) / np.abs(actual).max()
        colors = [np.float64(re.findall(r"[\d.]+", tint)) for tint in shown.run(TINTS)]
        # a browser keeps how opaque a colour is in eight bits
        np.testing.assert_allclose([color[3] for color in colors], expected, atol=1 / 255)
        assert [color[0] > color[2] for color in colors] == (actual > 0).tolist()
        close(numbers(shown.run(TEXTS, ".bars td:nth-child(2)")), means(step, "log_prob"))
    # the largest change is shown at first, and a token that was pointed at stays
    result = numbers(shown.run(TEXTS, ".details dd:first-child, .details dt + dd")[:1])
    close(result, influence(5).ravel()[np.abs(influence(5)).argmax()])
    shown.point(".tokens span", 7)
    move(shown, "End")
    assert shown.run(TEXTS, "output") == ["15 (stage all)"]
    assert shown.run(TEXTS, ".tokens .chosen") == [" 0.7"]


def means(step, measure):
    """By hand: the bars."""
    result = parts(step, measure)
    return np.array([result[part].mean() for part in PARTS])


def test_a_cell_tells_its_values(by_sample):
    """by hand: pointing at a cell shows both texts; arrows move on; a click selects the column."""
    columns = 5
    by_sample.point(".map td", 2 * columns + 3)
    texts = by_sample.run(TEXTS, ".details.long dd")
    close(numbers(texts[:1]), influence(10)[2, 3])
    assert texts[1] == "2+2=\n→ sample 1 </script>" and numbers(texts[2:3]) == [-0.5]
    assert texts[3].startswith("wordword") and texts[3].endswith("→ text 3 </script><b>")
    by_sample.run("() => document.querySelectorAll('.map td')[0].focus()")
    by_sample.press("ArrowDown")
    by_sample.press("ArrowRight")
    close(numbers(by_sample.run(TEXTS, ".details.long dd")[:1]), influence(10)[1, 1])
    by_sample.point(".map td", 1, click=True)
    line = ["⏎\n", "∅", "x" * 120, *["<i>"] * (LENGTH - 3)]
    assert by_sample.run(TEXTS, ".tokens span") == line


def test_a_token_tells_its_parts(by_sample):
    """by hand: pointing at a token shows every part of its change, of either measure."""
    for measure in ("log_prob", "entropy"):
        by_sample.point(".tokens span", 4)
        texts = by_sample.run(TEXTS, ".details:not(.long) dd")
        assert texts[0] == '" 0.4"'
        expected = parts(10, measure)
        np.testing.assert_allclose(
            numbers(texts[1:]), [expected[part][4] for part in PARTS], rtol=0.05, atol=1e-4
        )
        choose(by_sample, 1)
    assert by_sample.run(TEXTS, "h3")[-1] == "A probe completion, token by token: ΔH of each"


def test_choices(by_sample):
    """by hand: another completion, part and run are shown when chosen."""
    choose(by_sample, 2)
    assert len(by_sample.run(TEXTS, ".tokens span")) == LENGTH
    assert by_sample.run(TEXTS, ".prompt") == ["2+2="]
    choose(by_sample, 3)
    columns = parts(10)["R"][LENGTH : 2 * LENGTH]
    limit = numbers([by_sample.run(TEXTS, ".scale span:last-child")[-1].split()[0]])
    close(limit, np.abs(columns).max())
    choose(by_sample, 0)
    assert by_sample.run(TEXTS, "output") == ["10 (stage all)"]
    assert by_sample.run("() => document.querySelector('input[type=range]').max") == "1"


def test_axes_have_names_and_units(by_sample):
    """law: figures have text alternatives, and axes drawn by the script have names and units."""
    images = "() => [...document.images].map((one) => [one.naturalWidth, one.alt])"
    assert all(width > 500 and alt for width, alt in by_sample.run(images))
    heads = [by_sample.run(TEXTS, f".{name} thead th") for name in ("bars", "map")]
    assert heads[0][:2] == ["part", "mean (nats)"]
    words = "() => document.getElementById('step-views').textContent"
    assert "samples of the minibatch, by advantage A. Columns: probe completions, by kind" in (
        by_sample.run(words)
    )
    assert heads[1] == ["A", "own", "other", "own", "shuffled", *"12345"]
    spans = "() => [...document.querySelectorAll('.map .family')].map((th) => th.colSpan)"
    assert by_sample.run(spans) == [2, 1, 1, 1]
    assert all("(nats)" in text for text in by_sample.run(TEXTS, ".scale"))
