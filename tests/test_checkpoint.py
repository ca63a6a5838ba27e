"""Checkpoint files and where rules are loaded from."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_rule, trajectory
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import learned_optim
from learned_optim import (
    CheckpointError,
    LearnedOptimizer,
    list_pretrained,
    load_record,
    load_rule,
    save_rule,
)
from learned_optim.checkpoint import (
    DTYPES,
    FORMAT_VERSION,
    check_writable,
    content_digest,
    write_atomically,
)
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


@pytest.mark.parametrize("use", ['{"warmup_steps": -1}', '{"warmup_steps": null}', '{"x": 1}', "3"])
def test_an_unknown_use_is_refused(use: str, good: Path) -> None:
    with pytest.raises(CheckpointError, match=r"good\.safetensors.*use"):
        load_rule(rewritten(good, use=use))


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
    """The checkpoint with entries of its metadata replaced, and a digest that fits."""
    rule = load_rule(good)
    metadata = {
        "format": "learned_optim", "format_version": str(FORMAT_VERSION), "rule": "lstm",
        "config": json.dumps(rule.config_dict()), "record": "{}", **changes,
    }  # fmt: skip
    tensors = dict(rule.state_dict())
    save_file(tensors, good, {"sha256": content_digest(metadata, tensors), **metadata})
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
    with pytest.raises(CheckpointError, match="version '3' and this release reads 2: pip"):
        load_rule(rewritten(good, format_version="3"))


def test_a_file_without_its_digest_is_refused(good: Path) -> None:
    rule = load_rule(good)
    assert load_rule(rewritten(good)).fingerprint() == rule.fingerprint()
    with pytest.raises(CheckpointError, match=r"good\.safetensors: the file is damaged"):
        load_rule(rewritten(good, sha256=""))


def test_same_rule_and_record_give_the_same_bytes(good: Path, tmp_path: Path) -> None:
    record = {"z": 1, "a": {"ü": [1.5, None], "b": "x"}}
    files = []
    for index in range(4):
        save_rule(load_rule(good), tmp_path / f"{index}.safetensors", record)
        files.append((tmp_path / f"{index}.safetensors").read_bytes())
    assert len(set(files)) == 1
    # What safetensors itself reads is what was written, aligned.
    size = int.from_bytes(files[0][:8], "little")
    assert size % 8 == 0
    stored = load_file(tmp_path / "0.safetensors")
    for name, weight in load_rule(good).state_dict().items():
        assert torch.equal(stored[name], weight)


SHIPPED = sorted((Path(learned_optim.__file__).parent.parent / "pretrained").glob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_flipped_bit_of_a_shipped_file_is_noticed(path: Path, tmp_path: Path) -> None:
    """Somewhere in the header or in the weights: refused, or without consequence."""
    with safe_open(path, framework="pt") as file:
        assert "sha256" in file.metadata()
    expected, content = load_rule(path).fingerprint(), path.read_bytes()
    copy = tmp_path / path.name
    draws = torch.Generator().manual_seed(0)
    bits = torch.randint(8 * len(content), (60,), generator=draws).tolist()
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
    assert refused >= 60  # but for padding, every bit matters


def with_tensors(good: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The checkpoint with every tensor changed, and a digest that fits."""
    config = json.dumps(load_rule(good).config_dict())
    metadata = {
        "format": "learned_optim", "format_version": str(FORMAT_VERSION), "rule": "lstm",
        "config": config,
    }  # fmt: skip
    tensors = {name: change(t) for name, t in load_file(good).items()}
    if all(t.dtype in DTYPES for t in tensors.values()):
        metadata["sha256"] = content_digest(metadata, tensors)
    save_file(tensors, good, metadata)
    return good


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.full_like(t, torch.nan), "holds values that are not finite"),
        (lambda t: t.masked_fill(t == t.max(), torch.inf), "holds values that are not finite"),
        (lambda t: t.to(torch.int32), r"has dtype torch\.int32 and should be floating"),
        (lambda t: t.to(torch.bool), r"has dtype torch\.bool and should be floating"),
        (lambda t: t.to(torch.uint8), r"has dtype torch\.uint8 and should be floating"),
        (lambda t: t.to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn, in which no rule"),
        (lambda t: t.to(torch.float8_e5m2), "dtype torch.float8_e5m2, in which no rule"),
        (
            lambda t: t.double() if t.dim() > 1 else t,
            "several dtypes: torch.float32, torch.float64",
        ),
    ],
)
def test_weights_that_cannot_compute(
    good: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"good\.safetensors.* .*{message}"):
        load_rule(with_tensors(good, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(torch.nan), "the rule cannot be saved: .* not finite"),
        (lambda t: t.to(torch.float8_e4m3fn), "the rule cannot be saved: .* dtype torch.float8_e4"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    good: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    rule, before = random_rule("lstm"), good.read_bytes()
    for weight in rule.parameters():
        weight.data = change(weight.data)
    with pytest.raises(ValueError, match=message):
        save_rule(rule, good)
    assert good.read_bytes() == before


CRAFTED = """
import json, resource, sys
from safetensors.torch import save_file
from learned_optim import CheckpointError, load_rule
from learned_optim.checkpoint import content_digest
file, sizes, found = sys.argv[1], json.loads(sys.argv[2]), []
for name in sys.argv[3:]:
    rule = load_rule(name)
    for size in sizes:
        metadata = {"format": "learned_optim", "format_version": "2", "rule": rule.name}
        metadata["config"] = json.dumps({**rule.config_dict(), **size})
        metadata["sha256"] = content_digest(metadata, rule.state_dict())
        save_file(rule.state_dict(), file, metadata)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_rule(file)
        except CheckpointError as error:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            found.append([str(error), grown / 1024])
print(json.dumps(found))
"""


def test_sizes_are_compared_before_anything_is_built(tmp_path: Path) -> None:
    crafted, names = tmp_path / "crafted.safetensors", ("mnist", "coordinatewise")
    sizes = [{"num_layers": 10**7}, {"hidden_size": 15_000}, {"hidden_size": 10**12}]
    source = str(Path(learned_optim.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", CRAFTED, str(crafted), json.dumps(sizes), *names],
        env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) == len(names) * len(sizes)
    for message, megabytes in found:
        assert str(crafted) in message
        assert megabytes < 200


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
        ("config", '{"p": 1e999}', "p must be finite, got inf"),
        ("config", '{"output_scale": NaN}', "output_scale must be finite, got nan"),
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
    monkeypatch.setattr("learned_optim._download.download", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "runs" / "quadratic").mkdir(parents=True)
    save_rule(random_rule("lstm"), tmp_path / "runs" / "first.safetensors")
    for given, near in (
        ("runs/quadratik", "Did you mean 'runs/quadratic'?"),
        ("./runs/quadratic", ""),
        ("./ruins", "Did you mean 'runs'?"),
        ("../quadratic", ""),
        ("runs/quadratik/", "Did you mean"),
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

    def download(hub_id: str, **options: bool) -> Path:
        asked.append(hub_id)
        return tmp_path / "fetched.safetensors"

    monkeypatch.setattr("learned_optim._download.download", download)
    for hub_id in ("somebody/repo", "somebody/repo@v2", "user/repo@main"):
        assert load_rule(hub_id).name == "lstm"
    assert asked == ["somebody/repo", "somebody/repo@v2", "user/repo@main"]


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


def test_full_disk_names_the_file_and_loses_nothing(good: Path) -> None:
    """A limit on the size of files stands in for a disk without space."""
    before = good.read_bytes()
    code = textwrap.dedent(
        """
        import resource, signal, sys
        from learned_optim import load_rule, save_rule
        rule = load_rule(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save_rule(rule, sys.argv[1], {"a longer": "record"})
        except OSError as error:
            print(error)
        """
    )
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    command = [sys.executable, "-c", code, str(good)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert f"cannot write {good}: " in done.stdout
    assert good.read_bytes() == before
    assert [path.name for path in good.parent.iterdir()] == ["good.safetensors"]


def test_writability_is_known_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file.safetensors")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(IsADirectoryError, match=r"cannot write .*: it is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*below: (File exists|Not a directory)"):
        check_writable(tmp_path / "file" / "below")


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
