"""By hand: arguments of reward functions, sums of rewards, and every error message."""

import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.reward import RewardFunction, RewardSet, read_normalisation, write_rewards

PROMPTS, TEXTS, IDS = ["p", "p"], ["a", "bb"], [[1, 0], [2, 2, 0]]


def _set(*calls, weights=None):
    weights = [1.0] * len(calls) if weights is None else weights
    return RewardSet(
        tuple(RewardFunction(c.__name__, c, w) for c, w in zip(calls, weights, strict=True))
    )


def _reward(*calls, columns=None, **options):
    columns = {} if columns is None else columns
    return _set(*calls)(PROMPTS, TEXTS, IDS, columns, **options)


def length(completions):
    return [len(text) for text in completions]


def first_only(completions, **kwargs):
    return [5.0] + [None] * (len(completions) - 1)


def test_weighted_sum_over_functions_that_apply():
    result = _set(length, first_only, weights=[0.5, -2.0])(PROMPTS, TEXTS, IDS, {})
    # 0.5 * 1 - 2 * 5 and 0.5 * 2; an average over functions would give -4.75 and 1.
    np.testing.assert_array_equal(result.rewards, [-9.5, 1.0])
    np.testing.assert_array_equal(result.per_function["length"], [1.0, 2.0])
    np.testing.assert_array_equal(result.per_function["first_only"], [5.0, np.nan])
    assert result.rewards.dtype == result.per_function["length"].dtype == np.float32


def test_everything_is_given_by_keyword():
    seen = {}

    def record(**kwargs):
        seen.update(kwargs)
        return [0, 0]

    _reward(record, columns={"target": (1, None)})
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": PROMPTS,
        "completions": TEXTS,
        "completion_ids": IDS,
        "trainer_state": None,
        "target": [1, None],
    }


def test_only_named_arguments_without_kwargs():
    def named(target, *, completion_ids, threshold=3):
        assert threshold == 3
        return [t + len(ids) for t, ids in zip(target, completion_ids, strict=True)]

    result = _reward(named, columns={"target": [10, 20], "unused": [0, 0]})
    np.testing.assert_array_equal(result.rewards, [12, 23])


def test_conversational_completions_are_messages():
    def read(completions):
        assert all(m[0]["role"] == "assistant" and len(m) == 1 for m in completions)
        return [len(m[0]["content"]) for m in completions]

    np.testing.assert_array_equal(_reward(read, conversational=True).rewards, [1, 2])


def test_functions_cannot_change_what_others_see():
    def clear(completions, completion_ids, target):
        completions[:], target[:] = ["zzz", "zzz"], [9, 9]
        completion_ids[0].append(7)
        return [0, 0]

    def look(completions, completion_ids, target):
        assert (completions, completion_ids, target) == (TEXTS, [[1, 0], [2, 2, 0]], [1, 2])
        return [1, 1]

    target = [1, 2]
    np.testing.assert_array_equal(_reward(clear, look, columns={"target": target}).rewards, [1, 1])
    assert target == [1, 2]


def test_async_functions_are_awaited():
    async def waited(completions):
        return [0.5] * len(completions)

    np.testing.assert_array_equal(_reward(waited).rewards, [0.5, 0.5])


def test_logged_values_are_averaged_and_extras_collected():
    def one(completions, log_metric, log_extra):
        log_metric("depth", 1)
        log_metric("depth", 4)
        log_extra("parsed", [text.upper() for text in completions])
        return [0, 0]

    result = _reward(one)
    assert result.logged == {"depth": 2.5}
    assert result.extra == {"parsed": ["A", "BB"]}


@pytest.mark.parametrize(
    "returned",
    [
        (1, 0),
        [True, False],
        [np.float32(1), np.int64(0)],
        [np.bool_(True), Fraction(0)],
        np.asarray([1, 0]),
        jnp.asarray([1.0, 0.0]),
        [jnp.float32(1), np.asarray(0.0)],
    ],
)
def test_numbers_of_every_kind(returned):
    np.testing.assert_array_equal(_reward(lambda completions: returned).rewards, [1, 0])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 rewards for 2 completions; allowed is a list of one finite number"),
        (None, r"returned NoneType \(None\); allowed"),
        (1.0, "returned float"),
        ("ab", "returned str"),
        ({"a": 1}, "returned dict"),
        (np.ones((2, 1)), "returned ndarray"),
        (
            [0.0, math.nan],
            "row 1 is nan for the completion 'bb'\nAllowed is a list of one finite number",
        ),
        ([math.inf, 0.0], "row 0 is inf for the completion 'a'"),
        ([1e300, 0.0], r"row 0 is 1e\+300"),
        ([10**400, 0.0], "row 0 is 1000"),
        (["1.0", 0.0], "row 0 is '1.0' for the completion 'a'"),
        ([[1.0], 0.0], r"row 0 is \[1.0\]"),
        ([1j, 0.0], "row 0 is 1j"),
        (np.asarray([0.0, np.nan]), "row 1 is nan"),
    ],
)
def test_bad_results(returned, message):
    def bad(completions):
        return returned

    with pytest.raises(ValueError, match=message) as caught:
        _reward(bad)
    assert "reward function bad returned" in str(caught.value)


def test_long_completions_are_shortened_and_rows_counted():
    def bad(completions):
        return [math.nan] * 12

    with pytest.raises(ValueError, match="and 2 more") as caught:
        _set(bad)(["p"] * 12, ["x" * 5000] * 12, [[]] * 12, {})
    assert len(str(caught.value)) < 2000


def test_row_to_which_nothing_applies():
    message = r"(?s)every reward function returned None for 1 completions.*row 1, 'bb'.*must apply"
    with pytest.raises(ValueError, match=message):
        _reward(first_only)


def test_raising_function_is_named_and_chained():
    def divide(completions):
        return [1 / 0]

    with pytest.raises(ValueError, match="reward function divide raised ZeroDivisionError: div"):
        _reward(divide)
    with pytest.raises(ValueError, match=r"at .*test_reward_set.py:\d+\. ") as caught:
        _reward(divide)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_required_parameter_that_is_no_column():
    def needs(completions, targets, other, optional=1):
        raise AssertionError("must not be called")

    with pytest.raises(ValueError, match="do not fit") as caught:
        _reward(needs, columns={"target": [1, 2]})
    message = str(caught.value)
    assert "needs requires 'targets', which is not a column; did you mean 'target'?" in message
    assert "needs requires 'other', which is not a column" in message
    assert "optional" not in message
    assert "Columns are: target; always provided are prompts, completions" in message


def test_column_with_a_name_of_the_contract():
    with pytest.raises(ValueError, match="the column 'completions' has a name .* rename it"):
        _reward(length, columns={"completions": TEXTS})


def test_lengths_differ():
    with pytest.raises(
        ValueError, match="there are 2 completions, but prompts has 1, target has 3"
    ):
        _set(length)(["p"], TEXTS, IDS, {"target": [1, 2, 3]})


def test_equal_names():
    a = RewardFunction("score", length, source="a.py:score")
    b = RewardFunction("score", length, source="b.py:score")
    with pytest.raises(ValueError, match=r"named 'score' \(a.py:score, b.py:score\); rename"):
        RewardSet((a, b))
    with pytest.raises(ValueError, match="no reward function given"):
        RewardSet(())


def test_what_cannot_be_a_reward_function():
    with pytest.raises(ValueError, match="x: weight is nan; it must be a finite number"):
        RewardFunction("x", length, math.nan)
    with pytest.raises(ValueError, match="x is int, not a function"):
        RewardFunction("x", 3)
    with pytest.raises(ValueError, match="x takes completions by position only.*remove the '/'"):
        RewardFunction("x", lambda completions, /: [])
    with pytest.raises(ValueError, match="x: its parameters cannot be read"):
        RewardFunction("x", max)


def test_processes_share_the_prompts():
    """law: three processes call a function for their prompts; all get the single-process result."""
    texts = [["a", "bb", "ccc"][row % 3] + str(row) for row in range(10)]
    prompts, ids = [f"p{row // 2}" for row in range(10)], [[row] for row in range(10)]
    columns = {"answer": list(range(10))}
    calls = {"scored": [], "whole": []}

    def scored(prompts, completions, answer, log_metric, log_extra):
        calls["scored"].append(prompts)
        log_metric("mean", sum(answer) / len(answer))
        log_extra("row", answer)
        return [0.1 * a if a % 3 else None for a in answer]

    def whole(prompts, completions):
        calls["whole"].append(prompts)
        return [float(len(text)) for text in completions]

    functions = (RewardFunction("scored", scored), RewardFunction("whole", whole, on_mesh=True))
    alone = RewardSet(functions)(prompts, texts, ids, columns, group=2)
    calls["scored"], calls["whole"] = [], []
    messages, meeting = [None] * 3, threading.Barrier(3)

    def process(number):
        def agree(name, value):
            messages[number] = json.dumps(value)
            meeting.wait(30)
            return [json.loads(message) for message in messages]

        def own_part(count):
            return slice(count * number // 3, count * (number + 1) // 3)

        return RewardSet(functions, own_part, agree)(prompts, texts, ids, columns, group=2)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(process, range(3)))
    # five prompts of two completions: 1, 2 and 2
    assert sorted(calls["scored"]) == [prompts[:2], prompts[2:6], prompts[6:]]
    assert calls["whole"] == [prompts] * 3
    for result in results:
        np.testing.assert_array_equal(result.rewards, alone.rewards)
        for name, values in alone.per_function.items():
            np.testing.assert_array_equal(result.per_function[name], values)
        assert result.extra == alone.extra
        # means of calls: of rows 0-1, 2-5, 6-9
        assert result.logged["mean"] == pytest.approx((0.5 + 3.5 + 7.5) / 3)


def test_a_process_without_prompts_calls_nothing():
    """law: fewer prompts than processes leave some without, and no function sees empty lists."""

    def agree(name, value):
        other = {"length": {"rewards": [1.0, 2.0], "metrics": {}, "extra": {}, "failure": None}}
        assert value["length"]["rewards"] == []
        return [value, other]

    def refuses(completions):
        raise AssertionError("called")

    functions = (RewardFunction("length", refuses),)
    result = RewardSet(functions, lambda count: slice(0, 0), agree)(
        PROMPTS, TEXTS, IDS, {}, group=2
    )
    np.testing.assert_array_equal(result.rewards, [1.0, 2.0])


def test_by_hand(tmp_path):
    """by hand: mean 2, unbiased variance 4 of (0, 2, 4, null); a reward of 6 becomes 2."""
    path = tmp_path / "rewards.json"
    write_rewards(path, {"armo": np.array([0.0, 2.0, 4.0, np.nan])})
    (shift, scale), *_ = read_normalisation(path).values()
    assert (shift, scale) == (2.0, np.sqrt(4.0 + 1e-8))
    function = RewardFunction("armo", lambda completions: [6.0, 2.0], 3.0, None, shift, scale)
    result = RewardSet((function,))(["p", "p"], ["a", "b"], [[1], [1]], {})
    np.testing.assert_allclose(result.rewards, [6.0, 0.0], rtol=1e-6)
    # metrics keep the function's own numbers
    np.testing.assert_array_equal(result.per_function["armo"], [6.0, 2.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has no rewards"),
        (json.dumps({"rewards": {"a": [1.0]}}), "'a' needs at least two finite rewards"),
        (json.dumps({"rewards": {"a": 3}}), "'a' needs at least two finite rewards"),
    ],
)
def test_files_that_do_not_serve(tmp_path, content, message):
    path = tmp_path / "rewards.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_normalisation(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_normalisation(tmp_path / "none.json")


def test_rows_are_named_by_their_place():
    """by hand: of the user's file, in errors and in causes of failures; the second of two."""

    def broken(completions):
        return [1.0, "good"]

    rewards = RewardSet(
        (RewardFunction("broken", broken),), place=lambda row: f"prompts.jsonl:{row + 6}"
    )
    with pytest.raises(ValueError, match=r"\n  prompts.jsonl:7 is 'good' for the completion 'bb'"):
        rewards(PROMPTS, TEXTS, IDS, {})
    counted = dataclasses.replace(
        rewards, functions=(RewardFunction("broken", broken, on_failure=0.0),)
    )
    assert "prompts.jsonl:7 is" in counted(PROMPTS, TEXTS, IDS, {}).failures["broken"]
    with pytest.raises(ValueError, match=r"\n  prompts.jsonl:6, 'a'"):
        dataclasses.replace(
            rewards, functions=(RewardFunction("none", lambda completions: [None, 1]),)
        )(PROMPTS, TEXTS, IDS, {})


@pytest.mark.parametrize(
    ("name", "columns", "hint"),
    [
        ("solution", ("answer", "level"), "did you mean 'answer'"),
        ("ground_truth", ("label",), "did you mean 'label'"),
        ("answers", ("answer",), "did you mean 'answer'"),
        ("completion", ("answer",), "did you mean 'completions'"),
        ("solution", ("level",), "which is not a column\n"),
    ],
)
def test_the_column_that_was_meant(name, columns, hint):
    """by hand: of the same meaning before one of near spelling; no name of the contract by luck."""
    code = {}
    exec(f"def needs(completions, {name}): return []", code)  # noqa: S102
    with pytest.raises(ValueError, match=hint):
        _set(code["needs"]).check_columns(columns)
