"""Every Python block of README and the documentation runs, top to bottom of its page.

A block titled with a file name is written to that file instead, as the reader would. A block under
a comment ``<!-- not run: reason -->`` is left alone.
"""

import re
from pathlib import Path

import pytest

from learned_optim.rules import _registry

ROOT = Path(__file__).parent.parent
ELSEWHERE = {ROOT / "docs" / "using-with.md"}  # needs other packages: tests/citizen/test_docs.py
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - ELSEWHERE)]

BLOCK = re.compile(
    r"^(?P<skip><!-- not run: .+? -->\n+)?"
    r'^```python *(title="(?P<file>[^"]+)")?.*\n(?P<code>(?:.*\n)*?)^```$',
    re.MULTILINE,
)


def blocks(page: Path) -> list[re.Match[str]]:
    found = list(BLOCK.finditer(page.read_text()))
    return [block for block in found if not block["skip"]]


WITH_CODE = [page for page in PAGES if blocks(page)]


def test_the_blocks_are_found() -> None:
    names = {page.relative_to(ROOT).as_posix() for page in WITH_CODE}
    assert {"docs/index.md", "docs/meta-training.md", "docs/extending.md"} <= names
    fences = sum(page.read_text().count("\n```python") for page in PAGES)
    assert fences == sum(len(list(BLOCK.finditer(page.read_text()))) for page in PAGES)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Rules that a page defines are not to be found by the tests that come after it.
    _registry.rule_names()
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["code"])
            continue
        line = text.count("\n", 0, block.start("code"))
        # Padded, so that a traceback shows the page's own line.
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)
