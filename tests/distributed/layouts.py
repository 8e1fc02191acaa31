"""States of known content in several layouts, and what must be found in them after a load.

Every value is a function of a name and a seed, so any rank of any world size can tell what the
whole tensor must be, bit for bit, without having seen the save.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from dist_ckpt import TrainState

LAYOUTS = ("fsdp", "ddp", "plain")
ROWS = (0, 1, 3, 10, 64)
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
FEW_DTYPES = (torch.bfloat16, torch.int64, torch.bool)


def content(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return the whole tensor that `name` stands for: random bytes (0 and 1 for bool)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool().reshape(shape)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare two tensors bit for bit, NaNs and signed zeros included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_bits(left), _bits(right))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Bag(torch.nn.Module):
    """Buffers of some dtypes and of awkward shapes, sharded by rows over the job or whole."""

    def __init__(self, layout: str, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        for dtype in dtypes:
            short = str(dtype).removeprefix("torch.")
            for rows in ROWS:
                self._add(f"{short}_{rows}", (rows, 2), dtype, layout)
            self._add(f"{short}_scalar", (), dtype, "plain")
            self._add(f"{short}_empty", (3, 0), dtype, "plain")

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
        whole = torch.zeros(shape, dtype=dtype)
        self.register_buffer(name, shard(whole) if layout == "fsdp" else whole)


class Net(torch.nn.Module):
    """Parameters whose first dimension no world size above 1 divides well, and one large one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 1)
        self.three = torch.nn.Linear(10, 3)
        self.large = torch.nn.Linear(300, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.large(x), self.three(x[:, :10]), self.one(x[:, :3]))
        return torch.stack([part.sum() for part in parts]).sum()


@cache
def all_ranks(world_size: int) -> DeviceMesh:
    """Return the mesh of all ranks; making one takes longer than a small tensor."""
    return init_device_mesh("cpu", (world_size,))


def shard(whole: torch.Tensor) -> DTensor:
    """Return `whole` as a DTensor cut by rows over all ranks; needs no communication."""
    mesh = all_ranks(dist.get_world_size())
    rows = -(-whole.shape[0] // mesh.size())
    start = min(rows * mesh.get_local_rank(), whole.shape[0])
    local = whole[start : start + rows].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def build(layout: str, seed: int | None, dtypes: Sequence[torch.dtype] = DTYPES) -> TrainState:
    """Return a state in `layout`, filled with content for `seed`, or with zeros for None.

    Buffers are of `dtypes`: a test that is not about tensors is faster with FEW_DTYPES.
    """
    net = Net()
    model: torch.nn.Module = net
    if layout == "fsdp":
        mesh = all_ranks(dist.get_world_size())
        for child in net.children():
            fully_shard(child, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif layout == "ddp" and dist.get_world_size() > 1:
        model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.125)
    bag = Bag(layout, dtypes)
    state = TrainState(model=model, optimizer=optimizer, bag=bag, note={"at": seed})
    with torch.no_grad():
        if seed is None:
            for _, tensor in tensors(net, optimizer, bag):
                local(tensor).zero_()
        else:
            for parameter in net.parameters():
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            for name, tensor in tensors(net, optimizer, bag):
                whole = content(name, tuple(tensor.shape), tensor.dtype, seed)
                fill(tensor, whole)
            optimizer.param_groups[0]["lr"] = float(seed) / 7
    return state


def tensors(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, bag: torch.nn.Module
) -> list[tuple[str, torch.Tensor]]:
    """List every tensor of the state under a name of its own, DTensors as they are."""
    found: list[tuple[str, torch.Tensor]] = []
    for name, parameter in net.named_parameters():
        found.append((f"net.{name}", parameter))
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            found.append((f"optimizer.{name}.{key}", value))
    found += [(f"bag.{name}", buffer) for name, buffer in bag.named_buffers()]
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Write this rank's rows of `whole` into `tensor`."""
    local(tensor).copy_(local(shard(whole)) if isinstance(tensor, DTensor) else whole)


def problems(state: TrainState, seed: int, dtypes: Sequence[torch.dtype] = DTYPES) -> list[str]:
    """Return what of `state`, which has buffers of `dtypes`, is not the content for `seed`."""
    model, optimizer, bag = state["model"], state["optimizer"], state["bag"]
    net = model.module if isinstance(model, DistributedDataParallel) else model
    wrong = []
    found = tensors(net, optimizer, bag)
    expected_count = 6 * 4 + len(dtypes) * (len(ROWS) + 2)
    if len(found) != expected_count:
        wrong.append(f"{len(found)} tensors instead of {expected_count}")
    for name, tensor in found:
        whole = content(name, tuple(tensor.shape), tensor.dtype, seed)
        mine = local(shard(whole)) if isinstance(tensor, DTensor) else whole
        if not same_bits(local(tensor), mine):
            wrong.append(name)
    if optimizer.param_groups[0]["lr"] != float(seed) / 7:
        wrong.append("lr")
    if state["note"] != {"at": seed}:
        wrong.append("note")
    return wrong
