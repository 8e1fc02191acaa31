"""What shares memory in the state: read beside it first, on all ranks, to see if it agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from dist_ckpt.loading.reading import ReadOptions, read
from dist_ckpt.loading.ties import Ties
from dist_ckpt.loading.wanted import Wanted
from dist_ckpt.options import LoadOptions
from dist_ckpt.planning.describe import NamedTensors, local_boxes
from dist_ckpt.ranks.coordinator import Coordinator, Deadline, Topic
from dist_ckpt.ranks.together import together
from dist_ckpt.repository.source import Source
from dist_ckpt.state.layout import dtype_of, materialise


def prepare(
    source: Source,
    targets: NamedTensors,
    numbers: Mapping[tuple[str, str], int],
    *,
    options: LoadOptions,
) -> tuple[NamedTensors, Ties]:
    """Give memory to what is on the meta device, and find out what shares memory.

    Args:
        source: the checkpoint.
        targets: what is to be filled, by part and name.
        numbers: which stored tensor each of them is.
        options: how to load.

    Returns:
        The targets, all with memory; and the boxes of them that this rank wants.

    Raises:
        IncompatibleError: the elements of one target are themselves one memory.
    """
    made: dict[object, torch.Tensor] = {}
    real = {
        part: materialise(tensors, device=options.device, made=made)
        for part, tensors in targets.items()
    }
    tensors = source.index.tensors
    wanted = []
    for local in local_boxes(real):
        number = numbers[local.held.part, local.held.name]
        wanted.append(Wanted(number, local, dtype_of(tensors[number].dtype)))
    # Half of what may be used is for the values, the other half for the reads.
    half_bytes = options.in_flight_bytes // 2
    where, rule = source.where, options.ties
    return real, Ties(source.index, wanted, where=where, rule=rule, window_bytes=half_bytes)


def compare_ties(
    source: Source,
    ties: Ties,
    options: ReadOptions,
    *,
    windows: int,
    coordinator: Coordinator,
    topic: Topic,
    deadline: Deadline,
) -> int:
    """Read and compare the windows of `ties`; return the bytes read. A collective call.

    Args:
        source: the checkpoint.
        ties: those of this rank.
        options: the same on all ranks.
        windows: the most that any rank has.
        coordinator: the way to the other ranks.
        topic: names the rounds of this.
        deadline: when to give up.

    Raises:
        IncompatibleError: names of one memory have different values; nothing live was changed.
        CheckpointError: the same on every rank.
    """
    half = replace(options, in_flight_bytes=options.in_flight_bytes // 2)
    nbytes = 0
    for number in range(windows):
        beside, _ = together(
            coordinator,
            topic.phase(f"beside-{number}"),
            partial(ties.window, number),
            deadline=deadline,
        )
        nbytes += read(
            source,
            beside,
            half,
            coordinator=coordinator,
            topic=topic.phase(f"tied-{number}"),
            deadline=deadline,
        ).nbytes_read
        together(
            coordinator,
            topic.phase(f"agree-{number}"),
            partial(ties.settle, number),
            deadline=deadline,
        )
    return nbytes
