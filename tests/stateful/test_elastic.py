"""One epoch over changing numbers of ranks: every sample once, every stream its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader

import dist_ckpt
from dist_ckpt.testing.ranks import run_ranks

SAMPLES, GLOBAL_BATCH = 240, 12  # 12 samples can be shared out to 1, 2, 3 and 4 ranks
STEPS = SAMPLES // GLOBAL_BATCH


class Numbers:
    """Samples that are their own index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


def go_on(root: str, steps: int, workers: int) -> tuple[list[int], float, tuple[str, ...]]:
    """Train `steps` more steps; return the samples of this rank, a draw, and the report's notes."""
    grouped = dist.is_initialized()
    model: nn.Module = nn.Linear(1, 1)
    model = DistributedDataParallel(model) if grouped else model
    optimizer = AdamW(model.parameters())
    sampler = dist_ckpt.ElasticSampler(SAMPLES, global_batch=GLOBAL_BATCH)
    loader: Any = DataLoader(
        Numbers(),  # type: ignore[arg-type]  # all that a loader needs
        batch_sampler=sampler,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    state = dist_ckpt.TrainState(model=model, optimizer=optimizer, sampler=sampler)
    seen: list[int] = []
    with dist_ckpt.Checkpointer(root, state, timeout_seconds=600) as ckpt:
        start = ckpt.restore()
        notes = () if ckpt.restored is None else ckpt.restored.notes
        draw = torch.rand(()).item()
        for step, batch in enumerate(sampler.batches(loader), start + 1):
            model(batch.float().reshape(-1, 1)).mean().backward()
            optimizer.step()
            seen += batch.tolist()
            if step == start + steps:
                ckpt.save(step)
                break
        if start + steps < STEPS:
            # Used up by nobody: what workers hold in advance was not seen.
            assert sampler.consumed == (start + steps) * GLOBAL_BATCH
    return seen, draw, notes


def test_each_sample_is_seen_once_over_2_3_1_and_4_ranks(tmp_path: Path) -> None:
    seen: list[int] = []
    draws: list[float] = []
    for ranks, steps, workers in ((2, 4, 2), (3, 6, 0), (1, 3, 1), (4, STEPS - 13, 0)):
        results = run_ranks(ranks, go_on, str(tmp_path), steps, workers)
        for samples, draw, notes in results:
            seen += samples
            if draws or ranks != 2:
                draws.append(draw)
                assert any("rng: saved by" in note for note in notes)
    assert sorted(seen) == list(range(SAMPLES))
    # After each change every rank draws from a stream of its own.
    assert len(set(draws)) == len(draws) == 3 + 1 + 4
