"""Runs with users' inputs: adapters, templates, reward models, normalised rewards."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import ntkrl
from ntkrl import data, models, trees
from ntkrl.main import main
from tests.models.families import torch_model
from tests.models.test_scorers import torch_scorer
from tests.training.test_train import ROOT, UNWATCHED, lines, one_device, words  # noqa: F401


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama with the built-in task's tokenizer."""
    place = tmp_path_factory.mktemp("llama")
    torch_model("llama 3", place, vocab_size=18, initializer_range=0.05)
    data.save_tokenizer(place)
    return place


LORA = ["--config.model.lora.rank=2", "--config.model.lora.modules=q_proj|v_proj|mlp/.*"]


def test_adapters_train_alone_and_come_out_twice(llama, tmp_path, capsys):
    """story: a Llama's adapters alone move by default; merged model and PEFT directory come out."""
    run = tmp_path / "run"
    arguments = words(
        llama,
        run,
        *LORA,
        "--config.stages[0].steps=2",
        "--config.stages[0].parameters=(('.*', 1e-2),)",
    )
    assert main(arguments) == 0, capsys.readouterr().err
    assert "stage 'all' trains the adapters alone" in capsys.readouterr().out
    adapted, params = ntkrl.load(run / "adapter")
    base, base_params = ntkrl.load(llama)
    leaves = trees.named_leaves(params)
    for name, leaf in trees.named_leaves(base_params).items():
        np.testing.assert_array_equal(leaves[name], leaf)
    moved = [name for name in leaves if name.endswith("lora_b") and np.abs(leaves[name]).max() > 0]
    assert len(moved) == 5
    merged, merged_params = ntkrl.load(run / "export")
    tokens = jnp.asarray([[3, 4, 5, 6]])
    features = [
        np.asarray(policy.features(p, tokens))
        for policy, p in ((adapted, params), (merged, merged_params), (base, base_params))
    ]
    np.testing.assert_allclose(features[0], features[1], atol=1e-5)
    assert np.abs(features[0] - features[2]).max() > 1e-5
    assert transformers.AutoModelForCausalLM.from_pretrained(run / "export").config.vocab_size == 18


def test_an_adapter_that_is_not_the_export_is_not_written(llama, tmp_path, capsys):
    """story: classifier-first RL moves the base's head, so that export/ alone is the model."""
    run = tmp_path / "run"
    stages = ["--config.stages[0].steps=1", "--config.stages[1].steps=1", *UNWATCHED]
    rates = "--config.stages[0].parameters=(('head/.*', 1e-2), ('.*', None))"
    assert main(words(llama, run, *LORA, *stages, rates, config="cfrl")) == 0
    before, _, after = capsys.readouterr().out.partition("there will be no adapter/")
    assert "stage 'classifier' trains head/weight of the base" in before
    assert "stage 'all' trains the adapters alone" in before
    assert "adapter/ is not written: head/weight of the base moved too" in after
    assert not (run / "adapter").exists()
    exported, start = (
        trees.named_leaves(ntkrl.load(place)[1]) for place in (run / "export", llama)
    )
    assert np.abs(exported["head/weight"] - start["head/weight"]).max() > 1e-3
    # the second stage trains adapters alone, merged into the export
    np.testing.assert_array_equal(exported["embed/embedding"], start["embed/embedding"])


def test_pythias_template_adds_tokens_and_rows(tmp_path, capsys):
    """story: two special tokens and their rows, a template, an export that talks the same way."""
    model, run = tmp_path / "model", tmp_path / "run"
    torch_model("gpt-neox", model, vocab_size=18)
    data.save_tokenizer(model)
    rows = [{"prompt": [{"role": "user", "content": str(n)}]} for n in range(10, 22)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = words(
        model,
        run,
        f"--config.data.path={prompts}",
        "--config.model.template=pythia",
        "--config.stages[0].steps=1",
    )
    assert main(arguments) == 0, capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    policy, _ = ntkrl.load(run / "export")
    assert len(tokenizer) == policy.vocab_size == 20
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    written = tokenizer.apply_chat_template(talk, tokenize=False)
    assert written == "<|user|>1<|endoftext|><|assistant|>2<|endoftext|>"
    asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>1<|endoftext|><|assistant|>"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert ids == [18, tokenizer("1")["input_ids"][0], 0, 19]


def test_a_reward_model_normalised_by_its_own_rewards(llama, tmp_path, capsys):
    """story: evaluate writes rewards of a reward model; training reads them as shift and scale."""
    scorer = tmp_path / "scorer"
    torch_scorer("gpt-neox", scorer, vocab_size=20)
    data.save_tokenizer(scorer)
    common = [f"--config.reward.function={scorer},repetition", "--config.stages[0].steps=1"]
    evaluate = ["evaluate", *words(llama, tmp_path / "eval", *common)[1:]]
    assert main(evaluate) == 0, capsys.readouterr().err
    written = next((tmp_path / "eval" / "evaluations").glob("*.rewards.json"))
    raw = json.loads(written.read_text())["rewards"]
    assert set(raw) == {"scorer", "repetition"} and len(raw["scorer"]) == 8
    run = tmp_path / "run"
    only = tmp_path / "only.json"
    only.write_text(json.dumps({"rewards": {"scorer": raw["scorer"]}}))
    arguments = words(llama, run, *common, f"--config.reward.normalisation={only}")
    assert main(arguments) == 0, capsys.readouterr().err
    last = lines(run)[-1]
    mean, deviation = np.mean(raw["scorer"]), np.std(raw["scorer"], ddof=1)
    normal = (last["rewards/scorer/mean"] - mean) / deviation
    assert last["reward"] == pytest.approx(normal + last["rewards/repetition/mean"], abs=1e-4)
    arguments = words(llama, tmp_path / "no", f"--config.reward.normalisation={only}")
    assert main(arguments) == 2
    assert "holds rewards of scorer, which no function gives" in capsys.readouterr().err


def test_rewards_that_fail_are_counted(llama, tmp_path, capsys):
    """story: a function that hangs costs its default and a line, and the run goes on."""
    code = tmp_path / "mine.py"
    code.write_text("def hang(completions):\n    while True: pass\n")
    run = tmp_path / "run"
    arguments = words(
        llama,
        run,
        f"--config.reward.function={code}:hang,repetition",
        "--config.reward.timeout=0.5",
        "--config.reward.on_failure=-2.0",
        "--config.stages[0].steps=2",
    )
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "did not answer within 0.5 s" in output.out + output.err
    last = lines(run)[-1]
    assert last["rewards/hang/failures"] == 1.0 and last["rewards/hang/mean"] == -2.0
    assert (run / "finished").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.model.template=chatml", "model.template 'chatml' is unknown; give pythia or"),
        ("--config.model.lora.rank=-1", "lora: rank -1 and alpha 16.0 must be positive"),
        ("--config.reward.function=expresions", "did you mean 'expressions'"),
        ("--config.reward.timeout=0.0", "reward.timeout must be above 0 seconds, not 0.0"),
        ("--config.model.vocab_size=5", "has 18 entries, the model's vocabulary 5"),
    ],
)
def test_mistakes(llama, tmp_path, capsys, word, message):
    """law: one sentence, status 2, no trace."""
    assert main(words(llama, tmp_path / "run", word)) == 2
    output = capsys.readouterr().err
    assert message in output and "Traceback" not in output


def test_front_door():
    """law: names of the package are resolved lazily; unknown names raise."""
    assert ntkrl.load is models.load and ntkrl.ntk.Contexts
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = ntkrl.lode
    assert jax.devices()


def preferences(path, count):
    """Pairs whose chosen completion is even, in words of the built-in tokenizer."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        even, odd = (2 * int(n) for n in rng.integers(1, 5, 2))
        rows.append(
            {"prompt": f"{rng.integers(10, 99)}=", "chosen": str(even), "rejected": str(odd + 1)}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_reward_model_is_trained_and_used(llama, tmp_path, capsys):
    """story: preferences → reward model → transformers loads it, and RL is rewarded by it."""
    pairs, run = tmp_path / "pairs.jsonl", tmp_path / "reward"
    preferences(pairs, 120)
    arguments = [
        "train",
        "--config=configs/reward.py",
        f"--config.model.path={llama}",
        f"--config.run_dir={run}",
        f"--config.data.path={pairs}",
        "--config.data.prompts_per_step=16",
        "--config.stages[0].steps=40",
        "--config.stages[0].parameters=(('.*', 1e-2),)",
        "--config.mesh.data=1",
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    result = lines(run)
    assert result[0]["eval/accuracy"] < 0.9 and result[-1]["eval/accuracy"] == 1.0
    assert abs(result[-1]["mean_reward"]) < 2.0  # centred
    scorer, params = models.load_scorer(run / "export")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    for text in ("12=4", "12=5"):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        here = scorer.score(
            params, jnp.asarray(ids.numpy()), jnp.ones(ids.shape, bool), jnp.zeros(1, int)
        )["score"][0]
        assert float(here) == pytest.approx(theirs(ids).logits.item(), abs=1e-4)
    rewarded = words(
        llama,
        tmp_path / "rl",
        f"--config.reward.function={run / 'export'}",
        "--config.stages[0].steps=1",
    )
    assert main(rewarded) == 0, capsys.readouterr().err
    assert "rewards/export/mean" in lines(tmp_path / "rl")[-1]
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    _, again = models.load_scorer(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert main(["report", str(run)]) == 0, capsys.readouterr().err


def test_mistakes_with_preferences(llama, tmp_path, capsys):
    """law: missing columns, other forms, settings that do not apply: one sentence each."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1=", "chosen": "2"}\n')
    start = ["train", "--config=configs/reward.py", f"--config.run_dir={tmp_path / 'run'}"]
    model = f"--config.model.path={llama}"
    assert main([*start, model]) == 2
    assert "data.path is missing" in capsys.readouterr().err
    assert main([*start, model, f"--config.data.path={pairs}"]) == 2
    assert "no 'rejected' (missing or null)" in capsys.readouterr().err
    pairs.write_text('{"prompt": "1=", "chosen": "2", "rejected": [{"role": "user"}]}\n')
    assert main([*start, model, f"--config.data.path={pairs}"]) == 2
    assert "'rejected' is list; expected text" in capsys.readouterr().err
    preferences(pairs, 40)
    assert main([*start, model, f"--config.data.path={pairs}", "--config.model.lora.rank=2"]) == 2
    assert "reward models are trained without model.lora" in capsys.readouterr().err


def test_problems_of_all_pieces_come_at_once(tmp_path, capsys):
    """law: model, tokenizer, each reward and its file: every problem in one message."""
    model, scorer = tmp_path / "model", tmp_path / "scorer"
    torch_model("llama 3", model, vocab_size=18)
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "intermediate_size": 21}))
    torch_scorer("gpt-neox", scorer, labels=3, pad_token_id=None)
    arguments = words(model, tmp_path / "run", f"--config.reward.function={scorer},nothing.py:x")
    assert main(arguments) == 2
    output = capsys.readouterr().err
    for part in (
        "it has 3 labels; a reward model has one",
        "pad_token_id must be a token id, not None",
        "nothing.py does not exist",
        "mlp.gate_proj.weight has shape (20, 24), expected (21, 24)",
    ):
        assert part in output
    (model / "config.json").write_text(json.dumps(raw))
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert "has no tokenizer" in output and "it has 3 labels" in output
    data.save_tokenizer(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": [{"role": "user", "content": "1"}]}) + "\n")
    (model / "config.json").write_text(json.dumps({**raw, "vocab_size": 17}))
    assert main([*arguments, f"--config.data.path={rows}"]) == 2
    output = capsys.readouterr().err
    assert "has 18 entries, the model's vocabulary 17" not in output  # its tensors say otherwise
    assert "model.embed_tokens.weight has shape (18, 24), expected (17, 24)" in output
    assert "has 1 prompt, too few to hold any out" in output
    (model / "config.json").write_text(json.dumps(raw))
    rows.write_text(rows.read_text() * 8)
    more = [f"--config.data.path={rows}", "--config.model.vocab_size=17"]
    assert main([*arguments, *more]) == 2
    output = capsys.readouterr().err
    for part in (
        "has 18 entries, the model's vocabulary 17",
        "the tokenizer has no chat template",
        "it has 3 labels",
    ):
        assert part in output
