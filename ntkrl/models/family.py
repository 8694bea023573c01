"""Description of a model family, and the reader of its config.json."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from ntkrl import trees
from ntkrl.messages import joined, quoted
from ntkrl.models.decoder import SHARDING, Config, Sharding, Transformer

Table = tuple[tuple[str, str, bool], ...]
"""Rows: our name · stored name, `{i}` and `{e}` for the layer and the expert of a stacked leaf ·
transposed or not.

Kernels are [in, out] here."""
MOST_LAYERS, MOST_COLUMNS, MOST = 10_000, 2**20, 2**31 - 1
"""Largest numbers of layers, of columns of a matrix, and of anything else that a config.json may
declare. Lists of layers and shapes are made before the tensors are compared."""
SMALLEST, LARGEST = 1e-38, 3e38
"""Smallest positive number and largest number of float32, about."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One architecture of Hugging Face's.

    architecture: class name with the language model's head.
    label: name for readers.
    prefix: of stored trunk tensors; absent where the trunk alone was saved.
    weights: table of tensors, the head's row `head/weight` last.
    ignored: regular expressions of stored buffers that are not parameters.
    parse: config.json to Config; a ValueError with all missing or impossible entries.
    scorer: class name of the same trunk with a sequence-classification head.
    model: `(config, rngs, dtype) -> nnx.Module` with `features`, the trunk without head.
    sharding: ordered `(pattern, mesh axes per dimension)` list over our names.
    stacked: prefixes of our names whose leaves carry a leading layer axis.
    """

    architecture: str
    label: str
    prefix: str
    weights: Table
    ignored: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Config]
    scorer: str
    model: Callable[..., nnx.Module] = Transformer
    sharding: Sharding = SHARDING
    stacked: tuple[str, ...] = ("layers",)

    def shardings(
        self, shapes: dict[str, jax.ShapeDtypeStruct], mesh: Mesh | None
    ) -> dict[str, jax.sharding.Sharding]:
        """Return the sharding of every leaf, by our name; None for one device."""
        if mesh is None:
            return dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
        return trees.shardings(shapes, self.sharding, mesh)

    @property
    def head_name(self) -> str:
        """The head's stored name."""
        return self.weights[-1][1]

    def read(self, raw: Mapping[str, Any], source: Any) -> Config:
        """Parse config.json; errors name its directory, `source`."""
        try:
            return self.parse(raw)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def config_json(self, config: Config, dtype: Any) -> dict[str, Any]:
        """Return the config.json of a model: the entries it was read from, with what changed."""
        raw = {
            **config.extra,
            "architectures": [config.architecture],
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_word_embeddings,
            "dtype": str(dtype),
        }
        raw.pop("torch_dtype", None)  # the older spelling would contradict it
        return raw


class ConfigReader:
    """Typed look-ups in a parsed config.json; `finish` raises all problems in one error.

    Null entries count as absent.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.problems: list[str] = []

    def integer(
        self,
        name: str,
        default: int | None = None,
        least: int = 1,
        kind: str = "positive integer",
        most: int = MOST,
    ) -> int:
        """Return an integer from `least` to `most`, required without a default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.problems.append(f"{name} must be a {kind}, not {quoted(value)}")
            return least
        if value > most:
            self.problems.append(f"{name} must be at most {most}, not {quoted(value)}")
            return least
        return value

    def token(self, name: str) -> int:
        """Return a required token id."""
        return self.integer(name, least=0, kind="token id")

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """Return a positive integer, or None for null."""
        if name in self.raw:
            return None if self.raw[name] is None else self.integer(name)
        return default

    def number(self, name: str, default: float, least: float | None = None) -> float:
        """Return a number, at least `least`."""
        return self.as_number(name, self._value(name), default, least)

    def positive(self, name: str, default: float) -> float:
        """Return a positive number."""
        return self.as_number(name, self._value(name), default, SMALLEST)

    def optional_positive(self, name: str, default: float | None) -> float | None:
        """Return a positive number, or None for null."""
        if name in self.raw:
            return None if self.raw[name] is None else self.positive(name, 1.0)
        return default

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{name} must be true or false, not {quoted(value)}")
            return default
        return value

    def choice(self, name: str, default: str, allowed: Collection[str]) -> str:
        """Return one of the allowed words."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in allowed:
            options = ", ".join(sorted(allowed))
            self.problems.append(f"{name} {quoted(value)} is not among {options}")
            return default
        return value

    def words(self, name: str, default: Sequence[str], allowed: Collection[str]) -> list[str]:
        """Return a list of allowed words of the length of the default."""
        value = self._value(name, list(default))
        count, valid = len(default), isinstance(value, list) and len(value) == len(default)
        if not valid or not all(isinstance(word, str) and word in allowed for word in value):
            options = ", ".join(sorted(allowed))
            self.problems.append(
                f"{name} must be a list of {count} among {options}, not {quoted(value)}"
            )
            return list(default)
        return value

    def flags(self, name: str, default: Sequence[bool]) -> list[bool]:
        """Return a list of 0 and 1 as booleans; entries past the default's length are unused."""
        value = self._value(name, list(default))
        valid = isinstance(value, list) and all(flag in (0, 1) for flag in value)
        if not valid or len(value) < len(default):
            self.problems.append(
                f"{name} must be a list of at least {len(default)} zeros and ones, not "
                f"{quoted(value)}"
            )
            return list(default)
        return [bool(flag) for flag in value[: len(default)]]

    def fixed(self, name: str, only: Any) -> None:
        """Refuse any value but the supported one."""
        value = self._value(name)
        if value is not None and value != only:
            self.problems.append(f"{name} {quoted(value)} is not supported, only {only!r}")

    def divides(self, total_name: str, total: int, part_name: str, part: int) -> None:
        """Refuse a total that is not a multiple of a part."""
        if total % part:
            self.problems.append(f"{total_name} {total} is not a multiple of {part_name} {part}")

    def section(self, name: str) -> Mapping[str, Any] | None:
        """Return a sub-object, or None for null."""
        value = self._value(name)
        if value is not None and not isinstance(value, Mapping):
            self.problems.append(f"{name} must be an object, not {quoted(value)}")
            return None
        return value

    def refuse_variants(self) -> None:
        """Refuse entries by which transformers changes the arithmetic of any decoder."""
        self.fixed("is_causal", True)
        for name in ("quantization_config", "per_layer_config"):
            self.fixed(name, None)

    def finish(self, family: str) -> None:
        """Raise one ValueError with all problems of a model's file, if there are any."""
        self.finish_file(f"config.json of a {family} model")

    def finish_file(self, label: str) -> None:
        """Raise one ValueError with all problems of a file, if there are any."""
        if self.problems:
            raise ValueError(f"{label}: {joined(self.problems)}.")

    def _value(self, name: str, default: Any = None) -> Any:
        value = self.raw[name] if name in self.raw else None
        return default if value is None else value

    def as_number(
        self, name: str, value: Any, default: float | None, least: float | None = None
    ) -> float:
        """Return a number that float32 holds, of at least `least`; 1 or the default for others."""
        value, fallback = default if value is None else value, 1.0 if default is None else default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{name} must be a number, not {quoted(value)}")
            return fallback
        if not abs(value) <= LARGEST:
            self.problems.append(f"{name} must be a finite number, not {quoted(value)}")
            return fallback
        if least is not None and value < least:
            bound = "positive" if least == SMALLEST else f"at least {least}"
            self.problems.append(f"{name} must be {bound}, not {quoted(value)}")
            return fallback
        return float(value)
