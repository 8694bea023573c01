"""The steps of a kernel's computation with their expected times, progress and time left.

A time is FLOPs over the rate of this machine, measured on a product of matrices, and over the
efficiency of a measure: the part of that rate it reaches (two cores, SmolLM2-135M; see
tests/bench). On other hardware the time left is corrected by the steps already done.
"""

import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ntkrl import ntk, probe
from ntkrl.types import Params

EFFICIENCY = {"head": 0.5, "traces": 0.55, "norms": 0.75, "eigenvalues": 0.08}
LONG_SECONDS = 10.0
"""Expected time from which on layers are reported and every step is logged."""
RATE_SIZE = 2048
"""Rows of the matrices that are multiplied to measure the rate."""
UNMEASURED_FLOPS = 1e10
"""Work below which the rate is not worth measuring."""


class KernelRun:
    """Runs steps one after another.

    steps: of `probe.kernel_steps`; may be replaced by an equal list before `results`.
    seconds: expected time of each step; 0 for work too small to matter.
    """

    def __init__(self, steps: list[probe.KernelStep], params: Params, log: Callable[[str], None]):
        self.steps, self.log, total = steps, log, sum(step.flops for step in steps)
        rate = float("inf")
        if total > UNMEASURED_FLOPS:
            rate = product_rate(jax.tree.leaves(params)[0].dtype)
        self.seconds = [step.flops / rate / EFFICIENCY[step.measure] for step in steps]
        for step, seconds in zip(steps, self.seconds, strict=True):
            expected = f", about {_duration(seconds)}" if seconds else ""
            log(f"{step.name}: {step.flops:.2e} FLOPs{expected}")
        if sum(self.seconds):
            log(f"in all about {_duration(sum(self.seconds))} at {rate / 1e9:.0f} GFLOP/s")

    @property
    def is_long(self) -> bool:
        """True where the time left is worth reporting."""
        return sum(self.seconds) > LONG_SECONDS

    def results(self) -> Iterator[dict[str, np.ndarray]]:
        """Run the steps; yield the arrays of each."""
        arrays: dict[str, np.ndarray] = {}
        total = sum(self.seconds) or float(len(self.steps))
        form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
        start, done = time.monotonic(), 0.0
        with tqdm(total=total, disable=None, bar_format=form) as bar:
            for step, seconds in zip(self.steps, self.seconds, strict=True):
                weight, began = seconds if sum(self.seconds) else 1.0, time.monotonic()
                bar.set_description(step.name)
                layers = _Layers(bar, done, weight, step.reports)
                with ntk.listening(layers.finish):
                    new = probe.on_host(step.run(arrays))
                arrays |= new
                done += weight
                bar.update(done - bar.n)
                if self.is_long:
                    now = time.monotonic()
                    left = (now - start) * (total - done) / done
                    self.log(f"{step.name}: {_duration(now - began)}; {_duration(left)} left")
                yield new


class _Layers:
    """Advances a bar by the layers of a step."""

    def __init__(self, bar: tqdm, start: float, weight: float, count: int):
        self.bar, self.start, self.weight, self.count = bar, start, weight, count
        self.finished = 0

    def finish(self) -> None:
        """Count a layer."""
        self.finished += 1
        fraction = min(1.0, self.finished / self.count) if self.count else 0.0
        self.bar.update(max(0.0, self.start + fraction * self.weight - self.bar.n))


def product_rate(dtype: jnp.dtype) -> float:
    """Measure the FLOP/s of a product of two matrices, the best of three."""
    matrix = jnp.ones((RATE_SIZE, RATE_SIZE), dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    jax.block_until_ready(multiply(matrix))
    times = []
    for _ in range(3):
        start = time.monotonic()
        jax.block_until_ready(multiply(matrix))
        times.append(time.monotonic() - start)
    return 2.0 * RATE_SIZE**3 / min(times)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
