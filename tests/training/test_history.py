"""Statistics over past probe readings, read back from files."""

import numpy as np

from ntkrl.training.history import History


def test_damaged_readings_are_reported(tmp_path, capsys):
    """law: a reading that cannot be read is left out, and its file is named once."""
    readings = {step: {"log_probs": np.full(3, 0.5 * step)} for step in (1, 2, 3, 4)}
    for step, arrays in readings.items():
        np.savez(tmp_path / f"step_{step:06d}.npz", **arrays)
    damaged = tmp_path / "step_000002.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    history = History(tmp_path)
    metrics = history.linearity(4, readings[4])
    assert metrics["probe/linearity"] == 1.0  # of steps 1, 3 and 4
    message = f"{damaged} is damaged; statistics over past readings leave it out"
    assert capsys.readouterr().out.count(message) == 1
    history.linearity(5, {"log_probs": np.full(3, 2.5)})
    assert capsys.readouterr().out == ""
