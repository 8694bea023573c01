"""Cost of a step ledger relative to training: `python -m tests.bench.ledger`.

The quickstart's shapes: a GPT-NeoX of D = 96, 2 layers, V = 18; 15 prompts of 8 tokens with 8
completions of 12 tokens each, RLOO, Adam; a probe set of 8 × 2 such completions. The KL is in the
reward, a second term of the ledger; with --no-kl there is none; with --kl it is in the loss, by
GRPO. A training step is generation and update. The cost of a ledger is the time of the ledger plus
the additional time of an update that returns its gradients. Medians of interleaved calls, compiled
before timing. FLOPs of the samples' contributions are those of `Ledger.estimates`.
"""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ntkrl
from ntkrl import attribution, ntk, probe, rollout, update
from ntkrl.types import ProbeSet, PromptBatch, UpdateBatch
from tests.bench import measure

CONFIG = {
    "vocab_size": 18,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 64,
    "rotary_pct": 0.25,
}
PROMPTS, GROUP, PROMPT, LENGTH = 15, 8, 8, 12
PROBE_PROMPTS, PROBE_GROUP = 8, 2
EVERY = {"sample": 50, "group": 10}
"""Steps between ledgers for which the overhead is reported."""
WITH_KL = update.Objective(kl_place="loss", kl_coefficient=0.04)


def draw(policy: Any, params: Any, prompts: int, group: int, seed: int) -> Any:
    """Return a function that samples completions of random prompts."""
    tokens = np.random.default_rng(seed).integers(2, CONFIG["vocab_size"], (prompts, PROMPT))
    batch = PromptBatch(
        tokens=jnp.asarray(tokens),
        mask=jnp.ones(tokens.shape, bool),
        rows=jnp.arange(prompts),
        copies=jnp.zeros(prompts, int),
    )
    # no token ends a completion: all have the full length
    sample = rollout.Sampler(policy, rollout.SamplerSettings(group, LENGTH, 1.0, -1, 0))
    return lambda: sample(params, batch, jax.random.key(seed))


def update_batch(drawn: Any, kl_in_reward: bool) -> UpdateBatch:
    """Return the batch of the step, with random advantages."""
    mask = drawn.completion_mask
    return UpdateBatch(
        tokens=drawn.tokens,
        mask=drawn.mask,
        completion_mask=mask,
        old_log_probs=drawn.sampler_log_probs,
        ref_log_probs=drawn.sampler_log_probs - 0.1,
        advantages=jax.random.normal(jax.random.key(2), (len(mask), 1)) * jnp.ones(mask.shape),
        kl_advantages=0.1 * jnp.ones(mask.shape) if kl_in_reward else None,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--kl", action="store_true", help="in the loss")
    parser.add_argument("--no-kl", action="store_true", help="no KL at all")
    options = parser.parse_args()
    objective = WITH_KL if options.kl else update.PRESETS["rloo"]
    if options.no_kl:
        objective = dataclasses.replace(objective, kl_place="off", kl_coefficient=0.0)
    policy, params = ntkrl.build("GPTNeoXForCausalLM", CONFIG, jax.random.key(0))
    stage = update.Stage("all", 1, ((".*", 3e-4),), max_grad_norm=1.0)
    bound_stage = update.bind_stage(stage, policy, params)
    minimised = update.policy_loss_fn(
        policy, lambda read, batch: update.policy_loss(objective, LENGTH, read, batch)
    )
    parts = update.policy_loss_fn(policy, update.policy_terms(objective, LENGTH))
    step = jax.jit(update.make_step(bound_stage, minimised))
    apart = jax.jit(update.make_step_with_term_gradients(bound_stage, parts))
    generate = draw(policy, params, PROMPTS, GROUP, 0)
    batch = update_batch(generate(), objective.kl_place == "reward")
    before, *_ = step(update.init_state(bound_stage, params, jax.random.key(0)), batch)
    after, *_ = step(before, batch)
    chosen = draw(policy, params, PROBE_PROMPTS, PROBE_GROUP, 1)()
    rows = jnp.arange(PROBE_PROMPTS).repeat(PROBE_GROUP)
    arrays = (chosen.tokens, chosen.mask, chosen.completion_mask, rows)
    names = ("tokens", "mask", "completion_mask", "groups")
    probe_set = ProbeSet(**dict(zip(names, arrays, strict=True)))
    prober = probe.Prober(policy, probe_set, params)
    where = prober.contexts, prober.targets
    static = policy, parts, bound_stage.optimizer, bound_stage.trained
    _, _, (old, new) = prober.compare(before.params, after.params)
    moved = jax.tree.map(np.subtract, new.statistics, old.statistics)
    actual = np.stack([moved.log_probs, moved.entropy])
    # by sample the KL's part is a factor, see `ProbeHook.keep`
    seen = {"group": batch, "sample": batch.replace(kl_advantages=None)}
    steps = {
        by: attribution.OptimizerStep(before, after.params, rows, None, apart(before, rows)[2])
        for by, rows in seen.items()
    }
    ledgers = {"group": attribution.Ledger(*static, by="group")}
    ledgers |= {name: attribution.Ledger(*static, algorithm=name) for name in ("jvp", "vjp")}
    calls = {"generation": generate, "update": lambda: step(before, batch)}
    calls |= {f"apart, {by}": lambda part=part: apart(before, part) for by, part in seen.items()}
    calls["prediction"] = lambda: prober.compare(before.params, after.params)
    for name, ledger in ledgers.items():
        calls[name] = functools.partial(ledger.read, steps[ledger.by], *where, actual)
    seconds = measure.medians_in_turns(calls, options.repeats, jax.block_until_ready)
    step_seconds = seconds["generation"] + seconds["update"]
    estimates = ledgers["jvp"].estimates(steps["sample"], *where)
    table = []
    for name, value in seconds.items():
        row = {"call": name, "seconds": value, "of_a_step": value / step_seconds}
        if name in ledgers:
            every = EVERY[ledgers[name].by]
            more = value + seconds[f"apart, {ledgers[name].by}"] - seconds["update"]
            row |= {"every": every, "of_training": more / step_seconds / every}
        if name in estimates:
            row |= {"flops": estimates[name].flops, "MiB": estimates[name].bytes / 2**20}
        table.append(row)
    columns = ("call", "seconds", "of_a_step", "every", "of_training", "flops", "MiB")
    best = ntk.cheapest(estimates.values(), 2 * 2**30)
    print(f"{jax.devices()[0].device_kind}; auto takes {best.algorithm}")
    print(measure.table(table, columns))


if __name__ == "__main__":
    main()
