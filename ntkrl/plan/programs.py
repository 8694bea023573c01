"""The programs of a run on described devices, and the product with a kernel beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

from ntkrl import runtime, trees
from ntkrl.plan import kernel, networks
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel
from ntkrl.training import PROBE, AbstractRun, Program, Programs, run_programs


class SpecialTokens(NamedTuple):
    """The tokens that a sampler needs of a tokenizer."""

    eos_token_id: int = 0
    pad_token_id: int = 0


def described(settings: RunSettings, devices: list[Any]) -> AbstractRun:
    """Describe a run on devices, in its config's mesh.

    Raises:
      ValueError: see AbstractRun; or a mesh that does not fit the devices.
    """
    if settings.method == "reward":
        raise ValueError("plan knows methods rl and sft; a reward model has no plan yet.")
    mesh = runtime.make_mesh(**settings.mesh, devices=devices)
    policy, params = networks.describe_policy(settings.model, mesh)
    scorers = networks.describe_rewards(settings, mesh)
    return AbstractRun(settings, StartingModel(policy, params, SpecialTokens(), "", mesh), scorers)


def programs(run: AbstractRun, probe: bool = True) -> Programs:
    """Yield every program of a run, and with `probe` the product with a kernel."""
    yield from run_programs(run, probe)
    if probe:
        s = kernel.setting(run.model.policy, run.model.params, run.mesh, run.width)
        call, arguments = kernel.apply_call(s)
        yield Program("kernel apply", PROBE, (), call, arguments, frozenset({"params"}), 0.0)


def crowded(run: AbstractRun) -> str | None:
    """Say where a step's rows are too few for the mesh, so that devices read the same ones."""
    rows, parts = run.minibatch(run.stages[0])[0].tokens.shape[0], trees.row_parts(run.mesh)
    rows //= run.settings.schedule.microbatches
    if rows % parts == 0:
        return None
    return (
        f"data × fsdp = {parts} does not divide the {rows} rows read together in a step: devices "
        "repeat each other's work; raise data.prompts_per_step or mesh.tensor"
    )
