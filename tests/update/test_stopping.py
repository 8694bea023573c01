"""Ends of stages: rules by hand, and the same end after any interruption."""

import dataclasses
import json

from ntkrl.update import Progress, Stage, advance, enter_stage, reopened, steps_left

ROWS = ((".*", 1e-2),)


def through(stage, rewards, kl=None, progress=None):
    """Feed rollout steps until the stage ends; return its progress."""
    progress = Progress() if progress is None else progress
    kl = [0.0] * len(rewards) if kl is None else kl
    for reward, divergence in zip(rewards, kl, strict=True):
        progress = advance(stage, progress, {"reward": reward, "kl": divergence})
        if progress.ended is not None:
            break
    return progress


def test_steps():
    """by hand: three steps and no rule."""
    stage = Stage("a", 3, ROWS)
    assert through(stage, [0, 1]).ended is None
    assert through(stage, [0, 1, 2, 3]) == Progress(0, 3, (), "its 3 steps are done")


def test_plateau():
    """by hand: windows of two; 2.0 to 2.5 is a gain of 0.5, which is not more than 0.5."""
    stage = Stage("a", 99, ROWS, plateau_window=2, plateau_tolerance=0.5)
    rewards = [0.0, 1.0, 2.0, 2.0, 3.0, 2.0, 9.0]
    # means of pairs: .5 and 2; 1.5 and 2.5; 2 and 2.5
    result = through(stage, rewards)
    assert result.steps == 6 and result.rewards == (2.0, 2.0, 3.0, 2.0)
    assert result.ended == (
        "mean reward of the last 2 steps is 2.5, of the 2 before 2: no gain above 0.5"
    )
    assert through(stage, rewards[:3]).ended is None  # too few to compare
    stricter = dataclasses.replace(stage, plateau_tolerance=0.4)
    assert through(stricter, rewards).ended is None


def test_kl_budget():
    """by hand: at the budget the stage goes on, above it or without a number it ends."""
    stage = Stage("a", 99, ROWS, kl_budget=0.1)
    result = through(stage, [0, 0, 0, 0], [0.0, 0.1, 0.11, 0.0])
    assert (result.steps, result.ended) == (3, "kl 0.11 exceeds its budget of 0.1")
    assert through(stage, [0], [float("nan")]).ended is not None


def test_reasons_together():
    """by hand: the last step may be a plateau too."""
    stage = Stage("a", 2, ROWS, plateau_window=1, kl_budget=0.1)
    result = through(stage, [1.0, 1.0], [0.0, 0.2])
    assert result.ended.count(" and ") == 2 and result.ended.startswith("its 2 steps are done")


def test_stages_follow():
    """by hand: the maximal number of steps left, after an early end and in the last stage."""
    stages = [Stage("a", 5, ROWS, kl_budget=0.1), Stage("b", 2, ROWS)]
    progress = Progress()
    assert steps_left(stages, progress) == 7 and enter_stage(progress) is progress
    progress = through(stages[0], [0, 0], [0.0, 1.0])
    assert steps_left(stages, progress) == 2
    progress = enter_stage(progress)
    assert progress == Progress(stage=1)
    progress = through(stages[1], [0], progress=progress)
    assert steps_left(stages, progress) == 1
    assert steps_left(stages, through(stages[1], [0], progress=progress)) == 0


def test_interrupted_anywhere():
    """law: progress through JSON at any step, as a checkpoint keeps it, ends where it would."""
    stage = Stage("a", 99, ROWS, plateau_window=3, plateau_tolerance=0.05)
    rewards = [0.1, 0.3, 0.2, 0.7, 0.9, 0.8, 0.85, 0.88, 0.86, 0.87, 0.84, 0.86, 0.1]
    uninterrupted = through(stage, rewards)
    assert 6 < uninterrupted.steps < 13
    for cut in range(1, uninterrupted.steps):
        stored = json.dumps(dataclasses.asdict(through(stage, rewards[:cut])))
        again = through(stage, rewards[cut:], progress=Progress(**json.loads(stored)))
        assert (again.steps, again.ended) == (uninterrupted.steps, uninterrupted.ended)


def test_a_stage_that_has_become_longer_goes_on():
    """by hand: after its three steps, not after its rule, and not if it is no longer."""
    done = Progress(0, 3, (), "its 3 steps are done")
    assert reopened([Stage("a", 5, ROWS)], done) == Progress(0, 3, ())
    assert reopened([Stage("a", 3, ROWS)], done) == done
    ruled = dataclasses.replace(done, ended="kl 2 exceeds its budget of 1")
    assert reopened([Stage("a", 5, ROWS)], ruled) == ruled
    assert steps_left([Stage("a", 5, ROWS)], reopened([Stage("a", 5, ROWS)], done)) == 2
