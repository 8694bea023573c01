"""The step ledger: columns against predictions of the real step, samples against JVPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntkrl
from ntkrl import attribution, ntk, numerics, probe, update
from ntkrl.attribution import MEASURES
from ntkrl.probe import noise_from_squares
from ntkrl.scoring import score
from tests.probe.test_prober import probe_set
from tests.toys import TINY, toy_params, toy_policy
from tests.update.test_train_step import make_batch

pytestmark = pytest.mark.usefixtures("x64")
BUDGET = 3
OBJECTIVE = update.Objective(
    clip_low=0.5, clip_high=0.5, kl_place="loss", kl_coefficient=0.3, entropy_coefficient=0.05
)
FIELDS = {"name": "x", "steps": 9, "parameters": ((".*", 1e-3),), "max_grad_norm": 0.5}
NAMES = ("policy", "kl", "bonus")


def model(kind):
    """A toy policy, or a tiny GPT-NeoX, in float64; that of two layers has a tied head."""
    if kind == "toy":
        return toy_policy(), toy_params(toy_policy(), dtype=jnp.float64)
    layers = 2 if kind == "layers" else 1
    settings = {**TINY, "tie_word_embeddings": kind != "untied", "num_hidden_layers": layers}
    policy, params = ntkrl.build("GPTNeoXForCausalLM", settings, jax.random.key(0))
    return policy, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


class Case:
    """A real optimizer step, the last of a few, and the probe tokens that its ledger covers."""

    def __init__(self, kind="toy", steps=3, microbatches=1, objective=OBJECTIVE, **fields):
        self.objective, self.stage = objective, update.Stage(**{**FIELDS, **fields})
        self.begin(*model(kind))

        def loss(statistics, batch):
            return update.policy_loss(objective, BUDGET, statistics, batch)

        minimised = update.policy_loss_fn(self.policy, loss)
        self.step = jax.jit(update.make_step(self.bound_stage, minimised, microbatches))
        for number in range(steps):
            self.before, self.batch = self.after, make_batch(self.policy.vocab_size, seed=number)
            self.after, *_ = self.step(self.before, self.batch)

    def begin(self, policy, params):
        """Bind the stage to a model; no step is taken yet."""
        self.policy = policy
        self.terms = update.policy_loss_fn(policy, update.policy_terms(self.objective, BUDGET))
        self.bound_stage = update.bind_stage(self.stage, policy, params)
        self.before = self.after = update.init_state(self.bound_stage, params, jax.random.key(0))
        self.batch = make_batch(policy.vocab_size)
        self.prober = probe.Prober(policy, probe_set(policy.vocab_size), params)

    def ledger(self, **settings):
        """The ledger of the stage."""
        static = self.policy, self.terms, self.bound_stage.optimizer, self.bound_stage.trained
        return attribution.Ledger(*static, **settings)

    def described(self, gradients=None):
        """Arguments of `Ledger.read`."""
        step = attribution.OptimizerStep(
            self.before, self.after.params, self.batch, gradients=gradients
        )
        return step, self.prober.contexts, self.prober.targets

    def read(self, gradients=None, actual=None, **settings):
        """Arrays of the step's ledger."""
        account = self.ledger(**settings).read(*self.described(gradients), actual)
        self.noise = account.noise
        return account.arrays

    def measured(self, params):
        """Log-probs and entropies of the probe tokens `[2, O]`, by plain functions."""
        where = self.prober.contexts
        phi = self.policy.features(params, where.tokens, where.mask)[where.rows, where.positions]
        log_pi = jax.nn.log_softmax(self.policy.head(params, phi), axis=-1)
        chosen = jnp.take_along_axis(log_pi, self.prober.targets[:, None], axis=-1)[:, 0]
        return jnp.stack([chosen, -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)])


def first_order(arrays, measure, group=None):
    """Sum the columns of a measure, of all groups or of one."""
    total = 0.0
    for name, value in arrays.items():
        parts = name.split("/", 2)
        if parts[0] == measure and len(parts) == 3 and group in (None, parts[2]):
            total = total + (value.sum(axis=1) if value.ndim == 2 else value)
    return total


def assert_close(result, expected, rtol=1e-10):
    """Compare within `rtol` of the largest entry."""
    np.testing.assert_allclose(result, expected, rtol=0, atol=rtol * np.abs(expected).max())


MLP = (("layers/mlp/.*", 1e-3), ("head/.*", 1e-3), (".*", None))
CASES = {
    "sgd": ("toy", {"optimizer": "sgd", "parameters": ((".*", 1e-1),)}),
    "momentum": ("toy", {"optimizer": "sgd", "momentum": 0.9, "max_grad_norm": None}),
    "adam": ("toy", {"schedule": "cosine", "warmup_steps": 2}),
    "no first moment": ("toy", {"b1": 0.0}),
    "adamw": ("toy", {"optimizer": "adamw", "weight_decay": 0.5}),
    "head": ("toy", {"parameters": (("head", 1e-3), (".*", None))}),
    "adafactor": ("toy", {"optimizer": "adafactor", "weight_decay": 0.5}),
    "muon": ("untied", {"optimizer": "muon", "weight_decay": 0.5, "parameters": MLP}),
    "tied": ("tied", {"optimizer": "adamw", "weight_decay": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_columns_add_up(name):
    """oracle: the columns of each group are the JVP of θ' − θ, and nothing is left over.

    KL (k3) and entropy bonus are in the loss, the gradient is clipped but once, two steps went
    before.
    """
    kind, fields = CASES[name]
    case = Case(kind, **fields)
    arrays = case.read(by="group")
    before, after = case.before.params, case.after.params
    moved = jax.tree.map(jnp.subtract, after, before)
    where, targets = case.prober.contexts, case.prober.targets
    predicted = ntk.predict(case.policy, before, moved, where, targets)
    size = np.abs(first_order(arrays, "log_prob")).max()
    for group, value in predicted.items():
        result = first_order(arrays, "log_prob", group)
        np.testing.assert_allclose(result, value, rtol=0, atol=1e-10 * size)
    pushed = jax.jit(lambda *arguments: jax.jvp(case.measured, *arguments)[1])((before,), (moved,))
    measured = jax.jit(case.measured)
    actual = measured(after) - measured(before)
    for m, measure in enumerate(MEASURES):
        assert_close(first_order(arrays, measure), pushed[m])
        assert_close(arrays[f"{measure}/actual"], actual[m])
        assert_close(arrays[f"{measure}/curvature"], actual[m] - pushed[m], rtol=1e-8)
        left = sum(arrays[f"{measure}/optimizer/{group}"] for group in predicted)
        assert np.abs(left).max() < 1e-10 * np.abs(pushed[m]).max()
    has = {
        column: sum(np.abs(arrays[f"log_prob/{column}/{g}"]).max() for g in predicted)
        for column in (*NAMES, "momentum", "decay")
    }
    assert all(has[term] > 1e-4 * size for term in NAMES)
    first_moment = name not in ("sgd", "no first moment", "adafactor")
    assert (has["momentum"] > 1e-3 * size) == first_moment
    assert (has["decay"] > 1e-3 * size) == ("weight_decay" in fields)


def test_what_is_not_linear_is_shown():
    """law: an optimizer of signs is all remainder, and the columns still add up."""
    case = Case()
    optimizer = optax.lion(1e-3)
    state = optimizer.init(case.before.params)
    grads = jax.grad(lambda p: sum(t.total for t in case.terms(p, case.batch)[0].values()))
    updates, _ = optimizer.update(grads(case.before.params), state, case.before.params)
    case.before = case.before.replace(opt_state=state)
    case.after = case.after.replace(params=optax.apply_updates(case.before.params, updates))
    case.bound_stage = dataclasses.replace(case.bound_stage, optimizer=optimizer)
    arrays = case.read(by="group")
    _, pushed = jax.jvp(case.measured, (case.before.params,), (updates,))
    assert_close(first_order(arrays, "log_prob"), pushed[0])
    left = arrays["log_prob/optimizer/head"] + arrays["log_prob/optimizer/body"]
    assert np.abs(left).max() > 0.9 * np.abs(pushed[0]).max()


def test_samples_by_hand():
    """oracle: Adam's formula, one gradient and one JVP per sample, term and role of the head."""
    case = Case(optimizer="adamw", weight_decay=0.5)
    arrays = case.read()
    before, batch = case.before.params, case.batch
    count = int(np.sum(batch.completion_mask))

    def gradient(term, rows):
        gradient_parts = jax.tree.map(lambda leaf: leaf[rows], batch)
        result = jax.grad(lambda p: case.terms(p, gradient_parts)[0][term].total)(before)
        return {name: leaf / count for name, leaf in result.items()}

    grads = {term: jax.jit(lambda r, t=term: gradient(t, r)) for term in NAMES}
    every = [grads[term](np.arange(8)) for term in NAMES]
    total = {name: sum(gradient_parts[name] for gradient_parts in every) for name in before}
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in total.values()))
    factor = 0.5 / norm
    assert factor < 1
    state = case.before.opt_state["parameters"].inner_states
    scale = {}
    for name in before:
        (adam, *_), _ = state[name].inner_state
        nu = adam.nu[name] * 0.999 + 0.001 * (factor * total[name]) ** 2
        scale[name] = -1e-3 * factor * 0.1 / (1 - 0.9**3) / (np.sqrt(nu / (1 - 0.999**3)) + 1e-8)

    def flat(row):
        gradient_parts = [grads[term](np.array([row])) for term in NAMES]
        return jnp.concatenate(
            [sum(part[name] for part in gradient_parts).ravel() for name in before]
        )

    rows = 8 * jnp.stack([flat(row) for row in range(8)])
    noise = noise_from_squares(jnp.sum(rows**2, axis=1), jnp.sum(jnp.mean(rows, axis=0) ** 2))
    for result, expected in zip(case.noise, noise, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-9)
    push = jax.jit(lambda change: jax.jvp(case.measured, (before,), (change,))[1])
    for term in NAMES:
        for row in range(8):
            gradient_parts = grads[term](np.array([row]))
            for group in ("head", "body"):
                change = {
                    name: scale[name] * leaf * ((name == "head") == (group == "head"))
                    for name, leaf in gradient_parts.items()
                }
                for m, expected in enumerate(push(change)):
                    result = arrays[f"{MEASURES[m]}/{term}/{group}"][:, row]
                    np.testing.assert_allclose(result, expected, rtol=1e-8, atol=1e-15)


def test_forms_and_chunks_agree():
    """law: jvp = vjp = one sample and one sequence at a time; by layer, the head tied."""
    rows = (("(embed|layers/mlp)/.*", 1e-3), (".*", None))
    objective = dataclasses.replace(OBJECTIVE, entropy_coefficient=0)
    case = Case("layers", steps=2, objective=objective, parameters=rows)
    groups = ntk.by_layer(case.policy, case.before.params)
    by_jvp = case.read(algorithm="jvp", groups=groups)
    small = {"algorithm": "vjp", "groups": groups, "memory_gib": 1e-9}
    estimate = case.ledger(**small).estimates(*case.described())["vjp"]
    assert (estimate.chunk, estimate.block) == (1, 1)
    by_vjp = case.read(**small)
    assert by_jvp.keys() == by_vjp.keys()
    for name, value in by_jvp.items():
        scale = np.abs(first_order(by_jvp, name.split("/")[0])).max()
        np.testing.assert_allclose(by_vjp[name], value, rtol=0, atol=1e-10 * scale)
    assert by_jvp["log_prob/policy/layer 1"].shape == (len(case.prober.targets), 8)
    moved = {group for _, group in groups if np.abs(by_jvp[f"log_prob/policy/{group}"]).max() > 0}
    assert moved == {"embed", "layer 0", "layer 1"}


def test_parts_of_a_batch_change_nothing():
    """law: micro-batches of the step and of the ledger; samples sum to the ledger by group."""
    unsplit, parted = Case(), Case(microbatches=4)
    samples = unsplit.read()
    for result in (parted.read(by="group", microbatches=4), parted.read(microbatches=2)):
        assert result.keys() == samples.keys()
        for name, value in samples.items():
            scale = np.abs(first_order(samples, name.split("/")[0])).max()
            pair = [v if v.ndim == 1 else v.sum(axis=1) for v in (value, result[name])]
            np.testing.assert_allclose(*pair, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_step_hands_out_its_gradients(microbatches):
    """law: a step that returns its gradients, and measured values passed in, change no column."""
    case = Case(optimizer="adamw", weight_decay=0.5)
    step = jax.jit(update.make_step_with_term_gradients(case.bound_stage, case.terms, microbatches))
    after, metrics, gradients = step(case.before, case.batch)
    plain, expected, _ = case.step(case.before, case.batch)
    assert metrics.keys() == expected.keys() and gradients.keys() == {*NAMES}
    for result in ((after.params, plain.params), (metrics, expected)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *result)
    bare = dataclasses.replace(OBJECTIVE, kl_place="off", kl_coefficient=0, entropy_coefficient=0)
    alone = update.policy_loss_fn(case.policy, lambda *read: update.policy_loss(bare, 3, *read))
    total = jax.jit(jax.grad(lambda params: numerics.mean(alone(params, case.batch, None)[0])))
    for name, leaf in total(case.before.params).items():
        assert_close(gradients["policy"][0][name], leaf)
    actual = case.measured(case.after.params) - case.measured(case.before.params)
    for by in probe.LEDGER_BY:
        expected_arrays, arrays = case.read(by=by), case.read(gradients, actual, by=by)
        assert expected_arrays.keys() == arrays.keys()
        for name, value in expected_arrays.items():
            scale = np.abs(first_order(expected_arrays, name.split("/")[0])).max()
            np.testing.assert_allclose(arrays[name], value, rtol=0, atol=1e-10 * scale)


CLIPPED = update.Objective(
    clip_low=0.1, clip_high=0.1, dual_clip=1.2, kl_place="reward", kl_coefficient=0.3
)


def test_the_kl_in_the_reward_is_a_column():
    """law: clipped or not, columns of parts of the advantages sum to the column of the total."""
    case = Case(objective=CLIPPED)
    read = score(case.policy, case.before.params, case.batch.tokens, case.batch.mask, 3)
    gap = 0.2 * jax.random.normal(jax.random.key(4), read.log_probs.shape)
    assert jnp.any(gap > 0.2) and jnp.any(gap < -0.2) and jnp.any(jnp.abs(gap) < 0.05)
    advantages = case.batch.advantages.astype(float)  # one number along a completion
    changes = {"old_log_probs": read.log_probs - gap, "advantages": advantages}
    case.batch = case.batch.replace(**changes)
    reference = case.read()
    assert "log_prob/kl/head" not in reference
    part = jax.random.normal(jax.random.key(5), advantages.shape)
    columns = {}
    for name, kl_part in (("some", part), ("rest", advantages - part), ("all", advantages)):
        case.batch = case.batch.replace(kl_advantages=kl_part)
        columns[name] = case.read()
    for measure in MEASURES:
        for group in ("head", "body"):
            policy, kl = (
                {n: result[f"{measure}/{term}/{group}"] for n, result in columns.items()}
                for term in ("policy", "kl")
            )
            expected = reference[f"{measure}/policy/{group}"]
            assert_close(kl["all"], expected)
            assert_close(kl["some"] + policy["some"], expected)
            assert_close(kl["rest"], policy["some"])
            assert np.abs(kl["some"]).max() > 0.1 * np.abs(expected).max()
    shares = np.random.default_rng(6).normal(size=8)
    case.batch = case.batch.replace(kl_advantages=advantages * shares[:, None])
    result, split = case.read(), attribution.split_kl(reference, shares)
    assert result.keys() == split.keys()
    for name, value in result.items():
        scale = np.abs(first_order(reference, name.split("/")[0])).max()
        np.testing.assert_allclose(split[name], value, rtol=0, atol=1e-10 * scale)


def test_head_alone_is_exact_in_the_logits():
    """law: with SGD on the head alone, differences of a context's logits have no curvature."""
    case = Case(optimizer="sgd", parameters=(("head", 1.0), (".*", None)))
    result = []
    for target in (1, 2):
        case.prober.targets = jnp.full_like(case.prober.targets, target)
        result.append(case.read())
    curvature = [arrays["log_prob/curvature"] for arrays in result]
    assert np.abs(curvature[0]).max() > 1e-4  # of the softmax, alike for all tokens
    assert_close(curvature[0], curvature[1], rtol=1e-9)
    assert np.abs(result[0]["log_prob/policy/body"]).max() == 0


def test_curvature_is_second_order():
    """law: it falls by 100 when the step falls by 10."""
    sizes = []
    for rate in (1e-3, 1e-4):
        case = Case(optimizer="sgd", parameters=((".*", rate),), steps=1)
        arrays = case.read(by="group")
        sizes.append([np.linalg.norm(arrays[f"{m}/curvature"]) for m in MEASURES])
    np.testing.assert_allclose(np.log10(np.divide(*sizes)), 2.0, atol=0.05)


def compiled(ledger, described):
    """The compiled program of a ledger."""
    function, arguments = ledger.bind(*described)
    return function.lower(*arguments).compile()


def test_estimates_count_what_is_compiled():
    """law: FLOPs are the compiler's except for elementwise work; memory is an upper bound."""
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    fields = {"optimizer": "sgd", "max_grad_norm": None, "objective": update.Objective()}
    case = Case(steps=0, **fields)
    policy, params = ntkrl.build("GPTNeoXForCausalLM", {**TINY, **shape}, jax.random.key(0))
    case.begin(policy, params)
    # of one sequence, as the compiler counts the body of a loop once
    single = jax.tree.map(lambda leaf: leaf[:1], probe_set(policy.vocab_size))
    single = single.replace(completion_mask=jnp.ones((1, 3), bool), mask=jnp.ones((1, 7), bool))
    case.prober = probe.Prober(policy, single, params)
    without = compiled(case.ledger(by="group"), case.described()).cost_analysis()["flops"]
    for algorithm, estimate in case.ledger().estimates(*case.described()).items():
        result = compiled(case.ledger(algorithm=algorithm), case.described())
        flops = result.cost_analysis()["flops"] - without
        assert 0.8 < estimate.flops / flops < 1.0
        memory = result.memory_analysis().temp_size_in_bytes
        assert memory < estimate.bytes < 5 * memory


def test_mistakes_are_named():
    """law: invalid requests are refused before anything is computed."""
    case = Case(steps=1)
    with pytest.raises(
        ValueError, match=r"by must be .*token.*; algorithm must .*; memory_gib must be"
    ):
        case.ledger(by="token", algorithm="dense", memory_gib=0)
    with pytest.raises(ValueError, match="8 rows cannot be cut in 3 equal parts"):
        case.read(microbatches=3)
    with pytest.raises(ValueError, match='groups: "head" names the head'):
        case.read(groups=((".*", "head"),))
    terms = case.terms
    case.terms = lambda *arguments: ({"decay": terms(*arguments)[0]["policy"]}, None)
    with pytest.raises(ValueError, match="terms may not be called decay"):
        case.read()
