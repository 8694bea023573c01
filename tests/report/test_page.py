"""Tests of the report page."""

import ast
import html.parser
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from ntkrl.report import format_table, format_text, read_run, write_report
from ntkrl.report.figures import FIGURES
from ntkrl.report.metric_names import GLOSSARY
from ntkrl.report.page import GENERATOR
from tests.report.conftest import write_probe_set

PACKAGE = Path(__file__).parents[2] / "ntkrl"


class _Tags(html.parser.HTMLParser):
    """Collects tags with their attributes, and whether they are balanced."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_complete_and_self_contained(run_paths, tmp_path):
    """Story: four runs to one file that references nothing and embeds every figure."""
    page = write_report(run_paths, tmp_path / "out" / "deep")
    text = page.read_text(encoding="utf-8")
    parsed = _Tags(text)
    assert parsed.open == []
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 2 and "link" not in tags
    for word in ("http:", "https:", "url(", "@import", "href="):
        assert word not in text
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == tags.count("img") == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    names = sorted(path.name for path in page.parent.iterdir())
    files = [f"{spec.stem}.{suffix}" for spec in FIGURES for suffix in ("png", "svg")]
    assert names == sorted([*files, "index.html"])
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert all(f"<code>{name}</code>" in text for name in GLOSSARY)
    assert "<code>rewards/&lt;fn&gt;/mean</code>" in text and "<code>train/reward</code>" in text
    assert "held-out reward 0.150 → <strong>0.550 ± 0.071</strong> (+20.0 noise units)" in text
    assert text.count(": best</th>") == 4 and "<code>diversity/pass@2</code></th><td>1.000" in text
    assert "missing" not in re.sub(r"<style>.*</style>", "", text, flags=re.S)
    # Law: order of arguments and place of writing do not change a byte.
    again = write_report(run_paths[::-1], tmp_path / "again")
    for file in page.parent.iterdir():
        assert (again.parent / file.name).read_bytes() == file.read_bytes(), file.name


def test_names_are_escaped(run_paths, tmp_path):
    """By hand: a run named like a tag, with mathematics, is text everywhere."""
    name = '<script>alert("$x$")</script>'
    for path in run_paths[:2]:
        (path / "config.json").write_text(json.dumps({"name": name, "seed": 0}))
    text = write_report(run_paths[:2], tmp_path / "out").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(&quot;$x$&quot;)&lt;/script&gt;" in text
    parsed = _Tags(text)
    assert parsed.open == []
    scripts = [attrs for tag, attrs in parsed.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "step-data"}, {}]
    # the texts of samples and probe completions hold </script> and <b> too
    assert text.count("</script>") == 2 and parsed.tags.count(("b", {})) == 3
    (data,) = re.findall(r'id="step-data">(.*?)</script>', text)
    run = json.loads(data)["runs"][0]
    assert run["name"] == name and run["completions"][0]["text"] == "text 0 </script><b>"


HOSTILE = (
    "</script></style></title><script>alert(1)</script><!-- <img src=x onerror=alert(1)>\"'><svg/"
    "onload=alert(1)> &lt;b&gt; ]]> {{ 7 * 7 }} {% if %} $\\frac{1}$ $x$ `|` javascript:alert(1)"
    " \x00\x1b[31m\x9b\u2028\u202e\ud800\r\n#"
)


def rewrite(path, change):
    """Replace a JSON file by what `change` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def hostile_run(path):
    """Put hostile texts wherever a run directory has texts; return its new path."""
    # a file name may hold control codes and bytes that are not UTF-8
    name = HOSTILE.replace("/", "\\")[:140]
    place = path.with_name(f"{name}\x1b\n\udcff{path.name}")
    rewrite(path / "config.json", lambda config: {**config, "name": HOSTILE})
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "stage": f"{line['step'] > 8}{HOSTILE}", HOSTILE: None} for line in lines]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def texts(stored):
        completions = [
            {**c, "text": HOSTILE, "tokens": [HOSTILE for _ in c["tokens"]]}
            for c in stored["completions"]
        ]
        prompts = [HOSTILE for _ in stored["prompts"]]
        return {**stored, "prompts": prompts, "completions": completions}

    rewrite(path / "probes" / "set.json", texts)
    for file in (path / "ledger").glob("*.json"):
        texts = {"prompt": HOSTILE, "completion": HOSTILE}
        rewrite(file, lambda ledger: {**ledger, "samples": [s | texts for s in ledger["samples"]]})
    (path / "evaluations" / "best.json").unlink()
    metrics = {
        HOSTILE: 1.0,
        "eval/reward": 0.5,
        "diversity/best_of_2": 1,
        "diversity/gap_best_of_2": 1,
    }
    name = f"{name}\x1b\n.json"
    (path / "evaluations" / name).write_text(json.dumps(metrics))
    (path / "evaluations" / f"cut{name}").write_text("{")
    path.rename(place)
    return place


ATTRIBUTES = {"alt", "class", "colspan", "charset", "content", "http-equiv", "id", "lang", "name"}
ATTRIBUTES |= {"scope", "src", "tabindex", "type"}


@pytest.mark.parametrize("refused", [False, True], ids=["compared", "refused"])
def test_hostile_texts(run_paths, tmp_path, monkeypatch, refused):
    """law: no tag, attribute or script comes from a text, and no control code in a terminal."""
    paths = [hostile_run(path) for path in run_paths[:2]]
    if refused:  # in the heading
        write_probe_set(paths[0], HOSTILE)
        monkeypatch.setattr("ntkrl.report.page.FIGURES", ())
    page = write_report(paths, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    parsed = _Tags(text)
    assert parsed.open == [] and "svg" not in {tag for tag, _ in parsed.tags}
    scripts = [attrs for tag, attrs in parsed.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "step-data"}, {}]
    assert {name for _, attrs in parsed.tags for name in attrs} <= ATTRIBUTES
    assert text.count("alert(1)") > 10 and "{{ 7 * 7 }}" in text
    (data,) = re.findall(r'id="step-data">(.*?)</script>', text)
    assert "<" not in data and json.loads(data)["runs"][0]["name"].startswith("</script>")
    for file in page.parent.glob("*.svg"):
        root = xml.etree.ElementTree.parse(file).getroot()
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not tags & {"script", "foreignObject", "a"}, file.name
    for printed in (format_table([read_run(path) for path in paths]), format_text(paths)):
        assert "</scr" in printed
        assert all(c.isprintable() for c in printed.replace("\n", ""))


def test_missing_things_are_said(run_paths, tmp_path):
    """Story: no probes, a cut line, only training rewards: the page builds and reports them."""
    path, out = run_paths[0], tmp_path / "out"
    for directory in ("probes", "ledger"):
        shutil.rmtree(path / directory)
    (path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    out.mkdir()
    (out / "head_share.png").write_bytes(b"of an earlier report")
    (out / "index.html").write_bytes(GENERATOR + b" of an earlier report")
    (out / "notes.txt").touch()
    text = write_report([path], out).read_text(encoding="utf-8")
    assert (out / "notes.txt").exists() and GENERATOR.decode() in text
    assert "no probe files" in text and "is cut short and was left out" in text
    assert "no held-out evaluation after the start" in text
    assert text.count("missing, no run has data for it") == len(FIGURES) - 1
    assert "<script" not in text
    assert [file.name for file in out.glob("*.png")] == ["reward.png"]


def test_different_probe_sets_are_refused_on_the_page(run_paths, tmp_path):
    """Story: one run has another probe set: no probe figure; the run's steps are shown, by name."""
    write_probe_set(run_paths[0], "an0ther")
    text = write_report(run_paths, tmp_path / "out").read_text(encoding="utf-8")
    assert text.count("Refused: comparing these runs") == 1 and "rl-0: set an0ther" in text
    assert not (tmp_path / "out" / "predicted_actual.png").exists()
    assert (tmp_path / "out" / "entropy.png").exists()
    assert "ledger/step_000005.npz is of probe set d1ge57, the run has an0ther; refused" in text
    (data,) = re.findall(r'id="step-data">(.*?)</script>', text)
    assert len(json.loads(data)["runs"]) == 3


def test_no_run_directory(tmp_path):
    """Law: a wrong path is an error before anything is written."""
    with pytest.raises(ValueError, match="is not a directory; expected"):
        write_report([tmp_path / "nothing"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_imports():
    """Law: the room itself needs no accelerator library and no global plotting state."""
    # The package's own __init__ is stepped over: it may import rooms that need JAX.
    code = (
        "import sys, types; package = types.ModuleType('ntkrl'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['ntkrl'] = package; "
        "sys.modules |= dict.fromkeys(('jax', 'flax', 'chex', 'matplotlib.pyplot')); "
        "import ntkrl.report; print(sorted(m for m in sys.modules if m.startswith('ntkrl.')))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ntkrl.report.page" in result.stdout
    rooms = {name.split(".")[1] for name in ast.literal_eval(result.stdout)}
    helpers = {"directory_kinds", "durable_files", "intervals", "json_files", "messages"}
    assert rooms == {*helpers, "report"}
