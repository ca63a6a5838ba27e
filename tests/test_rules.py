"""The contract every registered update rule keeps, over the configurations that it declares."""

import copy
import math
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import context, fresh_states, python, random_rule, test_configs, trajectory
from torch import Tensor

from learned_optim.meta.rollout import pack_states
from learned_optim.rules import (
    Segments,
    StepContext,
    StepSettings,
    UpdateRule,
    build_rule,
    rule_class,
    rule_names,
)
from learned_optim.rules.equivariant import EquivariantConfig, EquivariantRule
from learned_optim.rules.horizon import HorizonConfig
from learned_optim.rules.lstm import LSTMConfig, LSTMRule, log_and_sign

RULES = rule_names()
EVERY = [(name, config) for name in RULES for config in range(len(test_configs(name)))]
COORDINATEWISE = [name for name in RULES if rule_class(name).coordinatewise]
LEARNED = [name for name in RULES if rule_class(name).rows != "none"]
RECURRENT = [each for each in EVERY if each[0] in LEARNED]

every_rule = pytest.mark.parametrize(("name", "config"), EVERY)


def gradients(steps: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients over six decades, seeded, of shape ``(steps, *shape)``."""
    generator = torch.Generator().manual_seed(3)
    size = torch.randn(steps, *shape, generator=generator, dtype=dtype)
    return size * 10.0 ** (-6 * torch.rand(steps, *shape, generator=generator, dtype=dtype))


def close(rule: UpdateRule) -> dict[str, float]:
    """Tolerances of two ways to compute the same; rules without weights compute in float32."""
    double = rule.dtype is torch.float64
    return {"rtol": 1e-9, "atol": 1e-11} if double else {"rtol": 1e-5, "atol": 1e-6}


def in_place(rule: UpdateRule, grads: Tensor, param: Tensor) -> Tensor:
    """The parameter after every step of the in-place path, ``(T, *shape)``."""
    numbers = StepSettings(total_steps=100 if rule.reads_horizon else None)
    param, found = param.clone(), []
    states = fresh_states(rule, [param])
    for grad in grads:
        rule.step_([param], [grad], states, numbers)
        found.append(param.clone())
    return torch.stack(found)


@every_rule
def test_state_layout(name: str, config: int) -> None:
    param = torch.randn(2, 3)
    rule = random_rule(name, config=config)
    state = rule.init_state(param)
    assert set(rule.tensor_state) <= set(state) == set(rule.state_keys)
    assert set(rule.network_state) <= set(state)
    assert "step" not in state
    for key, value in state.items():
        assert value.shape[:-1] == (() if key in rule.tensor_state else (2, 3)), key
        assert value.dtype == torch.float32
        # Dense either way: a coordinate's entries side by side, or each entry's coordinates.
        assert value.is_contiguous() or value.movedim(-1, 0).is_contiguous()
    assert all(value.dim() == 1 for value in rule.init_state(torch.tensor(1.0)).values())


@every_rule
def test_forward_is_pure(name: str, config: int) -> None:
    rule = random_rule(name, config=config)
    segments = Segments([torch.Size((4, 2)), torch.Size((3,))])
    param, grad = torch.randn(11), torch.randn(11)
    state = pack_states(rule, [rule.init_state(torch.zeros(4, 2)), rule.init_state(torch.zeros(3))])
    before = copy.deepcopy((param, grad, state, rule.state_dict()))
    first, new = rule(grad, state, param, segments, context(rule, 0, 2))
    second, _ = rule(grad, state, param, segments, context(rule, 0, 2))
    assert torch.equal(first, second)
    assert {key: value.shape for key, value in new.items()} == {
        key: value.shape for key, value in state.items()
    }
    after = (param, grad, state, rule.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@every_rule
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0), (20000,), (130, 300)])
def test_in_place_step_equals_the_pure_form(name: str, config: int, shape: tuple[int, ...]) -> None:
    """Over one block and several, in one piece and in float64, whose last bits are compared."""
    rule = random_rule(name, torch.float64, config)
    grads, param = gradients(4, *shape), torch.ones(shape, dtype=torch.float64)
    expected = param + trajectory(rule, grads, param).cumsum(0)
    torch.testing.assert_close(in_place(rule, grads, param), expected, **close(rule))


@every_rule
def test_several_tensors_at_once_equal_one_by_one(name: str, config: int) -> None:
    """Whatever their dtypes, sizes and strides, packed or cut into blocks."""
    rule = random_rule(name, torch.float64, config)
    shapes = [(3, 5), (7,), (), (2, 0), (4, 2, 3), (40000,), (9, 1000), (11,)]
    start = [gradients(1, *shape)[0] for shape in shapes]
    start[0], start[-2] = start[0].t().contiguous().t(), start[-2].t().contiguous().t()
    start[4] = start[4].float()
    runs = []
    for together in (True, False):
        params = [value.clone(memory_format=torch.preserve_format) for value in start]
        states = fresh_states(rule, params)
        for step in range(4):
            grads = [gradients(4, *shape)[step].to(p.dtype) for shape, p in zip(shapes, params)]  # noqa: B905
            numbers = StepSettings(lr=0.7, weight_decay=0.3, maximize=True, warmup=3)
            if together:
                rule.step_(params, grads, states, numbers)
            else:
                for each in zip(params, grads, states, strict=True):
                    rule.step_(*([part] for part in each), numbers)
        runs.append((params, states))
    loose = {"rtol": 1e-5, "atol": 1e-6}  # one of them is float32
    torch.testing.assert_close(*runs, **loose)


@every_rule
def test_step_options(name: str, config: int) -> None:
    """Decay, direction, multiplier and warm-up, by hand from the pure form."""
    rule, grad = random_rule(name, torch.float64, config), gradients(1, 6)[0]
    param = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    state = fresh_states(rule, [param])
    horizon = 100 if rule.reads_horizon else None
    context = StepContext(torch.zeros(1, dtype=torch.float64), None, horizon)
    decayed = param * (1 - 1e-3 * 0.5 * rule.scheduled_decay(2.0, state, context))
    expected = decayed + 0.5 * 0.25 * trajectory(rule, -grad.unsqueeze(0), decayed)[0]
    numbers = StepSettings(0.5, weight_decay=2.0, maximize=True, warmup=4, total_steps=horizon)
    addresses = {key: value.data_ptr() for key, value in state[0].items()}
    rule.step_([param], [grad], state, numbers)
    torch.testing.assert_close(param, expected, **close(rule))
    assert state[0]["step"].item() == 1.0
    # A captured or sharded state must keep its storage.
    assert {key: value.data_ptr() for key, value in state[0].items()} == addresses


@every_rule
def test_half_precision_state_stays_close(name: str, config: int) -> None:
    rule = random_rule(name, config=config)
    params = [torch.ones(5000), torch.ones(5000)]
    states = fresh_states(rule, params)
    for key in set(rule.state_keys) - set(rule.tensor_state):
        states[1][key] = states[1][key].bfloat16()
    for grad in gradients(4, 5000, dtype=torch.float32):
        before = [param.clone() for param in params]
        for param, state in zip(params, states, strict=True):
            rule.step_([param], [grad], [state])
    exact, rounded = (p - b for p, b in zip(params, before, strict=True))
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("name", COORDINATEWISE)
def test_coordinatewise_rules_ignore_order_and_tensor_boundaries(name: str) -> None:
    rule, grads = random_rule(name, torch.float64), gradients(4, 9)
    param, order = torch.ones(9, dtype=torch.float64), torch.randperm(9)
    whole = trajectory(rule, grads, param)
    shuffled = trajectory(rule, grads[:, order], param)
    torch.testing.assert_close(shuffled, whole[:, order], rtol=1e-12, atol=1e-14)
    parts = [trajectory(rule, part, torch.ones_like(part[0])) for part in grads.split((2, 7), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "config"), RECURRENT)
def test_response_to_a_sequence_equals_the_steps(name: str, config: int) -> None:
    """What replay differentiates is what the rollout did; and the in-place form of one step."""
    rule = random_rule(name, torch.float64, config)
    shapes = [torch.Size((3, 2)), torch.Size((5,))]
    segments, param = Segments(shapes, dtype=torch.float64), gradients(1, 11)[0]
    state = pack_states(
        rule, [rule.init_state(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    )
    start = {key: state[key].clone() for key in rule.network_state}
    moving = {key: state[key].clone() for key in rule.network_state}
    features, gains = [], []
    for step, grad in enumerate(gradients(6, 11)):
        seen, directions, new = rule.observe(grad, state, param, segments, context(rule, step, 2))
        update, after = rule(grad, state, param, segments, context(rule, step, 2))
        features.append(seen)
        gains.append(rule.respond_(seen, moving))
        torch.testing.assert_close(rule.mix(directions, gains[-1], segments), update)
        assert {**new, **moving}.keys() == state.keys()
        param, state = param + update, {**state, **after}
    found, last = rule.respond(torch.stack(features), start)
    torch.testing.assert_close(found, torch.stack(gains), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(last, moving, rtol=1e-9, atol=1e-12)


@every_rule
def test_rebuilt_from_configuration(name: str, config: int) -> None:
    rule = random_rule(name, config=config)
    twin = build_rule(name, rule.config_dict())
    twin.load_state_dict(rule.state_dict())
    assert twin.fingerprint() == rule.fingerprint()
    assert pickle.loads(pickle.dumps(rule)).fingerprint() == rule.fingerprint()


def test_fingerprint_tells_weights_and_configurations_apart() -> None:
    rule = random_rule("lstm")
    before = rule.fingerprint()
    with torch.no_grad():
        next(rule.parameters()).view(-1)[0] += 1e-7
    assert rule.fingerprint() != before
    scaled = LSTMRule(LSTMConfig(output_scale=0.2))
    scaled.load_state_dict(rule.state_dict())
    assert scaled.fingerprint() != rule.fingerprint()


def test_unknown_rule_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown update rule 'lsmt'; known: .*lstm"):
        rule_class("lsmt")
    with pytest.raises(
        ValueError, match=r"does not fit update rule 'lstm' \(fields: .*hidden_size"
    ):
        build_rule("lstm", {"units": 20})


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match=r"cannot be named 'lstm': LSTMRule .* is, and"):

        class Impostor(UpdateRule):
            name = "lstm"

    assert rule_class("lstm") is LSTMRule


# ---- what the general-purpose rules promise by construction, over any history

SYMMETRIC = ["equivariant", "horizon"]


def history(seed: int, *shape: int) -> Tensor:
    """Twelve gradients with a drift, so that momenta matter, ``(12, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drift + torch.randn(12, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("factor", [-1.0, 2.0**-20, 2.0**-3, 2.0**20])
def test_of_a_factor_on_the_loss_only_the_sign_matters(name: str, factor: float) -> None:
    rule, grads = random_rule(name, torch.float64), history(0, 4, 5)
    param = torch.zeros(4, 5, dtype=torch.float64) if factor < 0 else torch.ones(4, 5).double()
    plain, found = trajectory(rule, grads, param), trajectory(rule, factor * grads, param)
    if factor < 0:
        torch.testing.assert_close(found, -plain, rtol=1e-12, atol=1e-15)
    else:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_zero_coordinate_stays_where_it_is(name: str) -> None:
    """A pixel that is always black moves no weight, whatever its neighbours do."""
    rule, grads = random_rule(name, torch.float64), history(0, 6, 3)
    grads[:, :, 1] = 0.0
    updates = trajectory(rule, grads, torch.ones(6, 3, dtype=torch.float64))
    assert torch.count_nonzero(updates[:, :, 1]) == 0
    assert torch.count_nonzero(updates[:, :, 0]) > 0


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_and_shape_count_only_through_the_statistics(name: str) -> None:
    """Permuting rows, or the inputs of a filter, permutes the updates; nothing else knows them."""
    rule, grads = random_rule(name, torch.float64), history(1, 6, 8)
    param = history(2, 6, 8)[0]
    whole = trajectory(rule, grads, param)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    shuffled = trajectory(rule, grads[:, order], param[order])
    torch.testing.assert_close(shuffled, whole[:, order], rtol=1e-10, atol=1e-14)
    # A filter of the same fan-in and values is the same tensor to the rule.
    filters = trajectory(rule, grads.view(12, 6, 2, 2, 2), param.view(6, 2, 2, 2))
    torch.testing.assert_close(filters.view_as(whole), whole, rtol=1e-10, atol=1e-14)


def test_the_first_untrained_step_goes_downhill() -> None:
    """A fiftieth of the scale, 1 / sqrt(fan_in)."""
    rule, grads = EquivariantRule().double(), history(3, 5, 5)
    first = trajectory(rule, grads, torch.zeros(5, 5, dtype=torch.float64))[0]
    assert (first * grads[0] < 0).all()
    torch.testing.assert_close(first.abs().mean().item(), 0.02 * 5**-0.5, rtol=0.2, atol=0)


# ---- the LSTM's own numbers


@pytest.mark.parametrize(
    ("grad", "p", "expected"),
    [
        (1.0, 10.0, (0.0, 1.0)),
        (-math.e, 10.0, (0.1, -1.0)),
        (math.exp(-5), 10.0, (-0.5, 1.0)),
        (math.exp(-10), 10.0, (-1.0, 1.0)),  # at the threshold both branches agree
        (-math.exp(-10), 10.0, (-1.0, -1.0)),
        (math.exp(-10) * 1.001, 10.0, ((-10 + math.log(1.001)) / 10, 1.0)),
        (math.exp(-10) * 0.999, 10.0, (-1.0, 0.999)),
        (-math.exp(-12), 10.0, (-1.0, -math.exp(-2))),
        (0.0, 10.0, (-1.0, 0.0)),
        (math.exp(-3), 2.0, (-1.0, math.exp(-1))),
        (1e-300, 10.0, (-1.0, 1e-300 * math.exp(10))),
    ],
)
def test_log_and_sign_by_hand(grad: float, p: float, expected: tuple[float, float]) -> None:
    features = log_and_sign(torch.tensor([grad], dtype=torch.float64), p)
    torch.testing.assert_close(features, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_and_sign_of_extremes(dtype: torch.dtype) -> None:
    """Infinity reads as the largest number, NaN stays; exp(p) is infinite in float16."""
    largest = torch.finfo(dtype).max
    grad = torch.tensor([math.inf, -math.inf, largest, -largest, 0.0, 1e-4, math.nan], dtype=dtype)
    features = log_and_sign(grad, p=15.0)
    assert torch.equal(features[:2], features[2:4])
    assert features[:2, 1].tolist() == [1.0, -1.0]
    assert features[:6].isfinite().all()
    assert features[6].isnan().all()


def reference_lstm(rule: LSTMRule, features: Tensor) -> Tensor:
    """The thesis's network with two ``nn.LSTMCell``s, step by step; features ``(T, n, k)``."""
    layers = []
    for layer in range(rule.config.num_layers):
        cell = torch.nn.LSTMCell(
            features.shape[-1] if layer == 0 else rule.config.hidden_size, rule.config.hidden_size
        ).to(rule.dtype)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        cell.load_state_dict({n: getattr(rule.lstm, f"{n}_l{layer}") for n in names})
        layers.append(cell)
    zeros = features.new_zeros(features.shape[1], rule.config.hidden_size)
    states = [(zeros, zeros)] * len(layers)
    outputs = []
    for x in features:
        for i, cell in enumerate(layers):
            states[i] = cell(x, states[i])
            x = states[i][0]
        outputs.append(rule.readout(x).squeeze(-1) * rule.config.output_scale)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "config",
    [
        LSTMConfig(preprocessing="raw", output_scale=1.0, num_layers=1),
        LSTMConfig(hidden_size=4, num_layers=3, p=7.0),
    ],
)
def test_lstm_equals_lstm_cells(config: LSTMConfig) -> None:
    rule = LSTMRule(config).double()
    grads = gradients(8, 13)
    features = torch.stack([rule.coordinate_features(g, {}, g, None)[0] for g in grads])
    expected = reference_lstm(rule, features)
    actual = trajectory(rule, grads, torch.zeros(13, dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)


def test_loss_input() -> None:
    """In every row, by tensor, and in both forms; without the loss, an error with a remedy."""
    rule = LSTMRule(LSTMConfig(loss_input=True)).double()
    assert rule.needs_loss
    grads, param = gradients(1, 3), torch.zeros(3, dtype=torch.float64)
    low, high = (trajectory(rule, grads, param, torch.tensor(x)) for x in (0.1, 10.0))
    assert not torch.allclose(low, high)
    moved = param.clone()
    numbers = StepSettings(loss=torch.tensor(10.0))
    rule.step_([moved], list(grads), fresh_states(rule, [param]), numbers)
    torch.testing.assert_close(moved, high[0])
    segments = Segments([torch.Size((3,)), torch.Size((3,))], dtype=torch.float64)
    states = pack_states(rule, [rule.init_state(param)] * 2)
    losses = torch.tensor([0.1, 10.0])
    both, _ = rule(
        grads[0].repeat(2), states, param.repeat(2), segments, context(rule, 0, 2, losses)
    )
    torch.testing.assert_close(both, torch.cat((low[0], high[0])))
    with pytest.raises(ValueError, match="call step\\(closure\\)"):
        trajectory(rule, grads, param)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (LSTMConfig, {"preprocessing": "log"}, "neither 'raw' nor 'log_sign'"),
        (LSTMConfig, {"p": 0.0}, "p must be positive, got 0.0"),
        (LSTMConfig, {"hidden_size": 0}, "at least 1, got 0 and 2"),
        (HorizonConfig, {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ],
)
def test_bad_configurations(make: Any, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_a_rule_begins_with_weights_of_its_own_kind_and_size() -> None:
    small, other = (EquivariantRule(EquivariantConfig(hidden_size=3)) for _ in range(2))
    small.init_from(other)
    assert small.fingerprint() == other.fingerprint()
    with pytest.raises(ValueError, match=r"hidden_size=3.*must be of one kind and size"):
        small.init_from(EquivariantRule())
    with pytest.raises(ValueError, match=r"'adam'.*weights of a rule 'equivariant'"):
        rule_class("adam")().init_from(small)


# ---- a rule of one's own


NEW_RULE = """
from dataclasses import dataclass

import torch
from torch import nn

from learned_optim.rules import RuleConfig, UpdateRule


@dataclass(frozen=True)
class ScaledConfig(RuleConfig):
    units: int = 3


class ScaledRule(UpdateRule):
    name = "scaled"
    Config = ScaledConfig
    rows = "tensors"
    coordinatewise = False

    def __init__(self, config=None):
        super().__init__(config)
        units = self.config.units
        self.layers = nn.Sequential(nn.Linear(2, units), nn.Linear(units, 1))

    def init_state(self, param):
        like = torch.zeros_like(param, dtype=self.dtype, memory_format=torch.contiguous_format)
        return {"momentum": like.unsqueeze(-1)}

    def moments(self, grad, state):
        return {"momentum": torch.lerp(grad.unsqueeze(-1), state["momentum"], 0.8)}

    def products(self, grad, state, param, segments, context):
        return [(grad, grad)]

    def tensor_features(self, means, segments, context):
        size = (means[0] + 1e-12).sqrt()
        return torch.stack((size.log() / 8, segments.log_size), -1), size.unsqueeze(0)

    def coordinate_features(self, grad, state, param, stats):
        return None, state["momentum"] / (1e-6 + stats[0].unsqueeze(-1))

    def respond(self, features, state):
        return -0.01 * self.layers(features), {}
"""


def test_a_new_rule_is_one_file_and_no_other_edit(tmp_path: Path) -> None:
    """Found by being there: the contract, the estimators and the optimizer's tests run over it."""
    (tmp_path / "scaled.py").write_text(NEW_RULE)
    tests = Path(__file__).parent
    files = ["test_rules.py", "test_estimators.py", "test_optimizer.py", "compat/test_contract.py"]
    code = (
        f"import sys, pytest, learned_optim.rules as rules;"
        f"rules.__path__.append({str(tmp_path)!r});"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-n', '0', '-k', 'scaled', "
        f"*{[str(tests / file) for file in files]!r}]))"
    )
    path = os.pathsep.join([str(tests.parent), *sys.path])
    printed = python("-c", code, folder=tests, PYTHONPATH=path)
    passed = int(printed.split(" passed")[0].split()[-1])
    assert passed > 30
