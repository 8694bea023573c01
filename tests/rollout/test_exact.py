"""Sampling by the update's forward pass: the same log-probs in bits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ntkrl import models, rollout, runtime, trees, update
from ntkrl.types import PromptBatch, UpdateBatch
from tests.models.families import CASES

PROMPTS, COUNT, WIDTH, BUDGET = 8, 2, 5, 6
SETTINGS = rollout.SamplerSettings(
    completions_per_prompt=COUNT,
    max_completion_tokens=BUDGET,
    temperature=0.7,
    end_ids=(0,),
    pad_id=1,
)
HEAD, ALL = (("head/.*", 1e-2), (".*", None)), ((".*", 1e-2),)
MESH = (2, 2, 2)


def prompts():
    """Left-padded prompts, all random."""
    rng = np.random.default_rng(0)
    mask = np.arange(WIDTH)[None] >= rng.integers(0, 4, PROMPTS)[:, None]
    tokens = np.where(mask, rng.integers(2, 31, (PROMPTS, WIDTH)), 1)
    rows, copies = np.arange(PROMPTS, dtype=np.int32), np.zeros(PROMPTS, np.int32)
    return PromptBatch(tokens=tokens, mask=mask, rows=rows, copies=copies)


@dataclasses.dataclass
class Run:
    """A sampler and an update of the same model."""

    case: str
    sizes: tuple[int, int, int] = (1, 1, 1)
    parameters: tuple = ALL
    minibatches: int = 1
    microbatches: int = 1
    chunk_tokens: int = 1024
    remat: str = "products"

    def draw(self):
        """Sample with both samplers; return their rollouts, and what the update needs."""
        devices = jax.devices()[: int(np.prod(self.sizes))]
        self.mesh = runtime.make_mesh(*self.sizes, devices)
        options = models.ModelOptions(remat=self.remat)
        _, architecture, config = CASES[self.case]
        self.policy, self.params = models.build(
            architecture, config, jax.random.key(0), mesh=self.mesh, options=options
        )
        stage = update.Stage("all", 5, self.parameters, max_grad_norm=1.0, epsilon=0.1)
        self.stage = update.bind_stage(stage, self.policy, self.params)
        sampler = rollout.Sampler(self.policy, SETTINGS, mesh=self.mesh)
        reading = rollout.UpdateReading(
            self.stage.trained, self.minibatches, self.microbatches, self.chunk_tokens
        )
        placed, key = runtime.place_rows(prompts(), self.mesh), jax.random.key(1)
        exact = rollout.ExactSampler(sampler, self.mesh, reading)
        return sampler(self.params, placed, key), exact(self.params, placed, key)

    def difference(self, drawn):
        """Return the largest difference of log-probs at the first minibatch of an update."""
        rows = len(drawn.tokens) // self.minibatches
        first = jax.tree.map(lambda leaf: leaf[:rows], drawn)
        rng = np.random.default_rng(2)
        advantages = rng.normal(size=(rows, 1)).repeat(BUDGET, 1).astype(np.float32)
        batch = UpdateBatch(
            tokens=first.tokens,
            mask=first.mask,
            completion_mask=first.completion_mask,
            old_log_probs=first.sampler_log_probs,
            ref_log_probs=first.sampler_log_probs,
            advantages=advantages,
        )
        shards = trees.blocks(self.mesh, rows // self.microbatches)
        loss = functools.partial(update.policy_loss, update.PRESETS["grpo"], BUDGET)
        loss = update.policy_loss_fn(self.policy, loss, 0.7, self.chunk_tokens, shards)
        step = jax.jit(update.make_step(self.stage, loss, self.microbatches))
        state = update.init_state(self.stage, self.params, jax.random.key(0))
        result = step(state, runtime.place_rows(batch, self.mesh))
        return float(result.metrics["log_ratio_max"])


@pytest.fixture(autouse=True)
def optimised():
    """Compile as runs do: without optimisations, fusions depend on what else a program holds."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


RUNS = [
    Run("gpt-neox"),
    Run("llama 3", MESH),
    *(
        pytest.param(run, marks=pytest.mark.slow)
        for run in (
            *(Run(case) for case in ("llama 3", "gemma 2", "qwen3 moe")),
            Run("gpt-neox", minibatches=2, microbatches=2, chunk_tokens=12),
            Run("gpt-neox", parameters=HEAD),
            Run("llama 3", remat="none"),
        )
    ),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.case}-{'x'.join(map(str, run.sizes))}")
def test_log_probs_are_the_updates_in_bits(run):
    """law: exactly 0.0 (a decoded rollout differs by 5e-7), and the draws of the plain sampler."""
    plain, exact = run.draw()
    assert run.difference(exact) == 0.0
    assert np.array_equal(np.asarray(plain.completion_mask), exact.completion_mask)
    assert np.array_equal(np.asarray(plain.tokens), exact.tokens)
    assert np.array_equal(np.asarray(plain.finished), exact.finished)
    gap = np.asarray(plain.sampler_log_probs) - exact.sampler_log_probs
    assert np.abs(gap).max() <= 2e-5
    np.testing.assert_allclose(plain.entropy, exact.entropy, atol=2e-5)
