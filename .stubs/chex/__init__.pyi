# The part of chex that this package uses, so that mypy sees the fields of its dataclasses.
from collections.abc import Callable
from typing import Literal, TypeVar, dataclass_transform

T = TypeVar("T")

@dataclass_transform(frozen_default=True)
def dataclass(*, frozen: Literal[True]) -> Callable[[type[T]], type[T]]: ...
