"""Upload of update rules to the Hugging Face Hub.

A repository holds ``model.safetensors`` (the checkpoint), ``config.json`` (which rule, so that a
foreign repository is refused before its weights are fetched) and ``README.md`` (the card).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from learned_optim.checkpoint import FORMAT, FORMAT_VERSION, as_json, save_rule
from learned_optim.pretrained import CHECKPOINT_FILE, CONFIG_FILE, is_hub_id, load_record, load_rule
from learned_optim.rules import UpdateRule
from learned_optim.summary import draw, markdown, table


def push_to_hub(
    rule: str | os.PathLike[str] | UpdateRule,
    repo_id: str,
    *,
    record: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    license: str = "mit",
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload an update rule with its configuration and model card.

    Args:
        rule: an update rule, or a source as for :func:`learned_optim.load_rule`.
        repo_id: ``"user/repo"``, optionally ``"@branch"``; created where missing.
        record: how the rule was made; ``None`` for the record of the checkpoint ``rule``.
        evaluation: the summary that ``learned-optim evaluate`` writes. The card shows its table and
            learning curves, which need matplotlib.
        license: the card's licence, as the Hub spells it.
        private: whether a new repository is private; ``None`` for the account's default.
        token: access token; ``None`` takes the logged-in user's.

    Returns:
        URL of the commit.

    Raises:
        ValueError: ``repo_id`` is not of that form.
        TypeError: the rule is not registered under a name, or the record is not JSON.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, as it does without a valid token.

    Example:
        >>> push_to_hub("mnist", "somebody/mnist-optimizer")  # doctest: +SKIP
        >>> LearnedOptimizer(params, "somebody/mnist-optimizer")  # doctest: +SKIP
    """
    from huggingface_hub import HfApi

    if not is_hub_id(repo_id):
        raise ValueError(
            f"a Hub id has the form 'user/repo' or 'user/repo@branch', got {repo_id!r}"
        )
    if not isinstance(rule, UpdateRule):
        record = load_record(rule) if record is None else record
        rule = load_rule(rule)
    repo, _, branch = repo_id.partition("@")
    api = HfApi(token=token, library_name=FORMAT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_rule(rule, folder / CHECKPOINT_FILE, record)
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rule": rule.name,
            "config": rule.config_dict(),
            "fingerprint": rule.fingerprint(),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        curves = draw(evaluation, folder) if evaluation else []
        card = model_card(
            rule, repo, record=record, evaluation=evaluation, curves=curves, license=license
        )
        (folder / "README.md").write_text(card)
        api.create_repo(repo, private=private, exist_ok=True)
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=branch or None,
            commit_message="Upload learned_optim update rule",
        )
    return str(commit.commit_url)


# ---- the card


def model_card(
    rule: UpdateRule,
    name: str,
    *,
    record: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    curves: list[str] | None = None,
    license: str = "mit",
) -> str:
    """The model card of a rule, Markdown with the Hub's YAML; it names what is unknown.

    Args:
        rule: the update rule.
        name: the Hub repository ``"user/repo"``, or a path, for the usage example.
        record: how the rule was made, as :func:`learned_optim.load_record` returns it.
        evaluation: the summary that ``learned-optim evaluate`` writes.
        curves: names of image files beside the card.
        license: as the Hub spells it.
    """
    record = record or {}
    recipe = record.get("recipe") or {}
    evolution = recipe.get("method") == "evolution"
    by = "evolution strategies on whole runs" if evolution else "gradient descent"
    weights = sum(weight.numel() for weight in rule.parameters())
    steps = recipe.get("validation_horizon") or recipe.get("horizon")  # of the record's figures
    sections = [
        f"---\nlicense: {license}\nlibrary_name: {FORMAT}\ntags:\n- learned-optimizer\n"
        f"- meta-learning\n- learning-to-optimize\n- pytorch\n---",
        f"# {name.rsplit('/', 1)[-1]}",
        f"A learned optimizer for PyTorch: an update rule of type `{rule.name}` with {weights:,} "
        f"weights{f', trained by {by}' if recipe else ''}, used in place of `torch.optim.Adam`.",
        f"## Use\n\n{_usage(rule, name)}",
        f"## Training\n\n{_training(record, recipe)}",
        f"## Evaluation\n\n{_results(record, recipe, evaluation, curves or [], steps)}",
        f"## Limits\n\n{_limits(rule, record, evaluation, steps)}",
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
        "It needs the package `learned_optim`. There is no learning rate to tune: `lr` multiplies "
        "the update and 1.0 is what the rule was trained for.",
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
    tasks, commit = recipe.get("task") or [], record.get("commit")
    names = [tasks] if isinstance(tasks, str) else map(str, tasks)
    facts = {
        "Tasks": ", ".join(f"`{name}`" for name in names) or "not recorded",
        "Image sets": ", ".join(map(str, record.get("data_sets") or [])),
        "Trained for": record.get("trained_for"),
        "Source version": commit and f"`{commit}`",
        "Converted": record.get("converted"),
    }
    rows = [f"- {name}: {fact}" for name, fact in facts.items() if fact]
    details = as_json(record, indent=2)
    return "\n".join(rows) + (
        f"\n\n<details><summary>Full record</summary>\n\n```json\n{details}\n```\n\n</details>"
    )


def _is_number(data: dict[str, Any], key: str) -> bool:
    return type(data.get(key)) in (int, float)


def _results(
    record: dict[str, Any],
    recipe: dict[str, Any],
    evaluation: dict[str, Any] | None,
    curves: list[str],
    steps: int | None,
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
        summed = f"loss summed over {steps:,} steps" if steps else "summed loss"
        parts.append(table([summed, "mean", "value", "standard deviation"], rows))
    return "\n\n".join(parts) or "None was recorded."


def _limits(
    rule: UpdateRule,
    record: dict[str, Any],
    evaluation: dict[str, Any] | None,
    tested_steps: int | None,
) -> str:
    unknown = "an unknown number of"
    trained = f"up to {rule.trained_steps:,}" if rule.trained_steps else unknown
    steps = [entry["steps"] for entry in evaluation["tasks"].values()] if evaluation else []
    longest = max([*steps, tested_steps or 0])
    tested = f"{longest:,}" if longest else unknown
    size = rule.state_bytes((64, 64)) / 64**2
    runs = record.get("trained_for") or (f"runs of {trained} steps and tested on runs of {tested}")
    rows = [
        f"- Trained on {runs}; what it does beyond is unknown.",
        "- Tasks unlike those it was trained on may train slowly or diverge: compare with a tuned "
        "Adam first.",
        f"- State takes {size:,.0f} bytes per parameter of a square matrix in float32 (Adam: 8).",
    ]
    if not rule.zero_preserving:
        rows.append("- Parameters whose gradient stays exactly zero still drift.")
    return "\n".join(rows)
