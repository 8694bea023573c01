"""Kernels of a model on given prompts, for `ntkrl kernel`: no training, no run directory.

`kernel.npz` holds, for O contexts of N prompts, where they end:

    tokens, mask [N, T]    left-padded prompts         texts [N]    the prompts as text
    rows, positions [O]    prompt and column           endings [O]  the context's last token as text

and the arrays of `probe.kernel_steps`: head, cosines, traces, shares, norms and eigenvalues, as
far as they are computed: the file is written anew after every step.
"""

import contextlib
import dataclasses
import functools
import io
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import data, durable_files, models, ntk, probe, report
from ntkrl.evaluation.kernel_run import KernelRun
from ntkrl.setup import check_vocabulary
from ntkrl.types import Params, Policy

KERNEL_DTYPES = ("float32", "float64", "bfloat16")
POSITIONS = ("last", "all")
NUMBERS = {"eigenpairs": int, "max_contexts": int, "limit": int, "memory_gib": float}


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """Arguments of `ntkrl kernel`.

    model: Hugging Face directory with its tokenizer.
    prompts: JSON Lines file (standard or conversational), or a .txt with one prompt per line.
    out: directory for kernel.npz and kernel.png.
    positions: "last" for one context per prompt, "all" for one per token.
    eigenpairs: n ≥ 1, eigenvalues of the body and the full kernel.
    max_contexts: contexts at most, evenly spaced among all.
    dtype: dtype of params and network: float32, float64 or bfloat16; results are float32 or better.
    memory_gib: memory that a call may use beyond the params (GiB).
    limit: prompts at most, the first of the file.
    layers: traces per layer too.
    measures: what to compute, of `probe.MEASURES`; the first, "head", always is.
    """

    model: str
    prompts: str
    out: str = "runs/kernel"
    positions: str = "last"
    eigenpairs: int = 8
    max_contexts: int = 64
    dtype: str = "float32"
    memory_gib: float = 8.0
    limit: int = 16
    layers: bool = False
    measures: tuple[str, ...] = probe.MEASURES

    def __post_init__(self):
        problems = [
            f"--{name} must be at least 1, not {getattr(self, name)}"
            for name in ("eigenpairs", "max_contexts", "limit")
            if getattr(self, name) < 1
        ]
        if not 0 < self.memory_gib < float("inf"):
            problems.append(f"--memory_gib must be a positive number, not {self.memory_gib}")
        for name, allowed in (("positions", POSITIONS), ("dtype", KERNEL_DTYPES)):
            if getattr(self, name) not in allowed:
                known = " or ".join(allowed)
                problems.append(f"--{name} must be {known}, not {getattr(self, name)!r}")
        unknown = [name for name in self.measures if name not in probe.MEASURES]
        if unknown or not self.measures:
            names = ",".join(self.measures)
            problems.append(f"--measures are some of {','.join(probe.MEASURES)}, not {names!r}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


def read_settings(model: str, options: Mapping[str, str]) -> KernelSettings:
    """Parse command-line options.

    Args:
      model: the model directory.
      options: `{name: text}`; "layers" counts by its presence.

    Raises:
      ValueError: no prompts, text where numbers belong, or values out of range.
    """
    values: dict[str, Any] = {**options, "layers": "layers" in options}
    if "measures" in values:
        values["measures"] = tuple(values["measures"].split(","))
    problems = []
    if "prompts" not in values:
        problems.append(
            '--prompts=FILE is missing, {"prompt": "text"} rows or a .txt with one prompt per line'
        )
    for name in NUMBERS.keys() & values.keys():
        try:
            values[name] = NUMBERS[name](values[name])
        except ValueError:
            kind = "a whole number" if NUMBERS[name] is int else "a number"
            problems.append(f"--{name} must be {kind}, not {values[name]!r}")
    if problems:
        raise ValueError("; ".join(sorted(problems)) + ".")
    return KernelSettings(model, **values)


def compute_kernels(settings: KernelSettings) -> dict[str, np.ndarray]:
    """Compute the kernels of a model directory on prompts; write and print them.

    Writes `kernel.npz`, after every step, and `kernel.png` under `settings.out`, and nothing
    elsewhere.

    Args:
      settings: see KernelSettings.

    Returns:
      The arrays of kernel.npz.

    Raises:
      ValueError: a mistake in the settings, or in the files they name.
    """
    out = Path(settings.out)
    durable_files.check_place(out, "--out")
    durable_files.check_replaceable(out / "kernel.npz", _is_kernel, "of an earlier kernel")
    if not (out / "kernel.npz").exists():
        durable_files.check_replaceable(out / "kernel.png", lambda _: False, "of an earlier kernel")
    with _precision(settings):
        problem = _load(settings)
        print(problem.description)
        out.mkdir(parents=True, exist_ok=True)
        keep = functools.partial(durable_files.save_arrays, out / "kernel.npz")
        arrays = _measure(problem, settings, print, keep)
    report.write_kernel(out / "kernel.png", arrays)
    print(f"\n{report.format_kernel(arrays)}\n")
    print(f"arrays: {out / 'kernel.npz'}\nfigure: {out / 'kernel.png'}")
    return arrays


def kernels(
    settings: KernelSettings,
    prompts: data.PromptSet | None = None,
    model: tuple[Policy, Params] | None = None,
) -> dict[str, np.ndarray]:
    """Compute the arrays of kernel.npz, and write nothing.

    Args:
      settings: see KernelSettings; `out` is not read.
      prompts: None to read those of the settings.
      model: as loaded from the directory of the settings; None to load it.

    Raises:
      ValueError: a mistake in the settings, or in the files they name.
    """
    with _precision(settings):
        return _measure(
            _load(settings, prompts, model), settings, lambda text: None, lambda _: None
        )


def _precision(settings: KernelSettings) -> contextlib.AbstractContextManager[Any]:
    is_double = settings.dtype == "float64"
    return jax.enable_x64(True) if is_double else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, eq=False)
class KernelProblem:
    """A model and the contexts of prompts.

    texts: arrays `texts` and `endings` of kernel.npz. description: of the contexts, to print.
    """

    policy: Policy
    params: Params
    contexts: ntk.Contexts
    texts: dict[str, np.ndarray]
    description: str


def _measure(
    problem: KernelProblem,
    settings: KernelSettings,
    log: Callable[[str], None],
    keep: Callable[[dict[str, np.ndarray]], None],
) -> dict[str, np.ndarray]:
    """Return the arrays of kernel.npz; `keep` is called with those known after every step."""
    contexts = problem.contexts
    places = {
        "tokens": contexts.tokens,
        "mask": contexts.mask,
        "rows": contexts.rows,
        "positions": contexts.positions,
    }
    arrays = {name: np.asarray(array) for name, array in places.items()} | problem.texts
    measures = tuple(name for name in probe.MEASURES if name in ("head", *settings.measures))
    plan = functools.partial(
        probe.plan_kernel,
        problem.policy,
        problem.params,
        contexts,
        settings.layers,
        settings.memory_gib,
    )
    steps = probe.kernel_steps(plan(), settings.eigenpairs, measures)
    run = KernelRun(steps, problem.params, log)
    if run.is_long:  # layers are reported as they are finished; such programs are never cached
        run.steps = probe.kernel_steps(plan(report=True), settings.eigenpairs, measures)
    for known in run.results():
        arrays |= known
        keep(arrays)
    return arrays


def _is_kernel(content: bytes) -> bool:
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {"tokens.npy", "rows.npy", "positions.npy"} <= set(file.namelist())


def _load(
    settings: KernelSettings,
    every_prompt: data.PromptSet | None = None,
    model: tuple[Policy, Params] | None = None,
) -> KernelProblem:
    """Return the model, the contexts and their texts; cheapest checks first."""
    rows = models.check(settings.model)
    tokenizer = data.load_tokenizer(models.tokenizer_directory(settings.model))
    check_vocabulary(tokenizer, rows, settings.model)
    if every_prompt is None:
        every_prompt = data.read_prompts(settings.prompts)
    chosen = every_prompt.prompts[: settings.limit]
    prompts = dataclasses.replace(every_prompt, prompts=chosen)
    # the longest prompt allowed is known once the model is loaded
    encoded = data.encode_prompts(tokenizer, prompts, sys.maxsize)
    if model is None:
        model = models.load(settings.model, getattr(jnp, settings.dtype))
    policy, params = model
    lengths = list(map(len, encoded))
    if max(lengths) > policy.max_tokens:
        raise ValueError(
            f"{prompts.place(int(np.argmax(lengths)))}: {max(lengths)} tokens, and the model reads "
            f"at most {policy.max_tokens}; shorten or remove the prompt."
        )
    contexts, total = _contexts(settings, encoded, tokenizer.pad_token_id)
    description = (
        f"prompts: {len(encoded)} of {len(every_prompt.prompts)} (--limit={settings.limit})\n"
        f"contexts: {contexts.count} of {total} (--positions={settings.positions} "
        f"--max_contexts={settings.max_contexts})"
    )
    texts = [
        prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        for prompt, ids in zip(prompts.prompts, encoded, strict=True)
    ]
    ends = np.asarray(contexts.tokens)[contexts.rows, contexts.positions]
    endings = [tokenizer.decode([int(token)]) for token in ends]
    arrays = {"texts": np.array(texts), "endings": np.array(endings)}
    return KernelProblem(policy, params, contexts, arrays, description)


def _contexts(
    settings: KernelSettings, encoded: list[list[int]], pad_id: int
) -> tuple[ntk.Contexts, int]:
    """Pad the prompts; return the chosen contexts and the number of all."""
    batch = data.prompt_batch(encoded, range(len(encoded)), pad_id, max(map(len, encoded)))
    choose = ntk.last_positions if settings.positions == "last" else ntk.every_position
    every = choose(batch.tokens, batch.mask)
    rows = np.arange(len(encoded)) if every.rows is None else np.asarray(every.rows)
    count = min(settings.max_contexts, every.count)
    chosen = np.linspace(0, every.count - 1, count).round().astype(int)
    positions = np.asarray(every.positions)[chosen]
    return ntk.Contexts(batch.tokens, positions, rows[chosen], batch.mask), every.count
