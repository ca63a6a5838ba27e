"""The thesis's optimizer and its meta-gradient against plain PyTorch.

The reference is two ``nn.LSTMCell`` over whole tensors, and backpropagation through the recorded
unroll.
"""

from collections.abc import Callable, Iterable

import torch
from conftest import random_rule
from torch import Tensor, nn
from torch.nn import functional as F

from learned_optim import LearnedOptimizer
from learned_optim.meta import ESTIMATORS, EstimatorOptions, Optimizees, build_tasks
from learned_optim.meta.seeding import seeded
from learned_optim.rules.lstm import LSTMRule

CellState = list[tuple[Tensor, Tensor]]  # hidden and cell of each layer


class PlainNetwork(nn.Module):
    """Log-and-sign inputs, two LSTM cells, a linear read-out; weights copied from ``rule``."""

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__()
        size, self.p, self.scale = rule.config.hidden_size, rule.config.p, rule.config.output_scale
        self.cells = nn.ModuleList([nn.LSTMCell(2, size), nn.LSTMCell(size, size)])
        self.readout = nn.Linear(size, 1)
        self.readout.load_state_dict(rule.readout.state_dict())
        for layer, cell in enumerate(self.cells):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            cell.load_state_dict({n: getattr(rule.lstm, f"{n}_l{layer}") for n in names})

    def start(self, n: int) -> CellState:
        """The state of ``n`` coordinates before their first gradient."""
        size = self.readout.in_features
        return [(torch.zeros(n, size), torch.zeros(n, size)) for _ in self.cells]

    def forward(self, grad: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        """Updates of coordinates ``(n,)`` and the new state."""
        big = grad.abs() >= torch.exp(torch.tensor(-self.p))
        log = torch.where(big, torch.log(grad.abs() + 1e-38) / self.p, torch.tensor(-1.0))
        sign = torch.where(big, grad.sign(), grad * torch.exp(torch.tensor(self.p)))
        x, new = torch.stack((log, sign), 1), []
        for cell, (h, c) in zip(self.cells, state, strict=True):
            x, c = cell(x, (h, c))
            new.append((x, c))
        return self.readout(x).squeeze(1) * self.scale, new


class PlainOptimizer:
    """Steps with a :class:`PlainNetwork`, parameter by parameter."""

    def __init__(self, params: Iterable[Tensor], rule: LSTMRule) -> None:
        self.params, self.network = list(params), PlainNetwork(rule)
        self.states = [self.network.start(param.numel()) for param in self.params]

    @torch.no_grad()
    def step(self) -> None:
        """One step of all parameters."""
        for index, param in enumerate(self.params):
            assert param.grad is not None
            update, self.states[index] = self.network(param.grad.reshape(-1), self.states[index])
            param += update.view_as(param)


def plain_unroll(
    network: PlainNetwork,
    params: list[Tensor],
    states: list[CellState],
    batches: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[CellState]]:
    """One truncated unroll of a two-layer sigmoid perceptron and its meta-gradient.

    Args:
        params: weight, bias, weight, bias.

    Returns:
        The summed loss, the meta-gradient, and where the optimizee and its states are now.
    """
    params = [param.detach().requires_grad_() for param in params]
    states = [[(h.detach(), c.detach()) for h, c in state] for state in states]
    total = torch.zeros(())
    for _ in range(steps):
        images, labels = batches()
        hidden = F.linear(images.flatten(1), params[0], params[1]).sigmoid()
        loss = F.cross_entropy(F.linear(hidden, params[2], params[3]), labels)
        total = total + loss
        # d grad / d phi = 0: the gradient is an input like any other.
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        for i, grad in enumerate(grads):
            update, states[i] = network(grad.detach().reshape(-1), states[i])
            params[i] = params[i] + update.view_as(params[i])
    meta = torch.autograd.grad(total, list(network.parameters()), allow_unused=True)
    meta_grads = [
        torch.zeros_like(w) if g is None else g
        for w, g in zip(network.parameters(), meta, strict=True)
    ]
    return total.detach(), meta_grads, params, states


def test_plain_optimizer_takes_the_same_steps() -> None:
    rule = random_rule("lstm")
    assert isinstance(rule, LSTMRule)
    ours, plain = (nn.Parameter(torch.zeros(7, 50)) for _ in range(2))
    optimizers = (LearnedOptimizer([ours], rule, warmup=0), PlainOptimizer([plain], rule))
    for _ in range(4):
        ours.grad = plain.grad = torch.randn(7, 50) * 10.0 ** -(6 * torch.rand(7, 50))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_plain_unroll_has_the_same_meta_gradient() -> None:
    rule = random_rule("lstm")
    assert isinstance(rule, LSTMRule)
    generators = [seeded("yardstick"), seeded("yardstick")]
    task = build_tasks("digits").sample(generators[0])
    optimizees = Optimizees(rule, [task], generators[:1])
    expected = ESTIMATORS["replay"](rule, optimizees, 5, EstimatorOptions())
    params = list(task.init(generators[1]).values())
    network = PlainNetwork(rule)
    states = [network.start(param.numel()) for param in params]
    total, grads, _, _ = plain_unroll(network, params, states, lambda: task.batch(generators[1]), 5)
    torch.testing.assert_close(total, expected.losses.sum(), rtol=1e-4, atol=1e-4)
    ours = torch.cat([g.flatten() for g in expected.grads]).sort().values
    theirs = torch.cat([g.flatten() for g in grads]).sort().values
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-3 * ours.abs().max().item())
