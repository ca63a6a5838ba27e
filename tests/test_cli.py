"""The command: what it prints, what it writes, and what it says when it is used wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_rule

import learned_optim
from learned_optim import load_record, load_rule, save_rule
from learned_optim.cli import main
from learned_optim.meta.baselines import BASELINES
from learned_optim.meta.recipes import recipes
from learned_optim.meta.tasks import task_names
from learned_optim.rules import rule_names
from learned_optim.rules.classical import AdamRule


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to standard error."""
    return capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {command} " in usage for command in ("list", "show", "train", "evaluate"))
    assert main([]) == 2
    assert capsys.readouterr().out == usage


def test_help_of_show_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        assert main(["show", flag]) == 0
        assert capsys.readouterr().out.startswith("usage: learned-optim show CHECKPOINT\n")
        assert main(["list", flag]) == 0
        assert capsys.readouterr().out.startswith("usage: learned-optim list\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"learned-optim {learned_optim.__version__}\n"


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["train", "quadratic"], "tyro"),
        (["train", "quadratic"], "tqdm"),
        (["search", "quadratic"], "tyro"),
        (["evaluate", "--tasks", "quadratic"], "tyro"),
        (["evaluate", "--tasks", "quadratic"], "scipy"),
        (["evaluate", "--tasks", "quadratic"], "matplotlib"),
    ],
)
def test_missing_extra_is_named_before_any_work(
    command: list[str],
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(command) == 1
    expected = f"learned-optim: {command[0]} needs {module}: pip install 'learned-optim[meta]'\n"
    assert said(capsys) == expected
    assert not list(tmp_path.rglob("*.jsonl"))


def test_help_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert f"({', '.join(sorted(recipes()))})" in capsys.readouterr().out
    assert main(["train"]) == 2
    with pytest.raises(SystemExit) as done:
        main(["train", "quadratic", "--help"])
    assert done.value.code == 0
    options = capsys.readouterr().out
    # The recipe's own values are the defaults that the help shows.
    assert "--meta-lr FLOAT" in options
    assert "default: runs/quadratic" in options.replace("\n", " ")


def test_help_of_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "--help"])
    assert done.value.code == 0
    options = capsys.readouterr().out
    for option in ("--checkpoints", "--tasks", "--horizons", "--workers", "--data-dir"):
        assert option in options


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert lines["update rules"] == ", ".join(rule_names())
    assert lines["tasks"] == ", ".join(task_names())
    assert lines["recipes"] == ", ".join(sorted(recipes()))
    assert lines["baselines"] == ", ".join(BASELINES)
    assert "checkpoints" in lines


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = random_rule("lstm")
    path = tmp_path / "rule.safetensors"
    save_rule(rule, path, {"seed": 3})
    assert main(["show", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "rule": "lstm",
        "config": rule.config_dict(),
        # Two LSTM layers of 20 units on 2 inputs, and the read-out: the thesis's network.
        "weights": 80 * (2 + 20 + 2) + 80 * (20 + 20 + 2) + 21,
        "fingerprint": rule.fingerprint(),
        "record": {"seed": 3},
    }


TINY = [
    "--epochs", "2", "--runs-per-epoch", "2", "--tasks-per-meta-step", "2", "--horizon", "6",
    "--truncation", "3", "--validation-runs", "2", "--test-runs", "2", "--hidden-size", "4",
    "--num-layers", "1",
]  # fmt: skip


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "run", tmp_path / "out" / "tiny.safetensors"
    command = ["train", "quadratic", *TINY, "--folder", str(folder), "--output", str(output)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {output}\n"
    assert "4/4" in captured.err  # the progress bar: optimizee runs
    record = load_record(output)
    assert record["epochs_run"] == 2
    assert record["recipe"]["horizon"] == 6
    assert record["recipe"]["rule"]["config"]["hidden_size"] == 4
    assert record["recipe"]["meta_lr"] == recipes()["quadratic"].meta_lr
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.safetensors", "metrics.jsonl", "recipe.json", "resume.pt",
    ]  # fmt: skip
    # The folder's recipe file is a recipe, and gives the same weights again.
    again = tmp_path / "again"
    assert main(["train", str(folder / "recipe.json"), "--folder", str(again)]) == 0
    assert (
        load_rule(again / "quadratic.safetensors").fingerprint() == load_rule(output).fingerprint()
    )


def test_train_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", "quadratic", *TINY, "--folder", str(tmp_path), "--tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line)["validation"] for line in lines]
    scalars = events.Scalars("validation")
    assert [s.step for s in scalars] == [1, 2]
    assert [s.value for s in scalars] == pytest.approx(written)


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "handmade.safetensors"
    save_rule(AdamRule(), path)
    command = [
        "evaluate", "--checkpoints", str(path), "--tasks", "quadratic", "--baselines", "sgd",
        "--horizons", "10", "--seeds", "2", "--tuning-seeds", "1",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "| task | handmade | handmade / best baseline | sgd |" in captured.out
    assert f"wrote {tmp_path / 'out' / 'quadratic-10.png'}\n" in captured.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "protocol.json", "quadratic-10.png", "runs.jsonl", "summary.json", "table.md",
    ]  # fmt: skip
    assert (tmp_path / "out" / "table.md").read_text() in captured.out
    # Again: every run is in the log, and the figures are the same.
    assert main(command) == 0
    assert capsys.readouterr().out == captured.out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "nonesuch"], "unknown checkpoint 'nonesuch'; known: "),
        (["show"], "show takes one checkpoint"),
        (["show", "gone.safetensors"], "no checkpoint file at gone.safetensors"),
        (["list", "rules"], "list takes no arguments, got rules"),
        (["train", "nonesuch"], f"known: {', '.join(sorted(recipes()))}"),
        (["train", "gone.json"], "no recipe file at gone.json"),
        (["train", "--epochs", "2", "quadratic"], "learned-optim train RECIPE --epochs ..."),
        (["search", "--trials", "2"], "search takes the recipe first, then the options"),
        (["train", "quadratic", "--task", "fashion"], "'fashion' is for evaluation only"),
        (["evaluate", "--checkpoints", "nonesuch"], "unknown checkpoint 'nonesuch'; known: "),
        (["evaluate", "--checkpoints", "--tasks", "nonesuch"], "unknown task 'nonesuch'; known: "),
        (["evaluate", "--checkpoints", "--baselines", "adan"], "unknown baseline 'adan'; known: "),
    ],
)
def test_errors(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that says what is wrong and what there is, exit status 1, and no file written."""
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    lines = said(capsys).splitlines()
    errors = [line for line in lines if line.startswith("learned-optim: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in "".join(lines)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tarin"]) == 2
    message = said(capsys)
    assert message.startswith("learned-optim: unknown command 'tarin'\n")
    assert "evaluate" in message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "--seed", "3"], "--seed"),
        (["evaluate", "--seeds", "three"], "three"),
        (["evaluate", "--checkpoints", "--baselines"], "at least one task"),
        (["train", "quadratic", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "quadratic", "--estimator", "guess"], "guess"),
    ],
)
def test_bad_options(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_recipe_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{", "[1]", '{"task": "quadratic"}'):
        (tmp_path / "broken.json").write_text(content)
        assert main(["train", str(tmp_path / "broken.json")]) == 1
        assert f"learned-optim: {tmp_path / 'broken.json'}: " in said(capsys)


def test_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("learned_optim.cli.load_rule", interrupt)
    assert main(["show", "anything"]) == 130
    assert "the same command goes on from here" in said(capsys)


def test_as_a_process() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    command = [sys.executable, "-m", "learned_optim.cli"]
    done = subprocess.run([*command, "list"], env=env, capture_output=True, text=True, check=True)
    assert "tasks: " in done.stdout
    failed = subprocess.run(
        [*command, "show", "nonesuch"], env=env, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("learned-optim: unknown checkpoint 'nonesuch'; known: ")
