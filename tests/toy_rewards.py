"""Rewards with different values for any model, so that tiny untrained ones learn."""


def score(completion_ids, **columns):
    """Return the share of even token ids in each completion."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def constant(prompts, **columns):
    """Return the same reward for all: no group has a learning signal."""
    return [0.5 for _ in prompts]


def sometimes(prompts, completion_ids, **columns):
    """Return equal rewards for prompts that end in an even digit, shares of even ids for others."""
    shares = score(completion_ids)
    return [
        0.0 if int(prompt.rstrip("=")[-1]) % 2 == 0 else share
        for prompt, share in zip(prompts, shares, strict=True)
    ]


def absent(prompts, log_metric, **columns):
    """Return a reward for the even prompts alone, and log their share."""
    even = [int(prompt.rstrip("=")[-1]) % 2 == 0 for prompt in prompts]
    log_metric("even", sum(even) / len(even))
    return [0.25 if is_even else None for is_even in even]
