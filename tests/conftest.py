"""Settings for all tests: eight virtual CPU devices, no implicit rank promotion."""

import os
import shutil
import signal
import subprocess
import tempfile
from importlib.metadata import version

FLAGS = ["--xla_force_host_platform_device_count=8"]
if version("jaxlib").startswith("0.10."):  # unknown flags end the process
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # compiles four times as fast
    # eight devices share two cores with other tests: after 40 s of waiting XLA would abort
    FLAGS.append("--xla_cpu_collective_call_terminate_timeout_seconds=240")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# compiled programs are shared by test files, by pytest's worker processes and by the processes that
# tests start: workers and children inherit the directory. Short compilations cost less than files
CACHE = "JAX_COMPILATION_CACHE_DIR"
OWNS_CACHE = CACHE not in os.environ
if OWNS_CACHE:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="ntkrl-tests-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

# a script's background job ignores SIGINT, and so would the processes that tests interrupt
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# started first, so that no worker waits long for the other at the end
LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        "training/test_resume",
        "test_processes",
        "test_paper",
        "attribution/test_ledger",
        "ntk/test_optimised",
        "ntk/test_sharded",
        "ntk/test_algorithms",
        "plan/test_programs",
    )
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# compilation dominates the run time of these tests: programs are tiny and run a few times each
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    """Declare the extra suites."""
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    # ml_collections loads config files by an old import call
    config.addinivalue_line("filterwarnings", "ignore:the load_module:DeprecationWarning")
    config.addinivalue_line("markers", "gpu: needs a GPU; run with -m gpu")


def pytest_collection_modifyitems(config, items):
    """Put the longest files first, and skip the extra suites unless selected."""
    files = {file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: files.get(item.nodeid.partition("::")[0], len(files)))
    if config.option.markexpr:
        return
    for item in items:
        for extra in ("slow", "gpu"):
            if item.get_closest_marker(extra):
                item.add_marker(pytest.mark.skip(reason=f"run with -m {extra}"))


def pytest_unconfigure():
    """Remove the programs of this session."""
    if OWNS_CACHE:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def let_go_of_programs():
    """Drop a file's compiled programs after it.

    Every program uses memory maps, of which Linux allows a process 65530: once all tests have used
    them up, the compiler aborts the process.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a chosen size; call again to remount, `remove` for another."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(size, *how):
        mount = ["mount", "-t", "tmpfs", "-o", ",".join([*how, f"size={size}"]), "tmpfs", place]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs needs to be root")
        return place

    remove = ["umount", "-l", place]  # errors keep files open
    mounted.remove = lambda: subprocess.run(remove, capture_output=True, check=False)
    yield mounted
    mounted.remove()


@pytest.fixture
def x64():
    """Compute in float64 for one test."""
    with jax.enable_x64(True):
        yield
