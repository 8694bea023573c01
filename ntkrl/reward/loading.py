"""Loading of reward functions by name or file, in this process or in a worker process."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ntkrl import user_files, workers
from ntkrl.json_values import from_json, to_json
from ntkrl.messages import did_you_mean
from ntkrl.reward.built_in import BUILT_IN, IN_WORKER
from ntkrl.reward.contract import (
    RewardError,
    RewardFunction,
    RewardUnavailableError,
    line_in,
)
from ntkrl.reward.options import with_options

FORMS = f"{', '.join(BUILT_IN)} (built in), 'path/to/file.py:function' or a reward model directory"
LOADING_SECONDS = 300.0  # a user's imports may take long
CALL_SHARE = 0.75
"""Share of a call's time limit in which a function with time limits of its own answers."""


def open_function(
    spec: str, seconds: float, options: Mapping[str, Any], **fields: Any
) -> RewardFunction:
    """Load a reward function for a run; user functions run in a worker process.

    Args:
      spec: as for `load_function`.
      seconds: time limit of a call in a worker.
      options: replace defaults of a built-in function.
      **fields: `weight`, `shift`, `scale` and `on_failure` of the RewardFunction.

    Raises:
      ValueError: errors of `load_function`, or options that the function does not have.
    """
    if spec in BUILT_IN and spec not in IN_WORKER:
        return RewardFunction(spec, with_options(spec, options), **fields)
    if spec in IN_WORKER:
        options = {"call_seconds": CALL_SHARE * seconds, **options}
    elif options:
        raise ValueError(f"reward.options: {spec!r} takes none.")
    worker = WorkerFunction(spec, seconds, options)
    return RewardFunction(worker.name, worker, source=spec, **fields)


def load_function(
    spec: str, weight: float = 1.0, options: Mapping[str, Any] | None = None
) -> RewardFunction:
    """Load a built-in function or "path/to/file.py:function" into this process.

    A file is executed once, with the user's rights, however many of its functions are loaded.
    `options` replace defaults of a built-in function.

    Raises:
      ValueError: another spec, no such file, a file that fails to run, no such function in it, an
        object that cannot be called, or parameters that do not fit the contract.
    """
    if spec in BUILT_IN:
        return RewardFunction(spec, with_options(spec, options or {}), weight)
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        raise ValueError(
            f"{spec!r} is not a reward function{_near(spec, BUILT_IN)} Allowed is {FORMS}."
        )
    path = Path(file)
    if not path.is_file():
        siblings = [str(other) for other in sorted(path.parent.glob("*.py"))]
        raise ValueError(
            f"reward function {spec}: {file} does not exist{_near(str(path), siblings)} "
            "Paths are relative to the working directory."
        )
    members = _members(path, spec)
    if name not in members:
        names = [n for n, value in members.items() if callable(value) and not n.startswith("_")]
        raise ValueError(
            f"reward function {spec}: {file} has no {name!r}{_near(name, names)} "
            f"It has: {', '.join(names) if names else 'no functions'}."
        )
    return RewardFunction(name, members[name], weight, source=spec)


def _members(path: Path, spec: str) -> dict[str, Any]:
    """Return the names that a file binds; `spec` is for messages."""
    try:
        return vars(user_files.execute(path))
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        hint = " Install it, or add its directory to PYTHONPATH." if missing else ""
        text, line = str(error), line_in(path, error)
        if isinstance(error, SyntaxError):
            text, line = error.msg, error.lineno
        raise ValueError(
            f"reward function {spec}: {path} does not run: {type(error).__name__}: {text} at "
            f"{path}:{line}.{hint}"
        ) from error


def _near(name: str, known: Iterable[str]) -> str:
    return did_you_mean(name, known) or "."


class WorkerFunction:
    """A reward function in a worker process (`ntkrl.reward.worker`), called like the function.

    The process starts with the object. A failed call ends it, with all that it started, and the
    next call starts another, which has to be of the same code.
    """

    def __init__(self, spec: str, seconds: float, options: Mapping[str, Any] | None = None):
        """Start the process and read the function's signature.

        Args:
          spec, options: as for `load_function`.
          seconds: time limit of a call.

        Raises:
          ValueError: the file or function cannot be loaded.
        """
        self.spec, self.seconds = spec, seconds
        self.options = {} if options is None else dict(options)
        self.worker, description = self._start()
        self.description = description
        self.name = description["name"]
        parameters = [
            inspect.Parameter(
                name,
                inspect._ParameterKind(kind),
                default=inspect.Parameter.empty if required else None,
            )
            for name, kind, required in description["parameters"]
        ]
        kinds = {parameter.name: parameter.kind for parameter in parameters}
        if "completions" not in kinds and inspect.Parameter.VAR_KEYWORD not in kinds.values():
            # the process names completions in messages about other arguments too
            parameters.append(inspect.Parameter("completions", inspect.Parameter.KEYWORD_ONLY))
        self.__signature__ = inspect.Signature(parameters)

    def __call__(
        self,
        log_extra: Callable[[str, Iterable[Any]], None] = lambda column, values: None,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
        **arguments: Any,
    ) -> list[float | None]:
        """Call the function.

        Raises:
          RewardError: it fails, exceeds the time limit, or its process ends.
          RewardUnavailableError: another process does not start, or its file was changed.
        """
        state = arguments.pop("trainer_state", None)
        fields = None if state is None else dataclasses.asdict(state)
        request = json.dumps([self._encoded(arguments), fields]).encode()
        if not self.worker.running:  # after a failed call, or it ended between two calls
            self._restart()
        answer = self._request(request)
        if "error" in answer:
            raise RewardError(answer["error"])
        for name, numbers in answer["metrics"].items():
            for number in numbers:
                log_metric(name, number)
        for column, values in from_json(answer["extra"]).items():
            log_extra(column, values)
        return answer["values"]

    def close(self) -> None:
        """End the process and all that it started."""
        self.worker.close()

    def _encoded(self, arguments: Mapping[str, Any]) -> Any:
        """Return the arguments in JSON types; raise RewardError for a type without a form."""
        encoded = {}
        for name, values in arguments.items():
            try:
                encoded[name] = to_json(values)
            except (TypeError, RecursionError) as error:
                raise RewardError(
                    f"the column {name!r} cannot be sent to the process of reward function "
                    f"{self.spec}: {error}. Convert it to numbers, text, lists or dates, or leave "
                    "it out of the prompt set."
                ) from error
        return encoded

    def _start(self) -> tuple[workers.Worker, dict[str, Any]]:
        """Start a process; return it with the description of its function."""
        arguments = json.dumps([self.spec, self.options]).encode()
        try:
            worker = workers.Worker("ntkrl.reward.worker")
            description = json.loads(worker.request(arguments, LOADING_SECONDS))
        except workers.WorkerError as error:
            raise ValueError(
                f"the process of reward function {self.spec} {error} while it was loaded; see its "
                "output above."
            ) from error
        if "error" in description:
            worker.close()
            raise ValueError(description["error"])
        return worker, description

    def _restart(self) -> None:
        try:
            worker, description = self._start()
        except ValueError as error:
            raise RewardUnavailableError(
                f"reward function {self.spec} cannot be started again after its process ended: "
                f"{error} Mend this and repeat the command, which resumes."
            ) from error
        if description != self.description:
            worker.close()
            raise RewardUnavailableError(
                f"reward function {self.spec} was changed since the run began, and its process had "
                "to be started again: later rewards would not be comparable. Restore the file, or "
                "repeat the command, which resumes with the changed one."
            )
        self.worker = worker

    def _request(self, request: bytes, again: bool = True) -> dict[str, Any]:
        """Return the answer of the process; one that is terminated in a call gets another."""
        fix = "set reward.on_failure to the reward of such calls"
        try:
            return json.loads(self.worker.request(request, self.seconds))
        except workers.WorkerTimeoutError as error:
            raise RewardError(
                f"reward function {self.spec} {error}; its process was killed. Raise "
                f"reward.timeout, or {fix}."
            ) from error
        except workers.WorkerEndedError as error:
            if error.terminated and again:  # with the run, which now saves
                self._restart()
                return self._request(request, again=False)
            raise RewardError(
                f"the process of reward function {self.spec} {error} in a call (an exit or crash "
                f"inside the function, or killed from outside, as for memory); see its output "
                f"above, or {fix}."
            ) from error
        except workers.WorkerError as error:
            raise RewardError(
                f"the process of reward function {self.spec} {error}; it was killed. Leave "
                f"descriptors alone that the function did not open, or {fix}."
            ) from error
