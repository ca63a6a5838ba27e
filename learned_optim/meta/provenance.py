"""Conditions of the runs in a folder, in ``protocol.json`` beside them.

Figures depend on torch's version, on the text of the language models, and on the source of one's
own tasks. A folder is never filled under two different conditions.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from learned_optim.checkpoint import write_text
from learned_optim.meta.data import DataOptions
from learned_optim.meta.rollout import floating
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import Task, TaskFamily, TaskMixture, embeddings, finetuning, language

FILE = "protocol.json"


def conditions(tasks: Sequence[str], data: DataOptions) -> dict[str, str]:
    """Conditions of registered tasks: versions, texts, and sources of modules."""
    from learned_optim import __version__

    known = {"torch": torch.__version__.split("+")[0], "learned_optim": __version__}
    if any(task in language.FAMILIES or task in embeddings.TEXT_TASKS for task in tasks):
        known["text"] = _digest(language.text_of(data.text).encode())
    if any(task in finetuning.TEXT_TASKS for task in tasks):
        known["Python's library"] = _digest("".join(finetuning.texts()).encode())
    return known | _sources({task.rpartition(":")[0] for task in tasks} - {""})


def conditions_of_given(name: str, family: TaskFamily) -> dict[str, str]:
    """:func:`conditions` of tasks without a registered name: shapes, first losses and gradients.

    A digest of their source would not do: other lines of the script may change, and the source does
    not determine the data. Numbers have four digits, because processors round differently.
    """
    if isinstance(family, TaskMixture):
        shares = {f"share of {n}": f"{share:.4g}" for n, share in family.shares.items()}
        for member, tasks in family.members.items():
            shares |= conditions_of_given(member, tasks)
        return shares
    figures = dict.fromkeys(_computed(family, index) for index in range(2))
    return {f"task {name}": "; ".join(figures)}


def _computed(family: TaskFamily, index: int) -> str:
    generator = seeded("identity", index)
    task: Task = family.sample(generator).separate()
    initial = task.init(generator)  # of any dtype; optimizees are trained in float32
    params = {name: p.detach().float().requires_grad_() for name, p in initial.items()}
    batch = floating(task.batch(generator))
    with torch.enable_grad(), global_generator_seeded("identity", index, "forward"):
        loss = task.loss(params, batch)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    norm = sum(grad.double().square().sum().item() for grad in grads if grad is not None) ** 0.5
    shapes = " ".join(str(tuple(part.shape)).replace(" ", "") for part in batch)
    return (
        f"{len(params)} tensors of {sum(p.numel() for p in params.values())} parameters, batches "
        f"{shapes}, loss {loss.item():.4g} with gradient {norm:.4g}"
    )


def conditions_of_classes(*classes: type) -> dict[str, str]:
    """Digests of the source of classes that are not of this package."""
    ours = __name__.partition(".")[0]
    digests = _sources(
        {cls.__module__ for cls in classes if cls.__module__.partition(".")[0] != ours}
        - {"__main__"}
    )
    for cls in classes:
        # Other lines of the script or notebook may change between two runs.
        if cls.__module__ == "__main__":
            with suppress(OSError, TypeError):  # typed into an interpreter
                digests[f"source of {cls.__qualname__}"] = _digest(inspect.getsource(cls).encode())
    return digests


def _sources(modules: Iterable[str]) -> dict[str, str]:
    files = {module: importlib.import_module(module).__file__ for module in modules}
    return {
        f"source of {module}": _digest(Path(file).read_bytes())
        for module, file in files.items()
        if file is not None
    }


def check(
    folder: Path, current: dict[str, str], remedy: str = "give another --output"
) -> dict[str, str]:
    """Compare the current conditions with those of the runs in ``folder``.

    Returns:
        The conditions of old and new runs together, for :func:`remember`.

    Raises:
        ValueError: they differ, and the message says in what and advises ``remedy``; or the file is
            damaged.
    """
    path = folder / FILE
    before: dict[str, str] = {}
    if path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete it if nothing changed since the runs in it "
                f"were made"
            ) from error
    different = [name for name, value in current.items() if before.get(name, value) != value]
    if different:
        listing = "; ".join(f"{n}: {before[n]} then, {current[n]} now" for n in different)
        raise ValueError(
            f"the runs in {folder} were made under other conditions ({listing}): {remedy}, or "
            f"restore what changed"
        )
    return {**before, **current}


def remember(folder: Path, current: dict[str, str]) -> None:
    """Write the conditions beside the runs."""
    write_text(folder / FILE, json.dumps(current, indent=1, sort_keys=True) + "\n")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def source_version() -> str:
    """The commit of the source tree in use, or the installed version."""
    from learned_optim import __version__

    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    git = partial(
        subprocess.check_output, cwd=Path(__file__).parent, env=environment,
        stderr=subprocess.DEVNULL, text=True, timeout=10,
    )  # fmt: skip
    try:
        # Installed inside somebody else's repository, the package is not among its files.
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        described: str = git(["git", "describe", "--always", "--dirty", "--abbrev=12"])
        return described.strip() or __version__
    except (OSError, subprocess.SubprocessError):
        return __version__
