"""The files of a meta-training: intact after a kill, written by one process."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from learned_optim.checkpoint import BEST_FILE, remove_leftovers, write_atomically, write_text
from learned_optim.meta import provenance
from learned_optim.meta.recipes import AnyRecipe, Recipe, read_recipe

RECIPE = "recipe.json"
METRICS = "metrics.jsonl"
RESUME = "resume.pt"
LOCK = ".lock"


class RunFolder:
    """Recipe, metrics, best checkpoint and resume state of a run.

    Args:
        path: the folder; it appears with the first file written.

    Attributes:
        best: path of the best checkpoint so far.
        finished: path of the finished checkpoint, named after the run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.best = path, path / BEST_FILE
        self.finished = path / f"{path.resolve().name}.safetensors"
        self._lock = FileLock(self.path / LOCK, timeout=0)

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether ``path`` holds files of a training."""
        return any((path / name).exists() for name in (RESUME, METRICS, BEST_FILE, LOCK))

    def claim(self, recipe: AnyRecipe, conditions: dict[str, str], write: bool) -> None:
        """Compare a recipe and its other conditions with the folder's; ``write`` both into it.

        Raises:
            ValueError: they differ, or ``recipe.json`` is damaged; the message says what to do.
        """
        file = self.path / RECIPE
        if file.exists():
            # A run may stop earlier or later, unless its schedule depends on the end.
            free = {"patience", "test_runs"}
            if isinstance(recipe, Recipe) and recipe.meta_lr_final is None:
                free.add("epochs")
            there, here = read_recipe(file).to_json(), recipe.to_json()
            names = [n for n in sorted({*there, *here} - free) if there.get(n) != here.get(n)]
            if names:
                listing = "; ".join(f"{n}: {there.get(n)} there, {here.get(n)} here" for n in names)
                raise ValueError(
                    f"{self.path} holds a run of another recipe ({listing}): choose another "
                    f"folder, or delete it"
                )
        conditions = provenance.check(self.path, conditions, "choose another folder")
        if write:
            write_text(file, json.dumps(recipe.to_json(), indent=2, sort_keys=True) + "\n")
            provenance.remember(self.path, conditions)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes.

        Raises:
            ValueError: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"another process is training in {self.path}: wait for its end, or choose another "
                f"folder"
            ) from error
        try:
            remove_leftovers(self.path)
            yield
        finally:
            self._lock.release()

    def resume(self, load: Callable[[dict[str, Any]], None]) -> None:
        """Call ``load`` with the state that :meth:`write_state` wrote, if there is one.

        Raises:
            ValueError: the file is damaged, or ``load`` fails; the message says what to do.
            OSError: it cannot be read.
        """
        try:
            content = (self.path / RESUME).read_bytes()
        except FileNotFoundError:
            return
        try:
            # torch.save stores checksums and torch.load does not look at them.
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of its part {damaged} is wrong")
            load(torch.load(io.BytesIO(content), weights_only=True))
        except Exception as error:  # a damaged archive raises nearly anything
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self.path / RESUME} is damaged ({cause}): put back a copy of it, or delete it, "
                f"and the run begins again. {BEST_FILE} holds the best weights so far: copy it "
                f"elsewhere first if you want to keep them"
            ) from error

    def write_state(self, state: dict[str, Any]) -> None:
        """Write the metrics and the resume state; a kill in between repeats the round."""
        lines = (json.dumps(line) + "\n" for line in state["history"])
        write_text(self.path / METRICS, "".join(lines))
        buffer = io.BytesIO()
        torch.save(state, buffer)

        def write(path: Path) -> None:  # by Python, whose errors tell a full disk
            path.write_bytes(buffer.getbuffer())

        write_atomically(self.path / RESUME, write)
