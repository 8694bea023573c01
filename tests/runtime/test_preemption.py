"""Preemption: two processes save and stop together; one process stops by SIGTERM alone."""

import os
import signal
import socket
import subprocess
import sys

from ntkrl import runtime

TOGETHER = """
import os, signal, sys, time, jax
from ntkrl import runtime
with runtime.distributed_session(), runtime.PreemptionNotice() as notice:
    for step in range(1, 400):
        if step == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if notice.reached(step):
            break
        time.sleep(0.02 * (1 + jax.process_index()))
left = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print("left after", step, left, flush=True)
"""


SAVED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from ntkrl import runtime, trees
from ntkrl.types import TrainState
with runtime.distributed_session():
    mesh = runtime.make_mesh(1, 2, 1)
    def make():
        params = {"noise": jax.random.normal(jax.random.key(1), (400, 300))}
        rest = {"opt_state": {"count": jnp.int32(1)}, "key": jax.random.key(0), "reference": None}
        return TrainState(step=jnp.int32(3), params=params, **rest)
    rows = ((".*noise", ("fsdp",)), (".*", ()))
    state = jax.jit(make, out_shardings=trees.shardings(jax.eval_shape(make), rows, mesh))()
    checkpoints = runtime.Checkpoints(sys.argv[1], keep=2)
    for step in (1, 2):
        checkpoints.save(step, state, {"step": step})
    checkpoints.finish_saving()
    if jax.process_index() == 0:
        paths = checkpoints.directory.glob("2/state/**/d/*")
        path = max(paths, key=lambda path: path.stat().st_size)
        held = bytearray(path.read_bytes())
        held[len(held) // 2] ^= 4
        path.write_bytes(held)
    multihost_utils.sync_global_devices("damaged")
    try:
        checkpoints.restore(2, state)
    except runtime.CorruptCheckpointError as error:
        print(error)
    checkpoints.quarantine(2)
    found = checkpoints.restore(1, state).params["noise"].addressable_data(0)
    same = np.array_equal(found, state.params["noise"].addressable_data(0))
    checkpoints.save(2, state, {"step": 5})
    checkpoints.finish_saving()
    print(same, checkpoints.steps(), checkpoints.position(2))
    checkpoints.close()
"""


LEAVING = """
import os, signal
from ntkrl import runtime
from ntkrl.runtime import preemption

with runtime.PreemptionNotice() as notice:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print(notice.reached(1), flush=True)
    notice.received_at -= preemption.DUPLICATE_SECONDS
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_sigterm_sent_twice_is_one_request():
    """law: a SIGTERM is noted, its copy ignored, and a later one ends; afterwards as before."""
    before = signal.getsignal(signal.SIGTERM)
    with runtime.PreemptionNotice() as notice:
        assert not notice.reached(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.reached(1) and notice.reached(2)
    assert signal.getsignal(signal.SIGTERM) == before
    command = [sys.executable, "-c", LEAVING]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (child.stdout, child.returncode) == ("True\n", -signal.SIGTERM)


def two(program, *arguments):
    """Run a program in two processes of one device each; return the output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=settings | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    return [child.communicate(timeout=120)[0].strip().splitlines() for child in children]


def test_two_processes_leave_after_the_same_step():
    """law: a SIGTERM of one of two processes makes both leave, after one step they agree on."""
    steps = [printed[-1] for printed in two(TOGETHER)]
    assert steps[0] == steps[1] and steps[0].endswith("True"), steps
    assert 3 < int(steps[0].split()[2]) < 399


def test_two_processes_save_together(tmp_path):
    """law: two processes write one checkpoint, both see that it is damaged, and save it again."""
    for printed in two(SAVED, tmp_path / "checkpoints"):
        assert printed[-2:] == [
            "bits of params/noise have changed since they were saved",
            "True [1, 2] {'step': 5}",
        ]
