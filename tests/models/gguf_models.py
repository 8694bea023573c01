"""GGUF files of tiny models, written as llama.cpp's conversion scripts write them."""

import json

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
)
# general.architecture by model_type
ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "gpt2": "gpt2"},
    **{"gpt_neox": "gptneox", "olmo2": "olmo2", "smollm3": "smollm3", "phi3": "phi3"},
}
SIZES = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
NUMBERS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}


def write_gguf(path, model, kinds=None, changes=None, tokens=None):
    """Write a transformers model as a GGUF file.

    Args:
      path: of the file.
      model: torch's.
      kinds: tensor type by a part of the tensor's name; float32 for others.
      changes: metadata that replaces or adds entries, by key; None removes one.
      tokens: metadata of the tokenizer; None for `byte_level`.
    """
    config = model.config.to_dict()
    name = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, name)
    tensors = dict(_tensors(model, config, name))
    entries = {f"{name}.{key}": value for key, value in _metadata(config, name, tensors).items()}
    entries |= {"general.name": "Tiny", "general.license": "mit"}
    entries |= byte_level(config.get("vocab_size")) if tokens is None else tokens
    entries |= changes or {}
    for key, value in entries.items():
        _add(writer, key, value)
    for stored, array in tensors.items():
        kind = next((k for part, k in (kinds or {}).items() if part in stored), Kind.F32)
        data = quantised(array, kind)
        if kind in (Kind.F32, Kind.F16):
            writer.add_tensor(stored, data)
        else:
            writer.add_tensor(stored, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(array, kind):
    """Return the blocks of an array; those of Q4_K and Q6_K are random with its scale."""
    if kind == Kind.I32:
        return array.astype(np.int32)
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return gguf.quantize(np.ascontiguousarray(array, np.float32), kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (array.size // numbers, size), np.uint8)
    scale = np.full((len(blocks), 1), 1e-3, np.float16).view(np.uint8)
    # the two bytes of a block's scale, and of its minimum
    places = (slice(0, 2), slice(2, 4)) if kind == Kind.Q4_K else (slice(-2, None),)
    for place in places:
        blocks[:, place] = scale
    return blocks.reshape(*array.shape[:-1], array.shape[-1] // numbers * size)


def byte_level(size):
    """Return the metadata of a byte-level tokenizer of a size, with a chat template."""
    tokens = ["<|end|>", "<|user|>", *map(chr, range(97, 123)), "Ġ", "an", "Ġa"]
    merges = ["a n", "Ġ a"]
    tokens = [*tokens, *(f"extra{i}" for i in range(size))][:size]
    kinds = [3 if token.startswith("<|") else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": np.uint32(0),
        "tokenizer.ggml.padding_token_id": np.uint32(0),
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece():
    """Return the metadata of a tokenizer with scores and a BOS."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "n", "▁a", "an", "▁an", "ban", "▁ban"]
    tokens = [*pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + 9 * [1] + 256 * [6]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.unknown_token_id": np.uint32(0),
    }


def _add(writer, key, value):
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int | np.integer):
        writer.add_uint32(key, int(value))
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _first(config, names):
    return next((config[name] for name in names if config.get(name) is not None), None)


def _metadata(config, name, tensors):
    """Return the metadata of a config.json, as far as the scripts write it."""
    entries = {key: _first(config, names) for key, names in (SIZES | NUMBERS).items()}
    if name == "gpt2" and entries["feed_forward_length"] is None:
        entries["feed_forward_length"] = 4 * config["n_embd"]
    if name in ("llama", "qwen2", "smollm3") or (name == "qwen3moe"):
        entries["attention.sliding_window"] = None  # not written
    if name not in ("gemma2", "gemma3"):
        entries["attn_logit_softcapping"] = entries["final_logit_softcapping"] = None
    if name == "gpt2":
        return entries
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if name == "gptneox":
        share = config["rope_parameters"]["partial_rotary_factor"]
        entries["use_parallel_residual"] = config["use_parallel_residual"]
        return entries | {"rope.dimension_count": int(share * head_dim)}
    rope = config["rope_parameters"]
    if name == "gemma3":
        pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
        entries["attention.sliding_window_pattern"] = pattern
        entries["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if (
        name in ("gemma2", "gemma3", "qwen3", "qwen3moe")
        or head_dim * heads != config["hidden_size"]
    ):
        entries["attention.key_length"] = entries["attention.value_length"] = head_dim
    entries["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    entries["rope.freq_base"] = None if name == "gemma2" else float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        entries["rope.scaling.type"] = rope["rope_type"]
        entries["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        entries["rope.scaling.original_context_length"] = original
        entries["rope.scaling.yarn_beta_fast"] = float(rope["beta_fast"])
        entries["rope.scaling.yarn_beta_slow"] = float(rope["beta_slow"])
    if name == "phi3" and rope["rope_type"] == "longrope":
        original = config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        factor = np.sqrt(1 + np.log(scale) / np.log(original)) if scale > 1 else 1.0
        entries["rope.scaling.original_context_length"] = original
        entries["rope.scaling.attn_factor"] = float(factor)
        for kind in ("long", "short"):
            tensors[f"rope_factors_{kind}.weight"] = np.float32(rope[f"{kind}_factor"])
    if name == "llama" and rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _llama3_divisors(rope, head_dim)
    return entries


def _llama3_divisors(rope, width):
    original, divisors = rope["original_max_position_embeddings"], []
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for place in range(0, width, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (place / width)
        if length < original / high:
            divisors.append(1.0)
        elif length > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.float32(divisors)


def _tensors(model, config, name):
    """Yield llama.cpp's names and arrays of a model's tensors."""
    (number,) = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name]
    layers = _first(config, SIZES["block_count"])
    table = gguf.get_tensor_name_map(number, layers)
    heads = _first(config, SIZES["attention.head_count"])
    shared = config.get("num_key_value_heads") or heads
    for stored, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if stored == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if stored.endswith("experts.gate_up_proj"):
            middle = array.shape[1] // 2
            layer = stored.split(".")[2]
            yield f"blk.{layer}.ffn_gate_exps.weight", array[:, :middle]
            yield f"blk.{layer}.ffn_up_exps.weight", array[:, middle:]
            continue
        if stored.endswith("experts.down_proj"):
            yield f"blk.{stored.split('.')[2]}.ffn_down_exps.weight", array
            continue
        if name in ("llama", "smollm3") and ("q_proj" in stored or "k_proj" in stored):
            count = heads if "q_proj" in stored else shared
            parts = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
            array = parts.swapaxes(1, 2).reshape(array.shape)
        if name in ("gemma2", "gemma3") and stored.endswith("norm.weight"):
            array = array + 1
        if name == "gpt2" and any(
            f".{part}.weight" in stored for part in ("c_attn", "c_proj", "c_fc")
        ):
            array = array.T
        if name == "gptneox" and "query_key_value" in stored:
            parts = array.reshape(heads, 3, -1, *array.shape[1:])
            array = np.concatenate([parts[:, i].reshape(-1, *array.shape[1:]) for i in range(3)])
        yield table.get_name(stored, (".weight", ".bias")), np.ascontiguousarray(array)


def metadata_json(path):
    """Return the config.json of a converted directory."""
    return json.loads((path / "config.json").read_text())
