"""The contract every registered update rule keeps; a new rule is picked up by being registered."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import random_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learned_optim.rules import (
    RecurrentRule,
    TensorRule,
    UpdateRule,
    build_rule,
    rule_class,
    rule_names,
)
from learned_optim.rules.equivariant import EquivariantConfig, EquivariantRule
from learned_optim.rules.lstm import LSTMConfig, LSTMRule

RULES = rule_names()
COORDINATEWISE = [name for name in RULES if rule_class(name).coordinatewise]
RECURRENT = [name for name in RULES if issubclass(rule_class(name), RecurrentRule)]
LEARNED = [n for n in RULES if issubclass(rule_class(n), (RecurrentRule, TensorRule))]


def gradients(steps: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients over six decades, seeded, of shape ``(steps, *shape)``."""
    generator = torch.Generator().manual_seed(3)
    size = torch.randn(steps, *shape, generator=generator, dtype=dtype)
    return size * 10.0 ** (-6 * torch.rand(steps, *shape, generator=generator, dtype=dtype))


def trajectory(rule: UpdateRule, grads: Tensor, param: Tensor) -> Tensor:
    """Updates of the plain path over ``grads`` of shape ``(T, *shape)``."""
    state, updates = rule.init_state(param), []
    with torch.no_grad():
        for grad in grads:
            update, new_state = rule(grad, state, param)
            state = {**state, **new_state}
            updates.append(update)
            param = param + update
    return torch.stack(updates)


@pytest.mark.parametrize("name", RULES)
def test_state_layout(name: str) -> None:
    param = torch.randn(2, 3)
    rule = random_rule(name)
    for key, value in rule.init_state(param).items():
        per_coordinate = value.shape[:2] == (2, 3) and value.dim() == 3
        assert per_coordinate or value.dim() <= 1, key
        assert value.dtype == torch.float32
        # Dense either way: a coordinate's entries side by side, or each entry's coordinates.
        assert value.is_contiguous() or value.movedim(-1, 0).is_contiguous()
    scalar = rule.init_state(torch.tensor(1.0))
    assert all(value.dim() <= 1 for value in scalar.values())


@pytest.mark.parametrize("name", RULES)
def test_forward_is_pure(name: str) -> None:
    rule, param, grad = random_rule(name), torch.randn(4, 2), torch.randn(4, 2)
    state = rule.init_state(param)
    before = copy.deepcopy((param, grad, state, rule.state_dict()))
    first, _ = rule(grad, state, param)
    second, _ = rule(grad, state, param)
    assert torch.equal(first, second)
    after = (param, grad, state, rule.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0), (5000,)])
def test_in_place_path_equals_plain_path(name: str, shape: tuple[int, ...]) -> None:
    rule = random_rule(name)
    grads = gradients(5, *shape, dtype=torch.float32)
    param = torch.ones(shape)
    fast_state, expected = rule.init_state(param), trajectory(rule, grads, param)
    for grad, update in zip(grads, expected, strict=True):
        fast = rule.update_(grad, fast_state, param)
        assert fast.shape == grad.shape
        torch.testing.assert_close(fast, update, rtol=1e-4, atol=2e-6)
        param = param + update


@pytest.mark.parametrize("name", RULES)
def test_in_place_path_keeps_state_tensors(name: str) -> None:
    """A captured or sharded state must keep its storage."""
    rule, param = random_rule(name), torch.randn(6)
    state = rule.init_state(param)
    addresses = {key: value.data_ptr() for key, value in state.items()}
    rule.update_(torch.randn(6), state, param)
    assert {key: value.data_ptr() for key, value in state.items()} == addresses


@pytest.mark.parametrize("name", RULES)
def test_in_place_path_with_half_precision_state(name: str) -> None:
    rule, param = random_rule(name), torch.ones(5000)
    full = rule.init_state(param)
    half = {key: value.bfloat16() for key, value in full.items()}
    for grad in gradients(4, 5000, dtype=torch.float32):
        exact, rounded = rule.update_(grad, full, param), rule.update_(grad, half, param)
    assert all(value.dtype == torch.bfloat16 for value in half.values())
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05 * exact.abs().max().item())


@settings(max_examples=20, deadline=None)
@given(data=st.data(), name=st.sampled_from(COORDINATEWISE))
def test_coordinatewise_rules_ignore_order_and_tensor_boundaries(
    data: st.DataObject, name: str
) -> None:
    rule = random_rule(name, torch.float64)
    n = data.draw(st.integers(2, 12))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    cut = data.draw(st.integers(1, n - 1))
    grads, param = gradients(4, n), torch.ones(n, dtype=torch.float64)
    whole = trajectory(rule, grads, param)
    shuffled = trajectory(rule, grads[:, order], param)
    torch.testing.assert_close(shuffled, whole[:, order], rtol=1e-12, atol=1e-14)
    parts = [trajectory(rule, g, torch.ones_like(g[0])) for g in (grads[:, :cut], grads[:, cut:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in RULES if rule_class(n).zero_preserving])
def test_zero_history_gives_zero_update(name: str) -> None:
    rule, param = random_rule(name), torch.randn(9)
    updates = trajectory(rule, torch.zeros(20, 9), param)
    assert torch.count_nonzero(updates) == 0


@pytest.mark.parametrize("name", RECURRENT)
def test_response_to_a_sequence_equals_the_steps(name: str) -> None:
    """What replay differentiates is what the rollout did."""
    rule = random_rule(name, torch.float64)
    assert isinstance(rule, RecurrentRule)
    grads, param = gradients(6, 11), torch.ones(11, dtype=torch.float64)
    expected = trajectory(rule, grads, param)
    state = rule.init_state(param)
    network = {key: state[key] for key in rule.network_state}
    signals = []
    moving = param
    for grad, update in zip(grads, expected, strict=True):
        seen, observed = rule.observe(grad, state, moving)
        state = {**state, **observed}
        signals.append(seen)
        moving = moving + update
    updates, _ = rule.respond(torch.stack(signals), network)
    torch.testing.assert_close(updates, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", LEARNED)
def test_vmap_over_optimizees(name: str) -> None:
    rule = random_rule(name, torch.float64)
    grads, params = gradients(3, 4, 2), gradients(3, 4, 2).flip(0)
    states = torch.vmap(rule.init_state)(params)
    together, _ = torch.vmap(rule)(grads, states, params)
    alone = [rule(g, rule.init_state(p), p)[0] for g, p in zip(grads, params, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_rebuilt_from_configuration(name: str) -> None:
    rule = random_rule(name)
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


# ---- the LSTM's own numbers


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
        LSTMConfig(),
        LSTMConfig(preprocessing="raw", output_scale=1.0),
        LSTMConfig(hidden_size=5, num_layers=1),
        LSTMConfig(hidden_size=4, num_layers=3, p=7.0),
    ],
)
def test_lstm_equals_lstm_cells(config: LSTMConfig) -> None:
    rule = LSTMRule(config).double()
    grads = gradients(8, 13)
    features = torch.stack([rule.observe(g, {}, g)[0] for g in grads])
    expected = reference_lstm(rule, features)
    actual = trajectory(rule, grads, torch.zeros(13, dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)


def test_lstm_size() -> None:
    """Layer one reads 2 features, layer two 20; two biases each; 80 numbers of state."""
    rule = LSTMRule()
    assert sum(w.numel() for w in rule.parameters()) == 80 * (2 + 20 + 2) + 80 * (20 + 20 + 2) + 21
    assert sum(v.numel() for v in rule.init_state(torch.zeros(1)).values()) == 80


def test_zero_readout_gives_zero_updates() -> None:
    rule = LSTMRule()
    torch.nn.init.zeros_(rule.readout.weight)
    updates = trajectory(rule, gradients(5, 6, dtype=torch.float32), torch.zeros(6))
    assert torch.count_nonzero(updates) == 0


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("name", ["equivariant", "lstm", "steered"])
def test_in_place_path_with_tanh_and_without(
    name: str, cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learned_optim.rules._stack.tanh_is_cheap", lambda: cheap)
    rule = random_rule(name, torch.float64)
    grads, param = gradients(5, 6, 4), torch.randn(6, 4, dtype=torch.float64)
    expected, state = trajectory(rule, grads, param), rule.init_state(param)
    for grad, update in zip(grads, expected, strict=True):
        torch.testing.assert_close(rule.update_(grad, state, param), update, rtol=1e-9, atol=1e-12)
        param = param + update


def test_fast_weights_follow_the_weights() -> None:
    rule, param, grad = random_rule("lstm"), torch.zeros(3), torch.ones(3)
    before = rule.update_(grad, rule.init_state(param), param)
    with torch.no_grad():
        rule.readout.weight.mul_(2.0)
        rule.readout.bias.mul_(2.0)
    torch.testing.assert_close(rule.update_(grad, rule.init_state(param), param), 2 * before)


def test_loss_input() -> None:
    rule = LSTMRule(LSTMConfig(loss_input=True))
    param, grad = torch.zeros(3), torch.ones(3)
    assert rule.needs_loss
    low, _ = rule(grad, rule.init_state(param), param, torch.tensor(0.1))
    high, _ = rule(grad, rule.init_state(param), param, torch.tensor(10.0))
    assert not torch.allclose(low, high)
    in_place = rule.update_(grad, rule.init_state(param), param, torch.tensor(10.0))
    torch.testing.assert_close(in_place, high)
    with pytest.raises(ValueError, match="call step\\(closure\\)"):
        rule(grad, rule.init_state(param), param)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preprocessing": "log"}, "neither 'raw' nor 'log_sign'"),
        ({"p": 0.0}, "p must be positive, got 0.0"),
        ({"hidden_size": 0}, "at least 1, got 0 and 2"),
    ],
)
def test_bad_configurations(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTMConfig(**values)


@pytest.mark.parametrize("name", RULES)
def test_several_tensors_at_once_equal_one_by_one(name: str) -> None:
    rule = random_rule(name, torch.float64)
    shapes = [(3, 5), (7,), (), (2, 0), (4, 2, 3), (9000,)]
    params = [gradients(1, *shape)[0] for shape in shapes]
    together = [rule.init_state(p) for p in params]
    alone = [rule.init_state(p) for p in params]
    for step in range(4):
        grads = [gradients(4, *shape)[step] for shape in shapes]
        updates, _ = rule.update_many_(grads, together, params)
        for grad, state, param, update in zip(grads, alone, params, updates, strict=True):
            expected = rule.update_(grad, state, param)
            torch.testing.assert_close(update, expected, rtol=1e-10, atol=1e-14)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", RECURRENT)
def test_recorded_signals_are_what_the_plain_path_observes(name: str) -> None:
    rule = random_rule(name, torch.float64)
    assert isinstance(rule, RecurrentRule)
    params = [gradients(1, *shape)[0] for shape in [(3, 5), (7,), (9000,)]]
    states = [rule.init_state(p) for p in params]
    for step in range(3):
        grads = [gradients(4, *p.shape)[step] for p in params]
        each = zip(grads, states, params, strict=True)
        seen = [rule.observe(*one)[0].flatten(0, -2) for one in each]
        _, signals = rule.update_many_(grads, states, params, record=True)
        torch.testing.assert_close(signals, torch.cat(seen), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["equivariant", "steered"])
def test_direct_path_of_zero_weights_is_none(name: str) -> None:
    """With it a rule is born as without it, so that training can start from one without."""
    with_it = random_rule(name)
    assert with_it.direct is not None
    torch.nn.init.zeros_(with_it.direct.weight)
    without = rule_class(name)(replace(with_it.config, direct=False))
    without.load_state_dict(with_it.state_dict(), strict=False)
    assert without.direct is None
    assert rule_class(name)().direct is None
    shapes = [(6, 5), (7,), (40, 30)]
    params = [torch.randn(shape) for shape in shapes]
    for rule in (with_it, without):
        torch.manual_seed(1)
        states = [rule.init_state(param) for param in params]
        for _ in range(3):
            updates, _ = rule.update_many_([torch.randn(s) for s in shapes], states, params)
        if rule is with_it:
            reference = updates
    for ours, theirs in zip(updates, reference, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(update.abs().max() > 1e-4 for update in reference)


@pytest.mark.parametrize("name", ["equivariant", "steered"])
def test_wider_rule_begins_as_the_narrower_one(name: str) -> None:
    narrow = random_rule(name, torch.float64)
    units = narrow.config.hidden_size
    wide = rule_class(name)(replace(narrow.config, hidden_size=units + 3)).double()
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    wide.adopt(narrow)
    after = wide.state_dict()
    assert all(not after[key].equal(before[key]) for key in before)
    for key in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):  # what new units read is drawn at random
        new = after[key].unflatten(0, (4, -1))[:, units:]
        assert new.equal(before[key].unflatten(0, (4, -1))[:, units:])
    grads = gradients(6, 4, 3)
    param = torch.randn(4, 3, dtype=torch.float64)
    expected, found = trajectory(narrow, grads, param), trajectory(wide, grads, param)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_no_rule_begins_as_a_wider_one() -> None:
    small = EquivariantRule(EquivariantConfig(hidden_size=3))
    with pytest.raises(ValueError, match=r"hidden_size=3.*no place for lstm\.weight_ih_l0"):
        small.adopt(EquivariantRule())
    with pytest.raises(ValueError, match=r"'steered'.*weights of a rule 'equivariant'"):
        rule_class("steered")().adopt(small)
