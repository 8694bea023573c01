"""The model that a run starts from: checkpoint or new, tokenizer, and where it is exported."""

import dataclasses
import filecmp
import functools
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import ntkrl
from ntkrl import data, durable_files, models, rollout, runtime, trees, update
from ntkrl.messages import joined
from ntkrl.numerics import DTYPES, at_least_float32, einsum
from ntkrl.scoring import completion_features
from ntkrl.settings import RunSettings
from ntkrl.types import Array, Params, Policy, Scorer, UpdateBatch

MOST_TEXTS, TEXTS_PER_BATCH = 4096, 256
"""Texts that whitening reads at most, and at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class StartingModel:
    """The model that a run starts from.

    network: the trained network; a reward model is a Scorer, whose params hold its head.
    params: on the mesh; shapes with shardings where a run is only planned.
    tokenizer: transformers'. tokenizer_dir: directory whose tokenizer files export copies.
    end_ids: tokens that end a completion.
    mesh: mesh of all devices. rollout_mesh: of the same devices, to sample on.
    base_rows: vocabulary rows of the base that adapters were added to, or None.
    """

    network: Policy | Scorer
    params: Params
    tokenizer: Any
    tokenizer_dir: str
    end_ids: tuple[int, ...]
    mesh: Mesh
    rollout_mesh: Mesh
    base_rows: int | None = None

    @property
    def policy(self) -> Policy:
        """The network of a run that trains a policy."""
        assert isinstance(self.network, Policy)
        return self.network

    @property
    def scorer(self) -> Scorer:
        """The network of a run that trains a reward model."""
        assert isinstance(self.network, Scorer)
        return self.network

    @property
    def sharding(self) -> trees.Patterns:
        """Sharding rules for params and param-like trees."""
        return self.network.sharding

    def export_paths(self, path: Path) -> list[Path]:
        """Return the directories that `export` writes: the model's, and the adapters' if any."""
        return [path, _adapter_path(path)] if self.has_adapters else [path]

    @property
    def has_adapters(self) -> bool:
        """True if the network has low-rank adapters."""
        return isinstance(self.network, Policy) and self.network.config.adapters is not None

    def adapter_obstacle(self, params: Params | None = None) -> str | None:
        """Return why adapters on their base would not be the exported model; None if they are it.

        Args:
          params: to be exported; None for those of the start.
        """
        rows = self.policy.vocab_size
        if self.base_rows not in (None, rows):
            return f"its vocabulary has {rows} rows, that of the base {self.base_rows}"
        changed = [] if params is None else trees.changed(self.params, params)
        moved = [name for name in changed if not models.is_adapter(name)]
        return f"{joined(moved, ', ', most=4)} of the base moved too" if moved else None

    def check_exports(self, *paths: Path) -> None:
        """Check that `export` to these paths would replace nothing but earlier exports.

        Raises:
          ValueError: as `models.check_target`.
        """
        for target in [target for path in paths for target in self.export_paths(path)]:
            models.check_target(target, (self.tokenizer_dir, self.network.source))

    def export(self, path: Path, params: Params | None, training: models.Training) -> None:
        """Write a Hugging Face directory, and one of the adapters beside it if they reproduce it.

        Args:
          path: directory.
          params: to write; None, as of a reference that did not move, for nothing.
          training: facts for the model card.
        """
        if params is None:
            return
        if runtime.is_writer():
            self.check_exports(path)
        if isinstance(self.network, Scorer):
            models.export_scorer(path, self.network, params, self.tokenizer_dir, training)
            return
        models.export(path, self.policy, params, self.tokenizer_dir, training)
        if not self.has_adapters:
            return
        obstacle, adapter = self.adapter_obstacle(params), _adapter_path(path)
        if obstacle is not None:
            runtime.log(f"{path} is complete; {adapter.name}/ is not written: {obstacle}")
            return
        models.export_adapter(adapter, self.policy, params, self.tokenizer_dir, training)


def _adapter_path(path: Path) -> Path:
    """Return the directory of the adapters beside an export."""
    return path.with_name("adapter" if path.name == "export" else f"{path.name}-adapter")


def training_facts(settings: RunSettings, rollout_steps: int) -> models.Training:
    """Return the facts of a run for the card of the model after so many rollout steps."""
    packages = [f"ntkrl {ntkrl.__version__}"]
    packages += [f"{name} {version(name)}" for name in ("jax", "flax", "transformers")]
    facts = {
        "Method": settings.method.name,
        "Data": "the built-in task" if settings.data.path is None else f"`{settings.data.path}`",
        "Stages": ", ".join(stage.name for stage in settings.stages),
        "Rollout steps": rollout_steps,
        "Seed": settings.seed,
        "Versions": ", ".join(packages),
    }
    if settings.method.samples:
        facts["Objective"] = update.describe(settings.objective)
        facts["Rewards"] = ", ".join(f"`{name}`" for name, _ in settings.reward.functions)
    return models.Training(facts, (settings.method.name,))


def load_starting_model(settings: RunSettings, run_dir: Path) -> StartingModel:
    """Load the starting model of a run alone; its prompts and rewards may no longer exist.

    Args:
      settings: from `read_settings`.
      run_dir: where a new model's tokenizer is written.

    Raises:
      ValueError: anything wrong with the model directory.
    """
    mesh = settings.make_mesh()
    tokenizer, source = load_tokenizer(settings, run_dir)
    return load_network(settings, mesh, tokenizer, source)


def load_tokenizer(settings: RunSettings, run_dir: Path) -> tuple[Any, str]:
    """Return the tokenizer with its chat template, and the directory of its files."""
    source, template = settings.model.path, settings.model.template
    if source is None:
        source = str(run_dir / "tokenizer")
        if runtime.is_writer():
            _save_once(Path(source), data.save_tokenizer)
        runtime.allgather_object("the new tokenizer")
    else:
        source = models.tokenizer_directory(source)
    tokenizer = data.load_tokenizer(source)
    if template is not None:
        data.apply_template(tokenizer, data.read_template(template))
        source = str(run_dir / "tokenizer")
        if runtime.is_writer():
            _save_once(Path(source), tokenizer.save_pretrained)
    return tokenizer, source


def _save_once(directory: Path, save: Callable[[Path], object]) -> None:
    """Write the tokenizer of a run, which keeps the files it has.

    Raises:
      ValueError: other files are there, and no run.
    """
    if directory.exists() and (directory.parent / "config.json").exists():
        return  # a resumed run, whose config is compared later
    with durable_files.replacing_directory(directory) as fresh:
        save(fresh)
        if directory.exists() and any(directory.iterdir()):
            names = sorted({path.name for place in (directory, fresh) for path in place.iterdir()})
            _, differing, missing = filecmp.cmpfiles(directory, fresh, names, shallow=False)
            if differing or missing:
                raise ValueError(
                    f"{directory.parent} has no config.json, so its {directory.name}/ "
                    f"({', '.join(differing + missing)}) may not be this program's and would be "
                    "replaced; move them, or set another --config.run_dir."
                )


def check_vocabulary(tokenizer: Any, rows: int, source: str) -> None:
    """Refuse a tokenizer with tokens the model does not have.

    Raises:
      ValueError: it has more entries than the model's vocabulary has rows.
    """
    needed = data.needed_rows(tokenizer)
    if needed > rows:
        raise ValueError(
            f"the tokenizer of {source} has {needed} entries, the model's vocabulary {rows}; use "
            "the tokenizer the model was trained with, or set "
            f"model.vocab_size={needed} to add rows."
        )


def vocabulary_rows(settings: RunSettings, tokenizer: Any, stored: int) -> int:
    """Return the rows of the vocabulary: the config's, those a template needs, or the stored."""
    if settings.model.vocab_size is not None:
        return settings.model.vocab_size
    return stored if settings.model.template is None else max(stored, data.needed_rows(tokenizer))


def load_network(
    settings: RunSettings, mesh: Mesh, tokenizer: Any, tokenizer_dir: str
) -> StartingModel:
    """Load or initialise the network on the mesh, with the changes that the config asks for.

    Raises:
      ValueError: anything wrong with the model directory, or a tokenizer that does not fit.
    """
    if settings.method.reward_model:
        scorer, params = _load_scorer(settings, tokenizer, mesh)
        return StartingModel(scorer, params, tokenizer, tokenizer_dir, (), mesh, mesh)
    policy, params = _load_policy(settings, tokenizer, mesh)
    base_rows = None if policy.source is None else policy.vocab_size
    rows = vocabulary_rows(settings, tokenizer, policy.vocab_size)
    if rows != policy.vocab_size:
        policy, params = models.resized(policy, params, rows, mesh)
    check_vocabulary(tokenizer, rows, tokenizer_dir)
    if settings.model.whiten is not None:
        policy, params = _whiten(settings, settings.model.whiten, policy, params, tokenizer, mesh)
    generation_ids = () if policy.source is None else models.generation_end_ids(policy.source)
    end_ids = data.end_ids(tokenizer, generation_ids, settings.rollout.stop)
    sampling_mesh = choose_rollout_mesh(settings, policy, params, mesh)
    return StartingModel(
        policy, params, tokenizer, tokenizer_dir, end_ids, mesh, sampling_mesh, base_rows
    )


def choose_rollout_mesh(settings: RunSettings, policy: Policy, params: Params, mesh: Mesh) -> Mesh:
    """Return the mesh that completions are sampled on.

    Args:
      settings: with the parts, if they are set.
      policy, params: of the model; the params may be shapes.
      mesh: of the params.

    Raises:
      ValueError: parts that do not divide the devices, the heads or the rows of a rollout.
    """
    work = decoding_work(settings, policy, params)
    return rollout.make_rollout_mesh(settings.rollout.mesh, mesh, work)


def decoding_work(settings: RunSettings, policy: Policy, params: Params) -> rollout.DecodingWork:
    """Return the work of a rollout step that the rollout mesh divides."""
    config, compute = policy.config, settings.model.compute_dtype
    sizes = [
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype if compute is None else compute).itemsize
        for leaf in jax.tree.leaves(params)
    ]
    return rollout.DecodingWork(
        heads=math.gcd(config.num_attention_heads, config.num_key_value_heads),
        layers=config.num_hidden_layers,
        weight_bytes=sum(sizes),
        rows=settings.data.prompts_per_step * settings.rollout.completions_per_prompt,
    )


def _load_scorer(settings: RunSettings, tokenizer: Any, mesh: Mesh) -> tuple[Scorer, Params]:
    model = settings.model
    unused = [name for name in ("untie", "vocab_size", "whiten") if getattr(model, name)]
    unused += ["remat"] if model.remat != "products" else []
    unused += ["lora"] if model.lora["rank"] else []
    if unused:
        raise ValueError(
            f"reward models are trained without {', '.join(f'model.{name}' for name in unused)}."
        )
    assert model.path is not None  # `read_settings` refuses a reward model without a path
    new_head = models.NewHead(tokenizer.pad_token_id, settings.seed)
    return models.load_scorer(model.path, DTYPES[model.dtype], mesh, _compute(settings), new_head)


def _load_policy(settings: RunSettings, tokenizer: Any, mesh: Mesh) -> tuple[Policy, Params]:
    model, dtype, compute = settings.model, DTYPES[settings.model.dtype], _compute(settings)
    if model.path is not None:
        lora = models.Lora(**model.lora, seed=settings.seed) if model.lora["rank"] else None
        options = models.ModelOptions(compute, model.remat, model.untie, lora)
        return models.load(model.path, dtype, mesh, options)
    config = {
        **model.new,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    key = jax.random.key(settings.seed)
    options = models.ModelOptions(compute, model.remat)
    return models.build(model.architecture, config, key, dtype, mesh, options)


def _compute(settings: RunSettings) -> Any:
    name = settings.model.compute_dtype
    return None if name is None else DTYPES[name]


def _whiten(
    settings: RunSettings, path: str, policy: Policy, params: Params, tokenizer: Any, mesh: Mesh
) -> tuple[Policy, Params]:
    """Make features diverse on the texts of the file that `model.whiten` names.

    Raises:
      ValueError: the file is wrong, or what `models.whitened` raises.
    """
    texts = data.read_set(path, ("prompt", "completion"))
    texts = data.take(texts, np.arange(min(MOST_TEXTS, len(texts.prompts))))
    prompts = data.encode_prompts(tokenizer, texts, settings.data.max_prompt_tokens)
    # a sampled text may fill the budget, and its end token comes on top
    budget = settings.rollout.max_completion_tokens + 1
    completions = data.encode_completions(tokenizer, texts, budget)
    widths = max(map(len, prompts)), max(map(len, completions))
    sums, count = (jnp.float32(0), jnp.float32(0)), 0
    for start in range(0, len(prompts), TEXTS_PER_BATCH):
        rows = np.arange(start, min(start + TEXTS_PER_BATCH, len(prompts)))
        filled = np.resize(rows, TEXTS_PER_BATCH)
        batch = data.supervised_batch(prompts, completions, filled, tokenizer.pad_token_id, *widths)
        counted_BC = batch.completion_mask & (np.arange(len(filled)) < len(rows))[:, None]
        sums = jax.tree.map(jnp.add, sums, _feature_sums(policy, params, batch, counted_BC))
        count += int(jnp.sum(counted_BC))
    moments, mean = (total / count for total in sums)
    only_mean = settings.model.whiten_directions == "mean"
    policy, params = models.whitened(policy, params, moments, mean if only_mean else None)
    return policy, jax.device_put(params, trees.shardings(params, policy.sharding, mesh))


@functools.partial(jax.jit, static_argnames=("policy",))
def _feature_sums(
    policy: Policy, params: Params, batch: UpdateBatch, counted: Array
) -> tuple[Array, Array]:
    """Return the sums of φ φᵀ `[D, D]` and of φ `[D]` over counted tokens."""
    length = batch.completion_mask.shape[1]
    phi_BCD = completion_features(policy, params, batch.tokens, batch.mask, length)
    counted_BCD = at_least_float32(phi_BCD) * counted[..., None]
    return einsum("bcd,bce->de", counted_BCD, counted_BCD), jnp.sum(counted_BCD, axis=(0, 1))
