"""The command: what it prints, what it writes, and what it says when it is used wrongly."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import random_rule
from test_trainer import SMALL

import learned_optim
from learned_optim import list_pretrained, load_record, load_rule, save_rule
from learned_optim.cli import ProgressBar, TrainingProgress, main
from learned_optim.cli._commands import build_parser
from learned_optim.cli._options import with_values
from learned_optim.meta import DataOptions, EvaluateConfig, MetaTrainer, Recipe, load_recipe
from learned_optim.meta.baselines import BASELINES
from learned_optim.meta.evolution import EvolutionTrainConfig
from learned_optim.meta.field import FieldConfig
from learned_optim.meta.recipes import COMMON, GROUPS, recipe_from_json, recipes
from learned_optim.meta.tasks import task_names
from learned_optim.meta.trainer import TrainConfig
from learned_optim.rules import rule_names
from learned_optim.rules.classical import AdamRule


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to standard error."""
    return capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n    {name} " in usage for name in ("list", "show", "train", "evaluate"))
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
        (["train", "quadratic"], "tqdm"),
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
    """Short, with the recipes that there are, or with the values of one."""
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in recipes())
    assert "--folder PATH" in shown
    assert len(shown.splitlines()) < 90
    assert main(["train"]) == 2
    assert capsys.readouterr().out == shown
    assert main(["train", "quadratic", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 45
    # The recipe's own values are the defaults that the help shows.
    assert "--meta-lr FLOAT             Learning rate of the meta-optimizer, Adam. (0.005)" in shown
    assert "(runs/quadratic)" in shown
    assert "--long-fraction" not in shown
    assert main(["train", "quadratic", "--help-all"]) == 0
    shown = capsys.readouterr().out
    groups = ("what is trained", "optimizee runs", "meta-gradients", "the update rule", "data")
    assert all(f"\n{group}:\n" in shown for group in groups)
    assert "--estimator {replay,autograd,full,es,pes}" in shown
    assert "--hidden-size INT" in shown
    assert "--download, --no-download" in shown


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (TrainConfig, ["train", "coordinatewise"]),
        (EvolutionTrainConfig, ["train", "diagonal"]),
        (EvaluateConfig, ["evaluate"]),
        (FieldConfig, ["evaluate", "--suite", "field"]),
    ],
)
def test_every_field_is_an_option_and_in_the_help(
    kind: type, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the nested configurations, too, under names that do not collide."""
    recipe = load_recipe(arguments[1]) if arguments[0] != "evaluate" else None
    nested = [] if recipe is None else [type(recipe), type(recipe.rule)]
    names = [f.name for cls in (kind, DataOptions, *nested) for f in fields(cls)]
    expected = {f"--{name.replace('_', '-')}" for name in names} - {"--recipe", "--data"}
    assert len(set(names) - {"rule"}) == len(names) - names.count("rule")
    assert main([*arguments, "--help-all"]) == 0
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out))
    assert expected <= shown


def test_values_of_options_reach_every_level(tmp_path: Path) -> None:
    """Each type of field from text, in nested configurations."""
    args = ["quadratic", "--folder", "here", "--tensorboard", "--patience", "3", "--no-download"]
    args += ["--preprocessing", "log_sign", "--p", "5", "--estimator=autograd", "--start", "mnist"]
    args += ["--clip-norm", "None"]
    options, unknown = build_parser(["train", *args]).parse_known_args(["train", *args])
    assert unknown == []
    config = with_values(options.template, options)
    recipe = recipes()["quadratic"]
    rule = replace(recipe.rule, preprocessing="log_sign", p=5.0)
    recipe = replace(recipe, rule=rule, patience=3, estimator="autograd", start="mnist")
    recipe = replace(recipe, clip_norm=None)
    data = DataOptions(download=False)
    assert config == TrainConfig(recipe, Path("here"), tensorboard=True, data=data)
    args = ["--horizons", "10", "20", "--horizons", "30", "--checkpoints", "--seeds", "4"]
    options, _ = build_parser(["evaluate", *args]).parse_known_args(["evaluate", *args])
    expected = EvaluateConfig(horizons=(10, 20, 30), checkpoints=(), seeds=4)
    assert with_values(options.template, options) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("evaluate", "--meta-lr", "--tuning-seeds", "coordinatewise", "nesterov"):
        assert word in script
    assert main(["--print-completion", "cmd"]) == 1
    assert "unknown shell 'cmd'; known: bash" in said(capsys)


def test_completion_in_a_shell() -> None:
    """What bash offers after the beginnings of a command, an option and a recipe."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    command = [sys.executable, "-m", "learned_optim", "--print-completion", "bash"]
    script = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    def offered(*words: str) -> set[str]:
        line = " ".join(["learned-optim", *words])
        quoted = " ".join(f"'{word}'" for word in ("learned-optim", *words))
        code = f"""{script}
        COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; COMP_LINE='{line}'
        COMP_POINT={len(line)}; _shtab_learned_optim 2> /dev/null; echo "${{COMPREPLY[@]}}" """
        done = subprocess.run([bash, "-c", code], capture_output=True, text=True, check=False)
        return set(done.stdout.split())

    assert offered("tr") == {"train"}
    assert offered("train", "quick", "--meta") == {"--meta-lr", "--meta-lr-final"}
    assert offered("train", "quad") == {"quadratic"}


def test_nearest_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for command, near in (
        (["evaluate", "--seed", "3"], "--seeds"),
        (["train", "quadratic", "--metalr=3"], "--meta-lr"),
        (["train", "quadratic", "--hiden-size", "3"], "--hidden-size"),
    ):
        with pytest.raises(SystemExit):
            main(command)
        message = said(capsys)
        assert f"Did you mean '{near}'?" in message
        assert f"\nlearned-optim {command[0]}: error: unrecognized arguments: " in message
    assert main(["tarin"]) == 2
    assert "\nDid you mean 'train'?\n" in said(capsys)


def test_every_field_of_a_recipe_is_in_a_group() -> None:
    names = [name for names in GROUPS.values() for name in names]
    assert sorted(names) == sorted(f.name for f in fields(Recipe) if f.name != "rule")
    assert set(COMMON) <= set(names)


def test_help_of_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    options = capsys.readouterr().out
    for option in ("--checkpoints", "--tasks", "--horizons", "--workers"):
        assert option in options
    assert "--data-dir" not in options
    assert main(["evaluate", "--help-all"]) == 0
    assert "--data-dir" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_needs_no_extra(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("tqdm", "scipy", "matplotlib", "shtab"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: learned-optim {command}")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
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
    for group, names in (("tasks", task_names()), ("baselines", list(BASELINES))):
        assert set(names) <= set(re.split(r"[,\s]+", groups[group]))


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
    path.rename(tmp_path / "best.safetensors")
    assert main(["show", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == str(tmp_path / "best.safetensors")


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
    assert record["epochs_run"] == 2
    assert record["recipe"]["horizon"] == 6
    assert record["recipe"]["rule"]["config"]["hidden_size"] == 4
    assert record["recipe"]["meta_lr"] == recipes()["quadratic"].meta_lr
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "best.safetensors", "metrics.jsonl", "protocol.json", "recipe.json",
        "references.json", "resume.pt",
    ]  # fmt: skip
    # The folder's recipe file is a recipe, and gives the same weights again.
    again = tmp_path / "again"
    assert main(["train", str(folder / "recipe.json"), "--folder", str(again)]) == 0
    expected = load_rule(output).fingerprint()
    assert load_rule(again / "again.safetensors").fingerprint() == expected
    assert load_rule(again).fingerprint() == expected


def test_a_run_folders_recipe_goes_on_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quadratic", *TINY, "--folder", "runs/mine"]) == 0
    capsys.readouterr()
    for source in ("runs/mine/recipe.json", "runs/mine", "runs/mine/"):
        assert main(["train", source]) == 0
        assert capsys.readouterr().out.endswith("wrote runs/mine/mine.safetensors\n")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    assert main(["show", "runs/mine"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["epochs_run"] == 2
    # A recipe in a folder that is no run folder names a run after that folder.
    (tmp_path / "recipes").mkdir()
    (tmp_path / "runs" / "mine" / "recipe.json").rename(tmp_path / "recipes" / "recipe.json")
    assert main(["train", "recipes/recipe.json", "--help"]) == 0
    assert "(runs/recipes)" in capsys.readouterr().out


def test_output_that_cannot_be_written_is_noticed_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "below.safetensors"):
        command = ["train", "quadratic", *TINY, "--folder", str(tmp_path / "run")]
        assert main([*command, "--output", str(output)]) == 1
        assert f"learned-optim: cannot write {output}: " in said(capsys)
    assert not (tmp_path / "run").exists()
    command = ["evaluate", "--checkpoints", "--tasks", "quadratic", "--output"]
    assert main([*command, str(tmp_path / "file")]) == 1
    assert f"learned-optim: cannot write {tmp_path / 'file' / 'table.md'}: " in said(capsys)


def test_progress_goes_on_where_an_earlier_process_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int, str]] = []
    recipe = recipe_from_json({**SMALL.to_json(), "meta_lr_final": None, "validation_runs": 8})
    MetaTrainer(replace(recipe, epochs=1), tmp_path).train()
    trainer = MetaTrainer(replace(recipe, epochs=2), tmp_path)
    progress = TrainingProgress(trainer, lambda *told: seen.append(told))
    trainer.train(progress.on_run, progress.report)
    trainer.finish(report=progress.report)
    first = trainer.history[0]
    best = f"starting best {first.validation:.2f}, {first.ratio_to_adamw:.2f} of tuned AdamW's"
    assert seen[0] == (3, 6, best)
    assert all("runs/s" in text for _, _, text in seen[1:])
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert any(text.startswith("epoch 2 validation 8/8 best ") for _, _, text in seen)
    assert any(text.startswith("test 8/8 best ") for _, _, text in seen)
    bar = ProgressBar("again")
    with bar as show:
        for told in seen:
            show(*told)
        assert bar.tqdm.initial == 3  # time left is that of three runs, by those done here
    assert "6/6" in said(capsys)


def test_first_epoch_has_no_best_yet(tmp_path: Path) -> None:
    seen: list[str] = []
    trainer = MetaTrainer(replace(SMALL, epochs=1, meta_lr_final=None, validation_runs=8), tmp_path)
    progress = TrainingProgress(trainer, lambda done, total, text: seen.append(text))
    trainer.train(progress.on_run, progress.report)
    assert seen[0] == "starting"
    adamw = [text for text in seen if text.startswith("epoch 1 AdamW ")]
    assert adamw == [f"epoch 1 AdamW {done}/64" for done in range(8, 65, 8)]
    assert seen[9].startswith("epoch 1 loss ")
    assert seen[9].endswith("runs/s")
    assert not [text for text in seen if "best" in text or "nan" in text]


RULE_OF_MINE = """
import torch
from dataclasses import dataclass
from learned_optim.rules import RuleConfig, UpdateRule

@dataclass(frozen=True)
class MineConfig(RuleConfig):
    scale: float = 0.01
    \"\"\"How large the first step is.\"\"\"

class Mine(UpdateRule):
    name = "mine-of-{name}"
    Config = MineConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor(self.config.scale))

    def forward(self, grad, state, param, segments, context):
        return -self.scale * grad, {{}}
"""


# One process imports everything and forks those that run a command each.
IN_CHILDREN = """
import json, os, sys, tempfile
from learned_optim.cli import main
printed = {}
for name, arguments in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.path.insert(0, "")
            status = main(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        os.waitpid(child, 0)
        file.seek(0)
        printed[name] = file.read()
print(json.dumps(printed))
"""


def test_rules_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``module:name`` in options and recipes; as a module where a checkpoint is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules_of_mine.py").write_text(RULE_OF_MINE.format(name="cli"))
    reference = "rules_of_mine:mine-of-cli"
    tiny = TINY[: TINY.index("--hidden-size")]
    command = ["train", "quadratic", *tiny, "--folder", "run", "--rule", reference]
    assert main(command) == 1
    assert "estimator 'replay' needs a rule that splits" in said(capsys)
    command += ["--estimator", "autograd", "--scale", "0.02"]
    assert main(command) == 0
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())["rule"]
    assert stored == {"name": reference, "config": {"scale": 0.02}}
    assert main(["train", "quadratic", "--rule", reference, "--help-all"]) == 0
    capsys.readouterr()

    commands = {
        "train": ["train", "run"],
        "refused": ["show", "run"],
        "shown": ["--rules", "rules_of_mine", "show", "run"],
        "listed": ["list", "--rules", "rules_of_mine"],
    }
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", IN_CHILDREN, json.dumps(commands)],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = json.loads(done.stdout)
    assert printed["train"].endswith("wrote run/run.safetensors\n")
    assert "unknown update rule 'mine-of-cli'; known: " in printed["refused"]
    assert "--rules MODULE" in printed["refused"]
    assert json.loads(printed["shown"])["rule"] == "mine-of-cli"
    assert "mine-of-cli" in printed["listed"]
    assert main(["list", "--rules"]) == 1
    assert "--rules takes a module" in said(capsys)
    assert main(["list", "--rules", "rules_of_nobody"]) == 1
    assert "no update rules from module 'rules_of_nobody'" in said(capsys)


def test_reader_that_has_seen_enough() -> None:
    """``learned-optim list | head -1``: no broken pipe on the screen."""
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "learned_optim", "list"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()  # before anything is written
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


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
    for name in ("ratio_to_adamw", "runs_per_second", "seconds_left"):
        values = [json.loads(line)[name] for line in lines]
        assert [s.value for s in events.Scalars(name)] == pytest.approx(values)
    assert "epoch" not in events.Tags()["scalars"]


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
    assert "| task | optimizer | lr | summed loss | over the best baseline's |" in captured.out
    written = (tmp_path / "out" / "table.md").read_text()
    assert "| task | handmade | handmade / best baseline | sgd |" in written
    assert f"wrote {tmp_path / 'out' / 'quadratic-10.png'}\n" in captured.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "protocol.json", "quadratic-10.png", "runs.jsonl", "summary.json", "table.md",
    ]  # fmt: skip
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
        (["train", "gone.toml"], "no recipe file at gone.toml"),
        (["train", "runs/gone"], "no recipe file or run folder at runs/gone"),
        (["train", "--epochs", "2", "quadratic"], "learned-optim train RECIPE --epochs ..."),
        (["train", "--epochs", "2"], "train takes the recipe first, then the options"),
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
    assert lines == errors
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

    monkeypatch.setattr("learned_optim.pretrained.load_rule", interrupt)
    assert main(["show", "mnist"]) == 130
    assert "the same command goes on from here" in said(capsys)


INTERRUPTED = """
import builtins, sys
real = builtins.__import__
def interrupt(name, *args, **kwargs):
    if name == "torch":
        raise KeyboardInterrupt
    return real(name, *args, **kwargs)
builtins.__import__ = interrupt
from learned_optim.cli import main
sys.exit(main(["train", "quadratic"]))
"""


def test_interrupt_while_torch_is_imported() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == ("\nlearned-optim: interrupted; the same command goes on from here\n")


def test_public_names_are_those_of_their_modules() -> None:
    """They are imported when first used, and are there for completion before."""
    code = (
        "import sys, learned_optim; assert 'torch' not in sys.modules; "
        "assert set(learned_optim.__all__) <= set(dir(learned_optim)); "
        "from learned_optim import *; "
        "from learned_optim.optimizer import LearnedOptimizer as same; "
        "assert LearnedOptimizer is same is learned_optim.LearnedOptimizer"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert set(learned_optim.__all__) == {*learned_optim._HOMES, "__version__"}
    with pytest.raises(AttributeError, match="module 'learned_optim' has no attribute 'Adam'"):
        learned_optim.Adam  # noqa: B018


def test_as_a_process() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    command = [sys.executable, "-m", "learned_optim"]
    done = subprocess.run([*command, "list"], env=env, capture_output=True, text=True, check=True)
    assert "\ntasks:\n" in done.stdout
    failed = subprocess.run(
        [*command, "show", "nonesuch"], env=env, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("learned-optim: unknown checkpoint 'nonesuch'; known: ")
