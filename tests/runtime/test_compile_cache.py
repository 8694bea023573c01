"""The persistent compilation cache of the command line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ntkrl.runtime import compile_cache, enable_compile_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX without a cache, and a user whose cache directory is empty."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for variable in (compile_cache.VARIABLE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in zip(OPTIONS, (None, -1, 1.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_restored_program_gives_the_same_bits(fresh, monkeypatch):
    """law: loss and gradient from the cache are those of the program that was stored."""
    monkeypatch.setattr(compile_cache, "LEAST_SECONDS", 0.0)
    enable_compile_cache()
    inputs = jax.random.normal(jax.random.key(0), (64, 64))

    def loss(x):
        return jnp.sum(jax.nn.log_softmax(jnp.tanh(x @ x), axis=-1) ** 2)

    hits, results = [], []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    for _ in range(2):
        value, gradient = jax.jit(jax.value_and_grad(loss))(inputs)
        results.append((np.asarray(value).tobytes(), np.asarray(gradient).tobytes()))
        stored = list(compile_cache.cache_directory().glob("jit_loss-*-cache"))
        assert len(stored) == 1
        assert stored[0].is_relative_to(fresh)
        jax.clear_caches()
        compilation_cache.reset_cache()
    assert "/jax/compilation_cache/cache_hits" in hits
    assert results[0] == results[1]


def test_the_variables_of_jax_win(fresh, monkeypatch):
    """law: another directory, or no cache at all, is left as it is."""
    monkeypatch.setenv(compile_cache.VARIABLE, "elsewhere")
    enable_compile_cache()
    monkeypatch.delenv(compile_cache.VARIABLE)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        enable_compile_cache()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(fresh.iterdir())


@pytest.mark.parametrize("reason", ["a file", "other users can write into it"])
def test_a_directory_that_cannot_be_used_is_a_note(fresh, capsys, reason):
    """law: the run goes on without a cache and says why."""
    directory = compile_cache.cache_directory()
    if reason == "a file":
        (fresh / "ntkrl").write_text("", encoding="utf-8")
    else:
        directory.mkdir(parents=True)
        directory.chmod(0o777)
    enable_compile_cache()
    said = capsys.readouterr().out
    assert said.startswith(f"compiled programs are not cached: {directory} cannot be used")
    assert reason == "a file" or reason in said
    assert jax.config.jax_compilation_cache_dir is None


def test_half_written_entries_are_removed(fresh):
    """law: what a killed process left is gone; entries with their time of use stay."""
    directory = compile_cache.cache_directory()
    compile_cache.open_cache(directory)
    for name in ("whole-cache", "half-cache"):
        (directory / name).write_bytes(b"x")
    (directory / "whole-atime").write_bytes(bytes(8))
    compile_cache.open_cache(directory)
    assert {path.name for path in directory.iterdir()} == {
        ".lockfile",
        "whole-cache",
        "whole-atime",
    }
