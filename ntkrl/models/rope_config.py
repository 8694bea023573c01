"""Rotary positions of a config.json, in every spelling that transformers reads.

`rope_scaling` replaces `rope_parameters` in a file that has both; the base and the rotated share
come from the section in use, then from top-level entries, then from the family's defaults.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkrl.messages import joined, quoted
from ntkrl.models.family import SMALLEST, ConfigReader
from ntkrl.models.rope import SCALINGS, Rope

Entry = tuple[str, float]
"""Name and default of a top-level entry."""

THETA: Entry = ("rope_theta", 10000.0)
ORIGINAL = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class RopeRules:
    """Differences between families.

    theta: top-level entry of the base.
    share: top-level entry of the rotated share of a head; None for families that rotate all of it.
    scalings: scaling of Rope by the `rope_type` values that the family reads.
    original: default of the original context length in files that do not name it; None for
      `max_position_embeddings`.
    """

    theta: Entry = THETA
    share: Entry | None = None
    scalings: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {name: name for name in SCALINGS}
    )
    original: int | None = None


def read_rope(reader: ConfigReader, width: int, rules: RopeRules | None = None) -> Rope:
    """Read the rotary positions that all layers share.

    Args:
      reader: of config.json.
      width: of a head.
      rules: of the family.
    """
    rules = RopeRules() if rules is None else rules
    section = reader.section("rope_scaling") or reader.section("rope_parameters") or {}
    nested = [name for name, value in section.items() if isinstance(value, Mapping)]
    if nested:
        reader.problems.append(
            f"rope_parameters has sections {joined(nested, ', ')}; this family has one for all "
            "layers"
        )
    length = reader.integer("max_position_embeddings")
    # a top-level entry has precedence, as the class's default in families that have the field
    original = reader.optional_integer(ORIGINAL, rules.original)
    if original is not None:
        section = {**section, ORIGINAL: original}
    return _Section(reader, section, section, length).rope(width, rules)


def read_layer_ropes(
    reader: ConfigReader, width: int, thetas: Mapping[str, Entry]
) -> dict[str, Rope]:
    """Read the rotary positions of each type of layer.

    Args:
      reader: of config.json; its `rope_scaling` applies to the first type alone.
      width: of a head.
      thetas: top-level entry of the base by type.
    """
    plain: Mapping[str, Any] = {"rope_type": "default"}
    sections = reader.section("rope_parameters") or dict.fromkeys(thetas, plain)
    scaling = reader.section("rope_scaling") or {}
    length = reader.integer("max_position_embeddings")
    ropes = {}
    for name, theta in thetas.items():
        section = sections[name] if name in sections and sections[name] else plain
        if not isinstance(section, Mapping):
            reader.problems.append(
                f"rope_parameters.{name} must be an object, not {quoted(section)}"
            )
            section = plain
        section = {**section, **scaling}
        ropes[name] = _Section(reader, section, sections, length).rope(width, RopeRules(theta))
        scaling = {}
    return ropes


@dataclasses.dataclass(frozen=True)
class _Section:
    """One section of rotary settings.

    reader: of config.json.
    entries: of the section. outer: of the object that holds `truncate`.
    length: `max_position_embeddings`.
    """

    reader: ConfigReader
    entries: Mapping[str, Any]
    outer: Mapping[str, Any]
    length: int

    def rope(self, width: int, rules: RopeRules) -> Rope:
        """Return the rotary positions of heads of a width, whose frequencies are finite."""
        rope = self._rope(width, rules)
        if not self.reader.problems and not _is_finite(rope):
            self.reader.problems.append(
                f"the rotary settings {quoted(dict(self.entries))} give frequencies that are not "
                "finite"
            )
        return rope

    def _rope(self, width: int, rules: RopeRules) -> Rope:
        entries, problems = self.entries, self.reader.problems
        kind = entries.get("rope_type", entries.get("type", "default"))
        if not isinstance(kind, str) or kind not in rules.scalings:
            allowed = ", ".join(rules.scalings)
            problems.append(f"rope_type {quoted(kind)} is not supported, only {allowed}")
            kind = "default"
        scaling = rules.scalings[kind]
        base = self._positive("rope_theta", self.reader.positive(*rules.theta))
        size = self._rotated(width, scaling, rules.share)
        if scaling == "default":
            return Rope(size, base)
        if scaling == "linear":
            return Rope(size, base, scaling, self._positive("factor"))
        original = int(self._positive(ORIGINAL, self.length))
        if scaling == "llama3":
            low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
            return Rope(size, base, scaling, self._positive("factor"), low, high, original)
        if scaling == "yarn" and "factor" not in entries:
            problems.append(f"rotary factor is missing; {kind} needs it, or null")
        factor = self._positive("factor", self.length / max(original, 1))
        attention = self._attention_factor(scaling, factor, original)
        if scaling == "longrope":
            short, long = (self._factors(name, size // 2) for name in ("short", "long"))
            rope = Rope(size, base, scaling, factor, original_length=original)
            rope = dataclasses.replace(rope, short_factors=short, long_factors=long)
            return dataclasses.replace(rope, attention_factor=attention)
        # 0 counts as absent
        low, high = self._number("beta_slow", 1.0) or 1.0, self._number("beta_fast", 32.0) or 32.0
        truncate = bool(self.outer.get("truncate", True))
        rope = Rope(size, base, scaling, factor, low, high, original, truncate)
        return dataclasses.replace(rope, attention_factor=attention)

    def _rotated(self, width: int, scaling: str, share: Entry | None) -> int:
        """Return the number of rotated dimensions."""
        name, default = ("partial_rotary_factor", 1.0) if share is None else share
        part = self._number("partial_rotary_factor", self.reader.number(name, default))
        if share is None:
            if scaling != "default" and part != 1.0:
                self.reader.problems.append(f"{name} {part} is not supported, only 1.0")
            return width
        size = int(width * part)
        if size % 2 or not 0 < part <= 1:
            self.reader.problems.append(
                f"{name} {part} of a head of {width} gives {size} rotated dimensions; it must "
                "be even and the share in (0, 1]"
            )
            return 2
        return size

    def _attention_factor(self, scaling: str, factor: float, original: int) -> float:
        """Return the factor on cos and sin, from the extension where it is not stored."""
        if self.entries.get("attention_factor") is not None:
            return self._positive("attention_factor")
        if factor <= 1:
            return 1.0
        if scaling == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(original)) if original > 1 else 1.0
        numerator, denominator = (self._number(n, 0.0) for n in ("mscale", "mscale_all_dim"))
        if not numerator or not denominator:
            numerator, denominator = 1.0, 0.0
        over, under = (0.1 * scale * math.log(factor) + 1.0 for scale in (numerator, denominator))
        return over / under if under else 1.0

    def _factors(self, name: str, count: int) -> tuple[float, ...]:
        """Return the divisors of the frequencies."""
        name = f"{name}_factor"
        values = self.entries.get(name)
        values = values if isinstance(values, list) else [values]
        if len(values) != count:
            self.reader.problems.append(
                f"rotary {name} must be {count} numbers, not {quoted(values)}"
            )
            return (1.0,) * count
        name = f"a number of rotary {name}"
        return tuple(self.reader.as_number(name, value, None, SMALLEST) for value in values)

    def _number(self, name: str, default: float | None = None) -> float:
        value = self.entries.get(name)
        return self.reader.as_number(f"rotary {name}", value, default)

    def _positive(self, name: str, default: float | None = None) -> float:
        return self.reader.as_number(f"rotary {name}", self.entries.get(name), default, SMALLEST)


def _is_finite(rope: Rope) -> bool:
    """Return whether the settings give finite frequencies; some make logarithms of 0 or 1."""
    try:
        with np.errstate(all="ignore"):
            tables = [rope.frequencies()] + [rope.frequencies(long=True)] * bool(rope.long_factors)
    except (ArithmeticError, ValueError):  # of math.log and of Python's floats
        return False
    return math.isfinite(rope.attention_factor) and all(np.isfinite(t).all() for t in tables)
