"""The compiled program of the step ledger: from the terms' gradients to their contributions.

Gradients of samples are computed `chunk` at a time, mapped to changes of the params by the
linearized update of the step, and mapped to the probe tokens by one of the two algorithms of
ntkrl.attribution.linear_maps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ntkrl import ntk, trees
from ntkrl.attribution import linear_maps, optimizer_maps
from ntkrl.attribution.linear_maps import ParameterGroups, TokenCotangents
from ntkrl.numerics import at_least_float32, scan_microbatches, split_rows
from ntkrl.probe import GradientNoise, noise_from_squares
from ntkrl.types import Array, Params, Policy, Total, TrainState
from ntkrl.update import Gradients

Terms = Callable[[Params, Any, Any], tuple[dict[str, Total], Any]]
COLUMNS = ("momentum", "decay", "optimizer")


@dataclasses.dataclass(frozen=True)
class AttributionSpec:
    """The static part of an attribution.

    policy, terms, optimizer, trained, microbatches, mesh: as in Ledger.
    groups: of the trained leaves.
    names: of the terms.
    by: "group" or "sample".
    algorithm: "jvp" or "vjp".
    chunk: samples at a time.
    block: probe sequences whose gradients are written out at a time.
    columns: changes other than the samples' whose contributions are computed at a time.
    """

    policy: Policy
    terms: Terms
    optimizer: optax.GradientTransformation
    trained: tuple[bool, ...]
    microbatches: int
    mesh: Mesh | None
    groups: ParameterGroups
    names: tuple[str, ...]
    by: str
    algorithm: str = "jvp"
    chunk: int = 1
    block: int = 1
    columns: int = 1


class OptimizerStep(NamedTuple):
    """An optimizer step to attribute.

    before: params and optimizer state that the step began with.
    after: params that it ended with.
    batch: its batch, arrays with B rows in front.
    reference: the Head that the loss compares with, passed to the terms; or None.
    gradients: by term the gradient of its mean and its count, where the step returned them
        (`update.make_step_with_term_gradients`); None to compute them again.
    """

    before: TrainState
    after: Params
    batch: Any
    reference: Any = None
    gradients: Gradients | None = None


class AttributionInputs(NamedTuple):
    """The arrays of an attribution.

    step: the optimizer step.
    contexts, targets: the O probe tokens. sequences: the contexts by sequence.
    actual: as in `Ledger.read`.
    """

    step: OptimizerStep
    contexts: ntk.Contexts
    sequences: ntk.GroupedContexts
    targets: Array
    actual: Array | None


class AttributionResult(NamedTuple):
    """Contributions to each of MEASURES, the head before the groups.

    actual: `[2, O]` measured change.
    columns: `[1 + G, 2, O, K]` of COLUMNS, after the terms where they are by group.
    samples: `[1 + G, 2, O, T, B]`, or None by group.
    noise: of the samples' gradients, or None by group.
    """

    actual: Array
    columns: Array
    samples: Array | None
    noise: GradientNoise | None


@functools.partial(jax.jit, static_argnames=("spec",))
def attribute(spec: AttributionSpec, inputs: AttributionInputs) -> AttributionResult:
    """Attribute the change that an optimizer step made at the probe tokens."""
    linear, after = _LinearizedStep(spec, inputs), inputs.step.after
    update, network = linear.update, linear.network
    trained_after, _ = trees.partition(after, spec.trained)
    terms_T = jax.vmap(update.from_gradient)(linear.gradients_T)
    remainder = jax.tree.map(
        lambda new, old, terms, *others: new - old - jnp.sum(terms, axis=0) - sum(others),
        *(trained_after, linear.trained, terms_T, update.momentum, update.decay),
    )
    changes_K = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), update.momentum, update.decay, remainder
    )
    if spec.by == "group":
        changes_K = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), terms_T, changes_K)

    def column(change: Params) -> Array:
        return linear.contributions(jax.tree.map(lambda leaf: leaf[None], change))[..., 0]

    # batched: four times as fast as sequential on a CPU
    columns_KGAO = jax.lax.map(column, changes_K, batch_size=spec.columns)
    actual = inputs.actual
    if actual is None:
        phi_OD = ntk.features_at(network, after, inputs.contexts)
        measured = linear_maps.token_cotangents(network, after, phi_OD, inputs.targets)
        actual = measured.values - linear.cotangents.values
    samples, noise = None, None
    if spec.by == "sample":
        samples, squares_B = linear.by_jvp() if spec.algorithm == "jvp" else linear.by_vjp()
        rows = squares_B.shape[0]  # the mean of B g_i is the gradient
        total = _squared_norm(jax.tree.map(_sum_terms, linear.gradients_T))
        noise = noise_from_squares(rows**2 * squares_B, total)
    result = AttributionResult(actual, jnp.moveaxis(columns_KGAO, 0, -1), samples, noise)
    return jax.tree.map(lambda leaf: trees.replicate(leaf, spec.mesh), result)


def term_gradients(spec: AttributionSpec, step: OptimizerStep, rows: Any) -> tuple[Params, Array]:
    """Return gradients of the terms' sums over rows of the batch, and their counts, T in front."""
    trained, frozen = trees.partition(step.before.params, spec.trained)

    def totals(trained: Params) -> tuple[Array, Array]:
        terms, _ = spec.terms(trees.merge(trained, frozen), rows, step.reference)
        sums, counts = zip(*(terms[name] for name in spec.names), strict=True)
        return jnp.stack(sums), jnp.stack(counts)

    sums_T, vjp_fn, counts_T = jax.vjp(totals, trained, has_aux=True)
    return jax.vmap(vjp_fn)(jnp.eye(len(spec.names), dtype=sums_T.dtype))[0], counts_T


class _LinearizedStep:
    """The linear maps of a step, traced once and shared by the algorithms."""

    def __init__(self, spec: AttributionSpec, inputs: AttributionInputs):
        self.spec, self.inputs = spec, inputs
        self.network = ntk.as_network(spec.policy)
        before = inputs.step.before
        self.trained, self.frozen = trees.partition(before.params, spec.trained)
        self.gradients_T, self.counts_T = self._batch_gradients()
        self.update = optimizer_maps.linearize_update(
            spec.optimizer,
            jax.tree.map(_sum_terms, self.gradients_T),
            before.opt_state,
            self.trained,
        )
        phi_OD, self.features_jvp = linear_maps.linearize_features(
            self.network, self.trained, self.frozen, inputs.contexts
        )
        self.cotangents = linear_maps.token_cotangents(
            self.network, before.params, phi_OD, inputs.targets
        )

    def _batch_gradients(self) -> tuple[Params, Array]:
        """Return the gradients of the terms' means, T in front, and their divisors."""
        spec, step = self.spec, self.inputs.step
        if step.gradients is not None:
            grads, counts = zip(*(step.gradients[name] for name in spec.names), strict=True)
            grads_T = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
            return grads_T, jnp.maximum(jnp.stack(counts), 1)
        (sums_T, counts_T), _ = scan_microbatches(
            lambda rows: (term_gradients(spec, step, rows), None),
            split_rows(step.batch, spec.microbatches),
            lambda left, right: jax.tree.map(jnp.add, left, right),
        )
        counts_T = jnp.maximum(counts_T, 1)
        return _divide(sums_T, counts_T), counts_T

    def contributions(self, changes: Params) -> Array:
        """Return `[1 + G, 2, O, K]` of K changes of the trained leaves, by JVPs."""
        head = linear_maps.head_contributions(self.network, self.cotangents, changes)
        body = linear_maps.body_contributions(
            self.spec.groups, self.features_jvp, self.cotangents, changes
        )
        return jnp.concatenate([head[None], body])

    def sample_changes(self, row: Any) -> tuple[Params, Array]:
        """Return the changes by the terms of one sample, T in front, and its gradient's ‖g‖²."""
        batch = jax.tree.map(lambda leaf: leaf[None], row)
        grads_T = _divide(term_gradients(self.spec, self.inputs.step, batch)[0], self.counts_T)
        square = _squared_norm(jax.tree.map(_sum_terms, grads_T))
        return jax.vmap(self.update.from_gradient)(grads_T), square

    def by_jvp(self) -> tuple[Array, Array]:
        """Return the samples' contributions `[1 + G, 2, O, T, B]`, and `[B]` ‖g‖²."""

        def sample(row: Any) -> tuple[Array, Array]:
            changes_T, square = self.sample_changes(row)
            return self.contributions(changes_T), square

        samples_B, squares_B = jax.lax.map(
            sample, self.inputs.step.batch, batch_size=self.spec.chunk
        )
        return jnp.moveaxis(samples_B, 0, -1), squares_B

    def by_vjp(self) -> tuple[Array, Array]:
        """Return what `by_jvp` does, by inner products with the probe tokens' gradients."""
        slots_O = self.inputs.sequences.slots
        blocks = self._blocks()
        if self.spec.block >= len(self.inputs.sequences.positions):
            # one block: its tokens alone, without the padded slots of shorter sequences
            block = jax.tree.map(lambda leaf: leaf[0], blocks)
            samples_BGAOT, squares_B = self._by_block(block[0], block[1], slots_O)
            return jnp.transpose(samples_BGAOT, (1, 2, 3, 4, 0)), squares_B
        samples_NBGAOT, squares_NB = jax.lax.map(
            lambda block: self._by_block(block[0], block[1]), blocks
        )
        n, rows, groups, measures, tokens, terms = samples_NBGAOT.shape
        samples = jnp.transpose(samples_NBGAOT, (2, 3, 0, 4, 5, 1))
        samples = samples.reshape(groups, measures, n * tokens, terms, rows)
        return samples[:, :, slots_O], squares_NB[0]

    def _blocks(self) -> tuple[tuple[Array, Array, Array], TokenCotangents]:
        """Return blocks of probe sequences (tokens, mask, positions), and of their cotangents."""
        sequences, size = self.inputs.sequences, self.spec.block
        count, width = sequences.positions.shape
        blocks = -(-count // size)

        def split(leaf: Array) -> Array:
            # the last sequence is repeated, with cotangents of zero
            padding = [(0, blocks * size - count)] + [(0, 0)] * (leaf.ndim - 1)
            return jnp.pad(leaf, padding, mode="edge").reshape(blocks, size, *leaf.shape[1:])

        def scatter(values_O: Array) -> Array:
            zeros = jnp.zeros((blocks * size * width, *values_O.shape[1:]), values_O.dtype)
            filled = zeros.at[sequences.slots].set(values_O)
            return filled.reshape(blocks, size * width, *values_O.shape[1:])

        values, features, head, body = self.cotangents
        head, body = (
            jnp.moveaxis(scatter(jnp.moveaxis(leaf, 1, 0)), 2, 1) for leaf in (head, body)
        )
        cotangents = TokenCotangents(scatter(values.T), scatter(features), head, body)
        return (
            split(sequences.tokens),
            split(sequences.mask),
            split(sequences.positions),
        ), cotangents

    def _by_block(
        self,
        sequences: tuple[Array, Array, Array],
        cotangents: TokenCotangents,
        slots_O: Array | None = None,
    ) -> tuple[Array, Array]:
        """Return `[B, 1 + G, 2, slots, T]` of a block of probe sequences, and `[B]` ‖g‖².

        Where `slots_O` is given, of these slots alone and with the cotangents of all tokens.
        """
        spec, shape = self.spec, sequences[2].shape
        cotangents_SPAD = jnp.moveaxis(cotangents.body, 0, 1).reshape(
            *shape, *cotangents.body.shape[::2]
        )
        gradients = linear_maps.probe_gradients(
            *(self.network, spec.groups, self.trained, self.frozen),
            (*sequences, cotangents_SPAD),
        )
        if slots_O is not None:
            cotangents = self.cotangents
            gradients = [
                leaf.reshape(-1, 2, *leaf.shape[1:])[slots_O].reshape(-1, *leaf.shape[1:])
                for leaf in gradients
            ]

        def sample(row: Any) -> tuple[Array, Array]:
            changes_T, square = self.sample_changes(row)
            head_AOT = linear_maps.head_contributions(self.network, cotangents, changes_T)
            body_GRT = linear_maps.contract_gradients(spec.groups, gradients, changes_T)
            body_GOAT = body_GRT.reshape(len(body_GRT), -1, *head_AOT.shape[::2])
            return jnp.concatenate([head_AOT[None], jnp.moveaxis(body_GOAT, 2, 1)]), square

        return jax.lax.map(sample, self.inputs.step.batch, batch_size=spec.chunk)


def _sum_terms(leaf: Array) -> Array:
    return jnp.sum(leaf, axis=0)


def _squared_norm(tree: Params) -> Array:
    squares = jax.tree.map(lambda leaf: jnp.sum(jnp.square(at_least_float32(leaf))), tree)
    return jax.tree.reduce(jnp.add, squares)


def _divide(grads: Params, counts: Array) -> Params:
    return jax.tree.map(
        lambda leaf: (leaf / counts.reshape(-1, *(1,) * (leaf.ndim - 1))).astype(leaf.dtype), grads
    )
