"""A small real task with many right answers: three members of a category, from prompts to reward.

Write the prompts (train.jsonl and test.jsonl, whose categories are held out):
    python -m ntkrl.configs.pretrained.lists DIRECTORY
"""

import json
import re
import sys
from pathlib import Path

from ntkrl import durable_files
from ntkrl.configs.pretrained import categories

COUNT = 3  # members asked for
QUESTION = "Name three {}, separated by commas."
EXAMPLE = (
    {"role": "system", "content": "Answer with a list."},
    {"role": "user", "content": "Name three oceans, separated by commas."},
    {"role": "assistant", "content": "Atlantic, Indian, Arctic"},
)
LEADING = re.compile(r"^(and|the|an|a) ")
PLURALS = (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""))
IRREGULAR = {"feet": "foot", "geese": "goose", "mice": "mouse", "teeth": "tooth", "oxen": "ox"}


def members(text):
    """Return the members of a category's text."""
    return {" ".join(member.split()) for member in text.split(",")}


MEMBERS = {name: members(text) for name, text in categories.CATEGORIES.items()}
TEST = tuple(MEMBERS)[2::3]  # every third is held out
TRAIN = tuple(name for name in MEMBERS if name not in TEST)


def normalised(item, right):
    """Return an item as its category spells it, or as it is: "the Dogs" is "dog"."""
    name = LEADING.sub("", " ".join(item.lower().split()).strip(".!:;*\"' "))
    name = LEADING.sub("", name)  # "and the"
    forms = [name, IRREGULAR.get(name, name)]
    forms += [name.removesuffix(end) + start for end, start in PLURALS if name.endswith(end)]
    return next((form for form in forms if form in right), name)


def items(completion, category):
    """Return the items of an answer of COUNT, as the category spells them; none of any other."""
    texts = completion.strip().split(",")
    if len(texts) != COUNT:
        return []
    return [normalised(text, MEMBERS[category]) for text in texts]


def right_members(completion, category):
    """Return the distinct right members of an answer of COUNT items; none of any other."""
    return set(items(completion, category)) & MEMBERS[category]


def reward(completions, category, **kwargs):
    """Return the share of COUNT distinct right members, 0 unless an answer has COUNT items."""
    texts = [messages[-1]["content"] for messages in completions]  # conversations, as in TRL
    pairs = zip(texts, category, strict=True)
    return [len(right_members(text, name)) / COUNT for text, name in pairs]


def rows(names):
    """Return the prompts of categories."""
    return [
        {
            "prompt": [
                *EXAMPLE,
                {"role": "user", "content": QUESTION.format(name)},
            ],
            "category": name,
        }
        for name in names
    ]


def write(directory):
    """Write train.jsonl and test.jsonl."""
    for split, names in (("train", TRAIN), ("test", TEST)):
        text = "".join(json.dumps(row) + "\n" for row in rows(names))
        durable_files.save_text(Path(directory) / f"{split}.jsonl", text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ntkrl.configs.pretrained.lists DIRECTORY")
    write(sys.argv[1])
