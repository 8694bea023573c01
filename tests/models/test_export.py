"""What leaves is what came in: files beside the tensors, the model card, the names of bases."""

import json

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import ntkrl
from ntkrl import models
from ntkrl.models import hf_export
from tests.models.families import tokens_and_mask, torch_logits, torch_model

KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
CARD = "---\nlicense: apache-2.0\nlanguage: en\nmetrics: [a]\n---\n# Base\n\nIts text.\n"


@pytest.fixture
def directory(tmp_path):
    """A model with every kind of file beside it, and some that do not belong to it."""
    path = tmp_path / "base"
    torch_model("llama 3", path)
    for name in KEPT:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(f"content of {name}")
    (path / "README.md").write_text(CARD)
    for name in ("optimizer.pt", "training_args.bin", "modeling_own.py", "trainer_state.json"):
        (path / name).write_text("x")
    return path


def test_files_beside_the_tensors_are_kept(directory, tmp_path):
    """law: byte by byte, all that belong to the model; nothing that could run."""
    ntkrl.export(tmp_path / "out", *ntkrl.load(directory))
    names = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    expected = {*KEPT, "config.json", "model.safetensors", "README.md", hf_export.MANIFEST}
    assert names == expected
    for name in KEPT:
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()


def test_tokenizer_of_another_directory(directory, tmp_path):
    """law: a tokenizer with a new template replaces the base's in full; other files stay."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("new")
    policy, params = ntkrl.load(directory)
    ntkrl.export(tmp_path / "out", policy, params, source=str(tmp_path / "tokenizer"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_unread_config_entries_are_kept(directory, tmp_path):
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "head_mask_of_someone": [1], "pretraining_tp": 1}))
    ntkrl.export(tmp_path / "out", *ntkrl.load(directory))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**json.loads(path.read_text()), "dtype": "float32"}


def test_model_card(directory, tmp_path):
    """by hand: facts of the training on top, the base's card below, metadata of its license."""
    policy, params = ntkrl.load(directory)
    training = models.Training({"Method": "rl", "Steps": 7}, ("rl",))
    models.export(tmp_path / "out", policy, params, training=training)
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "tags": ["ntkrl", "rl"],
    }
    assert card.text.split("\n## Card of the base model\n\n") == [
        f"\n# Model trained with ntkrl\n\n- Base model: `{directory}`\n- Method: rl\n- Steps: 7\n",
        "# Base\n\nIts text.\n",
    ]
    # exported once more, cards stand below each other
    models.export(tmp_path / "again", *ntkrl.load(tmp_path / "out"))
    text = (tmp_path / "again" / "README.md").read_text()
    assert text.count("# Model trained with ntkrl") == 2 and text.count("Its text.") == 1


@pytest.mark.parametrize(
    "card", ["---\n: : [\n---\nbad metadata", "no metadata", "---\n- 1\n---\n", b"\xff"]
)
def test_damaged_cards_are_text(directory, tmp_path, card):
    content = card if isinstance(card, bytes) else card.encode()
    (directory / "README.md").write_bytes(content)
    ntkrl.export(tmp_path / "out", *ntkrl.load(directory))
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")


def test_bases_keep_the_name_that_the_user_gave(directory, tmp_path, monkeypatch):
    """law: a hub name stays one, though its files are read from a cache."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(directory))
    lora = models.ModelOptions(lora=models.Lora(rank=2))
    policy, params = ntkrl.load("someone/model", options=lora)
    models.export_adapter(tmp_path / "adapter", policy, params)
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "someone/model"
    models.export_adapter(tmp_path / "again", *ntkrl.load(tmp_path / "adapter"))
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == raw
    card = huggingface_hub.ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.base_model == "someone/model" and card.data.library_name == "peft"
    models.export(tmp_path / "merged", policy, params)
    card = huggingface_hub.ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == "someone/model"


@pytest.mark.parametrize("case", ["qwen2 tied, local", "gemma 3"])
def test_head_of_other_numbers_beside_a_tied_config(tmp_path, case):
    """oracle: transformers keeps the stored head; a copy of the embedding stays tied."""
    model = torch_model(case, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    for changed in (False, True):
        head = embedding.copy()
        head[-1, -1] += changed
        save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
        policy, params = ntkrl.load(tmp_path / "m")
        assert policy.tied is not changed
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", attn_implementation="eager"
        )
        tokens, mask = tokens_and_mask(policy.vocab_size)
        features = policy.features(params, jnp.asarray(tokens), jnp.asarray(mask))
        ours = np.asarray(policy.head(params, features))
        expected = torch_logits(model.eval(), tokens, mask)[0]
        np.testing.assert_allclose(ours[mask], expected[mask], atol=1e-4)
    ntkrl.export(tmp_path / "out", policy, params)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_index_beside_a_single_file(directory):
    """oracle: transformers reads the single file; an index of an earlier save is stale."""
    expected = ntkrl.load(directory)[1]
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    again = ntkrl.load(directory)[1]
    np.testing.assert_array_equal(again["embed"]["embedding"], expected["embed"]["embedding"])
