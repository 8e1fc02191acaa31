"""Modules are told that they were loaded, as `nn.Module.load_state_dict` tells them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

import dist_ckpt
from dist_ckpt.errors import IncompatibleError
from dist_ckpt.storage.memory import MemoryStore

_stores = count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-told-{next(_stores)}")


def saved(model: nn.Module) -> MemoryStore:
    store = new_store()
    dist_ckpt.save({"model": model}, store)
    return store


def load(model: nn.Module, store: MemoryStore, **options: Any) -> Any:
    return dist_ckpt.load({"model": model}, store, **options)


# ------------------------------------------------------------------ hooks


class Cached(nn.Module):
    """Keeps something that is computed from its weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 2)
        self.calls: list[str] = []
        self.total = 0.0
        itself: Any = self
        itself.register_load_state_dict_post_hook(self._after)

    def _after(self, module: nn.Module, keys: Any) -> None:
        self.calls.append(f"{list(keys.missing_keys)} {list(keys.unexpected_keys)}")
        self.total = float(self.linear.weight.detach().sum())


def test_post_hooks_are_called_once_with_the_loaded_weights() -> None:
    one, two = Cached(1), Cached(2)
    weight = two.linear.weight
    load(nn.Sequential(two), saved(nn.Sequential(one)))
    assert two.calls == ["[] []"]
    assert two.total == float(one.linear.weight.detach().sum())
    assert two.linear.weight is weight
    dist_ckpt.load_weights(two, saved(one))
    assert len(two.calls) == 2


def test_a_restore_tells_modules_behind_wrappers() -> None:
    store = saved(Cached(1))
    model = Cached(2)
    compiled: Any = torch.compile(nn.DataParallel(model), backend="eager")
    load(compiled, store)
    assert model.calls == ["[] []"]


def halving(linear: Any) -> Any:
    def halve(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2

    linear.register_load_state_dict_pre_hook(halve)
    return linear


def test_a_pre_hook_sees_and_changes_what_is_loaded() -> None:
    one: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    two: Any = nn.Sequential(nn.Linear(2, 2), halving(nn.Linear(2, 2)))
    bias = two[1].bias
    load(two, saved(one))
    assert torch.equal(two[0].weight, one[0].weight)
    assert torch.equal(two[1].weight, one[1].weight / 2)
    assert torch.equal(two[1].bias, one[1].bias)
    assert two[1].bias is bias


def test_tied_weights_are_changed_once_by_a_pre_hook_as_by_torch() -> None:
    def scale(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in list(state):
            state[key].mul_(2)

    def tied(seed: int) -> Any:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        return model

    one, two = tied(1), tied(2)
    two.register_load_state_dict_pre_hook(scale)
    load(two, saved(one))
    assert torch.equal(two[0].weight, one[0].weight * 2)


# ------------------------------------------------------------------ names that migrate


def test_weight_norm_of_the_old_kind_loads_into_the_new_one() -> None:
    torch.manual_seed(1)
    with pytest.warns(FutureWarning):
        old: Any = nn.Sequential(old_weight_norm(nn.Linear(3, 4)), nn.Linear(4, 4))
    new: Any = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 4))
    report = load(new, saved(old))
    assert (report.missing, report.unexpected) == ((), ())
    x = torch.ones(2, 3)
    assert torch.equal(new(x), old(x))
    assert torch.equal(new[0].parametrizations.weight.original0, old[0].weight_g)
    # Strict all the same.
    other = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 5)), nn.Linear(5, 4))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(IncompatibleError, match=r"unexpected .*0\.weight_g"):
        load(other, saved(old))
    more = nn.Sequential(*new, nn.Linear(4, 1))
    with pytest.raises(IncompatibleError, match=r"missing .*2\.weight"):
        load(more, saved(old))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_batch_norm_without_a_count_is_what_torch_takes(where: str) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[1].running_mean.fill_(4.0)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    store = new_store()
    dist_ckpt.save({"model": state}, store)
    with torch.device(where):
        other: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    if where == "meta":
        other[1].num_batches_tracked = torch.tensor(0)
    dist_ckpt.load_weights(other, store)
    assert other[1].running_mean.tolist() == [4, 4, 4]
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[1].num_batches_tracked == 0
    del state["1.running_mean"]
    dist_ckpt.save({"model": state}, store, step=1)
    with pytest.raises(IncompatibleError, match=r"missing .*1\.running_mean"):
        dist_ckpt.load_weights(other, store)


class Renamed(nn.Module):
    """Was called otherwise once, and takes its old name by its own method."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.new = nn.Linear(3, 2)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[f"{prefix}new.{key.removeprefix(f'{prefix}old.')}"] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *rest)


class Whole(nn.Module):
    """The same by the method that everybody calls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.new = nn.Linear(3, 2)
        self.calls = 0

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        self.calls += 1
        state = {key.replace("old.", "new."): value for key, value in state.items()}
        return super().load_state_dict(state, strict=strict, assign=assign)


class Fused(nn.Module):
    """Makes one weight of two."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.both = nn.Parameter(torch.randn(4, 2))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}a" in state:
            halves = [state.pop(f"{prefix}{name}") for name in "ab"]
            state[f"{prefix}both"] = torch.cat(halves)
        super()._load_from_state_dict(state, prefix, *rest)


class Old(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.old = nn.Linear(3, 2)


class Halves(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Parameter(torch.randn(2, 2))
        self.b = nn.Parameter(torch.randn(2, 2))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: Old(1), lambda: Renamed(2)),
        (lambda: Old(1), lambda: Whole(2)),
        (lambda: nn.ModuleDict({"x": Old(1)}), lambda: nn.ModuleDict({"x": Renamed(2)})),
        (lambda: Halves(1), lambda: Fused(2)),
        (lambda: Renamed(1), lambda: Renamed(2)),
        (lambda: Whole(1), lambda: Whole(2)),
    ],
)
def test_a_method_of_its_own_takes_what_torch_would_give_it(
    first: Callable[[], nn.Module], second: Callable[[], nn.Module]
) -> None:
    one, two, expected = first(), second(), second()
    expected.load_state_dict(copy.deepcopy(one.state_dict()))
    report = load(two, saved(one))
    assert (report.missing, report.unexpected) == ((), ())
    for name, value in expected.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


def test_an_overridden_load_state_dict_is_called_once_also_behind_a_wrapper() -> None:
    store = saved(Whole(1))
    plain, wrapped = Whole(2), Whole(3)
    load(plain, store)
    load(nn.DataParallel(wrapped), store)
    assert (plain.calls, wrapped.calls) == (1, 1)
    assert torch.equal(wrapped.new.weight, Whole(1).new.weight)


def test_a_method_that_begins_anew_does_not_lose_what_is_loaded() -> None:
    class Anew(nn.Linear):
        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            self.reset_parameters()
            return super().load_state_dict(state, strict, assign)

    class Inner(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            self.reset_parameters()
            super()._load_from_state_dict(*args)

    for kind in (Anew, Inner):
        one, two = kind(2, 2), kind(2, 2)
        load(two, saved(one))
        assert torch.equal(one.weight, two.weight)


def test_a_buffer_that_takes_the_stored_shape_by_its_own_method() -> None:
    def fake() -> Any:
        kind: Any = FakeQuantize
        return kind(observer=PerChannelMinMaxObserver, quant_min=0, quant_max=255, ch_axis=0)

    one, two, expected = fake(), fake(), fake()
    one(torch.randn(5, 3))
    expected.load_state_dict(one.state_dict())
    load(two, saved(one))
    assert two.scale.shape == (5,)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


class Grown(nn.Module):
    """Makes what it is loaded with, as many programs do whose modules grow, and notes it."""

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.bank = nn.ParameterList([torch.randn(3) for _ in range(size)])
        self.loads: list[str] = []

    def make(self, state: Any, prefix: str) -> None:
        size = len([name for name in state if name.startswith(f"{prefix}bank.")])
        self.loads.append(f"{size} of {prefix}")
        self.bank = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(size)])


class GrownByMethod(Grown):
    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.make(state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)


class GrownByHook(Grown):
    def __init__(self, size: int = 0) -> None:
        super().__init__(size)
        register: Any = self.register_load_state_dict_pre_hook
        register(lambda me, state, prefix, *_: me.make(state, prefix))


class GrownWhole(Grown):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        self.make(state, "")
        return super().load_state_dict(state, strict, assign)


@pytest.mark.parametrize("kind", [GrownByMethod, GrownByHook, GrownWhole])
@pytest.mark.parametrize("inside", [False, True])
def test_a_module_that_makes_its_tensors_when_it_is_loaded(kind: Any, inside: bool) -> None:
    def wrapped(module: Any) -> Any:
        return (
            nn.Sequential(module, nn.Linear(2, 2)) if inside and kind is not GrownWhole else module
        )

    one, two, expected = kind(3), kind(1), kind(1)
    torch.manual_seed(3)
    state = wrapped(one).state_dict()
    outer, outer_expected = wrapped(two), wrapped(expected)
    torch.manual_seed(4)
    outer_expected.load_state_dict(state)
    after = torch.get_rng_state()
    store = new_store()
    dist_ckpt.save({"model": state, "rng": None}, store)
    torch.manual_seed(4)
    dist_ckpt.load({"model": outer, "rng": None}, store)
    assert torch.equal(torch.get_rng_state(), after), "what it draws is drawn once"
    assert two.loads == expected.loads, "it is loaded once"
    for name, value in outer_expected.state_dict().items():
        assert torch.equal(value, outer.state_dict()[name]), name


def test_a_module_that_refuses_is_asked_before_anything_changes() -> None:
    class Picky(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            super()._load_from_state_dict(state, prefix, *rest)
            if f"{prefix}extra" in state:
                rest[-1].append("no extra please")

    one = nn.Linear(2, 2)
    one.register_parameter("extra", nn.Parameter(torch.ones(1)))
    two = Picky(2, 2)
    before = copy.deepcopy(two.state_dict())
    with pytest.raises(IncompatibleError, match="nothing was changed"):
        load(two, saved(one))
    assert torch.equal(two.weight, before["weight"])


# ------------------------------------------------------------------ extra state


class Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("first", [None, {"a": 1}, torch.arange(3), {"t": torch.ones(2)}, [1]])
@pytest.mark.parametrize("fresh", [None, {}, torch.zeros(0), {"t": torch.zeros(1)}, "x"])
def test_extra_state_may_be_of_another_kind_than_before(first: Any, fresh: Any) -> None:
    other = nn.Sequential(Extra(fresh))
    report = load(other, saved(nn.Sequential(Extra(first))))
    assert repr(other[0].state) == repr(first)
    assert (report.missing, report.unexpected) == ((), ())


def test_extra_state_may_be_absent_at_first() -> None:
    class Lazily(Extra):
        def _save_to_state_dict(self, state: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(state, prefix, keep_vars)
            if self.state is None:
                del state[f"{prefix}_extra_state"]

    for value in (torch.arange(2), {"n": 3}):
        other = nn.Sequential(Lazily(None))
        load(other, saved(nn.Sequential(Lazily(value))))
        assert repr(other[0].state) == repr(value)
    with pytest.raises(IncompatibleError, match=r"unexpected .*0\._extra_state"):
        load(
            nn.Sequential(nn.ModuleDict({"linear": nn.Linear(1, 1)})),
            saved(nn.Sequential(Extra(1))),
        )


def test_extra_state_and_hooks_together() -> None:
    class Both(Extra):
        def __init__(self, state: Any) -> None:
            super().__init__(state)
            self.seen: list[Any] = []
            itself: Any = self
            itself.register_load_state_dict_post_hook(lambda m, keys: self.seen.append(self.state))

    other = Both(None)
    load(other, saved(Both({"n": 1})))
    assert other.seen == [{"n": 1}]


@pytest.mark.parametrize("migrates", [False, True])
def test_what_a_lenient_load_left_out_is_told_to_the_hooks(*, migrates: bool) -> None:
    store, model = saved(nn.Linear(3, 2)), nn.Linear(3, 2, bias=False)
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    told: list[tuple[list[str], list[str]]] = []
    itself: Any = model
    if migrates:
        itself.register_load_state_dict_pre_hook(lambda *_: None)
    itself.register_load_state_dict_post_hook(
        lambda _, keys: told.append((list(keys.missing_keys), list(keys.unexpected_keys)))
    )
    load(model, store, strict=False)
    assert told[-1] == (["scale"], [] if migrates else ["bias"])


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys"])
@pytest.mark.parametrize("migrates", [False, True])
def test_a_hook_that_adds_a_name_refuses_the_load_as_in_torch(kind: str, *, migrates: bool) -> None:
    store, model = saved(nn.Linear(3, 2)), nn.Linear(3, 2)
    itself: Any = model
    if migrates:
        itself.register_load_state_dict_pre_hook(lambda *_: None)
    itself.register_load_state_dict_post_hook(
        lambda _, keys: getattr(keys, kind).append("version 2 of the table")
    )
    with pytest.raises(RuntimeError, match="version 2 of the table"):
        model.load_state_dict(nn.Linear(3, 2).state_dict())
    with pytest.raises(IncompatibleError, match="version 2 of the table"):
        load(model, store)


def forgiving(model: Any, *names: str) -> Any:
    """Have a hook take `names` off the lists of what does not fit, or all of them."""

    def forgive(_: nn.Module, keys: Any) -> None:
        for each in (keys.missing_keys, keys.unexpected_keys):
            each[:] = [name for name in each if names and name not in names]

    model.register_load_state_dict_post_hook(forgive)
    return model


class WithHead(nn.Sequential):
    """Has a head that what was saved before lacks."""

    def __init__(self, *, grown: bool) -> None:
        super().__init__(nn.Linear(2, 2))
        if grown:
            self.head = nn.Linear(2, 1)


@pytest.mark.parametrize("behind", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize("grown", [True, False])
def test_what_a_hook_takes_off_the_lists_is_no_error_as_in_torch(
    behind: Callable[[nn.Module], Any], *, grown: bool
) -> None:
    first: Any = WithHead(grown=not grown)
    again = forgiving(WithHead(grown=grown))
    again.load_state_dict(first.state_dict())  # as torch has it
    fresh = forgiving(WithHead(grown=grown))
    head = {k: v.clone() for k, v in fresh.state_dict().items() if k.startswith("head")}
    report = load(behind(fresh), saved(behind(first)))
    assert torch.equal(fresh[0].weight, first[0].weight)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in head.items())
    assert "model/head.bias" in report.notes[0]
    assert "took as no error" in report.notes[0]
    weights: Any = WithHead(grown=grown)
    dist_ckpt.load_weights(forgiving(weights), saved(first))
    assert torch.equal(weights[0].weight, first[0].weight)


def test_what_a_hook_leaves_on_the_lists_is_an_error_still() -> None:
    store = saved(WithHead(grown=False))
    fresh = forgiving(WithHead(grown=True), "head.bias")
    before = fresh[0].weight.detach().clone()
    with pytest.raises(IncompatibleError, match=r"model/head\.weight"):
        load(fresh, store)
    assert torch.equal(before, fresh[0].weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_what_is_migrated_is_migrated_behind_a_wrapper(wrap: Callable[[nn.Module], Any]) -> None:
    old: Any = old_weight_norm(nn.Linear(3, 2))
    new: Any = parametrizations.weight_norm(nn.Linear(3, 2))
    load(wrap(new), saved(wrap(old)))
    assert torch.equal(old.weight_v, new.parametrizations.weight.original1)
    counted, fresh = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    kept = {k: v for k, v in counted.state_dict().items() if not k.endswith("tracked")}
    store = new_store()
    dist_ckpt.save({"model": kept}, store)
    load(wrap(fresh), store)
    assert fresh.state_dict()["0.weight"].tolist() == kept["0.weight"].tolist()
