"""``learned-optim list``, ``show``, ``evaluate`` and ``explain``."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from learned_optim import model_card
from learned_optim._progress import ProgressBar
from learned_optim.checkpoint import as_json, check_writable
from learned_optim.evaluation import BASELINES, EvaluateConfig, Evaluation, brief, write_report
from learned_optim.explain import explain
from learned_optim.meta.recipes import recipe_descriptions
from learned_optim.meta.tasks import described_families
from learned_optim.pretrained import (
    ALIASES,
    checkpoint_path,
    list_pretrained,
    load_record,
    load_rule,
)
from learned_optim.rules import rule_class, rule_names

# Parts of a model card that are for the Hub: front matter, the record as JSON, the licence.
FOR_THE_HUB = re.compile(r"\A---.*?---\n+|\n*<details>.*?</details>|\n*## Licence.*", re.DOTALL)


@dataclass(frozen=True)
class List:
    """Print the shipped checkpoints, update rules, tasks, recipes and baselines."""

    def run(self) -> int:
        recipes = recipe_descriptions()
        shipped = {
            name: f"stands for {ALIASES[name]}" if name in ALIASES else recipes.get(name, "")
            for name in list_pretrained()
        }
        tasks: list[str] = []
        for about, names in described_families().items():
            tasks += [f"  {about}", *_wrapped(", ".join(names), " " * 6, " " * 6)]
        groups = {
            "checkpoints": _described(shipped),
            "update rules": _described(
                {name: (rule_class(name).__doc__ or "").partition("\n")[0] for name in rule_names()}
            ),
            "tasks": tasks,
            "recipes": _described(
                {n: "of the checkpoint" if n in shipped else text for n, text in recipes.items()}
            ),
            "baselines": _wrapped(", ".join(BASELINES), "  ", "  "),
        }
        print("\n\n".join("\n".join([f"{title}:", *lines]) for title, lines in groups.items()))
        return 0


def _described(texts: Mapping[str, str]) -> list[str]:
    """Lines of names with their descriptions."""
    left = 2 + max(map(len, texts)) + 2
    return [
        line
        for name, text in texts.items()
        for line in _wrapped(text.replace("`", ""), f"  {name}".ljust(left), " " * left)
    ]


def _wrapped(text: str, first: str, later: str) -> list[str]:
    width = max(60, min(100, shutil.get_terminal_size().columns))
    text = text or "(no description)"
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
    )


@dataclass(frozen=True)
class Show:
    """Print what a checkpoint is and how it was trained."""

    checkpoint: tyro.conf.Positional[str]
    """A shipped name, a file, a run folder or a Hub id."""
    json: bool = False
    """Print the configuration and the whole record of the training as JSON."""

    def run(self) -> int:
        path = checkpoint_path(self.checkpoint)
        rule, record = load_rule(path), load_record(path)
        if self.json:
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
        print(FOR_THE_HUB.sub("", model_card(rule, self.checkpoint, record=record)).strip())
        print(f"\nFile: {path}, fingerprint {rule.fingerprint()}. With --json: the whole record.")
        return 0


@dataclass(frozen=True)
class Evaluate(EvaluateConfig):
    """Compare learned optimizers, untuned, with hand-written ones tuned for each task.

    Writes tables and plots. Run again, the same command does only the missing runs.
    "--suite field" evaluates on the field, real training runs.
    """

    def run(self) -> int:
        with ProgressBar("evaluation") as show:
            evaluation = Evaluation(self, show)
            check_writable(self.output / "table.md")
            summary = evaluation.execute()
        print(f"{brief(summary)}\n")
        for path in write_report(summary, self.output):
            print(f"wrote {path}")
        return 0


@dataclass(frozen=True)
class Explain:
    """Write a report with plots on what a checkpoint's update rule does."""

    checkpoint: tyro.conf.Positional[str]
    """A shipped name, a file, a run folder or a Hub id."""
    output: Path | None = None
    """Folder of the report; runs/explain-CHECKPOINT if not given."""

    def run(self) -> int:
        output = self.output or Path("runs") / f"explain-{Path(self.checkpoint).stem}"
        progress = partial(print, file=sys.stderr, flush=True)
        print(explain(self.checkpoint, output, progress=progress))
        return 0
