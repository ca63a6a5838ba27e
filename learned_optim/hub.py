"""Upload of update rules to the Hugging Face Hub.

A repository holds ``model.safetensors`` (the checkpoint), ``config.json`` (which rule, so that a
foreign repository is refused before its weights are fetched) and ``README.md`` (the card).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from learned_optim._card import model_card
from learned_optim._download import CHECKPOINT_FILE, CONFIG_FILE, is_hub_id
from learned_optim.checkpoint import FORMAT, FORMAT_VERSION, save_rule
from learned_optim.pretrained import load_record, load_rule
from learned_optim.rules import UpdateRule
from learned_optim.summary import draw


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
    """Upload an update rule with its configuration and a generated model card, in one commit.

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
