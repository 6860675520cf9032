"""The tests import the four files from the repository root, wherever pytest is started."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # the models here are too small to share out
