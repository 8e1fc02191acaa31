"""What tests use of torch that older releases lack, though dist_ckpt is right with them."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

_HAS_NO_DIST = "no_dist" in signature(save).parameters

# Before 2.7 stock DCP finds out by itself that there is one process, and warns.
ALONE: dict[str, Any] = {"no_dist": True} if _HAS_NO_DIST else {}

# Before 2.7 DDP always sends the content of rank 0.
NOT_SENT: dict[str, Any] = (
    {"init_sync": False} if "init_sync" in signature(DistributedDataParallel).parameters else {}
)

needs_background_saves_alone = pytest.mark.skipif(
    not _HAS_NO_DIST, reason="async_save of this torch needs a process group"
)
needs_fsdp_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch trains on GPUs only"
)
needs_own_source = pytest.mark.skipif(
    "src_data_rank" not in signature(distribute_tensor).parameters,
    reason="distribute_tensor of this torch sends what rank 0 has",
)
