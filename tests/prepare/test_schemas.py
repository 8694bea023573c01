"""By hand: published rows as conversations, and errors in them."""

import datasets
import numpy as np
import pytest

from ntkrl.data import Rows
from ntkrl.prepare import schemas
from ntkrl.prepare.schemas import select, split

USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "ask"), ("assistant", "yes"), ("assistant", "no"))
)


def rows_of(*rows):
    return Rows("file.json", "row", list(enumerate(rows)), [])


def test_examples_join_instruction_and_input():
    """by hand: a line break between the two, and none where there is no input."""
    result = schemas.examples(
        rows_of(
            {"instruction": "Add.", "input": "3 4", "output": "7"},
            {"instruction": "Say hi.", "input": "", "output": "hi", "datasplit": "sft"},
        )
    )
    assert [prompt[0]["content"] for prompt in result.prompts] == ["Add.\n3 4", "Say hi."]
    assert result.columns == {
        "completion": [[{"role": "assistant", "content": text}] for text in ("7", "hi")]
    }


@pytest.mark.parametrize("prompt", ["ask", [USER]])
@pytest.mark.parametrize("full", [False, True])
def test_preferences_of_every_form(prompt, full):
    """by hand: text or messages, a response alone or after its prompt."""
    responses = {"chosen": [YES], "rejected": [NO]}
    if full:
        responses = {name: [USER, *message] for name, message in responses.items()}
    row = {"prompt": prompt, **responses, "messages": [USER, YES], "score_chosen": 7.0}
    result = schemas.preferences(rows_of(row))
    assert result.prompts == ([USER],)
    assert result.columns == {"chosen": [[YES]], "rejected": [[NO]], "score_chosen": [7.0]}


def test_preferences_of_texts():
    """by hand: TRL's standard form."""
    result = schemas.preferences(rows_of({"prompt": "ask", "chosen": "yes", "rejected": "no"}))
    assert result.columns == {"chosen": [[YES]], "rejected": [[NO]]}


def test_wrong_rows_are_told_together():
    """law: every row in one message."""
    with pytest.raises(ValueError) as caught:
        schemas.preferences(
            rows_of(
                {"prompt": "a", "chosen": [USER], "rejected": "no"},
                {"instruction": "a"},
                {"prompt": "a", "chosen": "yes", "rejected": [USER, YES, NO]},
            )
        )
    message = str(caught.value)
    assert "problems: 3" in message and "row 0: 'chosen' must be text, one assistant mes" in message
    assert "row 1: 'prompt' must be text or a list of messages; the row has instruction" in message
    assert "row 2: 'rejected' must be" in message
    with pytest.raises(ValueError, match="row 0: instruction and output must be text; the row has"):
        schemas.examples(rows_of({"prompt": "a"}))
    with pytest.raises(ValueError, match="row 0: input must be text"):
        schemas.examples(rows_of({"instruction": "a", "output": "b", "input": 3}))


def test_rows_without_a_prompt():
    """by hand: no text at all, in either schema."""
    assert schemas.without_prompt({"prompt": " \n"})
    assert schemas.without_prompt({"instruction": "", "input": ""})
    assert not schemas.without_prompt({"instruction": "", "input": "a"})
    assert not schemas.without_prompt({"prompt": "a"}) and not schemas.without_prompt({"x": 1})


@pytest.mark.parametrize(("size", "share"), [(2, 0.5), (40, 0.8), (101, 0.8), (77, 0.31)])
def test_splits_as_datasets_does(size, share):
    """oracle: train_test_split of `datasets` with the public code's arguments."""
    rows = datasets.Dataset.from_dict({"row": list(range(size))})
    expected = rows.train_test_split(test_size=1 - float(share), seed=1283)
    first, second = split(size, share, 1283)
    assert first.tolist() == expected["train"]["row"][:]
    assert second.tolist() == expected["test"]["row"][:]


def test_too_few_for_two_parts():
    """law: an error, not an empty part."""
    with pytest.raises(ValueError, match="1 preferences cannot be split"):
        split(1, 0.8, 0)


def test_selected_rows():
    """by hand: the start of a permutation; all in order where there are no more."""
    assert select(9, 3, 237).tolist() == np.random.RandomState(237).permutation(9)[:3].tolist()
    assert select(3, 3, 237).tolist() == [0, 1, 2]
