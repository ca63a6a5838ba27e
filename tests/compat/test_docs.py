"""Every Python block of docs/using-with.md runs, and its loss falls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from .fake_hub import serve

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
def test_snippet(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(SHARED + SNIPPETS[name], name, "exec"), names)
    if "losses" not in SNIPPETS[name]:  # shows construction alone
        return
    assert len(names["losses"]) >= 30
    assert names["losses"][-1] < names["losses"][0]


def run(code: str, folder: Path, processes: int, **environment: str) -> None:
    """Run a snippet in processes of its own, set up as torchrun sets them up."""
    script = folder / "snippet.py"
    script.write_text(SHARED + code)
    # A store that listens already: a port that is merely free now may be taken later.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tests = str(Path(__file__).parents[1])
    base = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        **environment,
    }
    command = [sys.executable, "-m", "compat.snippet_runner", str(script)]
    running = [
        subprocess.Popen(
            command,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        for rank in range(processes)
    ]
    try:
        output = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(output)


@pytest.mark.parametrize("name", TORCHRUN)
def test_snippet_on_two_processes(name: str, tmp_path: Path) -> None:
    run(SNIPPETS[name], tmp_path, processes=2)


def test_hub_snippet_against_a_local_hub(tmp_path: Path) -> None:
    with serve() as hub:
        run(
            SNIPPETS["Hugging Face Hub"],
            tmp_path,
            processes=1,
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "home"),
            HF_TOKEN="hf_writer",
            HF_HUB_DISABLE_XET="1",
        )
        assert set(hub.repos["user/mnist-optimizer"]) == {"main", "draft"}
