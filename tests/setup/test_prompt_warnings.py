"""Warnings of prompts that may not be meant."""

from ntkrl import data
from ntkrl.setup import prompt_warnings


def prompts(*texts):
    """Return a set of prompts."""
    return data.PromptSet(texts, {}, "p.jsonl", tuple(f"p.jsonl:{i}" for i in range(len(texts))))


def test_repeats_and_prompts_that_are_trained_on(capsys):
    """by hand: 2 of 4 repeat the first; 1 of 2 held-out prompts is a training prompt."""
    prompt_warnings.warn_of_repeats(prompts("a", "b", "a", "a"), prompts("c", "b"))
    repeats, both = capsys.readouterr().out.strip().splitlines()
    assert "2 of 4 training prompts repeat an earlier one, the first at p.jsonl:2" in repeats
    assert "1 of 2 held-out prompts are trained on too, the first at p.jsonl:1" in both


def test_distinct_prompts_and_a_few_repeats_are_silent(capsys):
    """by hand: 1 repeat of 20 is below a tenth; conversations compare by their messages."""
    texts = [str(i) for i in range(19)]
    prompt_warnings.warn_of_repeats(prompts(*texts, "0"), None)
    first, second = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    prompt_warnings.warn_of_repeats(prompts(first), prompts(second))
    assert capsys.readouterr().out == ""
