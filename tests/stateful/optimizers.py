"""Optimizers of torch and of others, schedulers, and a training so small that all can be tried."""

from __future__ import annotations

import importlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler as sched
from torch.optim.swa_utils import SWALR

import dist_ckpt

Make = Callable[[nn.Module], Any]

STEPS = 3


def third_party(name: str) -> Any:
    """Import a package that warns when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def torch_optimizers() -> dict[str, Make]:
    """Every optimizer that torch has, with the options that make it keep more."""
    found: dict[str, Make] = {
        name: _plain(each)
        for name, each in vars(torch.optim).items()
        if inspect.isclass(each)
        and issubclass(each, torch.optim.Optimizer)
        and name not in ("Optimizer", "SparseAdam", "Muon")
    }
    if hasattr(torch.optim, "Muon"):
        found["Muon"] = lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2])
    found["SparseAdam"] = lambda m: torch.optim.SparseAdam(m.parameters())
    found["SGD momentum"] = lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)
    found["AdamW amsgrad"] = lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True)
    found["AdamW tensor lr"] = lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01))
    found["RMSprop all"] = lambda m: torch.optim.RMSprop(
        m.parameters(), momentum=0.9, centered=True
    )
    found["LBFGS search"] = lambda m: torch.optim.LBFGS(
        m.parameters(), history_size=4, line_search_fn="strong_wolfe"
    )
    return found


PO, FREE, BITS = "pytorch_optimizer", "schedulefree", "bitsandbytes"


def foreign_optimizers() -> dict[str, Make]:
    """Optimizers of pytorch_optimizer, schedulefree and bitsandbytes: those of each kind.

    The packages are imported when one is made: that takes seconds, and not every process needs it.
    """
    found = {
        f"po.{name}": _of(PO, name)
        for name in (
            *("Lion", "AdEMAMix", "ADOPT", "Adan", "Prodigy", "Shampoo", "SOAP", "SPlus", "CAME"),
            *("StableSPAM", "AggMo", "FTRL", "ScheduleFreeAdamW", "Kron", "GrokFastAdamW"),
        )
    }
    around = ("Lookahead", "TRAC", "OrthoGrad", "ScheduleFreeWrapper")
    found |= {f"po.{name}": _around(PO, name, torch.optim.AdamW) for name in around}
    found |= {f"po.{name}": _sharp(name) for name in ("SAM", "LookSAM", "WSAM")}
    return {
        **found,
        "free.AdamW": _of(FREE, "AdamWScheduleFree"),
        "free.RAdam": _of(FREE, "RAdamScheduleFree"),
        "free.SGD": _of(FREE, "SGDScheduleFree"),
        "free.Wrapper": _around(FREE, "ScheduleFreeWrapper", torch.optim.SGD),
        "bits.AdamW8bit": _of(BITS, "optim.AdamW8bit", min_8bit_size=1),
        "bits.Adam": _of(BITS, "optim.Adam"),
        "bits.Lion8bit": _of(BITS, "optim.Lion8bit", min_8bit_size=1),
    }


def every_foreign_optimizer() -> dict[str, Make]:
    """All that pytorch_optimizer and bitsandbytes have, whether or not they run here."""
    po, bits = map(third_party, (PO, BITS))
    found: dict[str, Make] = {}
    for name in po.get_supported_optimizers():
        found[f"po.{name}"] = _plain(po.load_optimizer(name))
    for name, each in vars(bits.optim).items():
        if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer):
            found[f"bits.{name}"] = _plain(each)
    return found


def schedulers() -> dict[str, Callable[[Any], Any]]:
    """Every scheduler that torch has, and some made of others."""
    return {
        "LambdaLR": lambda o: sched.LambdaLR(o, lambda step: 0.9**step),
        "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda step: 0.9),
        "StepLR": lambda o: sched.StepLR(o, 2),
        "MultiStepLR": lambda o: sched.MultiStepLR(o, [2, 5]),
        "ConstantLR": lambda o: sched.ConstantLR(o, total_iters=4),
        "LinearLR": lambda o: sched.LinearLR(o, total_iters=4),
        "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.8),
        # Never down to a rate of 0: there the line search of torch's LBFGS divides by zero.
        "PolynomialLR": lambda o: sched.PolynomialLR(o, total_iters=7, power=2.0),
        "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 5, eta_min=0.001),
        "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 2, 2),
        "CyclicLR": lambda o: sched.CyclicLR(o, 0.001, 0.1, step_size_up=2, cycle_momentum=False),
        "CyclicLR momentum": lambda o: sched.CyclicLR(o, 0.001, 0.1, step_size_up=2),
        "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.1, total_steps=12),
        "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, patience=0, threshold=10.0),
        "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=4),
        "SequentialLR": lambda o: sched.SequentialLR(
            o, [sched.LinearLR(o, total_iters=2), sched.CosineAnnealingLR(o, 6)], milestones=[2]
        ),
        "ChainedScheduler": lambda o: sched.ChainedScheduler(
            [sched.ConstantLR(o, total_iters=4), sched.ExponentialLR(o, 0.9)]
        ),
    }


def train(model: nn.Module, optimizer: Any, steps: range, scheduler: Any = None) -> None:
    """Train on data that the number of the step makes."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in steps:
        # All of them: some optimizers draw, one of them from numpy.
        torch.manual_seed(step)
        np.random.seed(step)
        random.seed(step)
        x = torch.randn(5, 4)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(x).square().sum()  # noqa: B023 - called in this step
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss = closure()
        if isinstance(optimizer, torch.optim.LBFGS) or "SAM" in type(optimizer).__name__:
            optimizer.step(closure)
        elif isinstance(optimizer, torch.optim.SparseAdam):
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad = parameter.grad.to_sparse()
            optimizer.step()  # type: ignore[no-untyped-call]
        else:
            optimizer.step()
        if isinstance(scheduler, sched.ReduceLROnPlateau):
            scheduler.step(loss.detach())
        elif scheduler is not None:
            scheduler.step()


def bits_of(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of what this rank has of the parameters."""
    with torch.no_grad():
        return [
            (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
            for p in model.parameters()
        ]


def resumed_as_if_not_stopped(
    root: Path,
    make: Make,
    make_model: Callable[[int], nn.Module] = net,
    schedule: Callable[[Any], Any] | None = None,
) -> None:
    """Train 3, save, build anew, load, train 3; compare every bit with 6 at a stretch."""
    built: list[tuple[nn.Module, Any, Any]] = []
    for seed in (0, 0, 1):
        model = make_model(seed)
        optimizer = make(model)
        built.append((model, optimizer, schedule(optimizer) if schedule else None))
    (whole, first, its), (cut, second, other), (fresh, third, new) = built
    train(whole, first, range(2 * STEPS), its)
    train(cut, second, range(STEPS), other)
    dist_ckpt.save(_state(cut, second, other), root)
    if hasattr(third, "train"):
        third.train()
    dist_ckpt.load(_state(fresh, third, new), root)
    train(fresh, third, range(STEPS, 2 * STEPS), new)
    for mine, theirs in zip(bits_of(fresh), bits_of(whole), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def _state(model: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    parts = {"model": model, "optimizer": optimizer}
    return parts if scheduler is None else {**parts, "scheduler": scheduler}


def _of(package: str, name: str, **options: Any) -> Make:
    def make(model: nn.Module) -> Any:
        cls = attrgetter(name)(third_party(package))
        return cls(model.parameters(), **_rate(cls), **options)

    return make


def _around(package: str, name: str, inner: Any) -> Make:
    return lambda model: getattr(third_party(package), name)(inner(model.parameters(), lr=0.01))


def _sharp(name: str) -> Make:
    def make(model: nn.Module) -> Any:
        models = [model] if name == "WSAM" else []
        cls = getattr(third_party(PO), name)
        return cls(*models, model.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9)

    return make


def _plain(cls: Any) -> Make:
    return lambda model: cls(model.parameters(), **_rate(cls))


def _rate(cls: Any) -> dict[str, float]:
    parameters: Iterator[str] = iter(inspect.signature(cls).parameters)
    return {"lr": 0.01} if "lr" in parameters else {}
