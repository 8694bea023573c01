"""Scores of pairs: computed once, whatever happens on the way."""

import json

import pytest

from ntkrl.data import PromptSet
from ntkrl.prepare.pipeline import score_pairs
from ntkrl.reward import RewardFunction, RewardSet

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
    """story: cut off in the third batch and in a line; what is there is not done again."""
    path = tmp_path / "scores" / "pairs.jsonl"
    rewards, seen = counting(fails_at=3)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(PAIRS, rewards, path, "d", 2)
    assert seen[0] == ["0", "5", "0", "5"]
    held = path.read_text()
    assert len(held.splitlines()) == 5
    path.write_text(held[:-4])  # the last pair's line has lost its end
    rewards, seen = counting()
    found = score_pairs(PAIRS, rewards, path, "d", 2)
    assert [set(batch) for batch in seen] == [{"4", "2"}, {"3"}]
    assert found.tolist() == [[n, 5 - n] for n in range(6)]
    written = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert written == found[[0, 5, 1, 4, 2, 3]].tolist()
    rewards, seen = counting()
    assert score_pairs(PAIRS, rewards, path, "d", 2).tolist() == found.tolist() and seen == []


def test_scores_of_other_inputs_are_refused(tmp_path):
    """law: a digest tells."""
    path = tmp_path / "pairs.jsonl"
    score_pairs(PAIRS, counting()[0], path, "d", 4)
    with pytest.raises(ValueError, match="scores of other pairs: the inputs have changed"):
        score_pairs(PAIRS, counting()[0], path, "e", 4)
