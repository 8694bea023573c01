"""A process that serves one reward function: `python -m ntkrl.reward.worker SPEC`.

Requests and answers are JSON, a line each, on standard input and output; what the function prints
goes to standard error. It starts without JAX, and ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, TextIO

from ntkrl.reward.checks import call_user, checked_values
from ntkrl.reward.functions import RewardFunction
from ntkrl.reward.loading import load_function

PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


def serve(function: RewardFunction, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        answers.write(json.dumps(_answer(function, json.loads(line))) + "\n")
        answers.flush()


def _answer(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    metrics: list[tuple[str, float]] = []
    extra: list[tuple[str, list[Any]]] = []
    arguments["trainer_state"] = None
    arguments["log_metric"] = lambda name, value: metrics.append((name, float(value)))
    arguments["log_extra"] = lambda column, values: extra.append((column, list(values)))
    try:
        returned = call_user(function.call, function.accepted(arguments), function.label)
        values = checked_values(returned, arguments["completions"], function.label)
        found = [None if value != value else float(value) for value in values]
        json.dumps(extra)  # what cannot be written is the function's mistake
    except (TypeError, ValueError) as error:
        return {"error": str(error)}
    return {"values": found, "metrics": metrics, "extra": extra}


def _parameters(function: RewardFunction) -> list[tuple[str, int, bool]]:
    return [(p.name, int(p.kind), p.default is p.empty) for p in function.parameters]


def main(spec: str) -> None:
    """Load the function, say what it takes, and serve it."""
    if sys.platform == "linux":  # a function that never returns must not outlive its run
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        function = load_function(spec)
        first = {"parameters": _parameters(function), "name": function.name}
    except ValueError as error:
        function, first = None, {"error": str(error)}
    answers.write(json.dumps(first) + "\n")
    answers.flush()
    if function is not None:
        serve(function, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1])
