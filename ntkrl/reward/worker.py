"""Service of one reward function in a worker process (see `ntkrl.workers`).

Requests and answers are JSON, with values that JSON cannot hold in the tagged form of
`ntkrl.json_values`. The worker starts without JAX.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntkrl.json_values import from_json, to_json
from ntkrl.reward.built_in import IN_WORKER
from ntkrl.reward.contract import CallLog, RewardFunction, TrainerState
from ntkrl.reward.loading import load_function


def open_service(arguments: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Load a function; return its description and its service.

    Args:
      arguments: JSON of the spec and options, as for `load_function`.

    Returns:
      JSON of the name, parameters and a digest of the file, or of an error; and the function from
      a request's arguments to the answer.
    """
    spec, options = json.loads(arguments)
    file = Path(spec.rpartition(":")[0])
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    try:
        function = load_function(spec, options=options)
        if spec in IN_WORKER:  # no call's time is spent on it
            function.call.prepare()  # type: ignore[attr-defined]
    except ValueError as error:
        return _encoded({"error": str(error)}), lambda request: b""
    parameters = [[p.name, int(p.kind), p.default is p.empty] for p in function.parameters]
    description = {"parameters": parameters, "name": function.name, "digest": digest}
    return _encoded(description), lambda request: _encoded(_answer(function, request))


def _answer(function: RewardFunction, request: bytes) -> dict[str, Any]:
    encoded, state = json.loads(request)
    arguments, log = from_json(encoded), CallLog()
    arguments["trainer_state"] = None if state is None else TrainerState(**state)
    arguments |= {"log_metric": log.log_metric, "log_extra": log.log_extra}
    try:
        rewards = function.rewards(arguments, arguments["completions"])
    except (TypeError, ValueError) as error:
        return {"error": str(error)}
    values = [None if reward != reward else float(reward) for reward in rewards]
    return {"values": values, "metrics": log.metrics, "extra": to_json(log.extra)}


def _encoded(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode()
