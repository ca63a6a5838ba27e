"""The ``learned-optim`` command: list, show, search, train, evaluate.

Options of ``search``, ``train`` and ``evaluate`` are generated from their config dataclasses:
:class:`~learned_optim.meta.recipes.Recipe`, :class:`~learned_optim.meta.evaluate.EvaluateConfig`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from learned_optim.meta.evolution import EvolutionTrainConfig
    from learned_optim.meta.recipes import AnyRecipe
    from learned_optim.meta.trainer import MetaTrainer, TrainConfig

T = TypeVar("T")
U = TypeVar("U")

USAGE = """usage: learned-optim COMMAND ...

commands:
  list                 shipped checkpoints, update rules, tasks, recipes and baselines
  show CHECKPOINT      what a checkpoint is and how it was made
  search RECIPE        random search of a recipe's meta-learning rate
  train RECIPE         meta-train an update rule
  evaluate             compare learned with tuned hand-written optimizers; with --suite field, on
                       real training runs, against tuned schedules and rivals that need no tuning
  explain CHECKPOINT   a report with plots on what an update rule does

  COMMAND --help       its most common options; --help-all: every option, by group
  --rules MODULE       with any command: import a module of your own that defines update rules
  --version            the version of learned_optim

examples:
  learned-optim train quick                     meta-train in two minutes
  learned-optim show runs/quick                 look at what came of it
  learned-optim evaluate --checkpoints runs/quick --tasks digits
"""

SHOW_USAGE = """usage: learned-optim show CHECKPOINT

Prints what a checkpoint is as JSON: update rule, configuration, number of weights, fingerprint, and
the record of how it was made. CHECKPOINT is a shipped name, a file, a run folder or a Hub id.
"""

LIST_USAGE = """usage: learned-optim list

Prints the names of shipped checkpoints, update rules, tasks, recipes and baselines, and what they
are.
"""

TRAIN_USAGE = """usage: learned-optim train RECIPE [options]

Meta-trains an update rule in a run folder; given again, the same command goes on with an
interrupted run. RECIPE is the name of one that ships, a TOML or JSON file, or a run folder.
"""

SEARCH_USAGE = """usage: learned-optim search RECIPE [options]

Tries random meta-learning rates on short runs of a recipe and prints the best. RECIPE is the name
of one that ships, a TOML or JSON file, or a run folder.
"""

EVALUATE_USAGE = """usage: learned-optim evaluate [options]

Runs learned optimizers, untuned, against hand-written ones tuned for each task, and writes tables
and learning curves. Given again, the same command does only the runs that are missing.
"""

#: What ``evaluate`` runs: tasks and horizons as asked for, or the field of real training runs.
SUITES = ("tasks", "field")

#: Modules of the ``meta`` extra, which the package is installed without unless asked.
META_EXTRA = (
    "filelock", "matplotlib", "numpy", "scipy", "sklearn", "tensorboard", "tomli", "torchvision",
    "tqdm", "tyro",
)  # fmt: skip

HELP = ("-h", "--help", "--help-all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    # As under `python -m`: tasks of one's own, "my_tasks:name", may lie in the current folder.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # now, where a closed pipe can still be caught
        return status
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nlearned-optim: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        sys.path.remove(here)


def _run(args: list[str]) -> int:
    commands = {
        "list": _list,
        "show": _show,
        "search": _search,
        "train": _train,
        "evaluate": _evaluate,
        "explain": _explain,
    }
    if args == ["--version"]:
        from learned_optim import __version__

        print(f"learned-optim {__version__}")
        return 0
    command = ""
    try:
        args = _imported_rules(args)
        if not args or args[0] in HELP:
            print(USAGE, end="")
            return 0 if args else 2
        command, *args = args
        if command not in commands:
            print(f"learned-optim: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
            return 2
        return commands[command](args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"learned-optim: {_message(error, command)}", file=sys.stderr)
        return 1


def _message(error: Exception, command: str) -> str:
    """What went wrong; for a missing package of ours, how to get it."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and missing in META_EXTRA:
        return f"{command} needs {missing}: pip install 'learned-optim[meta]'"
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return str(error.strerror)  # without "[Errno 28]"
    return str(error)


def _imported_rules(args: list[str]) -> list[str]:
    """The arguments without every ``--rules MODULE``, after importing the modules."""
    rest = []
    while args:
        flag, *args = args
        if flag != "--rules":
            rest.append(flag)
            continue
        from learned_optim.meta.recipes import import_rules

        if not args:
            raise ValueError("--rules takes a module that defines update rules")
        module, *args = args
        import_rules(module)
    return rest


def _list(args: list[str]) -> int:
    if args and args[0] in HELP:
        print(LIST_USAGE, end="")
        return 0
    if args:
        raise ValueError(f"list takes no arguments, got {' '.join(args)}")
    from learned_optim._options import entry, listing, sections
    from learned_optim.meta.baselines import BASELINES
    from learned_optim.meta.recipes import recipe_descriptions
    from learned_optim.meta.tasks import described_families
    from learned_optim.rules import rule_class, rule_names

    def lines(described: dict[str, str]) -> list[str]:
        return [line for name, text in described.items() for line in entry(name, text)]

    rules = {name: (rule_class(name).__doc__ or "").partition("\n")[0] for name in rule_names()}
    tasks: list[str] = []
    for about, names in described_families().items():
        tasks += [f"  {about}", *listing(names, 6)]
    groups = {
        "checkpoints": lines(_shipped()),
        "update rules": lines(rules),
        "tasks": tasks,
        "recipes": lines(recipe_descriptions()),
        "baselines": listing(BASELINES),
    }
    print(sections(groups).lstrip("\n"), end="")
    return 0


def _shipped() -> dict[str, str]:
    """What the shipped checkpoints are, by name; aliases first."""
    from learned_optim.pretrained import ALIASES, list_pretrained, load_record, load_rule

    found = {alias: f"stands for {name}" for alias, name in ALIASES.items()}
    for name in list_pretrained():
        if name not in ALIASES:
            task = load_record(name).get("recipe", {}).get("task", "an unknown task")
            found[name] = f"update rule {load_rule(name).name!r}, meta-trained on {task!r}"
    return {name: text for name, text in found.items() if name in list_pretrained()}


def _show(args: list[str]) -> int:
    if args and args[0] in HELP:
        print(SHOW_USAGE, end="")
        return 0
    if len(args) != 1 or args[0].startswith("-"):
        raise ValueError(
            "show takes one checkpoint: a shipped name, a file, a run folder or a Hub id"
        )
    from learned_optim.checkpoint import as_json
    from learned_optim.pretrained import checkpoint_path, load_record, load_rule

    path = checkpoint_path(args[0])
    rule = load_rule(path)
    described = {
        "rule": rule.name,
        "config": rule.config_dict(),
        "weights": sum(p.numel() for p in rule.parameters()),
        "fingerprint": rule.fingerprint(),
        "record": load_record(path),
    }
    if path != Path(args[0]):
        described["file"] = str(path)
    print(as_json(described, indent=2))
    return 0


# ---- train and search, which start with a recipe


def _with_recipe(
    command: str, usage: str, kind: type[T], args: list[str], evolution: type[U] | None = None
) -> T | U | None:
    """Options of ``train`` and ``search``; None if help was wanted, which is then printed.

    Args:
        kind: configuration of the command for recipes of backpropagation.
        evolution: the same for recipes of evolution strategies, if the command knows those.
    """
    from learned_optim.meta.recipes import EvolutionRecipe, load_recipe, rule_config

    source, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    if not args or any(flag in HELP for flag in rest):
        recipe = load_recipe(source) if source else None
        shown: type = kind
        if isinstance(recipe, EvolutionRecipe):
            shown = _evolution_kind(evolution, command, source)
        _print_recipe_help(usage, shown, recipe, command, source, "--help-all" in rest)
        return None
    if not source:
        raise ValueError(
            f"{command} takes the recipe first, then the options: learned-optim {command} RECIPE "
            f"{args[0]} ..."
        )
    recipe = load_recipe(source)
    if "--rule" in rest:
        at = rest.index("--rule")
        if at + 1 == len(rest):
            raise ValueError("--rule takes the name of an update rule, or module:name")
        recipe = replace(recipe, rule=rule_config(rest[at + 1]))
        del rest[at : at + 2]
    folder, prog = _run_folder(command, source), f"{command} {source}"
    if isinstance(recipe, EvolutionRecipe):
        chosen = _evolution_kind(evolution, command, source)
        _check_applies(rest, chosen, recipe, kind, source)
        return _options(chosen, rest, prog, chosen(recipe=recipe, folder=folder))  # type: ignore[call-arg]
    return _options(kind, rest, prog, kind(recipe=recipe, folder=folder))  # type: ignore[call-arg]


def _evolution_kind(kind: type[U] | None, command: str, source: str) -> type[U]:
    if kind is None:
        raise ValueError(
            f"{command} takes no recipe of evolution strategies, and {source!r} is one: it goes "
            f"with learned-optim train"
        )
    return kind


def _check_applies(
    args: list[str], kind: type, recipe: AnyRecipe, other: type, source: str
) -> None:
    """Tell an option of recipes of backpropagation from one that does not exist.

    Raises:
        ValueError: an option that recipes of evolution strategies do not have.
    """
    from learned_optim.meta.recipes import Recipe

    def names(*classes: Any) -> set[str]:
        return {f.name for cls in classes for f in fields(cls)} - {"recipe", "rule", "data"}

    known = names(kind, type(recipe))
    for arg in args:
        flag = arg.partition("=")[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in names(other, Recipe) - known:
            options = ", ".join(f"--{n.replace('_', '-')}" for n in sorted(known))
            raise ValueError(
                f"{flag} does not apply to {source!r}, a recipe of evolution strategies, which "
                f"takes {options}"
            )


def _run_folder(command: str, source: str) -> Path:
    """Where a command puts its files unless told: a run folder's recipe goes on in that folder."""
    from learned_optim.meta.run_folder import RECIPE, RunFolder

    path = Path(source)
    folder = path if path.is_dir() else path.parent if path.name == RECIPE else None
    if folder is not None and command == "train" and RunFolder.is_one(folder):
        return folder
    name = folder.resolve().name if folder is not None else path.stem
    return Path("runs") / (f"{name}-search" if command == "search" else name)


def _print_recipe_help(
    usage: str, kind: type, recipe: AnyRecipe | None, command: str, source: str, everything: bool
) -> None:
    from learned_optim._options import entry, options, sections
    from learned_optim.meta.recipes import (
        COMMON,
        EVOLUTION_COMMON,
        EVOLUTION_GROUPS,
        GROUPS,
        EvolutionRecipe,
        recipe_descriptions,
        recipes,
    )

    print(usage.replace("RECIPE [options]", f"{source or 'RECIPE'} [options]"), end="")
    known = recipe is not None
    recipe = recipe or recipes()["general"]
    evolves = isinstance(recipe, EvolutionRecipe)
    folder = _run_folder(command, source or "NAME")
    config = kind(recipe=recipe, folder=folder)
    groups: dict[str, list[str]] = {}
    if not known:
        described = recipe_descriptions().items()
        groups["recipes"] = [line for name, text in described for line in entry(name, text)]
    groups["options"] = options(config)
    rule = entry("--rule NAME", "Update rule, or module:name for one of your own.")
    if everything:
        for title, names in (EVOLUTION_GROUPS if evolves else GROUPS).items():
            groups[title] = options(recipe, names, known)
        groups.setdefault("what is trained", []).extend(rule)
        if known:
            groups["the update rule"] = options(recipe.rule)
        groups["data"] = options(config.data)
        print(sections(groups), end="")
        return
    groups["the recipe"] = options(recipe, EVOLUTION_COMMON if evolves else COMMON, known) + rule
    print(sections(groups), end="")
    more = f"learned-optim {command} {source or 'RECIPE'} --help-all"
    print(f"\nEvery field of a recipe is an option: {more}")


def _search(args: list[str]) -> int:
    from learned_optim.meta.search import SearchConfig, Trial, search

    config = _with_recipe("search", SEARCH_USAGE, SearchConfig, args)
    if config is None:
        return 0 if args else 2
    import torch

    torch.set_num_threads(config.threads)
    found: list[Trial] = []
    runs = config.trial_epochs * config.recipe.runs_per_epoch
    with ProgressBar("search") as show:

        def on_run(done: int) -> None:
            tried = [t for t in found if t.validation < float("inf")]
            best = min(tried, key=lambda t: t.validation, default=None)
            said = f" best {best.validation:.2f} at {best.meta_lr:g}" if best else ""
            trial = min(len(found) + 1, config.trials)
            show(len(found) * runs + done, config.trials * runs, f"trial {trial}{said}")

        def on_trial(trial: Trial) -> None:
            found.append(trial)
            figure = f"{trial.validation:.2f}" if trial.validation < float("inf") else "diverged"
            print(f"{trial.meta_lr:<10g}{figure}", flush=True)
            on_run(0)

        on_run(0)
        trials = search(config, on_trial, on_run)
    print(f"best: --meta-lr {trials[0].meta_lr:g} (validation {trials[0].validation:.2f})")
    return 0


def _train(args: list[str]) -> int:
    from learned_optim.meta.evolution import EvolutionTrainConfig
    from learned_optim.meta.trainer import TrainConfig

    config = _with_recipe("train", TRAIN_USAGE, TrainConfig, args, EvolutionTrainConfig)
    if config is None:
        return 0 if args else 2
    if isinstance(config, EvolutionTrainConfig):
        return _run_evolution(config)
    return _run_training(config)


def _run_training(config: TrainConfig) -> int:
    import torch
    import torch.distributed as dist

    from learned_optim.checkpoint import check_writable
    from learned_optim.meta.trainer import MetaTrainer

    torch.set_num_threads(config.threads)
    if config.output is not None:
        check_writable(config.output)
    under_torchrun = dist.is_torchelastic_launched()
    if under_torchrun:
        # Optimizers import this; were the group there already, default arguments in it would keep
        # the group, and its threads, past destroy_process_group. A thread that lets go of a tensor
        # while the interpreter ends aborts the process.
        import torch.distributed.nn

        # Meta-gradients live on the CPU, whatever else there is.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        first = not under_torchrun or dist.get_rank() == 0
        with ProgressBar("meta-training") if first else nullcontext() as show:
            trainer = MetaTrainer(config.recipe, config.folder, config.data, config.tensorboard)
            path = None
            if show is None:
                trainer.train()
            else:
                shown = TrainingProgress(trainer, show)
                trainer.train(shown.on_run, shown.report)
                path = trainer.finish(config.output, shown.report)
        if path is not None:
            print(_figures(trainer, path))
            print(f"wrote {path}")
    finally:
        if under_torchrun:
            dist.destroy_process_group()
    return 0


def _run_evolution(config: EvolutionTrainConfig) -> int:
    import torch
    import torch.distributed as dist

    from learned_optim.checkpoint import check_writable
    from learned_optim.meta.evolution import EvolutionTrainer

    if dist.is_torchelastic_launched():
        raise ValueError(
            "evolution strategies share work among processes of one machine: start them without "
            "torchrun, with --workers"
        )
    torch.set_num_threads(1)  # every worker has a core of its own
    if config.output is not None:
        check_writable(config.output)
    recipe = config.recipe
    with ProgressBar("meta-training") as show:
        trainer = EvolutionTrainer(recipe, config.folder, config.workers, config.data)

        def tell(what: str) -> None:
            behind = trainer.last_validation()
            said = f" behind AdamW {behind['average']['mean']:.3f}" if behind else ""
            show(trainer.meta_steps, recipe.meta_steps, what + said)

        def on_step(metrics: dict[str, Any]) -> None:
            tell(f"meta-step {metrics['meta_step']}")

        def report(what: str, done: int, total: int) -> None:
            tell(f"{what} {done}/{total}")

        tell("starting")
        if config.references_only:
            trainer.compute_references(report)
            return 0
        trainer.train(on_step, report)
        path = trainer.finish(config.output)
    behind = trainer.last_validation()
    if behind is not None:
        average = behind["average"]
        print(
            f"log of the final loss minus that of tuned AdamW: mean {average['mean']:.3f}, median "
            f"{average['median']:.3f}; ahead on {average['share_ahead']:.0%} of "
            f"{recipe.validation_tasks} tasks"
        )
    print(f"wrote {path}")
    return 0


def _figures(trainer: MetaTrainer, path: Path) -> str:
    """What came of a training, in a line."""
    from learned_optim.pretrained import load_record

    record, recipe = load_record(path), trainer.recipe
    test = record["test"]
    steps = recipe.validation_horizon or recipe.horizon
    if recipe.validation_mean == "geometric":
        tested = f"{_number(test['geometric_mean'])} (geometric means)"
    else:
        tested = f"{_number(test['mean'])} ± {_number(test['std'])}"
    return (
        f"loss summed over {steps} steps: validation {_number(record['validation'])} (best epoch "
        f"{record['epoch']} of {record['epochs_run']}), test on {test['runs']} fresh runs {tested}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


class TrainingProgress:
    """Shows a training's runs, validation and test in one bar.

    Args:
        trainer: whose progress.
        show: takes ``(done, total, what)``.
    """

    def __init__(self, trainer: MetaTrainer, show: Callable[[int, int, str], None]) -> None:
        self.trainer, self.show = trainer, show
        self.per_epoch = trainer.recipe.runs_per_epoch
        self.total = trainer.recipe.epochs * self.per_epoch
        self.done, self.loss = trainer.epoch * self.per_epoch, ""
        self._tell("starting")

    def on_run(self, epoch: int, run: int, meta_loss: float) -> None:
        self.done = (epoch - 1) * self.per_epoch + run + 1
        self.loss = f"loss {meta_loss:.1f}"
        self._tell(f"epoch {epoch} {self.loss}")

    def report(self, what: str, done: int, total: int) -> None:
        epoch = f"epoch {self.trainer.epoch + 1} " if what == "validation" else ""
        self._tell(f"{epoch}{what} {done}/{total}")

    def _tell(self, what: str) -> None:
        best = self.trainer.best
        self.show(self.done, self.total, f"{what} best {best.validation:.2f}" if best else what)


def _evaluate(args: list[str]) -> int:
    from learned_optim.meta import field
    from learned_optim.meta.evaluate import EvaluateConfig, Evaluation

    suite, args = _take_suite(args)
    if any(flag in HELP for flag in args):
        defaults = field.FieldConfig() if suite == "field" else EvaluateConfig()
        _print_evaluate_help(defaults, "--help-all" in args)
        return 0
    from learned_optim.checkpoint import check_writable
    from learned_optim.meta import field_report, report

    summary: dict[str, Any]
    if suite == "field":
        config = _options(field.FieldConfig, args, "evaluate --suite field")
        _import_plotting()
        with ProgressBar("field") as show:
            measured = field.FieldEvaluation(config, show)
            check_writable(config.output / "table.md")
            summary = measured.execute()
        print(field_report.brief(summary))
        written = field_report.write_report(summary, config.output)
    else:
        chosen = _options(EvaluateConfig, args, "evaluate")
        _import_plotting()
        with ProgressBar("evaluation") as show:
            evaluation = Evaluation(chosen, show)
            check_writable(chosen.output / "table.md")
            summary = evaluation.execute()
        print(report.brief(summary))
        written = report.write_report(summary, chosen.output)
    for path in written:
        print(f"wrote {path}")
    return 0


def _explain(args: list[str]) -> int:
    from learned_optim.explain.command import run

    return run(args)


def _options(kind: type[T], args: list[str], command: str, default: T | None = None) -> T:
    """A configuration from command line options, which its fields define.

    Args:
        default: holds the values of options that are not given; ``None``: those of ``kind``.
    """
    import tyro

    return tyro.cli(
        kind,
        args=args,
        default=kind() if default is None else default,
        prog=f"learned-optim {command}",
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


def _print_evaluate_help(config: Any, everything: bool) -> None:
    from learned_optim._options import options, sections

    groups = {"options": options(config)}
    if everything:
        groups["data"] = options(config.data)
    print(EVALUATE_USAGE + sections(groups), end="")
    if not everything:
        print("\nWhere data is looked for: learned-optim evaluate --help-all")


class ProgressBar:
    """A progress bar over ``(done, total, what)`` reports, on standard error."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Callable[[int, int, str], None]:
        from tqdm import tqdm

        # smoothing=0: time left by the average so far, validation included. A delay keeps the bar
        # from the screen until there is progress, and so off that of an error.
        self.tqdm = tqdm(
            desc=self.title,
            dynamic_ncols=True,
            mininterval=0.5,
            miniters=0,
            smoothing=0,
            delay=1e-3,
        )
        self._begun = False
        return self._show

    def _show(self, done: int, total: int, what: str) -> None:
        if not self._begun or done < self.tqdm.n:
            # What earlier processes did says nothing of how long the rest takes.
            self.tqdm.delay = 0
            self.tqdm.reset(total)
            self.tqdm.initial = self.tqdm.n = self.tqdm.last_print_n = done
            self._begun = True
        self.tqdm.total = total
        self.tqdm.set_postfix_str(what, refresh=False)
        self.tqdm.update(done - self.tqdm.n)

    def __exit__(self, *exc: object) -> None:
        self.tqdm.close()


if __name__ == "__main__":
    sys.exit(main())
