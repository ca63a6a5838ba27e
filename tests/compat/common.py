"""Rules and small problems that all tests of the optimizer share."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from learned_optim import list_pretrained, load_rule
from learned_optim.pretrained import ALIASES
from learned_optim.rules import Segments, State, StepContext, UpdateRule, rule_class, rule_names
from learned_optim.rules.lstm import LSTMConfig, LSTMRule

#: Registered rules without a network, which descend as they are.
CLASSICAL = [name for name in rule_names() if rule_class(name).rows == "none"]
SHIPPED = [f"checkpoint:{name}" for name in list_pretrained() if name not in ALIASES]
#: The last shipped checkpoint of every kind of rule, by the rule's name: what an optimizer does
#: depends on the kind. Weights of every checkpoint are in tests/test_pinned_checkpoints.py.
TRAINED = {load_rule(name.removeprefix("checkpoint:")).name: name for name in SHIPPED}
#: Every registered rule, with trained weights where some are shipped, an LSTM that is known to
#: descend, and a rule with per-tensor statistics.
ALL_RULES = [*(TRAINED.get(name, name) for name in rule_names()), "lstm-descending", "normalized"]
#: Those of which it may be asked that a loss goes down.
DESCENDING_RULES = [*CLASSICAL, "lstm-descending", "normalized", *TRAINED.values()]

#: The default, whose matrices have an owner among the ranks.
MATRICES = "checkpoint:eigenbasis"
# Rules with per-tensor statistics must reduce them over shards.
_SHARDED = [
    "lstm-descending",
    "normalized",
    *(name for name in rule_names() if not rule_class(name).coordinatewise),
]
#: Which rules go through which scenario on two processes.
SCENARIO_RULES = {
    "ddp": ["lstm-descending", "normalized"],
    "zero": ["normalized"],
    "hybrid": ["normalized", MATRICES],
    "fsdp2": ["adam", MATRICES, *_SHARDED],
    "checkpoints": [MATRICES, *_SHARDED],
    "bad-batch": ["normalized", MATRICES],
    "compiled": ["lstm-descending", MATRICES],
    "transformer": [MATRICES],
    "placements": [MATRICES],
}


def descending_lstm(step: float = 0.5) -> LSTMRule:
    """An LSTM with weights set by hand: a momentum of the gradient's sign, zero for zero history.

    Only unit 0 of either layer is alive. Its candidate gate reads the gradient's sign, or the unit
    below; all gates stand at 1/2.
    """
    rule = LSTMRule(LSTMConfig())
    size = rule.config.hidden_size
    with torch.no_grad():
        for weight in rule.parameters():
            weight.zero_()
        rule.lstm.weight_ih_l0[2 * size, 1] = 1.0
        rule.lstm.weight_ih_l1[2 * size, 0] = 2.0
        rule.readout.weight[0, 0] = -step
    return rule


class NormalizedRule(UpdateRule):
    """A rule with per-tensor statistics and per-tensor state, for tests of sharding.

    Steps along the gradient over its running root mean square in the whole tensor, in units of
    the parameter's own root mean square or of 1/sqrt(fan-in), whichever is larger.
    """

    coordinatewise = False
    zero_preserving = True
    tensor_state = ("mean_square",)

    def init_state(self, param: Tensor) -> State:
        return {
            "momentum": torch.zeros_like(param, dtype=torch.float32).unsqueeze(-1),
            "mean_square": torch.zeros(2, dtype=torch.float32, device=param.device),
        }

    def forward(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, State]:
        squares = segments.mean(torch.stack((grad.square(), param.square())))  # (2, m)
        mean_square = 0.8 * state["mean_square"] + 0.2 * squares.t()
        momentum = 0.5 * state["momentum"].squeeze(-1) + grad
        scale = squares[1].sqrt().clamp(min=0.1 * segments.log_fan_in.mul(-0.5).exp())
        step = segments.expand(-0.1 * scale / (mean_square[:, 0].sqrt() + 1e-8))
        new_state = {"momentum": momentum.unsqueeze(-1), "mean_square": mean_square}
        return step * momentum, new_state


def make_rule(name: str) -> UpdateRule:
    """A rule by its name in :data:`ALL_RULES`, or a bad one; the same weights every time."""
    return copy.deepcopy(_made(name))


@functools.cache
def _made(name: str) -> UpdateRule:
    if name == "lstm-descending":
        return descending_lstm()
    if name == "lstm-ascending":
        return descending_lstm(step=-0.5)
    if name == "normalized":
        return NormalizedRule()
    if name.startswith("checkpoint:"):
        return load_rule(name.removeprefix("checkpoint:"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return rule_class(name)()


def small_net(seed: int = 0) -> nn.Sequential:
    """5-8-3 with tanh; the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def small_batch(seed: int = 0, n: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs ``(n, 5)`` and learnable labels ``(n,)`` out of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    return x, x[:, :3].argmax(1)


def descend(
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss_of: Callable[[], Tensor],
    after_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train; returns the loss before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step()
    return losses


def step_with(optimizer: torch.optim.Optimizer, *grads: Tensor | None) -> None:
    """One step with these gradients of all parameters, in the order of the groups."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """:func:`descend` on the whole :func:`small_batch` in the model's dtype."""
    x, y = small_batch()
    x = x.to(next(model.parameters()).dtype)
    return descend(optimizer, steps, lambda: nn.functional.cross_entropy(model(x), y))


def flat(model: nn.Module) -> Tensor:
    """All parameters of a model in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
