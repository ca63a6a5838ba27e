"""Shared fixtures: one thread, fixed seeds, and the data folder where there is one."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import learned_optim
from learned_optim import kernels, save_rule
from learned_optim.meta.data import DATA_VARIABLE, DataOptions
from learned_optim.meta.rollout import pack_states
from learned_optim.rules import RuleConfig, Segments, State, StepContext, UpdateRule, rule_class

# Drawn examples are the same in every run, and no test depends on time.
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")
# One thread here and in the processes that tests start: two of them spin where both cores are busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing is downloaded: tests check that of this process, and the processes that they start find
# nobody at the address of the proxy.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXY = ("127.0.0.1", 9)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(LOOPBACK)
for _name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[_name] = os.environ[_name.upper()] = f"http://{PROXY[0]}:{PROXY[1]}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--only-data",
        action="store_true",
        help="run only the tests that need image sets, which are skipped where there are none",
    )


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Tests of one ``xdist_group`` run in one process: what they share is made once."""
    if getattr(config.option, "numprocesses", None):
        config.option.dist = "loadgroup"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--only-data"):
        fixtures = {"image_data", "data_for"}
        chosen = [item for item in items if fixtures & {*getattr(item, "fixturenames", ())}]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Whoever asks for another machine fails, also where the code takes it for a dead network."""
    asked: list[object] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def local(host: object) -> bool:
        return host is None or host in (*LOOPBACK, socket.gethostname(), "")

    def guarded_connect(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            assert isinstance(address, tuple)
            if not local(address[0]) or address[:2] == PROXY:
                asked.append(address)
                raise OSError(f"tests have no network, and {address} was asked for")
        connect(self, address)  # type: ignore[arg-type]

    def guarded_lookup(host: object, *args: object, **kwargs: object) -> object:
        if not local(host):
            asked.append(host)
            raise OSError(f"tests have no network, and {host!r} was looked up")
        return lookup(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield asked
    assert not asked, f"the test asked for {asked}: nothing may be downloaded"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


#: Where a process that is started elsewhere finds this package.
SOURCE = {"PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}


def python(
    *arguments: object, folder: Path | None = None, timeout: float | None = None, **environment: str
) -> str:
    """What Python prints in a process of its own, in this working directory."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    """A checkpoint of an LSTM."""
    path = tmp_path / "rule.safetensors"
    save_rule(random_rule("lstm"), path)
    return path


@pytest.fixture(params=["compiled", "pure"])
def either_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step by the kernel, and without it."""
    if request.param == "pure":
        monkeypatch.setattr(kernels, "step_", lambda *_, **__: False)
        monkeypatch.setattr(kernels, "bind", lambda *_, **__: None)


@pytest.fixture(scope="session")
def image_data() -> DataOptions:
    """The real image sets; tests that ask for them are skipped where there are none."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not (Path(folder) / "MNIST").is_dir():
        pytest.skip(f"needs MNIST and others in the folder that ${DATA_VARIABLE} names")
    return DataOptions(Path(folder), download=False)


@pytest.fixture
def data_for(request: pytest.FixtureRequest) -> Callable[[bool], DataOptions]:
    """Data of a task, by whether it reads image sets: :func:`image_data` is then asked for."""
    return lambda images: request.getfixturevalue("image_data") if images else DataOptions()


def test_configs(name: str) -> tuple[RuleConfig, ...]:
    """The configurations that a registered rule wants to be tested with."""
    cls = rule_class(name)
    return cls.test_configs or (cls.Config(),)


test_configs.__test__ = False  # type: ignore[attr-defined]


def random_rule(name: str, dtype: torch.dtype = torch.float32, config: int = 0) -> UpdateRule:
    """A registered rule with seeded weights, large enough to make every part of it matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        rule = rule_class(name)(test_configs(name)[config]).to(dtype)
        with torch.no_grad():
            for weight in rule.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return rule


def context(rule: UpdateRule, step: int, m: int = 1, loss: Tensor | None = None) -> StepContext:
    """The context of ``m`` tensors that were updated ``step`` times."""
    horizon = 100.0 if rule.reads_horizon else None
    return StepContext(torch.full((m,), float(step), dtype=rule.dtype), loss, horizon)


def trajectory(
    rule: UpdateRule, grads: Tensor, param: Tensor, loss: Tensor | None = None
) -> Tensor:
    """Updates of the pure form, of one tensor, over ``grads`` of shape ``(T, *shape)``."""
    segments = Segments([param.shape], dtype=rule.dtype)
    state, updates = pack_states(rule, [rule.init_state(param)]), []
    param = param.reshape(-1)
    with torch.no_grad():
        for step, grad in enumerate(grads):
            update, new = rule(
                grad.reshape(-1), state, param, segments, context(rule, step, loss=loss)
            )
            state = {**state, **new}
            updates.append(update)
            param = param + update
    return torch.stack(updates).view(grads.shape)


def fresh_states(rule: UpdateRule, params: list[Tensor]) -> list[State]:
    """States as :meth:`UpdateRule.step_` takes them."""
    return [{"step": torch.zeros(()), **rule.init_state(param)} for param in params]


#: A module with an update rule of a user's own.
OWN_RULE = """
import torch
from dataclasses import dataclass
from learned_optim.rules import RuleConfig, UpdateRule

@dataclass(frozen=True)
class MineConfig(RuleConfig):
    scale: float = 0.01

class Mine(UpdateRule):
    name = "mine-of-{name}"
    Config = MineConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor(self.config.scale))

    def forward(self, grad, state, param, segments, context):
        return -self.scale * grad, {{}}
"""
