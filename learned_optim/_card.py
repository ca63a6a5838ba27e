"""The model card of an update rule: use, training, evaluation, limits."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from learned_optim.checkpoint import FORMAT, as_json
from learned_optim.rules import UpdateRule
from learned_optim.summary import markdown, table


def model_card(
    rule: UpdateRule,
    name: str,
    *,
    record: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    curves: list[str] | None = None,
    license: str = "mit",
) -> str:
    """The model card of a rule. It says where the arguments leave something unknown.

    Args:
        rule: the update rule.
        name: the Hub repository ``"user/repo"``, or a path, for the usage example.
        record: how the rule was made, as :func:`learned_optim.load_record` returns it.
        evaluation: the summary that ``learned-optim evaluate`` writes.
        curves: names of image files beside the card.
        license: as the Hub spells it.

    Returns:
        Markdown with the Hub's YAML front matter.
    """
    record = record or {}
    recipe = record.get("recipe") or {}
    evolution = recipe.get("method") == "evolution"
    by = "evolution strategies on whole runs" if evolution else "gradient descent"
    weights = sum(weight.numel() for weight in rule.parameters())
    sections = [
        f"---\nlicense: {license}\nlibrary_name: {FORMAT}\ntags:\n- learned-optimizer\n"
        f"- meta-learning\n- learning-to-optimize\n- pytorch\n---",
        f"# {name.rsplit('/', 1)[-1]}",
        f"A learned optimizer for PyTorch: an update rule of type `{rule.name}` with {weights:,} "
        f"weights{f', trained by {by}' if recipe else ''}, used in place of `torch.optim.Adam`.",
        f"## Use\n\n{_usage(rule, name)}",
        f"## Training\n\n{_training(record, recipe)}",
        f"## Evaluation\n\n{_results(record, recipe, evaluation, curves or [])}",
        f"## Limits\n\n{_limits(rule, record, recipe, evaluation)}",
        f"## Licence\n\n{license}",
    ]
    return "\n\n".join(sections) + "\n"


def _usage(rule: UpdateRule, name: str) -> str:
    length = ", total_steps=10_000" if rule.reads_horizon else ""
    lines = [
        "```python",
        "from learned_optim import LearnedOptimizer",
        "",
        "# optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)",
        f'optimizer = LearnedOptimizer(model.parameters(), "{name}"{length})',
        "```",
        "",
        "`pip install learned-optim`. There is no learning rate to tune: `lr` multiplies the "
        "update and 1.0 is what the rule was trained for.",
    ]
    if rule.reads_horizon:
        lines.append(
            "`total_steps` is the number of optimizer steps of the whole run; leave it out if that "
            "is unknown. No scheduler is needed."
        )
    if rule.default_weight_decay(1) > 0:
        lines.append(
            "Where it knows that number it brings a weight decay of its own; `weight_decay=0` "
            "turns it off."
        )
    if rule.needs_loss:
        lines.append("The rule reads the loss: call `optimizer.step(closure)`.")
    return "\n".join(lines)


def _training(record: dict[str, Any], recipe: dict[str, Any]) -> str:
    if not recipe:
        return "The checkpoint holds no record of its training."
    tasks = recipe.get("task") or []
    names = [tasks] if isinstance(tasks, str) else map(str, tasks)
    rows = [f"- Tasks: {', '.join(f'`{name}`' for name in names) or 'not recorded'}"]
    if record.get("data_sets"):
        rows.append(f"- Image sets: {', '.join(map(str, record['data_sets']))}")
    if record.get("trained_for"):
        rows.append(f"- Trained for: {record['trained_for']}")
    if record.get("commit"):
        rows.append(f"- Source version: `{record['commit']}`")
    details = as_json(record, indent=2)
    return "\n".join(rows) + (
        f"\n\n<details><summary>Full record</summary>\n\n```json\n{details}\n```\n\n</details>"
    )


def _is_number(data: dict[str, Any], key: str) -> bool:
    return isinstance(data.get(key), (int, float)) and not isinstance(data[key], bool)


def _results(
    record: dict[str, Any],
    recipe: dict[str, Any],
    evaluation: dict[str, Any] | None,
    curves: list[str],
) -> str:
    parts = []
    if evaluation is not None:
        # The report's headings go one level down, under the card's own.
        parts.append(re.sub(r"^#", "##", markdown(evaluation).strip(), flags=re.MULTILINE))
    parts += [f"![{Path(curve).stem}]({curve})" for curve in curves]
    behind = (record.get("behind_adamw") or {}).get("average") or {}
    if _is_number(behind, "mean"):
        parts.append(
            f"On validation tasks of its meta-training mixture, the final loss is "
            f"{math.exp(behind['mean']):.3f} times tuned AdamW's (geometric mean)."
        )
    kind = recipe.get("validation_mean", "arithmetic")
    rows = []
    if _is_number(record, "validation"):
        rows.append(["validation", kind, f"{record['validation']:.4g}", ""])
    test = record.get("test") or {}
    mean = "mean" if kind == "arithmetic" else "geometric_mean"
    if _is_number(test, mean):
        runs = f"test, {test.get('runs', '?')} fresh runs"
        if test.get("task", recipe.get("task")) != recipe.get("task"):
            runs += f" of {test['task']}"
        spread = f"{test['std']:.4g}" if mean == "mean" and _is_number(test, "std") else ""
        rows.append([runs, kind, f"{test[mean]:.4g}", spread])
    if rows:
        steps = _tested_horizon(recipe)
        summed = f"loss summed over {steps:,} steps" if steps else "summed loss"
        parts.append(table([summed, "mean", "value", "standard deviation"], rows))
    return "\n\n".join(parts) or "None was recorded."


def _tested_horizon(recipe: dict[str, Any]) -> int | None:
    """Inner steps of the runs behind the record's figures, if the recipe says."""
    return recipe.get("validation_horizon") or recipe.get("horizon")


def _limits(
    rule: UpdateRule,
    record: dict[str, Any],
    recipe: dict[str, Any],
    evaluation: dict[str, Any] | None,
) -> str:
    unknown = "an unknown number of"
    trained = f"up to {rule.trained_steps:,}" if rule.trained_steps else unknown
    steps = [entry["steps"] for entry in evaluation["tasks"].values()] if evaluation else []
    longest = max([*steps, _tested_horizon(recipe) or 0])
    tested = f"{longest:,}" if longest else unknown
    state = rule.init_state(torch.zeros(64, 64)).values()
    size = sum(entry.numel() * entry.element_size() for entry in state if entry.dim() > 1) / 64**2
    runs = record.get("trained_for") or (f"runs of {trained} steps and tested on runs of {tested}")
    rows = [
        f"- Trained on {runs}; what it does beyond is unknown.",
        "- Tasks unlike those it was trained on may train slowly or diverge: compare with a tuned "
        "Adam first.",
        f"- State takes {size:,.0f} bytes per parameter in float32 (Adam: 8).",
    ]
    if not rule.zero_preserving:
        rows.append("- Parameters whose gradient stays exactly zero still drift.")
    return "\n".join(rows)
