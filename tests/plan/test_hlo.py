"""Counts from compiled programs, against arithmetic by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ntkrl import runtime
from ntkrl.plan import hlo

LAYERS, WIDTH, ROWS = 3, 64, 16


def compiled(function, *arguments):
    """The text of a compiled program."""
    return jax.jit(function).lower(*arguments).compile().as_text()


def shaped(*shape, mesh=None, spec=()):
    """A float32 array that is not there."""
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)


def layers(stack_LDD, x_ND):
    """Three products in a scan."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_ND, stack_LDD)[0]


def test_a_product():
    """by hand: 2 · 16 · 64 · 32 FLOPs; 16·64 and 64·32 floats are read, 16·32 written."""
    text = compiled(jnp.matmul, shaped(16, 64), shaped(64, 32))
    result = hlo.count(text)
    assert result.flops == result.passes == 2 * 16 * 64 * 32
    assert result.traffic == 4 * (16 * 64 + 64 * 32 + 16 * 32)
    assert result.collectives == {}


def test_a_product_by_a_library():
    """by hand: as XLA writes a call of cuBLAS on a GPU, its scratch memory beside the result."""
    text = """HloModule m

ENTRY %main (a: f32[16,64], b: f32[64,32]) -> f32[16,32] {
  %a = f32[16,64]{1,0} parameter(0)
  %b = f32[64,32]{1,0} parameter(1)
  %c = (f32[16,32]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %d = f32[16,32]{1,0} get-tuple-element(%c), index=0
}
"""
    result = hlo.count(text)
    assert result.flops == 2 * 16 * 64 * 32
    assert result.traffic == 4 * (16 * 64 + 64 * 32 + 16 * 32)


def test_a_loop_counts_as_often_as_it_runs():
    """by hand: three products; once, as XLA's own analysis counts them, would be a third."""
    text = compiled(layers, shaped(LAYERS, WIDTH, WIDTH), shaped(ROWS, WIDTH))
    assert hlo.count(text).flops == LAYERS * 2 * ROWS * WIDTH * WIDTH


def test_sharded_layers_are_gathered_in_each_step():
    """by hand: rows and weights over 4; each layer is gathered, a device receives 3/4 of it."""
    mesh = runtime.make_mesh(1, 4, 2)
    stack = shaped(LAYERS, WIDTH, WIDTH, mesh=mesh, spec=(None, "fsdp"))
    x = shaped(ROWS, WIDTH, mesh=mesh, spec=("fsdp",))
    result = hlo.count(compiled(layers, stack, x))
    assert result.flops == LAYERS * 2 * (ROWS // 4) * WIDTH * WIDTH
    assert set(result.collectives) == {"all-gather"}
    size = 4 * LAYERS * WIDTH * WIDTH
    assert result.collectives["all-gather"].size == size
    assert result.received == size * 3 / 4


def test_a_sum_over_devices():
    """by hand: eight partial sums of 64 numbers; a ring receives 2 · 7/8 of them."""
    mesh = runtime.make_mesh(8, 1, 1)
    x = shaped(ROWS, WIDTH, mesh=mesh, spec=("data",))
    result = hlo.count(compiled(functools.partial(jnp.sum, axis=0), x))
    assert result.collectives["all-reduce"] == (1, 4 * WIDTH, 2 * 7 / 8 * 4 * WIDTH)


def test_a_loop_that_ends_by_data():
    """by hand: a loop of unknown length is counted as often as the caller states."""

    def search(x_ND, w_DD):
        go = lambda carry: (carry[0] < carry[2]) & ~jnp.all(carry[1] > 3)  # noqa: E731
        step = lambda carry: (carry[0] + 1, carry[1] @ w_DD, carry[2])  # noqa: E731
        return jax.lax.while_loop(go, step, (0, x_ND, jnp.argmax(x_ND)))[1]

    text = compiled(search, shaped(ROWS, WIDTH), shaped(WIDTH, WIDTH))
    assert hlo.count(text, 5).flops == 5 * 2 * ROWS * WIDTH * WIDTH


TPU = """HloModule jit_f, num_partitions=16

%fused (p.0: bf16[4,128], p.1: s32[], p.2: bf16[1,128]) -> bf16[4,128] {
  %p.0 = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %update = bf16[4,128]{1,0:T(8,128)(2,1)} dynamic-update-slice(%p.0, %p.2, %p.1, %zero)
}

%body (b: (s32[], bf16[4,128], bf16[1,128])) -> (s32[], bf16[4,128], bf16[1,128]) {
  %b = (s32[]{:T(128)}, bf16[4,128]{1,0}, bf16[1,128]{1,0:T(8,128)S(1)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %held = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %row = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%b), index=2
  %next = s32[]{:T(128)} add(%i, %two)
  %cp = (bf16[1,128]{1,0:S(1)}, bf16[1,128]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%row), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %moved = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%cp)
  %put = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%held, %i, %moved), kind=kLoop, calls=%fused
  ROOT %t = (s32[]{:T(128)}, bf16[4,128]{1,0}, bf16[1,128]{1,0:S(1)}) tuple(%next, %put, %moved)
}

%condition (c: (s32[], bf16[4,128], bf16[1,128])) -> pred[] {
  %end = s32[]{:T(128)} constant(8)
  %c = (s32[]{:T(128)}, bf16[4,128]{1,0}, bf16[1,128]{1,0:T(8,128)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: bf16[4,128], r: bf16[1,128]) -> bf16[4,128] {
  %a = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %from = (s32[]{:T(128)}, bf16[4,128]{1,0}, bf16[1,128]{1,0:S(1)}) tuple(%start, %a, %r)
  %loop = (s32[]{:T(128)}, bf16[4,128]{1,0}, bf16[1,128]{1,0:S(1)}) while(%from), \
condition=%condition, body=%body
  ROOT %out = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_of_a_tpu():
    """by hand: the counter goes 0, 2, 4, 6; reading only its end would give eight runs.

    Each writes one row of 256 bytes in place, not the full array, and handles four counters; data
    in scratch memory, S(1), does not move.
    """
    result = hlo.count(TPU)
    assert result.collectives["collective-permute"] == (4, 4 * 256, 4 * 256)
    assert result.traffic == 4 * (256 + 4 * 4)


@pytest.mark.parametrize(("root", "read"), [("slice", 128), ("cast", 4 * 128)])
def test_a_slice_of_a_cast(root, read):
    """by hand: one float32 row of four is read, cast and written; a cast alone reads them all."""
    lines = {
        "cast": "%cast = bf16[4,128]{1,0} convert(%p.0)",
        "slice": "%slice = bf16[1,128]{1,0} dynamic-slice(%cast, %p.1, %p.1)",
    }
    lines = lines if root == "slice" else {"cast": lines["cast"]}
    lines[root] = "ROOT " + lines[root]
    shape = lines[root].split()[3].partition("{")[0]
    body = "\n  ".join(lines.values())
    text = f"""HloModule m

%fused (p.0: f32[4,128], p.1: s32[]) -> {shape} {{
  %p.0 = f32[4,128]{{1,0}} parameter(0)
  %p.1 = s32[] parameter(1)
  {body}
}}

ENTRY %main (a: f32[4,128], i: s32[]) -> {shape} {{
  %a = f32[4,128]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = {shape}{{1,0}} fusion(%a, %i), kind=kLoop, calls=%fused
}}
"""
    index = 4 if root == "slice" else 0
    assert hlo.count(text).traffic == 4 * read + 2 * read + index


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[8,2]<=[16]", 2),
        ("replica_groups=mesh['a'=4,'b'=4] {'a'}", 4),
        ("replica_groups={}", 16),
    ],
)
def test_groups_of_devices(groups, size):
    """by hand: a gather of 1024 numbers receives all except the local share."""
    text = f"""HloModule m, num_partitions=16

ENTRY %main (a: f32[512]) -> f32[1024] {{
  %a = f32[512]{{0}} parameter(0)
  ROOT %g = f32[1024]{{0}} all-gather(%a), channel_id=1, {groups}, dimensions={{0}}
}}
"""
    assert hlo.count(text).received == 4096 * (size - 1) / size
