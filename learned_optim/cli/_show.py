"""``learned-optim show``: what a checkpoint is, as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from learned_optim.cli._parser import Parser, paragraph

HELP = "what a checkpoint is and how it was made"


def configure(parser: Parser, args: Sequence[str]) -> None:
    parser.usage = "learned-optim show CHECKPOINT"
    parser.description = paragraph(
        "Prints what a checkpoint is as JSON: update rule, configuration, number of weights, "
        "fingerprint, and the record of how it was made."
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="a shipped name, a file, a run folder or a Hub id",
    )


def run(options: argparse.Namespace) -> int:
    """Print the description.

    Raises:
        ValueError: not exactly one checkpoint, or none of that name.
        OSError: no such file, or it cannot be read.
    """
    if len(options.checkpoints) != 1:
        raise ValueError(
            "show takes one checkpoint: a shipped name, a file, a run folder or a Hub id"
        )
    (source,) = options.checkpoints
    from learned_optim.checkpoint import as_json
    from learned_optim.pretrained import checkpoint_path, load_record, load_rule

    path = checkpoint_path(source)
    rule = load_rule(path)
    described = {
        "rule": rule.name,
        "config": rule.config_dict(),
        "weights": sum(p.numel() for p in rule.parameters()),
        "fingerprint": rule.fingerprint(),
        "record": load_record(path),
    }
    if path != Path(source):
        described["file"] = str(path)
    print(as_json(described, indent=2))
    return 0
