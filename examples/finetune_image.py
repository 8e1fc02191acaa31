"""Train an image classifier until validation gets no better; interrupted, it ends as without.

python examples/finetune_image.py --checkpoint-dir runs/shapes --auto-resume
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from dist_ckpt import Checkpointer, EarlyStopping, ElasticSampler, TrainState, flags, keep, policy

SIZE, BATCH, TRAIN, VALIDATION = 16, 32, 320, 240


def draw(count: int, *, seed: int) -> TensorDataset:
    """Return pictures [count, 1, SIZE, SIZE] of one of three shapes in noise, and which it is."""
    rng = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (count,), generator=rng)
    place = torch.randint(5, SIZE - 5, (2, count, 1, 1), generator=rng)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    down, right = (y - place[0]).abs(), (x - place[1]).abs()
    near, far = torch.minimum(down, right), torch.maximum(down, right)
    shapes = torch.stack([down**2 + right**2 <= 12, far == 3, (near == 0) & (far <= 4)])
    noise = torch.randn(count, 1, SIZE, SIZE, generator=rng)
    return TensorDataset(shapes[kinds, range(count)][:, None] + 0.6 * noise, kinds)


def evaluate(model: nn.Module, pictures: Tensor, kinds: Tensor) -> dict[str, float]:
    """Return the loss and the accuracy."""
    with torch.no_grad():
        logits = model.eval()(pictures)
    right = (logits.argmax(1) == kinds).float().mean()
    return {"val/loss": cross_entropy(logits, kinds).item(), "val/accuracy": right.item()}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the command line says; return what the best model comes to."""
    parser = argparse.ArgumentParser(description="Train a small image classifier.")
    parser.add_argument("--epochs", type=int, default=20)
    flags.add_arguments(parser)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    data, held_out = draw(TRAIN, seed=1), draw(VALIDATION, seed=2).tensors
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 36, 3))
    adamw = torch.optim.AdamW(model.parameters())
    rates = OneCycleLR(adamw, max_lr=1e-2, total_steps=options.epochs * (TRAIN // BATCH))
    sampler = ElasticSampler(TRAIN, global_batch=BATCH)
    batches = sampler.batches(DataLoader(data, batch_sampler=sampler))
    stopper = EarlyStopping("val/loss", patience=3)
    state = TrainState(model=model, optimizer=adamw, scheduler=rates, sampler=sampler, stop=stopper)
    when, kept = policy.every(epochs=1), keep.latest(1)  # and the best, because of the stopper
    with Checkpointer.from_args(options, state, when=when, keep=kept) as ckpt:
        for epoch in range(ckpt.restore() + 1, options.epochs + 1):
            if stopper.should_stop:
                break
            model.train()
            for _, (pictures, kinds) in zip(range(len(sampler)), batches, strict=False):
                loss = cross_entropy(model(pictures), kinds)
                adamw.zero_grad()
                torch.autograd.backward(loss)
                adamw.step()
                rates.step()
            ckpt.epoch_end(epoch, metrics=(metrics := evaluate(model, *held_out)))
            print(f"epoch {epoch}: {metrics}")
        print(f"best: epoch {ckpt.rollback()}")
        return evaluate(model, *held_out)


if __name__ == "__main__":
    main()
