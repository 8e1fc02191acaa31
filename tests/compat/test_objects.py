"""Objects of the program, of which only they know what their state is made of.

What was saved of them by torch's own calls looks like the state of a module or of an optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as stock_save
from torch.optim import AdamW

import dist_ckpt
from dist_ckpt.dcp import Writer
from tests.older_torch import ALONE


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        yield


class Flat:
    """Two tensors and nothing else."""

    def __init__(self, seed: int) -> None:
        self.content: Any = {"a": torch.full((3,), seed), "b.c": torch.full((2, 2), seed + 1.0)}

    def state_dict(self) -> Any:
        return self.content

    def load_state_dict(self, state: Any) -> None:
        assert like(state, type(self)(SAVED).state_dict())
        self.content = state


class Nested(Flat):
    """Tensors below keys that are no text, in lists and in tuples."""

    def __init__(self, seed: int) -> None:
        tensors = [torch.full((n,), float(seed)) for n in range(1, 5)]
        self.content = {
            "shadow": {0: tensors[0], 1: tensors[1]},
            "window": [tensors[2]],
            "pair": (tensors[3], torch.full((1,), seed)),
        }


class Alone(Flat):
    """One list of tensors: a key with keys below it, and nothing beside."""

    def __init__(self, seed: int) -> None:
        self.content = {"window": [torch.full((2,), seed), torch.full((1,), seed)]}


class Average(Flat):
    """Empty before it was used for the first time."""

    def __init__(self, seed: int) -> None:
        self.content = {"of": {"layer.weight": torch.ones(2)}} if seed == SAVED else {}


class Settable:
    """The other two names."""

    def __init__(self, seed: int) -> None:
        self.content = {"a": torch.full((3,), seed)}

    def get_state(self) -> Any:
        return self.content

    def set_state(self, state: Any) -> None:
        self.content = state


class Wrapped:
    """An optimizer with something around it; its state has numbers for keys."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.optimizer = AdamW(self.model.parameters(), lr=0.1 * seed)
        if seed == SAVED:  # a fresh one has no moments
            torch.autograd.backward(self.model(torch.ones(1, 3)).sum())
            self.optimizer.step()

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)


class App(Wrapped):
    """What torch's documentation recommends: model and optimizer as one."""

    def state_dict(self) -> Any:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optim": moments}

    def load_state_dict(self, state: Any) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


SAVED, FRESH = 1, 2
KINDS = (Flat, Nested, Alone, Average, Settable, Wrapped, App)


def state_of(each: Any) -> Any:
    return each.get_state() if isinstance(each, Settable) else each.state_dict()


def like(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(like(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(map(like, first, second))
    return bool(first == second)


def by_writer(state: dict[str, Any], place: Path) -> Path:
    stock_save(state, storage_writer=Writer(place, step=3), **ALONE)
    return place


def by_stock(state: dict[str, Any], place: Path) -> Path:
    stock_save(state, checkpoint_id=place, **ALONE)
    return place


def by_torch(state: dict[str, Any], place: Path) -> Path:
    place.mkdir()
    torch.save(state, place / "state.pt")
    return place / "state.pt"


Write = Callable[[dict[str, Any], Path], Path]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("write", [by_writer, by_stock, by_torch])
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_given_what_it_was(
    kind: type[Any], write: Write, tmp_path: Path, *, strict: bool
) -> None:
    saved, fresh = kind(SAVED), kind(FRESH)
    url = write({"o": state_of(saved)}, tmp_path / "saved")
    report = dist_ckpt.load({"o": fresh, "rng": None}, url, strict=strict)
    assert like(state_of(fresh), state_of(saved))
    assert (report.missing, report.unexpected) == ((), ())


@pytest.mark.parametrize("write", [by_writer, by_stock, by_torch])
def test_several_beside_a_model_and_values(write: Write, tmp_path: Path) -> None:
    saved = {kind.__name__: kind(SAVED) for kind in KINDS}
    model = nn.Linear(3, 2)
    plain = {name: state_of(each) for name, each in saved.items()}
    url = write({**plain, "model": model.state_dict(), "epoch": 7}, tmp_path / "saved")
    fresh: dict[str, Any] = {kind.__name__: kind(FRESH) for kind in KINDS}
    state = {**fresh, "model": nn.Linear(3, 2), "epoch": 0, "rng": None}
    dist_ckpt.load(state, url)
    assert all(like(state_of(fresh[name]), plain[name]) for name in plain)
    assert state["epoch"] == 7
    assert like(dict(state["model"].state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_what_the_writer_saved(kind: type[Any], tmp_path: Path) -> None:
    saved, fresh = kind(SAVED), kind(FRESH)
    by_writer({"o": state_of(saved)}, tmp_path / "run")
    with dist_ckpt.Checkpointer(tmp_path / "run", {"o": fresh, "rng": None}) as ckpt:
        assert ckpt.restore() == 3
        assert like(state_of(fresh), state_of(saved))
        ckpt.save(4)
    again = kind(FRESH)
    assert dist_ckpt.load({"o": again, "rng": None}, tmp_path / "run").step == 4
    assert like(state_of(again), state_of(saved))


@pytest.mark.parametrize("write", [by_writer, by_stock, by_torch])
def test_an_object_under_another_name(write: Write, tmp_path: Path) -> None:
    saved = Wrapped(SAVED)
    url = write({"optim": saved.state_dict(), "old": Flat(SAVED).state_dict()}, tmp_path / "saved")
    fresh, other = Wrapped(FRESH), Flat(FRESH)
    state = {"optimizer": fresh, "new": other, "rng": None}
    dist_ckpt.load(state, url, rename={"old": "new"})
    assert like(fresh.state_dict(), saved.state_dict())
    assert like(other.content, Flat(SAVED).content)


@pytest.mark.parametrize("write", [by_writer, by_stock, by_torch])
def test_a_dict_that_is_empty_yet(write: Write, tmp_path: Path) -> None:
    content = {"of": {"layer.weight": torch.ones(2)}}
    fresh: dict[str, Any] = {}
    url = write({"average": content}, tmp_path / "saved")
    dist_ckpt.load({"average": fresh, "rng": None}, url)
    assert like(fresh, content)


def test_parts_of_an_object_are_found_by_whoever_has_them(tmp_path: Path) -> None:
    saved, fresh = App(SAVED), App(FRESH)
    by_writer({"app": saved}, tmp_path / "run")
    state = {"model": fresh.model, "optimizer": fresh.optimizer, "rng": None}
    dist_ckpt.load(state, tmp_path / "run")
    assert like(fresh.state_dict(), saved.state_dict())
