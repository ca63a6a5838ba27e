"""What directions that treat matrices as matrices would bring to the default, and cost.

    python -m benchmarks.directions    # half an hour on one core; $LEARNED_OPTIM_DATA

Every step of the default on a matrix or a kernel, flattened to two dimensions, is replaced by one
of the same Frobenius norm: with rows, columns or both brought to one root mean square (both: two
rounds, as in Sinkhorn and Knopp 1967), or orthogonalised by six Newton-Schulz iterations (Muon,
Jordan et al. 2024), in one row twice as long. *Lagged* brings rows and columns to one root mean
square by factors that follow with a delay, so that a single pass over the coordinates would do.
Tasks of known length of the meta-training mixture, seeds that trained nothing; final losses over
the default's own: geometric mean with a 95 % interval by bootstrap, median, largest, and on how
many tasks it is ahead. Last, the seconds of one matrix of 512 by 512 over those of the default's
whole step on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks import no_options
from learned_optim import LearnedOptimizer, load_rule
from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations import Draw, draw, scores
from learned_optim.meta.populations._base import Params
from learned_optim.meta.populations._driver import CopiesOptimizer
from learned_optim.meta.populations._rollout import _roll
from learned_optim.meta.statistics import geometric_mean
from learned_optim.rules import UpdateRule
from learned_optim.summary import table

TASKS, FIRST_SEED, SHORTEST = 40, 30_000_000, 150
LEAST_SIDE = 3
_LAG = 0.1
_LARGEST_RATIO = 10.0
_TINY = 1e-30
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024

#: From a step ``(rows, columns)``, and a place to remember in, to another direction.
Direction = Callable[[Tensor, list[Tensor]], Tensor]


def _evened(step: Tensor, dim: int) -> Tensor:
    return step / (step.square().mean(dim, keepdim=True).sqrt() + _TINY)


def even_rows(step: Tensor, memory: list[Tensor]) -> Tensor:
    """Rows of one root mean square."""
    return _evened(step, 1)


def even_columns(step: Tensor, memory: list[Tensor]) -> Tensor:
    """Columns of one root mean square."""
    return _evened(step, 0)


def even(step: Tensor, memory: list[Tensor]) -> Tensor:
    """Both, nearly."""
    for _ in range(2):
        step = _evened(_evened(step, 1), 0)
    return step


def lagged(step: Tensor, memory: list[Tensor]) -> Tensor:
    """Both in the long run: logs of the factors move by a share of what is uneven."""
    if not memory:
        memory.extend((torch.zeros(len(step), 1), torch.zeros(1, step.shape[1])))
    found = step * (memory[0] + memory[1]).exp()
    square = found.square()
    for factors, dim in zip(memory, (1, 0), strict=True):
        uneven = (square.mean(dim, keepdim=True) / square.mean() + 1e-12).log()
        factors.sub_(_LAG * uneven).clamp_(-math.log(4), math.log(4))
    return found


def orthogonal(step: Tensor, memory: list[Tensor]) -> Tensor:
    """Singular values near 1."""
    a, b, c = _QUINTIC
    tall = step.shape[0] > step.shape[1]
    found = step.t() if tall else step
    found = found / (found.norm() + _TINY)
    for _ in range(6):
        gram = found @ found.t()
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.t() if tall else found


#: Directions by name, and how long a step is in units of the default's.
DIRECTIONS: dict[str, tuple[Direction | None, float]] = {
    "the default's": (None, 1.0),
    "even rows": (even_rows, 1.0),
    "even columns": (even_columns, 1.0),
    "both even": (even, 1.0),
    "both even, lagged": (lagged, 1.0),
    "orthogonal": (orthogonal, 1.0),
    "orthogonal, twice": (orthogonal, 2.0),
}


class Redirected(CopiesOptimizer):
    """Copies of which each takes steps of the same rule in another direction."""

    def __init__(self, rule: UpdateRule, initial: Params, total_steps: int) -> None:
        weights = parameters_to_vector(rule.parameters()).detach().repeat(len(DIRECTIONS), 1)
        super().__init__(rule, weights, initial, total_steps)
        self._memory: list[list[Tensor]] = [[] for _ in self._slices]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        before = [value.clone() for value in self._slices]
        super().step(grads)
        kinds = list(DIRECTIONS.values())
        for index, (value, old) in enumerate(zip(self._slices, before, strict=True)):
            direction, length = kinds[index % len(kinds)]
            if (
                direction is None
                or value.dim() < 2
                or min(len(value), value[0].numel()) < LEAST_SIDE
            ):
                continue
            step = (value - old).flatten(1)
            norm = step.norm()
            if norm > 0 and norm.isfinite():
                other = direction(step, self._memory[index])
                value.copy_(old + (other * (length * norm / other.norm())).view_as(old))


def logs(run: Draw, seed: int) -> list[float]:
    """Logs of the final losses of all directions over the first one's."""
    rule = load_rule("default")

    def start(initial: Params) -> tuple[Params, Callable[[Sequence[Tensor]], None]]:
        copies = Redirected(rule, initial, run.steps)
        return copies.params, copies.step

    final = torch.from_numpy(scores(_roll(start, run, seed))[0])
    bound = math.log(_LARGEST_RATIO)
    return (final - final[0]).clamp(-bound, bound).tolist()


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Of a call, the shortest of several."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found)


def costs() -> list[float]:
    """Seconds of every direction for a matrix of 512 by 512, over those of the default's step."""
    param = torch.nn.Parameter(0.05 * torch.randn(512, 512))
    param.grad = torch.randn(512, 512)
    optimizer = LearnedOptimizer([param], total_steps=1000)
    optimizer.step()
    own = seconds(optimizer.step)
    step = torch.randn(512, 512)
    return [
        0.0 if direction is None else seconds(partial(direction, step, [])) / own
        for direction, _ in DIRECTIONS.values()
    ]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found: list[list[float]] = []
    seed = FIRST_SEED
    while len(found) < TASKS:
        run = draw(seed, DataOptions(), SHORTEST)
        if run.known:
            found.append(logs(run, seed))
        seed += 1
    lines = []
    for name, column, cost in zip(DIRECTIONS, zip(*found, strict=True), costs(), strict=True):
        ratios = [math.exp(value) for value in column]
        mean = geometric_mean(ratios)
        ahead = sum(ratio < 1 for ratio in ratios)
        lines.append([
            name, f"{mean['mean']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]",
            f"{sorted(ratios)[len(ratios) // 2]:.3f}", f"{max(ratios):.1f}",
            f"{ahead} of {len(ratios)}", f"{cost:.1f}",
        ])  # fmt: skip
    print(table(["direction", "final loss", "median", "largest", "ahead", "more seconds"], lines))


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
