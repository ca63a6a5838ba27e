"""FSDP2: parameters are sharded over processes, and the optimizer's state with them.

torchrun --nproc-per-node 2 examples/with_fsdp2.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from learned_optim import LearnedOptimizer


def main(steps: int = 100) -> list[float]:
    """Train and return the losses of this process."""
    dist.init_process_group("gloo")
    try:
        torch.manual_seed(0)  # the same initial parameters everywhere
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # After sharding, so that it sees the shards.
        optimizer = LearnedOptimizer(model.parameters(), total_steps=steps)
        digits = load_digits()
        x = torch.tensor(digits.data / 16, dtype=torch.float32)
        y = torch.tensor(digits.target)
        generator = torch.Generator().manual_seed(dist.get_rank())  # batches of its own
        losses = []
        for _ in range(steps):
            batch = torch.randint(len(x), (64,), generator=generator)
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
        return losses
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
