"""Search for a meta-learning rate with Optuna: short meta-trainings, the later ones better placed.

python examples/search_meta_lr.py    # eight trials, some minutes; needs optuna
"""

import argparse
import dataclasses

import optuna

from learned_optim.meta import MetaTrainer, load_recipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--recipe", default="quick", help="a shipped recipe, or a file of one")
parser.add_argument("--trials", type=int, default=8)
parser.add_argument("--epochs", type=int, default=2, help="of each trial")
parser.add_argument("--folder", default="runs/search")
args = parser.parse_args()


def validation(trial: optuna.Trial) -> float:
    meta_lr = trial.suggest_float("meta_lr", 1e-4, 1e-1, log=True)
    changes = {"meta_lr": meta_lr, "meta_lr_final": meta_lr / 10, "epochs": args.epochs}
    recipe = dataclasses.replace(load_recipe(args.recipe), **changes)
    trainer = MetaTrainer(recipe, f"{args.folder}/{trial.number}", against_adamw=False)
    trainer.train()
    return min(line.validation for line in trainer.history)


study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(validation, n_trials=args.trials)
print(f"best: meta_lr={study.best_params['meta_lr']:.2g}, validation {study.best_value:.4g}")
