"""The tests import the four files and the scripts of notebooks/, wherever pytest is started."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
torch.set_num_threads(1)  # the models here are too small to share out


def pytest_configure(config: pytest.Config) -> None:
    """The summary says why a test was skipped: a library or the browser is missing."""
    config.option.reportchars += "s"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole tiny run on the simulated line, for the tests that only look at it."""
    from helpers import TINY

    import r2d

    out = tmp_path_factory.mktemp("finished") / "run"
    assert r2d.main([*TINY, "--out", str(out)]) == 0
    return out
