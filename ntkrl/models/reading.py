"""Read config.json with every problem collected before one error is raised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ntkrl.models.rotary import SCALINGS, Rope


class ConfigReader:
    """Typed look-ups in a parsed config.json; `finish` raises what they found wrong.

    An entry that is null counts as left out.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.problems: list[str] = []

    def _given(self, name: str) -> Any:
        return self.raw[name] if name in self.raw else None

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a positive integer, required where there is no default."""
        value = self._given(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{name} must be a positive integer, not {value!r}")
            return 1
        return value

    def token(self, name: str) -> int:
        """Return a required token id."""
        value = self._given(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.problems.append(f"{name} must be a token id, not {value!r}")
            return 0
        return value

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """Return a positive integer or, where the file says null, None."""
        if name in self.raw and self.raw[name] is None:
            return None
        return default if default is None and name not in self.raw else self.integer(name, default)

    def number(self, name: str, default: float) -> float:
        """Return a number."""
        return self._number(name, self._given(name), default)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """Return a number or, where the file says null, None."""
        if name in self.raw and self.raw[name] is not None:
            return self.number(name, 1.0)
        return None if name in self.raw else default

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._given(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.problems.append(f"{name} must be true or false, not {value!r}")
            return default
        return value

    def choice(self, name: str, default: str, allowed: Iterable[str]) -> str:
        """Return one of the allowed words."""
        value = self._given(name)
        value = default if value is None else value
        if value not in set(allowed):
            self.problems.append(f"{name} {value!r} is not among {', '.join(sorted(allowed))}")
            return default
        return value

    def words(self, name: str, default: Sequence[str], allowed: Iterable[str]) -> list[str]:
        """Return a list of allowed words, as long as the default."""
        value = self._given(name)
        if value is None:
            return list(default)
        known, count = set(allowed), len(default)
        if not isinstance(value, list) or len(value) != count or not known.issuperset(value):
            shown = ", ".join(sorted(known))
            self.problems.append(f"{name} must be a list of {count} among {shown}, not {value!r}")
            return list(default)
        return value

    def fixed(self, name: str, only: Any) -> None:
        """Refuse an entry that is something else than the one value supported."""
        value = self._given(name)
        if value is not None and value != only:
            self.problems.append(f"{name} {value!r} is not supported, only {only!r}")

    def divides(self, whole_name: str, whole: int, part_name: str, part: int) -> None:
        """Refuse a whole that is no multiple of a part."""
        if whole % part:
            self.problems.append(f"{whole_name} {whole} is not a multiple of {part_name} {part}")

    def section(self, *names: str) -> Mapping[str, Any] | None:
        """Return the first of the named sub-objects that is there."""
        for name in names:
            value = self._given(name)
            if isinstance(value, Mapping):
                return value
            if value is not None:
                self.problems.append(f"{name} must be an object, not {value!r}")
        return None

    def rope(
        self,
        width: int,
        theta: float = 10000.0,
        older: str = "rope_theta",
        section: Mapping[str, Any] | None = None,
        scaled: bool = True,
        share: tuple[str, float] = ("partial_rotary_factor", 1.0),
    ) -> Rope:
        """Read rotary settings in their newer spelling (a section) or an older one.

        Args:
          width: of a head.
          theta: base where the file gives none.
          older: name of the base outside the section.
          section: rope_parameters of this kind of layer; None for `rope_parameters`, or the older
            `rope_scaling`.
          scaled: False to leave those sections out.
          share: name outside the section of the rotated share of a head, and its default.
        """
        if section is None:
            section = self.section("rope_parameters", "rope_scaling") if scaled else {}
        section = {} if section is None else section
        theta = self._entry(section, "rope_theta", self.number(older, theta))
        part = self._entry(section, "partial_rotary_factor", self.number(*share))
        size = int(width * part)
        if size % 2 or not 0 < part <= 1:
            self.problems.append(
                f"{share[0]} {part} of a head of {width} gives {size} rotated dimensions; it must "
                "be even and the share in (0, 1]"
            )
            size = 2
        kind = next((section[k] for k in ("rope_type", "type") if k in section), "default")
        if kind not in SCALINGS:
            self.problems.append(
                f"rotary scaling {kind!r} is not supported, only {', '.join(SCALINGS)}"
            )
            kind = "default"
        if kind == "default":
            return Rope(size, theta)
        factor = self._entry(section, "factor", None)
        if kind == "linear":
            return Rope(size, theta, kind, factor)
        low, high, original = (
            self._entry(section, name, None)
            for name in (
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
        )
        return Rope(size, theta, kind, factor, low, high, int(original))

    def _entry(self, section: Mapping[str, Any], name: str, default: float | None) -> float:
        value = section[name] if name in section else None
        return self._number(f"rotary {name}", value, default)

    def _number(self, name: str, value: Any, default: float | None) -> float:
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{name} must be a number, not {value!r}")
            return 1.0 if default is None else default
        return float(value)

    def finish(self, family: str) -> None:
        """Raise one ValueError with all problems, if there are any."""
        if self.problems:
            raise ValueError(f"config.json of a {family} model: " + "; ".join(self.problems) + ".")
