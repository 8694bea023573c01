"""The launch scripts: what they would run, what they run, and how they tell mistakes.

Nothing here reaches a cloud: gcloud, kubectl and the like are stubs that write down their words.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
PUBLIC = ["quickstart", "local", "tpu_vm", "worker", "gke", "slurm", "paper"]
TOOLS = ["gcloud", "kubectl", "docker", "xpk", "sbatch", "srun", "scontrol"]
ODD = "--config.stages=(('it''s', \"\\b $HOME\"),)"
GOOGLE = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b"}
TOLD = '; echo "a worker ended with status $?"\''

# writes down its words; then a file of one answer a line says what it prints and its status
STUB = f"""#!{sys.executable} -SE
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answers = os.environ["CALLS"] + "." + name
lines = open(answers).read().splitlines() if os.path.exists(answers) else []
answer = json.loads(lines[0]) if lines else ["", 0]
if lines:
    open(answers, "w").write("\\n".join(lines[1:]))
print(answer[0])
sys.exit(answer[1])
"""

# takes the place of ntkrl: process k ends with the k-th status of its turn, once all have started
PROGRAM = """
import os, signal, sys, time
def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())
def leave(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # told twice, it does not get to save
    say("told to end")
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
def turns(k):
    path = os.environ["TURNS"] + "." + str(k)
    return os.path.getsize(path) if os.path.exists(path) else 0
rank, count = (int(os.environ.get("JAX_" + name, one)) for name, one in
               (("PROCESS_ID", "0"), ("NUM_PROCESSES", "1")))
turn = turns(rank)
say("started", *sys.argv[1:])
with open(os.environ["TURNS"] + "." + str(rank), "a") as file:
    file.write("x")
while min(map(turns, range(count))) <= turn:
    time.sleep(0.01)
statuses = os.environ["STATUSES"].split()
status = statuses[min(turn, len(statuses) - 1)].split(",")[rank]
if status == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if status == "falls":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
if status in ("stays", "falls"):
    time.sleep(60)
sys.exit(int(status))
"""


HEARING = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):  # a suite under nohup hands on that they are ignored
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Desk:
    """A place with stub tools on PATH, where scripts run."""

    def __init__(self, place):
        self.place, self.calls = place, place / "calls"
        self.started = []
        tools = place / "bin"
        tools.mkdir()
        for name in TOOLS:
            (tools / name).write_text(STUB)
            (tools / name).chmod(0o755)
        program = place / "program.py"
        program.write_text(PROGRAM)
        self.environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(place),
            "TMPDIR": str(place),
            "CALLS": str(self.calls),
            "TURNS": str(place / "turns"),
            "JAX_PLATFORMS": "cpu",
            "WAIT_SECONDS": "0",
            "POLL_SECONDS": "0",
        }
        self.program = f"{sys.executable} -SE {program}"

    def command(self, script):
        return ["bash", str(ROOT / "launch" / f"{script}.sh")]

    def run(self, script, *words, **settings):
        """Run a script; return (status, lines printed, what went to stderr)."""
        done = subprocess.run(
            [*self.command(script), *words],
            env={**self.environment, **settings},
            cwd=self.place,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    def start(self, script, *words, **settings):
        """Start a script and wait until `started` was printed by every process."""
        process = subprocess.Popen(
            [sys.executable, "-c", HEARING, *self.command(script), *words],
            env={**self.environment, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        for _ in range(int(settings.get("PROCESSES", 1))):
            while "started" not in process.stdout.readline():
                pass
        return process

    def answer(self, tool, *answers):
        """Say what the next calls of a tool print and which status they end with."""
        text = "\n".join(json.dumps(answer) for answer in answers)
        Path(f"{self.calls}.{tool}").write_text(text)

    def called(self):
        """Return the words of every call of a tool, in order."""
        text = self.calls.read_text() if self.calls.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def turns(self, rank=0):
        """Count how often a process was started."""
        path = self.place / f"turns.{rank}"
        return len(path.read_text()) if path.exists() else 0

    def local(self, statuses, **settings):
        return self.run("local", "--config=c", NTKRL=self.program, STATUSES=statuses, **settings)


@pytest.fixture
def desk(tmp_path):
    """Give a place with stub tools; nothing that was started there outlives a test that failed."""
    desk = Desk(tmp_path)
    yield desk
    for process in desk.started:
        process.kill()
        process.wait()


def test_scripts_are_clean():
    """law: shellcheck finds nothing in any script."""
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; the extra `test` installs it")
    done = subprocess.run(
        [program, "-x", *map(str, SCRIPTS)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert len(SCRIPTS) > 8 and done.stdout + done.stderr == ""


@pytest.mark.parametrize("script", PUBLIC)
def test_help(desk, script):
    """story: --help prints the comment at the top and runs nothing."""
    status, lines, _ = desk.run(script, "--help", PYTHON="/nonexistent")
    top = (ROOT / "launch" / f"{script}.sh").read_text().splitlines()
    assert status == 0 and lines[0] == top[1].removeprefix("# ") and len(lines) >= 3
    assert not any(line.startswith("#") or "set -e" in line for line in lines)


def test_every_setting_has_a_comment_and_can_be_given():
    """law: a line of env.sh is NAME="${NAME:-value}" and says what it is for."""
    lines = (ROOT / "launch" / "env.sh").read_text().splitlines()
    settings = [line for line in lines if line and not line.startswith("#")]
    assert len(settings) > 30
    for line in settings:
        assert re.fullmatch(r'(\w+)="\$\{\1:-[^"]*\}" +# \S.*', line), line
    names = {line.partition("=")[0] for line in settings}
    used = "".join(path.read_text() for path in SCRIPTS if path.name != "env.sh")
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", used)] == []


def test_printed_commands_are_the_commands():
    """law: a shell that reads a printed command gets the same words."""
    words = ["plain", "--a=b,c", "", "two words", "it's", '"$HOME" \\ `x`', ODD, "é*?[a]"]
    script = 'source launch/common.sh; quoted "$@"'
    printed = subprocess.check_output(["bash", "-c", script, "x", *words], cwd=ROOT, text=True)
    assert shlex.split(printed) == words


@pytest.mark.parametrize(
    "statuses", ["0 0 0", "0 143 143", "143 75 75", "75 70 70", "70 2 2", "134 70 134", "2 1 2"]
)
def test_the_worse_status(statuses):
    """by hand: the cause (1, 2, killed) before 70, 75 and 143, which follow from it; then 0."""
    first, second, worse = statuses.split()
    script = f"source launch/common.sh; worse {first} {second}; worse {second} {first}"
    printed = subprocess.check_output(["bash", "-c", script], cwd=ROOT, text=True).split()
    assert printed[0] == worse and (printed[1] == worse or "2 1" in statuses)


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
    status, lines, told = desk.run("local", "--dry-run", "--config=c", PROCESSES="3", **gpus)
    assert (status, lines) == (2, []) and "PROCESSES=3 is more than the 2 GPUs here" in told


@pytest.mark.parametrize("status", ["0", "2", "70", "75", "1"])
def test_local_passes_the_status_on(desk, status):
    """story: the program's words, lines and status are the script's; it is started once."""
    found, lines, _ = desk.local(status)
    assert (found, lines, desk.turns()) == (int(status), ["started train --config=c"], 1)


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
    """story: a run that can go on is started again up to RESTARTS times, another is not."""
    found, _, told = desk.local(statuses, RESTARTS="3")
    assert (found, desk.turns()) == (status, turns)
    assert told.count("starting again") == turns - 1


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
    """story: one of two that fails ends the other; the worst status, being the cause, is told."""
    began = time.monotonic()
    found, lines, told = desk.local(statuses, PROCESSES="2")
    assert found == status and time.monotonic() - began < 30
    assert {line[:11] for line in lines} >= {"[0] started", "[1] started"}
    if "stays" in statuses:
        waits = statuses.split(",").index("stays")
        assert f"[{waits}] told to end" in lines and "the others are told to end" in told


def test_a_process_that_does_not_end_is_killed(desk):
    """story: GRACE_SECONDS after being told, a process that still runs is killed."""
    deaf = desk.place / "deaf.py"
    source = PROGRAM.replace(
        "signal.signal(signal.SIGTERM, leave)", "signal.signal(15, signal.SIG_IGN)"
    )
    deaf.write_text(source)
    desk.program = f"{sys.executable} -SE {deaf}"
    status, _, told = desk.local("stays,2", PROCESSES="2", GRACE_SECONDS="1")
    assert status in (2, 137) and "killed" in told


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_signals_on(desk, processes, sent):
    """story: what the script's group is told, each process is told once; none is started again."""
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
    """story: told to end before it starts a run again, it ends at once with the run's status."""
    settings = {"NTKRL": desk.program, "STATUSES": "70", "RESTARTS": "5", "WAIT_SECONDS": "600"}
    process = desk.start("local", "--config=c", **settings)
    assert "starting again in 600 s" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 70 and desk.turns() == 1


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
TRAIN = f"{SSH} '--command=bash ntkrl/launch/worker.sh train ntkrl --config=c --config.seed=1{TOLD}"
DELETE = f"gcloud compute tpus queued-resources delete ntkrl {SLICE} --force --quiet"


def installing(place):
    """Return the commands that install on a slice."""
    archive = f"{place}/ntkrl.tar.gz"
    return [
        f"tar --exclude=./.git --exclude=./.venv --exclude=./runs -czf {archive} .",
        f"gcloud compute tpus tpu-vm scp {archive} ntkrl: {SLICE} --worker=all",
        f"{SSH} '--command=mkdir -p ntkrl && tar -xzf ntkrl.tar.gz -C ntkrl &&",
        f"bash ntkrl/launch/worker.sh install b{TOLD}",
    ]


def test_tpu_vm_dry_run(desk):
    """golden: the commands of each verb, in order."""

    def shown(*words):
        status, lines, told = desk.run("tpu_vm", *words, "--dry-run", SPOT="1", **GOOGLE)
        assert (status, told) == (0, "")
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
    assert shown("logs") == [f"{SSH} '--command=tail -n 50 ntkrl.log{TOLD}"]
    assert desk.called() == []


def loop(desk, *answers):
    """Run the loop with these answers of gcloud; return status and the verbs called."""
    desk.answer("gcloud", *answers)
    status, _, told = desk.run("tpu_vm", "loop", "--config=c", RESTARTS="2", **GOOGLE)
    verbs = []
    for call in desk.called():
        verb = call[4]
        if verb == "ssh":
            verb = re.search(r"worker\.sh (\w+)", call[-1]).group(1)
        verbs.append(verb)
    return status, verbs, told


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
    """story: preempted, cut off or aborted, the slice is made anew; finished, it is given back."""
    finished = ["a worker ended with status 0\na worker ended with status 0", 0]
    status, verbs, _ = loop(desk, *READY, lost, DONE, *READY, finished)
    assert (status, verbs) == (0, 2 * WAITED)


def test_tpu_vm_loop_stops_at_a_mistake(desk):
    """story: status 2 of any worker ends the loop and leaves the slice to be looked at."""
    mistake = ["a worker ended with status 2\na worker ended with status 70", 0]
    status, verbs, _ = loop(desk, *READY, mistake)
    assert (status, verbs) == (2, WAITED[:-1])


def test_tpu_vm_loop_takes_the_slice_that_is_there(desk):
    """story: an ACTIVE slice is used, a SUSPENDED one deleted and asked for again."""
    ok = ["a worker ended with status 0", 0]
    status, verbs, _ = loop(desk, ACTIVE, DONE, ok, ok)
    assert (status, verbs) == (0, ["describe", "scp", "install", "train", "delete"])
    desk.calls.unlink()
    status, verbs, _ = loop(desk, ["SUSPENDED", 0], DONE, DONE, ACTIVE, DONE, ok, ok)
    assert (status, verbs) == (0, ["describe", "delete", *ONCE[1:]])


def test_tpu_vm_loop_gives_up(desk):
    """story: requests that fail are made again RESTARTS times; one refused by gcloud is not."""
    failed = [GONE, DONE, ["FAILED", 0], DONE]
    status, verbs, told = loop(desk, *failed, *failed, *failed)
    assert (status, verbs) == (75, 3 * ["describe", "create", "describe", "delete"])
    assert told.count("starting again") == 2
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
        status, lines, told = desk.run("gke", *words, "--dry-run", **settings)
        assert (status, told, desk.called()) == (0, "", [])
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
    found, _, _ = desk.run("slurm", "--config=c", NTKRL="ntkrl", **settings)
    assert found == status
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


PAPER = {"MODEL": "m", "REWARD": "r", "RUNS": "runs", "SEEDS": "0"}


def test_paper_dry_run(desk):
    """golden: which parts there are, from which model, on which prompts, in which order."""
    status, lines, _ = desk.run("paper", "--dry-run", "--config.mesh.fsdp=8", DATA="d", **PAPER)
    found = []
    for line in lines:
        words = dict(word.partition("=")[::2] for word in shlex.split(line))
        verb = "train" if "launch/local.sh" in words else line.split()[3]
        names = ("model.path", "data.path", "data.eval_path", "eval.name", "eval.base")
        config = words["--config"].removeprefix("configs/paper/") if "--config" in words else None
        found.append((verb, config, *(words.get(f"--config.{name}") for name in names)))
    start, before = "runs/sft/export", "runs/sft/evaluations"
    files = {name: f"runs/data/{name}.jsonl" for name in ("sft", "rl", "test")}
    selected = {name: f"runs/data/{name}_selected.jsonl" for name in ("rl", "test")}
    scored = ("evaluate", "evaluation.py:pythia-2.8b")
    expected = [
        ("prepare", "data.py:pythia-2.8b", "m", None, None, None, None),
        ("train", "sft.py:pythia-2.8b", "m", files["sft"], None, None, None),
        (*scored, start, files["rl"], selected["rl"], "statistics", None),
        (*scored, start, files["rl"], selected["test"], "test", None),
    ]
    for method in ("rl", "grpo", "cfrl"):
        config, export = f"{method}.py:pythia-2.8b", f"runs/{method}-0/export"
        expected.append(("train", config, start, files["rl"], files["test"], None, None))
        for name, prompts, base in (("train", "rl", "statistics"), ("test", "test", "test")):
            given = (export, files["rl"], selected[prompts], name, f"{before}/{base}.jsonl")
            expected.append((*scored, *given))
    assert status == 0 and found == [*expected, ("report", None, None, None, None, None, None)]
    statistics = f"--config.reward.normalisation={before}/statistics.rewards.json"
    assert sum(statistics in line and "--config.mesh.fsdp=8" in line for line in lines) == 10
    given = [word for word in lines[0].split() if "prepare." in word]
    published = "d/ultrafeedback_binarized"
    assert given == [
        f"--config.prepare.preferences={published}/train_prefs",
        f"--config.prepare.test={published}/test_prefs",
        "--config.prepare.supervised=d/alpaca_farm/sft",
    ]
    assert lines[-1].endswith("report runs/rl-0 runs/grpo-0 runs/cfrl-0 --out=runs/report")


def test_paper_of_another_model_and_in_miniature(desk):
    """golden: SFT on chosen responses, runs of its own; tiny inputs in place of those given."""
    settings = {**PAPER, "DATA": "d", "RUNS": "", "VARIANT": "llama-3.2-1b"}
    _, lines, _ = desk.run("paper", "--dry-run", **settings)
    assert not any("supervised" in line for line in lines)
    assert all("runs/paper-llama-3.2-1b/" in line for line in lines)
    assert sum("llama-3.2-1b " in line for line in lines) == len(lines) - 1
    small = desk.run("paper", "--dry-run", "--config.mesh.fsdp=8", MINIATURE="1")[1]
    assert sum("--config=configs/paper/miniature.py:" in line for line in small) == len(small) - 2
    assert small[0].endswith("-m configs.paper.made_up runs/miniature/inputs")
    assert "--config.model.path=runs/miniature/inputs/pythia" in small[1]


@pytest.fixture
def published(desk):
    """Directories of published data, and what the script is told."""
    for name in ("alpaca_farm", "ultrafeedback_binarized"):
        (desk.place / name).mkdir()
    runs = desk.place / "runs"
    return {**PAPER, "DATA": str(desk.place), "RUNS": str(runs), "NTKRL": desk.program}


def test_paper_goes_on_where_it_stopped(desk, published):
    """story: a part that fails ends the script; what is there is not made again."""
    runs = desk.place / "runs"
    done = [runs / "data" / "summary.json", runs / "sft" / "evaluations" / "statistics.json"]
    for path in done:
        path.parent.mkdir(parents=True)
        path.touch()
    # sft and its other evaluation, rl and its evaluations, then a mistake in grpo
    status, lines, told = desk.run("paper", STATUSES="0 0 0 0 0 2", **published)
    assert status == 2 and all(f"{path} exists" in told for path in done)
    verbs = ["train", "evaluate", "train", "evaluate", "evaluate", "train"]
    assert [line.split()[1] for line in lines] == verbs
    assert "grpo.py" in lines[-1]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_paper_passes_signals_on(desk, published, sent):
    """story: told to end, it ends the part that runs and begins no other."""
    (desk.place / "runs" / "data").mkdir(parents=True)
    (desk.place / "runs" / "data" / "summary.json").touch()
    process = desk.start("paper", **{**published, "STATUSES": "stays"})
    os.killpg(process.pid, sent)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "started" not in rest and "told to end" in rest


@pytest.mark.parametrize(
    ("script", "words", "settings", "told"),
    [
        ("local", [], {"PROCESSES": "two"}, ["no --config=FILE", "PROCESSES=two is not a whole"]),
        ("local", ["--config=c"], {"PROCESSES": "0"}, ["PROCESSES=0 is less than one"]),
        ("tpu_vm", ["loop"], {}, ["BUCKET", "PROJECT", "ZONE", "no --config=FILE"]),
        ("tpu_vm", [], GOOGLE, ["the first argument must be create, install"]),
        ("worker", ["train"], {}, ["name of the run", "no --config=FILE"]),
        ("gke", ["run"], {"TOPOLOGY": "3x3"}, ["IMAGE", "BUCKET", "TOPOLOGY=3x3", "no --config"]),
        ("gke", ["run"], {"TOPOLOGY": "big"}, ["TOPOLOGY=big", "is not of the form 4x4"]),
        ("gke", ["xpk"], {}, ["CLUSTER", "PROJECT", "ZONE", "STORAGE", "IMAGE"]),
        ("slurm", [], {"TASKS_PER_NODE": "3"}, ["TASKS_PER_NODE=3 is neither", "no --config"]),
        ("slurm", ["--config=c"], {"NODES": "x", "NTKRL": "n"}, ["NODES=x is not a whole number"]),
        (
            "paper",
            ["mesh=1"],
            {"DATA": "/none"},
            ["MODEL", "REWARD", "/none/alpaca_farm", "mesh=1"],
        ),
        ("paper", [], {"VARIANT": "gpt-5"}, ["VARIANT=gpt-5 is neither pythia-2.8b, pythia-1b"]),
    ],
)
def test_mistakes_are_told_together(desk, script, words, settings, told):
    """story: all that is missing in one sentence, status 2, and nothing was run."""
    status, lines, error = desk.run(script, *words, **settings)
    assert (status, lines, desk.called()) == (2, [], [])
    assert error.count("\n") == 1 and error.startswith(f"{script}.sh: ")
    assert [part for part in told if part not in error] == []


def test_missing_programs_are_told(desk):
    """story: a tool that is not installed is a mistake like any other."""
    shutil.rmtree(desk.place / "bin")
    path = desk.place / "bin"
    path.mkdir()
    for name in ("bash", "sed", "dirname", "basename"):
        (path / name).symlink_to(shutil.which(name))
    status, _, told = desk.run("tpu_vm", "create", PATH=str(path), PROJECT="p")
    assert status == 2 and "ZONE is not set" in told and "gcloud is not installed" in told
