"""Explanations of a step's changes, from ledgers with known numbers."""

import numpy as np
import pytest

from ntkrl.main import main
from ntkrl.report import Place, explain, read_run
from tests.report.conftest import LENGTH, ledger_arrays, write_ledger, write_run

STEP, SEED = 10, 0


@pytest.fixture
def run(tmp_path):
    """A run with ledgers by sample at steps 5 and 10."""
    return write_run(tmp_path / "rl-0", "rl", SEED)


def columns(measure, name, tokens):
    """Sum of the ledger's columns whose names begin so, over some tokens."""
    arrays = ledger_arrays(SEED + STEP)
    prefix = f"{measure}/{name}"
    return sum(v[tokens].sum(axis=0) for k, v in arrays.items() if k.startswith(prefix))


@pytest.mark.parametrize("measure", ["entropy", "log_prob"])
def test_causes_add_up(run, measure):
    """by hand: completion 3's tokens: change, parts, and the two largest samples by R and G."""
    tokens = slice(3 * LENGTH, 4 * LENGTH)
    made = explain(read_run(run), STEP, measure, Place(completion=3), top=2)
    assert made.tokens == LENGTH and "probe completion 3: say <hi> → text 3" in made.title
    assert made.change == pytest.approx(columns(measure, "actual", tokens), rel=1e-5)
    assert sum(part.change for part in made.parts) == pytest.approx(made.change, rel=1e-3)
    head = columns(measure, "policy/head", tokens) + columns(measure, "kl/head", tokens)
    body = columns(measure, "policy/body", tokens) + columns(measure, "kl/body", tokens)
    order = np.argsort(-np.abs(head + body))[:2]
    assert [sample.name.split(",")[0] for sample in made.samples] == [f"#{n}" for n in order]
    np.testing.assert_allclose([s.R for s in made.samples], head[order], rtol=1e-5)
    np.testing.assert_allclose([s.G for s in made.samples], body[order], rtol=1e-5)
    changes = np.abs(ledger_arrays(SEED + STEP)[f"{measure}/actual"][tokens])
    assert [abs(p.change) for p in made.places] == pytest.approx(np.sort(changes)[::-1][:2])
    verb = "rose" if made.change > 0 else "fell"
    assert f"tokens {verb} by {abs(made.change):.3g} nats" in str(made)


def test_a_token_and_a_prompt(run):
    """by hand: one token has no places; a prompt by its text or number is all its completions."""
    one = explain(read_run(run), STEP, "log_prob", Place(completion=1, token=4))
    actual = ledger_arrays(SEED + STEP)["log_prob/actual"]
    assert one.places == () and one.change == pytest.approx(actual[LENGTH + 4], rel=1e-5)
    assert "token 4 (' 1.4') of probe completion 1" in one.title
    by_text = explain(read_run(run), STEP, place=Place(prompt="hi>"))
    assert by_text.tokens == 2 * LENGTH
    assert str(explain(read_run(run), STEP, place=Place(prompt=1))) == str(by_text)
    sums = np.abs(ledger_arrays(SEED + STEP)["entropy/actual"].reshape(5, -1).sum(axis=1))
    assert sums.size == 5
    most = explain(read_run(run), STEP)
    by_prompt = ledger_arrays(SEED + STEP)["entropy/actual"].reshape(5, -1).sum(axis=1)
    both = [by_prompt[:3].sum(), by_prompt[3:].sum()]
    assert f"probe prompt {int(np.argmax(np.abs(both)))}" in most.title


def test_groups_of_parameters(run):
    """by hand: with two groups of the body each is listed, largest first."""
    file = write_ledger(run, STEP, SEED, by="group")
    arrays = ledger_arrays(SEED + STEP, "group")
    for measure in ("log_prob", "entropy"):
        arrays[f"{measure}/policy/mlp"] = 0.25 * arrays[f"{measure}/policy/body"]
        arrays[f"{measure}/policy/body"] = 0.75 * arrays[f"{measure}/policy/body"]
    np.savez(file, **arrays)
    made = explain(read_run(run), STEP, place=Place(completion=0))
    assert made.samples == () and {g.name for g in made.groups} == {"head", "body", "mlp"}
    sizes = [abs(group.change) for group in made.groups]
    assert sizes == sorted(sizes, reverse=True)
    mlp = next(group.change for group in made.groups if group.name == "mlp")
    assert mlp == pytest.approx(arrays["entropy/policy/mlp"][:LENGTH].sum(), rel=1e-5)


MISTAKES = {
    ("--step=7",): "no ledger of step 7; ledgers are of steps 5, 10",
    ("--step=x",): "--step=x must be a whole number ≥ 0",
    ("--step=²",): "--step=² must be a whole number ≥ 0",
    ("--completion=1", "--prompt=say"): "choose a prompt or a completion, not both",
    ("--measure=entropi",): "measure must be one of log_prob, entropy, not 'entropi'; did you mean",
    ("--prompt=nothing",): "no probe prompt with 'nothing'; there are 0: 2+2=; 1: say <hi>",
    ("--prompt=9",): "prompt 9 does not exist: there are 2 probe prompts, from 0",
    ("--completion=5",): "completion 5 does not exist: there are 5 probe completions, from 0",
    ("--token=1",): "a token needs the number of its completion too",
    (
        "--completion=1",
        "--token=10",
    ): "token 10 does not exist: there are 10 tokens in completion 1",
    ("--top=0",): "top must be a whole number ≥ 1, not 0",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_are_one_sentence(run, capsys, words):
    """by hand: status 2 and a sentence that says what there is."""
    assert main(["explain", str(run), *words]) == 2
    assert MISTAKES[words] in capsys.readouterr().err


def test_the_command(run, capsys):
    """story: the terminal shows the explanation's text; without a run there is a sentence."""
    assert main(["explain", str(run), "--completion=2", "--measure=log_prob"]) == 0
    shown = capsys.readouterr().out.strip()
    made = explain(read_run(run), measure="log_prob", place=Place(completion=2))
    assert shown == str(made) and "by sample (R and G" in shown and "\nwhere, nats" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert main(["explain"]) == 2 and "one run directory" in capsys.readouterr().err
    assert main(["explain", str(run / "probes")]) == 2


def test_a_run_without_ledgers(run, capsys):
    """by hand: the setting that makes them is named."""
    for file in (run / "ledger").iterdir():
        file.unlink()
    assert main(["explain", str(run)]) == 2
    assert "rl-0 has no ledgers. probe.ledger_every_steps sets" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place", [Place(prompt=1.5), Place(prompt=True), Place(completion="1"), Place(completion=2.0)]
)
def test_numbers_of_other_types(run, place):
    """by hand: a whole number of any kind is taken, others are a sentence."""
    with pytest.raises(ValueError, match="must be a whole number, not"):
        explain(read_run(run), STEP, place=place)
    assert explain(read_run(run), STEP, place=Place(prompt=np.int64(1))).tokens == 2 * LENGTH
    with pytest.raises(ValueError, match="top must be a whole number ≥ 1, not '3'"):
        explain(read_run(run), STEP, top="3")
