"""Pattern lists, partition and shardings over parameter names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ntkrl import runtime, trees

TREE = {
    "head": {"weight": jnp.ones((4, 6))},
    "layers": {"up": jnp.zeros((2, 6, 8)), "b": jnp.zeros(3)},
}


def test_names():
    """by hand: paths joined by slashes, in leaf order."""
    assert trees.names(TREE) == ["head/weight", "layers/b", "layers/up"]


def test_first_match_wins():
    """by hand: the full name must match, and earlier rows win."""
    rows = (("layers/b", None), ("layers/.*", 2.0), (".*", 1.0))
    assert trees.match(rows, TREE) == [1.0, None, 2.0]


def test_every_problem_at_once():
    """law: bad patterns, useless patterns and uncovered names come in one message."""
    rows = (("head/wieght", 1), ("layers/(", 2), ("layers/b", 3))
    with pytest.raises(ValueError) as caught:
        trees.match(rows, TREE, "stage 'x'")
    text = str(caught.value)
    assert "stage 'x'" in text
    assert "'head/wieght' matches no parameter; did you mean 'head/weight'?" in text
    assert "'layers/(' is not a regular expression" in text
    assert "no pattern covers head/weight, layers/up" in text


def test_a_pattern_is_the_whole_name():
    """law: `layers` alone must not cover `layers/up` (re.search would)."""
    with pytest.raises(ValueError, match="'layers' matches no parameter"):
        trees.match((("layers", 1), (".*", 2)), TREE)


def test_partition_and_merge_are_inverse():
    """law: each side has only its leaves, and merging gives the same objects back."""
    chosen, rest = trees.partition(TREE, [True, False, True])
    assert [leaf.shape for leaf in jax.tree.leaves(chosen)] == [(4, 6), (2, 6, 8)]
    assert [leaf.shape for leaf in jax.tree.leaves(rest)] == [(3,)]
    merged = trees.merge(chosen, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(TREE)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(TREE), strict=True))


def test_shardings_follow_names_into_optimizer_state():
    """by hand: moments are sharded as their parameter; indivisible dimensions are replicated."""
    mesh = runtime.make_mesh(1, 4, 2)
    rows = (
        (r"head/weight", ("tensor", "fsdp")),
        (r"layers/up", (None, "fsdp", "tensor")),
        (".*", ()),
    )
    state = {"mu": TREE, "count": jnp.zeros(())}
    result = trees.named_leaves(trees.shardings(state, rows, mesh))
    assert result["mu/head/weight"].spec == PartitionSpec("tensor", None)  # 6 % 4 != 0
    assert result["mu/layers/up"].spec == PartitionSpec(None, None, "tensor")
    assert result["count"].spec == PartitionSpec()
    with pytest.raises(ValueError, match="no pattern covers count"):
        trees.shardings(state, rows[:2] + (("layers/b", ()),), mesh)


def test_mesh_sizes():
    """by hand: −1 takes the remaining devices; sizes that do not multiply to all are refused."""
    assert dict(runtime.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ValueError, match="mesh data=3 fsdp=1 tensor=1 does not fit 8 devices"):
        runtime.make_mesh(3, 1, 1)


def test_place_rows():
    """law: rows are sharded over data and fsdp when divisible, else replicated."""
    mesh = runtime.make_mesh(2, 2, 2)
    even, odd = (
        runtime.place_rows((np.ones((8, 3)), np.ones(8)), mesh),
        runtime.place_rows(np.ones(6), mesh),
    )
    assert even[0].sharding.spec == PartitionSpec(("data", "fsdp"))
    assert odd.sharding.is_fully_replicated
    np.testing.assert_array_equal(runtime.fetch(even)[0], np.ones((8, 3)))
