"""Where completions end, against transformers' `generate` on the same directory."""

import json

import jax
import pytest
import torch
import transformers

from ntkrl import data, models, runtime
from ntkrl.configs import rl
from ntkrl.data import save_tokenizer
from ntkrl.data.arithmetic_task import END, PADDING
from ntkrl.generate import make_sampler
from ntkrl.settings import read_settings
from ntkrl.setup import load_starting_model

TURN = (
    "{% for m in messages %}{{ m['role'] == 'user' and '(' or ')' }}{{ m['content'] }}"
    "{{ turn_end }}{% endfor %}{% if add_generation_prompt %}){% endif %}"
)


def write_model(path, text, end, ends):
    """A model that answers any prompt by `text`, a token called `end`, and the text again.

    Its attention and MLPs add nothing, and the head maps each token's embedding to its successor.
    """
    save_tokenizer(path)
    tokenizer = data.load_tokenizer(path)
    ids = tokenizer(text + end, add_special_tokens=False)["input_ids"]
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2 * len(tokenizer),
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    last = tokenizer("=")["input_ids"] + tokenizer(")")["input_ids"]
    follows = dict(zip([*last[:1], *ids], [*ids, ids[0]], strict=True)) | {last[1]: ids[0]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[...] = 1.0 if "norm" in name else 0.0
        model.model.embed_tokens.weight[:, : len(tokenizer)] += torch.eye(len(tokenizer))
        for before, after in follows.items():
            model.lm_head.weight[after, before] = 1.0
    if ends is not None:
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=1)
    model.save_pretrained(path)
    if ends is None:
        (path / "generation_config.json").unlink()


def sampled(path, tmp_path, prompt, stop=()):
    """Return text, ids and `finished` of a greedy completion by this library."""
    config = rl.get_config()
    config.model.path, config.run_dir = str(path), str(tmp_path / "run")
    config.rollout.max_completion_tokens, config.rollout.stop = 8, stop
    config.mesh.fsdp = 1
    config.reward.function = "think_format"
    settings = read_settings(config)
    model = load_starting_model(settings, tmp_path)
    prompts = data.PromptSet((prompt,), {}, "prompts")
    ids = data.encode_prompts(model.tokenizer, prompts, 16)
    batch = data.prompt_batch(ids, [0], model.tokenizer.pad_token_id, len(ids[0]), None)
    drawn = make_sampler(settings, model, 1, 0.0)(model.params, batch, jax.random.key(0))
    drawn = runtime.fetch(drawn)
    texts, ids = data.decode_completions(
        model.tokenizer, drawn.tokens, drawn.completion_mask, model.end_ids
    )
    return texts[0], ids[0], bool(drawn.finished[0])


def generated(path, prompt):
    """Return text and ids of transformers' greedy completion."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, len(ids) :]
    return tokenizer.decode(out, skip_special_tokens=True), out.tolist()


@pytest.mark.parametrize(
    ("end", "ends"),
    [(END, 0), (PADDING, [0, 1]), (PADDING, 1), (END, None), ("-", [13, 0])],
    ids=["end token", "list, end is the padding", "another end", "config.json", "plain token"],
)
def test_ends_of_generation_settings(tmp_path, end, ends):
    """oracle: `generate` stops after the token, which is counted and not part of the text."""
    write_model(tmp_path / "m", "34", end, ends)
    text, ids, finished = sampled(tmp_path / "m", tmp_path, "1=")
    expected_text, expected_ids = generated(tmp_path / "m", "1=")
    assert ids == expected_ids and len(ids) == 3 and finished
    assert text == "34" == expected_text.removesuffix("-")  # transformers writes a plain token


def test_end_of_a_turn(tmp_path):
    """law: a turn ends where the template ends it, though no setting says so."""
    write_model(tmp_path / "m", "34", PADDING, 0)
    assert len(sampled(tmp_path / "m", tmp_path, "1=")[1]) == 8
    template = TURN.replace("turn_end", repr(PADDING))
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "1"}]
    assert sampled(tmp_path / "m", tmp_path, messages) == ("34", [5, 6, 1], True)


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [((PADDING,), "34", 3), (("4" + PADDING,), "34", 3), (("4",), "34", 2)],
)
def test_stop_strings_with_special_tokens(tmp_path, stop, text, count):
    """by hand: a stop string may be a special token, hold one, or hold none."""
    write_model(tmp_path / "m", "34", PADDING, 0)
    result = sampled(tmp_path / "m", tmp_path, "1=", stop)
    assert (result[0], len(result[1]), result[2]) == (text, count, True)


@pytest.mark.parametrize("ends", ["1", [0, "x"], True, -1, [1.5]])
def test_ends_that_are_no_tokens(tmp_path, ends):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be a token id"):
        models.generation_end_ids(tmp_path)
