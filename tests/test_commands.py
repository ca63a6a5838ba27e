"""Every command of README and the documentation is one that is run somewhere, and parses.

`python -m benchmarks.commands` runs them, the long ones shortened.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import commands
from benchmarks.commands import PAGES, ROOT, Command
from learned_optim.cli import _commands, main
from learned_optim.cli._options import parsed
from learned_optim.meta.recipes import recipes

FOUND = [command for page in PAGES for command in commands.commands(page)]


def is_ours(command: Command) -> bool:
    return command.left_out is None and command.text.startswith("learned-optim ")


def test_all_pages_are_read() -> None:
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    with_commands = {page for page in pages if list(commands.commands(page))}
    assert with_commands <= set(PAGES)
    assert len(FOUND) > 50


@pytest.mark.parametrize("command", FOUND, ids=lambda each: each.text[:50])
def test_who_runs_it_is_known(command: Command) -> None:
    """By the script: `learned-optim`, an example, a benchmark's help or torchrun; or a reason."""
    if command.left_out is not None:
        return
    words = shlex.split(command.short)
    if words[0] == "python":
        script = ROOT / (words[1] if words[1] != "-m" else words[2].replace(".", "/"))
        assert script.is_file() or script.with_suffix(".py").is_file() or script.is_dir()
    else:
        assert words[0] in ("learned-optim", "torchrun")


def test_no_exception_is_stale() -> None:
    for pattern in commands.LEFT_OUT:
        assert any(re.search(pattern, command.text) for command in FOUND), pattern
    for start in commands.SHORTER:
        assert any(command.text.startswith(start) for command in FOUND), start


def test_the_error_that_a_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    command, _, output = text.partition("$ learned-optim train quick --metalr")[2].partition("\n")
    with pytest.raises(SystemExit) as end:
        main(["train", "quick", "--metalr", *command.split()])
    assert end.value.code == 2
    assert capsys.readouterr().err == output.partition("```")[0]


def test_commands_within_sentences_exist() -> None:
    """`python -m benchmarks.NAME` is a module, `learned-optim NAME` a subcommand."""
    found = 0
    for page in PAGES:
        text = (ROOT / page).read_text()
        for module in re.findall(r"`python -m (benchmarks[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), (page, module)
            found += 1
        for name in re.findall(r"`learned-optim (\w+)", text):
            assert name in _commands.COMMANDS, (page, name)
            found += 1
    assert found > 20


@pytest.mark.parametrize(
    "command", [each for each in FOUND if is_ours(each)], ids=lambda each: each.text[14:64]
)
def test_it_parses_as_it_stands_and_shortened(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options exist and take these values; nothing is run."""
    seen = []

    def note(options: object) -> int:
        seen.append(parsed(options, options.template) if hasattr(options, "template") else None)
        return 0

    for name, known in _commands.COMMANDS.items():
        monkeypatch.setitem(_commands.COMMANDS, name, known._replace(run=note))
    monkeypatch.chdir(tmp_path)
    for page in ("docs/meta-training.md", "docs/recipes.md"):
        for block in commands.BLOCK.finditer((ROOT / page).read_text()):
            if block["kind"] == "toml" and block["file"]:
                (tmp_path / block["file"]).write_text(block["body"])
    trained = tmp_path / "runs" / "regression"  # what a page's Python block leaves
    trained.mkdir(parents=True)
    (trained / "recipe.json").write_text(json.dumps(recipes()["quick"].to_json()))
    for text in (command.text, command.short):
        arguments = shlex.split(text.partition(" > ")[0])[1:]
        if "--rules" in arguments or "my_rules:learned-momentum" in arguments:
            pytest.skip("imports a rule of the page's; `python -m benchmarks.commands` runs it")
        assert main(arguments) == 0
        shows = {"--help", "--schema"} & set(arguments)
        assert shows or len(seen) > 0
