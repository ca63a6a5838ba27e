"""Runs a snippet of the documentation: ``python -m compat.snippet_runner FILE``."""

import runpy
import sys

from .common import leave

losses = runpy.run_path(sys.argv[1])["losses"]
if losses:
    assert losses[-1] < losses[0], losses
leave()
