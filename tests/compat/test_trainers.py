"""Lightning, Accelerate and Hugging Face's Trainer, each for real on a small model."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer, save_rule, trainer_callback
from learned_optim.rules import UpdateRule

from .common import descending_lstm, flat, small_batch, small_net, train

# ---- Lightning

lightning = pytest.importorskip("lightning")

# What Lightning says about small machines and small loaders is not about us.
lightning_warnings = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class LightningNet(lightning.LightningModule):
    """Trains with a rule, or with the default and the length of the run as the docs say."""

    def __init__(self, make_rule: Any = None, scheduled: bool = False) -> None:
        super().__init__()
        self.net = small_net()
        self.make_rule, self.scheduled = make_rule, scheduled
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        if self.make_rule is None:
            steps = self.trainer.estimated_stepping_batches
            return LearnedOptimizer(self.parameters(), total_steps=steps)
        opt = LearnedOptimizer(self.parameters(), self.make_rule())
        if not self.scheduled:
            return opt
        schedule = LambdaLR(opt, lambda step: 0.8**step)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(*small_batch()), batch_size=batch_size)


def fit(folder: Path, module: LightningNet, checkpoint: Path | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, **options,
    )  # fmt: skip
    data = loader(16 // options.get("accumulate_grad_batches", 1))
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


@lightning_warnings
def test_lightning_makes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    """Lightning steps through a closure; the numbers are those of a loop without one."""
    module, plain = LightningNet(descending_lstm), small_net()
    fit(tmp_path, module, max_epochs=8)
    losses = train(plain, LearnedOptimizer(plain.parameters(), descending_lstm()), 8)
    assert module.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(flat(module.net), flat(plain), rtol=1e-6, atol=1e-7)


@lightning_warnings
def test_lightning_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """With accumulated and clipped gradients, and a scheduler."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    whole, first, second = (LightningNet(descending_lstm, scheduled=True) for _ in range(3))
    fit(tmp_path, whole, max_epochs=8, **options)
    fit(tmp_path, first, max_epochs=3, **options).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(tmp_path, second, tmp_path / "half.ckpt", max_epochs=8, **options)
    assert first.losses + second.losses == whole.losses
    assert torch.equal(flat(whole.net), flat(second.net))
    (opt,) = trainer.optimizers
    assert opt.param_groups[0]["lr"] == pytest.approx(0.8**8)
    assert all(state["step"].item() == 8.0 for state in opt.state.values())


@lightning_warnings
def test_lightning_tells_the_length_and_extends_a_run(tmp_path: Path) -> None:
    trainer = fit(tmp_path, LightningNet(), max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["total_steps"] == 3
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    longer = fit(tmp_path, LightningNet(), tmp_path / "end.ckpt", max_epochs=9)
    (opt,) = longer.optimizers
    assert opt.param_groups[0]["total_steps"] == 9
    assert all(state["step"].item() == 9.0 for state in opt.state.values())

    class Stops(LightningNet):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = True

    endless = fit(tmp_path, Stops(), max_epochs=-1, max_steps=-1, limit_train_batches=1)
    assert endless.optimizers[0].param_groups[0]["total_steps"] is None


def test_a_warning_in_mid_run_points_at_the_users_line(tmp_path: Path) -> None:
    def exhausted() -> UpdateRule:
        rule = descending_lstm()
        rule.trained_steps = 1
        return rule

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, LightningNet(exhausted), max_epochs=3)
    (warning,) = [w for w in caught if "longest runs" in str(w.message)]
    assert warning.filename == __file__


# ---- Accelerate


def accelerated(total_steps: int | None = None, **options: Any) -> tuple[Any, ...]:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True, **options), small_net()
    rule = "default" if total_steps else descending_lstm()
    opt = LearnedOptimizer(model.parameters(), rule, total_steps=total_steps)
    schedule = LambdaLR(opt, lambda step: 1.0 if total_steps else 0.9**step)
    data = loader(16 // options.get("gradient_accumulation_steps", 1))
    return accelerator, *accelerator.prepare(model, opt, data, schedule)


def accelerated_steps(accelerator: Any, model: Any, opt: Any, data: Any, schedule: Any) -> float:
    """One epoch; the last loss."""
    for x, y in data:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 10.0)
            opt.step()
            schedule.step()
            opt.zero_grad()
    return loss.item()


def test_accelerate_makes_the_steps_of_a_plain_loop_and_resumes(tmp_path: Path) -> None:
    parts = accelerated()
    losses = [accelerated_steps(*parts) for _ in range(4)]
    parts[0].save_state(tmp_path / "state")
    losses += [accelerated_steps(*parts) for _ in range(4)]

    plain = small_net()
    opt = LearnedOptimizer(plain.parameters(), descending_lstm())
    schedule = LambdaLR(opt, lambda step: 0.9**step)
    reference = []
    for _ in range(8):
        reference += train(plain, opt, 1)
        schedule.step()
    assert losses == pytest.approx(reference, rel=1e-6)

    again = accelerated()
    accelerated_steps(*again)
    again[0].load_state(tmp_path / "state")
    assert [accelerated_steps(*again) for _ in range(4)] == losses[4:]
    torch.testing.assert_close(flat(again[1]), flat(parts[1]), rtol=0, atol=0)


def test_accelerate_accumulates_gradients() -> None:
    """The wrapper holds back every other step, and the count of steps says so."""
    parts = accelerated(gradient_accumulation_steps=2)
    for _ in range(3):
        accelerated_steps(*parts)
    assert [state["step"].item() for state in parts[2].optimizer.state.values()] == [3.0] * 4


def test_accelerate_extends_a_run(tmp_path: Path) -> None:
    parts = accelerated(total_steps=3)
    accelerated_steps(*parts)
    parts[0].save_state(tmp_path / "state")
    longer = accelerated(total_steps=9)
    with pytest.warns(UserWarning, match="total_steps=9 of this optimizer is kept") as caught:
        longer[0].load_state(tmp_path / "state")
    assert caught[0].filename == __file__
    accelerated_steps(*longer)
    assert longer[2].param_groups[0]["total_steps"] == 9


# ---- Hugging Face Trainer

hf_warnings = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class HFNet(nn.Module):
    """The Trainer's calling convention: labels in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def hf_trainer(folder: Path, optimizer: Any, max_steps: int = 6, **arguments: Any) -> Any:
    """A Trainer of a small network by an optimizer that is made here, or by class and arguments."""
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(0)
    model, (x, y) = HFNet(), small_batch()
    settings = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, max_steps=max_steps,
        logging_steps=1, save_steps=3, use_cpu=True, disable_tqdm=True, report_to="none",
        dataloader_pin_memory=False, **{"lr_scheduler_type": "constant", **arguments},
    )  # fmt: skip
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    if isinstance(optimizer, tuple):
        options = {"optimizer_cls_and_kwargs": optimizer}
    else:
        options = {"optimizers": (optimizer(model.parameters()), None)}
    options["callbacks"] = [trainer_callback()]
    return Trainer(model, settings, train_dataset=rows, **options)


def hf_losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@hf_warnings
@pytest.mark.filterwarnings("ignore:total_steps=6 has no effect")
def test_hugging_face_trainer_through_both_arguments(tmp_path: Path) -> None:
    """``optimizers=`` and ``optimizer_cls_and_kwargs=`` reach the same weights, also resumed."""
    rule_file = tmp_path / "rule.safetensors"
    save_rule(descending_lstm(), rule_file)
    one = hf_trainer(tmp_path / "one", lambda params: LearnedOptimizer(params, rule_file))
    one.train()
    choice = (LearnedOptimizer, {"rule": str(rule_file), "lr": 1.0})
    two = hf_trainer(tmp_path / "two", choice)
    two.train()
    assert isinstance(two.optimizer.optimizer, LearnedOptimizer)
    assert hf_losses(one) == hf_losses(two)
    assert hf_losses(two)[-1] < hf_losses(two)[0]
    assert torch.equal(flat(one.model), flat(two.model))
    resumed = hf_trainer(tmp_path / "two", choice)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert torch.equal(flat(resumed.model), flat(two.model))
    steps = [s["step"].item() for s in resumed.optimizer.optimizer.state.values()]
    assert steps == [6.0] * 4


@hf_warnings
def test_the_callback_tells_the_length_and_extends_a_run(tmp_path: Path) -> None:
    for max_steps, resumed in ((3, None), (6, str(tmp_path / "checkpoint-3"))):
        trainer = hf_trainer(tmp_path, LearnedOptimizer, max_steps)
        trainer.train(resume_from_checkpoint=resumed)
        opt = trainer.optimizer.optimizer
        (group,) = opt.param_groups
        assert group["total_steps"] == max_steps
        assert group["weight_decay"] == opt.rule.default_weight_decay(max_steps) > 0
        assert all(state["step"].item() == max_steps for state in opt.state.values())
    with pytest.raises(ValueError, match="is for learned optimizers"):
        hf_trainer(tmp_path, torch.optim.Adam).train()


@hf_warnings
@pytest.mark.parametrize("given", [0.0, 0.1])
def test_by_its_class_the_optimizer_gets_the_trainers_weight_decay(
    given: float, tmp_path: Path
) -> None:
    """As docs/using-with.md says: over the rule's own, and 0 for biases."""
    trainer = hf_trainer(tmp_path, (LearnedOptimizer, {}), 1, weight_decay=given)
    trainer.train()
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [given, 0.0]


@hf_warnings
def test_the_callback_warns_of_the_trainers_own_schedule(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, LearnedOptimizer, 1, lr_scheduler_type="linear")
    with pytest.warns(UserWarning, match=r"lr_scheduler_type='linear'.* pass .*'c") as caught:
        trainer.train()
    assert caught[0].filename == __file__
