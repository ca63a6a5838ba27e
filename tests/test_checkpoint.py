"""Checkpoint files and where rules are loaded from."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import random_rule, trajectory
from safetensors import safe_open
from safetensors.torch import save_file

import learned_optim
from learned_optim import CheckpointError, list_pretrained, load_record, load_rule, save_rule
from learned_optim.checkpoint import write_atomically
from learned_optim.rules import UpdateRule, rule_names
from learned_optim.rules.lstm import LSTMConfig, LSTMRule


@pytest.mark.parametrize("name", rule_names())
def test_round_trip(name: str, tmp_path: Path) -> None:
    rule = random_rule(name)
    save_rule(rule, tmp_path / "rule.safetensors", {"seed": 3, "figures": [1.5, None]})
    loaded = load_rule(tmp_path / "rule.safetensors")
    assert loaded.fingerprint() == rule.fingerprint()
    assert loaded.config == rule.config
    assert not loaded.training
    assert load_record(tmp_path / "rule.safetensors") == {"seed": 3, "figures": [1.5, None]}


def test_configuration_survives(tmp_path: Path) -> None:
    rule = LSTMRule(LSTMConfig(hidden_size=3, num_layers=1, p=7.5, output_scale=0.25))
    save_rule(rule, tmp_path / "model.safetensors")
    assert load_rule(tmp_path).config == rule.config  # a folder means its model.safetensors


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    save_rule(random_rule("lstm"), path)
    return path


def rewritten(good: Path, **changes: str) -> Path:
    """The checkpoint with entries of its header's metadata replaced."""
    rule = load_rule(good)
    metadata = {
        "format": "learned_optim", "format_version": "1", "rule": "lstm",
        "config": json.dumps(rule.config_dict()), "record": "{}",
    }  # fmt: skip
    save_file(rule.state_dict(), good, {**metadata, **changes})
    return good


def test_truncated_file(good: Path) -> None:
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"good\.safetensors is not a readable safetensors"):
        load_rule(good)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"hello, world, this is no header"])
def test_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rule.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, incomplete or of another kind"):
        load_rule(path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "bert.safetensors"
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no learned_optim checkpoint: .* format='pt'"):
        load_rule(path)


def test_newer_format(good: Path) -> None:
    with pytest.raises(CheckpointError, match="format version '2' and this release reads 1: pip"):
        load_rule(rewritten(good, format_version="2"))


def test_unknown_rule_in_file(good: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown update rule 'gru'; known: .*lstm"):
        load_rule(rewritten(good, rule="gru"))


def test_weights_that_do_not_fit(good: Path) -> None:
    config = json.dumps(LSTMConfig(hidden_size=7).__dict__)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_rule(rewritten(good, config=config))


@pytest.mark.parametrize(
    ("entry", "text", "message"),
    [
        ("config", "[1, 2]", r"its config is no JSON object: \[1, 2\]"),
        ("config", "null", "its config is no JSON object: null"),
        ("config", "{", "does not describe a known update rule"),
        ("config", '{"output_scale": "big"}', "output_scale must be float, got 'big'"),
        ("config", '{"p": "ten"}', "does not describe a known update rule"),
        ("config", '{"loss_input": 1}', "loss_input must be bool, got 1"),
        ("config", '{"hidden_size": "many"}', "does not describe a known update rule"),
        ("config", '{"hidden_size": -3}', "does not describe a known update rule"),
        ("record", "[]", r"its record is no JSON object: \[\]"),
    ],
)
def test_header_of_wrong_types(good: Path, entry: str, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_rule(rewritten(good, **{entry: text}))


def test_records_are_valid_json(good: Path) -> None:
    record = {"validation": math.nan, "figures": (1.0, -math.inf), "runs": [{"best": math.inf}]}
    save_rule(load_rule(good), good, record)
    with safe_open(good, framework="pt") as file:
        text = file.metadata()["record"]
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"validation": None, "figures": [1.0, None], "runs": [{"best": None}]}
    assert load_record(good) == strict
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_rule(load_rule(good), good, {"weights": torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["lstm", "equivariant"])
def test_other_dtypes_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    rule = random_rule(name, torch.float64)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.add_(1e-12)  # lost in float32
    rule = rule.to(dtype)
    save_rule(rule, tmp_path / "rule.safetensors")
    loaded = load_rule(tmp_path / "rule.safetensors")
    assert loaded.dtype == dtype
    assert loaded.fingerprint() == rule.fingerprint()
    param = torch.zeros(3, dtype=dtype)
    grad = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    expected = trajectory(rule, grad.unsqueeze(0), param)
    assert torch.equal(trajectory(loaded, grad.unsqueeze(0), param), expected)


def test_missing_file_and_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*nowhere\.safetensors"):
        load_rule(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="unknown checkpoint 'minst'; known: "):
        load_rule("minst")


def test_unnamed_rule_cannot_be_saved(tmp_path: Path) -> None:
    class Nameless(UpdateRule):
        def init_state(self, param):
            return {}

        def forward(self, grad, state, param, loss=None):
            return -grad, {}

    with pytest.raises(TypeError, match="Nameless has no name"):
        save_rule(Nameless(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(good: Path) -> None:
    before = good.read_bytes()

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(good, fail)
    assert good.read_bytes() == before
    assert [p.name for p in good.parent.iterdir()] == ["good.safetensors"]


def test_killed_write_leaves_the_old_file(good: Path) -> None:
    before = good.read_bytes()
    code = textwrap.dedent(
        f"""
        import os, signal
        from learned_optim.checkpoint import write_atomically
        def die(path):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.{signal.SIGKILL.name})
        write_atomically({str(good)!r}, die)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert good.read_bytes() == before


def test_shipped_names_never_touch_the_network() -> None:
    """With sockets forbidden, every shipped checkpoint loads and runs."""
    assert {"quadratic", "mnist", "default"} <= set(list_pretrained())
    code = textwrap.dedent(
        """
        import socket, sys
        def refuse(*args, **kwargs):
            raise AssertionError("network access")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        import torch
        from learned_optim import LearnedOptimizer, list_pretrained
        for name in list_pretrained():
            p = torch.nn.Parameter(torch.zeros(3))
            optimizer = LearnedOptimizer([p], name)
            p.grad = torch.ones(3)
            optimizer.step()
            assert torch.isfinite(p).all() and p.abs().sum() > 0, name
        assert "huggingface_hub" not in sys.modules
        print("fine")
        """
    )
    source = Path(learned_optim.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
    )
    assert done.stdout == "fine\n", done.stderr
