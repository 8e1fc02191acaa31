"""Loads of several ranks: one outcome for all, whatever one of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_ckpt
from dist_ckpt.errors import CheckpointError, IncompatibleError, UsageError
from dist_ckpt.testing.ranks import run_ranks

WORLD = 3


def net(layers: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))


def sharded(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def trained() -> dict[str, Any]:
    torch.manual_seed(3)
    model = sharded(net())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach() for p in model.parameters() if isinstance(p, DTensor)]


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [entries["exp_avg"].full_tensor() for entries in optimizer.state.values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) > 0 and all(map(torch.equal, left, right))


def fails(call: Any) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as caught:
        call()
    return type(caught.value).__name__, str(caught.value)


class Late(nn.Module):
    """Refuses its extra state on one rank, after all tensors are in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def get_extra_state(self) -> int:
        """Return something."""
        return 1

    def set_extra_state(self, state: Any) -> None:
        """Fail on rank 1."""
        if dist.get_rank() == 1:
            raise ValueError("rank 1 will not have it")


def check_all(root: str) -> dict[str, tuple[str, str]]:
    """Save once, then try everything; return the errors, which must be the same on all ranks."""
    rank = dist.get_rank()
    errors = {}
    source = trained()
    dist_ckpt.save(source, f"{root}/run", step=1)
    dist_ckpt.save({"late": Late()}, f"{root}/late", step=1)

    model = net()
    run = f"{root}/run"
    for name, keywords in (
        ("strict", {"strict": rank != 1}),
        ("only", {"only": "model" if rank != 2 else "optimizer"}),
        ("rename", {"rename": {"model/0": f"model/{rank}"}}),
        ("step", {"step": 1 if rank == 0 else None}),
        ("unknown", {"stric": True} if rank == 1 else {}),
    ):
        errors[name] = fails(lambda k=keywords: dist_ckpt.load_weights(model, run, **k))
    what: Any = model if rank else [torch.zeros(2)]
    errors["state"] = fails(lambda: dist_ckpt.load_weights(what, run))
    elsewhere = run if rank else f"{root}/late"
    errors["url"] = fails(lambda: dist_ckpt.load_weights(model, elsewhere))

    wider = net() if rank != 1 else nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 6))
    before = [parameter.detach().clone() for parameter in wider.parameters()]
    errors["wider"] = fails(lambda: dist_ckpt.load_weights(wider, run, strict=False))
    for parameter, old in zip(wider.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    errors["late"] = fails(lambda: dist_ckpt.load({"late": Late()}, f"{root}/late"))

    check_meta(source, run)
    check_foreign(source, f"{root}/model.safetensors")
    return errors


def check_foreign(source: dict[str, Any], file: str) -> None:
    """Load what another program wrote, which only rank 0 looks into."""
    expected = whole(source["model"])
    if dist.get_rank() == 0:
        names = source["model"].state_dict()
        save_file(dict(zip(names, expected, strict=True)), file)
    dist.barrier()
    cut = sharded(net())
    report = dist_ckpt.load_weights(cut, file)
    assert same(whole(cut), expected)
    assert (report.save_id, report.verified, report.saved_world_size) == ("safetensors", False, 0)


def check_meta(source: dict[str, Any], run: str) -> None:
    """Load onto meta, plain and sharded, with an optimizer that was built on meta before."""
    with torch.device("meta"):
        plain, cut = net(), net()
    report = dist_ckpt.load_weights(plain, run)
    assert report.nbytes_wanted == sum(p.nbytes for p in plain.parameters())
    for parameter, expected in zip(plain.parameters(), whole(source["model"]), strict=True):
        assert torch.equal(parameter, expected)
    cut = sharded(cut)
    optimizer = torch.optim.AdamW(cut.parameters())
    dist_ckpt.load({"model": cut, "optimizer": optimizer}, run)
    assert same(whole(cut), whole(source["model"]))
    assert same(moments(optimizer), moments(source["optimizer"]))
    for model, adam in ((source["model"], source["optimizer"]), (cut, optimizer)):
        model.zero_grad()
        model(torch.ones(2, 5)).sum().backward()
        adam.step()
    assert same(whole(cut), whole(source["model"])), "they go on alike"


def test_one_outcome_for_all_ranks(tmp_path: Path) -> None:
    results = run_ranks(WORLD, check_all, str(tmp_path))
    assert all(result == results[0] for result in results)
    errors = results[0]
    for name, says in {
        "strict": "strict is True on rank 0 and False on rank 1",
        "only": "only is ('model',) on rank 0 and ('optimizer',) on rank 2",
        "rename": "rename is 1 names",
        "step": "rank 0: 1, rank 1: None",
        "unknown": "unknown option 'stric'",
        "url": "rank 0: ",
        "state": "not a list",
    }.items():
        assert errors[name][0] == UsageError.__name__, errors[name]
        assert says in errors[name][1]
    assert errors["wider"][0] == IncompatibleError.__name__
    assert "model/1.weight: stored float32[5, 5], wanted float32[6, 5]" in errors["wider"][1]
    assert "nothing was changed" in errors["wider"][1]
    assert "rank 1 will not have it" in errors["late"][1]
    assert "may be partly restored" in errors["late"][1]


def going_back_on_some(root: str, giver: int) -> list[Any]:
    """Go back on all ranks, where one alone gives up what is newer; return what each was told."""
    state = {"progress": {"at": 0}}
    with dist_ckpt.Checkpointer(root, state, every_steps=1, timeout_seconds=60) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            state["progress"]["at"] = step
            ckpt.step(step)
        told = fails(lambda: ckpt.restore(step=1, discard_newer=dist.get_rank() == giver))
        at = state["progress"]["at"]
        # Nothing was given up, and all of them may go on together.
        return [*told, at, ckpt.restore()]


@pytest.mark.parametrize("giver", [0, 1])
def test_all_ranks_give_up_or_none(tmp_path: Path, giver: int) -> None:
    found = run_ranks(2, going_back_on_some, str(tmp_path), giver)
    for kind, message, at, newest in found:
        assert kind == "UsageError"
        assert "the ranks make different calls" in message
        assert f"restore(step=1, discard_newer=True) on rank {giver}" in message
        assert f"restore(step=1) on rank {1 - giver}" in message
        assert (at, newest) == (3, 3)
