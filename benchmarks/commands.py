"""Runs every command of README and the documentation, as a reader does who types them in order.

    python -m benchmarks commands [FOLDER]     # an empty folder, not the checkout; some minutes
    python -m benchmarks commands --pages README.md docs/meta-training.md

All pages share one folder, so that commands that disturb each other show. Long trainings and
evaluations run with the options of ``SHORTER`` added. Files that a command leaves are looked at:
``LEAVES`` says which. ``LEFT_OUT`` says what is not run here, and why; what needs image data is
left out where $LEARNED_OPTIM_DATA names none. Python blocks run on the pages ``WITH_CODE``, whose
commands need what they write; the test suite runs those of all pages.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import DOCS, ROOT

#: Pages whose commands build on their Python blocks.
WITH_CODE = ("docs/meta-training.md",)
TINY = "--epochs 1 --runs-per-epoch 2 --validation-runs 2 --test-runs 2"
EVOLVE = "--meta-steps 1 --pairs 1 --tasks-per-meta-step 1 --validation-tasks 1"
#: By the beginning of a command, what makes it short. The last that fits counts.
SHORTER = {
    "python examples/compare_with_adamw.py": "--steps 10",
    "python examples/meta_train_your_own.py": "--steps 10 --epochs 1 --runs-per-epoch 2",
    "python examples/search_meta_lr.py": "--trials 1 --epochs 1",
    "learned-optim train": f"{TINY} --horizon 10 --truncation 5",
    "learned-optim train my-recipe.toml": TINY,
    "learned-optim train quick-evolution": EVOLVE,
    "learned-optim train diagonal": EVOLVE,
    "learned-optim evaluate": "--steps 10 --seeds 2 --tuning-seeds 1 --baselines sgd",
    "learned-optim evaluate --suite field": "--quick --tasks regression --baselines adam-1e-3 "
    "--seeds 1",
    "torchrun": f"{TINY} --horizon 10 --truncation 5",
    "python -m benchmarks": "--help",
    "python -m benchmarks step": "--quick",
    "python -m benchmarks pages": "--check",
}
#: By a pattern, why a command is not run here.
LEFT_OUT = {
    r"pip install": "`.ci/run` installs into an environment of its own",
    r"^python -m pytest|^ruff |^mypy|mkdocs build|\.ci/run|^pre-commit": "`.ci/run` does it",
    r"^git |^cd |^export |^source ": "sets the shell up",
}
#: By a pattern, files that a command leaves in its folder, changed by it.
LEAVES = {
    r"^learned-optim evaluate": ("*/table.md", "*/*.png", "*/summary.json"),
    r"^learned-optim explain": ("*/README.md", "*/*.png"),
    r"^(learned-optim|torchrun .*) train ": ("*.safetensors",),
    r"compare_with_adamw\.py": ("comparison/*.png",),
}
#: What reads image sets.
NEEDS_DATA = r"train (mnist|diagonal|coordinatewise)|--tasks mnist|nproc.* mnist"

BLOCK = re.compile(
    r"^```(?P<kind>\w+)?"
    r'(?: *title="(?P<file>[^"]+)")?[^\n]*\n(?P<body>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


def all_pages() -> list[str]:
    """Returns README, the pages of the documentation as the navigation orders them, the rest."""
    nav = (DOCS / "mkdocs" / "mkdocs.yml").read_text()
    docs = sorted(DOCS.glob("*.md"), key=lambda p: (nav.find(p.name) % (len(nav) + 1), p.name))
    paths = [ROOT / "README.md", *docs, ROOT / "CONTRIBUTING.md"]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def commands(block: re.Match[str]) -> Iterator[str]:
    """Yields the commands of a block, each on one line and without its comment."""
    if block["kind"] not in ("sh", "console") or block["file"]:
        return
    for line in block["body"].replace("\\\n", " ").splitlines():
        if block["kind"] == "console" and not line.startswith("$ "):
            continue  # what the command prints
        text = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ ").strip())
        yield from (" ".join(part.split()) for part in text.split(" && ") if part)


def shortened(command: str) -> str:
    """Returns a command with the options that make it short."""
    fitting = [more for start, more in SHORTER.items() if command.startswith(start)]
    return f"{command} {fitting[-1]}".strip() if fitting else command


def why_left_out(command: str) -> str | None:
    """Returns why a command is not run; ``None`` if it is."""
    for pattern, why in LEFT_OUT.items():
        if re.search(pattern, command):
            return why
    if re.search(NEEDS_DATA, command) and "LEARNED_OPTIM_DATA" not in os.environ:
        return "needs $LEARNED_OPTIM_DATA"
    return None


def execute(command: str) -> tuple[int, str]:
    """Runs a command in the current folder; returns its status and what it printed."""
    text, _, target = command.partition(" > ")
    words = shlex.split(text)
    if words[0] == "learned-optim":
        words[:1] = ["python", "-m", "learned_optim"]
    if words[0] == "python":
        words[0] = sys.executable
        if words[1] != "-m":
            words[1] = str(ROOT / words[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if target:
        Path(target.split()[0]).write_text(done.stdout)
    return done.returncode, done.stdout + done.stderr


def missing(command: str, started: float) -> list[str]:
    """Returns the patterns of files that the command should have left since ``started``."""
    if "--help" in command:
        return []
    wanted = [f for start, files in LEAVES.items() if re.search(start, command) for f in files]
    if " train " in command:  # a training that is finished leaves its checkpoint as it is
        started = 0.0
    found = [(path, path.stat()) for path in Path().rglob("*") if path.is_file()]
    fresh = [path for path, stat in found if stat.st_size and stat.st_mtime >= started - 1]
    return [pattern for pattern in wanted if not any(path.match(pattern) for path in fresh)]


def run_page(page: str) -> int:
    """Runs a page's commands in the current folder; returns how many failed."""
    failures = 0
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer((ROOT / page).read_text()):
        if block["file"]:
            Path(block["file"]).write_text(block["body"])
        elif block["kind"] == "python" and page in WITH_CODE:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block["body"], page, "exec"), namespace)
        failures += sum(not passes(page, command) for command in commands(block))
    return failures


def passes(page: str, command: str) -> bool:
    """Runs a command and prints how it went; returns whether it did what the page says."""
    if (why := why_left_out(command)) is not None:
        print(f"      -  {page}: {command}: {why}", flush=True)
        return True
    short, started = shortened(command), time.time()
    status, shown = execute(short)
    absent = missing(short, started) if status == 0 else []
    verdict = "FAILED" if status else f"NO {', '.join(absent)}" if absent else "ok"
    print(f"{time.time() - started:5.1f} s  {page}: {short}: {verdict}", flush=True)
    if status or absent:
        print(shown)
    return verdict == "ok"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="where to run (a temporary one)")
    parser.add_argument("--pages", nargs="+", choices=all_pages(), metavar="PAGE")


def run(options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        before = os.getcwd()
        os.chdir(folder)
        sys.path.insert(0, os.getcwd())  # as in a session in that folder
        try:
            failures = sum(map(run_page, options.pages or all_pages()))
        finally:
            sys.path.pop(0)
            os.chdir(before)
    if failures:
        raise SystemExit(f"{failures} commands of the pages failed")
