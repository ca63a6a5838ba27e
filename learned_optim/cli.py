"""The ``learned-optim`` command: list, show, search, train, evaluate.

Options of ``search``, ``train`` and ``evaluate`` are generated from their config dataclasses:
:class:`~learned_optim.meta.recipes.Recipe`, :class:`~learned_optim.meta.evaluate.EvaluateConfig`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from learned_optim import __version__
from learned_optim.checkpoint import as_json
from learned_optim.pretrained import ALIASES, list_pretrained, load_record, load_rule

if TYPE_CHECKING:
    from learned_optim.meta.trainer import TrainConfig

T = TypeVar("T")

USAGE = """usage: learned-optim COMMAND ...

commands:
  list                 shipped checkpoints, update rules, tasks, recipes and baselines
  show CHECKPOINT      what a checkpoint is and how it was made
  search RECIPE        random search of a recipe's meta-learning rate (... search --help)
  train RECIPE         meta-train an update rule (learned-optim train --help)
  evaluate             compare learned with tuned hand-written optimizers (... evaluate --help)

  --version            the version of learned_optim
  COMMAND --help       more about one of them
"""

SHOW_USAGE = """usage: learned-optim show CHECKPOINT

Prints what a checkpoint is as JSON: update rule, configuration, number of weights, fingerprint, and
the record of how it was made. CHECKPOINT is a shipped name, a file, a folder or a Hub id.
"""

LIST_USAGE = """usage: learned-optim list

Prints the names of shipped checkpoints, update rules, tasks, recipes and baselines.
"""

#: What ``evaluate`` runs: tasks and horizons as asked for, or the field of real training runs.
SUITES = ("tasks", "field")

EVALUATE_DESCRIPTION = """What to evaluate, on what, and how thoroughly.

With --suite field: on the field of tasks that people recognise, against tuned schedules and rivals
that need no tuning. Its options: learned-optim evaluate --suite field --help."""

#: Modules of the ``meta`` extra, which the package is installed without unless asked.
META_EXTRA = (
    "matplotlib", "numpy", "scipy", "sklearn", "tensorboard", "torchvision", "tqdm", "tyro",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "list": _list,
        "show": _show,
        "search": _search,
        "train": _train,
        "evaluate": _evaluate,
    }
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"learned-optim {__version__}")
        return 0
    if args[0] not in commands:
        print(f"learned-optim: unknown command {args[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    # As under `python -m`: tasks of one's own, "my_tasks:name", may lie in the current folder.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return commands[args[0]](args[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"learned-optim: {_message(error, args[0])}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlearned-optim: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        sys.path.remove(here)


def _message(error: Exception, command: str) -> str:
    """What went wrong; for a missing package of ours, how to get it."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and missing in META_EXTRA:
        return f"{command} needs {missing}: pip install 'learned-optim[meta]'"
    return str(error)


def _list(args: list[str]) -> int:
    from learned_optim.meta.baselines import BASELINES
    from learned_optim.meta.recipes import recipes
    from learned_optim.meta.tasks import task_names
    from learned_optim.rules import rule_names

    if args in (["-h"], ["--help"]):
        print(LIST_USAGE, end="")
        return 0
    if args:
        raise ValueError(f"list takes no arguments, got {' '.join(args)}")
    aliases = [f"{a} (= {n})" for a, n in ALIASES.items() if n in list_pretrained()]
    shipped = [name for name in list_pretrained() if name not in ALIASES]
    for title, names in (
        ("checkpoints", shipped + aliases),
        ("update rules", rule_names()),
        ("tasks", task_names()),
        ("recipes", sorted(recipes())),
        ("baselines", list(BASELINES)),
    ):
        print(f"{title}: {', '.join(names) or 'none'}")
    return 0


def _show(args: list[str]) -> int:
    if args in (["-h"], ["--help"]):
        print(SHOW_USAGE, end="")
        return 0
    if len(args) != 1 or args[0].startswith("-"):
        raise ValueError("show takes one checkpoint: a shipped name, a file or a Hub id")
    rule = load_rule(args[0])
    described = {
        "rule": rule.name,
        "config": rule.config_dict(),
        "weights": sum(p.numel() for p in rule.parameters()),
        "fingerprint": rule.fingerprint(),
        "record": load_record(args[0]),
    }
    print(as_json(described, indent=2))
    return 0


def _with_recipe(command: str, kind: type[T], args: list[str]) -> T | None:
    """Options of ``train`` and ``search``, which start with a recipe; None if help was wanted."""
    import tyro

    from learned_optim.meta.recipes import load_recipe, recipes

    if not args or args[0] in ("-h", "--help"):
        names = ", ".join(sorted(recipes()))
        print(
            f"usage: learned-optim {command} RECIPE [options]\n\nRECIPE is a shipped recipe "
            f"({names}) or a JSON file as\nwritten into every run folder. Options: "
            f"learned-optim {command} RECIPE --help"
        )
        return None
    if args[0].startswith("-"):
        raise ValueError(
            f"{command} takes the recipe first, then the options: learned-optim {command} RECIPE "
            f"{args[0]} ..."
        )
    folder = Path("runs") / Path(args[0]).stem
    if command == "search":
        folder = folder.with_name(f"{folder.name}-search")
    return tyro.cli(
        kind,
        args=args[1:],
        default=kind(recipe=load_recipe(args[0]), folder=folder),  # type: ignore[call-arg]
        prog=f"learned-optim {command} {args[0]}",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _search(args: list[str]) -> int:
    import torch

    from learned_optim.meta.search import SearchConfig, Trial, search

    config = _with_recipe("search", SearchConfig, args)
    if config is None:
        return 0 if args else 2
    torch.set_num_threads(config.threads)
    found: list[Trial] = []
    with ProgressBar("search") as show:
        show(0, config.trials, "")

        def on_trial(trial: Trial) -> None:
            found.append(trial)
            print(f"{trial.meta_lr:<10g}{trial.validation:.2f}", flush=True)
            best = min(found, key=lambda t: t.validation)
            show(len(found), config.trials, f"best {best.validation:.2f} at {best.meta_lr:g}")

        trials = search(config, on_trial)
    print(f"best: --meta-lr {trials[0].meta_lr:g} (validation {trials[0].validation:.2f})")
    return 0


def _train(args: list[str]) -> int:
    from learned_optim.meta.trainer import TrainConfig

    config = _with_recipe("train", TrainConfig, args)
    if config is None:
        return 0 if args else 2
    return _run_training(config)


def _run_training(config: TrainConfig) -> int:
    import torch
    import torch.distributed as dist

    from learned_optim.meta.trainer import MetaTrainer

    torch.set_num_threads(config.threads)
    under_torchrun = dist.is_torchelastic_launched()
    if under_torchrun:
        # Optimizers import this; were the group there already, default arguments in it would keep
        # the group, and its threads, past destroy_process_group. A thread that lets go of a tensor
        # while the interpreter ends aborts the process.
        import torch.distributed.nn

        # Meta-gradients live on the CPU, whatever else there is.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        trainer = MetaTrainer(config.recipe, config.folder, config.data, config.tensorboard)
        first = trainer.rank == 0
        bar = ProgressBar("meta-training") if first else nullcontext()
        with bar as show:

            def on_run(epoch: int, run: int, meta_loss: float) -> None:
                if show is not None:
                    done = (epoch - 1) * config.recipe.runs_per_epoch + run + 1
                    best = trainer.best.validation if trainer.best else float("nan")
                    total = config.recipe.epochs * config.recipe.runs_per_epoch
                    show(done, total, f"epoch {epoch} loss {meta_loss:.1f} best {best:.2f}")

            trainer.train(on_run)
        if first:
            path = trainer.finish(config.output)
            print(f"wrote {path}")
    finally:
        if under_torchrun:
            dist.destroy_process_group()
    return 0


def _evaluate(args: list[str]) -> int:
    from learned_optim.meta import field, field_report, report
    from learned_optim.meta.evaluate import EvaluateConfig, Evaluation

    suite, args = _take_suite(args)
    summary: dict[str, Any]
    if suite == "field":
        config = _options(field.FieldConfig, args, "evaluate --suite field")
        _import_plotting()
        with ProgressBar("field") as show:
            summary = field.FieldEvaluation(config, show).execute()
        print(field_report.markdown(summary))
        written = field_report.write_report(summary, config.output)
    else:
        chosen = _options(EvaluateConfig, args, "evaluate", EVALUATE_DESCRIPTION)
        _import_plotting()
        with ProgressBar("evaluation") as show:
            summary = Evaluation(chosen, show).execute()
        print(report.markdown(summary))
        written = report.write_report(summary, chosen.output)
    for path in written:
        print(f"wrote {path}")
    return 0


def _options(kind: type[T], args: list[str], command: str, description: str | None = None) -> T:
    """A configuration from command line options, which its fields define."""
    import tyro

    return tyro.cli(
        kind,
        args=args,
        prog=f"learned-optim {command}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _take_suite(args: list[str]) -> tuple[str, list[str]]:
    """The value of ``--suite`` and the arguments without it.

    Raises:
        ValueError: there is no such suite.
    """
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == "--suite":
            rest = args[index + 1 :]
            if not equals:
                value, rest = (rest[0], rest[1:]) if rest else ("", [])
            if value not in SUITES:
                raise ValueError(f"unknown suite {value!r}; known: {', '.join(SUITES)}")
            return value, args[:index] + rest
    return SUITES[0], args


def _import_plotting() -> None:
    """Tables and plots come last: what they need is missed now, not after hours of runs."""
    import matplotlib
    import scipy

    del matplotlib, scipy


class ProgressBar:
    """A progress bar over ``(done, total, what)`` reports, on standard error."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Callable[[int, int, str], None]:
        from tqdm import tqdm

        self.tqdm = tqdm(desc=self.title, dynamic_ncols=True, mininterval=0.5)
        return self._show

    def _show(self, done: int, total: int, what: str) -> None:
        self.tqdm.total = total
        self.tqdm.set_postfix_str(what, refresh=False)
        self.tqdm.update(done - self.tqdm.n)

    def __exit__(self, *exc: object) -> None:
        self.tqdm.close()


if __name__ == "__main__":
    sys.exit(main())
