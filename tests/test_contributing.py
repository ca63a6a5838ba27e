"""What CONTRIBUTING.md tells people to copy is well-formed and names what exists."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="comes with the docs extra")

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
HOOKS, WORKFLOW = (
    yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.M | re.S)
)


def test_hooks_run_what_a_pull_request_asks_for() -> None:
    entries = [hook["entry"] for repo in HOOKS["repos"] for hook in repo["hooks"]]
    assert entries == ["ruff check --fix", "ruff format", "mypy"]
    for entry in entries:
        assert entry.split()[0] in (ROOT / "pyproject.toml").read_text()


def test_the_workflow_builds_on_three_systems_and_names_files_that_exist() -> None:
    wheel = WORKFLOW["jobs"]["wheel"]
    assert wheel["strategy"]["matrix"]["os"] == [
        f"{system}-latest" for system in ("ubuntu", "macos", "windows")
    ]
    commands = " ".join(step.get("run", "") for step in wheel["steps"])
    tests = re.findall(r"tests/\w+\.py", commands)
    assert tests
    assert all((ROOT / test).is_file() for test in tests)
    copied = re.search(r"cp -r (.+) elsewhere", commands)
    assert copied is not None
    assert all((ROOT / name).exists() for name in copied[1].split())
    assert any(step.get("run") == ".ci/run" for step in WORKFLOW["jobs"]["suite"]["steps"])


def test_the_release_checklist_names_commands_that_exist() -> None:
    for module in re.findall(r"`python -m ((?:benchmarks|learned_optim)[\w.]*)", TEXT):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
