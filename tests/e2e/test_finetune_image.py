"""The second example: it learns, stops early, and an interruption changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_ckpt.checkpointer import Checkpointer
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from examples import finetune_image

LOSS = "val/loss"


class Interrupted(Exception):
    """The end of a start, in the middle of the training."""


def test_it_is_short() -> None:
    assert len(Path(finetune_image.__file__).read_text().splitlines()) < 80


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small convolutions on several threads wait more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_learns_and_ends_with_the_best_model_interrupted_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (["--checkpoint-dir", str(tmp_path / name), "--auto-resume"] for name in "ab")
    ended = finetune_image.main(whole)
    # Discs, frames and crosses: by chance it would be one in three.
    assert ended["val/accuracy"] > 0.7
    records = Repository(resolve(whole[1])).records()
    last = records[-1].epoch
    assert last is not None
    assert last < 20, "stopped early"
    assert ended[LOSS] == records[0].metrics[LOSS] == min(each.metrics[LOSS] for each in records)
    assert [each.epoch for each in records] == [last - 3, last], "the best and the newest are kept"

    end = Checkpointer.epoch_end

    def interrupt(self: Checkpointer, epoch: int, **arguments: object) -> object:
        handle = end(self, epoch, **arguments)  # type: ignore[arg-type]
        if epoch in (2, last - 2):  # before the best, and between the best and the end
            raise Interrupted
        return handle

    monkeypatch.setattr(Checkpointer, "epoch_end", interrupt)
    for _ in range(2):
        with pytest.raises(Interrupted):
            finetune_image.main(parts)
    assert finetune_image.main(parts) == ended
    again = Repository(resolve(parts[1])).records()
    # Between the two lies the one that the last start went on from.
    assert [again[0].metrics, again[-1].metrics] == [each.metrics for each in records]
    # Once more: it had stopped, so there is nothing left to train.
    assert finetune_image.main(parts) == ended
