"""A run is asked to leave: by SIGTERM alone, or together with the other processes."""

import os
import signal
import socket
import subprocess
import sys

from ntkrl import runtime

TOGETHER = """
import os, signal, sys, time, jax
from ntkrl import runtime
runtime.start_processes()
with runtime.Notice() as notice:
    for step in range(1, 400):
        if step == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if notice.reached(step):
            break
        time.sleep(0.02 * (1 + jax.process_index()))
left = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print("left after", step, left, flush=True)
"""


def test_sigterm_is_told_once():
    """law: the first SIGTERM is noted and the next one ends the process; afterwards as before."""
    before = signal.getsignal(signal.SIGTERM)
    with runtime.Notice() as notice:
        assert not notice.reached(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.reached(1) and notice.reached(2)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_processes_leave_after_the_same_step():
    """law: a SIGTERM of one of two processes makes both leave, after one step they agree on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER],
            env=given | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [child.communicate(timeout=120)[0].strip().splitlines()[-1] for child in children]
    assert told[0] == told[1] and told[0].endswith("True"), told
    assert 3 < int(told[0].split()[2]) < 399
