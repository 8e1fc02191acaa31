"""Which ranks form the job that saves and loads together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, TypedDict

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import UsageError

Ranks: TypeAlias = Literal["all", "alone"]


class JobKeywords(TypedDict, total=False):
    """The keywords of `JobRanks`, for the signatures of the calls that take them."""

    ranks: Ranks
    process_group: ProcessGroup | None
    node_local: bool


JOB_KEYWORDS = frozenset(JobKeywords.__annotations__)


@dataclass(frozen=True, slots=True)
class JobRanks:
    """Which ranks form a job.

    Attributes:
        ranks: "all": those of the process group, and each of them makes the call. "alone": this
            process makes it alone, whatever the others do, and holds all of the state.
        process_group: the group whose ranks form the job; None for the default one. Ranks in
            messages and files are numbered within it.
        node_local: whether each host has a folder of its own there, on a disk that no other host
            sees: the path may be one and the same, or another on each. See
            docs/guides/storage.md.

    Raises:
        UsageError: an argument is malformed, or this process is not in the group.
    """

    ranks: Ranks = "all"
    process_group: ProcessGroup | None = None
    node_local: bool = False

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """Take what is about the job from the keywords of a call."""
        return cls(**{name: keywords[name] for name in JOB_KEYWORDS & keywords.keys()})

    def __post_init__(self) -> None:
        if self.ranks not in ("all", "alone"):
            raise UsageError(
                f"ranks is 'all' or 'alone', not {self.ranks!r}: give some of the ranks as "
                "process_group="
            )
        if not isinstance(self.node_local, bool):
            raise UsageError(f"node_local is True or False, not {self.node_local!r}")
        if self.node_local and self.ranks == "alone":
            raise UsageError("ranks='alone' has one folder: leave node_local out")
        group: object = self.process_group
        if group is None:
            return
        if self.ranks == "alone":
            raise UsageError("ranks='alone' is this process without a process_group: give one")
        # What `new_group` returns to the ranks that are outside of it is no group.
        outside = group == dist.GroupMember.NON_GROUP_MEMBER
        if not outside and not isinstance(group, ProcessGroup):
            hint = " (of a device mesh: its get_group(...))" if hasattr(group, "get_group") else ""
            raise UsageError(f"process_group is a torch process group{hint}, not {group!r}")
        if outside or dist.get_rank(self.process_group) < 0:
            raise UsageError(
                "this process is not in the process group that it was given: only the ranks of "
                "the group make the call"
            )

    def check_joined(self) -> None:
        """Check that this process does not take itself for a job, being one of several.

        Raises:
            UsageError: it was started as one of several ranks, and there is no process group.
        """
        started = os.environ.get("WORLD_SIZE", "")
        several = started.isdecimal() and int(started) > 1 and "RANK" in os.environ
        if self.ranks == "alone" or not several or _initialized():
            return
        raise UsageError(
            f"this process was started as rank {os.environ['RANK']} of {started} (RANK and "
            "WORLD_SIZE are set, as torchrun does), but there is no process group, so each of them "
            "would save for itself and take the run from the others: call "
            "torch.distributed.init_process_group first, or give ranks='alone' if this process "
            "alone saves there"
        )

    def group(self) -> ProcessGroup | None:
        """Return the process group of the job, None where this process is all of it."""
        if self.ranks == "alone" or not _initialized():
            return None
        group = self.process_group or dist.group.WORLD
        return None if group is None or dist.get_world_size(group) == 1 else group

    def world_size(self) -> int:
        """Return how many ranks the job has."""
        group = self.group()
        return 1 if group is None else dist.get_world_size(group)

    def members(self) -> tuple[int, ...] | None:
        """Return the ranks in the default process group; None where the job is all of that."""
        if not _initialized():
            return None
        group = self.group()
        here = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
        return None if len(here) == dist.get_world_size() else tuple(here)

    def lacks(self, tensor: object) -> bool:
        """Tell whether a part of `tensor` lies on ranks outside of the job alone."""
        if not isinstance(tensor, DTensor):
            return False
        members = self.members()
        if members is None:
            return False
        mesh = tensor.device_mesh.mesh
        held = sum((mesh == rank for rank in members), start=mesh.new_zeros(mesh.shape)) > 0
        # Along a dimension of replicas one of them is enough; along any other all are needed.
        for dim, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                held = held.any(dim, keepdim=True)
        return not bool(held.all())


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
