"""Figures of chips, and times predicted with them, by hand."""

import importlib.resources
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ntkrl import runtime
from ntkrl.numerics import GIB
from ntkrl.plan import chips, hardware, hlo, measure
from ntkrl.plan.chips import Chip, Links


@pytest.mark.parametrize("name", chips.GPUS)
def test_a_gpu_is_described_to_its_compiler_as_to_the_plan(name):
    """by hand: bandwidth and memory of the compiler's description are those of the table."""
    file = importlib.resources.files("ntkrl.plan").joinpath("gpus", f"{name}.txtpb")
    entries = dict(re.findall(r"^\s*(\w+): (\d+)", file.read_text("utf-8"), re.M))
    chip = chips.GPUS[name]
    assert int(entries["device_memory_size"]) == chip.memory_gib * GIB
    assert int(entries["memory_bandwidth"]) == pytest.approx(chip.memory_rate, rel=1e-3)


TORUS = (4, 4)


@pytest.mark.parametrize(
    ("torus", "ring", "devices", "ports", "hops"),
    [
        (TORUS, 16, 16, 2, 6),  # a corner receives over one port an axis; no axis is closed
        (TORUS, 16, 4, 1, 3),
        (TORUS, 16, 2, 1, 1),
        ((16, 16), 16, 256, 4, 16),  # rings: two ports an axis, half the way around
        ((16, 16), 16, 16, 2, 8),
        ((16, 16), 16, 4, 1, 3),  # a part of a ring is not closed
        ((4, 4, 4), 4, 64, 6, 6),
        ((), 0, 8, 1, 7),  # a switch
    ],
)
def test_ports_and_hops(torus, ring, devices, ports, hops):
    """by hand: the ports that a group receives over, and the longest way across it."""
    assert Links(1.0, torus=torus, ring=ring).ports_and_hops(devices) == (ports, hops)


def test_time_of_a_collective():
    """by hand: 12 bytes at half of 4 bytes/s; 2 s to start; an all-reduce crosses 7 hops twice."""
    links = Links(4.0, reached=0.5, start_seconds=2.0, hop_seconds=1.0)
    assert links.seconds("all-gather", 8, 12.0) == (6.0, 9.0)
    assert links.seconds("all-reduce", 8, 12.0) == (6.0, 16.0)
    assert links.seconds("collective-permute", 8, 12.0) == (6.0, 3.0)


CHIP = Chip(
    flops=20.0,
    memory_rate=10.0,
    links=Links(1.0),
    flops_reached=0.5,
    memory_reached=0.5,
    kernel_seconds=0.25,
    operation_rate=4.0,
)


def kernel(runs, passes=0.0, operations=0.0, traffic=0.0, in_background=False):
    """Return a kernel."""
    return hlo.Launch("k", runs, passes, passes, operations, traffic, in_background)


def test_kernels_run_one_after_the_other():
    """by hand: each takes its overhead and its longest part; one maximum of all would be 6 s."""
    cost = hlo.HloCost((kernel(2, 30.0, 4.0, 5.0), kernel(1, 10.0, 8.0, 25.0), kernel(4, 0, 2.0)))
    seconds = measure.predict(cost, CHIP)
    expected = {"compute": 6.0, "memory": 5.0, "operations": 2.0, "launches": 7 * 0.25}
    assert seconds == {**expected, "links": 0.0, "latency": 0.0}


def test_background_copies_overlap():
    """by hand: 30 bytes beside 6 s of arithmetic are free, 80 bytes take 16 s in all."""
    for traffic, total in ((30.0, 6.25), (80.0, 16.0)):
        cost = hlo.HloCost((kernel(1, 60.0), kernel(1, traffic=traffic, in_background=True)))
        assert sum(measure.predict(cost, CHIP).values()) == total


@pytest.mark.parametrize(("in_background", "total"), [(True, 8.0), (False, 14.25)])
def test_background_collectives_overlap(in_background, total):
    """by hand: 8 s of links beside 6.25 s of a kernel, or after it."""
    transfer = hlo.Transfer("all-gather", 1, 9.0, 8.0, 2, in_background)
    cost = hlo.HloCost((kernel(1, 60.0),), (transfer,))
    assert sum(measure.predict(cost, CHIP).values()) == total


def test_a_small_kernel_is_served_by_the_cache():
    """by hand: 10 bytes fit a cache of 10 bytes at 20 bytes/s, 11 do not."""
    chip = Chip(flops=1.0, memory_rate=1.0, cache_bytes=10.0, cache_rate=20.0)
    for traffic, seconds in ((10.0, 0.5), (11.0, 11.0)):
        assert (
            measure.predict(hlo.HloCost((kernel(1, traffic=traffic),)), chip)["memory"] == seconds
        )


def test_what_is_not_read_takes_no_time():
    """by hand: of 11 bytes at 1 byte/s, 4 are columns that the cache does not have yet."""
    chip = Chip(flops=1.0, memory_rate=1.0)
    cost = hlo.HloCost((kernel(1, traffic=11.0),))
    assert measure.predict(cost, chip, unread=4.0)["memory"] == 7
    assert measure.predict(cost, chip, unread=40.0)["memory"] == 0


def test_no_rates_no_time():
    """by hand: virtual devices have no published rates."""
    assert measure.predict(hlo.HloCost((kernel(1, 1.0),)), Chip()) == {}


def test_precision_of_a_product():
    """by hand: six bfloat16 passes on a TPU; an H100 multiplies float32 at 67 of 989 TFLOP/s."""
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    with jax.default_matmul_precision("highest"):
        text = jax.jit(jnp.matmul).lower(shape, shape).compile().as_text()
    flops = 2 * 64**3
    assert hlo.count(text).passes == 6 * flops
    assert hlo.count(text, passes=chips.GPUS["h100"].passes).passes == flops * 989 / 67


def test_a_gpu_that_is_not_there():
    """story: a product sharded over two H200, compiled here; each gathers half of the weights."""
    for module in hardware.GPU_COMPILER:
        reason = "needs the GPU compiler: pip install 'ntkrl[gpu-plan]'"
        pytest.importorskip(module, reason=reason)
    machine = hardware.machine("h200-2")
    assert machine.chip.memory_gib == pytest.approx(0.75 * 141, rel=1e-3)
    mesh = runtime.make_mesh(1, 2, 1, machine.devices)
    rows = jax.ShapeDtypeStruct(
        (64, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    weights = rows.update(shape=(128, 256))
    compiled = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(rows, weights).compile()
    cost = hlo.count(compiled.as_text(), passes=machine.chip.passes)
    assert cost.flops == 2 * 32 * 128 * 256
    assert cost.received == 128 * 256 * 2 / 2
    assert cost.launches >= 1 and not cost.transfers[0].in_background
    assert sum(measure.predict(cost, machine.chip).values()) > 6.6e-6
