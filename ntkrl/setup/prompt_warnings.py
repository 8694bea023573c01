"""Warnings of prompts that may not be meant as they are."""

import json

from ntkrl import data, runtime
from ntkrl.json_values import readable
from ntkrl.setup.run_setup import RunSetup

MANY = 0.1
"""Share of the training prompts that may repeat others without a warning."""


def warn_of_prompts(setup: RunSetup) -> None:
    """Log warnings of the prompts that a run samples from and is evaluated on."""
    if setup.settings.method.samples:
        train, held_out = setup.train.prompt_set, setup.held_out
        warn_of_continued(train)
        warn_of_repeats(train, None if held_out is None else held_out.prompt_set)


def warn_of_continued(prompt_set: data.PromptSet) -> None:
    """Log a warning if conversations end with a message of the assistant's."""
    if not prompt_set.conversational:
        return
    turns = enumerate(prompt_set.prompts)
    rows = [row for row, turn in turns if turn[-1]["role"] == "assistant"]  # type: ignore[index]
    if rows:
        runtime.log(
            f"warning: {len(rows)} of {len(prompt_set.prompts)} prompts end with the assistant's "
            f"message, the first at {prompt_set.place(rows[0])}: completions continue it; remove "
            "it if they are to answer"
        )


def warn_of_repeats(train: data.PromptSet, held_out: data.PromptSet | None) -> None:
    """Log a warning if held-out prompts are trained on, or many training prompts are equal."""
    trained = set()
    repeats = []
    for row, prompt in enumerate(train.prompts):
        text = json.dumps(readable(prompt))
        if text in trained:
            repeats.append(row)
        trained.add(text)
    if len(repeats) > MANY * len(train.prompts):
        runtime.log(
            f"warning: {len(repeats)} of {len(train.prompts)} training prompts repeat an earlier "
            f"one, the first at {train.place(repeats[0])}; remove them if each should count once"
        )
    texts = () if held_out is None else held_out.prompts
    both = [row for row, prompt in enumerate(texts) if json.dumps(readable(prompt)) in trained]
    if both and held_out is not None:
        runtime.log(
            f"warning: {len(both)} of {len(texts)} held-out prompts are trained on too, the first "
            f"at {held_out.place(both[0])}, so that evaluations do not show how rewards transfer "
            "to new prompts; give others by data.eval_path, or remove them from the training data"
        )
