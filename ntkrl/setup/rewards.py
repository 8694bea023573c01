"""From the words of a config to the rewards of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ntkrl import data, models, reward, runtime
from ntkrl.settings import DTYPES, RewardSettings


class Problems:
    """Collects what is wrong with independent pieces, to be told together.

    `with problems:` keeps the ValueError of its block; `finish` raises one with them all.
    """

    def __init__(self):
        self.told: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, ValueError):
            self.told.append(str(error))
        return isinstance(error, ValueError)

    def finish(self) -> None:
        """Raise one ValueError if there is anything to tell."""
        if self.told:
            raise ValueError("\n".join(self.told))


def reward_set(settings: RewardSettings, mesh: Mesh) -> reward.RewardSet:
    """Load every reward function and reward model.

    Args:
      settings: the config's section.
      mesh: of all devices, for reward models.

    Raises:
      ValueError: a function, model or file that cannot be loaded, or rewards to normalise that
        no function gives.
    """
    held = {}
    if settings.normalisation is not None:
        held = reward.read_normalisation(settings.normalisation)
    loaded, problems = [], Problems()
    for spec, weight in settings.functions:
        name = _name(spec)
        shift, scale = held.pop(name) if name in held else (0.0, 1.0)
        given = {"weight": weight, "shift": shift, "scale": scale}
        with problems:
            loaded.append(_function(spec, name, settings, mesh, given))
    problems.finish()
    if held:
        names = ", ".join(function.name for function in loaded)
        raise ValueError(
            f"reward.normalisation {settings.normalisation} holds rewards of "
            f"{', '.join(sorted(held))}, which no function gives; they are called {names}."
        )
    return reward.RewardSet(tuple(loaded), runtime.local_slice, runtime.allgather_object)


def _name(spec: str) -> str:
    """How a function is called in metrics."""
    if spec in reward.BUILT_IN:
        return spec
    return spec.rpartition(":")[2] if is_code(spec) else Path(spec).name


def is_code(spec: str) -> bool:
    """Tell whether a reward function is code, of this package or a user's, and no model."""
    return spec in reward.BUILT_IN or spec.rpartition(":")[0].endswith(".py")


def _function(
    spec: str, name: str, settings: RewardSettings, mesh: Mesh, given: dict[str, Any]
) -> reward.RewardFunction:
    given = {**given, "on_failure": settings.on_failure}
    coded = is_code(spec)
    directory = Path(spec) if coded else models.local_directory(spec)
    if coded or not directory.is_dir():
        options = settings.options[spec] if spec in settings.options else {}
        return reward.open_function(spec, settings.timeout, options, **given)
    scorer, params = models.load_scorer(directory, DTYPES[settings.dtype], mesh)
    tokenizer = data.load_tokenizer(directory)
    call = reward.RewardModel(scorer, params, tokenizer, mesh, settings.batch_size)
    return reward.RewardFunction(name, call, source=str(directory), on_mesh=True, **given)
