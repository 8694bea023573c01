"""Read config.json with every problem collected before one error is raised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class ConfigReader:
    """Typed look-ups in a parsed config.json; `finish` raises what they found wrong."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.problems: list[str] = []

    def integer(self, name: str) -> int:
        """Return a required positive integer."""
        value = self.raw[name] if name in self.raw else None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{name} must be a positive integer, not {value!r}")
            return 1
        return value

    def number(
        self, name: str, default: float, also: Mapping[str, Any] | None = None, under: str = ""
    ) -> float:
        """Return a number from the file, from `also[under]` (the newer spelling) or the default."""
        value = default
        if name in self.raw and self.raw[name] is not None:
            value = self.raw[name]
        if also is not None and under in also and also[under] is not None:
            value = also[under]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{name} must be a number, not {value!r}")
            return default
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.raw[name] if name in self.raw else default
        if not isinstance(value, bool):
            self.problems.append(f"{name} must be true or false, not {value!r}")
            return default
        return value

    def choice(self, name: str, default: str, allowed: Iterable[str]) -> str:
        """Return one of the allowed words."""
        value = self.raw[name] if name in self.raw else default
        if value not in set(allowed):
            self.problems.append(f"{name} {value!r} is not among {', '.join(sorted(allowed))}")
            return default
        return value

    def section(self, *names: str) -> Mapping[str, Any] | None:
        """Return the first of the named sub-objects that is there."""
        for name in names:
            if name in self.raw and self.raw[name] is not None:
                if isinstance(self.raw[name], Mapping):
                    return self.raw[name]
                self.problems.append(f"{name} must be an object, not {self.raw[name]!r}")
        return None

    def rope_type(self, rope: Mapping[str, Any] | None) -> None:
        """Refuse every rotary scaling but the plain one."""
        for spelling in ("rope_type", "type"):
            if rope is not None and spelling in rope and rope[spelling] != "default":
                self.problems.append(
                    f"rotary scaling {rope[spelling]!r} is not supported, only 'default'"
                )

    def finish(self, family: str) -> None:
        """Raise one ValueError with all problems, if there are any."""
        if self.problems:
            raise ValueError(f"config.json of a {family} model: " + "; ".join(self.problems) + ".")
