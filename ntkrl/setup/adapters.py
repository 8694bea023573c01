"""Sentences on low-rank adapters: what a run trains of a model that has any, and what it writes."""

from collections.abc import Sequence

from ntkrl import models, trees, update
from ntkrl.messages import joined
from ntkrl.setup.starting_model import StartingModel


def describe_adapters(model: StartingModel, stages: Sequence[update.BoundStage]) -> list[str]:
    """Return sentences on what stages train of a model with adapters; none for other models.

    Args:
      model: the starting model.
      stages: bound to its params.
    """
    if not model.has_adapters:
        return []
    names, sentences, reason = trees.names(model.params), [], model.adapter_obstacle()
    for stage in stages:
        trained = [name for name, moves in zip(names, stage.trained, strict=True) if moves]
        base = [name for name in trained if not models.is_adapter(name)]
        if base:
            which = joined(base, ", ", most=4)
            sentences.append(f"stage {stage.stage.name!r} trains {which} of the base")
            reason = reason or "the base is trained too"
        else:
            sentences.append(f"stage {stage.stage.name!r} trains the adapters alone")
    if reason is not None:
        sentences.append(f"export/ will be complete, and there will be no adapter/: {reason}")
    return sentences
