"""launch/gke.sh and launch/slurm.sh: manifests, commands and requeues."""

import shlex
import signal

import pytest
import yaml

from tests.launch.desk import GOOGLE, ODD, ROOT


def test_jobset(desk):
    """golden: statuses 1, 2, 126 and 127 fail the JobSet, all others restart it."""
    settings = {**GOOGLE, "IMAGE": "i/j:1", "RESTARTS": "7", "TOPOLOGY": "4x8"}
    status, lines, _ = desk.run("gke", "run", "--dry-run", "--config=c", ODD, **settings)
    assert status == 0 and lines[0] == "kubectl apply -f -" and desk.called() == []
    text = "\n".join(lines[1:])
    assert "${" not in text.replace("${ }", "")
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7  # RestartJobSet is what is done where no rule fits
    assert policy["rules"] == [
        {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes = {"containerName": "ntkrl", "operator": "In", "values": [1, 2, 126, 127]}
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": codes}]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (8, 8, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy works with no other
    (container,) = pod["containers"]
    words = ["python", "-m", "ntkrl", "train", "--config.run_dir=/bucket/ntkrl", "--config=c", ODD]
    assert container["command"] == words
    assert container["image"] == "i/j:1" and container["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"


def test_gke_dry_run(desk):
    """golden: the commands of the other verbs."""
    settings = {**GOOGLE, "IMAGE": "i", "CLUSTER": "c", "STORAGE": "s"}

    def shown(*words):
        status, lines, error = desk.run("gke", *words, "--dry-run", **settings)
        assert (status, error, desk.called()) == (0, "", [])
        return lines

    assert shown("image") == [
        "docker build --file launch/Dockerfile --tag i .",
        "docker push i",
    ]
    assert shown("xpk", "--config=c") == [
        "xpk workload create --workload=ntkrl --cluster=c --project=p --zone=z "
        "--tpu-type=v5litepod-16 --docker-image=i --max-restarts=20 "
        "--restart-on-exit-codes=70,75 --termination-grace-period-seconds=120 --storage=s "
        "'--command=exec python -m ntkrl train --config.run_dir=/bucket/ntkrl --config=c'"
    ]
    assert shown("state") == ["kubectl get jobset ntkrl"]
    assert shown("delete") == ["kubectl delete jobset ntkrl"]


def test_slurm_dry_run(desk):
    """golden: outside a job it submits itself, within one it starts the processes."""
    words = ("--dry-run", "--config=c", ODD)
    status, lines, _ = desk.run("slurm", *words, NODES="2", PARTITION="gpu")
    wrapped = shlex.split(lines[0])
    assert status == 0 and wrapped[:-1] == (
        "sbatch --job-name=ntkrl --nodes=2 --ntasks-per-node=8 --cpus-per-task=8 --time=24:00:00 "
        "--gpus-per-node=8 --partition=gpu --signal=TERM@120 --requeue --open-mode=append "
        f"--chdir={ROOT}"
    ).split(" ")
    inner = shlex.split(wrapped[-1].removeprefix("--wrap="))
    assert inner == ["exec", "bash", "launch/slurm.sh", "--config=c", ODD]
    status, lines, _ = desk.run("slurm", *words, SLURM_JOB_ID="7")
    assert status == 0 and shlex.split(lines[0]) == [
        *"srun --ntasks-per-node=8 --cpus-per-task=8 --label --kill-on-bad-exit=0".split(),
        *"--wait=600 .venv/bin/python -m ntkrl train --config=c".split(),
        ODD,
    ]
    assert desk.called() == []


@pytest.mark.parametrize(
    ("status", "before", "requeued"),
    [(75, 0, True), (70, 2, True), (75, 3, False), (2, 0, False), (0, 0, False), (134, 0, True)],
)
def test_slurm_queues_again(desk, status, before, requeued):
    """story: a run that can go on is queued again, at most RESTARTS times."""
    desk.answer("srun", ["", status])
    settings = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(before), "RESTARTS": "3"}
    code, _, _ = desk.run("slurm", "--config=c", NTKRL="ntkrl", **settings)
    assert code == status
    calls = [call for call in desk.called() if call[0] == "scontrol"]
    assert calls == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_slurm_leaves_a_cancelled_job(desk):
    """story: a job that Slurm itself ends is not queued again by the script."""
    stub = desk.place / "bin" / "srun"
    stub.write_text("#!/bin/sh\necho started\nsleep 1\nexit 75\n")
    process = desk.start("slurm", "--config=c", NTKRL="ntkrl", SLURM_JOB_ID="7")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75 and desk.called() == []
