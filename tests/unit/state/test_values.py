"""Plain values and anything with a state dict."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as lrs
from torch.optim.lr_scheduler import LRScheduler

from dist_ckpt.errors import FencedError, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.part import Stored, TensorSpec
from dist_ckpt.state.values import StatefulPart, ValuePart
from tests.unit.state.roundtrip import Saved, assert_same, load, save

# ------------------------------------------------------------------ plain values


@pytest.mark.parametrize("value", [None, 3, 0.1, "text", (1, [2]), float("inf")])
def test_a_plain_value_is_replaced(value: object) -> None:
    part = ValuePart("before", name="x")
    load(part, save(ValuePart(value, name="x")))
    assert part.value == value


@pytest.mark.parametrize(
    ("live", "stored"),
    [
        ({"old": 1}, {"b": 1, "a": [2]}),
        (OrderedDict(old=1), OrderedDict(b=1, a=2)),
        (Counter("old"), Counter("banana")),
        ([1, 2], [[3], 4, 5]),
        ({1}, {2, 3}),
        (np.zeros(2), np.array([1.5, np.inf])),
        (torch.zeros(2), torch.tensor([1.5, -0.0])),
        (nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_can_change_is_changed_in_place(live: Any, stored: Any) -> None:
    part = ValuePart(live, name="x")
    load(part, save(ValuePart(stored, name="x")))
    assert str(live) == str(stored)
    assert list(live) == list(stored)
    assert part.value is live


@pytest.mark.parametrize(
    ("live", "stored"),
    [
        ([1], {"a": 1}),
        (np.zeros(2), np.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int8)),
    ],
)
def test_one_of_another_type_or_shape_is_replaced(live: Any, stored: Any) -> None:
    part = ValuePart(live, name="x")
    load(part, save(ValuePart(stored, name="x")))
    assert part.value is not live
    assert repr(part.value) == repr(stored)


def test_what_was_captured_is_the_value_of_that_moment() -> None:
    value: dict[str, Any] = {"history": [1], "array": np.zeros(2), "n": 1}
    saved = save(ValuePart(value, name="stats"))
    value["history"].append(2)
    value["array"][0] = 7
    value["n"] += 1
    load(ValuePart(value, name="stats"), saved)
    assert value["history"] == [1]
    assert value["array"].tolist() == [0, 0]
    assert value["n"] == 1


def test_tensors_are_laid_out_as_the_live_ones() -> None:
    live = {"w": torch.zeros(3, 2).t(), "gone": torch.zeros(1)}
    saved = save(
        ValuePart({"w": torch.ones(2, 3, dtype=torch.float64), "new": torch.ones(4)}, name="x")
    )
    part = ValuePart(live, name="x")
    targets = part.targets(saved.stored())
    assert targets.tensors.keys() == {"value.w", "value.new"}
    assert targets.tensors["value.w"].stride() == live["w"].stride()
    assert targets.tensors["value.w"].dtype == torch.float64
    load(part, saved)
    assert live["w"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert "gone" not in live


def test_an_unknown_type_is_named_by_the_part() -> None:
    with pytest.raises(UsageError, match=r"cannot store stats\.history\[3\]\.fn"):
        ValuePart({"history": [1, 2, 3, {"fn": print}]}, name="stats").capture()


def test_names_are_compared() -> None:
    part = ValuePart(1, name="x")
    absent = part.targets(Stored({"t": TensorSpec("int8", ())}, {"other": b"1"}, 0, 1, 1))
    assert (absent.missing, absent.unexpected) == (["value"], ["other", "t"])
    more = part.targets(Stored({"t": TensorSpec("int8", ())}, {"value": b"1", "o": b"1"}, 0, 1, 1))
    assert (more.missing, more.unexpected) == ([], ["o", "t"])
    saved = save(ValuePart([torch.zeros(1)], name="x"))
    holed = part.targets(Saved({}, saved.objects).stored())
    assert holed.missing == ["value.0"]
    with pytest.raises(IntegrityError, match="stored value x has a bad 'tensor'"):
        part.restore(Saved({}, saved.objects).stored(), {})


def test_a_lenient_load_leaves_the_value() -> None:
    part = ValuePart(1, name="x")
    part.restore(Stored({}, {}, 0, 1, 1), {})
    assert part.value == 1


# ------------------------------------------------------------------ per rank


def test_a_per_rank_value_keeps_its_tensors_inside() -> None:
    value: dict[str, Any] = {"noise": torch.randn(3), "cursor": 5}
    captured = ValuePart(value, name="mine", per_rank=True).capture()
    assert captured.per_rank
    assert captured.tensors == {}
    other: dict[str, Any] = {}
    load(ValuePart(other, name="mine", per_rank=True), Saved({}, captured.objects), world_size=4)
    assert torch.equal(other["noise"], value["noise"])


def test_per_rank_values_of_other_ranks_are_refused_by_name() -> None:
    part = ValuePart({"cursor": 5}, name="mine", per_rank=True)
    stored = save(part).stored(rank=2, world_size=3, saved=2)
    with pytest.raises(IncompatibleError, match=r"mine is kept per rank.* 2 ranks .* 3 now"):
        part.targets(stored)
    whole = ValuePart({"cursor": 6}, name="mine")
    assert whole.targets(stored).missing == []


# ------------------------------------------------------------------ anything with a state dict


def sequential(optimizer: SGD) -> LRScheduler:
    warm = lrs.LinearLR(optimizer, 0.1, total_iters=3)
    return lrs.SequentialLR(optimizer, [warm, lrs.CosineAnnealingLR(optimizer, 9)], [3])


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.7, total_steps=20),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 9),
    "warm restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "multi step": lambda o: lrs.MultiStepLR(o, [2, 4, 4]),
    "sequential": sequential,
    "chained": lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 2), lrs.ExponentialLR(o, 0.9)]),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.1, 0.5, step_size_up=3),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # of SequentialLR in torch 2.6
def test_schedulers_go_on_where_they_were(make: Any) -> None:
    def build() -> tuple[SGD, LRScheduler]:
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
        return optimizer, make(optimizer)

    def advance(optimizer: SGD, scheduler: LRScheduler, times: int) -> list[float]:
        rates = []
        for _ in range(times):
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = build()
    advance(optimizer, scheduler, 4)
    saved = save(StatefulPart(scheduler, name="scheduler"))
    other_optimizer, other = build()
    load(StatefulPart(other, name="scheduler"), saved)
    for key, value in optimizer.param_groups[0].items():
        if key != "params":
            other_optimizer.param_groups[0][key] = value
    assert_same(save(StatefulPart(other, name="scheduler")), saved)
    assert advance(other_optimizer, other, 5) == advance(optimizer, scheduler, 5)


def test_plateau_and_scaler_come_back() -> None:
    plateau = lrs.ReduceLROnPlateau(SGD([nn.Parameter(torch.zeros(1))], lr=0.3), patience=1)
    for loss in (3.0, 2.0, 2.5, float("nan")):
        plateau.step(loss)
    again = lrs.ReduceLROnPlateau(SGD([nn.Parameter(torch.zeros(1))], lr=0.3), patience=1)
    load(StatefulPart(again, name="plateau"), save(StatefulPart(plateau, name="plateau")))
    assert again.state_dict() == plateau.state_dict()
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    other = torch.amp.GradScaler("cpu")
    load(StatefulPart(other, name="scaler"), save(StatefulPart(scaler, name="scaler")))
    assert other.get_scale() == 3.0


class Counting:
    """Counts, and keeps a tensor, and refuses odd counts."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.sums = torch.full((3,), float(n))

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["n"] == 13:
            raise FencedError("stop")
        if state["n"] % 2:
            raise ValueError("odd")
        self.n, self.sums = state["n"], state["sums"]


def test_what_state_dict_returned_is_given_to_load_state_dict() -> None:
    other = Counting(0)
    old = other.sums
    load(StatefulPart(other, name="c"), save(StatefulPart(Counting(4), name="c")))
    assert other.n == 4
    assert other.sums.tolist() == [4, 4, 4]
    assert old.tolist() == [0, 0, 0]  # targets are fresh: nothing live changes before restore


class Prompt:
    """Learns a parameter and a plain tensor, and takes over what it is given."""

    def __init__(self, value: float, frozen: bool) -> None:
        self.learned = nn.Parameter(torch.full((3,), value), requires_grad=not frozen)
        self.scale = torch.full((2,), value, requires_grad=True)
        self.seen = torch.full((2,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"learned": self.learned, "also": [self.learned, self.scale], "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learned, self.seen = state["learned"], state["seen"]
        assert state["also"][0] is self.learned
        self.scale = state["also"][1]


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_learned_goes_on_being_learned(frozen: bool) -> None:
    other = Prompt(0.0, frozen)
    load(StatefulPart(other, name="prompt"), save(StatefulPart(Prompt(4.0, frozen), name="prompt")))
    assert type(other.learned) is nn.Parameter
    assert other.learned.requires_grad is not frozen
    assert other.scale.requires_grad
    assert not other.seen.requires_grad
    for each in (other.learned, other.scale, other.seen):
        assert each.is_leaf
        assert set(each.tolist()) == {4}


def test_an_object_that_has_no_memory_yet_is_refused_by_name() -> None:
    saved = save(StatefulPart(Counting(4), name="meter"))
    with torch.device("meta"):
        bare = Counting(0)
    with pytest.raises(UsageError, match=r"meter\.sums"):
        load(StatefulPart(bare, name="meter"), saved)


def test_a_refusal_names_part_and_class_and_our_own_errors_pass() -> None:
    part = StatefulPart(Counting(0), name="meter")
    with pytest.raises(IncompatibleError, match=r"meter: Counting\.load_state_dict refused.* odd"):
        load(part, save(StatefulPart(Counting(3), name="meter")))
    with pytest.raises(FencedError, match="stop"):
        load(part, save(StatefulPart(Counting(13), name="meter")))


def test_malformed_objects_are_damage() -> None:
    with pytest.raises(IntegrityError, match="stored value x"):
        ValuePart(1, name="x").targets(Stored({}, {"value": b"{"}, 0, 1, 1))
    good = encode(1, path="x")
    ValuePart(1, name="x").targets(Stored({}, {"value": good}, 0, 1, 1))
