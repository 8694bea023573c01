"""Damaged model directories are refused in a sentence, or load; see damage.py for the damages."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.models import damage

CASES = ("gpt-neox", "llama 3", "qwen3 moe", "gemma 3")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Intact directories of some families, in shards, adapters and reward models."""
    return damage.write_bases(tmp_path_factory.mktemp("bases"), CASES)


@pytest.mark.parametrize("kind", damage.damages())
def test_damage_is_refused_in_a_sentence_or_harmless(bases, tmp_path, kind):
    """law: no exception but ValueError and OSError, in a message of a few lines with the file."""
    refused = 0
    for number in range(4):
        rng = np.random.default_rng([number, *kind.encode()])
        base = bases[(number * 5 + len(kind)) % len(bases)]
        directory = damage.copy_of(base, tmp_path / str(number))
        name = damage.damage(rng, base, directory, kind)
        try:
            damage.read(directory)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(tmp_path) in str(error), (name, error)
            assert len(str(error)) < 4000, name
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")
    assert refused or kind in ("template", "index")


@pytest.mark.slow
def test_five_hundred_damaged_directories():
    """law: 0 traces, 0 hangs over 20 s, memory below twice the files and 1 GiB; every family."""
    command = [sys.executable, "-m", "tests.models.fuzz", "--count=520"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(report)
    assert report["problems"] == []
    assert report["accepted"] > 50 and report["refused"] > 200
