"""A directory with stub tools on PATH, in which tests run the launch scripts.

Nothing here reaches a cloud: gcloud, kubectl and the like are stubs that write their arguments to
a file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TOOLS = ["gcloud", "kubectl", "docker", "xpk", "sbatch", "srun", "scontrol"]
ODD = "--config.stages=(('it''s', \"\\b $HOME\"),)"
GOOGLE = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b"}


# logs its arguments; then prints the next line of a file of answers and ends with its status
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


# stands in for ntkrl: process k ends with the k-th status of its turn, once all have started
PROGRAM = """
import os, signal, sys, time
def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())
def leave(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second signal ends it before it saves
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
    """A directory with stub tools on PATH, in which scripts run."""

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
        """Run a script; return (status, lines of stdout, stderr)."""
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
        """Set what the next calls of a tool print and the status each ends with."""
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
