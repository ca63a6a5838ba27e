"""How flat the loss is in the learning rate: the learned optimizer's multiplier beside Adam's.

    python -m benchmarks.multipliers        # some minutes; needs $LEARNED_OPTIM_DATA

Final loss against a factor on the learning rate: of the learned optimizers from the shipped 1.0, of
Adam from the learning rate tuned for this very task (docs/results/). Writes
docs/results/multipliers.json and .png.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import no_options
from learned_optim.meta.data import DataOptions
from learned_optim.meta.runs import RunSpec, optimizer_specs, run
from learned_optim.meta.statistics import LAST_STEPS

RESULTS = Path(__file__).parent.parent / "docs" / "results"
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
TASKS = {"mnist": "thesis", "fashion-torch": "thesis-torch"}
SEEDS, STEPS = 5, 200


def measure() -> dict[str, Any]:
    """Per task and optimizer, the mean loss of the last ten steps at every factor."""
    data, found = DataOptions(), {}
    for task, group in TASKS.items():
        summary = json.loads((RESULTS / f"{group}.json").read_text())
        tuned = summary["tasks"][task]["horizons"][str(STEPS)]["optimizers"]["adam"]["lr"]
        found[task] = {"adam_lr": tuned, "optimizers": {}}
        for who in optimizer_specs(("default", "coordinatewise"), ("adam",)):
            base = tuned if who.kind == "baseline" else 1.0
            means, spreads = [], []
            for factor in FACTORS:
                runs = [
                    run(RunSpec(task, who, base * factor, "test", seed, STEPS), data)
                    for seed in range(SEEDS)
                ]
                last = [statistics.mean(r.losses[-LAST_STEPS:]) for r in runs]
                means.append(round(statistics.mean(last), 4))
                spreads.append(round(statistics.stdev(last), 4))
            found[task]["optimizers"][who.label] = {"mean": means, "std": spreads}
            print(task, who.label, means, flush=True)
    return {"factors": FACTORS, "seeds": SEEDS, "steps": STEPS, "tasks": found}


def draw(found: dict[str, Any], path: Path) -> None:
    """Final loss against the factor, a panel per task."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(found["tasks"]))
    for axes, (task, entry) in zip(panels, found["tasks"].items(), strict=True):
        for label, row in entry["optimizers"].items():
            adam = label == "adam"
            name = f"adam (1 = {entry['adam_lr']:g}, tuned)" if adam else f"{label} (learned)"
            axes.errorbar(
                found["factors"], row["mean"], row["std"],
                label=name, linestyle="--" if adam else "-", marker="o", capsize=3,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(found["factors"], [f"{factor:g}" for factor in found["factors"]])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes.minorticks_off()
        axes.set_xlabel("factor on the learning rate")
        axes.set_ylabel(f"loss after {found['steps']} steps")
        axes.set_title(task)
        axes.grid(True, alpha=0.2)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    no_options.parse(__doc__)
    result = measure()
    (RESULTS / "multipliers.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / "multipliers.png")
