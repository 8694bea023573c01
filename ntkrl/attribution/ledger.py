"""The step ledger: what each sample, momentum and decay did to the probe tokens in one real step.

The change θ → θ' of an optimizer step is, with every factor of the optimizer held at what it really
was (see ntkrl.attribution.held), a sum over training samples, terms of the loss, momentum, weight
decay and what is left of the optimizer. Pushed to the probe tokens,

    Δ log π(o) = Σ_i Σ_terms + momentum + decay + optimizer + curvature

where all but the curvature are first order, and the curvature is what was measured less their sum.
The change of entropy, ΔH = −Cov_{a∼π}(log π(a), Δz(a)) to first order, splits in the same way. Each
column is split by group of parameters: "head", the head's role, and groups in the features' role
(a tied matrix counts in both, as in `ntk.predict`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ntkrl import ntk, trees
from ntkrl.attribution import accounts
from ntkrl.attribution.accounts import COLUMNS, Found, Given, Gradients, Terms, Way
from ntkrl.attribution.contributions import MEASURES, members_of
from ntkrl.attribution.costs import FORMS, Estimate, choose, estimates
from ntkrl.ntk import BODY_GROUP, as_network, check_contexts, group_by_sequence
from ntkrl.probe.settings import LEDGER_BY as BY
from ntkrl.probe.signal import GradientNoise
from ntkrl.types import Array, Params, Policy, TrainState


class Account(NamedTuple):
    """What a ledger says of a step.

    arrays: by name, see `Ledger.read`.
    noise: of the samples' gradients as they are before clipping; None by group.
    """

    arrays: dict[str, np.ndarray]
    noise: GradientNoise | None


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A step ledger bound to a stage.

    policy: the network's functions.
    terms: `(params, rows of a batch, beside) -> ({name: Total}, measures)`, the terms of the loss
        that the step minimised, each divided by its own count; they add up over rows. Measures
        are not read. Keep one function object: compiled programs are found by it.
    optimizer: transformation of the trained leaves' gradients.
    trained: one bool per leaf of the params, in leaf order.
    groups: `(pattern, name)` tuples over the parameters in the features' role, as in `ntk.kernel`.
    by: "group" for the samples of a batch together, "sample" for each of them.
    form: of the samples' contributions: "push", one JVP over the probe set for each, "gram", inner
        products with the gradients of all probe tokens, or "auto" for the one that should take
        least time in what `memory_gib` allows.
    memory_gib: what the samples' contributions may use beyond params and state (GiB).
    microbatches: equal parts of the rows that the whole gradient is read in.
    mesh: over which params and batch are spread, or None.
    """

    policy: Policy
    terms: Terms
    optimizer: optax.GradientTransformation
    trained: tuple[bool, ...]
    groups: trees.Patterns = BODY_GROUP
    by: str = "sample"
    form: str = "auto"
    memory_gib: float = 2.0
    microbatches: int = 1
    mesh: Mesh | None = None

    def __post_init__(self):
        problems = []
        if self.by not in BY:
            problems.append(f"by must be one of {', '.join(BY)}, not {self.by!r}")
        if self.form not in (*FORMS, "auto"):
            problems.append(f"form must be one of {', '.join(FORMS)}, auto, not {self.form!r}")
        if not self.memory_gib > 0:
            problems.append(f"memory_gib must be > 0, not {self.memory_gib}")
        if problems:
            raise ValueError("ledger: " + "; ".join(problems) + ".")

    def check(self, params: Params) -> None:
        """Check that the groups fit the params, as `read` does.

        Raises:
          ValueError: they do not.
        """
        members_of(self.groups, self.policy, params, self.trained)

    def read(
        self,
        before: TrainState,
        after: Params,
        batch: Any,
        contexts: ntk.Contexts,
        targets: Array,
        beside: Any = None,
        gradients: Gradients | None = None,
        actual: Array | None = None,
    ) -> Account:
        """Account for one step.

        Args:
          before: params and optimizer state that the step began with.
          after: params it ended with.
          batch: what it saw, arrays with B rows in front.
          contexts: O probe contexts.
          targets: `[O]` the probe tokens.
          beside: what the terms are given beside rows (the Head compared with, or None).
          gradients: by term the gradient of its mean and its count, where the step handed them
            out (`update.make_step_with_term_gradients`); None to make them again.
          actual: `[2, O]` measured change of log π and entropy, where it is known; None to read
            the probe tokens after the step.

        Returns:
          Account. Its arrays are, for "log_prob" and "entropy" (nats): `log_prob/<column>/<group>`,
          with columns the terms (`[O, B]` by sample, else `[O]`), "momentum", "decay" and
          "optimizer" (`[O]`), groups "head" and those given; `log_prob/actual` and
          `log_prob/curvature` (`[O]`). Columns and curvature add up to the actual change.

        Raises:
          ValueError: contexts that do not fit, groups that do not cover the params, a term called
            like a column, rows that `microbatches` does not divide.
        """
        given = self._given(before, batch, contexts, targets, beside)
        way = _way(self, *_shapes(given))
        given = given._replace(gradients=gradients, actual=actual)
        found = jax.device_get(accounts.read(way, given, after))
        return Account(_named(way, found), found.noise)

    def estimates(
        self,
        before: TrainState,
        batch: Any,
        contexts: ntk.Contexts,
        targets: Array,
        beside: Any = None,
    ) -> dict[str, Estimate]:
        """Return what each form of the samples' contributions costs; arguments as for `read`."""
        shapes = _shapes(self._given(before, batch, contexts, targets, beside))
        given = jax.tree.unflatten(shapes[0], shapes[1:])
        return estimates(_way(self, *shapes), given, self.memory_gib)

    def _given(
        self, before: TrainState, batch: Any, contexts: ntk.Contexts, targets: Array, beside: Any
    ) -> Given:
        network = as_network(self.policy)
        seen = check_contexts(contexts, "contexts", network, before.params, is_policy=True)
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % self.microbatches:
            raise ValueError(
                f"ledger: {rows} rows cannot be cut in {self.microbatches} equal parts; choose a "
                "divisor of the rows as microbatches."
            )
        state = before.params, before.opt_state
        return Given(*state, batch, beside, seen, group_by_sequence(seen), targets, None, None)


def _shapes(given: Given) -> tuple[Any, ...]:
    leaves, treedef = jax.tree.flatten(given)
    return treedef, *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)


@functools.lru_cache(maxsize=16)
def _way(ledger: Ledger, treedef: Any, *shapes: Any) -> Way:
    """Return how the ledger of a step of these shapes is made."""
    given = jax.tree.unflatten(treedef, shapes)
    names = tuple(jax.eval_shape(ledger.terms, given.params, given.batch, given.beside)[0])
    taken = sorted({*COLUMNS, "actual", "curvature"} & {*names})
    if taken:
        raise ValueError(f"ledger: terms may not be called {', '.join(taken)}; rename them.")
    way = Way(
        *(ledger.policy, ledger.terms, ledger.optimizer, ledger.trained),
        *(ledger.microbatches, ledger.mesh),
        members=members_of(ledger.groups, ledger.policy, given.params, ledger.trained),
        names=names,
        by=ledger.by,
    )
    found = estimates(way, given, ledger.memory_gib)
    way = way._replace(columns=found["push"].chunk * len(names))
    if ledger.by == "group":
        return way
    best = choose(found, ledger.form, ledger.memory_gib)
    return way._replace(form=best.form, chunk=best.chunk, block=best.block)


def _named(way: Way, found: Found) -> dict[str, np.ndarray]:
    """Lay the arrays out by name."""
    named, terms = {}, () if way.by == "sample" else way.names
    for m, measure in enumerate(MEASURES):
        own = {}
        for g, group in enumerate(("head", *way.members.names)):
            for t, term in enumerate(way.names):
                if found.samples is not None:
                    own[f"{term}/{group}"] = found.samples[g, m, :, t]
            for k, column in enumerate((*terms, *COLUMNS)):
                own[f"{column}/{group}"] = found.columns[g, m, :, k]
        first = sum(_summed(value) for value in own.values())
        own |= {"actual": found.actual[m], "curvature": found.actual[m] - first}
        named |= {f"{measure}/{name}": value for name, value in own.items()}
    return named


def _summed(values: np.ndarray) -> np.ndarray:
    """Sum over samples where there are any."""
    return values if values.ndim == 1 else values.sum(axis=1, dtype=np.float64)


def split_term(
    arrays: dict[str, np.ndarray], term: str, part: str, shares: np.ndarray
) -> dict[str, np.ndarray]:
    """Take a part out of the columns of a term.

    Args:
      arrays: of a ledger by sample.
      term: whose samples' contributions are split.
      part: name of the new term.
      shares: `[B]` of the part in each sample's contribution.
    """
    found = {}
    for name, value in arrays.items():
        measure, column, *group = name.split("/", 2)
        if column == term:
            own = value * shares
            found |= {f"{measure}/{part}/{group[0]}": own, name: value - own}
        else:
            found[name] = value
    return found


def ledger_measures(
    arrays: dict[str, np.ndarray],
    advantages: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> dict[str, float]:
    """Summarise a step's ledger.

    Parts are the terms and other columns, the curvature, "head" and "body" (all groups) of the
    terms, and where asked for, the terms' samples with A > 0 ("positive") and A < 0 ("negative"),
    and of the probe token's own prompt ("self") and other ones ("others").

    Args:
      arrays: from `Ledger.read`.
      advantages: `[B]` of the samples, or None; needs a ledger by sample.
      own: `[O, B]` bool, whether the sample answers the probe token's prompt, or None; likewise.

    Returns:
      `ledger/<part>_share`, ⟨Δ_part, Δ⟩/⟨Δ, Δ⟩ with Δ the actual change of log π: those of
      columns and curvature add up to one. `ledger/<part>_entropy`, mean change of the entropy
      (nats). `ledger/optimizer_size` and `ledger/curvature_size`, ‖Δ_part‖/‖Δ‖. A step that moved
      nothing gives NaN.
    """
    metrics = {}
    for measure in MEASURES:
        prefix = f"{measure}/"
        named = {
            name.removeprefix(prefix): value.astype(np.float64)
            for name, value in arrays.items()
            if name.startswith(prefix)
        }
        actual = named.pop("actual")
        found = _parts(named, advantages, own)
        if measure == "entropy":
            metrics |= {f"ledger/{part}_entropy": float(v.mean()) for part, v in found.items()}
            metrics["ledger/actual_entropy"] = float(actual.mean())
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            for part, value in found.items():
                metrics[f"ledger/{part}_share"] = float(value @ actual / (actual @ actual))
            for part in ("optimizer", "curvature"):
                size = np.linalg.norm(found[part]) / np.linalg.norm(actual)
                metrics[f"ledger/{part}_size"] = float(size)
    return metrics


def _parts(
    named: dict[str, np.ndarray], advantages: np.ndarray | None, own: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return `[O]` per part; columns first, then what the terms are made of."""
    found = {"curvature": named.pop("curvature")}
    samples, roles = 0.0, {"head": 0.0, "body": 0.0}
    for name, value in named.items():
        column, group = name.split("/", 1)
        found[column] = found.setdefault(column, 0.0) + _summed(value)
        if column not in COLUMNS:
            samples = samples + value
            roles["head" if group == "head" else "body"] += _summed(value)
    found |= roles
    if advantages is not None:
        found["positive"] = samples @ (advantages > 0)
        found["negative"] = samples @ (advantages < 0)
    if own is not None:
        found["self"] = np.sum(samples * own, axis=1)
        found["others"] = np.sum(samples * ~own, axis=1)
    return found
