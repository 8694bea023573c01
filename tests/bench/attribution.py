"""Attribution against the truth: `python -m tests.bench.attribution`.

A real run's optimizer step is taken again with random halves of its batch at weight 0 and the
divisors of the full batch, from the same params and optimizer state. Measured are the changes of
log π and of the entropy of every probe token, and of the expected reward of the probe prompts (by
importance weights over their completions). The linear datamodelling score (LDS) of a prediction is
Spearman's correlation over the subsets between the predicted and the measured change of a quantity,
averaged over quantities, with a 95 % bootstrap interval over them.

kept: the advantages of the full batch; recomputed: those of what is left of each group, where the
prediction of a sample is scaled by its new advantage over its old one (0 where the old one is 0).
steps: later steps on the batches of the run, through which the first step's subset is carried.
Predictions:

    ledger          the samples' columns, R + G
    ledger, R       those of the head's role alone
    gradient        ⟨∇sample, ∇quantity⟩; and its cosine
    I-PPO           ⟨∇sample, ∇expected reward⟩, one score for all quantities (2604.01597)
    GradAlign       its cosine (2602.21492)
    unrolled        `attribution.Influence`, with realised and with exact factors of Adam

The quickstart's base model is trained first unless --model names a directory.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import rankdata

import ntkrl
from ntkrl import advantage, attribution, data, intervals, main, ntk, runtime
from ntkrl.attribution import linear_maps
from ntkrl.generate import RewardedRollout, SampleRequest, collect, make_sampler
from ntkrl.types import Params
from tests.bench import measure

CONFIG = "quickstart/rl"
PRESETS = {
    "rloo": {"preset": "rloo"},
    # without the KL in its loss, so that a sample's gradient is linear in its advantage
    "grpo": {"preset": "grpo", "kl_place": "off", "kl_coefficient": 0.0},
}
WARMUP = 10
"""Rollout steps before the one that is attributed."""
PROBES = 8
"""Held-out prompts, and completions of each."""
QUANTITIES = ("log π", "entropy", "reward")


class Recording(NamedTuple):
    """An optimizer step of a run, later ones, and probe completions sampled before it.

    influence: of the stage. chain: the steps. rewards: `[B]` of the first one's samples. group: N.
    probes: the probe completions. contexts, targets, rows: their tokens.
    """

    influence: attribution.Influence
    chain: attribution.Chain
    rewards: np.ndarray
    group: int
    probes: RewardedRollout
    contexts: ntk.Contexts
    targets: Any
    rows: np.ndarray


def record(model: str, preset: str, later: int, run_dir: Path) -> Recording:
    """Run the warm-up, and record the steps after it."""
    config = runtime.read_config([f"--config={CONFIG}"])
    config.run_dir, config.model.path = str(run_dir), model
    config.objective.update(PRESETS[preset])
    config.probe.every_steps = config.probe.ledger_every_steps = None
    config.probe.kernel_every_steps = None
    steps = ntkrl.Steps(config=config)
    setup, at = steps.functions.setup, steps.start()
    batches: list[Any] = []
    while len(batches) <= later:
        at = steps.begin(at)
        rewarded = steps.reward(at, steps.sample(at))
        at, step_data = steps.advantages(at, rewarded)
        for batch in step_data.batches:
            if at.optimizer_steps == WARMUP:
                before, rewards = jax.tree.map(jnp.copy, at.state), rewarded.result.rewards
            if at.optimizer_steps >= WARMUP:
                batches.append(_padded(batch, setup))
            at, _ = steps.update(at, batch, step_data)
        at, _ = steps.end(at, {})
    bound = steps.functions.bound_stages[0]
    terms = steps.functions.source.term_losses
    influence = attribution.Influence(setup.model.policy, terms, bound.optimizer, bound.trained)
    sampler = make_sampler(setup.settings, setup.model, PROBES, 1.0)
    request = SampleRequest(setup.held_out_prompts, np.arange(PROBES))
    probes = collect(setup, sampler, before.params, request, jax.random.key(1))
    chain = attribution.Chain(before, tuple(batches[: later + 1]))
    group = setup.settings.rollout.completions_per_prompt
    return Recording(influence, chain, np.asarray(rewards, float), group, probes, *_tokens(probes))


def _padded(batch: Any, setup: Any) -> Any:
    settings, pad_id = setup.settings, setup.model.tokenizer.pad_token_id
    plain = dataclasses.replace(batch, kl_advantages=None, features=None)
    lengths = settings.data.max_prompt_tokens, settings.rollout.max_completion_tokens
    return jax.tree.map(jnp.asarray, data.widened(plain, *lengths, pad_id))


def _tokens(probes: RewardedRollout) -> tuple[ntk.Contexts, Any, np.ndarray]:
    drawn = probes.rollout
    rows, columns = np.nonzero(np.asarray(drawn.completion_mask))
    columns = columns + drawn.tokens.shape[1] - drawn.completion_mask.shape[1]
    tokens, mask = jnp.asarray(drawn.tokens), jnp.asarray(drawn.mask)
    contexts = ntk.Contexts(tokens, jnp.asarray(columns - 1), jnp.asarray(rows), mask)
    return contexts, tokens[rows, columns], rows


def advantage_weights(recording: Recording, kept_B: np.ndarray, preset: str) -> np.ndarray:
    """Return the advantages of what is left of each group over those of the full batch `[B]`."""
    full_B = np.asarray(recording.chain.batches[0].advantages, float)[:, 0]
    weights_B = np.zeros(len(full_B))
    for start in range(0, len(full_B), recording.group):
        rows = np.arange(start, start + recording.group)
        left = rows[kept_B[rows]]
        if len(left) < 2:
            continue  # nothing to compare with
        if preset == "rloo":  # rewards less the KL, up to a constant of the group
            net = full_B[left] * (recording.group - 1) / recording.group
            fresh = (net - net.mean()) * len(left) / (len(left) - 1)
        else:
            rewards = recording.rewards[left]
            fresh = (rewards - rewards.mean()) / (rewards.std(ddof=1) + advantage.EPSILON)
        moved = full_B[left] != 0
        weights_B[left[moved]] = fresh[moved] / full_B[left[moved]]
    return weights_B


class Quantities:
    """Log-probs and entropies of the probe tokens, and the expected reward of their prompts."""

    def __init__(self, recording: Recording):
        self.recording = recording
        group_PN = np.reshape(recording.probes.result.rewards, (PROBES, -1)).astype(float)
        self.advantages_S = (group_PN - group_PN.mean(axis=1, keepdims=True)).reshape(-1)
        network = ntk.as_network(recording.influence.policy)

        @jax.jit
        def read(params: Params) -> jax.Array:
            phi_OD = ntk.features_at(network, params, recording.contexts)
            return linear_maps.token_cotangents(network, params, phi_OD, recording.targets).values

        self.read = read

    def by_prompt(self, changes_O: np.ndarray, exact: bool) -> np.ndarray:
        """Return the change of each prompt's expected reward for changes `[O, …]` of log π."""
        sums_S = np.zeros((len(self.advantages_S), *changes_O.shape[1:]))
        np.add.at(sums_S, self.recording.rows, changes_O)
        gains_S = np.expm1(sums_S) if exact else sums_S
        weighted = gains_S * self.advantages_S.reshape(-1, *(1,) * (gains_S.ndim - 1))
        return weighted.reshape(PROBES, -1, *gains_S.shape[1:]).mean(axis=1)

    def changes(self, params: Params, full: Params) -> list[np.ndarray]:
        """Return the changes of each of QUANTITIES between params."""
        log_probs_O, entropy_O = np.asarray(self.read(params) - self.read(full), float)
        return [log_probs_O, entropy_O, self.by_prompt(log_probs_O, exact=True)]

    def predictions(self, influence_2OB: np.ndarray) -> list[np.ndarray]:
        """Return the derivative of each of QUANTITIES by the samples' weights `[…, B]`."""
        log_probs_OB, entropy_OB = influence_2OB
        return [log_probs_OB, entropy_OB, self.by_prompt(log_probs_OB, exact=False)]


def sample_columns(account: attribution.Account, group: str | None = None) -> np.ndarray:
    """Return the samples' columns `[2, O, B]` of a ledger, of all groups or of one."""
    columns = []
    for name in attribution.MEASURES:
        parts = [
            values
            for key, values in account.arrays.items()
            if key.startswith(f"{name}/")
            and values.ndim == 2
            and group in (None, key.split("/")[2])
        ]
        columns.append(np.sum(parts, axis=0, dtype=float))
    return np.stack(columns)


def predictions(recording: Recording, quantities: Quantities) -> dict[str, list[np.ndarray]]:
    """Return every prediction of one step as derivatives by the samples' weights."""
    influence, chain = recording.influence, recording.chain
    where = recording.contexts, recording.targets
    after = influence.retrain(chain._replace(batches=chain.batches[:1]), _ones(chain))
    step = attribution.OptimizerStep(chain.before, after, chain.batches[0])
    static = influence.policy, influence.terms
    account = attribution.Ledger(*static, influence.optimizer, influence.trained).read(step, *where)
    descent = optax.sgd(1.0)
    state = dataclasses.replace(chain.before, opt_state=descent.init(chain.before.params))
    plain = attribution.Ledger(*static, descent, (True,) * len(influence.trained))
    gradient = plain.read(step._replace(before=state), *where)
    products_2OB = sample_columns(gradient)
    sizes_B = _sample_norms(influence, chain)
    to_reward_B = quantities.predictions(products_2OB)[2].sum(axis=0)

    def one_score(scores_B: np.ndarray) -> list[np.ndarray]:
        return [np.broadcast_to(scores_B, (n, len(scores_B))) for n in _counts(recording)]

    return {
        "ledger": quantities.predictions(sample_columns(account)),
        "ledger, R": quantities.predictions(sample_columns(account, "head")),
        "gradient": quantities.predictions(products_2OB),
        "gradient cosine": quantities.predictions(products_2OB / sizes_B),
        "I-PPO": one_score(to_reward_B),
        "GradAlign": one_score(to_reward_B / sizes_B),
    }


def unrolled(recording: Recording, quantities: Quantities) -> dict[str, list[np.ndarray]]:
    """Return the predictions of `attribution.Influence` through all recorded steps."""
    listed = {}
    for factors in ("realised", "exact"):
        influence = dataclasses.replace(recording.influence, factors=factors)
        values = influence.read(recording.chain, recording.contexts, recording.targets)
        listed[f"unrolled, {factors}"] = quantities.predictions(np.asarray(values, float))
    return listed


def _counts(recording: Recording) -> tuple[int, int, int]:
    return len(recording.rows), len(recording.rows), PROBES


def _ones(chain: attribution.Chain) -> jax.Array:
    return jnp.ones(len(chain.batches[0].tokens))


def _sample_norms(influence: attribution.Influence, chain: attribution.Chain) -> np.ndarray:
    """Return the norm of each sample's gradient `[B]`; 1 where it is 0."""
    (batch, *_), params = chain.batches, chain.before.params

    def norm(row: Any) -> jax.Array:
        def loss(params: Params) -> Any:
            totals, _ = influence.terms(params, jax.tree.map(lambda leaf: leaf[None], row), None)
            return sum(total.total for total in totals.values())

        return optax.tree.norm(jax.grad(loss)(params))

    norms_B = np.asarray(jax.jit(lambda rows: jax.lax.map(norm, rows))(batch), float)
    return np.where(norms_B > 0, norms_B, 1.0)


def lds(predicted_SQ: np.ndarray, measured_SQ: np.ndarray) -> intervals.Interval:
    """Return the mean over quantities of Spearman's correlation over subsets."""
    ranks = [rankdata(values, axis=0) for values in (predicted_SQ, measured_SQ)]
    centred = [values - values.mean(axis=0) for values in ranks]
    sizes = np.sqrt([np.sum(values**2, axis=0) for values in centred])
    moved = np.all(sizes > 0, axis=0)
    scores_Q = np.sum(centred[0] * centred[1], axis=0)[moved] / np.prod(sizes, axis=0)[moved]
    return intervals.mean_interval(scores_Q)


def score(recording: Recording, preset: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table for a recorded run."""
    quantities, rng, rows = Quantities(recording), np.random.default_rng(0), []
    samples = len(recording.chain.batches[0].tokens)
    kept = [rng.permutation(samples) >= options.removed * samples for _ in range(options.subsets)]
    weights = {
        "kept": [mask.astype(float) for mask in kept],
        "recomputed": [advantage_weights(recording, mask, preset) for mask in kept],
    }
    first = recording.chain._replace(batches=recording.chain.batches[:1])
    listed = predictions(recording, quantities)
    for steps, chain in ((1, first), (len(recording.chain.batches), recording.chain)):
        if steps > 1:
            listed |= unrolled(recording, quantities)
        full = recording.influence.retrain(chain, _ones(chain))
        for advantages, weights_SB in weights.items():
            if steps > 1 and advantages == "recomputed":
                continue
            began = time.perf_counter()
            measured = [
                quantities.changes(recording.influence.retrain(chain, jnp.asarray(w)), full)
                for w in weights_SB
            ]
            seconds = time.perf_counter() - began
            for name, derivatives in listed.items():
                row = {"objective": preset, "steps": steps, "advantages": advantages}
                row |= {"prediction": name, "truth_seconds": seconds}
                changes = zip(*measured, strict=True)
                for quantity, derivative, change in zip(
                    QUANTITIES, derivatives, changes, strict=True
                ):
                    predicted = np.stack([derivative @ (w - 1) for w in weights_SB])
                    interval = lds(predicted, np.stack(change))
                    row[quantity] = [interval.value, interval.low, interval.high]
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    texts = [f"{row[q][0]:.3f} [{row[q][1]:.3f}, {row[q][2]:.3f}]" for q in QUANTITIES]
    return f"{row['objective']} {row['steps']:>2} {row['advantages']:<10} " + "  ".join(
        [f"{row['prediction']:<20}", *texts]
    )


def base_model(out: Path) -> str:
    """Train the quickstart's base model, unless it is there."""
    run_dir = out / "base"
    if main.main(["train", "--config=quickstart/base", f"--run_dir={run_dir}"]):
        raise SystemExit("the base model failed")
    return str(run_dir / "export")


def run() -> None:
    """Print the table, and write its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="of the quickstart's tokenizer; None to train it")
    parser.add_argument("--out", type=Path, default=Path("runs/attribution"))
    parser.add_argument("--objectives", default="rloo,grpo")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--removed", type=float, default=0.5, help="share of a batch")
    parser.add_argument("--later", type=int, default=19, help="steps after the attributed one")
    options = parser.parse_args()
    model, began, rows = options.model or base_model(options.out), time.perf_counter(), []
    print("LDS of", "   ".join(QUANTITIES))
    for preset in options.objectives.split(","):
        recording = record(model, preset, options.later, options.out / preset)
        rows += score(recording, preset, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attribution.json").write_text(json.dumps(rows, indent=1) + "\n")
    shown = [
        {k: f"{v[0]:.3f}" if isinstance(v, list) else v for k, v in row.items()} for row in rows
    ]
    print(measure.table(shown, ("objective", "steps", "advantages", "prediction", *QUANTITIES)))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    run()
