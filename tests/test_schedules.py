"""Schedules of run and unroll lengths: as data, as text, and in training."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import SMALL

from learned_optim.cli._commands import build_parser
from learned_optim.cli._options import with_values
from learned_optim.meta import MetaTrainer, Recipe
from learned_optim.meta.recipes import recipe_from_json, recipes
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.schedules import Growing, LogUniform, Plan, parse_schedule, steps_of
from learned_optim.meta.seeding import seeded

#: Lengths and learning unrolls, from the planner that the recipe was made with.
PINNED = [
    (100, [0, 1]),
    (100, [0, 1]),
    (100, [0, 1]),
    (100, [0, 1]),
    (262, [0, 1, 2]),
    (332, [0, 1, 2, 3]),
    (100, [0, 1]),
    (100, [0, 1]),
]


def lengths(recipe: Recipe, epoch: int, count: int = 400) -> list[int]:
    return [Plan.draw(recipe, epoch, seeded("plan", epoch, i)).length for i in range(count)]


def test_log_uniform_lengths() -> None:
    recipe = replace(SMALL, horizons=LogUniform(10, 1000))
    logs = sorted(math.log10(n) for n in lengths(recipe, 1))
    assert 1.0 <= logs[0] < logs[-1] <= 3.0
    # The largest gap to the uniform distribution; 1.95 / sqrt(n) is its 99.9 % point.
    gaps = [abs((log - 1.0) / 2.0 - (i + 0.5) / len(logs)) for i, log in enumerate(logs)]
    assert max(gaps) < 1.95 / len(logs) ** 0.5


def test_curriculum_grows_by_a_factor_and_stops() -> None:
    recipe = replace(SMALL, horizons=Growing(25, 400, 5), truncations=Growing(5, 20, 3))
    assert [set(lengths(recipe, epoch, 3)) for epoch in range(1, 8)] == [
        {25}, {50}, {100}, {200}, {400}, {400}, {400},
    ]  # fmt: skip
    plan = Plan.draw(recipe, 2, seeded(0))
    assert [steps for steps, _ in plan.unrolls] == [10] * 5
    assert [learns for _, learns in plan.unrolls] == [True] * 5


def test_schedules_compose() -> None:
    schedule = LogUniform(10, Growing(10, 1000, 3))
    assert [steps_of(schedule, epoch, 0.5) for epoch in (1, 2, 3, 9)] == [10, 32, 100, 100]
    assert max(lengths(replace(SMALL, horizons=schedule), 2)) <= 100
    assert max(lengths(replace(SMALL, horizons=schedule), 3)) > 500


@settings(max_examples=60, deadline=None)
@given(
    horizon=st.integers(1, 200),
    truncation=st.integers(1, 60),
    limit=st.none() | st.integers(1, 5),
    loss_from=st.floats(0, 0.99),
    seed=st.integers(0, 100),
)
def test_plans_cover_the_run_up_to_the_last_meta_step(
    horizon: int, truncation: int, limit: int | None, loss_from: float, seed: int
) -> None:
    recipe = replace(
        SMALL, horizons=horizon, truncation=truncation, unrolls_per_run=limit, loss_from=loss_from
    )
    plan = Plan.draw(recipe, 1, seeded(seed))
    assert plan.length == horizon
    assert all(0 < steps <= truncation for steps, _ in plan.unrolls)
    assert plan.unrolls[-1][1]
    ends, total = [], 0
    for steps, learns in plan.unrolls:
        total += steps
        ends += [total] if learns else []
    assert all(end > loss_from * horizon for end in ends)
    every = range(truncation, horizon + truncation, truncation)
    learnable = [end for end in every if min(end, horizon) > int(loss_from * horizon)]
    assert len(ends) == min(limit or len(learnable), len(learnable))
    if limit is None:
        assert total == horizon


def test_recipes_that_ship_draw_as_before() -> None:
    """Pinned: the plans of a recipe are part of what its checkpoint is."""
    plans = [Plan.draw(recipes()["coordinatewise"], 1, seeded(0, "plan", 1, i)) for i in range(8)]
    found = [(p.length, [i for i, (_, learns) in enumerate(p.unrolls) if learns]) for p in plans]
    assert found == PINNED


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("200", 200),
        ("growing:50:400:10", Growing(50, 400, 10)),
        ("log-uniform:100:2000", LogUniform(100, 2000)),
    ],
)
def test_schedules_as_text_and_json(text: str, schedule: Any) -> None:
    assert parse_schedule(text) == schedule
    args = ["train", "quadratic", "--horizons", text, "--truncations", text]
    options, unknown = build_parser(args).parse_known_args(args)
    assert unknown == []
    recipe = with_values(options.template, options).recipe
    assert (recipe.horizons, recipe.truncations) == (schedule, schedule)
    assert recipe_from_json(recipe.to_json()) == recipe


def test_composed_schedule_in_json() -> None:
    recipe = replace(SMALL, horizons=LogUniform(Growing(5, 10, 2), Growing(50, 100, 2)))
    assert recipe_from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "growin", "first": 1}, "horizons: unknown kind .*Did you mean 'growing'"),
        ({"kind": "growing", "first": 1}, "a growing schedule needs first, last, epochs"),
        ({"kind": "growing", "frist": 1}, "no field 'frist'.*Did you mean 'first'"),
        ({"kind": "log-uniform", "low": 9, "high": 3}, "1 <= low <= high, got low=9 and high=3"),
        ({"kind": "growing", "first": 0, "last": 3, "epochs": 2}, "at least 1, got 0, 3 and 2"),
        ("long", "horizons must be "),
        (0, "horizons must be at least 1, got 0"),
    ],
)
def test_bad_schedules(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from_json({**SMALL.to_json(), "horizons": data})
    with pytest.raises(ValueError, match=r"'log-unifrm:1:2' is no schedule: give .*log-uniform'"):
        parse_schedule("log-unifrm:1:2")
    with pytest.raises(ValueError, match="is no schedule"):
        parse_schedule("growing:1:2")
    with pytest.raises(ValueError, match="choose one"):
        replace(SMALL, horizons=20, long_fraction=0.5, long_horizon=50)


def test_training_follows_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner steps that optimizees take, epoch by epoch."""
    taken: list[int] = []
    recipe = replace(
        SMALL,
        horizons=Growing(4, 16, 3),
        truncation=4,
        epochs=3,
        runs_per_epoch=2,
        coordinates=None,
    )
    recorded = Optimizees.advance_recorded

    def count(self: Optimizees, rule: Any) -> Any:
        taken.append(self.step)
        return recorded(self, rule)

    monkeypatch.setattr(Optimizees, "advance_recorded", count)
    MetaTrainer(recipe, tmp_path).train()
    runs = [taken[a:b] for a, b in zip(starts(taken), [*starts(taken)[1:], None], strict=True)]
    assert [len(run) for run in runs] == [4, 4, 8, 8, 16, 16]
    assert all(run == list(range(len(run))) for run in runs)


def starts(steps: list[int]) -> list[int]:
    return [i for i, step in enumerate(steps) if step == 0]
