"""A character model: a small GRU learns the descriptions of scikit-learn's bundled data sets.

python examples/character_model.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from torch import Tensor, nn

from learned_optim import LearnedOptimizer

LENGTH, BATCH = 32, 32


class CharacterModel(nn.Module):
    """Embedding, GRU, and the logits of the next character."""

    def __init__(self, characters: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``(batch, length, characters)`` of what follows each of ``(batch, length)``."""
        return self.head(self.gru(self.embedding(text))[0])


def load_text() -> str:
    """Some 15,000 characters of English, and a few tables."""
    sets = (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine)
    return "\n".join(load().DESCR for load in sets)


@torch.no_grad()
def sample(model: CharacterModel, characters: list[str], start: str, length: int) -> str:
    """Continue ``start`` with the likeliest characters."""
    text = [characters.index(c) for c in start]
    for _ in range(length):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return "".join(characters[i] for i in text)


def main(steps: int = 300) -> list[float]:
    """Train, print the loss and a sample, and return the losses."""
    torch.manual_seed(0)
    text = load_text()
    characters = sorted(set(text))
    codes = torch.tensor([characters.index(c) for c in text])
    model = CharacterModel(len(characters))
    optimizer = LearnedOptimizer(model.parameters(), total_steps=steps)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(codes) - LENGTH - 1, (BATCH, 1))
        windows = codes[starts + torch.arange(LENGTH + 1)]
        logits = model(windows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f} nats per character")
    print(repr(sample(model, characters, "The data ", 60)))
    return losses


if __name__ == "__main__":
    main()
