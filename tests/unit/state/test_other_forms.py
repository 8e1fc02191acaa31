"""Optimizers that were stored in another form than their own: nothing of it is damage."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as stock_save
from torch.optim import SGD, Adafactor, AdamW

import dist_ckpt
from dist_ckpt.dcp import Writer
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Stored
from tests.distributed.layouts import same_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it compiles by what it says not to use any more
    from torch.distributed.optim.apply_optimizer_in_backward import (
        _apply_optimizer_in_backward,
        _get_in_backward_optimizers,
    )

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
Trained = tuple[nn.Sequential, Any]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        yield


def net(*, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def one(kind: Any = AdamW, *, seed: int = 0, **options: Any) -> Trained:
    model = net(seed=seed)
    return model, kind(model.parameters(), lr=0.1, **options)


def members(optimizer: Any) -> list[Any]:
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    return list(optimizer.values() if isinstance(optimizer, dict) else optimizer)


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(1, 4)).sum().backward()
    for each in members(optimizer):
        if any(p.grad is not None for group in each.param_groups for p in group["params"]):
            each.step()


def kept(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return what is kept for each parameter, and its rate, by the name of the parameter."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for each in members(optimizer):
            for group in each.param_groups:
                if any(parameter is p for p in group["params"]):
                    found |= {f"{name}.{k}": v for k, v in each.state.get(parameter, {}).items()}
                    found[f"{name}.lr"] = group["lr"]
    return found


def alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        same_bits(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def named(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def flat(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    return {"model": weights, "optim": moments}


def in_app(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"app": {"model": weights, "optim": moments}}


def at_the_top(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    return {**weights, "optimizer": moments}


def numbered(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def by_convention(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    moments = {"optimizer_state_dict": optimizer.state_dict()}
    return {"model_state_dict": model.state_dict(), **moments}


def in_a_list(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}


FORMS = (named, flat, in_app, at_the_top, numbered, by_convention, in_a_list)


def by_writer(state: dict[str, Any], place: Path) -> Path:
    stock_save(state, storage_writer=Writer(place / "run", step=7))
    return place / "run"


def by_stock(state: dict[str, Any], place: Path) -> Path:
    stock_save(state, checkpoint_id=place / "stock")
    return place / "stock"


def by_torch(state: dict[str, Any], place: Path) -> Path:
    torch.save(state, place / "file.pt")
    return place / "file.pt"


@pytest.mark.parametrize("write", [by_writer, by_stock, by_torch])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(AdamW, {}), (SGD, {})],
)
def test_every_form_loads(write: Any, kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    saved = one(kind, **options)
    step(*saved)
    for form in FORMS:
        place = tmp_path / form.__name__
        place.mkdir()
        url = write({**form(*saved), "epoch": 3, "history": [1, 0.5]}, place)
        model, optimizer = one(kind, seed=1, **options)
        state = {"model": model, "optimizer": optimizer, "epoch": 0, "history": [], "rng": None}
        dist_ckpt.load(state, url)
        assert all(map(same_bits, saved[0].state_dict().values(), model.state_dict().values()))
        assert alike(kept(*saved), kept(model, optimizer)), form
        assert (state["epoch"], state["history"]) == (3, [1, 0.5])
        weights = net(seed=1)
        assert dist_ckpt.load_weights(weights, url).parts == ("model",)
        with dist_ckpt.open_checkpoint(url) as opened:
            assert any(part.startswith("optim") for part in opened.parts)


def test_a_restore_goes_on_from_a_run_of_the_writer(tmp_path: Path) -> None:
    saved = one()
    step(*saved)
    for form in (named, flat, in_app):
        url = tmp_path / form.__name__
        stock_save(form(*saved), storage_writer=Writer(url, step=7))
        model, optimizer = one(seed=1)
        state = {"model": model, "optimizer": optimizer, "rng": None}
        with dist_ckpt.Checkpointer(url, state) as ckpt:
            assert ckpt.restore() == 7
            assert ckpt.restored is not None
            assert ckpt.restored.verified
            assert alike(kept(*saved), kept(model, optimizer))
            ckpt.save(8)
        fresh = one(seed=2)
        dist_ckpt.load({"model": fresh[0], "optimizer": fresh[1], "rng": None}, url)
        assert alike(kept(*saved), kept(*fresh))


def test_an_optimizer_alone_and_a_copy_of_its_state(tmp_path: Path) -> None:
    saved = one()
    step(*saved)
    urls = [write(saved[1].state_dict(), tmp_path) for write in (by_torch, by_stock, by_writer)]
    dist_ckpt.save({"optimizer": saved[1].state_dict(), "rng": None}, tmp_path / "copy")
    for url in (*urls, tmp_path / "copy"):
        model, optimizer = one(seed=1)
        dist_ckpt.load({"model": model, "optimizer": optimizer}, url, only=["optimizer"])
        assert alike(kept(*saved), kept(model, optimizer)), url


def groups_of(model: nn.Sequential, *, backwards: bool = False) -> Any:
    listed = [{"params": list(layer.parameters()), "lr": 0.1 * i} for i, layer in enumerate(model)]
    return AdamW(listed[::-1] if backwards else listed)


def test_numbers_that_cannot_be_the_live_parameters_are_refused(tmp_path: Path) -> None:
    saved = one()
    step(*saved)
    url = by_torch(numbered(*saved), tmp_path)
    model = net(seed=1)
    others: list[tuple[Any, str]] = [
        (AdamW([*model.parameters()][::-1]), "another order.*state of shape"),
        (groups_of(model), r"in groups of \[4\].*\[2, 2\]"),
        ([AdamW(each.parameters()) for each in model], "of one optimizer, and there are 2"),
    ]
    for optimizer, says in others:
        before = copy.deepcopy(model.state_dict())
        state = {"model": model, "optimizer": optimizer, "rng": None}
        with pytest.raises(IncompatibleError, match=says) as caught:
            dist_ckpt.load(state, url)
        assert "skip=['optimizer']" in str(caught.value)
        assert all(map(same_bits, before.values(), model.state_dict().values()))
        dist_ckpt.load(state, url, skip=["optimizer"])


@pytest.mark.parametrize("groups", [[["0x", 1]], [["weight"], [1]], [[0, "bias"]]])
def test_numbers_beside_names_are_refused(groups: list[list[Any]]) -> None:
    model = nn.Linear(2, 2)
    part = OptimizerPart(AdamW(model.parameters()), models=[ModelPart(model)])
    options = decode(part.capture().objects["param_groups.weight"], tensors={})
    objects = {
        f"param_groups.{params[0]}": encode({**options, "params": params}, path="group")
        for params in groups
    }
    stored = Stored({}, objects, rank=0, world_size=1, saved_world_size=1)
    with pytest.raises(IncompatibleError, match="beside names"):
        part.targets(stored)


@pytest.mark.parametrize("write", [by_writer, by_stock, by_torch])
@pytest.mark.parametrize("form", [flat, named, numbered])
@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (AdamW, SGD),
        (SGD, AdamW),
        (AdamW, torch.optim.RMSprop),
        (torch.optim.NAdam, torch.optim.Adam),
        (torch.optim.Adam, torch.optim.NAdam),
        (torch.optim.Adagrad, torch.optim.Adadelta),
    ],
)
def test_the_state_of_another_optimizer_is_refused_by_its_options(
    write: Any, form: Any, kind: Any, other: Any, tmp_path: Path
) -> None:
    source = one(kind)
    torch.optim.lr_scheduler.CyclicLR(source[1], 0.1, 0.2, cycle_momentum=False)
    step(*source)
    place = write(form(*source), tmp_path)
    model, optimizer = one(other, seed=1)
    with pytest.raises(IncompatibleError, match=r"of another kind: optimizer: saved by what has"):
        dist_ckpt.load({"model": model, "optimizer": optimizer, "rng": None}, place)
    target = one(kind, seed=1)  # which has none of the options that a scheduler adds
    dist_ckpt.load({"model": target[0], "optimizer": target[1], "rng": None}, place)
    assert alike(kept(*target), kept(*source))


def test_names_beside_the_numbers_are_gone_by(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.named_parameters())
    step(model, optimizer)
    url = by_torch(numbered(model, optimizer), tmp_path)
    fresh = net(seed=1)
    backwards = AdamW([*fresh.parameters()][::-1])
    dist_ckpt.load({"model": fresh, "optimizer": backwards, "rng": None}, url)
    assert alike(kept(model, optimizer), kept(fresh, backwards))


def test_statistics_of_rows_and_columns_fit_their_parameter(tmp_path: Path) -> None:
    saved = one(Adafactor)
    step(*saved)
    for write in (by_torch, by_writer):
        model, optimizer = one(Adafactor, seed=1)
        url = write(numbered(*saved), tmp_path)
        dist_ckpt.load({"model": model, "optimizer": optimizer, "rng": None}, url)
        assert alike(kept(*saved), kept(model, optimizer))


def test_rates_that_are_tensors(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.25))
    step(model, optimizer)
    for form in (named, numbered, in_a_list):
        for write in (by_torch, by_stock, by_writer):
            place = tmp_path / f"{form.__name__}-{write.__name__}"
            place.mkdir()
            url = write(form(model, optimizer), place)
            fresh = net(seed=1)
            live = AdamW(fresh.parameters(), lr=torch.tensor(0.5))
            dist_ckpt.load({"model": fresh, "optimizer": live, "rng": None}, url)
            assert alike(kept(model, optimizer), kept(fresh, live)), url


def in_backward(*, seed: int = 0) -> Trained:
    model = net(seed=seed)
    _apply_optimizer_in_backward(AdamW, model.parameters(), {"lr": 0.1})
    return model, _get_in_backward_optimizers(model)


def by_parameter(*, seed: int = 0) -> Trained:
    model = net(seed=seed)
    return model, {parameter: AdamW([parameter], lr=0.1) for parameter in model.parameters()}


def two(*, seed: int = 0) -> Trained:
    model = net(seed=seed)
    return model, [AdamW(layer.parameters(), lr=0.1) for layer in model]


def two_named(*, seed: int = 0) -> Trained:
    model, optimizers = two(seed=seed)
    return model, dict(zip("ba", reversed(optimizers), strict=True))


@pytest.mark.parametrize("build", [in_backward, by_parameter, two, two_named, one])
def test_several_are_what_one_is(build: Callable[..., Trained], tmp_path: Path) -> None:
    saved = build()
    step(*saved)
    given = members(saved[1])
    urls = [tmp_path / "ours", *(tmp_path / form.__name__ for form in (named, flat))]
    dist_ckpt.save({"model": saved[0], "optimizer": saved[1], "rng": None}, urls[0])
    for form, url in zip((named, flat), urls[1:], strict=True):
        stock_save(form(saved[0], given), storage_writer=Writer(url))
    for url in urls:
        for other in (in_backward, by_parameter, two, two_named, one):
            model, optimizer = other(seed=1)
            dist_ckpt.load({"model": model, "optimizer": optimizer, "rng": None}, url)
            assert len(kept(model, optimizer)) == 16
            assert alike(kept(*saved), kept(model, optimizer)), (url, other)


def test_what_steps_in_the_backward_pass_is_one_part(tmp_path: Path) -> None:
    model, optimizers = in_backward()
    step(model, optimizers)
    dist_ckpt.save({"model": model, "optimizer": optimizers}, tmp_path)
    with dist_ckpt.open_checkpoint(tmp_path) as opened:
        assert "optimizer/state.0.weight.exp_avg" in opened.names
    # Whatever the order, and whoever has a parameter that is in none of the models.
    fresh, others = in_backward(seed=1)
    dist_ckpt.load({"model": fresh, "optimizer": others[::-1]}, tmp_path)
    assert alike(kept(model, optimizers), kept(fresh, others))
    with pytest.raises(UsageError, match="in no part"):
        dist_ckpt.save({"model": net(), "optimizer": others}, tmp_path, step=1)


def test_a_state_dict_that_was_kept_as_one_value(tmp_path: Path) -> None:
    saved = one()
    step(*saved)
    whole = DefaultSavePlanner(flatten_state_dict=False)
    for form in (named, numbered):
        url = tmp_path / form.__name__
        stock_save(form(*saved), storage_writer=Writer(url / "run"), planner=whole)
        stock_save(form(*saved), checkpoint_id=url / "stock", planner=whole)
        for place in (url / "run", url / "stock"):
            model, optimizer = one(seed=1)
            dist_ckpt.load({"model": model, "optimizer": optimizer, "rng": None}, place)
            assert all(map(same_bits, saved[0].state_dict().values(), model.state_dict().values()))
            assert alike(kept(*saved), kept(model, optimizer))


def test_a_value_of_no_known_form_says_what_to_write(tmp_path: Path) -> None:
    model, optimizer = one()
    url = by_torch({"model": model.state_dict(), "optimizer": {"moments": torch.ones(3)}}, tmp_path)
    by_hand = {"model": model.state_dict(), "optimizer": {"moments": torch.ones(3), "k": 1}}
    for place in (url, by_writer(by_hand, tmp_path)):
        state = {"model": model, "optimizer": optimizer, "rng": None}
        with pytest.raises(IncompatibleError) as caught:
            dist_ckpt.load(state, place)
        assert "skip=" in str(caught.value)
