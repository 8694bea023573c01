"""The progress bar: no time left is shown before two steps, and the first does not count."""

import io
import re

from ntkrl.training import progress_bar
from ntkrl.training.progress_bar import StepBar


def test_times(monkeypatch):
    """by hand: a first step of 100 s, then steps of 2 s; 7 of 10 left are 14 s."""
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: now[0])
    with StepBar(total=10, initial=0, file=io.StringIO(), mininterval=0) as bar:
        assert "<?, ?it/s" in str(bar)
        now[0] = 100.0
        bar.update()
        assert "<?, ?it/s" in str(bar)
        for _ in range(2):
            now[0] += 2.0
            bar.update()
        assert re.search(r"3/10 .*<00:14, +2.00s/it", str(bar))


def test_recent_steps_count(monkeypatch):
    """by hand: the rate is that of the last 30 steps."""
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: now[0])
    with StepBar(total=100, initial=20, file=io.StringIO()) as bar:
        for seconds in [50.0] * 3 + [0.5] * 31:
            now[0] += seconds
            bar.update()
        assert bar.format_dict["rate"] == 2.0
