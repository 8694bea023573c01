"""Low-rank adapters: which modules, merged into their kernels, in and out of PEFT directories.

Hu et al. 2106.09685; directories as `peft` writes and reads them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.models import files
from ntkrl.models.family import Adapters, Family
from ntkrl.models.reading import ConfigReader
from ntkrl.numerics import einsum
from ntkrl.types import Array, Params

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"
PEFT_PREFIX = "base_model.model."
LEAVES = ("lora_a", "lora_b")

# what adapters here cannot do, and the value that says it is not asked for
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters to put on a model.

    rank: r ≥ 1.
    alpha: what they add is scaled by α/r.
    modules: regular expression over names within a layer, such as "attention/.*"; the names that
      Hugging Face gives the same modules ("q_proj") will do as well.
    seed: of the A matrices, which start uniform; B starts at zero.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: str = "attention/.*"
    seed: int = 0

    def adapters(self, family: Family) -> Adapters:
        """Bind to a family.

        Raises:
          ValueError: a rank or alpha that is not positive, or a pattern that matches no module.
        """
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora: rank {self.rank} and alpha {self.alpha} must be positive.")
        known = modules(family)
        try:
            asked = re.compile(self.modules)
        except re.error as error:
            raise ValueError(f"lora.modules {self.modules!r}: {error}.") from error
        chosen = tuple(
            ours
            for ours, stored in known.items()
            if asked.fullmatch(ours) or asked.fullmatch(stored.rpartition(".")[2])
        )
        if not chosen:
            raise ValueError(
                f"lora.modules {self.modules!r} matches no module; a layer has {', '.join(known)}."
            )
        return Adapters(chosen, self.rank, self.alpha / self.rank)


def modules(family: Family) -> dict[str, str]:
    """Return `{our name within a layer: stored name with {i}}` of every matrix product."""
    return {
        ours.removeprefix("layers/").removesuffix("/kernel"): stored.removesuffix(".weight")
        for ours, stored, _ in family.weights
        if ours.startswith("layers/") and ours.endswith("/kernel")
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.rpartition("/")[2] in LEAVES


def start(leaf: jax.ShapeDtypeStruct, name: str, key: Array) -> Array:
    """Return the starting value of an adapter's parameter, as PEFT's."""
    if name.endswith("lora_b"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    bound = 1 / math.sqrt(leaf.shape[1])
    return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)


def merged(params: Params, adapters: Adapters) -> Params:
    """Return params without adapters, what they do added to the kernels."""

    def walk(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        found = {name: walk(leaf) for name, leaf in tree.items() if name not in LEAVES}
        if "lora_a" in tree:
            added = einsum("lir,lro->lio", tree["lora_a"], tree["lora_b"])
            found["kernel"] = tree["kernel"] + adapters.scaling * added
        return found

    return walk(params)


def table(family: Family, adapters: Adapters) -> Family:
    """Return the tensors of an adapter directory as a Family."""
    known = modules(family)
    rows = [
        (f"layers/{module}/{ours}", f"{PEFT_PREFIX}{known[module]}.{stored}.weight", True)
        for module in adapters.modules
        for ours, stored in zip(LEAVES, ("lora_A", "lora_B"), strict=True)
    ]
    return dataclasses.replace(family, weights=tuple(rows), prefix="", ignored=())


def read_config(directory: Path) -> tuple[dict[str, Any], str | None]:
    """Read adapter_config.json: the entries, and the base model's directory or name.

    Raises:
      ValueError: what adapters here cannot do, all of it in one message.
    """
    raw = files.read_json(directory / CONFIG_FILE)
    reader = ConfigReader(raw)
    for name, plain in PLAIN.items():
        if plain is None and name in raw and raw[name] not in (None, []):
            reader.problems.append(f"{name} {raw[name]!r} is not supported")
        elif plain is not None:
            reader.fixed(name, plain)
    reader.finish("LoRA adapter (adapter_config.json)")
    return raw, raw["base_model_name_or_path"] if "base_model_name_or_path" in raw else None


def stored_adapters(directory: Path, raw: Mapping[str, Any], family: Family) -> Adapters:
    """Tell the modules of an adapter directory by its tensors.

    Raises:
      ValueError: impossible entries, or tensors of modules that layers do not have.
    """
    reader = ConfigReader(raw)
    rank, alpha = reader.integer("r"), reader.number("lora_alpha", 8.0)
    root = math.sqrt(rank) if reader.boolean("use_rslora", False) else rank
    reader.finish("LoRA adapter (adapter_config.json)")
    names = [
        re.sub(r"\.\d+\.", ".{i}.", name).rpartition(".lora_")[0].removeprefix(PEFT_PREFIX)
        for name in files.tensor_files(directory, STEM)
    ]
    by_stored = {stored: ours for ours, stored in modules(family).items()}
    unknown = sorted(set(names) - set(by_stored))
    if unknown:
        raise ValueError(
            f"{directory} adapts {', '.join(unknown)}; supported are {', '.join(by_stored)}."
        )
    chosen = tuple(ours for stored, ours in by_stored.items() if stored in names)
    return Adapters(chosen, rank, alpha / root)


def write_adapter(
    directory: Path,
    family: Family,
    adapters: Adapters,
    params: Params,
    base: str | None,
    source: str | None,
) -> None:
    """Write a PEFT directory.

    Args:
      directory: where; replaced when whole.
      family, adapters, params: of the policy.
      base: directory or name of the model the adapters belong to.
      source: directory whose tokenizer files travel along, or None.
    """
    rows = table(family, adapters).weights
    tensors = files.stored_tensors(rows, trees.named_leaves(params))
    known = modules(family)
    raw = {
        **PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.scaling * adapters.rank,
        "lora_dropout": 0.0,
        "target_modules": [
            known[module].rpartition(f"{files.LAYER}.")[2] for module in adapters.modules
        ],
        "fan_in_fan_out": family.label == "GPT-2",
        "inference_mode": True,
    }
    files.write_model(directory, raw, tensors, source, config_file=CONFIG_FILE, stem=STEM)
