"""Runs a snippet of the documentation: ``python -m compat.snippet_runner FILE CHECKPOINTS``."""

import runpy
import sys
from pathlib import Path

import learned_optim.pretrained

from .common import leave

checkpoints = Path(sys.argv[2])
learned_optim.pretrained._folder = lambda: checkpoints
names = runpy.run_path(sys.argv[1])
if names["losses"]:
    assert names["losses"][-1] < names["losses"][0], names["losses"]
leave()
