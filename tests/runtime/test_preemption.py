"""Preemption: signals are noted at once; two processes save and stop together."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from ntkrl import runtime, signals

TOGETHER = """
import os, signal, sys, time, jax
from ntkrl import runtime
with runtime.distributed_session(), runtime.PreemptionNotice() as notice:
    for step in range(1, 400):
        if step == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), int(sys.argv[1]))
        if notice.reached(step):
            break
        time.sleep(0.02 * (1 + jax.process_index()))
left = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print("left after", step, left, notice.signal_name(), flush=True)
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
import os, signal, sys, time
from ntkrl import runtime
from ntkrl.runtime import preemption

first, later = int(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite under nohup ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)
with runtime.PreemptionNotice() as notice:
    os.kill(os.getpid(), first)
    os.kill(os.getpid(), signal.SIGTERM)
    print(notice.reached(1), notice.signal_name(), flush=True)
    time.sleep(0.5)
    if later != signal.SIGINT:
        notice.first_time -= preemption.DUPLICATE_SECONDS
    os.kill(os.getpid(), later)
    time.sleep(20)
    print("still here")
"""
LATER = [
    (signal.SIGTERM, signal.SIGTERM, -signal.SIGTERM),
    (signal.SIGINT, signal.SIGINT, 130),
]


@pytest.mark.parametrize("sent", signals.ENDING)
def test_a_signal_is_noted(sent, capfd):
    """law: SIGTERM, SIGHUP and SIGINT alike, by name and in words; afterwards as before."""
    before = signal.signal(sent, signal.default_int_handler)  # a suite under nohup ignores one
    with runtime.PreemptionNotice() as notice:
        assert not notice.reached(0) and notice.received is None
        os.kill(os.getpid(), sent)
        assert notice.reached(1) and notice.reached(2) and notice.signal_name() == sent.name
        text, deadline = "", time.monotonic() + 10
        while "press Ctrl-C again" not in text and time.monotonic() < deadline:
            time.sleep(0.01)
            text += capfd.readouterr().err
    assert signal.getsignal(sent) == signal.default_int_handler
    signal.signal(sent, before)
    assert text.startswith(f"{sent.name}: finishing the current rollout step"), text


def test_a_later_signal_ends():
    """law: a copy within seconds is ignored, a later one ends, and a second SIGINT at any time."""
    commands = [[sys.executable, "-c", LEAVING, *map(str, map(int, case[:2]))] for case in LATER]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for child, (first, _, status) in zip(children, LATER, strict=True):
        output, error = child.communicate(timeout=120)
        assert (output, child.returncode) == (f"True {first.name}\n", status), error
        assert error.count("finishing the current rollout step") == 1


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


# SIGINT is passed on as SIGTERM
@pytest.mark.parametrize(
    "sent", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_two_processes_leave_after_the_same_step(sent):
    """law: a signal to one of two processes makes both leave, after one step they agree on."""
    steps = [printed[-1] for printed in two(TOGETHER, int(sent))]
    assert steps[0] == steps[1] and steps[0].endswith(f"True {sent.name}"), steps
    assert 3 < int(steps[0].split()[2]) < 399


def test_two_processes_save_together(tmp_path):
    """law: two processes write one checkpoint, both see that it is damaged, and save it again."""
    for printed in two(SAVED, tmp_path / "checkpoints"):
        assert printed[-2:] == [
            "bits of params/noise have changed since they were saved",
            "True [1, 2] {'step': 5}",
        ]
