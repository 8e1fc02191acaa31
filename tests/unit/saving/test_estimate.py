"""The guess of what a rank will write, before there is anything to measure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from dist_ckpt.ranks.job import JobRanks
from dist_ckpt.state.train_state import SPARE_BYTES, Estimate, TrainState
from dist_ckpt.state.train_state import estimate as guess
from dist_ckpt.testing.ranks import run_ranks

ROWS = 4096
Make = Callable[[list[torch.nn.Parameter]], Optimizer]
OPTIMIZERS: list[tuple[str, Make]] = [
    ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3)),
    ("momentum", lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)),
    ("adam", torch.optim.Adam),
    ("adamw amsgrad", lambda p: torch.optim.AdamW(p, amsgrad=True)),
    ("nadam", torch.optim.NAdam),
    ("radam", torch.optim.RAdam),
    ("adamax", torch.optim.Adamax),
    ("adadelta", torch.optim.Adadelta),
    ("adagrad", torch.optim.Adagrad),
    ("rprop", torch.optim.Rprop),
    ("asgd", torch.optim.ASGD),
    ("rmsprop", torch.optim.RMSprop),
    ("rmsprop centered", lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9)),
]


def estimate(state: TrainState) -> Estimate:
    """Return the guess without what is spare."""
    found = guess(state, world_size=JobRanks().world_size())
    return Estimate(found.nbytes - (SPARE_BYTES if found.devices else 0), found.devices)


def captured_bytes(state: TrainState) -> int:
    parts = [part.capture() for part in state.parts.values()]
    return sum(tensor.nbytes for part in parts for tensor in part.tensors.values())


@pytest.mark.parametrize(("name", "make"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_an_optimizer_counts_before_its_first_step_as_after_it(name: str, make: Make) -> None:
    layer = torch.nn.Linear(64, ROWS)
    layer.bias.requires_grad_(False)  # never stepped: there will be no moments of it
    optimizer = make(list(layer.parameters()))
    state = TrainState(model=layer, optimizer=optimizer, rng=None)
    before = estimate(state).nbytes
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    optimizer.zero_grad()
    wanted = captured_bytes(state)
    assert wanted <= before <= 1.02 * wanted
    assert wanted <= estimate(state).nbytes <= 1.02 * wanted
    assert estimate(state).devices == {torch.device("cpu")}


def test_what_has_no_memory_or_is_met_twice_does_not_count() -> None:
    tied = torch.nn.Linear(64, ROWS, bias=False)
    other = torch.nn.Linear(64, ROWS, bias=False)
    other.weight = tied.weight
    with torch.device("meta"):
        absent = torch.nn.Linear(64, ROWS)
    model = torch.nn.ModuleList([tied, other, absent, torch.nn.LazyLinear(10)])
    state = TrainState(model=model, values={"list": [1, 2]})
    assert estimate(state).nbytes == pytest.approx(tied.weight.nbytes, rel=0.01)
    assert estimate(TrainState(values={})).nbytes == 0


def shares() -> tuple[int, int, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    plain, sharded = torch.nn.Linear(64, ROWS, bias=False), torch.nn.Linear(64, ROWS, bias=False)
    nbytes = plain.weight.nbytes
    fully_shard(sharded, mesh=mesh)
    of_plain = estimate(TrainState(model=plain, rng=None)).nbytes
    of_sharded = estimate(TrainState(model=sharded, rng=None)).nbytes
    dist.barrier()
    return nbytes, of_plain, of_sharded


def test_what_several_ranks_hold_is_shared_out() -> None:
    for nbytes, of_plain, of_sharded in run_ranks(4, shares):
        assert of_plain == pytest.approx(nbytes / 4, rel=0.01)
        assert of_sharded == pytest.approx(nbytes / 4, rel=0.01)
