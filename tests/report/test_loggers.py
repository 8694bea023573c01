"""Tests of the back ends: event files read back, and W&B through a stand-in for its package."""

import json
import math
import struct
import sys
import time
import types

import pytest

from ntkrl.report import LoggingSettings, MetricsWriter, check_loggers, loggers, open_loggers


def shown(directory):
    """Read event files as TensorBoard does: a new session hides the steps that it replaces.

    Returns `{tag: {step: value}}` of scalars and `{step: text}` under "stage".
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    events = {}
    for path in sorted(directory.iterdir()):
        rest = path.read_bytes()
        while rest:
            (length,) = struct.unpack("<Q", rest[:8])  # then 4 bytes of checksum, twice
            event = Event.FromString(rest[12 : 12 + length])
            rest = rest[16 + length :]
            if event.session_log.status == SessionLog.START:
                for steps in events.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                text = value.HasField("tensor")
                tag = value.tag.removesuffix("/text_summary")
                content = value.tensor.string_val[0].decode() if text else value.simple_value
                events.setdefault(tag, {})[event.step] = content
    return events


def write(run, resume_step, steps, aliases=None):
    """Write a reward of step / 4 and timings to TensorBoard, as a run that is resumed would."""
    loggers = open_loggers(LoggingSettings(True, None, None, aliases), run, "rl", resume_step)
    with MetricsWriter(run, resume_step, loggers) as writer:
        for step in steps:
            writer.write(step, {"reward": step / 4, "kl": math.nan, "stage": "ab"[step // 2]})
            writer.write_timings(step, {"sample_seconds": 1.0, "eval_seconds": 8.0})


def test_tensorboard_by_hand(tmp_path):
    """By hand: numbers are scalars, a text is written at the step where it changed, timings too."""
    write(tmp_path, -1, range(4), aliases="trl")
    result = shown(tmp_path / "tensorboard")
    assert result["reward"] == result["train/reward"] == {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75}
    assert result["stage"] == {0: "a", 2: "b"}
    assert result["timings/eval_seconds"] == dict.fromkeys(range(4), 8.0)
    # evaluations are no training: 9 would count them
    assert result["step_time"] == result["train/step_time"] == dict.fromkeys(range(4), 1.0)
    assert result["train/global_step"] == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}
    assert math.isnan(result["kl"][1])
    # metrics.jsonl keeps one name per thing
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    assert line == {"step": 2, "reward": 0.5, "kl": None, "stage": "b"}


def test_a_resumed_run_hides_what_it_takes_again(tmp_path):
    """Story: a run dies at step 3, its checkpoint is of step 1; it dies twice more on its way."""
    write(tmp_path, -1, range(4))
    write(tmp_path, 1, [])
    assert shown(tmp_path / "tensorboard")["reward"] == {0: 0.0, 1: 0.25}
    write(tmp_path, 1, [2])
    assert shown(tmp_path / "tensorboard")["reward"] == {0: 0.0, 1: 0.25, 2: 0.5}
    # from the start, where there was no checkpoint
    write(tmp_path, -1, [0])
    assert shown(tmp_path / "tensorboard")["reward"] == {0: 0.0}


class FakeWandb(types.ModuleType):
    """A recorder of a run's start, logged values and end."""

    class Error(Exception):
        """As W&B's."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.rows, self.axes, self.ended = [], [], [], []
        self.refusal = None

    def init(self, **settings):
        """Start a run, which is the module itself."""
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.started.append(settings)
        return self

    def define_metric(self, name, step_metric=None):
        """Remember an axis."""
        self.axes.append((name, step_metric))

    def log(self, values):
        """Remember a row."""
        self.rows.append(values)

    def finish(self, exit_code):
        """Remember how it ended."""
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def open_wandb(run, aliases=None):
    """Open W&B alone."""
    return open_loggers(LoggingSettings(False, "project", None, aliases), run, "rl", -1)


def test_wandb_goes_on_with_its_run(tmp_path, wandb):
    """Story: a run fails and is resumed under one id; steps are values, so that they may fall."""
    run = tmp_path / "rl-0"
    run.mkdir()
    (run / "config.json").write_text('{"seed": 3}')
    check_loggers(LoggingSettings(False, "project", None, None))
    with pytest.raises(KeyError), MetricsWriter(run, -1, open_wandb(run)) as writer:
        writer.write(1, {"reward": 0.5, "stage": "all"})
        raise KeyError
    with MetricsWriter(run, -1, open_wandb(run, "verl")) as writer:
        writer.write(0, {"reward": 0.25})
    first, second = wandb.started
    assert first == second
    assert len(first.pop("id")) == 8
    expected = {"project": "project", "group": "rl", "name": "rl-0", "resume": "allow"}
    assert first == expected | {"dir": str(run), "config": {"seed": 3}}
    assert wandb.axes == [("step", None), ("*", "step")] * 2
    assert wandb.rows == [
        {"step": 1, "reward": 0.5, "stage": "all"},
        {"step": 0, "reward": 0.25, "critic/score/mean": 0.25},
    ]
    assert wandb.ended == [1, 0]
    # another directory is another run, even with the same config
    other = tmp_path / "rl-1"
    other.mkdir()
    (other / "config.json").write_text('{"seed": 3}')
    open_wandb(other)
    assert wandb.started[-1]["id"] != (run / "wandb_id").read_text().strip()


def test_wandb_refuses(tmp_path, wandb):
    """Law: W&B's error is passed on with possible fixes."""
    (tmp_path / "config.json").write_text("{}")
    wandb.refusal = "no API key."
    with pytest.raises(ValueError, match="no API key. Log in with `wandb login`, set WANDB_MODE"):
        open_wandb(tmp_path)


class FakeTrackio(types.ModuleType):
    """A recorder with the functions of trackio 0.36 that are used, as its `Run` has them."""

    def __init__(self):
        super().__init__("trackio")
        self.started, self.rows, self.ended = [], [], 0
        self.refusal = None

    def init(self, project, name, group, config, resume, embed):
        """Start or continue a run, which is the module itself."""
        if self.refusal is not None:
            raise ValueError(self.refusal)
        fields = {"project": project, "group": group, "config": config, "resume": resume}
        self.started.append((name, fields | {"embed": embed}))
        return self

    def log(self, metrics, step=None):
        """Remember a row."""
        self.rows.append((step, metrics))

    def finish(self):
        """Count the ends."""
        self.ended += 1


def open_trackio(run, aliases=None):
    """Open trackio alone."""
    return open_loggers(LoggingSettings(False, None, "project", aliases), run, "rl", -1)


def test_trackio_goes_on_with_its_run(tmp_path, monkeypatch):
    """Story: a run fails and is resumed under one name, which another directory does not get."""
    trackio = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    runs = [tmp_path / place / "rl-0" for place in "ab"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "config.json").write_text('{"seed": 3}')
    with pytest.raises(KeyError), MetricsWriter(runs[0], -1, open_trackio(runs[0])) as writer:
        writer.write(1, {"reward": 0.5, "stage": "all"})
        raise KeyError
    with MetricsWriter(runs[0], -1, open_trackio(runs[0], "verl")) as writer:
        writer.write(0, {"reward": 0.25})
    open_trackio(runs[1])
    (first, fields), (second, _), (other, _) = trackio.started
    assert first == second != other and first.startswith("rl-0-") and len(first) == len("rl-0-") + 8
    expected = {"project": "project", "group": "rl", "config": {"seed": 3}, "resume": "allow"}
    assert fields == expected | {"embed": False}
    assert trackio.rows == [
        (1, {"reward": 0.5, "stage": "all"}),
        (0, {"reward": 0.25, "critic/score/mean": 0.25}),
    ]
    assert trackio.ended == 2
    trackio.refusal = "Project name 'project' is not allowed."
    with pytest.raises(ValueError, match="did not start the run: Project name .* allowed. "):
        open_trackio(runs[1])


def test_trackio_itself(tmp_path, monkeypatch):
    """Story: the real package, where it is installed, keeps the values of both halves of a run."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    (tmp_path / "config.json").write_text("{}")
    for start in (0, 2):
        with MetricsWriter(tmp_path, -1, open_trackio(tmp_path)) as writer:
            for step in range(start, start + 3):
                writer.write(step, {"reward": step / 4, "kl": math.nan})
    (run,) = trackio.Api().runs("project")
    assert run.name.startswith(tmp_path.name)
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    logged = [row for row in storage.get_logs("project", run.name) if "reward" in row]
    assert [row["step"] for row in logged] == [0, 1, 2, 2, 3, 4]
    assert [row["reward"] for row in logged] == [0, 0.25, 0.5, 0.5, 0.75, 1.0]


def test_missing_packages(monkeypatch):
    """Law: all are named at once, with the extras to install; none is needed by default."""
    for package in ("tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)
    check_loggers(LoggingSettings(False, None, None, None))
    with pytest.raises(ValueError) as caught:
        check_loggers(LoggingSettings(True, "project", "project", None))
    first, second, third = str(caught.value).splitlines()
    assert "logging.tensorboard needs the package tensorboardX" in first
    assert "pip install 'ntkrl[tensorboard]'" in first and "pip install 'ntkrl[wandb]'" in second
    assert "logging.trackio needs the package trackio" in third and "'ntkrl[trackio]'" in third


def test_settings():
    """By hand: empty projects and aliases without a logger are refused, all at once."""
    with pytest.raises(ValueError) as caught:
        LoggingSettings(False, "", " ", None)
    assert str(caught.value).count("is empty; name a project, or None for none") == 2
    with pytest.raises(ValueError, match="needs logging.tensorboard, logging.wandb or logging.tra"):
        LoggingSettings(False, None, None, "trl")
    assert LoggingSettings(False, None, "project", "trl").enabled == ("trackio",)


def test_a_full_disk(small_disk, capfd):
    """story: a sentence, no trace, and nothing waits.

    SummaryWriter's thread used to print a trace, and its queue of ten to fill up: a run then waited
    for ever.
    """
    directory = small_disk("64k") / "tensorboard"
    logger, deadline = loggers.TensorBoard(directory, -1), time.monotonic() + 20
    with pytest.raises(OSError, match=f"the event file in {directory} cannot be written.*No space"):
        for step in range(10**9):
            assert time.monotonic() < deadline
            logger.write(step, {f"probe/{number}": 1.0 for number in range(20)})
            time.sleep(0.01)
    logger.close(failed=True)
    with pytest.raises(OSError, match="cannot be written"):
        loggers.TensorBoard(directory, -1).close(failed=False)
    assert "Traceback" not in capfd.readouterr().err
