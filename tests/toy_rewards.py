"""A reward that any model earns in different amounts, so that tiny untrained ones learn."""


def score(completion_ids, **columns):
    """Share of even token ids in each completion."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
