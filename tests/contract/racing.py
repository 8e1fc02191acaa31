"""Processes that race to commit one step: `python -m tests.contract.racing COUNT STEP URL...`.

A process of its own, because its children are forked from it: it has used the store before, as a
training program has, and each of them must then make connections of its own. Prints for each
racer the name of the error that it got, or its save_id.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier

from dist_ckpt.errors import CheckpointError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from tests.contract.checkpoints import commit, index_of, put_shard

_LIMIT_SECONDS = 600.0


def race(urls: Sequence[str], step: int, count: int) -> list[str]:
    """Let `count` processes commit `step` at once, by one claim; return what became of each.

    Args:
        urls: ways to one place, as hosts have them; racers take them in turn.
        step: what all of them commit.
        count: how many.
    """
    claim = Repository(resolve(urls[0])).claim()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    pipes = []
    racers = []
    for number in range(count):
        receiver, sender = context.Pipe(duplex=False)
        url = urls[number % len(urls)]

        def run(url: str = url, number: int = number, answer: object = sender) -> None:
            answer.send(_attempt(url, step, claim, number, barrier))  # type: ignore[attr-defined]

        racers.append(context.Process(target=run))
        racers[-1].start()
        sender.close()
        pipes.append(receiver)
    outcomes = [str(pipe.recv()) if pipe.poll(_LIMIT_SECONDS) else "silent" for pipe in pipes]
    for racer in racers:
        racer.kill()
        racer.join()
    return outcomes


def _attempt(url: str, step: int, claim: int, number: int, barrier: Barrier) -> str:
    store = resolve(url)
    try:
        transaction = Repository(store).begin(step, claim)
        data = bytes([number]) * 1000
        index = index_of([put_shard(transaction, 0, data)], [len(data)])
        barrier.wait(_LIMIT_SECONDS)
        commit(transaction, index)
    except CheckpointError as error:
        return type(error).__name__
    finally:
        store.close()
    return transaction.save_id


if __name__ == "__main__":
    sys.stdout.write(json.dumps(race(sys.argv[3:], int(sys.argv[2]), int(sys.argv[1]))))
