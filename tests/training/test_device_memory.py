"""What a run chooses by the memory of its devices."""

import json
import math

import jax
import pytest

from ntkrl import data, runtime
from ntkrl.settings import read_settings
from ntkrl.setup import Prompts, RunSetup, set_up
from ntkrl.training import device_bytes, device_memory, host_memory
from tests.plan.test_programs import run_of, settings  # noqa: F401


@pytest.mark.parametrize(
    ("limit", "chosen"), [(100, (1, 90)), (89, (2, 50)), (49, (4, 30)), (10, (8, 20))]
)
def test_the_fewest_that_fit(limit, chosen):
    """by hand: peaks of 10 + 80 / n where it compiles; the last where none fits."""
    peaks = {1: 90, 2: 50, 4: 30, 8: 20}
    assert device_memory.fewest_microbatches([*peaks], limit, peaks.get) == chosen
    assert device_memory.fewest_microbatches([1, 2], 100, {2: 50}.get) == (2, 50)


@pytest.fixture
def setup(tmp_path):
    """Return the setup of a small supervised run on eight devices."""
    words = [
        "--config=configs/sft.py",
        f"--config.run_dir={tmp_path}",
        "--config.data.prompts_per_step=256",
        "--config.data.examples=256",
        "--config.data.max_prompt_tokens=32",
        "--config.rollout.max_completion_tokens=32",
    ]
    return set_up(read_settings(runtime.read_config(words)), tmp_path)


def test_a_run_is_fitted_once(setup, tmp_path, monkeypatch, capsys):
    """story: two parts fit where one does not; a resumed run keeps them; CPUs have no limit."""
    assert device_memory.fit(setup, tmp_path).settings.microbatches == 1  # as a CPU's run before
    # parts that eight devices divide
    assert setup.settings.microbatch_counts(setup.model.mesh)[:3] == [1, 2, 4]
    peaks = {count: device_memory._update_peak(setup, count) for count in (1, 2)}
    assert peaks[2] < 0.9 * peaks[1]
    monkeypatch.setattr(device_memory, "_update_peak", lambda setup, count: peaks[count])
    monkeypatch.setattr(runtime, "device_memory", lambda mesh: (peaks[1] + peaks[2]) / 2)
    fitted = device_memory.fit(setup, tmp_path)
    assert fitted.settings.schedule.microbatches == 2
    assert "microbatches of 256 rows: 2 (an update needs 0.0 of 0.0 GiB" in capsys.readouterr().out
    device_memory.save_layout(fitted, tmp_path)
    monkeypatch.setattr(runtime, "device_memory", lambda mesh: 2 * peaks[1])
    assert device_memory.fit(setup, tmp_path).settings.microbatches == 2
    # another mesh: chosen again
    path = tmp_path / device_memory.LAYOUT_FILE
    path.write_text(json.dumps({"mesh": {"data": 4}, "microbatches": 2}))
    assert device_memory.fit(setup, tmp_path).settings.microbatches == 1


def test_what_cannot_be_sampled_is_refused(settings):  # noqa: F811
    """by hand: two copies of the params and two moments in eight parts, a whole copy, one row."""
    run = run_of(settings("rl"))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.model.params))
    # keys and values of 8 + 23 columns in two layers of 16 numbers, and their mask, of one row
    cache = 31 * (2 * 2 * 16 * 4 + 1)
    kept = sum(map(device_bytes, run.resident(run.stages[0]).values()))
    device_memory.check_sampling(run, kept + 4 * count + cache + 4)
    with pytest.raises(ValueError) as error:
        device_memory.check_sampling(run, kept + 4 * count + cache + 3)
    assert "sampling does not fit: it needs at least 0.0 of 0.0 GiB per device" in str(error.value)
    assert "(data=8 × tensor=1)" in str(error.value)
    assert str(error.value).endswith("; set rollout.mesh.tensor=2.")
    full = run_of(settings("rl", "--config.rollout.mesh.tensor=2"))
    with pytest.raises(ValueError, match=r"set rollout.cache_dtype=bfloat16 or model.compute"):
        device_memory.check_sampling(full, kept)


def test_memory_of_a_rollout_is_linear_in_its_rows():
    """by hand: 100 and 3 a row; 1000 hold 300 rows, 90 none."""
    memory = host_memory.RolloutMemory(fixed=100.0, sampled=2.0, updated=3.0)
    assert memory.needed(10) == 130.0
    assert (memory.most_rows(1000.0), memory.most_rows(90.0)) == (300, 0)


def test_rollouts_that_do_not_fit_the_host_are_refused(settings, monkeypatch):  # noqa: F811
    """by hand: with memory for 500 of 640 rows a prompt may have six completions, not eight."""
    words = ["--config.data.prompts_per_step=80", "--config.rollout.completions_per_prompt=8"]
    run = run_of(settings("rl", *words), 1)
    prompts = Prompts(None, [[1, 2, 3]], [], (1,))
    setup = RunSetup(run.settings, run.model, prompts, None, None, None)
    memory = host_memory.rollout_memory(run, 8)
    assert memory.fixed > 0 and memory.sampled > run.budget * 33
    monkeypatch.setattr(host_memory, "host_memory", lambda: memory.needed(500))
    with pytest.raises(ValueError, match=r"rollout.completions_per_prompt=6 is the most that fits"):
        host_memory.check_host(setup, run, lambda setup, count: None)
    # the compiler's figure counts where the arrays alone would fit
    monkeypatch.setattr(host_memory, "host_memory", lambda: memory.needed(640))
    host_memory.check_host(setup, run, lambda setup, count: memory.fixed)
    with pytest.raises(ValueError, match="does not fit this host's memory: 80 prompts × 8"):
        host_memory.check_host(setup, run, lambda setup, count: 2 * memory.needed(640))


def test_evaluations_that_do_not_fit_the_host_are_refused(settings):  # noqa: F811
    """by hand: two prompts × 3 samples × 2 repeats of a row's bytes, with memory for 11 of 12."""
    words = ["--config.eval.samples_per_prompt=3", "--config.data.max_prompt_tokens=8"]
    words += ["--config.eval.repeats=2"]
    run = run_of(settings("rl", *words), 1)
    texts = data.PromptSet(("a b c", "d"), {}, "made")
    held_out = Prompts(texts, [[1, 2, 3], [1]], [], (2,))
    setup = RunSetup(run.settings, run.model, held_out, held_out, None, None)
    row = host_memory.token_bytes(host_memory.SAMPLE_BYTES, 8, run.budget)
    host_memory.check_evaluation(setup, 12.0 * row)
    with pytest.raises(ValueError, match=r"2 held-out prompts × 3 .*eval.samples_per_prompt=2 is"):
        host_memory.check_evaluation(setup, 11.0 * row)
    with pytest.raises(ValueError, match=r"lower eval.prompts, eval.repeats or rollout.max_compl"):
        host_memory.check_evaluation(setup, 3.0 * row)
