"""What each part of the rule `horizon` brings, over three meta-training seeds at a small budget.

    python -m benchmarks.ablations [--workers 2]   # an hour on two cores; $LEARNED_OPTIM_DATA

Every variant is trained from weights that do nothing, by the same number of meta-steps of evolution
strategies on the mixture of `diagonal`; *first order* by truncated backpropagation on the mixture
of `coordinatewise`, whose tasks it needs. All are held against tuned AdamW on validation tasks of
the former. Only MNIST's meta half and synthetic data are read. Finished trainings are kept
in runs/ablations/; the figures go to docs/results/ablations.json and from there into the results.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks import on_field
from learned_optim.cli import ProgressBar
from learned_optim.meta import MetaTrainer
from learned_optim.meta import evolution_jobs as jobs
from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.evolution_tasks import RunSource
from learned_optim.meta.evolution_validation import references
from learned_optim.meta.evolution_weights import initial_weights
from learned_optim.meta.populations import Draw, fitness, roll
from learned_optim.meta.recipes import EvolutionRecipe, coordinatewise, diagonal
from learned_optim.meta.references import Reference, best_score
from learned_optim.meta.statistics import interval
from learned_optim.rules import rule_for
from learned_optim.rules.horizon import HorizonConfig, HorizonRule
from learned_optim.summary import table as markdown_table

RESULT = on_field.RESULTS / "ablations.json"
FOLDER = Path("runs") / "ablations"
SEEDS = (0, 1, 2)
VALIDATION_TASKS = 32
LARGEST_EXCESS = 1.5  # in log loss, that a task counts at most
PLAIN, TRUSTING = HorizonConfig(), diagonal.RECIPE.rule
RECIPE = EvolutionRecipe(
    rule=TRUSTING, task=diagonal.RECIPE.task, meta_steps=40, meta_lr=1e-2, meta_lr_final=1e-3,
    tasks_per_meta_step=5, pairs=3, sigma=0.05,
)  # fmt: skip
#: Truncated backpropagation for about as long.
FIRST_ORDER = replace(
    coordinatewise.RECIPE, rule=TRUSTING, coordinates=None, epochs=2, runs_per_epoch=60,
    validation_runs=4, test_runs=2,
)  # fmt: skip
# Inputs of the network that only the clock and the shape determine: all others are measured.
TIME_AND_SHAPE = slice(1, 10)


@dataclass(frozen=True)
class Variant:
    """A rule that lacks something.

    Attributes:
        rule: its configuration.
        trained: how.
        free: which of its weights are trained, as a mask of each; the others stay zero.
        told: whether training and validation tell it the length of any run.
    """

    rule: HorizonConfig = TRUSTING
    trained: str = "evolution"
    free: Callable[[HorizonRule], list[Tensor]] | None = None
    told: bool = True


def one_direction(rule: HorizonRule) -> list[Tensor]:
    """The factor on the step alone."""
    masks = {name: torch.ones_like(weight) for name, weight in rule.named_parameters()}
    for name in ("readout.weight", "readout.bias", "direct.weight"):
        masks[name][1:] = 0
    return list(masks.values())


def nothing_measured(rule: HorizonRule) -> list[Tensor]:
    """Time and shape are read, and nothing that depends on gradients or weights."""
    masks = {name: torch.ones_like(weight) for name, weight in rule.named_parameters()}
    for name in ("hidden.weight", "direct.weight"):
        masks[name].zero_()[:, TIME_AND_SHAPE] = 1
    return list(masks.values())


VARIANTS = {
    "whole": Variant(),
    "never told the length": Variant(told=False),
    "without trust": Variant(PLAIN),
    "one direction": Variant(free=one_direction),
    "nothing measured": Variant(free=nothing_measured),
    "first order": Variant(trained="replay"),
    "untrained, with trust": Variant(trained=""),
    "untrained": Variant(PLAIN, trained=""),
}


class Untold(RunSource):
    """The same runs, all of unknown length."""

    def draw(self, seed: int, meta_step: int, large: bool = False) -> Draw:
        return replace(super().draw(seed, meta_step, large), known=False)

    def draw_validation(self, seed: int, shortest: int) -> Draw:
        return replace(super().draw_validation(seed, shortest), known=False)


def source_of(variant: Variant, data: DataOptions) -> RunSource:
    """Where a variant's runs come from, in training and validation."""
    return (RunSource if variant.told else Untold).of(RECIPE, data)


@dataclass(frozen=True)
class MaskedJob:
    """A task of a meta-step; weights and mask of shape ``(n,)``."""

    seed: int
    weights: Tensor
    mask: Tensor
    rule: HorizonConfig
    source: RunSource


def run_masked(job: MaskedJob) -> jobs.TaskResult:
    """:func:`~learned_optim.meta.evolution_jobs.run_task` where some weights stay as they are."""
    run = job.source.draw(job.seed, 1)
    change = jobs.perturbations(job.seed, RECIPE.pairs, len(job.weights))
    change = change * job.mask * RECIPE.sigma
    weights = torch.cat((job.weights + change, job.weights - change))
    try:
        found = fitness(roll(rule_for(job.rule), weights, run, job.seed), run.known)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return jobs.TaskResult(job.seed, "", None, 0.0, str(error))
    return jobs.TaskResult(job.seed, "", torch.from_numpy(found), 0.0)


def by_evolution(variant: Variant, seed: int, source: RunSource) -> Tensor:
    """Trained weights, averaged over the second half of the meta-steps."""
    rule = HorizonRule(variant.rule)
    free = variant.free(rule) if variant.free else list(map(torch.ones_like, rule.parameters()))
    mask = parameters_to_vector(free)
    theta = (initial_weights(rule, seed) * mask).requires_grad_()
    adam = torch.optim.Adam([theta], RECIPE.meta_lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        adam, RECIPE.meta_steps, RECIPE.meta_lr_final
    )
    kept = []
    for step in range(RECIPE.meta_steps):
        first = 50_000_000 + 1_000_000 * seed + step * RECIPE.tasks_per_meta_step
        todo = [
            MaskedJob(first + index, theta.detach(), mask, variant.rule, source)
            for index in range(RECIPE.tasks_per_meta_step)
        ]
        gradient, _ = jobs.meta_gradient(list(map(run_masked, todo)), RECIPE.pairs, len(theta))
        theta.grad = gradient * mask
        adam.step()
        schedule.step()
        if step >= RECIPE.meta_steps // 2:
            kept.append(theta.detach().clone())
    return torch.stack(kept).mean(0)


def by_replay(variant: Variant, seed: int) -> Tensor:
    """Weights trained by truncated backpropagation, best by its own validation."""
    recipe = replace(FIRST_ORDER, rule=variant.rule, seed=seed)
    trainer = MetaTrainer(recipe, FOLDER / f"first-order-{seed}")
    trainer.train()
    return parameters_to_vector(trainer.kept.parameters()).detach()


def train(job: tuple[str, int, DataOptions]) -> str:
    """Train a variant; its weights go into the folder."""
    name, seed, data = job
    variant = VARIANTS[name]
    if variant.trained == "evolution":
        found = by_evolution(variant, seed, source_of(variant, data))
    elif variant.trained == "replay":
        found = by_replay(variant, seed)
    else:
        found = initial_weights(HorizonRule(variant.rule), seed)
    torch.save(found, _file(name, seed))
    return name


def _file(name: str, seed: int) -> Path:
    return FOLDER / f"{name.replace(' ', '-')}-{seed}.pt"


def measure(workers: int) -> dict[str, Any]:
    """Train what is missing, validate everything, and write the summary."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = DataOptions()
    load_images("mnist", True, data)
    found: dict[str, Any] = {
        "seeds": list(SEEDS), "validation_tasks": VALIDATION_TASKS, "recipe": RECIPE.to_json(),
        "first_order": FIRST_ORDER.to_json(), "variants": {},
    }  # fmt: skip
    pairs = [(name, seed) for seed in SEEDS for name in VARIANTS]
    missing = [(*pair, data) for pair in pairs if not _file(*pair).exists()]
    with jobs.worker_map(workers) as run, ProgressBar("ablations") as show:
        against = references(FOLDER, VALIDATION_TASKS, RunSource.of(RECIPE, data), run)
        for done, name in enumerate(run(train, missing), 1):
            show(done, len(missing), name)
        for name, variant in VARIANTS.items():
            weights = torch.stack([torch.load(_file(name, seed)) for seed in SEEDS])
            source = source_of(variant, data)
            todo = [jobs.ValidationJob(r.index, source, weights, variant.rule) for r in against]
            excess = behind(list(run(jobs.validate_task, todo)), against)  # (tasks, seeds)
            found["variants"][name] = excess.tolist()
    found["known"] = [reference.known for reference in against]
    on_field.keep(found, RESULT)
    return found


def behind(rows: list[list[float]], against: list[Reference]) -> Tensor:
    """Log of the final loss over tuned AdamW's, bounded, ``(tasks, seeds)``."""
    best = torch.tensor([best_score(reference) for reference in against], dtype=torch.float64)
    excess = torch.tensor(rows, dtype=torch.float64) - best.unsqueeze(1)
    return excess.nan_to_num(LARGEST_EXCESS).clamp(-LARGEST_EXCESS, LARGEST_EXCESS)


def table(path: Path | None = None) -> str:
    """Geometric means of final losses over tuned AdamW's, and over those of the whole rule."""
    return on_field.shown(path or RESULT, _table)


def _table(found: dict[str, Any]) -> str:
    whole = torch.tensor(found["variants"]["whole"])
    known = torch.tensor(found["known"])
    rows = []
    for name, values in found["variants"].items():
        excess = torch.tensor(values)
        cells = [_over_seeds(excess), _over_seeds(excess[known]), _over_seeds(excess[~known])]
        against = "" if name == "whole" else _over_seeds(excess - whole)
        ahead = f"{(excess < 0).double().mean():.0%}"
        rows.append([name, *cells, against, ahead])
    columns = ["all tasks", "length known", "length unknown", "over the whole rule's", "ahead"]
    return markdown_table(["variant", *columns], rows)


def _over_seeds(logs: Tensor) -> str:
    """Geometric mean over tasks ``(tasks, seeds)`` with the 95 % interval over the seeds."""
    found = interval(logs.mean(0))
    mean, half = found["mean"], found["half"]
    assert mean is not None
    if not half:
        return f"{math.exp(mean):.2f}"
    return f"{math.exp(mean):.2f} [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1)
    measure(parser.parse_args().workers)
    print(table())


if __name__ == "__main__":
    main()
