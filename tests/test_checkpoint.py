"""Checkpoint files and where rules are loaded from."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_rule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import learned_optim
from learned_optim import CheckpointError, LearnedOptimizer, load_record, load_rule, save_rule
from learned_optim.checkpoint import DTYPES, check_writable, content_digest, write_atomically
from learned_optim.rules import UpdateRule, rule_names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", rule_names())
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A folder means its model.safetensors; the same rule and record give the same bytes."""
    rule = random_rule(name, torch.float64)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.add_(1e-12)  # lost in float32
    rule, record = rule.to(dtype), {"z": 1, "a": {"ü": [1.5, None], "b": "x"}}
    save_rule(rule, tmp_path / "model.safetensors", record)
    loaded = load_rule(tmp_path)
    assert loaded.fingerprint() == rule.fingerprint()
    assert (loaded.config, loaded.dtype) == (rule.config, rule.dtype)
    assert not loaded.training
    assert load_record(tmp_path) == record
    save_rule(loaded, tmp_path / "again.safetensors", record)
    first = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == first
    # What safetensors itself reads is what was written, aligned.
    assert int.from_bytes(first[:8], "little") % 8 == 0
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[key], weight) for key, weight in rule.state_dict().items())


def test_how_a_rule_is_used_survives(tmp_path: Path) -> None:
    """A checkpoint carries the warm-up and the trained length, and the optimizer takes them."""
    rule = random_rule("equivariant")
    rule.warmup_steps, rule.trained_steps = 7, 300
    save_rule(rule, tmp_path / "rule.safetensors")
    loaded = load_rule(tmp_path / "rule.safetensors")
    assert (loaded.warmup_steps, loaded.trained_steps) == (7, 300)
    optimizer = LearnedOptimizer([torch.zeros(2, requires_grad=True)], loaded)
    assert optimizer.param_groups[0]["warmup"] == 7
    shipped = {name: load_rule(name) for name in ("coordinatewise", "diagonal", "mnist")}
    assert {n: (r.warmup_steps, r.trained_steps) for n, r in shipped.items()} == {
        "coordinatewise": (50, 2000),
        "diagonal": (0, 3000),
        "mnist": (0, 100),
    }


def rewritten(
    rule_file: Path, change: Callable[[Tensor], Tensor] = lambda tensor: tensor, **entries: str
) -> Path:
    """The checkpoint with changed tensors and entries of its metadata, and a digest that fits."""
    with safe_open(rule_file, framework="pt") as file:
        metadata = {**file.metadata(), **entries}
    tensors = {name: change(tensor) for name, tensor in load_file(rule_file).items()}
    if "sha256" not in entries and all(tensor.dtype in DTYPES for tensor in tensors.values()):
        metadata["sha256"] = content_digest(metadata, tensors)
    save_file(tensors, rule_file, metadata)
    return rule_file


@pytest.mark.parametrize("content", [b"", b"hello, world, this is no header", None])
def test_damaged_files_and_files_of_another_kind(rule_file: Path, content: bytes | None) -> None:
    rule_file.write_bytes(rule_file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=r"rule\.safetensors is .* incomplete or of another"):
        load_rule(rule_file)


SHIPPED = sorted((Path(learned_optim.__file__).parent.parent / "pretrained").glob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_flipped_bit_of_a_shipped_file_is_noticed(path: Path, tmp_path: Path) -> None:
    """Somewhere in the header or in the weights: refused, or without consequence."""
    with safe_open(path, framework="pt") as file:
        assert "sha256" in file.metadata()
    expected, content = load_rule(path).fingerprint(), path.read_bytes()
    copy = tmp_path / path.name
    draws = torch.Generator().manual_seed(0)
    bits = torch.randint(8 * len(content), (25,), generator=draws).tolist()
    refused = 0
    for bit in [*bits, 0, 8 * len(content) - 1]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        copy.write_bytes(damaged)
        try:
            assert load_rule(copy).fingerprint() == expected
            assert load_record(copy) == load_record(path)
        except CheckpointError as error:
            assert str(copy) in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 25  # but for padding, every bit matters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.full_like(t, torch.nan), "holds values that are not finite"),
        (lambda t: t.masked_fill(t == t.max(), torch.inf), "holds values that are not finite"),
        (lambda t: t.to(torch.bool), r"has dtype torch\.bool and should be floating"),
        (lambda t: t.to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn, in which no rule"),
        (lambda t: t.double() if t.dim() > 1 else t, "several dtypes: torch.float32, torch.f"),
    ],
)
def test_weights_that_cannot_compute(
    rule_file: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"rule\.safetensors.* .*{message}"):
        load_rule(rewritten(rule_file, change))


def test_what_could_not_be_loaded_is_not_saved(rule_file: Path) -> None:
    rule, before = random_rule("lstm"), rule_file.read_bytes()
    rule.readout.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the rule cannot be saved: .* not finite"):
        save_rule(rule, rule_file)
    with pytest.raises(ValueError, match=r"the rule cannot be saved: .* dtype torch.float8_e4"):
        save_rule(random_rule("lstm").to(torch.float8_e4m3fn), rule_file)
    assert rule_file.read_bytes() == before


@pytest.mark.parametrize("size", [{"num_layers": 10**7}, {"hidden_size": 15_000}])
def test_sizes_are_compared_before_anything_is_built(rule_file: Path, size: dict[str, int]) -> None:
    """Building these rules would take hours, or four gigabytes."""
    config = json.dumps({**load_rule(rule_file).config_dict(), **size})
    with pytest.raises(CheckpointError, match=r"rule\.safetensors.* is that of a larger rule"):
        load_rule(rewritten(rule_file, config=config))


@pytest.mark.parametrize(
    ("entry", "text", "message"),
    [
        ("format_version", "3", "version 3 and this release reads 2: install"),
        ("format", "pt", r"no learned_optim checkpoint: .* format='pt'"),
        ("sha256", "", "the file is damaged: its content does not have the digest"),
        ("rule", "gru", "unknown update rule 'gru'; known: .*lstm"),
        ("use", '{"warmup_steps": -1}', "use has warmup_steps=-1"),
        ("use", '{"warmup_steps": null}', "use has warmup_steps=None"),
        ("use", '{"x": 1}', "use has x=1"),
        ("use", "3", "its use is no JSON object: 3"),
        ("config", "[1, 2]", r"its config is no JSON object: \[1, 2\]"),
        ("config", "{", "does not describe a known update rule"),
        ("config", '{"output_scale": "big"}', "output_scale must be float, got 'big'"),
        ("config", '{"p": 1e999}', "p must be finite, got inf"),
        ("config", '{"hidden_size": 7}', "size mismatch"),
        ("config", '{"loss_input": 1}', "loss_input must be bool, got 1"),
        ("config", '{"hidden_size": "many"}', "does not describe a known update rule"),
        ("config", '{"hidden_size": -3}', "does not describe a known update rule"),
        ("record", "[]", r"its record is no JSON object: \[\]"),
    ],
)
def test_bad_headers(rule_file: Path, entry: str, text: str, message: str) -> None:
    assert load_rule(rewritten(rule_file)).name == "lstm"
    with pytest.raises(CheckpointError, match=rf"(?s)rule\.safetensors.*{message}"):
        load_rule(rewritten(rule_file, **{entry: text}))


def test_records_are_valid_json(rule_file: Path) -> None:
    record = {"validation": math.nan, "figures": (1.0, -math.inf), "runs": [{"best": math.inf}]}
    save_rule(load_rule(rule_file), rule_file, record)
    with safe_open(rule_file, framework="pt") as file:
        text = file.metadata()["record"]
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"validation": None, "figures": [1.0, None], "runs": [{"best": None}]}
    assert load_record(rule_file) == strict
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_rule(load_rule(rule_file), rule_file, {"weights": torch.zeros(2)})


def test_run_folders_are_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    rules = {name: random_rule(name) for name in ("lstm", "equivariant", "horizon", "adam")}
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in the folder .*mine"):
        load_rule(folder)
    save_rule(rules["adam"], folder / "best.safetensors")
    assert load_rule(folder).name == "adam"  # a run that goes on
    save_rule(rules["lstm"], folder / "earlier.safetensors")
    assert load_rule(folder).name == "lstm"
    save_rule(rules["equivariant"], folder / "mine.safetensors")
    assert load_rule(str(folder)).name == "equivariant"
    save_rule(rules["horizon"], folder / "model.safetensors")
    assert load_rule(folder).name == "horizon"
    for name in ("mine", "model"):
        (folder / f"{name}.safetensors").rename(folder / f"{name}-copy.safetensors")
    with pytest.raises(FileNotFoundError, match=r"several checkpoints \(earlier.*name the file"):
        load_rule(folder)


def test_mistyped_paths_do_not_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("learned_optim.pretrained._download", lambda *_: pytest.fail("asked"))
    (tmp_path / "runs" / "quadratic").mkdir(parents=True)
    save_rule(random_rule("lstm"), tmp_path / "runs" / "first.safetensors")
    for given, near in (
        ("runs/quadratik", "Did you mean 'runs/quadratic'?"),
        ("./ruins", "Did you mean 'runs'?"),
        ("runs/furst.safetensors", "Did you mean 'runs/first.safetensors'?"),
        (str(tmp_path / "runs" / "quadratik"), "Did you mean"),
        ("runs/quadratik/again", ""),
    ):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint (file|in)") as error:
            load_rule(given)
        assert near in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"a folder runs exists, is runs/quadratik@main"):
        load_rule("runs/quadratik")
    with pytest.raises(ValueError, match=r"known: .*Did you mean 'quadratic'\?"):
        load_rule("quadratik")


def test_hub_ids_are_still_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    save_rule(random_rule("lstm"), tmp_path / "fetched.safetensors")
    asked = []

    def download(hub_id: str, local_files_only: bool) -> Path:
        asked.append(hub_id)
        return tmp_path / "fetched.safetensors"

    monkeypatch.setattr("learned_optim.pretrained._download", download)
    ids = ["somebody/repo", "somebody/repo@v2", "user/repo@main"]
    assert [load_rule(hub_id).name for hub_id in ids] == ["lstm"] * 3
    assert asked == ids


def test_unnamed_rule_cannot_be_saved(tmp_path: Path) -> None:
    class Nameless(UpdateRule):
        pass

    with pytest.raises(TypeError, match="Nameless has no name"):
        save_rule(Nameless(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(rule_file: Path) -> None:
    before = rule_file.read_bytes()

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(rule_file, fail)
    assert rule_file.read_bytes() == before
    assert [p.name for p in rule_file.parent.iterdir()] == ["rule.safetensors"]


FULL_DISK_AND_KILL = """
import os, resource, signal, sys
from learned_optim import load_rule, save_rule
from learned_optim.checkpoint import write_atomically
rule = load_rule(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_rule(rule, sys.argv[1], {"a longer": "record"})
except OSError as error:
    print(error, os.listdir(), flush=True)
def die(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(sys.argv[1], die)
"""


def test_full_disks_and_kills_lose_nothing(rule_file: Path) -> None:
    """A limit on the size of files stands in for a disk without space."""
    before = rule_file.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_AND_KILL, str(rule_file)],
        env={**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)},
        cwd=rule_file.parent, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert f"cannot write {rule_file}: " in done.stdout
    assert "['rule.safetensors']" in done.stdout
    assert rule_file.read_bytes() == before


def test_writability_is_known_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file.safetensors")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(IsADirectoryError, match=r"cannot write .*: it is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*below: (File exists|Not a directory)"):
        check_writable(tmp_path / "file" / "below")
