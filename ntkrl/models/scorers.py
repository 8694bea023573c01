"""Reward models: a trunk of a known family with a head that scores whole texts.

Two kinds are supported: transformers' sequence-classification directories with one label, which
score the features of the last token, and ArmoRM, with 19 attribute rewards and a gate that depends
on the prompt alone. With h the trunk's features, i the last token and j the end-of-turn token that
closes the user's last message (the start of GATE), ArmoRM's score is

    r = R h_i    w = softmax(MLP(h_j) / temperature) · scale    score = Σ_k w_k (r T)_k

T removes the effect of verbosity from each attribute. Source: Wang et al. 2406.12845, checkpoint
RLHFlow/ArmoRM-Llama3-8B-v0.1.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.messages import quoted
from ntkrl.models import hf_export, hf_files
from ntkrl.models.decoder import Config
from ntkrl.models.families import FAMILIES, SCORERS, architecture_of
from ntkrl.models.family import MOST_COLUMNS, MOST_LAYERS, ConfigReader, Family
from ntkrl.models.model_card import Training, write_card
from ntkrl.models.policy import ModelOptions, init_params, make_policy
from ntkrl.models.pretrained import read_params
from ntkrl.numerics import einsum
from ntkrl.types import Array, Params, Policy, Scorer

SCORE = "score/weight"
SCORE_TABLE = ((SCORE, "score.weight", False),)
ARMORM = "LlamaForRewardModelWithGating"
# end of turn, start of header, "assistant", end of header, blank line: Llama 3's token ids
GATE = (128009, 128006, 78191, 128007, 271)
ATTRIBUTES = tuple(
    """
    helpsteer-helpfulness helpsteer-correctness helpsteer-coherence helpsteer-complexity
    helpsteer-verbosity ultrafeedback-overall_score ultrafeedback-instruction_following
    ultrafeedback-truthfulness ultrafeedback-honesty ultrafeedback-helpfulness beavertails-is_safe
    prometheus-score argilla-overall_quality argilla-judge_lm code-complexity code-style
    code-explanation code-instruction-following code-readability
    """.split()
)


@dataclasses.dataclass(frozen=True)
class NewHead:
    """A new head on a language model's trunk: its pad token, and the seed of its weights."""

    pad_id: int
    seed: int = 0


class RewardSpec(NamedTuple):
    """A reward model by its config.json.

    family: of the trunk, with the heads' tensors in its table.
    config: of the trunk.
    heads: shapes of the heads' params.
    scorer: from the trunk's Policy to the Scorer.
    """

    family: Family
    config: Config
    heads: Params
    scorer: Callable[[Policy], Scorer]


def load_scorer(
    path: str | Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    compute_dtype: Any = None,
    new: NewHead | None = None,
) -> tuple[Scorer, Params]:
    """Load a reward model: a sequence-classification directory of a known family, or ArmoRM.

    Args:
      path: directory with config.json and safetensors, or a name on the Hugging Face hub.
      dtype: of the trunk's params; heads are float32 or better.
      mesh: shard the params over it, or None for one device.
      compute_dtype: dtype the trunk runs in; None for `dtype`.
      new: head to initialise on the trunk of a language model; ignored where a head is stored.

    Returns:
      `(scorer, params)`: pure functions, and a nested dict of arrays.

    Raises:
      ValueError: anything missing, misshapen or unknown, more than one label, or no pad token.
    """
    directory = hf_files.local_directory(path)
    raw = hf_files.read_config(directory)
    name = architecture_of(raw)
    family = None if name is None or new is None else FAMILIES.get(name)
    if new is not None and family is not None:
        raw = {**raw, "num_labels": 1, "id2label": {"0": "LABEL_0"}, "pad_token_id": new.pad_id}
        raw["architectures"] = [family.scorer]
    spec = _spec(raw, dtype, directory)
    scorer, shapes = _assemble(spec, dtype, mesh, compute_dtype, str(directory))
    leaves = trees.named_leaves(shapes)
    if new is None or family is None:
        arrays = read_params(directory, spec.family, leaves, mesh)
    else:
        trunk = {name: leaf for name, leaf in leaves.items() if name != SCORE}
        arrays = read_params(directory, family, trunk, mesh, tied=True)
        leaf = leaves[SCORE]
        draw = jax.random.normal(jax.random.key(new.seed), leaf.shape, leaf.dtype)
        sharding = spec.family.shardings({SCORE: leaf}, mesh)[SCORE]
        arrays[SCORE] = jax.device_put(spec.config.initializer_range * draw, sharding)
    ordered = [arrays[name] for name in leaves]
    return scorer, jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def describe_scorer(
    raw: dict[str, Any],
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    source: str | Path = "config",
) -> tuple[Scorer, Params]:
    """Return the results of `load_scorer`, with shapes (jax.ShapeDtypeStruct) for arrays.

    Args:
      raw: config.json entries.
      dtype, mesh: as in `load_scorer`.
      source: of the entries, for messages.

    Raises:
      ValueError: an unknown architecture or impossible entries.
    """
    return _assemble(_spec(raw, dtype, source), dtype, mesh, None, str(source))


def check_scorer(path: str | Path) -> int:
    """Return V of a reward model, or of a trunk for one, by its config.json.

    Raises:
      ValueError: no directory, no or bad config.json, unknown architecture, missing files.
    """
    directory = hf_files.local_directory(path)
    raw = hf_files.read_config(directory)
    name, known = architecture_of(raw), {**FAMILIES, **SCORERS}
    if name not in known:
        raise ValueError(
            f"{directory}: a reward model cannot be made of architecture {quoted(name)}; known are "
            f"{', '.join(sorted(known))}."
        )
    hf_files.tensor_files(directory)
    return known[name].read(raw, directory).vocab_size


def export_scorer(
    path: str | Path,
    scorer: Scorer,
    params: Params,
    source: str | None,
    training: Training | None = None,
) -> None:
    """Write a reward model as a sequence-classification directory that transformers loads.

    Args:
      path: directory, written atomically.
      scorer, params: as returned by `load_scorer` (of a classifier, not of ArmoRM).
      source: directory of tokenizer files to copy; None for none.
      training: facts for the model card.
    """
    family = FAMILIES[scorer.config.architecture]
    tensors = hf_export.gather_tensors(_with_heads(family).weights, trees.named_leaves(params))
    raw = {
        **family.config_json(scorer.config, jax.tree.leaves(params)[0].dtype),
        "architectures": [family.scorer],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": scorer.pad_id,
        "tie_word_embeddings": False,
    }
    card = write_card(scorer.source, scorer.source, training)
    hf_export.write_model(
        Path(path), raw, tensors, hf_export.Companions(source, scorer.source, card)
    )


def write_new_scorer(path: str | Path, raw: dict[str, Any], key: Array, source: str | Path) -> None:
    """Write a reward model of any known kind with random weights, for trying out a pipeline.

    Args:
      path: directory, as in `export_scorer`.
      raw: config.json entries.
      key: consumed.
      source: directory of tokenizer files to copy.

    Raises:
      ValueError: as `describe_scorer`.
    """
    spec = _spec(raw, jnp.float32, path)
    headless = dataclasses.replace(spec.config, tie_word_embeddings=True)
    trunk_key, head_key = jax.random.split(key)
    params = init_params(spec.family, headless, trunk_key, jnp.float32)
    leaves = trees.named_leaves(params)
    for number, (name, leaf) in enumerate(trees.named_leaves(spec.heads).items()):
        draw = jax.random.normal(jax.random.fold_in(head_key, number), leaf.shape, leaf.dtype)
        leaves[name] = spec.config.initializer_range * draw
    tensors = hf_export.gather_tensors(spec.family.weights, leaves)
    hf_export.write_model(Path(path), raw, tensors, hf_export.Companions(str(source)))


def _spec(raw: dict[str, Any], dtype: Any, source: str | Path) -> RewardSpec:
    name, known = architecture_of(raw), (*SCORERS, ARMORM)
    if name not in known:
        raise ValueError(
            f"{source}: architecture {quoted(name)} is not a known reward model; known are "
            f"{', '.join(sorted(known))}."
        )
    head_dtype = jnp.promote_types(dtype, jnp.float32)
    try:
        if name == ARMORM:
            return _armorm(raw, FAMILIES["LlamaForCausalLM"], head_dtype)
        return _classifier(raw, SCORERS[name], head_dtype)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _assemble(
    spec: RewardSpec, dtype: Any, mesh: Mesh | None, compute_dtype: Any, source: str
) -> tuple[Scorer, Params]:
    """Return the Scorer and the shapes of its params."""
    headless = dataclasses.replace(spec.config, tie_word_embeddings=True)
    options = ModelOptions(compute_dtype)
    policy, trunk = make_policy(spec.family, headless, dtype, options, mesh, source)
    return spec.scorer(policy), {**trunk, **spec.heads}


def _with_heads(family: Family, table: tuple[tuple[str, str, bool], ...] = SCORE_TABLE) -> Family:
    """Return the family with the rows of reward heads in place of the language model's."""
    return dataclasses.replace(family, weights=(*family.weights[:-1], *table))


def _scorer(
    policy: Policy,
    score: Callable[..., dict[str, Array]],
    pad_id: int,
    names: tuple[str, ...] = ("score",),
    gate: tuple[int, ...] = (),
) -> Scorer:
    return Scorer(
        score=score,
        names=names,
        pad_id=pad_id,
        gate=gate,
        max_tokens=policy.max_tokens,
        vocab_size=policy.vocab_size,
        sharding=policy.sharding,
        config=policy.config,
        source=policy.source,
        stacked=policy.stacked,
    )


def _classifier(raw: dict[str, Any], family: Family, dtype: Any) -> RewardSpec:
    """Return the spec of a trunk with one row of weights on its last token."""
    config = family.parse(raw)
    reader = ConfigReader(raw)
    labels = reader.section("id2label")
    count = reader.integer("num_labels", 2 if labels is None else len(labels))
    pad_id = reader.token("pad_token_id")
    if count != 1:
        reader.problems.append(
            f"it has {count} labels; a reward model has one (num_labels=1 when it was trained)"
        )
    reader.finish(f"{family.label} reward")

    def scorer(policy: Policy) -> Scorer:
        def score(params: Params, tokens: Array, mask: Array, gates: Array) -> dict[str, Array]:
            trunk = {name: leaves for name, leaves in params.items() if name != "score"}
            phi_NTD = policy.features(trunk, tokens, mask)
            # as transformers does: the rightmost token other than the pad token, eos or not
            columns = jnp.arange(tokens.shape[1])[None]
            last_N = jnp.max(jnp.where(tokens != pad_id, columns, 0), axis=1)
            phi_ND = phi_NTD[jnp.arange(tokens.shape[0]), last_N]
            weight_KD = params["score"]["weight"]
            return {"score": einsum("nd,kd->nk", phi_ND.astype(weight_KD.dtype), weight_KD)[:, 0]}

        return _scorer(policy, score, pad_id)

    heads = {"score": {"weight": jax.ShapeDtypeStruct((1, config.hidden_size), dtype)}}
    return RewardSpec(_with_heads(family), config, heads, scorer)


def _armorm(raw: dict[str, Any], llama: Family, dtype: Any) -> RewardSpec:
    """Return the spec of ArmoRM."""
    config = llama.parse(raw)
    reader = ConfigReader(raw)
    count = reader.integer("num_objectives", len(ATTRIBUTES), most=MOST_LAYERS)
    inner = reader.integer("gating_hidden_dim", 1024, most=MOST_COLUMNS)
    hidden = reader.integer("gating_n_hidden", 3, most=MOST_LAYERS)
    temperature = reader.positive("gating_temperature", 10.0)
    pad_id = reader.token("pad_token_id")
    if config.vocab_size <= max(GATE):
        reader.problems.append(
            f"vocab_size {config.vocab_size} does not hold Llama 3's special tokens (up to "
            f"{max(GATE)}), by which the gate's position is found"
        )
    reader.finish("ArmoRM")
    names = ATTRIBUTES
    if count != len(ATTRIBUTES):
        names = tuple(f"attribute-{k}" for k in range(count))

    def scorer(policy: Policy) -> Scorer:
        def score(params: Params, tokens: Array, mask: Array, gates: Array) -> dict[str, Array]:
            reward, gate = params["reward"], params["gate"]
            trunk = {n: leaves for n, leaves in params.items() if n not in ("reward", "gate")}
            dtype, rows = reward["weight"].dtype, jnp.arange(tokens.shape[0])
            phi_NTD = policy.features(trunk, tokens, mask)
            last_N = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
            phi_ND = phi_NTD[rows, last_N].astype(dtype)
            rewards_NK = einsum("nd,kd->nk", phi_ND, reward["weight"])
            gate_NK = _gate_weights(gate, phi_NTD[rows, gates].astype(dtype), temperature)
            adjusted_NK = einsum("nk,kl->nl", rewards_NK, reward["transform"])
            attributes = {name: rewards_NK[:, k] for k, name in enumerate(names)}
            return {"score": jnp.sum(gate_NK * adjusted_NK, axis=1), **attributes}

        return _scorer(policy, score, pad_id, ("score", *names), GATE)

    table, heads = _armorm_heads([config.hidden_size, *[inner] * hidden, count], dtype)
    return RewardSpec(_with_heads(llama, table), config, heads, scorer)


def _armorm_heads(widths: list[int], dtype: Any) -> tuple[tuple, Params]:
    """Return the table and the shapes of ArmoRM's heads; widths of the gate's MLP, D to K."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    width, *_, count = widths
    table = [
        ("reward/weight", "regression_layer.weight", False),
        ("reward/transform", "reward_transform_matrix", False),
        ("gate/scale", "gating.logit_scale", False),
    ]
    gate: dict[str, Any] = {"scale": leaf(1)}
    for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        table.append((f"gate/{i}/kernel", f"gating.layers.{i}.weight", True))
        table.append((f"gate/{i}/bias", f"gating.layers.{i}.bias", False))
        gate[str(i)] = {"kernel": leaf(inputs, outputs), "bias": leaf(outputs)}
    reward = {"weight": leaf(count, width), "transform": leaf(count, count)}
    return tuple(table), {"reward": reward, "gate": gate}


def _gate_weights(gate: Params, features_ND: Array, temperature: float) -> Array:
    """Return the weights of the attributes `[N, K]`."""
    x, layers = features_ND, len(gate) - 1
    for i in range(layers):
        x = einsum("ni,io->no", x, gate[str(i)]["kernel"]) + gate[str(i)]["bias"][None]
        x = jax.nn.relu(x) if i < layers - 1 else x
    return jax.nn.softmax(x / temperature, axis=1) * gate["scale"][None]
