"""Loading at scale: blocks are read onto their devices; no host loads more than its share."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open

import ntkrl
from ntkrl import models, runtime, trees
from ntkrl.models import hf_files
from tests.models.families import CASES, EACH, torch_model
from tests.models.test_families import equal_trees


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("case", EACH)
def test_sharded_loading_equals_whole(tmp_path, case, shape):
    """law: blocks read for a mesh equal those of the full arrays, by the family's patterns."""
    settings = CASES[case][2]
    wide = {
        k: 8 * -(-settings[k] // 8) for k in ("vocab_size", "intermediate_size") if k in settings
    }
    torch_model(case, tmp_path, **wide)
    mesh = runtime.make_mesh(*shape)
    policy, params = ntkrl.load(tmp_path, mesh=mesh)
    equal_trees(params, ntkrl.load(tmp_path)[1])
    expected = trees.shardings(params, policy.sharding, mesh)
    for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == where
    split = [leaf for leaf in jax.tree.leaves(params) if not leaf.is_fully_replicated]
    assert len(split) >= 4


def test_only_the_blocks_of_a_device_are_read(tmp_path, monkeypatch):
    """by hand: of 8 devices along fsdp each reads an eighth of every matrix, and reads it once."""
    torch_model("gpt-neox", tmp_path, vocab_size=32)
    mesh = runtime.make_mesh(1, 8, 1)
    seen = []
    read = hf_files.TensorMap.read

    def watched(self, ours, ends, dtype):
        block = read(self, ours, ends, dtype)
        seen.append((ours, tuple(ends), block.size))
        return block

    monkeypatch.setattr(hf_files.TensorMap, "read", watched)
    _, params = ntkrl.load(tmp_path, mesh=mesh)
    leaves = trees.named_leaves(params)
    assert len(seen) == len(set(seen))
    for name, leaf in leaves.items():
        sizes = [size for ours, _, size in seen if ours == name]
        assert sum(sizes) == leaf.size
        assert len(sizes) == (1 if leaf.is_fully_replicated else 8)


CHILD = """
import json, sys
import jax, ntkrl
from tests.bench.measure import peak_memory
jax.numpy.zeros(3).block_until_ready()
ntkrl.load(sys.argv[1])  # what is imported and compiled on the way
with peak_memory() as peak:
    _, params = ntkrl.load(sys.argv[2])
print(json.dumps(peak.mib))
"""


def test_peak_memory(tmp_path):
    """law: a process grows by the model and at most 1.3 of the largest stored tensor."""
    config = {
        **CASES["llama"][2],
        "vocab_size": 8000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 20,
    }
    policy, params = ntkrl.build("LlamaForCausalLM", config, jax.random.key(0))
    models.export(tmp_path / "large", policy, params)
    torch_model("llama", tmp_path / "small")
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20
    largest = 0.0
    with safe_open(tmp_path / "large" / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            largest = max(largest, float(np.prod(file.get_slice(name).get_shape())) * 4 / 2**20)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    # a second copy of one stack of MLP kernels alone would be 80 MiB more
    assert model - 20 < grown < model + 1.3 * largest
    print(f"model {model:.0f} MiB, largest tensor {largest:.0f}, grown by {grown:.0f}")


HOST = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import ntkrl
from ntkrl import runtime, trees
from ntkrl.models import hf_files
counted = []
read = hf_files.TensorMap.read
def watched(self, ours, ends, dtype):
    block = read(self, ours, ends, dtype)
    counted.append(block.size)
    return block
hf_files.TensorMap.read = watched
_, params = ntkrl.load(sys.argv[3], mesh=runtime.make_mesh(1, 2, 1))
leaves = trees.named_leaves(params)
whole = sum(leaf.size for leaf in leaves.values())
kept = sum(leaf.size for leaf in leaves.values() if leaf.is_fully_replicated)
shard = leaves["layers/mlp/up/kernel"].addressable_shards[0]
print(json.dumps([whole, kept, sum(counted), float(abs(shard.data).sum())]))
"""


def test_each_of_two_hosts_reads_its_own_half(tmp_path):
    """law: a process reads its devices' blocks of sharded arrays, and all of the others.

    oracle: the two halves of a kernel, one on each host, have the sums of the stored halves.
    """
    model = torch_model("llama", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": ""}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(number), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    reports = [json.loads(host.communicate(timeout=120)[0].splitlines()[-1]) for host in hosts]
    stored = torch.stack([layer.mlp.up_proj.weight for layer in model.model.layers])
    halves = [float(half.abs().sum()) for half in stored.detach().chunk(2, dim=2)]
    for (replicated, kept, read, total), half in zip(reports, halves, strict=True):
        assert 0 < kept < replicated / 4
        assert read == kept + (replicated - kept) // 2
        assert total == pytest.approx(half, rel=1e-5)
