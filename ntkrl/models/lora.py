"""Low-rank adapters (Hu et al. 2106.09685) and their directories, in the format of `peft`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.json_files import read_object
from ntkrl.messages import joined, quoted
from ntkrl.models import hf_export, hf_files
from ntkrl.models.family import MOST_COLUMNS, ConfigReader, Family
from ntkrl.models.layers import Adapters
from ntkrl.models.tensor_map import LAYER
from ntkrl.numerics import einsum
from ntkrl.types import Array, Params

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"
PEFT_PREFIX = "base_model.model."
LEAVES = ("lora_a", "lora_b")

# entries of adapter_config.json that change the adapters' arithmetic, with the values under which
# they change nothing. Some initialisations (PiSSA, OLoRA, CorDA, LoftQ) change the base's weights
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_dora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
}
# entries that are read, or that do not change the output of trained adapters. `target_modules`
# repeats the tensors' names; A is stored [r, in] and B [out, r] whatever `fan_in_fan_out` says
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
)
EMPTY: tuple[Any, ...] = (None, False, {}, [])
"""Values of an entry of any other name that turn it off."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """New adapters for a model.

    rank: r ≥ 1.
    alpha: their output is scaled by α/r.
    modules: regular expression over names within a layer, such as "attention/.*", or over Hugging
      Face's names of the same modules ("q_proj").
    seed: of the A matrices, uniform; B is zero.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: str = "attention/.*"
    seed: int = 0

    def adapters(self, family: Family) -> Adapters:
        """Select the modules of a family.

        Raises:
          ValueError: a rank or alpha that is not positive, or a pattern that matches no module.
        """
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora: rank {self.rank} and alpha {self.alpha} must be positive.")
        known = modules(family)
        try:
            pattern = re.compile(self.modules)
        except re.error as error:
            raise ValueError(f"lora.modules {self.modules!r}: {error}.") from error
        chosen = tuple(
            ours
            for ours, stored in known.items()
            if pattern.fullmatch(ours) or pattern.fullmatch(stored.rpartition(".")[2])
        )
        if not chosen:
            raise ValueError(
                f"lora.modules {self.modules!r} matches no module; a layer has "
                f"{', '.join(known)}{_bare_modules(family)}."
            )
        return Adapters(chosen, self.rank, self.alpha / self.rank)


def modules(family: Family) -> dict[str, str]:
    """Return `{our name within a layer: stored name with {i}}` of every matrix product.

    Routers and experts are left out: PEFT adapts modules, and these are bare parameters of
    transformers' models.
    """
    return {
        ours.removeprefix("layers/").removesuffix("/kernel"): stored.removesuffix(".weight")
        for ours, stored, _ in family.weights
        if ours.startswith("layers/") and ours.endswith("/kernel") and not _is_bare(ours)
    }


def _is_bare(name: str) -> bool:
    return name.startswith(("layers/mlp/router/", "layers/mlp/experts/"))


def _bare_modules(family: Family) -> str:
    bare = any(_is_bare(ours) for ours, _, _ in family.weights)
    return " (routers and experts take no adapters: train them in full)" if bare else ""


def is_adapter(name: str) -> bool:
    """Return True for the name of an adapter's parameter."""
    return name.rpartition("/")[2] in LEAVES


def init_adapters(
    shapes: dict[str, jax.ShapeDtypeStruct], seed: int, family: Family, mesh: Mesh | None
) -> dict[str, Array]:
    """Initialise adapter params as PEFT does: A uniform in ±1/√inputs, B zero."""
    shardings, arrays = family.shardings(shapes, mesh), {}
    for number, (name, leaf) in enumerate(shapes.items()):
        values = jnp.zeros(leaf.shape, leaf.dtype)
        if not name.endswith("lora_b"):
            key = jax.random.fold_in(jax.random.key(seed), number)
            bound = 1 / math.sqrt(leaf.shape[1])
            values = jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
        arrays[name] = jax.device_put(values, shardings[name])
    return arrays


def merged(params: Params, adapters: Adapters) -> Params:
    """Return params without adapters, their products added to the kernels."""

    def walk(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        plain = {name: walk(leaf) for name, leaf in tree.items() if name not in LEAVES}
        if "lora_a" in tree:
            added = einsum("lir,lro->lio", tree["lora_a"], tree["lora_b"])
            plain["kernel"] = tree["kernel"] + adapters.scaling * added
        return plain

    return walk(params)


def adapter_family(family: Family, adapters: Adapters) -> Family:
    """Return the family with the table of an adapter directory's tensors."""
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
      ValueError: not a JSON object, or features that are unsupported or unknown, all of them in
        one message.
    """
    raw = read_object(directory / CONFIG_FILE)
    reader = ConfigReader(raw)
    for name in sorted(set(raw) - set(WITHOUT_EFFECT)):
        allowed = PLAIN[name] if name in PLAIN else EMPTY
        # 1 == True in Python, and 0 == False
        if not any(raw[name] == value and type(raw[name]) is type(value) for value in allowed):
            options = ", ".join(repr(value) for value in allowed)
            label, value = quoted(name).strip("'"), quoted(raw[name])
            reader.problems.append(f"{label} {value} is not supported, only {options}")
    base = raw["base_model_name_or_path"] if "base_model_name_or_path" in raw else None
    if not isinstance(base, str | None):
        reader.problems.append(f"base_model_name_or_path must be a name, not {quoted(base)}")
    reader.finish_file(f"{directory / CONFIG_FILE}")
    return raw, base


def stored_adapters(directory: Path, family: Family) -> Adapters:
    """Return the adapters of a directory, their modules read from its tensors' names.

    Raises:
      ValueError: unsupported or impossible entries, or tensors of unknown modules.
    """
    reader = ConfigReader(read_config(directory)[0])
    rank, alpha = reader.integer("r", most=MOST_COLUMNS), reader.number("lora_alpha", 8.0)
    root = math.sqrt(rank) if reader.boolean("use_rslora", False) else rank
    reader.finish_file(f"{directory / CONFIG_FILE}")
    names = [
        re.sub(r"\.\d+\.", ".{i}.", name).rpartition(".lora_")[0].removeprefix(PEFT_PREFIX)
        for name in hf_files.tensor_files(directory, STEM)
    ]
    by_stored = {stored: ours for ours, stored in modules(family).items()}
    unknown = sorted(set(names) - set(by_stored))
    if unknown:
        raise ValueError(
            f"{directory} adapts {joined(unknown, ', ')}; supported are {', '.join(by_stored)}"
            f"{_bare_modules(family)}."
        )
    chosen = tuple(ours for stored, ours in by_stored.items() if stored in names)
    return Adapters(chosen, rank, alpha / root)


def adapter_files(
    family: Family, adapters: Adapters, params: Params, base: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the adapter_config.json of a PEFT directory.

    Args:
      family, adapters, params: of the policy.
      base: directory or name of the base model.
    """
    rows = adapter_family(family, adapters).weights
    tensors = hf_export.gather_tensors(rows, trees.named_leaves(params))
    known = modules(family)
    config = {
        "peft_type": "LORA",
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.scaling * adapters.rank,
        "lora_dropout": 0.0,
        "target_modules": [known[module].rpartition(f"{LAYER}.")[2] for module in adapters.modules],
        # kernels stored [in, out], as GPT-2's
        "fan_in_fan_out": not any(transposed for _, _, transposed in family.weights),
        "inference_mode": True,
    }
    return tensors, config
