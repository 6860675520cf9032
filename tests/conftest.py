"""The tests import the four files from the repository root, wherever pytest is started."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # the models here are too small to share out


def pytest_configure(config: pytest.Config) -> None:
    """The summary says why a test was skipped: a library or the browser is missing."""
    config.option.reportchars += "s"
