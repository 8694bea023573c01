"""Seconds to open the rollouts view: `python -m tests.bench.rollouts_page [--completions 10000]`.

A run of made-up completions of 64 tokens, 10 prompts × 8 a step, its report, and the view in a
headless Chromium, from the disk: until the list stands, and until a group of completions that was
chosen stands.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from ntkrl.report import write_report
from tests import browser
from tests.report.conftest import write_run
from tests.report.made_rollouts import write_rollouts

PROMPTS, GROUP, LENGTH = 10, 8, 64


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = write_run(Path(place) / "rl", "rl", 0)
        steps = range(1, options.completions // (PROMPTS * GROUP) + 1)
        write_rollouts(run, steps, count=PROMPTS, group=GROUP, length=LENGTH)
        size = sum(path.stat().st_size for path in (run / "rollouts").iterdir())
        begin = time.perf_counter()
        page = write_report([run], Path(place) / "report").with_name("rollouts.html")
        seconds = time.perf_counter() - begin
        files = list((page.parent / "rollouts_view").iterdir())
        print(f"{len(steps) * PROMPTS * GROUP} completions, {size / 2**20:.1f} MiB in the run")
        total = sum(path.stat().st_size for path in files) / 2**20
        print(f"report: {seconds:.1f} s, {len(files)} files of {total:.1f} MiB")
        measure(page, options.repeats, len(steps) // 2)


def measure(page: Path, repeats: int, step: int) -> None:
    """Print the medians of some openings."""
    opened, chosen = [], []
    profile = tempfile.mkdtemp()
    with browser.Browser(browser.find(), Path(profile)) as chromium:
        for _ in range(repeats):
            begin = time.perf_counter()
            tab = browser.Page(chromium, page, 1200)
            while tab.run("() => document.querySelectorAll('.groups tbody tr').length") < 10:
                time.sleep(0.01)
            opened.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            tab.run("(hash) => { location.hash = hash; }", f"#0/{step}/g3")
            while tab.run("() => document.querySelectorAll('.card').length") < GROUP:
                time.sleep(0.01)
            chosen.append(time.perf_counter() - begin)
            assert tab.complaints() == [], json.dumps(tab.complaints())
    print(f"the list stands after {statistics.median(opened):.2f} s (slowest {max(opened):.2f})")
    print(f"a group stands after {statistics.median(chosen):.2f} s (slowest {max(chosen):.2f})")


if __name__ == "__main__":
    main()
