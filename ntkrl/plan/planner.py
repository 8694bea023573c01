"""`ntkrl plan`: compile a config for a machine, search meshes, or write the checked-in table."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
from tqdm import tqdm

from ntkrl import durable_files
from ntkrl.plan import hardware, output
from ntkrl.plan.candidate import Candidate, abstract_run, candidates, compile_candidate
from ntkrl.settings import RunSettings

SEARCH_LIMIT = 6
ALL_FSDP = {"data": 1, "fsdp": -1, "tensor": 1}
TABLE_MACHINES = ("v5e-16", "v6e-16", "v5p-32", "v5e-64", "v5e-256")
TABLE_MODELS = ("EleutherAI/pythia-2.8b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen3-8B")


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """Options of `ntkrl plan`.

    topology: see hardware.machine.
    search: compare meshes and rematerialisation instead of the config's.
    limit: most candidates of a search, ≥ 1.
    json: file for the results, or None.
    """

    topology: str
    search: bool = False
    limit: int = SEARCH_LIMIT
    json: str | None = None

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {self.limit}.")


def read_options(options: Mapping[str, str]) -> PlanSettings:
    """Return the settings of a command line.

    Args:
      options: `{name: text}`; "search" is a flag.

    Raises:
      ValueError: a limit that is not a positive number.
    """
    limit = options.get("limit", str(SEARCH_LIMIT))
    if not limit.isdigit():
        raise ValueError(f"--limit={limit} must be a whole number.")
    return PlanSettings(options["topology"], "search" in options, int(limit), options.get("json"))


def plan(settings: RunSettings, options: PlanSettings) -> list[Candidate]:
    """Print the memory and time of a config on a machine; write them as JSON on request.

    Args:
      settings: from `read_settings`.
      options: of the command line.

    Returns:
      The candidates, the best first.

    Raises:
      ValueError: an unknown machine, no compiler for it, an unknown model, a mesh that does not
        fit, or a file for the results that is not an earlier plan.
    """
    machine, configs = hardware.machine(options.topology), [settings]
    if options.json is not None:
        durable_files.check_replaceable(Path(options.json), _is_plan, "a plan as JSON")
    if options.search:
        run = abstract_run(dataclasses.replace(settings, mesh=ALL_FSDP), machine)
        configs = list(itertools.islice(candidates(settings, run), options.limit))
    results = []
    with tqdm(total=len(configs), desc="plan", file=sys.stderr, disable=None) as bar:
        for config in configs:
            results.append(compile_candidate(config, machine, bar, probe=not options.search))
            jax.clear_caches()  # compiled programs hold memory of this machine
            bar.update()
    results.sort(key=Candidate.rank)
    if options.search:
        print(output.format_candidates(results))
    print(output.format_programs(results[0], machine))
    if options.json is not None:
        values = [candidate.as_json(machine.name) for candidate in results]
        durable_files.save_text(Path(options.json), json.dumps(values, indent=1) + "\n")
    return results


def _is_plan(text: bytes) -> bool:
    return all("programs" in row and "topology" in row for row in json.loads(text))


def write_table(path: str, settings: RunSettings, command: str) -> None:
    """Compile a config for every model and machine; rewrite a Markdown table after each.

    The mesh is the first that a search would try: fully sharded, with tensor parts only if a step
    has too few rows for all chips. Seconds are of the last stage.

    Args:
      path: the file.
      settings: of the config; its model's path, template and mesh are replaced.
      command: quoted in the head of the file.

    Raises:
      ValueError: the TPU compiler is not installed, or the file is not an earlier table.
    """
    head = output.format_table((), command, 0).partition("`")[0].encode()
    durable_files.check_replaceable(
        Path(path), lambda text: text.startswith(head), "a plan's table"
    )
    pairs = list(itertools.product(TABLE_MODELS, TABLE_MACHINES))
    rows: list[str] = []
    with tqdm(pairs, desc="plan", file=sys.stderr) as bar:
        for path_or_name, name in bar:
            bar.set_postfix_str(f"{path_or_name} {name}")
            machine = hardware.machine(name)
            model = dataclasses.replace(settings.model, path=path_or_name, template=None)
            config = dataclasses.replace(settings, model=model, mesh=ALL_FSDP)
            first = next(candidates(config, abstract_run(config, machine)))
            candidate = compile_candidate(dataclasses.replace(first, model=model), machine)
            rows.append(output.table_row(path_or_name, machine, candidate))
            jax.clear_caches()
            durable_files.save_text(Path(path), output.format_table(rows, command, len(pairs)))
