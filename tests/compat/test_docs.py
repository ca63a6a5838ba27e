"""Every Python block of docs/using-with.md runs, and its loss falls.

Blocks for torchrun run in ``test_distributed.py``, that of the Hub in ``test_hub.py``.
"""

import re
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "using-with.md").read_text()


def blocks(page: str) -> tuple[str, dict[str, str]]:
    """The lines shared by all snippets, and the snippets by their section's heading."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    fence = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    (shared,) = fence.findall(parts[0])
    snippets = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        for index, code in enumerate(fence.findall(text)):
            snippets[f"{heading} {index + 1}" if index else heading] = code
    return shared, snippets


SHARED, SNIPPETS = blocks(PAGE)
HERE = [n for n, code in SNIPPETS.items() if not code.startswith(("# torchrun", "# hub"))]
TORCHRUN = [n for n, code in SNIPPETS.items() if code.startswith("# torchrun")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HERE)
@pytest.mark.usefixtures("working_folder")
def test_snippet(name: str) -> None:
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(SHARED + SNIPPETS[name], name, "exec"), names)
    if "losses" not in SNIPPETS[name]:  # shows construction alone
        return
    assert len(names["losses"]) >= 30
    assert names["losses"][-1] < names["losses"][0]
