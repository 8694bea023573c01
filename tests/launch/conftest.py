"""The directory of stub tools, as a fixture."""

import pytest

from tests.launch.desk import Desk


@pytest.fixture
def desk(tmp_path):
    """A directory with stub tools; processes started in it do not outlive the test."""
    desk = Desk(tmp_path)
    yield desk
    for process in desk.started:
        process.kill()
        process.wait()
