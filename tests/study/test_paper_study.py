"""The study of the paper's claims: its runs, its files, and its verdicts from known numbers."""

import dataclasses
import json
import math
import re
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import main, reward, runtime, study
from ntkrl.configs.evidence import claims, prompts
from ntkrl.configs.evidence import similarity as evidence
from ntkrl.configs.evidence.arm_study import StudySettings
from ntkrl.configs.evidence.paper_study import PaperStudy
from ntkrl.settings import read_settings
from tests.report.conftest import mark

FILE = "configs/study.py"
TASKS = ("small, expressions", "small, supervised")


def settings(root, **changes):
    """The checked-in settings, in another directory."""
    config = runtime.read_config([f"--config={FILE}"])
    parsed = runtime.parse_section(StudySettings, config, "study")
    return dataclasses.replace(parsed, run_dir=str(root), **changes)


def paper_study(root, **changes):
    """The study of these settings."""
    return PaperStudy(settings(root, **changes), FILE)


def lines(name, step):
    """Metrics of a run as plain formulas of arm and step."""
    gain = {"rl": 0.2, "cfrl": 0.3}[name] if name in ("rl", "cfrl") else 0.1
    share = step / 8
    line = {"step": step, "eval/reward": 0.3 + gain * share}
    line |= {"stage": "all"} if step else {}
    line |= {"probe/confidence": 0.6 + 0.1 * share, "probe/entropy": 1.0 - 0.2 * share}
    line |= {"probe/cosine_across_prompts": 0.7, "eval/distinct_completions": 0.9 - 0.1 * share}
    line |= {"probe/head_norm": 5.0, "probe/feature_distortion_relative": 0.1}
    line |= {"diversity/best_of_1": 0.3 + 0.2 * share, "diversity/best_of_64": 0.9}
    line |= {f"diversity/support_{word}": 4.0 for word in ("kept", "gained")}
    line["diversity/support_lost"] = 4.0 + step
    return line | {"predict/correlation": 0.99, "predict/relative_error": 0.1}


def fabricate(paper, size, arm, seed, name=None, change=None):
    """Write a finished run."""
    place = paper.results.place(size, arm, seed)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"name": name or arm, "seed": seed}))
    records = [lines(arm, step) for step in range(9)]
    for line in records:
        line["eval/reward"] += 0.001 * seed
        line.update({} if change is None else change(line["step"]))
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    timings = [{"step": step, "sample_seconds": 1.0, "update_seconds": 0.5} for step in range(1, 9)]
    (place / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    mark(place)
    (place / "ledger").mkdir()
    arrays = {"entropy/policy/head": np.full((5, 3), -0.1), "entropy/momentum/body": np.zeros(5)}
    arrays |= {"entropy/policy/body": np.full((5, 3), -0.3), "log_prob/policy/head": np.ones(5)}
    np.savez(place / "ledger" / "step_000004.npz", **arrays)
    return place


def test_every_run_has_a_config(tmp_path, monkeypatch):
    """law: configs of the plan load, each with a directory of its run; nothing tunes on test."""
    paper = paper_study(tmp_path, seeds=(1,), tuning_seeds=(9,))
    skipped = ("prompts.write_prompts", "prompts.write_preferences", "similarity.write_all")
    for name in skipped:
        monkeypatch.setattr(f"ntkrl.configs.evidence.{name}", lambda *arguments: None)
    paper.chosen = lambda: {"rl": {"body": 1e-3}, "cfrl": {"head": 1e-2, "body": 1e-3}}
    places = {}
    for title, jobs in paper.phases():
        for job in jobs:
            config = runtime.read_config(job.words[1:])
            loaded = read_settings(config)
            assert Path(config.run_dir) in job.done.parents, job
            assert job.done not in places
            places[job.done] = job.name
            if "/sgd" in job.words[1]:
                assert loaded.probe.every_steps == 1, "its only step is probed"
            if title == "choice of rates":
                assert loaded.data.eval_path == f"{tmp_path}/data/validation.jsonl"
                assert loaded.evaluation.base is None
    medium = runtime.read_config(["--config=configs/study.py:medium/cfrl,head=1e-2,body=5e-4"])
    assert [row.parameters[0][1] for row in medium.stages] == [1e-2, 5e-4]
    assert len(places) > 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 0, "seeds": (1, 9), "tuning_seeds": (9,)}, "jobs must be ≥ 1.*tuning seed"),
        ({"tuned": "huge"}, "'huge', which has no arms"),
        ({"grids": {"rl": {"body": (1.0,)}, "cfrl": {"body": (1.0, 2.0)}}}, "equally many points"),
        ({"arms": {"small": ("rl",)}}, "lacks the arms of the grids: cfrl"),
    ],
)
def test_mistakes_in_the_settings(tmp_path, changes, message):
    """by hand: settings that cannot be run are refused, all at once."""
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_mistakes_in_a_word(capsys):
    """by hand: an unknown arm, size or key is reported with the known ones, and no trace."""
    assert main.main(["train", "--config=configs/study.py:small/ppo,rate=3"]) == 2
    assert "expected the variant gpu, or SIZE/ARM,key=value" in capsys.readouterr().err


def test_prompts_and_preferences(tmp_path):
    """law: parts are disjoint, answers are right, and the chosen completion has more reward."""
    prompts.write_prompts(tmp_path)

    def read(name):
        text = (tmp_path / "data" / f"{name}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    parts = {
        name: {row["target"] for row in read(name)} for name in ("train", "validation", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == dict(
        train=24, validation=6, test=10
    )
    assert len(set.union(*parts.values())) == 40
    answers = read("supervised")
    assert {row["target"] for row in answers} <= parts["train"] and len(answers) > 1000
    for row in answers[::97]:
        columns = [row["prompt"]], [row["completion"]], [[]]
        assert reward.expression_score(*columns, [row["target"]]) == [1.0]
    samples = tmp_path / "samples.jsonl"
    rows = [
        {"prompt": f"{p}=", "completion": str(c), "reward": c % 3} for p in "12" for c in range(9)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_preferences(samples, tmp_path / "pairs.jsonl", 0)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 2 * prompts.PAIRS_PER_PROMPT
    assert all(int(pair["chosen"]) % 3 > int(pair["rejected"]) % 3 for pair in pairs)


def test_similarities_of_known_features():
    """by hand: two prompts with an answer of two tokens each; the mean is (1/2, 3/4)."""
    phi = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
    rows, columns = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    values = evidence.similarities(jnp.asarray(phi), rows, columns, rows)
    # first tokens are equal; of the four pairs across prompts two are parallel, two orthogonal
    assert values["first_token"] == 1 and values["across_prompts"] == 0.5
    assert values["within_response"] == 0 and values["across_responses"] == 0
    # ‖(1/2, 3/4)‖² = 13/16 of mean (1 + 1 + 1 + 4)/4 = 7/4
    np.testing.assert_allclose(values["mean_share"], 13 / 28, rtol=1e-6)
    # centred: (½, −¾), (−½, ¼), (½, −¾), (−½, 5/4)
    centred = phi - phi.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    within = [centred[i] @ centred[i + 1] / (norms[i] * norms[i + 1]) for i in (0, 2)]
    np.testing.assert_allclose(values["centred_within_response"], np.mean(within), rtol=1e-5)
    np.testing.assert_allclose(values["centred_first_token"], 1, rtol=1e-5)


def test_rates_are_chosen_by_the_last_evaluations(tmp_path):
    """by hand: the grid's point of highest mean over seeds of the last two evaluations."""
    paper = paper_study(tmp_path)
    expected = ("rl_body=0.0003", "cfrl_body=0.0003_head=0.003")
    for job in paper.tuning():
        name, _, seed = job.done.parent.name.rpartition("-")

        def change(step, best=name in expected):
            return {"eval/reward": 0.9 if best and step >= 7 else 0.5}

        fabricate(paper, "small/tuning", name, int(seed), change=change)
    assert paper.chosen() == {"rl": {"body": 3e-4}, "cfrl": {"head": 3e-3, "body": 3e-4}}
    rates = json.loads((tmp_path / "small" / "rates.json").read_text())
    assert [row["reward"] for row in rates["rl"]["tried"]] == [0.5] * 4 + [0.9] + [0.5] * 4


def verdicts_of(paper):
    """Return verdicts by claim."""
    listed = claims.verdicts(paper.results, paper.settings)
    return {verdict.claim: verdict for verdict in listed if verdict.task in TASKS}


def test_verdicts_of_known_numbers(tmp_path):
    """by hand: claims that hold, hold partly, do not hold and were not run."""
    paper = paper_study(tmp_path, seeds=(1, 2, 3, 4, 5, 6))
    for seed in paper.settings.seeds:
        fabricate(paper, "small", "rl", seed)
        sign = 1 if seed < 5 else -1.5  # ahead on average alone
        change = {"probe/feature_distortion_relative": 0.1 - 0.02 * sign, "probe/head_norm": 4.0}
        fabricate(paper, "small", "cfrl", seed, change=lambda step, change=change: change)
        for number, rate in enumerate(paper.settings.step_rates["sgd"]):
            error = {"predict/relative_error": (1 + 0.1 * seed) * rate}
            fabricate(paper, "small", f"sgd_{number}", seed, "sgd", lambda step, e=error: e)
    verdicts = verdicts_of(paper)
    slope = next(entry for claim, entry in verdicts.items() if "∝ rate" in claim)
    assert (slope.verdict, slope.number) == ("holds", "1 [1, 1]")
    ahead = verdicts["classifier first reaches more held-out reward at the end, equal rollouts"]
    assert ahead.verdict == "holds"
    assert "rl 0.503 to cfrl 0.603; difference +0.1 [0.1, 0.1], p = 0.031" in ahead.number
    timed = verdicts["classifier first reaches more held-out reward, equal training time"]
    assert timed.verdict == "holds"
    account = {
        claim[-30:]: entry.verdict
        for claim, entry in verdicts.items()
        if "LP-FT's account" in claim
    }
    assert set(account.values()) == {"partly", "does not hold"}
    share = verdicts["R makes most of the change of entropy: share > ½"]
    assert (share.verdict, share.number) == ("does not hold", "0.25 [0.25, 0.25], p = 0.031")
    gap = next(entry for claim, entry in verdicts.items() if "best-of-N closes" in claim)
    assert "64: 0; at N = 64 the base reaches 0.9, RL 0.9; difference -0.2" in gap.number
    assert gap.verdict == "holds" and "lead by N: 1: 0.2, 2: –," in gap.number
    support = next(
        entry for claim, entry in verdicts.items() if "loses more than it gains" in claim
    )
    assert support.verdict == "holds"
    assert "lost 12 (by chance 4), gained 4 (by chance 4)" in support.number
    assert (
        verdicts["the same with the head alone, whose logits are exactly linear"].verdict
        == "not run"
    )


def test_equal_time_counts_no_compiling(tmp_path):
    """by hand: median seconds of a step times steps; the reward between evaluations is linear."""
    paper = paper_study(tmp_path, seeds=(1,))
    place = fabricate(paper, "small", "rl", 1)
    timings = (place / "timings.jsonl").read_text().splitlines()
    timings[0] = json.dumps({"step": 1, "sample_seconds": 99.0, "look_seconds": 50.0})
    (place / "timings.jsonl").write_text("\n".join(timings) + "\n")
    (run,) = paper.results.runs("small", "rl")
    assert study.training_seconds(run) == 1.5 * 8
    assert study.training_seconds(run, 4) == 1.5 * 4
    assert study.at_time(run, "eval/reward", 1.5 * 4.5) == pytest.approx(0.301 + 0.2 * 4.5 / 8)
    assert math.isnan(study.at_time(run, "eval/reward", 1e9))


def test_a_page_of_what_is_there(tmp_path):
    """story: nothing runs; the page and the Markdown have the results and the missing parts."""
    paper = paper_study(tmp_path, seeds=(1, 2))
    for arm in ("rl", "cfrl"):
        for seed in paper.settings.seeds:
            fabricate(paper, "small", arm, seed)
    similarity = {kind: [0.9, 0.8] for kind in evidence.KINDS} | {evidence.DEPTH: [1, 3]}
    place = paper.results.place("small", "rl", 1) / "similarity.json"
    place.write_text(json.dumps(similarity))
    command = f"ntkrl train --config={FILE}:small/rl,seed=2,root={tmp_path},steps=8"
    (tmp_path / "commands.txt").write_text(
        f"{command}\nntkrl evaluate --config={FILE}:x/y,seed=2\n"
    )
    page = paper.write_page(f"ntkrl study --config={FILE}").read_text()
    assert "Not run, or not finished: small cfrl_short: seeds 1, 2" in page
    assert page.count("<h2>") >= 7 and "Similarity" in page or "small-layers" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    table = (tmp_path / "verdicts.md").read_text()
    assert "| 4 | classifier first reaches more held-out reward at the end" in table
    listed = json.loads((tmp_path / "verdicts.json").read_text())
    assert {verdict["question"] for verdict in listed} == {1, 2, 3, 4, 5, 6}
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["run"] for run in runs] == [
        f"small/{arm}-{s}" for arm in ("cfrl", "rl") for s in (1, 2)
    ]
    assert [run["command"] for run in runs] == [None, None, None, command]
    assert runs[3]["eval/reward"] == [0.302, 0.502, 0.402]
    assert runs[3]["seconds"] == 12.0


def test_the_page_of_an_archive(tmp_path, capsys):
    """law: the archive of small files gives the same page, and none of models or checkpoints."""
    paper = paper_study(tmp_path / "a", seeds=(1, 2))
    for arm in ("rl", "cfrl"):
        for seed in paper.settings.seeds:
            place = fabricate(paper, "small", arm, seed)
            for name in ("export", "checkpoints", "probes"):
                (place / name).mkdir()
                (place / name / "small.json").write_text("{}")
            np.savez(place / "probes" / "step_000001.npz", tokens=np.ones(9), large=np.ones(2000))
    (place / "large.jsonl").write_text("x" * 2**19)
    tuning = paper.tuning_place("rl", {"body": 1e-4}, 101)
    (tuning / "probes").mkdir(parents=True)
    for name in ("finished", "probes/step.npz"):
        (tuning / name).write_text("{}")
    (tmp_path / "a" / "commands.txt").write_text(f"ntkrl train --config={FILE}:small/rl,seed=2\n")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"reward": "/home/me/rewards.py"}))
    paper.write_page("ntkrl study")
    assert "runs.tar.xz: small/cfrl-2/large.jsonl" in capsys.readouterr().out
    with tarfile.open(tmp_path / "a" / "runs.tar.xz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "b", filter="data")
    with np.load(tmp_path / "b" / "small/rl-1/probes/step_000001.npz") as arrays:
        assert arrays.files == ["tokens"]
    assert "/home/me" not in "".join(f.read_text() for f in tmp_path.glob("b/**/config.json"))
    assert "small/rl-1/probes/small.json" in names and "commands.txt" in names
    assert not [name for name in names if "export" in name or "check" in name or "large" in name]
    chosen = [name.partition("101/")[2] for name in names if "tuning" in name]
    assert chosen == ["finished"]
    paper_study(tmp_path / "b", seeds=(1, 2)).write_page("ntkrl study")
    for name in ("verdicts.md", "verdicts.json", "runs.jsonl", "runs.tar.xz", "index.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_hostile_texts(tmp_path):
    """law: names, stages, grids and commands are text on the page: no tag comes from them."""
    hostile = (
        "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)><!-- $x$ \x00\ud800"
    )
    paper = paper_study(tmp_path, seeds=(1, 2))
    for arm in ("rl", "cfrl"):
        for seed in paper.settings.seeds:
            stage = {"stage": hostile}
            fabricate(paper, "small", arm, seed, f"{arm} {hostile}", lambda step: stage)
    table = {"tried": [{hostile: 0.1, "reward": 0.5}], "chosen": {hostile: 0.1}}
    (tmp_path / "small" / "rates.json").write_text(json.dumps({hostile: table}))
    written = hostile.replace("\ud800", "")
    (tmp_path / "commands.txt").write_text(f"ntkrl train {written}\n")
    page = paper.write_page(f"ntkrl study --config={written}").read_text()
    assert "alert(1)" in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"<(script|img src=x|!--)", page)
    assert set(re.findall(r"<img ([a-z]+)=", page)) <= {"alt"}
    table = (tmp_path / "verdicts.md").read_text(encoding="utf-8")
    assert table.count("\n") == table.count("|\n") + 2
