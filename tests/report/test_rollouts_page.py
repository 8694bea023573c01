"""Tests of the rollouts view beside the report's page."""

import json
import re

import numpy as np
import pytest

from ntkrl.report import RolloutsWriter, StepRollouts, encode_rollouts, rollouts_page, write_report
from tests import browser
from tests.report.conftest import LENGTH, SAMPLES, ledger_arrays
from tests.report.made_rollouts import rollouts, write_rollouts
from tests.report.test_browser import CONTRASTS, OUTSIDE
from tests.report.test_page import HOSTILE, hostile_run

HOSTILE = HOSTILE.replace("\ud800", "")  # no tokenizer writes half a character


@pytest.fixture(autouse=True)
def decoded_texts(monkeypatch):
    """Ledgers have the same texts as completions, which a tokenizer wrote."""
    monkeypatch.setattr("tests.report.test_page.HOSTILE", HOSTILE)


def keep(run, steps):
    """Write the completions of some steps into a run."""
    writer = RolloutsWriter(run, 16.0, 0, None, print)
    for step in steps:
        writer.write(step.rollout_step, encode_rollouts(step))
    writer.close()


def of_ledger(step, text="sample {} </script>", prompt="2+2="):
    """The completions that the ledgers of these tests are of, after those of another minibatch."""
    texts = [*("?" * SAMPLES), *(text.replace("{}", str(number)) for number in range(SAMPLES))]
    prompts = {"prompts": ["other", prompt], "rows": np.array([7, 3]), "texts": texts}
    return rollouts(step, 2, SAMPLES, 5, **prompts)


def view_of(page):
    """Return the values that the scripts of a view pass on, by name."""
    values = {}
    for path in (page.parent / "rollouts_view").glob("*.js"):
        call = re.fullmatch(r'ntkrlData\("(\w+)", (".*")\);\n', path.read_text("utf-8"), re.S)
        if call is not None:
            assert "<" not in call[2]
            values[call[1]] = json.loads(json.loads(call[2]))
    return values


def test_a_view_by_hand(run_paths, tmp_path):
    """by hand: two of three runs keep completions; the index, a step and a ledger's causes."""
    keep(run_paths[0], [rollouts(4), of_ledger(5), rollouts(6), of_ledger(10)])
    write_rollouts(run_paths[1], range(1, 4))
    page = write_report(run_paths[:3], tmp_path / "out")
    text = page.read_text("utf-8")
    assert '<a href="rollouts.html">36 completions of training</a>' in text
    views = view_of(page)
    first, second = views["index"]["runs"]
    assert (first["name"], first["seed"], second["seed"]) == ("rl", 0, 1)
    assert [step["rollout_step"] for step in first["steps"]] == [4, 5, 6, 10]
    assert [("ledger" in step) for step in first["steps"]] == [False, True, False, True]
    assert first["prompts"][first["steps"][1]["prompts"][1]] == {"row": 3, "text": "2+2="}
    stored = views[first["steps"][3]["file"]][first["steps"][3]["place"]]
    assert stored == json.loads(encode_rollouts(of_ledger(10)))
    ledger, arrays = views[first["steps"][3]["ledger"]], ledger_arrays(10)
    # the second minibatch: completions 4 to 7
    assert [sample["completion"] for sample in ledger["samples"]] == [4, 5, 6, 7]
    for role, group in (("R", "head"), ("G", "body")):
        parts = sum(arrays[f"log_prob/{term}/{group}"] for term in ("policy", "kl"))
        for number, sample in enumerate(ledger["samples"]):
            values = np.array(sample[role]["values"]) * sample[role]["unit"]
            np.testing.assert_allclose(values, parts[:, number], atol=1e-3 * np.abs(parts).max())
        total = np.array(ledger[role]["values"]) * ledger[role]["unit"]
        np.testing.assert_allclose(total, parts.sum(axis=1), atol=1e-4)
    assert [len(one["tokens"]) for one in ledger["completions"]] == [LENGTH] * 5
    again = write_report(run_paths[2::-1], tmp_path / "again")
    for path in (page.parent / "rollouts_view").iterdir():
        assert (again.parent / "rollouts_view" / path.name).read_bytes() == path.read_bytes()


def test_no_completions_no_view(run_paths, tmp_path):
    """story: a run without them has no view, and an earlier report's is removed."""
    write_rollouts(run_paths[0], [1])
    page = write_report(run_paths[:1], tmp_path)
    assert (tmp_path / "rollouts.html").exists()
    write_report(run_paths[1:2], tmp_path)
    assert not (tmp_path / "rollouts.html").exists() and not (tmp_path / "rollouts_view").exists()
    assert "rollouts.html" not in page.read_text("utf-8")


@pytest.mark.parametrize("name", ["rollouts.html", "rollouts_view/notes.txt", "rollouts_view"])
def test_other_files_are_not_replaced(run_paths, tmp_path, name):
    """law: files of these names that no report wrote are refused, before anything is written."""
    write_rollouts(run_paths[0], [1])
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match="is not replaced; move it, or write elsewhere"):
        write_report(run_paths[:1], out)
    assert (out / name).read_text() == "mine" and not (out / "index.html").exists()


def test_a_view_stays_small(run_paths, tmp_path, monkeypatch):
    """law: fewer steps, evenly spread, where all are too large; and damaged ones are counted."""
    broken = encode_rollouts(rollouts(20)).replace(b'"group":2', b'"group":3')
    writer = RolloutsWriter(run_paths[0], 16.0, 0, None, print)
    for step in range(1, 21):
        writer.write(step, broken if step == 20 else encode_rollouts(rollouts(step)))
    writer.close()
    monkeypatch.setattr(rollouts_page, "PAGE_BYTES", 8 * len(broken))
    index = view_of(write_report(run_paths[:1], tmp_path / "out"))["index"]
    assert [step["rollout_step"] for step in index["runs"][0]["steps"]] == [2, 5, 8, 11, 14, 17]
    assert "7 of 20 kept steps" in index["limits"] and "1 steps cannot be read" in index["limits"]


def hostile_view(run_paths, tmp_path):
    """Return the view of a run with hostile texts wherever a view has texts, and index.html."""
    step = of_ledger(10, HOSTILE, HOSTILE)
    words = {token: HOSTILE for token in step.vocabulary}
    fields = vars(step) | {"vocabulary": words, "stage": HOSTILE}
    fields["rewards"] = {HOSTILE: step.reward, "__proto__": step.reward}
    keep(run_paths[0], [StepRollouts(**fields)])
    return write_report([hostile_run(run_paths[0])], tmp_path / "out")


def test_hostile_texts(run_paths, tmp_path):
    """law: no text of a run is in the page or outside a string of a data file."""
    page = hostile_view(run_paths, tmp_path)
    static = (page.parent / "rollouts.html").read_text("utf-8")
    assert "alert" not in static and "'unsafe-inline'" not in static
    values = view_of(page)  # each file is one call with a string without "<"
    assert "alert(1)" in json.dumps(values)
    names = {path.name for path in (page.parent / "rollouts_view").iterdir()}
    assert all(re.fullmatch(r"[a-z_0-9]+\.(js|css)", name) for name in names)
    assert names == {*rollouts_page.STATIC, *(f"{name}.js" for name in values)}


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="needs Chromium (apt install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read(run_paths, tmp_path, width, dark):
    """law: hostile texts are shown and do nothing; no overflow, contrast ≥ 4.5 : 1, keys work."""
    page = hostile_view(run_paths, tmp_path).with_name("rollouts.html")
    with browser.Browser(browser.find(), tmp_path / "profile") as chromium:
        shown = browser.Page(chromium, page, width, dark)
        for place in ("#0/10/g1", "#0/10/5", "#0/10/ledger", "#0/10/ledger/6"):
            shown.run("() => document.getElementById('chosen').replaceChildren()")
            shown.run("(hash) => { location.hash = hash; }", place)
            wait(shown, ".tokens span")
            assert shown.run("() => document.documentElement.scrollWidth") == width
            assert shown.run(OUTSIDE) == []
            assert [text for text in shown.run(CONTRASTS) if text["ratio"] < 4.5] == []
            shown.run("() => document.querySelector('.tokens span').focus()")
            shown.press("ArrowRight")
            chosen = "() => [...document.querySelectorAll('.tokens span')].findIndex("
            assert shown.run(f"{chosen}(cell) => cell.matches('.chosen'))") == 1
        links = "() => [...document.querySelectorAll('.causes a')].map((a) => a.hash)"
        assert sorted(shown.run(links)) == ["#0/10/4", "#0/10/5", "#0/10/6", "#0/10/7"]
        assert shown.run("() => document.querySelectorAll('main script, main img').length") == 0
        assert shown.complaints() == []


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="needs Chromium (apt install chromium)")
@pytest.mark.parametrize("damage", ["damaged", "missing"])
def test_a_data_file_without_data(run_paths, tmp_path, damage):
    """by hand: a data file that is damaged or missing is named; the view waited for it for ever."""
    page = hostile_view(run_paths, tmp_path).with_name("rollouts.html")
    path = page.parent / "rollouts_view" / "run0_steps0000.js"
    path.write_text(
        path.read_text("utf-8")[:-200], "utf-8"
    ) if damage == "damaged" else path.unlink()
    with browser.Browser(browser.find(), tmp_path / "profile") as chromium:
        shown = browser.Page(chromium, page, 1200)
        shown.run("(hash) => { location.hash = hash; }", "#0/10/g0")
        wait(shown, "#chosen .refusal")
        words = shown.run("() => document.querySelector('#chosen .refusal').textContent")
    assert words.startswith(f"rollouts_view/run0_steps0000.js is {damage}")


def wait(shown, selector):
    """Return when an element stands."""
    script = """async (selector) => {
      while (!document.querySelector(selector)) await new Promise((next) => setTimeout(next, 10));
    }"""
    shown.ask("Runtime.evaluate", expression=f"({script})({selector!r})", awaitPromise=True)
