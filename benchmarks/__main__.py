"""Speed and memory against their targets, estimators of meta-gradients, and the pages of both.

    python -m benchmarks                  # measure everything: half an hour
    python -m benchmarks SECTION ...      # or only some of it
    python -m benchmarks page             # docs/performance.md and docs/estimators.md from
                                          # docs/performance/*.json
    python -m benchmarks cards            # docs/checkpoints/: a model card of every checkpoint
    python -m benchmarks explain [NAME ...]   # docs/explain/: what every checkpoint does

Every section leaves its figures in docs/performance/. Meta-training needs MNIST in the folder that
$LEARNED_OPTIM_DATA names. Seconds until tuned Adam's loss is reached are measured by
`python -m benchmarks.wall_clock`, which needs the results of `python -m benchmarks.results`.
"""

from __future__ import annotations

import argparse
import json
import time

from benchmarks import (
    cards,
    estimators,
    kernel_step,
    lstm_kernel,
    meta_training,
    meta_training_sizes,
    performance,
    step,
)
from benchmarks.measure import machine

SECTIONS = {
    "kernel-step": kernel_step.measure,
    "lstm-step": step.lstm_step,
    "lstm-kernel": lstm_kernel.measure,
    "many-tensors": step.many_tensors,
    "temporaries": step.temporaries,
    "checkpoints": step.checkpoints,
    "scaling": step.scaling,
    "meta-training": meta_training.measure,
    "meta-training-sizes": meta_training_sizes.measure,
    "estimators": estimators.measure,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [*SECTIONS, "page", "cards", "explain"]
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(known))
    sections = parser.parse_args().sections
    if sections[:1] == ["explain"]:
        cards.write_reports(sections[1:])
        return
    if sections == ["cards"]:
        cards.write_cards()
        return
    if unknown := set(sections) - set(known):
        parser.error(f"unknown section {sorted(unknown)}; known: {', '.join(known)}")
    if sections == ["page"]:
        performance.write_page()
        estimators.write_page()
        return
    performance.FOLDER.mkdir(exist_ok=True)
    for name in sections or SECTIONS:
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        found = {"machine": machine(), "found": SECTIONS[name]()}
        text = json.dumps(found, separators=(",", ":")) + "\n"
        (performance.FOLDER / f"{name}.json").write_text(text)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(performance.targets(performance.load()))


if __name__ == "__main__":
    main()
