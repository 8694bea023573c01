"""The study on a pretrained model: its runs, and its claims from known numbers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ntkrl import main, runtime, study
from ntkrl.configs.evidence import feature_claims, list_claims, similarity
from ntkrl.configs.evidence.arm_study import StudySettings
from ntkrl.configs.evidence.arms import Arm
from ntkrl.configs.evidence.pretrained_study import PretrainedStudy
from ntkrl.configs.pretrained import lists
from ntkrl.settings import read_settings

FILE = "pretrained/study"
SIZE = "smollm2"


def pretrained_study(root, **changes):
    """The packaged study in another directory."""
    config = runtime.read_config([f"--config={FILE}"])
    parsed = runtime.parse_section(StudySettings, config, "study")
    return PretrainedStudy(dataclasses.replace(parsed, run_dir=str(root), **changes), FILE)


def test_every_run_has_a_config(tmp_path, monkeypatch):
    """law: configs of the plan load, each with a directory of its run; nothing tunes on test."""
    made = pretrained_study(tmp_path, seeds=(1, 2), tuning_seeds=(9,), control_seeds=1)
    made.chosen = lambda: {"rl": {"body": 1e-3}, "cfrl": {"head": 1e-2, "body": 1e-4}}
    monkeypatch.setattr(made, "write_features", lambda *arguments: None)
    places, commands = {}, {}
    for title, jobs in made.phases():
        for job in jobs:
            assert job.done not in places
            places[job.done] = job.name
            commands.setdefault(title, []).append(job.words)
            if job.words[0] not in ("train", "evaluate"):
                continue
            config = runtime.read_config(job.words[1:])
            loaded = read_settings(config)
            assert Path(config.run_dir) in job.done.parents, job
            if title == "choice of rates":
                assert loaded.data.eval_path == f"{tmp_path}/data/validation.jsonl"
                assert loaded.evaluation.base is None
    assert list(commands) == [
        *("the model", "the model's samples", "choice of rates", "runs", "their samples"),
        "kernels",
    ]
    arms = [words[1].split("/")[2].split(",")[0] for words in commands["runs"]]
    # the grids' arms twice, each control once, Adam's step at four rates
    assert {name: arms.count(name) for name in ("rl", "cfrl", "tied_rl", "adam")} == {
        **{"rl": 2, "cfrl": 2},
        **{"tied_rl": 1, "adam": 4},
    }
    tied = runtime.read_config([f"--config={FILE}:{SIZE}/tied_cfrl,head=1e-2,body=5e-4"])
    assert tied.stages[0].parameters[0] == ("embed/.*", 1e-2) and not tied.model.untie


def test_categories_are_disjoint(tmp_path):
    """law: each category is in one part, and each part has rows."""
    pretrained_study(tmp_path).write_prompts()
    parts = {}
    for name in ("train", "validation", "test"):
        rows = (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
        parts[name] = {json.loads(row)["category"] for row in rows}
    assert min(map(len, parts.values())) >= 5
    assert set.union(*parts.values()) == set(lists.MEMBERS)
    assert sum(map(len, parts.values())) == len(lists.MEMBERS)


def test_mistakes_in_a_word(capsys):
    """by hand: an unknown arm, size or key is reported with the known ones, and no trace."""
    for words, answer in (
        (
            "small/rl",
            "expected the variant gpu, or SIZE/ARM,key=value,… with sizes smollm2, arms rl, ",
        ),
        (f"{SIZE}/rl,pace=1", "keys seed, root, "),
        (f"{SIZE}/rl,root", "keys seed, root, "),
        (f"{SIZE}/rl,steps=x", "steps must be of type int, not 'x'"),
    ):
        assert main.main(["train", f"--config={FILE}:{words}"]) == 2
        assert answer in capsys.readouterr().err


def test_claims_on_features(tmp_path):
    """by hand: alike with the mean feature and not without; shares by position from arrays."""
    made = pretrained_study(tmp_path, seeds=(1, 2, 3, 4, 5, 6))
    for seed in made.settings.seeds:
        values = {kind: [0.5, 0.8 + 0.01 * seed] for kind in similarity.KINDS}
        values |= {f"centred_{kind}": [0.5, 0.01 * seed] for kind in similarity.KINDS}
        values |= {similarity.MEAN_SHARE: [0.1, 0.4], similarity.DEPTH: [1, 30]}
        for arm in ("base", "rl"):
            place = made.results.place(SIZE, arm, seed)
            place.mkdir(parents=True)
            (place / similarity.FILE).write_text(json.dumps(values))
    rl = Arm(made.results, made.settings, SIZE, "rl")
    listed = feature_claims.feature_claims(rl)
    claims = {verdict.claim: verdict for verdict in listed}
    alike = claims["features of tokens of an answer are alike before RL: cosine > 0.5"]
    assert alike.verdict == "holds" and alike.number.startswith("0.835 [")
    apart = claims["without the mean feature those of tokens of an answer are not: cosine < 0.1"]
    # mean of 0.01 … 0.06
    assert apart.verdict == "holds" and apart.number.startswith("0.035 [0.0")
    share = next(verdict for claim, verdict in claims.items() if "R's trace" in claim)
    assert share.verdict == "does not hold"
    assert any("1: 0.5 to 0.5; 30: 0.835 to 0.835" in verdict.number for verdict in listed)


def test_diversity_of_lists(tmp_path):
    """by hand: four right members become two, two first items one; three lost, one gained."""
    made = pretrained_study(tmp_path, seeds=(1, 2, 3, 4, 5, 6))
    sides = {
        "base": ["robin, eagle, wren", "The Robins, owls, wren", "sparrow, crow", "a, b, c"],
        "rl": ["robin, robin, hawk", "robin, hawk, a tree"],
    }
    for seed in made.settings.seeds:
        for arm, texts in sides.items():
            place = made.results.place(SIZE, arm, seed)
            directory = "test" if arm == "base" else list_claims.END
            path = list_claims.samples_file(place, directory)
            path.parent.mkdir(parents=True)
            (row,) = lists.rows(["birds"])
            turns = [[{"role": "assistant", "content": text}] for text in texts]
            turns += turns[:1] * seed  # more of the first answer, which changes the entropy alone
            rows = [{**row, "completion": turn} for turn in turns]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    members, entropy, support = list_claims.list_claims(
        Arm(made.results, made.settings, SIZE, "rl")
    )
    assert members.number.startswith("4 to 2;") and members.verdict == "holds"
    # of the first items robin (2 + seed times) and a
    shares = np.array([1 / (3 + seed) for seed in made.settings.seeds])
    before = np.mean(-shares * np.log(shares) - (1 - shares) * np.log(1 - shares))
    assert entropy.number.startswith(f"{before:.3g} to 0;") and entropy.verdict == "holds"
    assert "[-" in entropy.number and len(set(entropy.number.split("[")[1][:-1].split(", "))) > 1
    # eagle, owl, wren; hawk
    assert support.number.startswith("lost 3, gained 1;") and support.verdict == "holds"


def test_share_by_position(tmp_path):
    """by hand: R's share on first tokens is (1·2)/(2·2), on later ones (3·3 + 0·1)/(9 + 1)."""
    probes = tmp_path / "probes"
    probes.mkdir()
    np.savez(probes / "set.npz", completion_mask=np.array([[True, True], [False, True]]))
    head, body = np.array([1.0, 3.0, 0.0]), np.array([1.0, 0.0, 1.0])
    np.savez(probes / "step_000001.npz", entropy_change_head=head, entropy_change_body=body)
    run = study.Results(tmp_path, ()).at(tmp_path) or type("Run", (), {"path": tmp_path})
    assert feature_claims.position_share(run, "entropy_change_", later=False) == 0.5
    assert feature_claims.position_share(run, "entropy_change_", later=True) == pytest.approx(0.9)
