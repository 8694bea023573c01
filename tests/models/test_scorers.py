"""Reward models against transformers, and ArmoRM against an oracle written out from its paper."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import ntkrl
from ntkrl import models, runtime
from ntkrl.models.families import FAMILIES
from ntkrl.models.scorers import ATTRIBUTES, GATE
from tests.models.families import CASES, EACH


def torch_scorer(case, directory, labels=1, **overrides):
    """Make and save a random sequence classifier of a case's shape."""
    config_class, architecture, settings = CASES[case]
    fields = {"num_labels": labels, "pad_token_id": 1, **overrides}
    config = getattr(transformers, config_class)(**copy.deepcopy({**settings, **fields}))
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[architecture].scorer)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def right_padded(vocab, lengths=(9, 5, 1), columns=9, pad=1):
    """Random rows of some lengths."""
    tokens = np.random.default_rng(0).integers(2, vocab, (len(lengths), columns))
    mask = np.arange(columns)[None] < np.array(lengths)[:, None]
    return np.where(mask, tokens, pad), mask


@pytest.mark.parametrize("case", EACH)
def test_scores_equal_torch(tmp_path, case):
    """oracle: transformers' classifier, rows of different lengths; trunk in two dtypes."""
    model = torch_scorer(case, tmp_path)
    scorer, params = models.load_scorer(tmp_path)
    tokens, mask = right_padded(scorer.vocab_size)
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits[:, 0]
    arguments = (jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(3, int))
    result = jax.jit(scorer.score)(params, *arguments)["score"]
    np.testing.assert_allclose(result, out.numpy(), atol=1e-4)
    assert out.abs().max() > 0.1
    scorer, params = models.load_scorer(tmp_path, jnp.bfloat16)
    assert params["score"]["weight"].dtype == jnp.float32
    assert params["embed"]["embedding"].dtype == jnp.bfloat16
    assert jax.eval_shape(scorer.score, params, *arguments)["score"].dtype == jnp.float32


def test_a_pad_token_that_ends_texts(tmp_path):
    """oracle: if eos is the pad token, the reference scores the token before it."""
    model = torch_scorer("llama 3", tmp_path, pad_token_id=0)
    scorer, params = models.load_scorer(tmp_path)
    tokens = np.array([[5, 6, 7, 0, 0], [5, 6, 7, 8, 0]])
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits[:, 0]
    result = scorer.score(params, jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(2, int))
    np.testing.assert_allclose(result["score"], out.numpy(), atol=1e-4)


def test_directories_that_are_no_reward_model(tmp_path):
    """law: too many labels, no pad token, a language model: one sentence each."""
    torch_scorer("gpt-neox", tmp_path / "many", labels=3)
    path = tmp_path / "many" / "config.json"
    raw = json.loads(path.read_text())
    raw["pad_token_id"] = None
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="it has 3 labels; a reward model has one") as caught:
        models.load_scorer(tmp_path / "many")
    assert "pad_token_id must be a token id, not None" in str(caught.value)
    raw["architectures"] = ["GPTNeoXForCausalLM"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="'GPTNeoXForCausalLM' is not a known reward model"):
        models.load_scorer(tmp_path / "many")
    with pytest.raises(ValueError, match="architecture .* is unknown"):
        raw["architectures"] = ["GPTNeoXForSequenceClassification"]
        path.write_text(json.dumps(raw))
        ntkrl.load(tmp_path / "many")


ARMO = {
    "vocab_size": 128257,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "pad_token_id": 128256,
}


@pytest.fixture(scope="module")
def armo(tmp_path_factory):
    """A tiny ArmoRM directory, its torch trunk and its heads as numpy."""
    directory = tmp_path_factory.mktemp("armo")
    config = transformers.LlamaConfig(**ARMO)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    trunk = transformers.LlamaModel(config).eval()
    rng = np.random.default_rng(0)
    count, inner, width = len(ATTRIBUTES), 8, ARMO["hidden_size"]
    sizes = [width, inner, inner, inner, count]
    heads = {
        "regression_layer.weight": rng.normal(size=(count, width)),
        "reward_transform_matrix": np.eye(count) - 0.3 * rng.random((count, count)),
        "gating.logit_scale": np.array([1.7]),
    }
    for i in range(4):
        heads[f"gating.layers.{i}.weight"] = rng.normal(size=(sizes[i + 1], sizes[i]))
        heads[f"gating.layers.{i}.bias"] = rng.normal(size=sizes[i + 1])
    heads = {name: array.astype(np.float32) for name, array in heads.items()}
    stored = {f"model.{name}": t.detach().numpy() for name, t in trunk.state_dict().items()}
    save_file(stored | heads, directory / "model.safetensors")
    raw = {
        **config.to_dict(),
        "architectures": ["LlamaForRewardModelWithGating"],
        "num_objectives": count,
        "gating_hidden_dim": inner,
        "gating_n_hidden": 3,
        "gating_temperature": 10,
    }
    (directory / "config.json").write_text(json.dumps(raw))
    return directory, trunk, heads


def slow_armo(trunk, heads, tokens, gate):
    """One text at a time, loops over layers and attributes, no padding."""
    with torch.no_grad():
        hidden = trunk(torch.tensor([tokens])).last_hidden_state[0].numpy()
    rewards = [float(row @ hidden[-1]) for row in heads["regression_layer.weight"]]
    x = hidden[gate]
    for i in range(4):
        x = heads[f"gating.layers.{i}.weight"] @ x + heads[f"gating.layers.{i}.bias"]
        x = np.maximum(x, 0) if i < 3 else x
    weights = np.exp(x / 10) / np.exp(x / 10).sum() * heads["gating.logit_scale"][0]
    score = 0.0
    for k in range(19):
        adjusted = sum(rewards[j] * heads["reward_transform_matrix"][j, k] for j in range(19))
        score += weights[k] * adjusted
    return score, rewards


def test_armorm_equals_the_slow_oracle(armo):
    """oracle: texts of different lengths; the gate's position is an input, attributes are raw."""
    directory, trunk, heads = armo
    scorer, params = models.load_scorer(directory)
    assert scorer.gate == GATE and scorer.names == ("score", *ATTRIBUTES)
    rows = [[128000, 5, 6, *GATE, 9, 10, 128009], [128000, 7, *GATE, 3, 128009], [4, *GATE, 8]]
    gates = [3, 2, 1]
    tokens = np.full((3, 12), scorer.pad_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    mask = tokens != scorer.pad_id
    arguments = (jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(gates))
    result = jax.jit(scorer.score)(params, *arguments)
    for i, row in enumerate(rows):
        score, rewards = slow_armo(trunk, heads, row, gates[i])
        assert float(result["score"][i]) == pytest.approx(score, abs=1e-4)
        attributes = [float(result[name][i]) for name in ATTRIBUTES]
        np.testing.assert_allclose(attributes, rewards, atol=1e-4)
    moved = scorer.score(params, *arguments[:2], jnp.asarray([0, 0, 0]))["score"]
    assert np.abs(np.asarray(moved - result["score"])).min() > 1e-4


def test_armorm_on_a_mesh_and_in_bfloat16(armo):
    """law: sharded params give the same scores; heads stay float32 under a bfloat16 trunk."""
    directory, _, _ = armo
    scorer, params = models.load_scorer(directory)
    mesh = runtime.make_mesh(1, 4, 2)
    _, sharded = models.load_scorer(directory, mesh=mesh)
    tokens = jnp.asarray([[4, *GATE, 8, 9]])
    arguments = (tokens, jnp.ones(tokens.shape, bool), jnp.asarray([1]))
    single = jax.jit(scorer.score)(params, *arguments)["score"]
    np.testing.assert_allclose(
        single, jax.jit(scorer.score)(sharded, *arguments)["score"], atol=1e-5
    )
    _, half = models.load_scorer(directory, jnp.bfloat16)
    assert half["gate"]["0"]["kernel"].dtype == jnp.float32
    assert half["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_armorm_needs_llama_3s_tokens(armo, tmp_path):
    """law: a vocabulary without the gate's tokens is refused before anything is read."""
    place = shutil.copytree(armo[0], tmp_path / "m")
    raw = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**raw, "vocab_size": 32000}))
    with pytest.raises(ValueError, match="does not hold Llama 3's special tokens"):
        models.load_scorer(place)
