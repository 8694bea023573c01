"""launch/tpu_vm.sh and launch/worker.sh: commands of each verb, and restarts of a slice."""

import re

import pytest

from tests.launch.desk import GOOGLE

END = '; echo "a worker ended with status $?"\''
SLICE = "--project=p --zone=z"
SSH = (
    f"gcloud compute tpus tpu-vm ssh ntkrl {SLICE} --worker=all "
    "'--ssh-flag=-o ServerAliveInterval=30'"
)
STATE = f"gcloud compute tpus queued-resources describe ntkrl {SLICE} '--format=value(state.state)'"
CREATE = (
    "gcloud compute tpus queued-resources create ntkrl --node-id=ntkrl "
    f"--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot {SLICE}"
)
TRAIN = f"{SSH} '--command=bash ntkrl/launch/worker.sh train ntkrl --config=c --config.seed=1{END}"
DELETE = f"gcloud compute tpus queued-resources delete ntkrl {SLICE} --force --quiet"


def installing(place):
    """Return the commands that install on a slice."""
    archive = f"{place}/ntkrl.tar.gz"
    return [
        f"tar --exclude=./.git --exclude=./.venv --exclude=./runs -czf {archive} .",
        f"gcloud compute tpus tpu-vm scp {archive} ntkrl: {SLICE} --worker=all",
        f"{SSH} '--command=mkdir -p ntkrl && tar -xzf ntkrl.tar.gz -C ntkrl &&",
        f"bash ntkrl/launch/worker.sh install b{END}",
    ]


def test_tpu_vm_dry_run(desk):
    """golden: the commands of each verb, in order."""

    def shown(*words):
        status, lines, error = desk.run("tpu_vm", *words, "--dry-run", SPOT="1", **GOOGLE)
        assert (status, error) == (0, "")
        return lines

    training = ("--config=c", "--config.seed=1")
    assert shown("create") == [CREATE, STATE]
    assert shown("install") == installing(desk.place)
    assert shown("run", *training) == [TRAIN]
    assert shown("loop", *training) == [
        STATE,
        CREATE,
        STATE,
        *installing(desk.place),
        TRAIN,
        DELETE,
    ]
    assert shown("state") == [STATE]
    assert shown("delete") == [DELETE]
    assert shown("logs") == [f"{SSH} '--command=tail -n 50 ntkrl.log{END}"]
    assert desk.called() == []


def loop(desk, *answers):
    """Run the loop with these answers of gcloud; return status, verbs called and stderr."""
    desk.answer("gcloud", *answers)
    status, _, error = desk.run("tpu_vm", "loop", "--config=c", RESTARTS="2", **GOOGLE)
    verbs = []
    for call in desk.called():
        verb = call[4]
        if verb == "ssh":
            verb = re.search(r"worker\.sh (\w+)", call[-1]).group(1)
        verbs.append(verb)
    return status, verbs, error


ONCE = ["describe", "create", "describe", "scp", "install", "train", "delete"]
GONE, ACTIVE, DONE = ["", 1], ["ACTIVE", 0], ["", 0]
READY = [GONE, DONE, ["PROVISIONING", 0], ACTIVE, DONE, ["a worker ended with status 0", 0]]
WAITED = ["describe", "create", "describe", "describe", "scp", "install", "train", "delete"]


@pytest.mark.parametrize(
    "lost",
    [
        ["a worker ended with status 70\na worker ended with status 75", 0],
        ["Connection to 1.2.3.4 closed", 255],
        ["a worker ended with status 0\nworker 1: connection lost", 1],
        ["a worker ended with status 134", 0],
    ],
)
def test_tpu_vm_loop_begins_again(desk, lost):
    """story: preempted, disconnected or aborted, a slice is recreated; finished, it is deleted."""
    finished = ["a worker ended with status 0\na worker ended with status 0", 0]
    status, verbs, _ = loop(desk, *READY, lost, DONE, *READY, finished)
    assert (status, verbs) == (0, 2 * WAITED)


def test_tpu_vm_loop_stops_at_a_mistake(desk):
    """story: status 2 of any worker ends the loop and leaves the slice for inspection."""
    mistake = ["a worker ended with status 2\na worker ended with status 70", 0]
    status, verbs, _ = loop(desk, *READY, mistake)
    assert (status, verbs) == (2, WAITED[:-1])


def test_tpu_vm_loop_takes_the_slice_that_is_there(desk):
    """story: an ACTIVE slice is used, a SUSPENDED one deleted and requested again."""
    ok = ["a worker ended with status 0", 0]
    status, verbs, _ = loop(desk, ACTIVE, DONE, ok, ok)
    assert (status, verbs) == (0, ["describe", "scp", "install", "train", "delete"])
    desk.calls.unlink()
    status, verbs, _ = loop(desk, ["SUSPENDED", 0], DONE, DONE, ACTIVE, DONE, ok, ok)
    assert (status, verbs) == (0, ["describe", "delete", *ONCE[1:]])


def test_tpu_vm_loop_gives_up(desk):
    """story: failed requests are repeated RESTARTS times; one refused by gcloud is not."""
    failed = [GONE, DONE, ["FAILED", 0], DONE]
    status, verbs, error = loop(desk, *failed, *failed, *failed)
    assert (status, verbs) == (75, 3 * ["describe", "create", "describe", "delete"])
    assert error.count("starting again") == 2
    desk.calls.unlink()
    status, verbs, _ = loop(desk, GONE, ["no permission", 1])
    assert (status, verbs) == (1, ["describe", "create"])


def test_worker_dry_run(desk):
    """golden: the process of one worker; its place comes from the machine's metadata."""
    status, lines, _ = desk.run("worker", "train", "name", "--dry-run", "--config=c")
    assert status == 0 and lines == [
        f"flock --nonblock --conflict-exit-code=75 {desk.place}/ntkrl.lock env "
        "JAX_COORDINATOR_ADDRESS=HOST:8476 JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=NUMBER "
        ".venv/bin/python -m ntkrl train --config.run_dir=/bucket/name --config=c"
    ]
    status, lines, _ = desk.run("worker", "install", "b", "--dry-run")
    assert status == 0 and "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 b /bucket" in lines
    assert lines[-1].endswith("--editable '.[tpu]'")


@pytest.mark.parametrize(
    "endpoints", ["host-0,host-1", "unknown:unknown:host-0,unknown:unknown:host-1"]
)
def test_worker_finds_its_place(desk, endpoints):
    """story: both forms of the metadata name the same place."""
    bin_ = desk.place / "bin"
    (bin_ / "curl").write_text(
        f'#!/bin/sh\ncase "$4" in *endpoints) echo "{endpoints}";; *number) echo 1;; esac\n'
    )
    (bin_ / "flock").write_text('#!/bin/sh\necho "$@"\nexit 70\n')
    for name in ("curl", "flock"):
        (bin_ / name).chmod(0o755)
    status, lines, _ = desk.run("worker", "train", "name", "--config=c")
    assert status == 70 and (desk.place / "ntkrl.log").read_text().splitlines() == lines
    place = "JAX_COORDINATOR_ADDRESS=host-0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1"
    assert place in lines[0]
