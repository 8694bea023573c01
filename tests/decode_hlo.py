"""The compiled decode loop of a sampler: its kernels, bytes, copies, casts and transposes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from ntkrl.plan import hlo

LOOP = re.compile(r"body=%([\w.-]+)")


def abstract_chunk(sampler, params, prompts, prompt_length, sharding=None):
    """Return shapes of `decode_chunk`'s arguments after a prefill of `prompts` prompts.

    sharding: of every array; None leaves it open.
    """
    from ntkrl.types import PromptBatch

    def shapes(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    ids = jax.ShapeDtypeStruct((prompts, prompt_length), jnp.int32)
    rows = jax.ShapeDtypeStruct((prompts,), jnp.int32)
    batch = PromptBatch(tokens=ids, mask=ids.update(dtype=jnp.bool_), rows=rows, copies=rows)
    copy = jax.eval_shape(sampler.policy.decode_params, params)
    columns = sampler.cache_columns(prompt_length, sampler.settings.max_completion_tokens)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prefill = sampler.programs.prefill
    active, output, _ = prefill.eval_shape(columns, copy, batch, key)
    start = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    return shapes(copy), shapes(active), shapes(output), start


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """The loop over tokens of an optimised program.

    module: the parsed program. body: name of the loop's computation. trips: its known trip count,
    or None.
    """

    module: hlo._Module
    body: str
    trips: int | None

    def instructions(self, name=None, times=1):
        """Yield `(instruction, runs per token)` of the loop and what it calls but fusions."""
        for line in self.module.computations[self.body if name is None else name]:
            yield line, times
            inner = times * (self.module._trip_count(line) if line.op == "while" else 1)
            if line.op != "fusion" and "to_apply" not in line.attributes or line.op == "call":
                for called in hlo.CALLED.findall(line.attributes):
                    yield from self.instructions(called, inner)

    def fused_instructions(self):
        """Yield every instruction of the loop, those inside fusions too."""
        names = [self.body]
        for name in names:
            for line in self.module.computations[name]:
                yield line
                names += [c for c in hlo.CALLED.findall(line.attributes) if c not in names]

    @property
    def kernels(self):
        """Kernels per token."""
        return sum(times for line, times in self.instructions() if launches(line))

    @property
    def traffic(self):
        """Bytes moved per token."""
        return self.module._computation(self.body).traffic


def launches(line):
    """Return whether an instruction of a GPU's program is a kernel."""
    if line.op in hlo.NO_TRAFFIC or line.op.endswith("-done"):
        return False
    return not any(name in line.attributes for name in hlo.NO_TRAFFIC_CALLS)


def decode_loop(text):
    """Return the loop of a compiled `decode_chunk` that moves most bytes."""
    module = hlo._Module(text, 1)
    loops = [
        (module._computation(body).traffic, body, line)
        for line in module.instructions.values()
        if line.op == "while"
        for body in LOOP.findall(line.attributes)
    ]
    _, body, line = max(loops, key=lambda loop: loop[0])
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line.attributes)
    return DecodeLoop(module, body, int(known[1]) if known else None)


def elements(array):
    """Return the number of an array's elements."""
    return math.prod(array.shape)
