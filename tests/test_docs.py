"""README and the documentation: Python blocks run, commands parse, workflows name what exists.

A block titled with a file name is written to that file, as the reader would. A block under
``<!-- not run: reason -->`` is left alone. Snippets of docs/using-with.md need other packages and
run in ``tests/compat/test_docs.py``.
"""

import re
import shlex
from pathlib import Path

import pytest

from learned_optim.cli import main
from learned_optim.meta import load_recipe
from learned_optim.rules import _base, rule_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"^(?P<skip><!-- not run: .+? -->\n+)?"
    r'^```(?P<kind>\w+) *(title="(?P<file>[^"]+)")?.*\n(?P<code>(?:.*\n)*?)^```$',
    re.MULTILINE,
)


def blocks(page: Path, *kinds: str) -> list[re.Match[str]]:
    found = BLOCK.finditer(page.read_text())
    return [block for block in found if block["kind"] in kinds and not block["skip"]]


WITH_CODE = [p for p in PAGES if p.name != "using-with.md" and blocks(p, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Rules that a page defines are not to be found by the tests that come after it.
    rule_names()
    monkeypatch.setattr(_base, "RULES", dict(_base.RULES))
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["code"])
            continue
        line = text.count("\n", 0, block.start("code"))
        # Padded, so that a traceback shows the page's own line.
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


def test_recipe_files_load(tmp_path: Path) -> None:
    found = [block for page in PAGES for block in blocks(page, "toml") if block["file"]]
    assert found
    for block in found:
        (tmp_path / block["file"]).write_text(block["code"])
        load_recipe(str(tmp_path / block["file"]))


def commands() -> list[str]:
    """Every command of the pages, on one line and without its comment."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "console"):
            for line in block["code"].replace("\\\n", " ").splitlines():
                text = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ "))
                found += [part.strip() for part in text.split(" && ") if part.strip()]
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_name_what_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Subcommands, scripts and modules are there; ``benchmarks.commands`` runs them."""
    words = shlex.split(command)
    if words[0] == "learned-optim":
        try:
            status = main([words[1], "--help"])
        except SystemExit as end:
            status = end.code
        assert status == 0, capsys.readouterr().err
    elif words[0] == "python" and (words[1] != "-m" or words[2].startswith(("bench", "learned"))):
        path = ROOT / (words[2].replace(".", "/") if words[1] == "-m" else words[1])
        assert path.exists() or path.with_suffix(".py").exists()


def test_workflows_and_hooks_name_what_exists() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with the docs extra")
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) == 3
    named = set()
    for file in files:
        text = file.read_text()
        assert yaml.safe_load(text)
        named |= set(re.findall(r"tests/\w+\.py|\.ci/\w+", text))
    assert len(named) > 3
    assert all((ROOT / name).is_file() for name in named)
