"""One message for the errors of several independent checks."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ErrorCollector:
    """Collect the ValueErrors of independent checks and raise them as one.

    `with errors:` records the ValueError of its block; `finish` raises all that were recorded.
    """

    def __init__(self):
        self.messages: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, ValueError):
            self.messages.append(str(error))
        return isinstance(error, ValueError)

    def call(self, function: Callable[..., Result], *args: object) -> Result | None:
        """Return `function(*args)`, or None after recording its ValueError."""
        with self:
            return function(*args)
        return None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return `function` of every item, or raise all recorded errors as `finish` does."""
        results = []
        for item in items:
            with self:
                results.append(function(item))
        self.finish()
        return results

    def finish(self) -> None:
        """Raise one ValueError with every recorded message, one per line, if there are any."""
        if self.messages:
            raise ValueError("\n".join(dict.fromkeys(self.messages)))
