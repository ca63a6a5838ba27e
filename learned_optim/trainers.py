"""Helpers for trainers; a trainer is imported when its helper is called."""

from __future__ import annotations

from typing import Any

from learned_optim._warn import warn


def trainer_callback() -> Any:
    """A callback of a Hugging Face ``Trainer`` that sets the optimizer's ``total_steps``.

    The trainer knows the number of steps once training begins. Pass
    ``lr_scheduler_type="constant"`` beside it, because the optimizer anneals by itself.

    Returns:
        A ``transformers.TrainerCallback``, for ``Trainer(callbacks=[trainer_callback()])``.

    Raises:
        ImportError: ``transformers`` is not installed.
    """
    from transformers import TrainerCallback

    class TotalSteps(TrainerCallback):
        """Sets ``total_steps`` of all groups to ``state.max_steps``."""

        def on_train_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
        ) -> None:
            for group in optimizer.param_groups:
                if "total_steps" not in group:
                    raise ValueError(
                        f"trainer_callback() is for learned optimizers, and this trainer runs "
                        f"{type(optimizer).__name__}: pass optimizers=(LearnedOptimizer("
                        f"model.parameters()), None)"
                    )
                group["total_steps"] = state.max_steps
            kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
            if not kind.startswith("constant"):
                warn(
                    f"lr_scheduler_type={kind!r} of the TrainingArguments anneals beside the "
                    f"learned optimizer, which anneals by itself: pass "
                    f"lr_scheduler_type='constant'"
                )

    return TotalSteps()
