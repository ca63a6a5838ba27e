"""Lightning, Accelerate and Hugging Face's Trainer, each for real on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer, save_rule, trainer_callback

from .common import descending_lstm, flat, small_batch, small_net, train

# ---- Lightning

lightning = pytest.importorskip("lightning")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# What Lightning says about small machines and small loaders is not about us.
lightning_warnings = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class LightningNet(lightning.LightningModule):
    def __init__(self, scheduled: bool = False) -> None:
        super().__init__()
        self.net = small_net()
        self.scheduled = scheduled
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        opt = LearnedOptimizer(self.parameters(), descending_lstm())
        if not self.scheduled:
            return opt
        schedule = LambdaLR(opt, lambda step: 0.8**step)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(*small_batch()), batch_size=batch_size)


@lightning_warnings
def test_lightning_makes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    """Lightning steps through a closure; the numbers are those of a loop without one."""
    module = LightningNet()
    trainer = lightning.Trainer(
        max_epochs=8, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
    )
    trainer.fit(module, loader())
    plain = small_net()
    losses = train(plain, LearnedOptimizer(plain.parameters(), descending_lstm()), 8)
    assert module.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(flat(module.net), flat(plain), rtol=1e-6, atol=1e-7)


@lightning_warnings
def test_lightning_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    whole = LightningNet(scheduled=True)
    options = {**QUIET, "enable_checkpointing": False, "default_root_dir": tmp_path}
    lightning.Trainer(max_epochs=8, **options).fit(whole, loader())

    first = LightningNet(scheduled=True)
    trainer = lightning.Trainer(max_epochs=3, **options)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    second = LightningNet(scheduled=True)
    trainer = lightning.Trainer(max_epochs=8, **options)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    assert torch.equal(flat(whole.net), flat(second.net))
    (opt,) = trainer.optimizers
    assert opt.param_groups[0]["lr"] == pytest.approx(0.8**8)


@lightning_warnings
def test_lightning_accumulates_and_clips(tmp_path: Path) -> None:
    module = LightningNet()
    trainer = lightning.Trainer(
        max_epochs=10,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **QUIET,
    )
    trainer.fit(module, loader(batch_size=8))
    (opt,) = trainer.optimizers
    assert all(state["step"].item() == 10.0 for state in opt.state.values())
    assert sum(module.losses[-2:]) < sum(module.losses[:2])


class AnnealedNet(LightningNet):
    """Told the length of the run as the documentation says."""

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        return LearnedOptimizer(self.parameters(), "default", total_steps=steps)


@lightning_warnings
def test_lightning_extends_a_run(tmp_path: Path) -> None:
    options = {**QUIET, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(max_epochs=3, **options)
    trainer.fit(AnnealedNet(), loader())
    assert trainer.optimizers[0].param_groups[0]["total_steps"] == 3
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    longer = lightning.Trainer(max_epochs=9, **options)
    longer.fit(AnnealedNet(), loader(), ckpt_path=tmp_path / "end.ckpt")
    (opt,) = longer.optimizers
    assert opt.param_groups[0]["total_steps"] == 9
    assert all(state["step"].item() == 9.0 for state in opt.state.values())


@lightning_warnings
def test_lightning_without_a_maximum_tells_an_unknown_length(tmp_path: Path) -> None:
    options = {**QUIET, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(max_epochs=-1, max_steps=-1, limit_train_batches=1, **options)

    class Stops(AnnealedNet):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = True

    trainer.fit(Stops(), loader())
    assert trainer.optimizers[0].param_groups[0]["total_steps"] is None


# ---- Accelerate


def accelerated(**options: Any) -> tuple[Any, nn.Module, Any, Any, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, **options)
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm())
    schedule = LambdaLR(opt, lambda step: 0.9**step)
    return accelerator, *accelerator.prepare(model, opt, loader(), schedule)


def accelerated_steps(accelerator: Any, model: Any, opt: Any, data: Any, schedule: Any) -> float:
    """One epoch of one batch; its loss."""
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
    accelerator, model, opt, _, schedule = parts
    data = accelerator.prepare(loader(batch_size=8))
    for _ in range(3):
        accelerated_steps(accelerator, model, opt, data, schedule)
    states = opt.optimizer.state.values()
    assert [state["step"].item() for state in states] == [3.0] * 4


def test_accelerate_extends_a_run(tmp_path: Path) -> None:
    from accelerate import Accelerator

    for total_steps in (3, 9):
        accelerator, model = Accelerator(cpu=True), small_net()
        opt = LearnedOptimizer(model.parameters(), total_steps=total_steps)
        model, opt, data = accelerator.prepare(model, opt, loader())
        if total_steps == 9:
            with pytest.warns(UserWarning, match="total_steps=9 of this optimizer is kept"):
                accelerator.load_state(tmp_path / "state")
        for x, y in data:
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            opt.step()
        accelerator.save_state(tmp_path / "state")
        assert opt.param_groups[0]["total_steps"] == total_steps


# ---- Hugging Face Trainer


class HFNet(nn.Module):
    """The Trainer's calling convention: labels in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def hf_trainer(folder: Path, model: nn.Module, max_steps: int = 6, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(0)
    x, y = small_batch()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        max_steps=max_steps,
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
    )
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    return Trainer(model, arguments, train_dataset=rows, **options)


def hf_losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_hugging_face_trainer_through_both_arguments(tmp_path: Path) -> None:
    """``optimizers=`` and ``optimizer_cls_and_kwargs=`` reach the same weights, also resumed."""
    rule_file = tmp_path / "rule.safetensors"
    save_rule(descending_lstm(), rule_file)

    model = HFNet()
    opt = LearnedOptimizer(model.parameters(), rule_file)
    one = hf_trainer(tmp_path / "one", model, optimizers=(opt, None))
    one.train()

    choice = (LearnedOptimizer, {"rule": str(rule_file), "lr": 1.0})
    two = hf_trainer(tmp_path / "two", HFNet(), optimizer_cls_and_kwargs=choice)
    two.train()
    assert isinstance(two.optimizer.optimizer, LearnedOptimizer)
    assert hf_losses(one) == hf_losses(two)
    assert hf_losses(two)[-1] < hf_losses(two)[0]
    assert torch.equal(flat(one.model), flat(two.model))

    resumed = hf_trainer(tmp_path / "two", HFNet(), optimizer_cls_and_kwargs=choice)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert torch.equal(flat(resumed.model), flat(two.model))
    steps = [s["step"].item() for s in resumed.optimizer.optimizer.state.values()]
    assert steps == [6.0] * 4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_callback_tells_the_length_and_extends_a_run(tmp_path: Path) -> None:
    optimizers = []
    for max_steps, resumed in ((6, None), (12, str(tmp_path / "checkpoint-6"))):
        model = HFNet()
        opt = LearnedOptimizer(model.parameters())
        trainer = hf_trainer(
            tmp_path, model, max_steps, optimizers=(opt, None), callbacks=[trainer_callback()]
        )
        trainer.train(resume_from_checkpoint=resumed)
        optimizers.append(opt)
        (group,) = opt.param_groups
        assert group["total_steps"] == max_steps
        assert group["weight_decay"] == opt.rule.default_weight_decay(max_steps)
        assert all(state["step"].item() == max_steps for state in opt.state.values())
    model = HFNet()
    adam = torch.optim.Adam(model.parameters())
    trainer = hf_trainer(tmp_path, model, optimizers=(adam, None), callbacks=[trainer_callback()])
    with pytest.raises(ValueError, match="is for learned optimizers"):
        trainer.train()


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:lr has fallen:UserWarning"
)
def test_the_callback_warns_of_the_trainers_own_schedule(tmp_path: Path) -> None:
    model = HFNet()
    opt = LearnedOptimizer(model.parameters())
    trainer = hf_trainer(tmp_path, model, optimizers=(opt, None), callbacks=[trainer_callback()])
    trainer.args.lr_scheduler_type = "linear"
    with pytest.warns(UserWarning, match=r"lr_scheduler_type='linear'.* pass .*'constant'"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_hugging_face_trainer_trains_a_transformer(tmp_path: Path) -> None:
    """A tiny randomly initialised GPT-2 with warm-up from lr = 0, weight decay and clipping."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    set_seed(0)
    rule_file = tmp_path / "rule.safetensors"
    save_rule(descending_lstm(0.3), rule_file)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=12,
        warmup_steps=3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        optimizer_cls_and_kwargs=(LearnedOptimizer, {"rule": str(rule_file)}),
    )
    trainer.train()
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0, 0.1}
    losses = hf_losses(trainer)
    assert losses[-1] < 0.8 * losses[0]
