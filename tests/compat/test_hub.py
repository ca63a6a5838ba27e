"""The real huggingface_hub client, in processes of its own, against a local stand-in of the Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from learned_optim import model_card, save_rule
from learned_optim.checkpoint import FORMAT_VERSION
from learned_optim.evaluation import EvaluateConfig, Evaluation
from learned_optim.rules import UpdateRule
from learned_optim.summary import draw

from .common import descending_lstm, make_rule
from .fake_hub import Files, Hub, serve
from .test_docs import SHARED, SNIPPETS

RECORD = {
    "recipe": {
        "task": "mnist", "horizon": 100, "truncation": 20, "epochs": 60, "runs_per_epoch": 100,
        "meta_lr": 0.003, "seed": 7,
    },
    "commit": "0123456789ab",
    "validation": 48.5,
    "test": {"mean": 49.25, "std": 3.125, "runs": 100},
}  # fmt: skip

# A process that has imported what is slow forks one for every client. A client does its jobs
# (load a source, push a rule, run code) and reports what came of them.
PROGRAM = """
import json, os, sys, time
import safetensors.torch, torch, learned_optim.rules
for line in sys.stdin:
    environment, jobs, home = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitpid(child, 0)[1], flush=True)
else:
    sys.exit()
os.environ.clear()
os.environ.update(environment)
os.chdir(home)
if "NO_WAITING" in os.environ:
    def sleep(seconds):
        raise AssertionError("the client waits between attempts to reach a dead address")
    time.sleep = sleep
from learned_optim import load_record, load_rule, push_to_hub
results = []
for job in jobs:
    try:
        if "code" in job:
            exec(job["code"], {})
            results.append(None)
        elif "to" in job:
            results.append(push_to_hub(job["rule"], job["to"], token=job["token"]))
        else:
            rule = load_rule(job["source"], local_files_only=job.get("local", False))
            results.append([rule.fingerprint(), load_record(job["source"])])
    except Exception as error:
        results.append([type(error).__name__, str(error)])
with open("answer.json", "w") as file:
    json.dump(results, file)
"""

Client = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """What came of ``jobs`` in a fresh process whose Hub is the stand-in and cache is ``home``."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:

        def run(hub: Hub | str, home: Path, *jobs: dict[str, Any], **environment: str) -> list[Any]:
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
            environment = {
                **kept,
                "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                **environment,
            }
            home.mkdir(exist_ok=True)
            print(json.dumps([environment, jobs, str(home)]), file=parent.stdin, flush=True)
            assert parent.stdout.readline() == "0\n"
            return json.loads((home / "answer.json").read_text())

        yield run
        parent.stdin.close()


def load(source: str, **options: Any) -> dict[str, Any]:
    return {"source": source, **options}


def repository(rule: UpdateRule, folder: Path, **config: Any) -> Files:
    """The files of a Hub repository that holds ``rule``."""
    save_rule(rule, folder / "rule.safetensors", RECORD)
    entry = {"format": "learned_optim", "format_version": FORMAT_VERSION, "rule": rule.name}
    return {
        "model.safetensors": (folder / "rule.safetensors").read_bytes(),
        "config.json": json.dumps({**entry, **config}).encode(),
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Two revisions of a good repository, and several that must be refused."""
    folder = tmp_path_factory.mktemp("repositories")
    with serve() as hub:
        good = repository(make_rule("adam"), folder)
        hub.add("user/good", good)
        hub.add("user/good", repository(descending_lstm(), folder), "v2")
        hub.add(
            "user/foreign", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"?"}
        )
        hub.add("user/pickled", {"pytorch_model.bin": b"never read"})
        hub.add("user/no-weights", {"config.json": good["config.json"]})
        hub.add("user/newer", repository(make_rule("adam"), folder, format_version=99))
        hub.add("user/odd", {**good, "config.json": b"[1, 2]"})
        hub.add("user/damaged", {**good, "model.safetensors": good["model.safetensors"][:100]})
        yield hub


def test_load_by_name_branch_and_commit_then_offline(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    adam, lstm = make_rule("adam").fingerprint(), descending_lstm().fingerprint()
    commit = hub.add("user/good", hub.repos["user/good"]["v2"], "v2")
    sources = ["user/good", "user/good@v2", f"user/good@{commit}"]
    found = client(hub, tmp_path, *map(load, sources))
    assert [fingerprint for fingerprint, _ in found] == [adam, lstm, lstm]
    assert all(record == RECORD for _, record in found)

    asked = len(hub.requests)
    offline = client(hub, tmp_path, *map(load, sources), HF_HUB_OFFLINE="1")
    assert offline == found
    local = client("http://127.0.0.1:9", tmp_path, load("user/good", local=True))
    assert local[0][0] == adam
    assert len(hub.requests) == asked


def test_what_is_not_in_the_cache(hub: Hub, client: Client, tmp_path: Path) -> None:
    """Offline mode, local_files_only and a dead network each say which of them it is."""
    asked = len(hub.requests)
    (offline,) = client(hub, tmp_path, load("user/good"), HF_HUB_OFFLINE="1")
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in offline[1]
    (local,) = client(hub, tmp_path, load("user/good", local=True))
    assert "not in the local cache, and local_files_only was asked for" in local[1]
    assert len(hub.requests) == asked
    (dead,) = client("http://127.0.0.1:9", tmp_path, load("user/good"), NO_WAITING="1")
    assert "the Hub could not be reached for 'user/good'" in dead[1]
    assert all(name == "FileNotFoundError" for name, _ in (offline, local, dead))


REFUSALS = {
    "nobody/nothing": (
        "FileNotFoundError", "no repository 'nobody/nothing', or it is private"
    ),
    "user/good@v3": ("FileNotFoundError", "no such revision: 'user/good@v3'"),
    "user/foreign": ("CheckpointError", "no learned_optim checkpoint: its header says"),
    "user/pickled": ("CheckpointError", "'user/pickled' has no config.json"),
    "user/no-weights": (
        "FileNotFoundError", "no file model.safetensors, and only safetensors"
    ),
    "user/newer": ("CheckpointError", f"version 99 and this release reads {FORMAT_VERSION}"),
    "user/odd": ("CheckpointError", "config.json of 'user/odd' is not readable"),
    "user/damaged": ("CheckpointError", "'user/damaged': "),
    "user/-bad-.name-": ("FileNotFoundError", "'user/-bad-.name-'"),
}  # fmt: skip


def test_refusals_say_what_is_wrong(hub: Hub, client: Client, tmp_path: Path) -> None:
    found = client(hub, tmp_path, *map(load, REFUSALS))
    for (name, text), (source, (error, message)) in zip(found, REFUSALS.items(), strict=True):
        assert name == error, source
        assert message in text
    # A foreign repository's weights are never fetched.
    fetched = [r for r in hub.requests if "model.safetensors" in r or "pytorch_model" in r]
    for repo in ("foreign", "pickled", "newer", "odd"):
        assert not any(f"user/{repo}/" in request for request in fetched)
    assert any("user/damaged/" in request for request in fetched)


def test_push_then_load_in_another_process(client: Client, tmp_path: Path) -> None:
    save_rule(descending_lstm(), tmp_path / "rule.safetensors", RECORD)
    push = {"rule": str(tmp_path / "rule.safetensors"), "token": "hf_writer"}
    with serve() as hub:
        jobs = [
            {**push, "to": "user/mine"},
            {**push, "to": "user/mine@draft"},
            {**push, "to": "user/other", "token": "hf_nobody"},
            {**push, "to": "no-slash"},
            {"code": SHARED + SNIPPETS["Hugging Face Hub"]},
        ]
        first, second, refused, malformed, snippet = client(
            hub, tmp_path / "writer", *jobs, HF_TOKEN="hf_writer"
        )
        assert first.startswith(f"{hub.url}/user/mine/commit/")
        assert second.startswith(f"{hub.url}/user/mine/commit/")
        assert refused[0] in ("HfHubHTTPError", "RepositoryNotFoundError")
        assert "401" in refused[1]
        assert malformed[1].startswith("a Hub id has the form 'user/repo' or 'user/repo@branch'")
        assert snippet is None
        assert set(hub.repos) == {"user/mine", "user/mnist-optimizer"}
        assert all(set(branches) == {"main", "draft"} for branches in hub.repos.values())
        files = hub.repos["user/mine"]["main"]
        assert {"model.safetensors", "config.json", "README.md"} <= set(files)
        config = json.loads(files["config.json"])
        assert (config["rule"], config["fingerprint"]) == ("lstm", descending_lstm().fingerprint())
        assert "# mine" in files["README.md"].decode()
        jobs = [load("user/mine"), load("user/mine@draft")]
        for fingerprint, record in client(hub, tmp_path / "reader", *jobs):
            assert fingerprint == descending_lstm().fingerprint()
            assert record == RECORD


MIXTURE = {
    "recipe": {"task": ["mnist", "quadratic"], "validation_horizon": 2000, "horizon": 1000,
               "validation_mean": "geometric"},
    "validation": 10.5,
    "test": {"mean": 12.0, "geometric_mean": 9.5, "runs": 8, "task": "cifar10"},
    "data_sets": ["mnist"],
}  # fmt: skip
CARDS = [
    ("lstm-descending", RECORD, [
        'optimizer = LearnedOptimizer(model.parameters(), "user/mine")',
        "- Tasks: `mnist`",
        "| loss summed over 100 steps | mean | value | standard deviation |",
        "| validation | arithmetic | 48.5 |  |",
        "| test, 100 fresh runs | arithmetic | 49.25 | 3.125 |",
        "- Trained on runs of an unknown number of steps and tested on runs of 100;",
        "- State takes 320 bytes per parameter of a square matrix in float32 (Adam: 8).",
        "- Parameters whose gradient stays exactly zero still drift.",
    ]),
    ("adam", MIXTURE, [
        "- Tasks: `mnist`, `quadratic`",
        "- Image sets: mnist",
        "| loss summed over 2,000 steps | mean | value | standard deviation |",
        "| validation | geometric | 10.5 |  |",
        "| test, 8 fresh runs of cifar10 | geometric | 9.5 |  |",
    ]),
    ("adam", None, ["holds no record of its training.", "None was recorded.", "an unknown number"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "lines"), CARDS)
def test_the_card_states_the_record(name: str, record: dict | None, lines: list[str]) -> None:
    card = model_card(make_rule(name), "user/mine", record=record, license="apache-2.0")
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: learned_optim\ntags:\n- ")
    for line in [*lines, "## Licence\n\napache-2.0"]:
        assert line in card, line
    assert ("still drift" in card) == (name != "adam")


def test_the_card_shows_an_evaluation_with_its_curves(tmp_path: Path) -> None:
    """From a real evaluation, small; the pushed folder holds the images that the card shows."""
    save_rule(descending_lstm(), tmp_path / "mine.safetensors")
    config = EvaluateConfig(
        checkpoints=(str(tmp_path / "mine.safetensors"),), tasks=("quadratic",),
        baselines=("sgd",), steps=8, seeds=2, tuning_seeds=1, output=tmp_path / "evaluation",
    )  # fmt: skip
    summary = Evaluation(config).execute()
    curves = draw(summary, tmp_path)
    assert curves == ["quadratic.png", "worth.png"]
    assert (tmp_path / "quadratic.png").read_bytes().startswith(b"\x89PNG")
    card = model_card(
        descending_lstm(), "user/mine", record=RECORD, evaluation=summary, curves=curves
    )
    mean = summary["tasks"]["quadratic"]["optimizers"]["mine"]["sum"]["mean"]
    assert f"{mean:.1f} ± " in card
    assert "### Untuned against tuned" in card
    assert "![quadratic](quadratic.png)" in card
    assert "and tested on runs of 100;" in card
