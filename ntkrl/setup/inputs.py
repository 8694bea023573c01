"""Parts of a run that the calling program has in memory, under the names that its config uses."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ntkrl import data, durable_files


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Values that take the place of files which a config names.

    rows: path in `data.path` or `data.eval_path` to its rows; `save` writes the file.
    functions: name in `reward.function` to the function.
    on_step: called with the step and its metrics when they are written, one step after it was
      taken; "stop" as its result saves and stops the run.
    """

    rows: Mapping[str, data.RowFile] = dataclasses.field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    on_step: Callable[[int, dict[str, Any]], Any] | None = None

    def save(self) -> None:
        """Write the files of `rows` that do not exist, so that other commands can read them."""
        for name, file in self.rows.items():
            if not Path(name).exists():
                with durable_files.replacing(Path(name)) as out:
                    out.write(file.content)

    def read_set(self, path: str, required: tuple[str, ...] = ("prompt",)) -> data.PromptSet:
        """Return the prompts of a path, in memory or not; see `data.read_set`."""
        if path in self.rows:
            return data.validate_rows(self.rows[path].rows, required)
        return data.read_set(path, required)


NO_INPUTS = Inputs()
