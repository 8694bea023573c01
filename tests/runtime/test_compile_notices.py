"""Messages about compilations: once for each part of a run, and only while one takes long."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

from ntkrl.runtime import CompileNotices
from ntkrl.runtime.compile_notices import COMPILE_EVENT

PARTS = {"slow": "the update", "_slow": "the scoring"}


def compile_for(seconds, name):
    """Record the events of a compilation."""
    monitoring.record_scalar(COMPILE_EVENT, time.time(), fun_name=name)
    time.sleep(seconds)
    monitoring.record_event_duration_secs(COMPILE_EVENT, seconds, fun_name=name)


def test_long_compilations_are_announced_once(capsys):
    """by hand: by the part of the run, not by program; short ones are not announced."""
    with CompileNotices(PARTS, "the probe", patience=0.1):
        compile_for(0.0, "jit_slow")
        assert capsys.readouterr().out == ""
        for name in ("jit_slow", "jit_slow", "jit__slow", "jit(other)", "jit_another"):
            compile_for(0.25, name)
        compile_for(0.0, "jit_slow")
    compile_for(0.2, "jit_new")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "compiling the update",
        "compiling the scoring",
        "compiling the probe",
    ]


def test_jax_records_the_events(capsys):
    """law: this version of JAX records both events, with the function's name."""

    def slow(x):
        for number in range(40):
            x = jnp.sort(jnp.sin(x * number))
        return x

    with jax.enable_x64(False), CompileNotices(PARTS, "another part", patience=0.0) as notices:
        jax.jit(slow).lower(np.ones(7, np.float32)).compile()
        assert notices.pending == {}
    assert "compiling the update;" in capsys.readouterr().out
