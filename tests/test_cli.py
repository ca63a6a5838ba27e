"""The command: what it prints, what it writes, and what it says when it is used wrongly."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import OWN_RULE, SOURCE, python, random_rule
from test_trainer import SMALL

import learned_optim
from learned_optim import list_pretrained, load_record, load_rule, save_rule
from learned_optim._progress import ProgressBar
from learned_optim.cli import main
from learned_optim.evaluation.baselines import BASELINES
from learned_optim.meta import DataOptions, MetaTrainer, load_recipe
from learned_optim.meta.recipes import recipes
from learned_optim.meta.tasks import task_names
from learned_optim.rules import rule_names
from learned_optim.rules._base import RULES
from learned_optim.rules.classical import AdamRule

COMMANDS = ("list", "show", "train", "evaluate", "explain")


def stderr(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to standard error."""
    return capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(re.search(rf"^\W+{name} +[A-Z]", usage, re.M) for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().out == usage
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: learned-optim {command} ")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"learned-optim {learned_optim.__version__}\n"


def test_help_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipes that there are; with one, every field of it and its values as the defaults."""
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^\W+{name}\s", shown, re.M) for name in recipes())
    for name in ("quadratic", "quick-evolution"):
        assert main(["train", name, "--help"]) == 0
        shown = capsys.readouterr().out
        recipe = load_recipe(name)
        names = [f.name for kind in (recipe, recipe.rule, DataOptions) for f in fields(kind)]
        flags = {f"--{name.replace('_', '-')}" for name in names} - {"--rule"}
        assert flags < set(re.findall(r"--[a-z-]+", shown))
        assert f"(default: runs/{name})" in " ".join(shown.split())
    assert main(["train", "quadratic", "--help"]) == 0
    assert "Learning rate of the meta-optimizer, Adam. (default: 0.005)" in re.sub(
        r"[\s│]+", " ", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("train quadratic", "tqdm"),
        ("evaluate --tasks quadratic", "scipy"),
        ("evaluate --tasks quadratic", "matplotlib"),
        ("explain mnist", "matplotlib"),
        ("list", "tyro"),
    ],
)
def test_missing_extra_is_named_before_any_work(
    command: str,
    module: str,
    working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(command.split()) == 1
    assert stderr(capsys) == (
        f"learned-optim: {command.split()[0]} needs {module}: install the extra 'meta' "
        f"(pip install '.[meta]' in a checkout of learned_optim)\n"
    )
    assert not list(working_folder.rglob("*"))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Every name that a command takes; checkpoints have different descriptions."""
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert ":class:" not in shown  # docstrings' markup is for the API reference
    groups = dict(re.findall(r"^([a-z ]+):\n((?:  .*\n)+)", shown, re.M))
    assert list(groups) == ["checkpoints", "update rules", "tasks", "recipes", "baselines"]
    for group, names in (
        ("checkpoints", list_pretrained()),
        ("update rules", rule_names()),
        ("recipes", recipes()),
    ):
        described = dict(re.findall(r"^  (\S+) +(\S.*)", groups[group], re.M))
        assert set(described) == set(names)
        if group == "checkpoints":
            texts = [text for text in described.values() if "stands for" not in text]
            assert len(set(texts)) == len(texts)
    for group, names in (("tasks", task_names()), ("baselines", list(BASELINES))):
        assert set(names) <= set(re.split(r"[,\s]+", groups[group]))


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = random_rule("lstm")
    path = tmp_path / "best.safetensors"
    save_rule(rule, path, {"seed": 3})
    for source in (path, tmp_path):  # a run folder's checkpoint is its best
        assert main(["show", str(source), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "rule": "lstm",
            "config": rule.config_dict(),
            # Two LSTM layers of 20 units on 2 inputs, and the read-out: the thesis's network.
            "weights": 80 * (2 + 20 + 2) + 80 * (20 + 20 + 2) + 21,
            "fingerprint": rule.fingerprint(),
            "record": {"seed": 3},
            "file": str(path),
        }


def test_show_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "default"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# default\n\nA learned optimizer for PyTorch: an update rule of ")
    assert 'LearnedOptimizer(model.parameters(), "default"' in shown
    assert "Trained on " in shown
    assert load_rule("default").fingerprint() in shown
    assert not re.search(r"[{}]|meta-steps.*: 0", shown, re.I)


TINY = [
    "--epochs", "2", "--runs-per-epoch", "2", "--tasks-per-meta-step", "2", "--horizon", "6",
    "--truncation", "3", "--validation-runs", "2", "--test-runs", "2", "--hidden-size", "4",
    "--num-layers", "1",
]  # fmt: skip


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "run", tmp_path / "out" / "tiny.safetensors"
    command = ["train", "quadratic", *TINY, "--folder", str(folder), "--output", str(output)]
    command += ["--preprocessing=log_sign", "--p", "5", "--clip-norm", "None", "--no-download"]
    assert main(command) == 0
    captured = capsys.readouterr()
    record = load_record(output)
    figures, wrote = captured.out.splitlines()
    assert wrote == f"wrote {output}"
    test, against = record["test"], f"{record['ratio_to_adamw']:.2f} of tuned AdamW's"
    assert figures == (
        f"loss summed over 6 steps: validation {record['validation']:.4g} ({against}, best epoch "
        f"{record['epoch']} of 2), test on 2 fresh runs {test['mean']:.4g} ± {test['std']:.4g}"
    )
    assert "4/4" in captured.err  # the progress bar: optimizee runs
    assert "nan" not in captured.err
    assert record["rounds"] == 2
    assert (record["recipe"]["horizon"], record["recipe"]["clip_norm"]) == (6, None)
    config = record["recipe"]["rule"]["config"]
    assert (config["hidden_size"], config["preprocessing"], config["p"]) == (4, "log_sign", 5.0)
    assert record["recipe"]["meta_lr"] == recipes()["quadratic"].meta_lr
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "best.safetensors", "metrics.jsonl", "protocol.json", "recipe.json",
        "references.json", "resume.pt",
    ]  # fmt: skip


def test_a_run_folders_recipe_goes_on_in_the_folder(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "quadratic", *TINY, "--folder", "runs/mine"]) == 0
    capsys.readouterr()
    for source in ("runs/mine/recipe.json", "runs/mine", "runs/mine/"):
        assert main(["train", source]) == 0
        assert capsys.readouterr().out.endswith("wrote runs/mine/mine.safetensors\n")
    assert [path.name for path in (working_folder / "runs").iterdir()] == ["mine"]
    assert load_record("runs/mine")["rounds"] == 2
    # A recipe in a folder that is no run folder names a run after that folder.
    Path("recipes").mkdir()
    Path("runs/mine/recipe.json").rename("recipes/recipe.json")
    assert main(["train", "recipes/recipe.json", "--help"]) == 0
    assert "(default: runs/recipes)" in capsys.readouterr().out


def test_output_that_cannot_be_written_is_noticed_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "below.safetensors"):
        command = ["train", "quadratic", *TINY, "--folder", str(tmp_path / "run")]
        assert main([*command, "--output", str(output)]) == 1
        assert f"learned-optim: cannot write {output}: " in stderr(capsys)
    assert not (tmp_path / "run").exists()
    command = ["evaluate", "--checkpoints", "--tasks", "quadratic", "--output"]
    assert main([*command, str(tmp_path / "file")]) == 1
    assert f"learned-optim: cannot write {tmp_path / 'file' / 'table.md'}: " in stderr(capsys)


def test_progress_goes_on_where_an_earlier_process_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(SMALL, epochs=1, meta_lr_final=None)
    MetaTrainer(recipe, tmp_path).train()
    trainer = MetaTrainer(replace(recipe, epochs=2), tmp_path)
    assert trainer.progress == (3, 6)
    trainer.run(progress=True)
    best = f"best {trainer.best.validation:.4g}, {trainer.best.ratio_to_adamw:.2f} of tuned AdamW's"
    assert re.search(rf"6/6 .*test 8/8, {re.escape(best)}, [\d.e+]+ runs/s", stderr(capsys))
    bar = ProgressBar("again")
    with bar as show:
        show(3, 6, "starting")
        assert bar.tqdm.initial == 3  # time left follows from what is done here


def test_rules_of_ones_own(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``module:name`` in options and recipes; as a module where a checkpoint is loaded."""
    (working_folder / "rules_of_mine.py").write_text(OWN_RULE.format(name="cli"))
    reference = "rules_of_mine:mine-of-cli"
    tiny = TINY[: TINY.index("--hidden-size")]
    command = ["train", "quadratic", *tiny, "--folder", "run", "--rule", reference]
    assert main([*command, "--scale", "0.02"]) == 0
    stored = json.loads((working_folder / "run" / "recipe.json").read_text())["rule"]
    assert stored == {"name": reference, "config": {"scale": 0.02}}
    assert main(["train", "quadratic", "--rule", reference, "--help"]) == 0
    capsys.readouterr()

    for known in (RULES, sys.modules):
        monkeypatch.delitem(known, "mine-of-cli" if known is RULES else "rules_of_mine")
    assert main(["show", "run"]) == 1
    refused = stderr(capsys)
    assert "unknown update rule 'mine-of-cli'; known: " in refused
    assert "--rules MODULE" in refused
    assert main(["--rules", "rules_of_mine", "show", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rule"] == "mine-of-cli"


def test_reader_that_has_seen_enough() -> None:
    """``learned-optim list | head -1``: no broken pipe on the screen."""
    with subprocess.Popen(
        [sys.executable, "-m", "learned_optim", "list"],
        env={**os.environ, **SOURCE}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "handmade.safetensors"
    save_rule(AdamRule(), path)
    command = [
        "evaluate", "--checkpoints", str(path), "--tasks", "quadratic", "--baselines", "sgd",
        "--steps", "10", "--seeds", "2", "--tuning-seeds", "1",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "| task | optimizer | lr | final loss | held-out | summed |" in captured.out
    written = (tmp_path / "out" / "table.md").read_text()
    assert "| quadratic, 10 steps | **handmade** | 1 |" in written
    assert f"wrote {tmp_path / 'out' / 'quadratic.png'}\n" in captured.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "protocol.json", "quadratic.png", "runs.jsonl", "summary.json", "table.md", "worth.png",
    ]  # fmt: skip
    # Again: every run is in the log, and the figures are the same.
    assert main(command) == 0
    assert capsys.readouterr().out == captured.out


@pytest.mark.parametrize(
    ("status", "command", "message"),
    [
        (1, "show nonesuch", "unknown checkpoint 'nonesuch'; known: "),
        (1, "show gone.safetensors", "no checkpoint file or folder at gone.safetensors"),
        (1, "train nonesuch", f"known: {', '.join(sorted(recipes()))}"),
        (1, "train gone.toml", "no recipe file or run folder at gone.toml"),
        (1, "train runs/gone", "no recipe file or run folder at runs/gone"),
        (1, "train --epochs 2 quadratic", "learned-optim train RECIPE --epochs ..."),
        (1, "train quadratic --rule", "argument --rule: expected one argument"),
        (1, "train quadratic --task fashion", "'fashion' is for evaluation only"),
        (1, "evaluate --checkpoints nonesuch", "unknown checkpoint 'nonesuch'; known: "),
        (1, "evaluate --checkpoints --tasks nonesuch", "unknown task 'nonesuch'; known: "),
        (1, "list --rules rules_of_nobody", "no update rules from module 'rules_of_nobody'"),
        (2, "tarin", "Unrecognized options: tarin; Available subcommands: list, show, train"),
        (2, "show", "Missing from learned-optim show"),
        (2, "evaluate --seed 3", "options: --seed, 3; Perhaps you meant: --seeds"),
        (2, "evaluate --seeds three", "Error parsing --seeds: invalid literal for int()"),
        (2, "train quadratic --hiden-size 3", "Perhaps you meant: --hidden-size INT"),
        (2, "train quadratic --epochs 0", "epochs must be at least 1, got 0"),
        (2, "train quadratic --estimator guess", "invalid choice 'guess'"),
        (2, "train quick-evolution --epochs 3", "Unrecognized options: --epochs, 3"),
    ],
)
def test_errors(
    status: int,
    command: str,
    message: str,
    working_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line names the fault and the remedy, and no file is written; 2 for a usage error."""
    assert main(command.split()) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    *bar, error = captured.err.splitlines()
    assert error.startswith("learned-optim: ")
    assert not [line for line in bar if "learned-optim" in line or "Traceback" in line]
    assert message in error
    assert not list(working_folder.rglob("*.safetensors"))
    assert status == 1 or ("--help" in error and not bar)


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MetaTrainer, "__init__", interrupted)
    assert main(["train", "quadratic"]) == 130
    assert stderr(capsys) == "\nlearned-optim: interrupted; the same command resumes\n"


IMPORTS = """
import sys, learned_optim
assert "torch" not in sys.modules
assert set(learned_optim.__all__) <= set(dir(learned_optim))
from learned_optim import *
from torch import nn
assert "torch._dynamo" not in sys.modules
for name in list_pretrained():
    LearnedOptimizer(nn.Linear(2, 2).parameters(), name)
heavy = {"huggingface_hub", "transformers", "lightning", "accelerate", "matplotlib"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}
"""


def test_public_names_are_imported_when_first_used() -> None:
    """Shipped checkpoints need no client of the Hub, and no trainer."""
    python("-c", IMPORTS, **SOURCE)
    with pytest.raises(AttributeError, match="module 'learned_optim' has no attribute 'Adam'"):
        learned_optim.Adam  # noqa: B018
