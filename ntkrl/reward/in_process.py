"""Reward functions of the calling program: called in its process, within a time limit."""

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any

from ntkrl.reward.contract import RewardError, RewardFunction, wait
from ntkrl.user_files import IN_PROCESS


class InProcessFunction:
    """A function with a time limit, called like the function.

    Each call has a daemon thread of its own. Python cannot end a thread: a call that exceeds the
    limit goes on in the background, and its result is dropped.
    """

    def __init__(self, name: str, call: Callable[..., Any], seconds: float):
        """Bind a function.

        Args:
          name: for messages.
          call: plain or async.
          seconds: time limit of a call.
        """
        self.name, self.call, self.seconds = name, call, seconds
        self.__wrapped__, self.__signature__ = call, inspect.signature(call)

    def __call__(self, **arguments: Any) -> Any:
        """Call the function, and re-raise what it raises.

        Raises:
          RewardError: it exceeds the time limit, or ends its thread.
        """
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def answer() -> None:
            try:
                returned = self.call(**arguments)
                if inspect.isawaitable(returned):
                    returned = asyncio.run(wait(returned))
                answers.put((returned, None))
            except BaseException as error:  # SystemExit too: without an answer the run would wait
                answers.put((None, error))

        threading.Thread(target=answer, name=f"reward {self.name}", daemon=True).start()
        try:
            returned, error = answers.get(timeout=self.seconds)
        except queue.Empty:
            raise RewardError(
                f"reward function {self.name} did not answer within {self.seconds:g} s; its call "
                "still runs in this process, beside whatever follows. Raise reward.timeout, or set "
                "reward.on_failure to the reward of such calls."
            ) from None
        if error is not None and not isinstance(error, Exception):
            raise RewardError(
                f"reward function {self.name} raised {type(error).__name__}, which ends a program; "
                "return None (not applicable) or a number."
            ) from error
        if error is not None:
            raise error
        return returned


def open_callable(
    spec: str, call: Callable[..., Any], seconds: float, **fields: Any
) -> RewardFunction:
    """Return a reward function of the calling program.

    Args:
      spec: IN_PROCESS and its name.
      call: the function.
      seconds: time limit of a call.
      **fields: `weight`, `shift`, `scale` and `on_failure` of the RewardFunction.

    Raises:
      ValueError: parameters that do not fit the contract.
    """
    name = spec.removeprefix(IN_PROCESS)
    RewardFunction(name, call)  # checks the parameters, which the next line reads
    return RewardFunction(name, InProcessFunction(name, call, seconds), **fields)
