"""Pages about the shipped checkpoints: model cards, and reports on what they do.

    python -m benchmarks cards                 # docs/checkpoints/*.md
    python -m benchmarks explain [NAME ...]    # docs/explain/*/; some minutes

Everything on a card comes from the checkpoint's own record and from the summaries in docs/results/.
A summary's figures belong to a checkpoint if they carry its fingerprint, whatever name it had then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from learned_optim import list_pretrained, load_record, load_rule, model_card
from learned_optim.meta.tasks import field_tasks
from learned_optim.pretrained import ALIASES
from learned_optim.summary import table

DOCS = Path(__file__).parent.parent / "docs"
#: Checkpoints with whole reports: the default, and the one that it was trained from.
IN_FULL = (ALIASES["default"],)


def shipped() -> list[str]:
    """Names of the shipped checkpoints without their aliases."""
    return [name for name in list_pretrained() if name not in ALIASES]


def write_cards(folder: Path = DOCS / "checkpoints") -> None:
    """Write every card."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in shipped():
        (folder / f"{name}.md").write_text(card(name))
    (folder / "index.md").write_text(choosing())


def card(name: str, results: Path = DOCS / "results") -> str:
    """The card of a shipped checkpoint, Markdown."""
    rule = load_rule(name)
    text = model_card(rule, name, record=load_record(name))
    text = text.split("---\n\n", 1)[1]  # the Hub's front matter
    before, _, rest = text.partition("\n\n<details>")
    after = rest.partition("</details>")[2]
    text = (
        f"{before}\n\nThe full record, as JSON: `learned-optim show {name}`.{after}"
        if rest
        else text
    )
    also = [alias for alias, target in ALIASES.items() if target == name]
    aliases = f" Also called {' and '.join(f'`{alias}`' for alias in also)}." if also else ""
    text = text.replace("```python", "<!-- not run: model is the reader's -->\n```python", 1)
    intro, _, rest = text.partition("\n\n## Use")
    text = f"{intro}{aliases} Fingerprint `{rule.fingerprint()}`.\n\n## Use{rest}"
    measured = _measured(rule.fingerprint(), results)
    head, _, tail = text.partition("## Evaluation\n\n")
    if measured:
        tail = f"{measured}\n\n{tail}".replace("\n\nNone was recorded.", "")
    explained = DOCS / "explain" / name / "README.md"
    link = (
        f"\n\nWhat it does: [a report](../explain/{name}/README.md)." if explained.exists() else ""
    )
    return f"{head}## Evaluation\n\n{tail.rstrip()}{link}\n"


def write_reports(names: list[str], folder: Path = DOCS / "explain") -> None:
    """Write the reports on checkpoints: those of ``IN_FULL``, short ones of all others."""
    from learned_optim.explain import explain

    for name in names or shipped():
        short = name not in IN_FULL
        # A formula is a checkpoint of its own, and no part of the documentation.
        formula = Path("runs") / f"closed-form-{name}.safetensors"
        explain(name, folder / name, short=short, formula=formula, progress=print)


def _measured(fingerprint: str, results: Path) -> str:
    """Tables from the summaries that hold the checkpoint; empty if none does."""
    rows, parts = [], []
    for summary, name in _with(fingerprint, results):
        if summary["protocol"].get("suite") == "field":
            if _is_field(summary):
                parts.append(_field(summary, name))
        else:
            rows += _rows(summary["group"], summary, name)
    if rows:
        head = ["group", "steps", "ahead on", "geometric mean", "worst"]
        parts.append(
            "Summed loss over that of the best hand-written optimizer tuned for the task, of the "
            "groups of [the results page](../results.md) (below 1 is ahead):\n\n"
            f"{table(head, rows)}"
        )
    return "\n\n".join(parts)


def _field(summary: dict[str, Any], name: str) -> str:
    """The field: final losses against tuned and untuned rivals."""
    overall = summary["overall"][name]
    tier = " (quick tier)" if summary["protocol"]["quick"] else ""
    ratio, test = (
        f"{r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        for r in (overall["ratio"], overall["test_ratio"])
    )
    ratios = {
        task: entry["optimizers"][name]["ratio"]["mean"]
        for task, entry in summary["tasks"].items()
        if entry["optimizers"][name]["ratio"]["mean"] is not None
    }
    worst = sorted(ratios, key=lambda task: -ratios[task])[:3]
    rivals = [
        [rival, f"{pair['mean']:.2f} [{pair['low']:.2f}, {pair['high']:.2f}]"]
        for rival, pair in summary["untuned_pairs"].get(name, {}).items()
        if rival in summary["protocol"]["untuned"] and pair and pair["mean"] is not None
    ]
    return (
        f"On the field{tier}, {overall['tasks']} tasks that people recognise, "
        f"{summary['protocol']['seeds']} test seeds, untuned and told the number of steps: final "
        f"loss over that of the best tuned rival {ratio} (geometric mean and 95 % interval), "
        f"held-out loss {test}, at most the rival's on {overall['at_most_tuned']} tasks. Furthest "
        f"behind: {', '.join(f'{task} ({ratios[task]:.2f})' for task in worst)}. Diverged in "
        f"{overall['diverged']:.0%} of the runs, stalled in {overall['stalled']:.0%}. Final loss "
        f"over that of rivals that are not tuned either:\n\n"
        + table(["rival", "ratio [95 %]"], rivals)
    )


def _is_field(summary: dict[str, Any]) -> bool:
    """Whether a summary is of the field, and not of other tasks by its protocol."""
    known = set(field_tasks())
    return summary["protocol"].get("suite") == "field" and known.issuperset(summary["tasks"])


def _rows(group: str, summary: dict[str, Any], name: str) -> list[list[str]]:
    """One row per horizon of a group."""
    rows = []
    for horizon in summary["protocol"]["horizons"]:
        ratios = {
            task: entry["horizons"][str(horizon)]["optimizers"][name]["ratio"]["mean"]
            for task, entry in summary["tasks"].items()
        }
        finite = [ratio for ratio in ratios.values() if ratio is not None]
        mean = math.exp(sum(map(math.log, finite)) / len(finite)) if finite else math.nan
        worst = max(ratios, key=lambda task: math.inf if ratios[task] is None else ratios[task])
        shown = "diverged" if ratios[worst] is None else f"{ratios[worst]:.2f}"
        ahead = sum(ratio < 1 for ratio in finite)
        rows.append(
            [group, f"{horizon:,}", f"{ahead} of {len(ratios)}", f"{mean:.2f}",
             f"{worst} ({shown})"]
        )  # fmt: skip
    return rows


def choosing(results: Path = DOCS / "results") -> str:
    """The page that compares the checkpoints, Markdown."""
    head = ["checkpoint", "rule", "weights", "floats of state per parameter"]
    head += ["field", "short", "long"]
    rows = []
    for name in shipped():
        rule = load_rule(name)
        also = [f"`{alias}`" for alias, target in ALIASES.items() if target == name]
        state = rule.init_state(torch.zeros(8, 8))
        floats = sum(v.numel() for k, v in state.items() if k not in rule.tensor_state) / 64
        rows.append(
            [
                f"[`{name}`]({name}.md)" + (f" ({', '.join(also)})" if also else ""),
                f"`{rule.name}`",
                f"{sum(p.numel() for p in rule.parameters()):,}",
                f"{floats:.0f}",
                *_means(rule.fingerprint(), results),
            ]
        )
    text = (Path(__file__).parent / "choosing_template.md").read_text()
    return text.replace("{table}", table(head, rows))


def _means(fingerprint: str, results: Path) -> list[str]:
    """Geometric means over the field, over short and over long groups; dashes if not measured."""
    field = ""
    logs: dict[str, list[float]] = {"short": [], "long": []}
    for summary, name in _with(fingerprint, results):
        if summary["protocol"].get("suite") == "field":
            if _is_field(summary) and not (field and summary["protocol"]["quick"]):
                field = f"{summary['overall'][name]['ratio']['mean']:.2f}"
            continue
        for entry in summary["tasks"].values():
            for horizon, cell in entry["horizons"].items():
                ratio = cell["optimizers"][name]["ratio"]["mean"]
                if ratio is not None:
                    logs["short" if int(horizon) <= 200 else "long"].append(math.log(ratio))
    means = [f"{math.exp(sum(v) / len(v)):.2f} ({len(v)})" if v else "-" for v in logs.values()]
    return [field or "-", *means]


def _with(fingerprint: str, results: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Summaries that hold a checkpoint, and its name there."""
    for path in sorted(results.glob("*.json")):
        summary = json.loads(path.read_text())
        if not isinstance(summary, dict) or "protocol" not in summary:
            continue
        for name, own in summary["protocol"].get("checkpoints", {}).items():
            if own == fingerprint:
                yield {**summary, "group": path.stem}, name
                break
