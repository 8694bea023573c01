"""Worker process that serves one reward function: `python -m ntkrl.reward.worker SPEC`.

Requests and answers are lines of JSON on standard input and output; output of the function goes to
standard error. The worker starts without JAX and is killed with the process that started it.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

from ntkrl.reward.contract import RewardFunction
from ntkrl.reward.loading import load_function

PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


def _answer(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    metrics: list[tuple[str, float]] = []
    extra: list[tuple[str, list[Any]]] = []
    arguments["trainer_state"] = None
    arguments["log_metric"] = lambda name, value: metrics.append((name, float(value)))
    arguments["log_extra"] = lambda column, values: extra.append((column, list(values)))
    try:
        rewards = function.rewards(arguments, arguments["completions"])
        json.dumps(extra)  # values that JSON cannot represent are an error of the function
    except (TypeError, ValueError) as error:
        return {"error": str(error)}
    values = [None if reward != reward else float(reward) for reward in rewards]
    return {"values": values, "metrics": metrics, "extra": extra}


def main(spec: str) -> None:
    """Load the function, send its name and parameters, and answer requests until the input ends."""
    if sys.platform == "linux":  # a function that never returns must not outlive its run
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        function = load_function(spec)
    except ValueError as error:
        send({"error": str(error)})
        return
    parameters = [(p.name, int(p.kind), p.default is p.empty) for p in function.parameters]
    send({"parameters": parameters, "name": function.name})
    for line in sys.stdin:
        send(_answer(function, json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1])
