"""The thesis's experiment: its LSTM, beside Adam and SGD at their best.

A network of 20 sigmoid units with the thesis's tiny initial weights is trained by the LSTM that was
meta-trained on it. Adam's and SGD's learning rates are chosen by grid search on a seed of their
own; the learned optimizer has nothing to choose.

    python examples/thesis.py                  # scikit-learn's digits, no download
    python examples/thesis.py --task mnist     # downloads MNIST through torchvision
"""

import argparse
import sys
from pathlib import Path

from learned_optim.evaluation import EvaluateConfig, Evaluation, brief, write_report
from learned_optim.meta import DataOptions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits", help="digits, mnist, mnist-relu, fashion ...")
    parser.add_argument("--rule", default="mnist", help="checkpoint of the learned optimizer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("thesis"))
    parser.add_argument("--data-dir", type=Path, help="where MNIST is or goes")
    args = parser.parse_args()

    config = EvaluateConfig(
        checkpoints=(args.rule,),
        tasks=(args.task,),
        baselines=("adam", "sgd"),
        lrs=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        steps=args.steps,
        seeds=args.seeds,
        tuning_seeds=1,
        output=args.output,
        data=DataOptions(args.data_dir),
    )
    print("tuning Adam's and SGD's learning rates, and comparing ...", file=sys.stderr)
    summary = Evaluation(config).execute()
    print(brief(summary))
    write_report(summary, args.output)
    print(f"\nlearning curves: {args.output / args.task}.png")


if __name__ == "__main__":
    main()
