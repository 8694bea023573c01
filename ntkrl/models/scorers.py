"""Reward models: a trunk of some family with a head that scores whole texts.

Read are transformers' sequence-classification directories and ArmoRM (see armorm.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models import armorm, files, hub
from ntkrl.models.armorm import Described
from ntkrl.models.assemble import assemble, init_params
from ntkrl.models.families import FAMILIES, SCORERS, named
from ntkrl.models.family import Family, Running
from ntkrl.models.placing import placements, read_params
from ntkrl.models.reading import ConfigReader
from ntkrl.numerics import einsum
from ntkrl.types import Array, Params, Policy, Scorer

SCORE = (("score/weight", "score.weight", False),)


def load_scorer(
    path: str | Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    compute_dtype: Any = None,
    new: New | None = None,
) -> tuple[Scorer, Params]:
    """Load a reward model: a sequence-classification directory of a known family, or ArmoRM.

    Args:
      path: directory with config.json and safetensors, or a name on the Hugging Face hub.
      dtype: dtype the trunk is kept in; heads are float32 or better.
      mesh: shard the params over it, or None for one device.
      compute_dtype: dtype the trunk runs in; None for `dtype`.
      new: put a new head on the trunk of a language model; None where one is stored.

    Returns:
      `(scorer, params)`: pure functions, and a nested dict of arrays.

    Raises:
      ValueError: anything missing, misshapen or unknown, more than one label, or no pad token.
    """
    directory = hub.local_directory(path)
    raw = files.read_config(directory)
    name = named(raw)
    if new is not None and name in FAMILIES:
        raw = {**raw, "num_labels": 1, "id2label": {"0": "LABEL_0"}, "pad_token_id": new.pad_id}
        name = FAMILIES[name].scorer
    else:
        new = None
    found = _described({**raw, "architectures": [name]}, dtype, mesh, compute_dtype, directory)
    scorer, shapes, family, parsed = found
    leaves = trees.named_leaves(shapes)
    if new is None:
        found = read_params(directory, family, leaves, mesh)
    else:
        stored = {leaf: shape for leaf, shape in leaves.items() if leaf != SCORE[0][0]}
        found = read_params(directory, FAMILIES[parsed.architecture], stored, mesh, tied=True)
        found[SCORE[0][0]] = _start(leaves[SCORE[0][0]], parsed, new, family, mesh)
    ordered = [found[leaf] for leaf in leaves]
    return scorer, jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def describe_scorer(
    raw: dict[str, Any],
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    compute_dtype: Any = None,
    source: str | Path = "config.json",
) -> tuple[Scorer, Params]:
    """Return what `load_scorer` would, with shapes (jax.ShapeDtypeStruct) in place of arrays.

    Args:
      raw: config.json entries.
      dtype, mesh, compute_dtype: as in `load_scorer`.
      source: where they are from, for messages.

    Raises:
      ValueError: an unknown architecture or impossible entries.
    """
    return _described(raw, dtype, mesh, compute_dtype, source)[:2]


def _described(
    raw: dict[str, Any], dtype: Any, mesh: Mesh | None, compute_dtype: Any, source: str | Path
) -> tuple[Scorer, Params, Family, Any]:
    """Return the Scorer, the shapes of its params, and family and config of its trunk."""
    name, known = named(raw), (*SCORERS, armorm.ARCHITECTURE)
    if name not in known:
        raise ValueError(
            f"{source}: architecture {name!r} is no reward model known here; known are "
            f"{', '.join(sorted(known))}."
        )
    wide = jnp.promote_types(dtype, jnp.float32)
    if name == armorm.ARCHITECTURE:
        family, parsed, heads, make = armorm.described(raw, FAMILIES["LlamaForCausalLM"], wide)
    else:
        family, parsed, heads, make = _classifier(raw, SCORERS[name], wide)
    headless = dataclasses.replace(parsed, tie_word_embeddings=True)
    running = Running(mesh=mesh)
    policy, trunk = assemble(family, headless, dtype, compute_dtype, running, str(source))
    return make(policy), {**trunk, **heads}, family, parsed


def check_scorer(path: str | Path) -> int:
    """Return V of a classifier or of a trunk for one; raise what is wrong with its config.json.

    Raises:
      ValueError: no directory, no or bad config.json, unknown architecture, missing files.
    """
    directory = hub.local_directory(path)
    raw = files.read_config(directory)
    name, known = named(raw), {**FAMILIES, **SCORERS}
    if name not in known:
        raise ValueError(
            f"{directory}: a reward model cannot be made of architecture {name!r}; known are "
            f"{', '.join(sorted(known))}."
        )
    files.tensor_files(directory)
    return known[name].parse(raw).vocab_size


@dataclasses.dataclass(frozen=True)
class New:
    """A new head: pad_id: the pad token; seed: of its normal weights."""

    pad_id: int
    seed: int = 0


def export_scorer(path: str | Path, scorer: Scorer, params: Params, source: str | None) -> None:
    """Write a reward model as a sequence-classification directory that transformers loads.

    Args:
      path: directory; written beside and renamed when whole.
      scorer, params: as returned by `load_scorer` (of a classifier, not of ArmoRM).
      source: directory whose tokenizer files travel along; None for none.
    """
    family = FAMILIES[scorer.config.architecture]
    table = (*family.weights[:-1], *SCORE)
    tensors = files.stored_tensors(table, trees.named_leaves(params))
    raw = {
        **family.unparse(scorer.config),
        "architectures": [family.scorer],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": scorer.pad_id,
        "dtype": str(jax.tree.leaves(params)[0].dtype),
    }
    raw["tie_word_embeddings"] = False
    raw.pop("torch_dtype", None)
    files.write_model(Path(path), raw, tensors, source)


def write_new_scorer(path: str | Path, raw: dict[str, Any], key: Array, source: str | Path) -> None:
    """Write a reward model of any known kind with random weights, to try a pipeline out on.

    Args:
      path: directory, as in `export_scorer`.
      raw: config.json entries.
      key: consumed.
      source: directory whose tokenizer files travel along.

    Raises:
      ValueError: what `describe_scorer` raises.
    """
    _, shapes, family, parsed = _described(raw, jnp.float32, None, None, path)
    headless = dataclasses.replace(parsed, tie_word_embeddings=True)
    keys = jax.random.split(key)
    params = init_params(family, headless, keys[0], jnp.float32)
    heads = {name: leaves for name, leaves in shapes.items() if name not in params}
    leaves = trees.named_leaves(params)
    for number, (name, leaf) in enumerate(trees.named_leaves(heads).items()):
        draw = jax.random.normal(jax.random.fold_in(keys[1], number), leaf.shape, leaf.dtype)
        leaves[name] = parsed.initializer_range * draw
    files.write_model(Path(path), raw, files.stored_tensors(family.weights, leaves), str(source))


def _start(leaf: Any, config: Any, new: New, family: Family, mesh: Mesh | None) -> Array:
    draw = jax.random.normal(jax.random.key(new.seed), leaf.shape, leaf.dtype)
    where = placements(family, {SCORE[0][0]: leaf}, mesh)[SCORE[0][0]]
    return jax.device_put(config.initializer_range * draw, where)


def _classifier(raw: dict[str, Any], family: Family, dtype: Any) -> Described:
    """Describe a trunk with one row of weights on its last token."""
    parsed = family.parse(raw)
    reader = ConfigReader(raw)
    labels = _labels(reader)
    pad_id = reader.token("pad_token_id")
    if labels != 1:
        reader.problems.append(
            f"it has {labels} labels; a reward model has one (num_labels=1 when it was trained)"
        )
    reader.finish(f"{family.label} reward")
    score = jax.ShapeDtypeStruct((1, parsed.hidden_size), dtype)
    held = dataclasses.replace(family, weights=(*family.weights[:-1], *SCORE))
    return held, parsed, {"score": {"weight": score}}, lambda policy: _last(policy, pad_id)


def _labels(reader: ConfigReader) -> int:
    named = reader.section("id2label")
    return reader.integer("num_labels", 2 if named is None else len(named))


def _last(policy: Policy, pad_id: int) -> Scorer:
    """Return the Scorer that reads the last token that is no padding."""

    def score(params: Params, tokens: Array, mask: Array, gates: Array) -> dict[str, Array]:
        trunk = {name: leaves for name, leaves in params.items() if name != "score"}
        phi_NTD = policy.features(trunk, tokens, mask)
        # as transformers does: the rightmost token other than the pad token, eos or not
        columns = jnp.arange(tokens.shape[1])[None]
        last_N = jnp.max(jnp.where(tokens != pad_id, columns, 0), axis=1)
        phi_ND = phi_NTD[jnp.arange(tokens.shape[0]), last_N]
        weight_KD = params["score"]["weight"]
        return {"score": einsum("nd,kd->nk", phi_ND.astype(weight_KD.dtype), weight_KD)[:, 0]}

    return Scorer(
        score=score,
        names=("score",),
        pad_id=pad_id,
        gate=(),
        max_tokens=policy.max_tokens,
        vocab_size=policy.vocab_size,
        sharding=policy.sharding,
        config=policy.config,
        source=policy.source,
        stacked=policy.stacked,
    )
