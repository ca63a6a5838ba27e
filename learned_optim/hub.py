"""Update rules on the Hugging Face Hub: download, upload, and the model card.

A repository holds ``model.safetensors`` (the checkpoint), ``config.json`` (which rule, for readers
and for telling a foreign repository before anything large is fetched) and ``README.md`` (the
card). Only safetensors are ever read, strictly; nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from learned_optim.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    READABLE_VERSIONS,
    CheckpointError,
    as_json,
    save_rule,
)
from learned_optim.rules import UpdateRule
from learned_optim.summary import curve_file, markdown, plot

#: Name of the checkpoint file inside a folder or a Hub repository.
CHECKPOINT_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``user/repo`` or ``user/repo@revision``."""
    user, _, repo = text.partition("/")
    return _HUB_ID.match(text) is not None and not {user, repo} & {".", ".."}


# ---- download


def download(hub_id: str, *, local_files_only: bool = False) -> Path:
    """The checkpoint file of a Hub repository, through the Hub's cache.

    ``config.json`` comes first, so that a repository of something else is refused before its
    weights are fetched; the weights are then taken from the same commit.

    Args:
        hub_id: ``"user/repo"``, optionally ``"@revision"``.
        local_files_only: answer from the cache alone.

    Raises:
        FileNotFoundError: no such repository, revision or file, or no way to reach the Hub.
        CheckpointError: the repository is no learned_optim rule, or of a newer format.
    """
    repo, _, revision = hub_id.partition("@")
    try:
        config = _fetch(repo, CONFIG_FILE, revision or None, local_files_only)
    except FileNotFoundError as error:
        if getattr(error, "missing_entry", False):
            raise CheckpointError(
                f"the Hub repository {hub_id!r} has no {CONFIG_FILE}: it is no learned_optim rule"
            ) from error
        raise
    _check_config(hub_id, config)
    commit = config.parent.name  # the cache keeps a snapshot's files in a folder of that name
    return _fetch(repo, CHECKPOINT_FILE, commit, local_files_only)


class _HubFileError(FileNotFoundError):
    """A file the Hub did not give us."""

    #: The repository is there and the file is not.
    missing_entry = False


def _fetch(repo: str, file: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                repo,
                file,
                revision=revision,
                local_files_only=local_files_only,
                library_name=FORMAT,
            )
        )
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        at = f"{repo}@{revision}" if revision else repo
        failure = _HubFileError(
            f"{_cause(error, at, file, local_files_only)} ({_first_line(error)})"
        )
        failure.missing_entry = isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(
            error, hub_errors.LocalEntryNotFoundError
        )
        raise failure from error


def _cause(error: Exception, at: str, file: str, local_files_only: bool) -> str:
    """What went wrong and what to do, in one sentence."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        if local_files_only or constants.HF_HUB_OFFLINE:
            why = "local_files_only was asked for" if local_files_only else "HF_HUB_OFFLINE is set"
            return f"{file} of the Hub repository {at!r} is not in the local cache, and {why}"
        return (
            f"the Hub could not be reached for {at!r} and {file} is not in the local cache: check "
            f"the network, or use a shipped checkpoint"
        )
    if isinstance(error, hub_errors.GatedRepoError):
        return f"the Hub repository {at!r} is gated: ask its owner for access, then log in"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f"the Hub has no repository {at!r}, or it is private: check the spelling, or log in "
            f"with `hf auth login`"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"the Hub repository has no such revision: {at!r}"
    if isinstance(error, hub_errors.EntryNotFoundError):
        return f"the Hub repository {at!r} has no file {file}, and only safetensors are loaded"
    return f"{file} could not be had from the Hub repository {at!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_config(hub_id: str, path: Path) -> None:
    """Refuse repositories of other libraries and of newer formats, from ``config.json``."""
    try:
        config = json.loads(path.read_text())
        found = config.get("format"), int(config.get("format_version", 0))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} of {hub_id!r} is not readable: {error}") from error
    if found[0] != FORMAT:
        raise CheckpointError(
            f"the Hub repository {hub_id!r} is no learned_optim rule: its {CONFIG_FILE} says "
            f"format={found[0]!r}"
        )
    if found[1] not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(
            f"the Hub repository {hub_id!r} has checkpoint format version {found[1]} and this "
            f"release reads {readable}: pip install --upgrade learned-optim"
        )


# ---- upload


def push_to_hub(
    rule: str | os.PathLike[str] | UpdateRule,
    repo_id: str,
    *,
    record: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    license: str = "mit",
    private: bool | None = None,
    commit_message: str = "Upload learned_optim update rule",
    token: str | None = None,
) -> str:
    """Upload an update rule with its configuration and a generated model card, in one commit.

    Args:
        rule: an update rule, or whatever :func:`learned_optim.load_rule` takes.
        repo_id: ``"user/repo"``, optionally ``"@branch"``; created where missing.
        record: how the rule was made; ``None`` takes it from the checkpoint ``rule`` names.
        evaluation: the summary that ``learned-optim evaluate`` writes; its table and learning
            curves go onto the card (the curves need matplotlib).
        license: the card's licence, as the Hub spells it.
        private: whether a repository created by this call is private; ``None`` is the account's
            default.
        commit_message: of the upload.
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

    from learned_optim.pretrained import load_record, load_rule

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
        curves = _plot_curves(evaluation, folder) if evaluation else []
        card = model_card(
            rule, repo, record=record, evaluation=evaluation, curves=curves, license=license
        )
        (folder / CARD_FILE).write_text(card)
        api.create_repo(repo, private=private, exist_ok=True)
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=branch or None,
            commit_message=commit_message,
        )
    return str(commit.commit_url)


def _plot_curves(evaluation: dict[str, Any], folder: Path) -> list[str]:
    """Learning curves of every task at the longest horizon as PNGs in ``folder``; their names."""
    horizon = max(evaluation["protocol"]["horizons"])
    names = {task: curve_file(task, horizon) for task in evaluation["tasks"]}
    for task, name in names.items():
        plot(evaluation, task, horizon, folder / name)
    return list(names.values())


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
    """The model card of a rule: what it was trained on, how it did, its limits and its use.

    Everything on it comes from the arguments; what they do not say, the card says is unknown.

    Args:
        rule: the rule described.
        name: the Hub repository ``"user/repo"``, or a path, for the usage example.
        record: how the rule was made, as :func:`learned_optim.load_record` returns it.
        evaluation: the summary that ``learned-optim evaluate`` writes.
        curves: names of image files beside the card.
        license: as the Hub spells it.

    Returns:
        Markdown with the Hub's YAML front matter.
    """
    record = record or {}
    sections = [
        f"# {name.rsplit('/', 1)[-1]}",
        f"A learned optimizer for PyTorch: an update rule of type `{rule.name}` with "
        f"{sum(w.numel() for w in rule.parameters()):,} weights{_method(record)}, used in place of "
        f"`torch.optim.Adam`.",
        f"## Use\n\n{_usage(rule, name)}",
        f"## Training\n\n{_training(record)}",
        f"## Evaluation\n\n{_results(record, evaluation, curves or [])}",
        f"## Limits\n\n{_limits(rule, record, evaluation)}",
        f"## Licence\n\n{license}",
    ]
    return _front_matter(license) + "\n\n".join(sections) + "\n"


def _method(record: dict[str, Any]) -> str:
    recipe = record.get("recipe")
    if not recipe:
        return ""
    if recipe.get("method") == "evolution":
        return ", trained by evolution strategies on whole runs"
    return ", trained by gradient descent"


def _front_matter(license: str) -> str:
    tags = ["learned-optimizer", "meta-learning", "learning-to-optimize", "pytorch"]
    lines = ["---", f"license: {license}", f"library_name: {FORMAT}", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---", "", ""])


def _usage(rule: UpdateRule, name: str) -> str:
    told = ", total_steps=10_000" if rule.reads_horizon else ""
    lines = [
        "```python",
        "from learned_optim import LearnedOptimizer",
        "",
        "# optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)",
        f'optimizer = LearnedOptimizer(model.parameters(), "{name}"{told})',
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
    if rule.needs_loss:
        lines.append("The rule reads the loss: call `optimizer.step(closure)`.")
    return "\n".join(lines)


def _training(record: dict[str, Any]) -> str:
    recipe = record.get("recipe")
    if not recipe:
        return "The checkpoint holds no record of its training."
    tasks = ", ".join(f"`{task}`" for task in _tasks(recipe)) or "not recorded"
    rows = [f"- Tasks: {tasks}"]
    if record.get("data_sets"):
        rows.append(f"- Image sets: {', '.join(map(str, record['data_sets']))}")
    known = {
        "horizon": "Horizon (inner steps of one run)",
        "truncation": "Inner steps per meta-gradient",
        "epochs": "Epochs",
        "runs_per_epoch": "Runs per epoch",
        "meta_steps": "Meta-steps of evolution strategies",
        "meta_lr": "Meta-learning rate (Adam)",
        "seed": "Seed",
    }
    rows += [
        f"- {label}: {recipe[key]:,}" for key, label in known.items() if _is_number(recipe, key)
    ]
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


def _tasks(recipe: dict[str, Any]) -> list[str]:
    """Names of the meta-training tasks, whether a recipe has one or a mixture."""
    task = recipe.get("task", recipe.get("tasks", []))
    return [task] if isinstance(task, str) else [str(name) for name in task]


def _results(record: dict[str, Any], evaluation: dict[str, Any] | None, curves: list[str]) -> str:
    parts = []
    if evaluation is not None:
        # The report's headings go one level down, under the card's own.
        parts.append(re.sub(r"^#", "##", markdown(evaluation).strip(), flags=re.MULTILINE))
    parts += [f"![Learning curves: {Path(curve).stem}]({curve})" for curve in curves]
    behind = (record.get("behind_adamw") or {}).get("last")
    if isinstance(behind, dict) and _is_number(behind, "mean"):
        parts.append(
            f"On validation tasks of its meta-training mixture, the final loss is "
            f"{math.exp(behind['mean']):.3f} times tuned AdamW's (geometric mean)."
        )
    recipe = record.get("recipe") or {}
    kind = recipe.get("validation_mean", "arithmetic")
    figures = []
    if _is_number(record, "validation"):
        figures.append(("validation", kind, f"{record['validation']:.4g}", ""))
    test = record.get("test")
    if isinstance(test, dict):
        runs = f"test, {test.get('runs', '?')} fresh runs"
        if test.get("task", recipe.get("task")) != recipe.get("task"):
            runs += f" of {test['task']}"
        if _is_number(test, "mean"):
            spread = f"{test['std']:.4g}" if _is_number(test, "std") else ""
            figures.append((runs, "arithmetic", f"{test['mean']:.4g}", spread))
        if _is_number(test, "geometric_mean") and kind == "geometric":
            figures.append((runs, kind, f"{test['geometric_mean']:.4g}", ""))
    if figures:
        steps = _tested_horizon(record)
        summed = f"loss summed over {steps:,} steps" if steps else "summed loss"
        rows = [f"| {summed} | mean | value | standard deviation |", "|---|---|---|---|"]
        parts.append("\n".join([*rows, *(f"| {' | '.join(row)} |" for row in figures)]))
    return "\n\n".join(parts) or "None was recorded."


def _tested_horizon(record: dict[str, Any]) -> int | None:
    """Inner steps of the runs behind the record's figures, if it says."""
    recipe = record.get("recipe") or {}
    return recipe.get("validation_horizon") or recipe.get("horizon")


def _limits(rule: UpdateRule, record: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    recipe = record.get("recipe") or {}
    unknown = "an unknown number of"
    trained = f"{recipe['horizon']:,}" if _is_number(recipe, "horizon") else unknown
    horizons = evaluation["protocol"]["horizons"] if evaluation else []
    longest = max([*horizons, _tested_horizon(record) or 0])
    tested = f"{longest:,}" if longest else unknown
    state = rule.init_state(torch.zeros(64, 64)).values()
    size = sum(entry.numel() * entry.element_size() for entry in state if entry.dim() > 1) / 64**2
    seen = f"runs of {trained} steps and tested on runs of {tested}"
    if not _is_number(recipe, "horizon") and record.get("trained_for"):
        seen = record["trained_for"]
    rows = [
        f"- Trained on {seen}; what it does beyond is unknown.",
        "- Tasks unlike those it was trained on may train slowly or diverge: compare with a tuned "
        "Adam first.",
        f"- State takes {size:,.0f} bytes per parameter in float32 (Adam: 8).",
    ]
    if not rule.zero_preserving:
        rows.append("- Parameters whose gradient stays exactly zero still drift.")
    return "\n".join(rows)
