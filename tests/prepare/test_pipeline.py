"""`ntkrl prepare` on made-up inputs: files, counts, order of pairs, running again, mistakes."""

import datetime
import json
import math
import shutil
import uuid

import datasets
import jax
import numpy as np
import pytest
from pyarrow import parquet

from ntkrl import data, models
from ntkrl.configs.paper import made_up
from ntkrl.data import PromptSet
from ntkrl.main import main
from ntkrl.models.scorers import GATE
from ntkrl.prepare import pipeline
from ntkrl.prepare.pipeline import score_pairs
from ntkrl.prepare.schemas import select, split
from ntkrl.reward import RewardFunction, RewardSet

REWARD = (
    "def length(completions, **_):\n    return [len(one[0]['content']) for one in completions]\n"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and data, and a reward function beside them."""
    place = tmp_path_factory.mktemp("made") / "up"
    made_up.write(place)
    (place / "rewards.py").write_text(REWARD)
    return place


def prepare(inputs, out, *more):
    """Prepare with rewards by length."""
    preferences = inputs / "ultrafeedback_binarized"
    return main(
        [
            "prepare",
            "--config=configs/paper/miniature.py:data",
            f"--config.run_dir={out}",
            f"--config.model.path={inputs / 'pythia'}",
            f"--config.reward.function={inputs / 'rewards.py'}:length",
            f"--config.prepare.supervised={inputs / 'alpaca_farm' / 'sft'}",
            f"--config.prepare.preferences={preferences / 'train_prefs'}",
            f"--config.prepare.test={preferences / 'test_prefs'}",
            *more,
        ]
    )


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_and_counts(inputs, tmp_path, capsys):
    """by hand: overlong rows are dropped, pairs stay in order, parts are the permutation's."""
    out = tmp_path / "data"
    assert prepare(inputs, out) == 0
    summary = json.loads((out / "summary.json").read_text())
    sizes = {"reward": 32, "rl": 8, "test": 9, "rl_selected": 4, "test_selected": 4, "sft": 25}
    assert summary["written"] == {f"{name}.jsonl": size for name, size in sizes.items()}
    counted = summary["inputs"]["preferences"]
    assert (counted["rows"], counted["prompt_too_long"], counted["kept"]) == (44, 4, 40)
    published = data.read_rows(inputs / "ultrafeedback_binarized" / "train_prefs").rows
    # bytes are tokens; a wrong answer is the longer one, as it ends with a mark
    kept = [row for _, row in published if len(row["prompt"]) <= 32]
    longer = [len(row["rejected"][1]["content"]) > len(row["chosen"][1]["content"]) for row in kept]
    assert counted["swapped"] == sum(longer) and 0 < sum(longer)
    result = {name: rows(out / f"{name}.jsonl") for name in sizes}
    first, second = split(40, 0.8, 1283)
    for part, order in (("reward", first), ("rl", second)):
        for row, number in zip(result[part], order, strict=True):
            sides = ["chosen", "rejected"][:: -1 if longer[number] else 1]
            texts = [kept[number][side][1]["content"] for side in sides]
            assert row["prompt"] == [{"role": "user", "content": kept[number]["prompt"]}]
            assert [row[name][0]["content"] for name in ("chosen", "rejected")] == texts
            assert [row["score_chosen"], row["score_rejected"]] == list(map(len, texts))
            assert (
                row["swapped"] == longer[number] and row["prompt_id"] == kept[number]["prompt_id"]
            )
    assert result["rl_selected"] == [result["rl"][n] for n in select(8, 4, 237)]
    assert result["test_selected"] == [result["test"][n] for n in select(9, 4, 238)]
    example = json.loads((inputs / "alpaca_farm/alpaca_instructions/sft.json").read_text())[0]
    assert result["sft"][0] == {
        "prompt": [{"role": "user", "content": f"{example['instruction']}\nBe brief."}],
        "completion": [{"role": "assistant", "content": example["output"]}],
    }
    # again: nothing is done; and not at all with other settings in the same place
    before = (out / "rl.jsonl").stat().st_mtime_ns
    assert prepare(inputs, out) == 0 and "is prepared" in capsys.readouterr().out
    assert (out / "rl.jsonl").stat().st_mtime_ns == before
    assert prepare(inputs, out, "--config.prepare.selected=3") == 2
    assert "prepare.selected: 4 -> 3" in capsys.readouterr().err


def test_order_as_published_and_chosen_responses(inputs, tmp_path):
    """by hand: no labels, and SFT on the chosen responses of the reward model's part."""
    out = tmp_path / "data"
    more = ("--config.prepare.relabel=false", "--config.prepare.supervised=None")
    assert prepare(inputs, out, *more) == 0
    reward = rows(out / "reward.jsonl")
    assert all((row["score_chosen"], row["score_rejected"]) == (8.0, 6.5) for row in reward)
    assert all("swapped" not in row for row in reward) and not (out / "scores").exists()
    expected = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in reward]
    assert rows(out / "sft.jsonl") == expected


def test_killed_while_labelling(inputs, tmp_path, monkeypatch, capsys):
    """story: resumes with the stored scores that are intact; a changed input is reported."""
    out, calls = tmp_path / "data", []
    scored = pipeline._score_batch

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(*arguments)

    more = ("--config.reward.batch_size=4",)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_score_batch", dies)
        assert prepare(inputs, out, *more) == 130
    assert not (out / "rl.jsonl").exists()
    scores = out / "scores" / "preferences.jsonl"
    assert len(rows(scores)) == 1 + 16
    with scores.open("ab") as file:
        file.write(b"\0\0\0\n[0.5, 0.5]\n[0.")  # as after a power cut
    shard = inputs / "ultrafeedback_binarized/data/train_prefs-00000-of-00002.parquet"
    shutil.copy(shard, tmp_path / "kept")
    parquet.write_table(parquet.ParquetFile(shard).read().slice(1), shard)
    assert prepare(inputs, out, *more) == 2
    assert "scores of other pairs: the inputs have changed" in capsys.readouterr().err
    shutil.move(tmp_path / "kept", shard)
    assert prepare(inputs, out, *more) == 0
    assert f"{scores} is damaged; pairs from 17 on are scored again" in capsys.readouterr().out
    uninterrupted = tmp_path / "whole"
    assert prepare(inputs, uninterrupted) == 0
    assert rows(out / "rl.jsonl") == rows(uninterrupted / "rl.jsonl")


def test_mistakes_are_told_together(inputs, tmp_path, capsys):
    """law: every input that is not there, in one message; settings out of range; another config."""
    wrong = ["--config.prepare.test=/none/test", "--config.prepare.supervised=/none/sft"]
    assert prepare(inputs, tmp_path / "a", *wrong, "--config.model.path=/none/model") == 2
    output = capsys.readouterr().err
    assert all(f"/none/{name}" in output for name in ("test", "sft", "model"))
    assert prepare(inputs, tmp_path / "b", "--config.prepare.reward_share=1.0") == 2
    assert "prepare.reward_share must be in (0, 1), not 1.0" in capsys.readouterr().err
    assert main(["prepare", "--config=configs/rl.py"]) == 2
    assert "no section prepare; see configs/paper/data.py" in capsys.readouterr().err
    assert prepare(inputs, tmp_path / "c", "--config.prepare.max_tokens=1") == 2
    assert "no row has at most 1 tokens" in capsys.readouterr().err


def test_made_up_inputs_are_as_published(inputs):
    """oracle: `datasets` reads them; the tokenizers have the special tokens and ids of the real."""
    place = inputs / "ultrafeedback_binarized"
    files = {"train_prefs": str(place / "data" / "train_prefs-*.parquet")}
    cached = str(place / "cache")
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=cached)["train_prefs"]
    assert loaded.to_list() == [row for _, row in data.read_rows(place / "train_prefs").rows]
    saved = datasets.load_from_disk(str(place / "test_prefs"))
    assert saved.to_list() == [row for _, row in data.read_rows(place / "test_prefs").rows]
    assert saved.column_names == loaded.column_names
    pythia = data.load_tokenizer(inputs / "pythia")
    ends = (pythia.eos_token, pythia.eos_token_id, pythia.pad_token, pythia.pad_token_id)
    assert ends == ("<|endoftext|>", 0, "<|padding|>", 1)
    assert data.apply_template(pythia, data.read_template("pythia")) == 2
    text = "naïve ∑\n\n你"
    assert pythia.decode(pythia(text)["input_ids"]) == text
    armorm = data.load_tokenizer(inputs / "reward")
    turn = [{"role": "user", "content": text}]
    ids = armorm.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = armorm(ids, add_special_tokens=False)["input_ids"]
    assert tuple(ids[-5:]) == GATE and ids[0] == 128000
    scorer, params = models.load_scorer(inputs / "reward")
    assert len(scorer.names) == 1 + 19
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert (19, 16) in shapes and (128_257, 16) in shapes
    assert np.isfinite(jax.tree.leaves(params)[0]).all()


TEXTS = [("a" * n, "b" * (5 - n)) for n in range(6)]  # the longest are in pairs 0 and 5, 1 and 4


def _turn(role, text):
    return [{"role": role, "content": text}]


PAIRS = PromptSet(
    prompts=tuple(_turn("user", f"{n}") for n in range(6)),
    columns={
        name: [_turn("assistant", texts[side]) for texts in TEXTS]
        for side, name in enumerate(("chosen", "rejected"))
    },
    source="pairs",
)


def counting(fails_at=None):
    """Rewards by length; which prompts were scored."""
    seen = []

    def length(prompts, completions):
        seen.append([prompt[0]["content"] for prompt in prompts])
        if len(seen) == fails_at:
            raise KeyboardInterrupt
        return [float(len(completion[0]["content"])) for completion in completions]

    return RewardSet((RewardFunction("length", length),)), seen


def test_scores_go_on_where_they_stopped(tmp_path):
    """story: cut off in the third batch and within a line; finished rows are not rescored."""
    path = tmp_path / "scores" / "pairs.jsonl"
    rewards, seen = counting(fails_at=3)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(PAIRS, rewards, path, "d", 2)
    assert seen[0] == ["0", "5", "0", "5"]
    stored = path.read_text()
    assert len(stored.splitlines()) == 5
    path.write_text(stored[:-4])  # the last pair's line has lost its end
    rewards, seen = counting()
    result = score_pairs(PAIRS, rewards, path, "d", 2)
    assert [set(batch) for batch in seen] == [{"4", "2"}, {"3"}]
    assert result.tolist() == [[n, 5 - n] for n in range(6)]
    written = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert written == result[[0, 5, 1, 4, 2, 3]].tolist()
    rewards, seen = counting()
    assert score_pairs(PAIRS, rewards, path, "d", 2).tolist() == result.tolist() and seen == []


def test_scores_of_other_inputs_are_refused(tmp_path):
    """law: detected by a digest."""
    path = tmp_path / "pairs.jsonl"
    score_pairs(PAIRS, counting()[0], path, "d", 4)
    with pytest.raises(ValueError, match="scores of other pairs: the inputs have changed"):
        score_pairs(PAIRS, counting()[0], path, "e", 4)


def test_values_that_json_cannot_hold(tmp_path):
    """by hand: dates, bytes and NaN in messages or columns are written in their readable form."""
    message = {"role": "user", "content": "hi", "time": datetime.datetime(2024, 1, 2)}
    columns = {"prompt_id": [uuid.UUID(int=1)], "score_chosen": [math.nan], "raw": [b"ab"]}
    pipeline._write_rows(tmp_path / "rows.jsonl", PromptSet(([message],), columns, "rows"))
    assert rows(tmp_path / "rows.jsonl") == [
        {
            "prompt": [{"role": "user", "content": "hi", "time": "2024-01-02T00:00:00"}],
            "prompt_id": "00000000-0000-0000-0000-000000000001",
            "score_chosen": None,
            "raw": "YWI=",
        }
    ]
