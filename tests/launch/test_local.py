"""launch/local.sh: its processes, their exit statuses, restarts and signals."""

import os
import re
import shlex
import signal
import sys
import time

import pytest

from tests.launch.desk import ODD, PROGRAM


def test_local_dry_run(desk):
    """golden: one process is the command alone; two get their places."""
    status, lines, _ = desk.run("local", "--config=c", "--dry-run", ODD)
    words = [".venv/bin/python", "-m", "ntkrl", "train", "--config=c", ODD]
    assert status == 0 and [shlex.split(line) for line in lines] == [words]
    _, lines, _ = desk.run("local", "--dry-run", CONFIG="c", PROCESSES="2", PORT="8")
    assert lines == [
        "env JAX_COORDINATOR_ADDRESS=127.0.0.1:8 JAX_NUM_PROCESSES=2 "
        f"JAX_PROCESS_ID={rank} JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo "
        ".venv/bin/python -m ntkrl train --config=c"
        for rank in (0, 1)
    ]


def test_local_gives_each_process_a_gpu(desk):
    """golden: of the GPUs that may be used, one each; more processes than GPUs are a mistake."""
    gpus = {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": "5,3"}
    _, lines, _ = desk.run("local", "--dry-run", "--config=c", PROCESSES="2", **gpus)
    shown = [re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", line).group(1) for line in lines]
    assert shown == ["5", "3"] and "gloo" not in "".join(lines)
    status, lines, error = desk.run("local", "--dry-run", "--config=c", PROCESSES="3", **gpus)
    assert (status, lines) == (2, []) and "PROCESSES=3 is more than the 2 GPUs here" in error


@pytest.mark.parametrize("status", ["0", "2", "70", "75", "1"])
def test_local_passes_the_status_on(desk, status):
    """story: the program's arguments, output and status are the script's; it is started once."""
    code, lines, _ = desk.local(status)
    assert (code, lines, desk.turns()) == (int(status), ["started train --config=c"], 1)


@pytest.mark.parametrize(
    ("statuses", "status", "turns"),
    [
        ("75 70 0", 0, 3),
        ("killed 0", 0, 2),
        ("75 2 0", 2, 2),
        ("75 1 0", 1, 2),
        ("75", 75, 4),  # once, and RESTARTS times
    ],
)
def test_local_starts_again(desk, statuses, status, turns):
    """story: a run that can resume is restarted up to RESTARTS times, another is not."""
    code, _, error = desk.local(statuses, RESTARTS="3")
    assert (code, desk.turns()) == (status, turns)
    assert error.count("starting again") == turns - 1


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ("2,stays", 2),
        ("stays,1", 1),
        ("70,75", 70),
        ("0,75", 75),
        ("killed,70", 137),
        ("falls,75", 75),
    ],
)
def test_one_process_ends_the_others(desk, statuses, status):
    """story: one of two that fails ends the other; the worst status, the cause, is returned."""
    began = time.monotonic()
    code, lines, error = desk.local(statuses, PROCESSES="2")
    assert code == status and time.monotonic() - began < 30
    assert {line[:11] for line in lines} >= {"[0] started", "[1] started"}
    if "stays" in statuses:
        waits = statuses.split(",").index("stays")
        assert f"[{waits}] told to end" in lines and "the others get SIGTERM" in error


def test_a_process_that_does_not_end_is_killed(desk):
    """story: GRACE_SECONDS after SIGTERM, a process that still runs is killed."""
    deaf = desk.place / "deaf.py"
    source = PROGRAM.replace(
        "signal.signal(signal.SIGTERM, leave)", "signal.signal(15, signal.SIG_IGN)"
    )
    deaf.write_text(source)
    desk.program = f"{sys.executable} -SE {deaf}"
    status, _, error = desk.local("stays,2", PROCESSES="2", GRACE_SECONDS="1")
    assert status in (2, 137) and "killed" in error


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_signals_on(desk, processes, sent):
    """story: a signal to the script's group reaches each process once; none is restarted."""
    process = desk.start(
        "local",
        "--config=c",
        NTKRL=desk.program,
        STATUSES="stays,stays",
        PROCESSES=processes,
        RESTARTS="5",
    )
    os.killpg(process.pid, sent)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "started" not in rest
    assert rest.count("told to end") == int(processes)


def test_local_ends_while_it_waits(desk):
    """story: terminated while waiting to restart, it ends at once with the run's status."""
    settings = {"NTKRL": desk.program, "STATUSES": "70", "RESTARTS": "5", "WAIT_SECONDS": "600"}
    process = desk.start("local", "--config=c", **settings)
    assert "starting again in 600 s" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 70 and desk.turns() == 1
