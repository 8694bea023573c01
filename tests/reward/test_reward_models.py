"""Reward models on texts: templates, batches, the gate's position, and errors."""

import json

import jax
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ntkrl import data, runtime
from ntkrl.models import load_scorer
from ntkrl.models.scorers import ATTRIBUTES, GATE
from ntkrl.reward import RewardFunction, RewardModel, RewardSet
from tests.models.test_scorers import armo, slow_armo, torch_scorer  # noqa: F401

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = {
    "<|begin_of_text|>": 128000,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
    "[PAD]": 128256,
}


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    """Llama 3's special ids and template; all else a letter a token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    letters = {chr(c): c for c in range(10, 127)}
    vocabulary = {**SPECIAL, **letters, "assistant": 78191, "user": 882, "\n\n": 271}
    backend = Tokenizer(models.WordLevel(vocabulary))
    pattern = Regex(r"assistant|user|\n\n|[\s\S]")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "[PAD]",
        "chat_template": LLAMA_3,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return data.load_tokenizer(directory)


def reward(call, prompts, completions, conversational=False):
    """Rewards of a function alone."""
    made = RewardSet((RewardFunction("model", call),))
    return made(prompts, completions, [[1]] * len(prompts), {}, conversational)


@pytest.mark.parametrize("conversational", [False, True])
def test_armorm_on_texts(armo, llama_tokenizer, conversational):  # noqa: F811
    """oracle: the slow version, gate position from the prompt alone; a response cannot move it."""
    directory, trunk, heads = armo
    mesh = runtime.make_mesh(2, 1, 1, jax.devices()[:2])
    scorer, params = load_scorer(directory, mesh=mesh)
    call = RewardModel(scorer, params, llama_tokenizer, mesh, 2)
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    texts = ["hi", f"a{header}b", "x" * 9]
    users = ["why", f"w{header}y", "z"]
    prompts = [[{"role": "user", "content": u}] for u in users] if conversational else users
    result = reward(call, prompts, texts, conversational)
    for i, (user, text) in enumerate(zip(users, texts, strict=True)):
        turn = "<|start_header_id|>user<|end_header_id|>\n\n" + user
        start = "<|begin_of_text|>" + turn + header
        ids = llama_tokenizer(start + text + "<|eot_id|>", add_special_tokens=False)["input_ids"]
        until = llama_tokenizer(start, add_special_tokens=False)["input_ids"]
        assert until[-5:] == list(GATE)
        score, rewards = slow_armo(trunk, heads, ids, len(until) - 5)
        assert result.rewards[i] == pytest.approx(score, abs=1e-4)
        attributes = [result.extra[name][i] for name in ATTRIBUTES]
        np.testing.assert_allclose(attributes, rewards, atol=1e-4)
    assert result.logged["code-style"] == pytest.approx(np.mean(result.extra["code-style"]))


def test_classifiers_on_texts(tmp_path):
    """oracle: transformers, text by text; batches, order and padding change nothing."""
    model = torch_scorer("gpt-neox", tmp_path, vocab_size=40)
    data.save_tokenizer(tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    mesh = runtime.make_mesh(1, 1, 1, jax.devices()[:1])
    scorer, params = load_scorer(tmp_path, mesh=mesh)
    calls = [RewardModel(scorer, params, tokenizer, mesh, size) for size in (1, 16)]
    prompts = [f"{n}=" for n in range(20)]
    texts = ["1+" * (n % 7) + "2" for n in range(20)]
    result = [reward(call, prompts, texts).rewards for call in calls]
    # sums over other padded lengths round otherwise, in the seventh digit
    np.testing.assert_allclose(result[0], result[1], atol=1e-5)
    for i in (0, 6, 19):
        ids = tokenizer(prompts[i] + texts[i], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, 0].item()
        assert result[0][i] == pytest.approx(expected, abs=1e-4)
    back = reward(calls[1], prompts[::-1], texts[::-1]).rewards
    np.testing.assert_allclose(back[::-1], result[1], atol=1e-5)
    # one program per batch size and padded length: (1, 8), (1, 16), (16, 16)
    assert calls[1].score._cache_size() == 3


def test_texts_that_do_not_fit(tmp_path):
    """law: too long, no template for messages, a tokenizer of another model: one sentence."""
    torch_scorer("gpt-neox", tmp_path, vocab_size=40, max_position_embeddings=16)
    data.save_tokenizer(tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    scorer, params = load_scorer(tmp_path)
    mesh = runtime.make_mesh(-1, 1, 1)
    call = RewardModel(scorer, params, tokenizer, mesh)
    with pytest.raises(ValueError, match=r"reads texts of 1 to 16 tokens\n  row 1 has 22 tokens"):
        reward(call, ["1=", "2="], ["1", "1" * 20])
    with pytest.raises(ValueError, match="its tokenizer has no chat template"):
        reward(call, [[{"role": "user", "content": "1"}]], ["1"], True)
    tokenizer.add_tokens([f"t{i}" for i in range(30)])
    with pytest.raises(ValueError, match=r"has \d+ entries, the model's vocabulary 40"):
        RewardModel(scorer, params, tokenizer, mesh)


def test_a_gate_needs_its_template(armo, llama_tokenizer):  # noqa: F811
    """law: no template is refused at the start, one without the turn when it is used."""
    mesh = runtime.make_mesh(-1, 1, 1)
    scorer, params = load_scorer(armo[0], mesh=mesh)
    template = llama_tokenizer.chat_template
    try:
        llama_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        call = RewardModel(scorer, params, llama_tokenizer, mesh)
        with pytest.raises(ValueError, match=r"writes no start of the assistant's turn"):
            reward(call, ["a"], ["b"])
        llama_tokenizer.chat_template = None
        with pytest.raises(ValueError, match="reads turns of a conversation, but its tokenizer"):
            RewardModel(scorer, params, llama_tokenizer, mesh)
    finally:
        llama_tokenizer.chat_template = template


def test_sharded_scorers_give_the_same(tmp_path):
    """law: on a mesh of eight, sharded by the family's patterns."""
    torch_scorer("gpt-neox", tmp_path, vocab_size=40)
    data.save_tokenizer(tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    result = []
    for mesh in (runtime.make_mesh(2, 2, 2), runtime.make_mesh(1, 1, 1, jax.devices()[:1])):
        scorer, params = load_scorer(tmp_path, mesh=mesh)
        call = RewardModel(scorer, params, tokenizer, mesh, 4)
        result.append(reward(call, ["1=", "2="] * 3, ["3", "4+5"] * 3).rewards)
    np.testing.assert_allclose(*result, atol=1e-5)
