"""Hand-written optimizers: schedules, constants and what is missing."""

import sys

import pytest
import torch
from compat.common import descend, step_with

from learned_optim.evaluation.baselines import (
    BASELINES,
    OUTER,
    MuonAdamW,
    make_baseline,
    mark_outer,
    warmup_cosine,
    warmup_linear,
    why_missing,
)
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import build_tasks
from learned_optim.meta.tasks.finetuning import with_adapters
from learned_optim.meta.tasks.image_networks import VisionTransformer
from learned_optim.meta.tasks.language import Transformer


def descent(name: str, lr: float, steps: int) -> tuple[torch.nn.Parameter, list[float]]:
    """Half a square from 1, and the learning rates that its steps had."""
    param, used = torch.nn.Parameter(torch.ones(2, 2)), []
    optimizer = make_baseline(name, [param], lr, steps)
    optimizer.register_step_post_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    descend(optimizer, steps, lambda: 0.5 * param.square().sum())
    return param, used


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_baseline_descends(name: str) -> None:
    param, _ = descent(name, max(0.1, BASELINES[name].lr or 0.0), 50)
    assert param.abs().max() < 0.9


@pytest.mark.parametrize(("name", "moved"), [("sgd", 0.1), ("nesterov", 0.19), ("adam", 0.1)])
def test_first_steps_by_hand(name: str, moved: float) -> None:
    """SGD's is lr times g, Nesterov's 1 + 0.9 times that, Adam's is lr whatever g is."""
    param, _ = descent(name, 0.1, 1)
    assert param[0, 0].item() == pytest.approx(1.0 - moved, abs=1e-6)


def test_schedules_by_hand() -> None:
    assert [warmup_cosine(x) for x in (0.0, 0.025, 0.05, 0.525, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.5, 0.0]
    )
    assert [warmup_linear(x) for x in (0.0, 0.025, 0.05, 0.525, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.5, 0.0]
    )
    assert warmup_cosine(0.01, 0.02) == 0.5
    assert warmup_cosine(0.0, 0.0) == 1.0


def test_schedule_sets_the_rate_of_every_step() -> None:
    param, used = descent("sgd-linear", 0.5, 20)
    assert used == pytest.approx([0.5 * warmup_linear((t + 0.5) / 20) for t in range(20)])
    value = 1.0
    for lr in used:
        value *= 1.0 - lr
    assert param[0, 0].item() == pytest.approx(value)
    # More steps than were said: no negative rates.
    optimizer = make_baseline("sgd-cosine", [param], 0.5, 2)
    for _ in range(4):
        step_with(optimizer, torch.ones_like(param))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_constant_baselines_keep_their_rate() -> None:
    for name in ("adam", "adam-1e-3", "nesterov"):
        assert descent(name, 0.01, 5)[1] == [0.01] * 5


def test_nadamw_is_nesterovs_adam_with_decay() -> None:
    """Three steps by hand: look-ahead of the first moment, bias corrections, decoupled decay."""
    param = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = BASELINES["nadamw-1.75e-3"].make([param], 0.01, 100)
    theta, m, v, b1, b2 = 1.0, 0.0, 0.0, 0.933, 0.9955
    for t, grad in enumerate((0.5, -1.0, 2.0), start=1):
        step_with(optimizer, torch.tensor([grad], dtype=torch.float64))
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * grad / (1 - b1**t)
        theta *= 1 - 0.01 * 0.081
        theta -= 0.01 * ahead / ((v / (1 - b2**t)) ** 0.5 + 1e-8)
        assert param.item() == pytest.approx(theta, rel=1e-6)


@pytest.mark.parametrize("has_units", [False, True])  # products in float32, in bfloat16
def test_muon_steps_hidden_matrices_and_adamw_the_rest(has_units: bool) -> None:
    """Kernels are matrices of one row per output channel; both parts decay by 0.01."""
    matrix, vector, filters, table = (
        torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6,), (3, 2, 3, 3), (5, 2))
    )
    setattr(table, OUTER, True)
    everything = [matrix, vector, filters, table]
    optimizer = MuonAdamW(everything, 0.1)
    optimizer.has_units = has_units
    before = [p.detach().clone() for p in everything]
    for p in everything:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in ((matrix, before[0]), (filters, before[2])):
        step = (p - old * (1 - 0.1 * 0.01)).flatten(1)
        # match_rms_adamw: 0.2 lr sqrt(largest side) times a nearly orthogonal matrix.
        spectrum = torch.linalg.svdvals(step) / (0.2 * 0.1 * max(step.shape) ** 0.5)
        assert spectrum.min() > 0.5
        assert spectrum.max() < 1.5
    for p, old in ((vector, before[1]), (table, before[3])):  # AdamW's first step is a sign
        torch.testing.assert_close(p, old * (1 - 0.1 * 0.01) - 0.1 * p.grad.sign())


def test_outer_parameters_of_the_field() -> None:
    """Embeddings, output layers and the first convolution, whatever the network."""
    wanted = {
        "char-lm-gru": {"embed.weight", "head.weight"},
        "char-lm-tied": {"embed.weight", "place.weight"},
        "skip-gram": {"words.weight", "contexts.weight"},
        "adversarial-pair": {"generator.4.weight", "discriminator.4.weight"},
        "regression": {"2.weight"},
    }
    for name, outer in wanted.items():
        task = build_tasks(name).sample(seeded(0))
        params = {n: torch.nn.Parameter(p) for n, p in task.init(seeded(1)).items()}
        mark_outer(params, task.module)
        assert {n for n, p in params.items() if hasattr(p, OUTER)} == outer, name
    convolutions = (torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))
    for network, outer in (
        (VisionTransformer((3, 32, 32), 10), {"embed.weight", "place", "head.weight"}),
        (torch.nn.Sequential(*convolutions, torch.nn.Linear(4, 2)), {"0.weight", "2.weight"}),
        (with_adapters(Transformer(20, width=8, tied=True)), set()),
    ):
        params = dict(network.named_parameters())
        mark_outer(params, network)
        marked = {n for n, p in params.items() if hasattr(p, OUTER) and p.dim() > 1}
        assert marked == outer


def test_soap_is_adam_in_the_eigenbasis_of_past_gradients() -> None:
    """Adam's first step is a sign: here between rotations by the first gradient's eigenvectors."""
    param = torch.nn.Parameter(torch.zeros(3, 3))
    first, second = torch.randn(2, 3, 3, generator=seeded("soap"))
    optimizer = make_baseline("soap", [param], 0.1, 10)
    step_with(optimizer, first.clone())
    assert not param.any()
    step_with(optimizer, second.clone())
    left, right = (torch.linalg.eigh(m).eigenvectors for m in (first @ first.T, first.T @ first))
    turned = left @ (left.T @ second @ right).sign() @ right.T
    torch.testing.assert_close(param.detach(), -0.1 * turned * (1 - 0.1 * 0.01), rtol=0, atol=1e-4)


def test_every_optional_package_is_in_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    needing = [name for name, found in BASELINES.items() if found.package]
    assert {BASELINES[name].package for name in needing} == {
        "dadaptation", "prodigyopt", "pytorch_optimizer", "schedulefree",
    }  # fmt: skip
    for name in needing:
        assert why_missing(name) is None
        message = f"the baseline '{name}' needs its package: install the extra 'baselines'"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, str(BASELINES[name].package), None)
            assert (why_missing(name) or "").startswith(message)
            with pytest.raises(ImportError, match=message):
                make_baseline(name, [torch.zeros(1)], 1.0, 10)
