"""``learned-optim show``: what a checkpoint is and how it was trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

#: Parts of a model card that are for the Hub: front matter, the record as JSON, the licence.
FOR_THE_HUB = re.compile(r"\A---.*?---\n+|\n*<details>.*?</details>|\n*## Licence.*", re.DOTALL)


@dataclass(frozen=True)
class Show:
    """Print what a checkpoint is and how it was trained."""

    checkpoint: tyro.conf.Positional[str]
    """A shipped name, a file, a run folder or a Hub id."""
    json: bool = False
    """Print the configuration and the whole record of the training as JSON."""


def options(args: Sequence[str]) -> tuple[str, dict[str, Any], Sequence[str]]:
    return "show", {"f": Show}, args


def run(config: Show) -> int:
    """Print the description.

    Raises:
        ValueError: there is no checkpoint of that name.
        OSError: the file does not exist or cannot be read.
    """
    from learned_optim import model_card
    from learned_optim.checkpoint import as_json
    from learned_optim.pretrained import checkpoint_path, load_record, load_rule

    path = checkpoint_path(config.checkpoint)
    rule, record = load_rule(path), load_record(path)
    if config.json:
        described = {
            "rule": rule.name,
            "config": rule.config_dict(),
            "weights": sum(p.numel() for p in rule.parameters()),
            "fingerprint": rule.fingerprint(),
            "record": record,
            "file": str(path),
        }
        print(as_json(described, indent=2))
        return 0
    card = model_card(rule, config.checkpoint, record=record)
    print(FOR_THE_HUB.sub("", card).strip())
    print(f"\nFile: {path}, fingerprint {rule.fingerprint()}. With --json: the whole record.")
    return 0
