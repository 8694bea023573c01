"""Architectures of GGUF files: config.json, and tensors as Hugging Face's families store them.

llama.cpp permutes or shifts some tensors when it converts a model; `Architecture.restored` undoes
it. What a file declares and this module does not read is refused, unless it is neutral.

Source: conversion scripts and `src/models` of llama.cpp.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ntkrl import gguf
from ntkrl.messages import joined, quoted
from ntkrl.models.rope import Rope

Entries = dict[str, Any]
HARMLESS = (
    *("vocab_size", "feed_forward_length", "rope.dimension_count", "attention.key_length"),
    *("attention.value_length", "rope.scaling.finetuned", "tensor_data_layout", "expert_count"),
    *("expert_used_count", "attention.causal", "rope.scaling.type", "rope.freq_base"),
)
"""Metadata that need not be read: it changes nothing, or the tensors are checked instead."""
IGNORED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*attn_rot_embd.*")
"""Tensors that are no parameters."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Rotary scaling that all published Llama 3 models have, besides their `factor`."""


class Metadata:
    """Typed look-ups of the metadata of a file's architecture; problems are collected."""

    def __init__(self, file: gguf.GgufFile, name: str):
        self.file, self.name = file, name
        self.problems: list[str] = []
        self.read: set[str] = set()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value of a type; a list of equal values, by layer, counts as one of them."""
        self.read.add(key)
        full = f"{self.name}.{key}"
        value = self.file.entries.get(full)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None:
            if default is None and full not in self.file.entries:
                self.problems.append(f"{full} is missing")
            return kind() if default is None else default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            value = "different numbers by layer" if isinstance(value, np.ndarray) else quoted(value)
            self.problems.append(f"{full} must be {kind.__name__}, not {value}")
            return kind() if default is None else default
        return value

    def optional(self, key: str, kind: type) -> Any:
        """Return a value of a type, None without it."""
        self.read.add(key)
        return self.get(key, kind) if f"{self.name}.{key}" in self.file.entries else None

    def fixed(self, key: str, only: Any) -> None:
        """Refuse another value than the one that is supported."""
        value = self.get(key, type(only), only)
        if value != only:
            self.problems.append(f"{self.name}.{key} {quoted(value)} is not supported")

    def finish(self) -> None:
        """Raise one ValueError with all problems, and all entries that were not read."""
        for key, value in self.file.entries.items():
            name = key.removeprefix(f"{self.name}.")
            if name == key or name in self.read or name in HARMLESS:
                continue
            if isinstance(value, np.ndarray | list) or value not in (0, False):
                self.problems.append(f"{key} {quoted(value)} is not supported")
        if self.problems:
            raise ValueError(f"{self.file.path}: {joined(self.problems)}.")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of GGUF files.

    hf_names: of Hugging Face's classes that are stored under it.
    entries: metadata → config.json.
    interleaved: rows of queries and keys alternate between the halves of a head.
    norm_shift: was added to the scale of norms.
    fused_heads: rows of queries, keys and values follow each other, not by head.
    flipped: kernels are stored [in, out] by Hugging Face.
    """

    entries: Callable[[Metadata], Entries]
    interleaved: bool = False
    norm_shift: float = 0.0
    fused_heads: bool = False
    flipped: bool = False

    def restored(self, name: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
        """Return a tensor as Hugging Face stores it.

        Args:
          name: llama.cpp's.
          values: as in the file.
          config: entries of config.json.
        """
        part = name.rpartition(".")[0].rpartition(".")[2]
        if self.interleaved and part in ("attn_q", "attn_k"):
            entry = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            parts = values.reshape(config[entry], -1, 2, *values.shape[1:])
            return parts.swapaxes(1, 2).reshape(values.shape)
        if self.fused_heads and part == "attn_qkv":
            heads = config["num_attention_heads"]
            return (
                values.reshape(3, heads, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
            )
        if self.norm_shift and name.endswith("norm.weight"):
            return values - np.float32(self.norm_shift)
        if self.flips(name):
            return values.T
        return values

    def flips(self, name: str) -> bool:
        """Return whether a tensor is the transpose of Hugging Face's."""
        return self.flipped and bool(
            re.fullmatch(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name)
        )


def read_config(file: gguf.GgufFile) -> tuple[Architecture, Entries]:
    """Return the architecture of a file, and the entries of its config.json.

    Raises:
      ValueError: an unknown architecture; entries that are missing, of other types or not
        supported, all of them in one message.
    """
    name, kind = file.entries.get("general.architecture"), file.entries.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{file.path} holds no language model, but {quoted(kind)}.")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {quoted(name)} is unknown; known are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    metadata, architecture = Metadata(file, name), ARCHITECTURES[name]
    entries = architecture.entries(metadata)
    rows = file.tensors.get("token_embd.weight")
    if rows is None:
        metadata.problems.append("the tensor token_embd.weight is missing")
    metadata.fixed("attention.causal", True)
    metadata.finish()
    assert rows is not None
    tied = "output.weight" not in file.tensors or gguf.same_bytes(
        file, "output.weight", "token_embd.weight"
    )
    entries |= {"vocab_size": rows.shape[0], "tie_word_embeddings": tied}
    return architecture, entries | gguf.special_token_ids(file)


def _sizes(metadata: Metadata, hf_name: str) -> Entries:
    """Return the entries that decoders share."""
    heads, width = metadata.get("attention.head_count", int), metadata.get("embedding_length", int)
    if heads < 1:
        metadata.problems.append(f"{metadata.name}.attention.head_count must be positive")
        heads = 1
    head_dim = metadata.get("attention.key_length", int, max(width // heads, 1))
    metadata.fixed("attention.value_length", head_dim)
    return {
        "architectures": [hf_name],
        "hidden_size": width,
        "num_hidden_layers": metadata.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.get("feed_forward_length", int),
        "max_position_embeddings": metadata.get("context_length", int),
        "rms_norm_eps": metadata.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": metadata.get("rope.freq_base", float, 10000.0),
    }


def _has(metadata: Metadata, part: str) -> bool:
    return f"blk.0.{part}" in metadata.file.tensors


def _scaling(metadata: Metadata, entries: Entries) -> Entries:
    """Return `rope_scaling` of config.json; empty for none."""
    kind = metadata.get("rope.scaling.type", str, "none")
    factor = metadata.optional("rope.scaling.factor", float)
    linear = metadata.optional("rope.scale_linear", float)  # of older files
    original = metadata.optional("rope.scaling.original_context_length", int)
    metadata.get("rope.dimension_count", int, 0)
    if "rope_freqs.weight" in metadata.file.tensors:
        if kind != "none":
            metadata.problems.append(f"rope_freqs.weight beside rotary scaling {quoted(kind)}")
        return _stored_frequencies(metadata, entries)
    if kind in ("none", "linear"):
        factor = linear if factor is None or kind == "none" else factor
        return {} if factor in (None, 0.0, 1.0) else {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        metadata.problems.append(f"rotary scaling {quoted(kind)} is not supported")
        return {}
    for key in ("yarn_ext_factor", "yarn_attn_factor", "attn_factor"):
        metadata.fixed(f"rope.scaling.{key}", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", float, 1.0),
    }


def _stored_frequencies(metadata: Metadata, entries: Entries) -> Entries:
    """Return `rope_scaling` of divisors that are stored as a tensor, as those of Llama 3 are."""
    divisors = gguf.read_tensor(metadata.file, "rope_freqs.weight").astype(float).reshape(-1)
    width, base = entries["head_dim"], entries["rope_theta"]
    if divisors.size != width // 2 or not (np.isfinite(divisors) & (divisors > 0)).all():
        metadata.problems.append(
            f"rope_freqs.weight must hold {width // 2} positive numbers, not {divisors.size}"
        )
        return {}
    factor = float(str(np.float32(divisors.max())))
    original = int(LLAMA3["original_max_position_embeddings"])
    if base > 1 and factor > 1:
        rope = Rope(width, base, "llama3", factor, 1.0, 4.0, original)
        expected = rope.theta ** (-np.arange(0, width, 2) / width) / rope.frequencies()
        if np.allclose(divisors, expected, rtol=1e-5):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    # other divisors: the only form of config.json for any numbers
    return _longrope(divisors, divisors, entries["max_position_embeddings"], 1.0)


def _longrope(short: np.ndarray, long: np.ndarray, original: int, attention: float) -> Entries:
    return {
        "rope_type": "longrope",
        "short_factor": [float(str(np.float32(value))) for value in short],
        "long_factor": [float(str(np.float32(value))) for value in long],
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _llama(hf_name: str, metadata: Metadata) -> Entries:
    """Return config.json of Llama, Mistral, Qwen2, Qwen3, OLMo 2 or SmolLM3."""
    entries = _sizes(metadata, hf_name)
    if hf_name in ("LlamaForCausalLM", "SmolLM3ForCausalLM"):
        entries["head_dim"] = metadata.get("rope.dimension_count", int, entries["head_dim"])
        metadata.fixed("expert_count", 0)
        entries["mlp_bias"] = _has(metadata, "ffn_up.bias")
    if hf_name != "Qwen2ForCausalLM":
        entries["attention_bias"] = _has(metadata, "attn_q.bias")
    if hf_name == "Olmo2ForCausalLM":
        del entries["head_dim"]  # its class has none
    scaling = _scaling(metadata, {"head_dim": 0, **entries})
    return entries | ({"rope_scaling": scaling} if scaling else {})


def _qwen_moe(metadata: Metadata) -> Entries:
    width = metadata.get("expert_feed_forward_length", int)
    entries = _llama("Qwen3MoeForCausalLM", metadata)
    return entries | {
        "intermediate_size": metadata.get("feed_forward_length", int, width),
        "moe_intermediate_size": width,
        "num_experts": metadata.get("expert_count", int),
        "num_experts_per_tok": metadata.get("expert_used_count", int),
        "norm_topk_prob": True,  # as in llama.cpp
    }


def _gemma(generation: int, largest: int, metadata: Metadata) -> Entries:
    """Return config.json of Gemma 2 or 3.

    Args:
      generation: 2 or 3.
      largest: layers of the 27B model, the one that divides scores by the root of width / heads
        and not of the width of a head.
      metadata: of the file.
    """
    entries = _sizes(metadata, f"Gemma{generation}ForCausalLM")
    count = entries["num_hidden_layers"]
    scale = entries["head_dim"]
    if count == largest:
        scale = entries["hidden_size"] // entries["num_attention_heads"]
    entries |= {
        "query_pre_attn_scalar": scale,
        "sliding_window": metadata.get("attention.sliding_window", int),
        "attention_bias": _has(metadata, "attn_q.bias"),
    }
    if generation == 2:
        score_cap = metadata.get("attn_logit_softcapping", float, 50.0)
        cap = metadata.get("final_logit_softcapping", float, 30.0)
        return entries | {"attn_logit_softcapping": score_cap, "final_logit_softcapping": cap}
    cap = metadata.optional("final_logit_softcapping", float)
    entries |= {
        "final_logit_softcapping": cap or None,  # 0 for none
        "rope_local_base_freq": metadata.get("rope.freq_base_swa", float, 10000.0),
    }
    pattern = metadata.file.entries.get("gemma3.attention.sliding_window_pattern")
    metadata.read.add("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        names = [("full_attention", "sliding_attention")[bool(slides)] for slides in pattern]
        entries["layer_types"] = names
    elif pattern is not None:
        entries["sliding_window_pattern"] = pattern
    scaling = _scaling(metadata, entries)
    if scaling.get("rope_type", "linear") != "linear":
        metadata.problems.append(f"rotary scaling {scaling['rope_type']} of Gemma 3")
    return entries | ({"rope_scaling": scaling} if scaling else {})


def _phi(metadata: Metadata) -> Entries:
    entries = _sizes(metadata, "Phi3ForCausalLM")
    rotated = metadata.get("rope.dimension_count", int, entries["head_dim"])
    del entries["head_dim"]  # its class has none
    entries["partial_rotary_factor"] = rotated / max(
        entries["hidden_size"] // entries["num_attention_heads"], 1
    )
    entries["sliding_window"] = metadata.optional("attention.sliding_window", int) or None
    length = entries["max_position_embeddings"]
    original = metadata.get("rope.scaling.original_context_length", int, length)
    attention = metadata.get("rope.scaling.attn_factor", float, 1.0)
    names = [f"rope_factors_{name}.weight" for name in ("short", "long")]
    if not all(name in metadata.file.tensors for name in names):
        metadata.fixed("rope.scaling.type", "none")
        return entries
    metadata.read.add("rope.scaling.factor")
    short, long = (gguf.read_tensor(metadata.file, name).reshape(-1) for name in names)
    entries["original_max_position_embeddings"] = original
    return entries | {"rope_scaling": _longrope(short, long, original, attention)}


def _gpt2(metadata: Metadata) -> Entries:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": metadata.get("embedding_length", int),
        "n_head": metadata.get("attention.head_count", int),
        "n_layer": metadata.get("block_count", int),
        "n_positions": metadata.get("context_length", int),
        "n_inner": metadata.get("feed_forward_length", int),
        "layer_norm_epsilon": metadata.get("attention.layer_norm_epsilon", float),
    }


def _neox(metadata: Metadata) -> Entries:
    heads, width = metadata.get("attention.head_count", int), metadata.get("embedding_length", int)
    head_dim = max(width // max(heads, 1), 1)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata.get("block_count", int),
        "intermediate_size": metadata.get("feed_forward_length", int),
        "max_position_embeddings": metadata.get("context_length", int),
        "layer_norm_eps": metadata.get("attention.layer_norm_epsilon", float),
        "use_parallel_residual": metadata.get("use_parallel_residual", bool, True),
        "rotary_pct": metadata.get("rope.dimension_count", int, head_dim) / head_dim,
        "rotary_emb_base": metadata.get("rope.freq_base", float, 10000.0),
    }


def _decoder(hf_name: str, **changes: Any) -> Architecture:
    return Architecture(functools.partial(_llama, hf_name), **changes)


ARCHITECTURES = {
    "llama": _decoder("LlamaForCausalLM", interleaved=True),
    "smollm3": _decoder("SmolLM3ForCausalLM", interleaved=True),
    "qwen2": _decoder("Qwen2ForCausalLM"),
    "qwen3": _decoder("Qwen3ForCausalLM"),
    "qwen3moe": Architecture(_qwen_moe),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "gemma2": Architecture(functools.partial(_gemma, 2, 46), norm_shift=1.0),
    "gemma3": Architecture(functools.partial(_gemma, 3, 62), norm_shift=1.0),
    "phi3": Architecture(_phi),
    "gpt2": Architecture(_gpt2, flipped=True),
    "gptneox": Architecture(_neox, fused_heads=True),
}
