"""Worker process that serves one reward function: `python -m ntkrl.reward.worker SPEC OPTIONS`.

Requests and answers are lines of JSON on standard input and output, with values that JSON cannot
hold in the tagged form of `ntkrl.json_values`; output of the function goes to standard error. The
worker starts without JAX and is killed with the process that started it.
"""

import json
import os
import sys
from typing import Any

from ntkrl.json_values import from_json, to_json
from ntkrl.reward.contract import CallLog, RewardFunction
from ntkrl.reward.loading import load_function
from ntkrl.reward.row_limits import end_with_parent


def _answer(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    log = CallLog()
    arguments |= {"log_metric": log.log_metric, "log_extra": log.log_extra, "trainer_state": None}
    try:
        rewards = function.rewards(arguments, arguments["completions"])
    except (TypeError, ValueError) as error:
        return {"error": str(error)}
    values = [None if reward != reward else float(reward) for reward in rewards]
    return {"values": values, "metrics": log.metrics, "extra": to_json(log.extra)}


def main(spec: str, options: str) -> None:
    """Load the function, send its name and parameters, and answer requests until the input ends.

    Args:
      spec: as for `load_function`.
      options: JSON object of the options of a built-in function.
    """
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        function = load_function(spec, options=json.loads(options))
    except ValueError as error:
        send({"error": str(error)})
        return
    parameters = [(p.name, int(p.kind), p.default is p.empty) for p in function.parameters]
    send({"parameters": parameters, "name": function.name})
    for line in sys.stdin:
        send(_answer(function, from_json(json.loads(line))))


if __name__ == "__main__":
    main(*sys.argv[1:])
