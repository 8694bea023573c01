"""The built-in task's tokenizer, for the tests of this directory."""

import pytest

from ntkrl.data.arithmetic_task import save_tokenizer
from ntkrl.data.tokens import load_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return the directory of the tokenizer's files."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(directory):
    """Load it anew for each test, which may change its template."""
    return load_tokenizer(directory)
