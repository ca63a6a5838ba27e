"""Runs every command of README and the documentation, as somebody would who reads it in order.

    python -m benchmarks.commands [FOLDER]     # an empty one, not the checkout; some minutes
    python -m benchmarks.commands --pages README.md docs/recipes.md

All pages share one folder, so commands that would get in each other's way show. Long trainings and
evaluations run with the options of ``SHORTER`` added, benchmarks are asked for their help alone.
What is left out, and why, is in ``LEFT_OUT``; what needs image data is left out where
$LEARNED_OPTIM_DATA names none. Python blocks run in between on the pages ``WITH_CODE``, whose
commands need what they write; `tests/test_docs.py` runs those of all pages.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from learned_optim.cli import main as learned_optim

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/index.md", "docs/using-with.md", "docs/meta-training.md",
         "docs/recipes.md", "docs/estimators.md", "docs/several-machines.md",
         "docs/command-line.md", "docs/evaluation.md", "docs/rules.md", "docs/extending.md",
         "docs/inside.md", "docs/results.md", "docs/performance.md", "docs/compatibility.md",
         "docs/design.md", "docs/experiments.md", "docs/faq.md", "CONTRIBUTING.md")  # fmt: skip

#: Pages whose commands build on their Python blocks.
WITH_CODE = ("docs/meta-training.md", "docs/extending.md", "docs/inside.md")

_TINY = "--epochs 1 --runs-per-epoch 2 --validation-runs 2 --test-runs 2"
_SEARCH = "--trials 1 --trial-epochs 1 --runs-per-epoch 2 --validation-runs 2"
_EVOLVE = "--meta-steps 1 --pairs 1 --tasks-per-meta-step 1 --validation-tasks 1"
_EVALUATE = "--horizons 10 --seeds 2 --tuning-seeds 1 --baselines sgd"
#: By the beginning of a command, what makes it short. The last that fits counts.
SHORTER = {
    "python examples/train_classifier.py": "--steps 10 --seeds 1",
    "python examples/meta_train_your_own.py": "--steps 10 --epochs 1 --runs-per-epoch 2",
    "learned-optim explain": "--short",
    "learned-optim train": f"{_TINY} --horizon 10 --truncation 5",
    "learned-optim train my-recipe.toml": _TINY,
    "learned-optim train log-loss.toml": _TINY,
    "learned-optim train diagonal": _EVOLVE,
    "learned-optim train --schema": "",
    "learned-optim search": _SEARCH,
    "learned-optim evaluate": _EVALUATE,
    "learned-optim evaluate --suite field": "--quick --tasks regression --baselines adam-1e-3 "
    "--seeds 1",
    "torchrun": f"{_TINY} --horizon 10 --truncation 5",
    "python -m benchmarks": "--help",
}
#: By a pattern, why a command is not run here.
LEFT_OUT = {
    r"pip install": "`.ci/run` installs what it needs into an environment of its own",
    r"^python -m pytest|^ruff |^mypy|mkdocs build": "`.ci/run` does it",
    r"^export ": "sets the shell up",
    r"torchrun .*/shared/": "needs a cluster and its shared folder",
    r"--print-completion": "writes into the reader's shell; `tests/test_cli.py` runs it in one",
    r"train quick --metalr": "shows an error, which `tests/test_commands.py` compares",
    r"--formula|runs/closed-form": "takes minutes; `tests/test_explain.py` fits "
    "formulas on fewer runs",
}
#: What reads image sets.
NEEDS_DATA = r"train (mnist|general|cifar10|all-but)|--tasks mnist|runs/all-but|nproc.* mnist"

BLOCK = re.compile(
    r"^```(?P<kind>sh|console|toml|python|yaml|text|json)?"
    r'(?: *title="(?P<file>[^"]+)")?[^\n]*\n(?P<body>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Command:
    """A command as a page has it, on one line and without its comment."""

    page: str
    text: str

    @property
    def left_out(self) -> str | None:
        """Why it is not run; ``None`` if it is."""
        return next((why for what, why in LEFT_OUT.items() if re.search(what, self.text)), None)

    @property
    def needs_data(self) -> bool:
        """Whether it reads image sets."""
        return re.search(NEEDS_DATA, self.text) is not None

    @property
    def short(self) -> str:
        """With the options that make it short."""
        fitting = [more for start, more in SHORTER.items() if self.text.startswith(start)]
        return f"{self.text} {fitting[-1]}".strip() if fitting else self.text


def commands(page: str) -> Iterator[Command]:
    """The commands of a page, in its order."""
    for block in BLOCK.finditer((ROOT / page).read_text()):
        yield from _commands_of(page, block)


def _commands_of(page: str, block: re.Match[str]) -> Iterator[Command]:
    if block["kind"] not in ("sh", "console") or block["file"]:
        return
    for line in block["body"].replace("\\\n", " ").splitlines():
        if block["kind"] == "console" and not line.startswith("$ "):
            continue  # what the command prints
        text = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ ").strip())
        yield from (Command(page, " ".join(part.split())) for part in text.split(" && ") if part)


def run(command: Command) -> tuple[int, str]:
    """Run a command, shortened, in the current folder: its status and what it printed."""
    text, _, target = command.short.partition(" > ")
    words = shlex.split(text)
    shown = io.StringIO()
    if "my_rules" in text:  # the page's Python block has defined the rule in this process
        words = ["python", "-m", "learned_optim.cli", *words[1:]]
    if words[:2] == ["python", "-m"] or words[0] == "torchrun":
        process = [sys.executable, *words[1:]] if words[0] == "python" else words
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run(process, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            status = learned_optim(words[1:]) if words[0] == "learned-optim" else _script(words)
        except (Exception, SystemExit):  # one command's failure is not the end of the others
            traceback.print_exc()
            status = 1
    if target:
        Path(target.split()[0]).write_text(shown.getvalue())
    return status, shown.getvalue()


def _script(words: list[str]) -> int:
    """``python SCRIPT ...`` in this process."""
    if words[0] != "python":
        raise ValueError(f"cannot run {' '.join(words)!r}: neither learned-optim nor python")
    before, sys.argv = sys.argv, words[1:]
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    finally:
        sys.argv = before
    return 0


def run_page(page: str) -> int:
    """Run a page's commands in the current folder; returns how many failed."""
    failures = 0
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer((ROOT / page).read_text()):
        if block["file"]:
            Path(block["file"]).write_text(block["body"])
        elif block["kind"] == "python" and page in WITH_CODE:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block["body"], page, "exec"), namespace)
            if "class LearnedMomentum" in block["body"]:  # as the page says in words
                Path("my_rules.py").write_text(block["body"])
        failures += sum(not _told(command) for command in _commands_of(page, block))
    return failures


def _told(command: Command) -> bool:
    """Run a command and print how it went; false if it failed."""
    why = command.left_out
    if why is None and "LEARNED_OPTIM_DATA" not in os.environ and command.needs_data:
        why = "needs $LEARNED_OPTIM_DATA"
    if why is not None:
        print(f"      -  {command.page}: {command.text}: {why}", flush=True)
        return True
    started = time.perf_counter()
    status, shown = run(command)
    seconds, verdict = time.perf_counter() - started, "FAILED" if status else "ok"
    print(f"{seconds:5.1f} s  {command.page}: {command.short}: {verdict}", flush=True)
    if status:
        print(shown)
    return status == 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="where to run (a temporary one)")
    parser.add_argument("--pages", nargs="+", choices=PAGES, metavar="PAGE", default=PAGES)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        before = os.getcwd()
        os.chdir(folder)
        sys.path.insert(0, os.getcwd())  # as in a session in that folder
        try:
            failures = sum(map(run_page, options.pages))
        finally:
            sys.path.pop(0)
            os.chdir(before)
    if failures:
        raise SystemExit(f"{failures} commands of the pages failed")


if __name__ == "__main__":
    main()
