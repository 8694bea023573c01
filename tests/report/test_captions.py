"""Captions: definitions, and numbers computed from the runs."""

import dataclasses
import re

from ntkrl.report import read_run
from ntkrl.report.captions import SIGNS, change, changes
from ntkrl.report.figures import FIGURES
from ntkrl.report.page import write_report

# words that claim a direction or a cause for runs that the writer of the caption has not seen
CLAIMS = (
    r"\b(rises?|rose|falls?|fell|grows?|shrinks?|improves?|helps?|hurts?|expected|because|causes?)\b",
    r"\b(better|worse|faster|slower|narrows|surer|generalise|pushes|spills|should|trusted|remedy)\b",
)


def mirrored(run):
    """The same run backwards: what rose falls."""
    numbers = {}
    for line in run.metrics:
        for name, value in line.items():
            if isinstance(value, float):
                numbers.setdefault(name, []).append(value)
    lines = [
        {n: numbers[n].pop() if isinstance(v, float) else v for n, v in line.items()}
        for line in run.metrics
    ]
    return dataclasses.replace(run, metrics=lines)


def test_captions_claim_nothing():
    """Law: titles, captions and the convention of signs hold whatever was measured."""
    texts = [text for spec in FIGURES for text in (spec.title, spec.caption)]
    claims = [match[0] for text in texts for words in CLAIMS for match in re.finditer(words, text)]
    assert claims == [] and len(texts) == 2 * len(FIGURES)
    assert re.search(CLAIMS[0], "Training the classifier first helps") is not None


def test_changes_by_hand(run_paths):
    """By hand: reward 0.1 + 0.02 · step (+ 0.1 for seed 1), and the same run backwards."""
    runs = [read_run(path) for path in run_paths[:2]]
    reward = next(spec for spec in FIGURES if spec.stem == "reward")
    assert reward.describe(runs).endswith(
        "First → last: rl: held-out reward 0.150 → 0.550 (+0.400)."
    )
    backwards = [mirrored(run) for run in runs]
    words = "First → last: rl: held-out reward 0.550 → 0.150 (−0.400)."
    assert reward.describe(backwards).endswith(words)
    assert change(runs, "kl") is None and changes(runs, [("kl", "KL")]) == ""
    entropy = next(spec for spec in FIGURES if spec.stem == "entropy")
    assert "probe set 2.000 → 1.200 (−0.800)" in entropy.describe(runs)
    assert "probe set 1.200 → 2.000 (+0.800)" in entropy.describe(backwards)


def test_the_page_states_its_signs_once(run_paths, tmp_path, monkeypatch):
    """Law: one convention, in words; tables have the sign of typography as figures do."""
    monkeypatch.setattr("ntkrl.report.page.FIGURES", ())
    text = write_report(run_paths, tmp_path / "out").read_text(encoding="utf-8")
    assert text.count(SIGNS[:40]) == 1
    cells = re.findall(r"<td>([^<]*)</td>", text)
    assert cells and not [cell for cell in cells if re.match(r"-\d", cell)]
    assert "−" in "".join(cells)
