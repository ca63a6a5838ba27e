"""Writes docs/results.md, its appendix, docs/performance.md and their figure from JSON alone.

python -m benchmarks pages            # from docs/results/*.json and docs/performance/*.json
python -m benchmarks pages --check    # writes nothing; fails if a page is not up to date
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import cost, light_bench, memory, results, step
from benchmarks.common import DOCS, RESULTS, load
from learned_optim.evaluation.baselines import MATRIX_LRS
from learned_optim.evaluation.statistics import cut_off, geometric_mean
from learned_optim.summary import plot_worth, table, value_text, worth_table

#: Summed losses over 100 steps in the thesis's notebook: best hand-written optimizer, learned one.
THESIS = {
    "quadratic": ("98.8 (Adam)", "49.6"),
    "mnist": ("86.2 (Adam)", "50.9"),
    "mnist-40": ("detuned", "plot only"),
    "mnist-2layer": ("detuned", "plot only"),
    "mnist-relu": ("detuned", "plot only"),
    "fashion": ("108.5 (Adam)", "about 80"),
    "emnist-letters": ("236.2 (Adam)", "plot only"),
    "cifar10": ("detuned", "plot only"),
}
SHOWN = (0.02, 10.0)  # the figure's axis ends there; arrows lie beyond
UNTUNED = "nadamw-1.75e-3"  # the untuned rival of the figure: AlgoPerf's constants


# ---- docs/results.md

RESULTS_PAGE = """# Results

How good are the learned optimizers, untuned, on tasks that people recognise? All figures are
final training losses relative to a rival's: below 1 the learned optimizer is ahead. Intervals are
95 % bootstrap intervals over tasks. Every task has {seeds} test seeds. AdamW's learning rate is the
best of {rates} on another seed. Muon and SOAP have three rates ({matrix_rates}) and AdamW's weight
decay; Muon leaves embeddings, the readout and the first convolution to AdamW.

```sh
python -m benchmarks results field    # hours; single runs stay in runs/, figures in docs/results/
python -m benchmarks pages            # writes this page and its appendix
```

## What one untuned run is worth

A user who tunes tries learning rates and keeps the best run. The figure shows its expected final
loss by the number of rates tried, over that of one run of `{name}`.

![Final loss of the best of k tuned runs, times one run of {name}](results/worth.png)

{worth}

## Whole runs

{count} tasks of 1,000 to 5,000 steps ([protocol](design.md#evaluation)). `{name}` is told the
number of steps and runs at `lr=1`.

{whole}

"Held out" is the ratio of held-out losses. The next column is the share of the rival's steps, and
of its processor seconds, after which `{name}` has the rival's final loss: medians over tasks. It
never diverged in these runs.

## The cheap form

The same for `{fast_name}`, whose step costs what Adam's does:

{fast}

## Shorter runs, more tuned rivals

The same tasks for 300 to 1,000 steps; every rival of this table is tuned for each task.

{short}

Against the best of them on each task: {best}.

## Without a known length

The same short runs, of which `{name}` is not told the length; rivals have a constant rate.

{untold}

Against the better of them on each task: {best_untold}.

## A larger model

A decoder of 3.2 million parameters on Python's library, 400 and 2,000 steps of 1,024 characters,
one seed (`python -m benchmarks results gpt larger-language`). Muon and SOAP were not run for 2,000
steps. The other groups `larger-*` and `long` of the same command hold four more tasks and runs of
20,000 steps. They take hours each and were not run.

{larger}

## By task

Final losses over each tuned rival's, in whole runs. ‡: the best learning rate is at the edge of
the grid. Where the last column and the first disagree, the lower training loss is memorized: on
wrong labels and a fine-tuned network tuned SOAP ends fifty times as low, and higher where held out.

{tasks}

![Final training loss by task, times tuned AdamW's](results/field.png)

## What these figures do not show

- **The tasks are not untouched.** Failures of earlier checkpoints on them decided what was
  changed, though the checkpoint was meta-trained on other tasks.
- **Few seeds.** Intervals over tasks are wide; a mean lives on a few large gains.
- **Sizes.** Networks have up to some hundred thousand parameters and run on one CPU thread.

[The appendix](results-appendix.md) has the thesis's experiments and LightBench.
"""


def interval_text(found: dict[str, Any]) -> str:
    """Returns a mean with its interval, without bold print."""
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def times_text(shares: Iterable[float]) -> str:
    """Returns shares of a rival's steps and seconds."""
    return "; ".join("never" if share == math.inf else f"{share:.2f}" for share in shares)


def learned_name(summary: dict[str, Any]) -> str:
    """Returns the first checkpoint of a summary."""
    return next(iter(summary["protocol"]["checkpoints"]))


def task_ratio(task: dict[str, Any], name: str, rival: str, held_out: bool = False) -> float | None:
    """Returns the ratio of two mean losses, final or held out; ``None`` if a run diverged."""
    mine, theirs = (
        (found["test"].get("loss", {"mean": None}) if held_out else found["final"])["mean"]
        for found in (task["optimizers"][n] for n in (name, rival))
    )
    return mine / theirs if mine is not None and theirs is not None else None


def rivals_table(summary: dict[str, Any], rivals: list[str]) -> str:
    """Returns a row per rival: the ratios, the tasks won, and a step's cost."""
    name, tasks = learned_name(summary), summary["tasks"].values()
    rows = []
    for rival in rivals:
        ratios = [task_ratio(task, name, rival) for task in tasks]
        held_out = [task_ratio(task, name, rival, held_out=True) for task in tasks]
        mean = interval_text(geometric_mean([cut_off(r) for r in held_out if r is not None]))
        ahead = sum(r is None or r <= 1 for r in ratios)  # `None`: the rival diverged
        row = [f"{rival}, tuned" if rival in summary["protocol"]["tuned"] else rival]
        row.append(interval_text(summary["untuned_pairs"][name][rival]))
        row.append(f"{median([r for r in ratios if r is not None]):.2f}")
        row += [f"{ahead} of {len(ratios)}", mean]
        times = [task[rival] or (math.inf, math.inf) for task in summary["reached"].values()]
        row.append(times_text(median(column) for column in zip(*times, strict=True)))
        rows.append([*row, f"{summary['overall'][rival]['optimizer_milliseconds']:.2f}"])
    own = f"{summary['overall'][name]['optimizer_milliseconds']:.2f}"
    head = ["rival", "mean ratio [95 %]", "median", "ahead or level on", "held out"]
    head.append("steps; seconds to its loss")
    return table([*head, f"ms per step ({name}: {own})"], rows)


def tasks_table(whole: dict[str, Any]) -> str:
    """Returns a row per task."""
    name, tuned = learned_name(whole), whole["protocol"]["tuned"]
    grid = whole["protocol"]["lr_grid"]
    rows = []
    for task, entry in whole["tasks"].items():
        rate = entry["optimizers"][tuned[0]]["lr"]
        ratios = [task_ratio(entry, name, tuned[0], held_out=True)]
        ratios[:0] = [task_ratio(entry, name, rival) for rival in tuned]
        texts = [
            "it diverged" if r is None else f"{r:.2f}" if r >= 0.1 else f"{r:.2g}" for r in ratios
        ]
        edge = "‡" * (rate in (grid[0], grid[-1]))
        rows.append([f"{task}, {entry['steps']:,}", f"{rate:g}{edge}", *texts])
    return table(["task, steps", "AdamW's rate", *tuned, f"held out, over {tuned[0]}"], rows)


def single_runs_table(*summaries: dict[str, Any]) -> str:
    """Returns a row per task and rival of groups with one seed."""
    name, rows = learned_name(summaries[0]), []
    pairs = [(summary, *pair) for summary in summaries for pair in summary["tasks"].items()]
    for summary, task, entry in pairs:
        own = entry["optimizers"][name]["optimizer_milliseconds"]["mean"]
        label = f"{task}, {entry['steps']:,}"
        for rival in summary["protocol"]["tuned"]:
            ratios = [task_ratio(entry, name, rival, held_out) for held_out in (False, True)]
            times = summary["reached"][task][rival] or (math.inf, math.inf)
            cells = ["it diverged" if r is None else f"{r:.2f}" for r in ratios]
            rate = entry["optimizers"][rival]["lr"]
            ms = entry["optimizers"][rival]["optimizer_milliseconds"]["mean"]
            time = f"{ms:.3g} ({own:.3g})"
            rows.append([label, f"{rival} at {rate:g}", *cells, times_text(times), time])
    head = ["task, steps", "rival", "final", "held out", "steps; seconds to its loss"]
    return table([*head, f"ms per step ({name}'s)"], rows)


def draw_field(summary: dict[str, Any], path: Path) -> None:
    """Draws the final loss by task over tuned AdamW's, with an untuned rival beside it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    name, tuned = learned_name(summary), summary["protocol"]["tuned"][0]
    ratios = {
        task: [task_ratio(entry, one, tuned) or math.inf for one in (name, UNTUNED)]
        for task, entry in summary["tasks"].items()
    }
    order = sorted(ratios, key=lambda task: -ratios[task][0])
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.add_subplot()
    low, high = SHOWN
    marks = (("o", "#0072B2", name), ("D", "#E69F00", UNTUNED))
    for index, (marker, colour, label) in reversed([*enumerate(marks)]):
        for y, task in enumerate(order):
            x = ratios[task][index]
            shown = "<" if x < low else ">" if x > high else marker
            text = None if y else f"{label}, untuned"
            axes.plot(min(max(x, low), high), y, shown, color=colour, clip_on=False, label=text)
    axes.axvline(1.0, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(order)), order, fontsize="small")
    axes.set_xlabel("final training loss, times that of AdamW with cosine tuned for the task")
    axes.grid(True, axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def results_page() -> str:
    """Returns docs/results.md."""
    groups = "field", "field-fast", "field-quick", "unknown-length", "gpt", "larger-language"
    whole, fast, short, untold, *larger = (load(RESULTS / f"{group}.json") for group in groups)
    name, protocol = learned_name(whole), whole["protocol"]
    rivals = [n for n in (*protocol["tuned"], *protocol["untuned"]) if n != name]
    text = RESULTS_PAGE.format(
        name=name,
        count=len(whole["tasks"]),
        seeds=protocol["seeds"],
        rates=len(protocol["lr_grid"]),
        matrix_rates=", ".join(f"{lr:g}" for lr in MATRIX_LRS),
        worth=worth_table(whole),
        whole=rivals_table(whole, rivals),
        fast_name=learned_name(fast),
        fast=rivals_table(fast, fast["protocol"]["tuned"]),
        short=rivals_table(short, short["protocol"]["tuned"]),
        best=interval_text(short["overall"][learned_name(short)]["ratio"]),
        untold=rivals_table(untold, untold["protocol"]["tuned"]),
        best_untold=interval_text(untold["overall"][name]["ratio"]),
        larger=single_runs_table(*larger),
        tasks=tasks_table(whole),
    )
    if whole["overall"][name]["diverged"]:
        text = text.replace("It\nnever diverged in these runs.", "It\ndiverged in some runs.")
    return text


# ---- docs/results-appendix.md

APPENDIX = """# Appendix to the results

## The thesis's question: how fast does the loss fall?

Summed loss over the first steps, relative to the best hand-written optimizer (learning rate tuned
per task and horizon over {{1, 3}} times powers of ten; 3 tuning seeds and 10 test seeds, fewer
for larger networks). Means over tasks are geometric; *thesis* starts from weights of .001,
*thesis-torch* from PyTorch's own. `mnist` and `quadratic` are the thesis's LSTM.

{groups}

### The published figures, measured again

Summed loss over 100 steps.

{thesis}

The published comparison is flawed in three ways. Rows called *detuned* come from runs in which a
left-over variable made every "tuned" optimizer Nesterov's, and Adam and RMSprop ran at a rate of
1.0. The learned optimizer's loss on quadratics was the smallest of 100 noisy validations; ours is
a mean over 1,000 functions that chose nothing. Every optimizer saw other random batches; ours are
paired.

## LightBench

{tests} small tests that are passed or failed, in up to six difficulties (HeavyBall's suite,
version {version}; at most {steps:,} steps and {seconds:g} processor seconds each;
`python -m benchmarks light-bench`). All rows were measured on one processor, an AMD EPYC without
units for bfloat16; seconds are a part of the test.

{lightbench}
"""


def groups_table() -> str:
    """Returns mean ratios of summed losses by group and checkpoint."""
    found, names = [], []
    for group in results.GROUPS:
        path = RESULTS / f"{group}.json"
        if path.exists() and (summary := load(path))["protocol"]["suite"] == "short":
            names += [n for n in summary["protocol"]["checkpoints"] if n not in names]
            found.append((group.removesuffix("-200"), summary))
    body = []
    for group, summary in found:
        steps = next(iter(summary["tasks"].values()))["steps"]
        ratios = [summary["overall"].get(name, {}).get("sum_ratio") for name in names]
        means = ["" if ratio is None else f"{ratio['mean']:.2f}" for ratio in ratios]
        body.append([f"{group}, {len(summary['tasks'])} tasks", f"{steps:,}", *means])
    return table(["group", "steps", *(f"`{name}`" for name in names)], body)


def thesis_table() -> str:
    """Returns the thesis's figures beside ours."""
    rows = []
    for task, published in THESIS.items():
        group, lstm = ("quadratic", "quadratic") if task == "quadratic" else ("thesis", "mnist")
        cell = load(RESULTS / f"{group}.json")["tasks"][task]
        best = cell["best_tuned"]
        sums = {n: value_text(cell["optimizers"][n]["sum"]) for n in (best, lstm, "coordinatewise")}
        rows.append(
            [task, *published, f"{sums[best]} ({best})", sums[lstm], sums["coordinatewise"]]
        )
    head = ["task", "thesis: best hand-written", "thesis: learned", "ours: best hand-written"]
    return table([*head, "the thesis's LSTM", "`coordinatewise`"], rows)


def appendix() -> str:
    """Returns docs/results-appendix.md."""
    found = load(light_bench.OUTPUT)
    return APPENDIX.format(
        groups=groups_table(),
        thesis=thesis_table(),
        tests=len(found["tests"]),
        lightbench=light_bench.results_table(found),
        **found["protocol"],
    )


# ---- docs/performance.md

PERFORMANCE_PAGE = """# Performance

What does a step cost, in time and in memory? Times are the best of many turns that the compared
optimizers take in one process: processor time on one thread, the clock's on two. Compare figures
within a table. {machine}

```sh
python -m benchmarks step             # a minute
python -m benchmarks cost             # a minute
python -m benchmarks memory           # seconds
python -m benchmarks pages            # writes this page
```

## Time of a step

{step}

The step is compiled C++ that is built when the package is installed. Without a compiler the same
rule runs in PyTorch; those columns are its cost on one thread. A step of `diagonal` is bound by
memory on large tensors: it reads and writes one number per parameter more than Adam. Steps of
`eigenbasis` are the fastest of the first steps of a run, mostly without a refresh of the bases. The
next section has the mean step of a long run.

Under `torch.compile` a step of the small network takes {graph} times the eager one.

The shipped checkpoints on a million parameters in one tensor:

{checkpoints}

On a GPU the step runs in Triton kernels, which were tested in Triton's interpreter and never
timed.

## What the eigenbasis costs

The default rotates the gradient of a matrix, updates the covariances of its sides, rotates the
update back, and refreshes its bases every 32 steps. One matrix after 1,024 steps, on one thread:

{shapes}

Updates are multiplied in bfloat16 where the processor has units for it, as this one has. A side
over 1,024 is not rotated. These operations do not depend on the batch, so the optimizer's share of
a step falls as the batch grows. Predicted from the rates of the largest square matrix,
for gradients that run at the rate of its float32 products:

{networks}

A width of 2,048 is not rotated at all, so most of the decoder steps as in `diagonal`.
{cost_machine}

## Memory

Optimizer state in bytes per parameter, by model; parameters and gradients are extra. States of
other optimizers follow from their reference implementations (`benchmarks/memory.py` states the
formulas).

{memory}

`state_dtype=torch.bfloat16` halves the state of learned optimizers.

## Sharded over ranks

A matrix that is sharded by `fully_shard` and rotated has an owner, the rank that steps it
([Design](design.md#the-optimizer)). Megabytes that a rank sends per step, in float32:

{traffic}

FSDP2 sends parameters twice and gradients once. Distributed Shampoo (Shi et al. 2023, arXiv
2309.06497) gathers all updates on all ranks. Muon's owners (Ahn et al. 2025, arXiv 2504.05295) are
sent momenta and send updates; those of `eigenbasis` are sent parameters and gradients and send
parameters. Most matrices of the decoder are not rotated. These figures are computed, not measured.
"""


def machine_text(found: dict[str, Any]) -> str:
    """Returns where and when figures were measured."""
    m = found["machine"]
    return (
        f"{m['processor']}, {m['cores']} cores, torch {m['torch']}, {m['date']}, "
        f"load average {m['load']}."
    )


def performance_page() -> str:
    """Returns docs/performance.md."""
    steps, costs, bytes_ = map(load, (step.OUTPUT, cost.OUTPUT, memory.OUTPUT))
    graph = steps["graph"]
    return PERFORMANCE_PAGE.format(
        machine=machine_text(steps),
        step=step.step_table(steps),
        graph=f"{graph['compiled'] / graph['eager']:.1f}",
        checkpoints=step.checkpoint_table(steps),
        shapes=cost.shape_table(costs),
        networks=cost.network_table(costs),
        cost_machine=machine_text(costs),
        memory=memory.memory_table(bytes_),
        traffic=memory.traffic_table(),
    )


# ---- the command

PAGES = {
    DOCS / "results.md": results_page,
    DOCS / "results-appendix.md": appendix,
    DOCS / "performance.md": performance_page,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing, compare")


def run(options: argparse.Namespace) -> None:
    if options.check:
        if stale := [path.name for path, page in PAGES.items() if path.read_text() != page()]:
            raise SystemExit(f"not up to date: {', '.join(stale)}; run python -m benchmarks pages")
        return
    for path, page in PAGES.items():
        path.write_text(page())
    whole = load(RESULTS / "field.json")
    draw_field(whole, RESULTS / "field.png")
    plot_worth(whole["worth"], RESULTS / "worth.png")
    print(*(path.relative_to(DOCS.parent) for path in PAGES), sep="\n")
