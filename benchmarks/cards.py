"""Pages about the shipped checkpoints: model cards, and reports on what they do.

    python -m benchmarks cards                 # docs/checkpoints/*.md
    python -m benchmarks explain [NAME ...]    # docs/explain/*/; some minutes

Everything on a card comes from the checkpoint's own record and from the summaries in docs/results/.
A summary's figures belong to a checkpoint if they carry its fingerprint, whatever name it had then.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from learned_optim import list_pretrained, load_record, load_rule, model_card
from learned_optim.pretrained import ALIASES
from learned_optim.summary import table

DOCS = Path(__file__).parent.parent / "docs"


def shipped() -> list[str]:
    """Names of the shipped checkpoints without their aliases."""
    return [name for name in list_pretrained() if name not in ALIASES]


def write_cards(folder: Path = DOCS / "checkpoints") -> None:
    """Write every card."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in shipped():
        (folder / f"{name}.md").write_text(card(name))


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
    """Write the reports on checkpoints: the default's in full, short ones of all others."""
    from learned_optim.explain import explain

    for name in names or shipped():
        short = name != ALIASES["default"]
        # A formula is a checkpoint of its own, and no part of the documentation.
        formula = Path("runs") / f"closed-form-{name}.safetensors"
        explain(name, folder / name, short=short, formula=formula, progress=print)


def _measured(fingerprint: str, results: Path) -> str:
    """Tables from the summaries that hold the checkpoint; empty if none does."""
    rows, parts = [], []
    for path in sorted(results.glob("*.json")):
        summary = json.loads(path.read_text())
        if not isinstance(summary, dict) or "protocol" not in summary:
            continue
        known = summary["protocol"].get("checkpoints", {})
        names = [name for name, own in known.items() if own == fingerprint]
        if not names:
            continue
        if summary["protocol"].get("suite") == "field":
            parts.append(_field(summary, names[0]))
        else:
            rows += _rows(path.stem, summary, names[0])
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
        if pair and pair["mean"] is not None
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
