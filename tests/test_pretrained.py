"""The pretrained quickstart: its task and reward, and its configs on a tiny GGUF file."""

import json
import re

import numpy as np
import pytest
import transformers

from ntkrl.configs.pretrained import categories, lists
from ntkrl.main import main
from tests.models.families import torch_model
from tests.models.gguf_models import byte_level, write_gguf


def answers(*texts):
    """Return completions of conversations, as rewards get them."""
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize(
    ("category", "text", "reward"),
    [
        ("birds", "Robin, crow, eagle", 1.0),
        ("birds", "The Owls, a dove and the Geese", 0.0),  # two items
        ("birds", "The owls, doves, and the Geese.\n", 1.0),
        ("birds", "crow, Crows, the crow", 1 / 3),  # one member
        ("birds", "crow, robin, table", 2 / 3),
        ("birds", "crow, robin, owl, eagle", 0.0),
        ("birds", "crow, robin,", 2 / 3),
        ("fruits", "Cherries, peaches, Strawberry", 1.0),
        ("metals", "**Gold**, *silver*, tin!", 1.0),
        ("European countries", "France, the Netherlands, UK", 1.0),
        ("birds", "", 0.0),
    ],
)
def test_reward_by_hand(category, text, reward):
    """by hand: a third for each distinct right member, in any spelling, of exactly three items."""
    assert lists.reward(answers(text), [category]) == [pytest.approx(reward)]


def test_lists_are_well_formed():
    """law: members are in the form that answers are brought into, and each category has enough."""
    for name, members in lists.MEMBERS.items():
        assert len(members) >= (9 if name == "planets" else 20), name
        assert all(re.fullmatch(r"[a-z0-9'.#+ -]+", member) for member in members), name
        assert {lists.normalised(member, members) for member in members} == members
        text = categories.CATEGORIES[name].split(",")
        assert len(text) == len(members), name  # none twice
    assert not set(lists.TRAIN) & set(lists.TEST)
    assert len(lists.TEST) == 11 and len(lists.MEMBERS) == 34


TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def test_cfrl_from_a_gguf_file(tmp_path, monkeypatch):
    """story: trains both stages on a file, exports a directory that names it, and reports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens = byte_level(31) | {"tokenizer.chat_template": TEMPLATE}
    tokens["tokenizer.ggml.tokens"] = byte_level(400)["tokenizer.ggml.tokens"]
    letters = [chr(c) for c in range(0x21, 0x7F) if not chr(c).islower()]
    for place, letter in enumerate(letters):
        tokens["tokenizer.ggml.tokens"][31 + place] = letter
    tokens["tokenizer.ggml.token_type"] = byte_level(400)["tokenizer.ggml.token_type"]
    model = torch_model("llama", vocab_size=400, max_position_embeddings=256)
    write_gguf("tiny.gguf", model, tokens=tokens)
    lists.write("data")
    flags = ["--config=pretrained/cfrl", "--model=tiny.gguf", "--steps=2", "--run_dir=run"]
    data = {"path": "data/train.jsonl", "eval_path": "data/test.jsonl", "max_prompt_tokens": 200}
    flags += [f"--config.data.{name}={value}" for name, value in data.items()]
    flags += ["--config.rollout.max_completion_tokens=4", "--config.eval.samples_per_prompt=1"]
    flags += ["--config.probe.every_steps=None", "--config.schedule.chunk_tokens=128"]
    assert main(["train", *flags]) == 0
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "- Base model: `tiny.gguf`" in card and "Converted by ntkrl from `tiny.gguf`" in card
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(line)["reward"] for line in lines if '"reward"' in line]).all()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert not exported.config.tie_word_embeddings
