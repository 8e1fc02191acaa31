"""Dicts and lists of tensors: filled where they lie, or refused, as `dcp.load` users expect."""

from __future__ import annotations

from collections import OrderedDict
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.storage.memory import MemoryStore

_stores = count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-mappings-{next(_stores)}")


def net(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def equal(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())


FORMS: dict[str, Any] = {
    "module": lambda model: model,
    "state_dict": lambda model: model.state_dict(),
    "plain dict": lambda model: dict(model.state_dict()),
    "parameters": lambda model: model.state_dict(keep_vars=True),
}


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("loaded", FORMS)
def test_a_state_dict_and_a_module_load_into_each_other(saved: str, loaded: str) -> None:
    one, two = net(1), net(2)
    weight = two[0].weight
    store = new_store()
    dist_ckpt.save({"model": FORMS[saved](one)}, store)
    report = dist_ckpt.load({"model": FORMS[loaded](two)}, store)
    assert equal(one, two)
    assert two[0].weight is weight
    assert weight.requires_grad
    assert (report.missing, report.unexpected) == ((), ())


def test_a_state_dict_goes_on_with_the_training_and_with_a_restore() -> None:
    store = new_store()
    model = net(1)
    with dist_ckpt.Checkpointer(store, {"model": model.state_dict()}, every_steps=1) as ckpt:
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        ckpt.save(1)
    other = net(2)
    with dist_ckpt.Checkpointer(store, {"model": other.state_dict()}, every_steps=1) as ckpt:
        assert ckpt.restore() == 1
        assert torch.equal(other[0].weight, torch.ones(4, 3))
        with torch.no_grad():
            other[0].weight.fill_(2.0)
        ckpt.save(2)
    last = net(3)
    dist_ckpt.load_weights(last, store)
    assert torch.equal(last[0].weight, torch.full((4, 3), 2.0))


def nested(fill: float) -> dict[str, Any]:
    return {
        "list": [torch.full((2,), fill), {"deep": [torch.full((2, 3), fill).t()]}],
        "tuple": (torch.full((), fill), fill),
        "ordered": OrderedDict(w=nn.Parameter(torch.full((3,), fill)), n=int(fill)),
        "bf16": torch.full((2,), fill, dtype=torch.bfloat16),
        "array": np.full(3, fill),
        "view": torch.full((4, 6), fill)[1:3, ::2],
        "empty": torch.zeros(0, 3),
        "count": fill,
        "flags": {f"f{fill}"},
        "keys": {0: torch.full((2,), fill), (1, "x"): [fill]},
    }


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def test_tensors_at_any_depth_are_filled_and_the_rest_is_updated_in_its_container() -> None:
    store = new_store()
    dist_ckpt.save({"state": nested(3.0), "rng": None}, store)
    live = nested(0.0)
    before, array, inner = tensors_in(live), live["array"], live["list"]
    deep, ordered, flags = live["list"][1], live["ordered"], live["flags"]
    parameter = ordered["w"]
    dist_ckpt.load({"state": live, "rng": None}, store)
    assert all(new is old for new, old in zip(tensors_in(live), before, strict=True))
    assert all(bool((tensor == 3).all()) for tensor in before)
    assert live["array"] is array
    assert array.tolist() == [3, 3, 3]
    assert live["list"] is inner
    assert inner[1] is deep
    assert live["ordered"] is ordered
    assert ordered["w"] is parameter
    assert (ordered["n"], live["tuple"][1], live["count"], live["flags"]) == (3, 3, 3, {"f3.0"})
    assert live["flags"] is flags
    assert live["keys"][1, "x"] == [3]


def test_top_level_values_are_in_the_dict_of_the_caller_after_a_load() -> None:
    store = new_store()
    weight = torch.ones(2)
    dist_ckpt.save(
        {"epoch": 7, "w": weight, "pair": (1, "a"), "worker": dist_ckpt.PerRank(4)}, store
    )
    live = torch.zeros(2)
    state: dict[str, Any] = {"epoch": 0, "w": live, "pair": (0, ""), "worker": dist_ckpt.PerRank(0)}
    dist_ckpt.load(state, store)
    assert (state["epoch"], state["pair"]) == (7, (1, "a"))
    assert state["worker"].value == 4
    assert state["w"] is live
    assert live.tolist() == [1, 1]


def test_a_checkpointer_stores_what_its_dict_has_at_the_save() -> None:
    store = new_store()
    state: dict[str, Any] = {"epoch": 0, "best": None, "model": net(1)}
    with dist_ckpt.Checkpointer(store, state, every_steps=1) as ckpt:
        state["epoch"] += 5
        state["best"] = {"loss": 0.5}
        ckpt.save(1)
    again: dict[str, Any] = {"epoch": 0, "best": None, "model": net(2)}
    with dist_ckpt.Checkpointer(store, again, every_steps=1) as ckpt:
        ckpt.restore()
        assert (again["epoch"], again["best"]) == (5, {"loss": 0.5})
        again["epoch"] += 1
        ckpt.save(2)
    with dist_ckpt.open_checkpoint(store) as stored:
        assert stored.read_values("epoch")["value"] == 6


def test_a_dict_whose_objects_are_exchanged_is_refused_at_the_save() -> None:
    state: dict[str, Any] = {"model": net(1), "n": 1}
    with dist_ckpt.Checkpointer(new_store(), state) as ckpt:
        state["model"] = net(2)
        with pytest.raises(UsageError, match=r"part 'model' of the dict .* another object now"):
            ckpt.save(1)
    state = {"model": net(1), "n": 1}
    with dist_ckpt.Checkpointer(new_store(), state) as ckpt:
        state["late"] = 1
        with pytest.raises(UsageError, match=r"came into or left the dict .*'late'"):
            ckpt.save(1)


def test_a_mapping_that_cannot_change_takes_no_number() -> None:
    store = new_store()
    dist_ckpt.save(MappingProxyType({"epoch": 7}), store)
    with pytest.raises(UsageError, match=r"part 'epoch' is a plain value in a mapping that cannot"):
        dist_ckpt.load(MappingProxyType({"epoch": 0}), store)


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize("form", ["state_dict", "plain dict", "parameters"])
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_changes(form: str) -> None:
    store = new_store()
    dist_ckpt.save({"model": net(1)}, store, step=1)
    dist_ckpt.save({"model": net(1).state_dict()}, store, step=2)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Linear(5, 1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for step in (1, 2):
        with pytest.raises(IncompatibleError) as caught:
            dist_ckpt.load({"model": FORMS[form](other)}, store, step=step)
        assert "3.weight" in str(caught.value)
        assert "of another shape: model/" in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    small = net(2)[:2]
    for step in (1, 2):
        with pytest.raises(IncompatibleError, match=r"unexpected .*2\.weight"):
            dist_ckpt.load({"model": FORMS[form](small)}, store, step=step)
        dist_ckpt.load({"model": FORMS[form](small)}, store, step=step, strict=False)
        assert torch.equal(small[0].weight, net(1)[0].weight)


def test_another_dtype_is_refused_or_cast_into_the_memory_that_is_there() -> None:
    store = new_store()
    model = net(1)
    dist_ckpt.save({"model": model.state_dict(), "w": torch.ones(2)}, store)
    half = net(2).bfloat16()
    state: dict[str, Any] = {"model": half.state_dict(), "w": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(IncompatibleError, match="of another dtype"):
        dist_ckpt.load(dict(state), store)
    w = state["w"]
    dist_ckpt.load(state, store, cast=True)
    assert torch.equal(half[0].weight, model[0].weight.bfloat16())
    assert w.tolist() == [1, 1]


def test_a_lenient_load_keeps_what_has_no_partner() -> None:
    store = new_store()
    dist_ckpt.save({"m": {"a": torch.ones(2), "old": torch.ones(1)}}, store)
    held = torch.zeros(2)
    also = held[:1]
    live: dict[str, Any] = {"a": held, "new": torch.zeros(3)}
    report = dist_ckpt.load({"m": live}, store, strict=False)
    assert held.tolist() == [1, 1]
    assert also.tolist() == [1]
    assert live.keys() == {"a", "new"}
    assert report.missing == ("m/new",)


def test_entries_of_a_state_dict_are_selected_and_renamed_by_their_names() -> None:
    store = new_store()
    one = net(1)
    dist_ckpt.save({"model": one.state_dict()}, store)
    for form in ("module", "state_dict", "plain dict"):
        two = net(2)
        bias = two[0].bias.detach().clone()
        dist_ckpt.load({"model": FORMS[form](two)}, store, only=["model/*weight"])
        assert torch.equal(two[0].weight, one[0].weight)
        assert torch.equal(two[0].bias, bias)
        names = {"model/0.bias": "model/1.bias", "model/1.bias": "model/1.weight"}
        dist_ckpt.load(
            {"model": FORMS[form](two)},
            store,
            only="model/1.bias",
            rename={**names, "model/1.weight": "model/1.x"},
        )
        assert torch.equal(two[1].bias, one[0].bias)
        with pytest.raises(UsageError, match="matches no name"):
            dist_ckpt.load({"model": FORMS[form](two)}, store, skip=["model/3.*"])


@pytest.mark.parametrize("skip", ["*", ["m*", "not*", "rng"], ["model", "notes/*", "rng"]])
def test_whoever_leaves_everything_out_is_told_that_nothing_would_be_loaded(skip: Any) -> None:
    store = new_store()
    dist_ckpt.save({"model": net(1), "notes": {"x": torch.ones(1)}}, store)
    state = {"model": net(2), "notes": {"x": torch.zeros(1)}}
    with pytest.raises(IncompatibleError, match=r"nothing of .*notes.* beside what only="):
        dist_ckpt.load(state, store, skip=skip)
    if skip == "*":
        with pytest.raises(IncompatibleError, match="nothing of model to load"):
            dist_ckpt.load_weights(net(2), store, skip=skip)
    assert dist_ckpt.load(state, store, only="rng").missing == ()  # meant, and all there is


def test_a_state_dict_of_a_wrapped_module_fits_that_of_the_plain_one() -> None:
    store = new_store()
    one, two = net(1), net(2)
    dist_ckpt.save({"model": nn.DataParallel(one).state_dict()}, store)
    dist_ckpt.load({"model": two.state_dict()}, store)
    assert equal(one, two)
    average = AveragedModel(net(3))
    dist_ckpt.load_weights(average, store)
    assert equal(one, average.module)
    assert average.n_averaged == 0


def test_a_tensor_that_grew_takes_its_place_in_the_dict_and_is_named() -> None:
    store = new_store()
    dist_ckpt.save({"log": {"losses": torch.arange(3.0), "n": 3}}, store)
    log: dict[str, Any] = {"losses": torch.empty(0), "n": 0}
    report = dist_ckpt.load({"log": log}, store)
    assert log["losses"].tolist() == [0, 1, 2]
    assert any("log/value.losses" in note for note in report.notes)


def test_lists_of_tensors_take_other_lengths() -> None:
    store = new_store()
    dist_ckpt.save({"history": [torch.tensor(1.0), torch.tensor(2.0)]}, store)
    short, long = [torch.tensor(0.0)], [torch.tensor(0.0) for _ in range(3)]
    first = short[0]
    dist_ckpt.load({"history": short}, store)
    dist_ckpt.load({"history": long}, store)
    assert [float(x) for x in short] == [float(x) for x in long] == [1, 2]
    assert short[0] is first


def test_meta_tensors_in_a_dict_are_replaced_by_real_ones() -> None:
    store = new_store()
    model = net(1)
    dist_ckpt.save({"model": model}, store, step=1)
    dist_ckpt.save({"model": {"deep": model.state_dict()}}, store, step=2)
    with torch.device("meta"):
        shapes = dict(net(2).state_dict())
        deep = {"deep": dict(net(2).state_dict())}
    dist_ckpt.load({"model": shapes}, store, step=1)
    dist_ckpt.load({"model": deep}, store, step=2)
    for found in (shapes, deep["deep"]):
        assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # as torch 2.6 uses it itself
def test_what_dcp_saved_fills_a_state_dict(tmp_path: Path) -> None:
    model, other = net(1), net(2)
    save({"app": {"net": model.state_dict()}}, checkpoint_id=tmp_path)
    dist_ckpt.load({"net": other.state_dict(), "rng": None}, tmp_path)
    assert equal(model, other)


# ------------------------------------------------------------------ copies


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


COPIES: dict[str, Any] = {
    "optimizer": lambda m: optimizer_of(m).state_dict(),
    "fresh sgd": lambda m: torch.optim.SGD(m.parameters()).state_dict(),
    "scheduler": lambda m: StepLR(optimizer_of(m), 2).state_dict(),
    "plateau": lambda m: ReduceLROnPlateau(optimizer_of(m)).state_dict(),
    "scaler": lambda m: torch.amp.GradScaler("cpu").state_dict(),
    "sampler": lambda m: dist_ckpt.ElasticSampler(4, global_batch=2).state_dict(),
    "nested": lambda m: {"epoch": 1, "optim": optimizer_of(m).state_dict()},
    "list": lambda m: {"all": [{"lr": 1}, (optimizer_of(m).state_dict(),)]},
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_state_is_no_part_of_a_training(copy: str) -> None:
    model = net(1)
    value = COPIES[copy](model)
    store = new_store()
    with pytest.raises(UsageError, match=r"state_dict\(\) of .* itself as a part"):
        dist_ckpt.Checkpointer(store, {"model": model, "x": value})
    with pytest.raises(UsageError, match=r"x.* is what state_dict\(\) of"):
        dist_ckpt.TrainState(model=model, x=value)
    dist_ckpt.save({"x": value, "model": model}, store)  # as torch.save does, once
    with pytest.raises(UsageError, match="itself as a part"):
        dist_ckpt.load({"x": value, "model": model}, store)
    with dist_ckpt.open_checkpoint(store) as stored:
        assert stored.read_values("x")["value"].keys() == value.keys()


def test_extra_state_in_a_dict_would_go_stale() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> int:
            return 1

        def set_extra_state(self, state: int) -> None:
            pass

    with pytest.raises(UsageError, match=r"model\['_extra_state'\].* Give the module itself"):
        dist_ckpt.TrainState(model=Extra(1, 1).state_dict())


@pytest.mark.parametrize("how", ["moved", "buffer"])
def test_a_state_dict_that_the_module_has_left_is_not_stored(how: str) -> None:
    model = net(1)
    with dist_ckpt.Checkpointer(new_store(), {"model": {"net": model.state_dict()}}) as ckpt:
        ckpt.save(1)
        if how == "moved":
            model.double()
        else:
            model[1].running_mean = model[1].running_mean * 0.5
        with pytest.raises(UsageError, match=r"another tensor for '.*give the module itself"):
            ckpt.save(2)


# ------------------------------------------------------------------ averaged weights


def averaged(model: nn.Module) -> AveragedModel:
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average


EMAS: dict[str, Any] = {
    "dict": lambda m: {name: value.clone() for name, value in m.state_dict().items()},
    "averaged": averaged,
    "averaged dict": lambda m: averaged(m).state_dict(),
    "wrapped dict": lambda m: {f"module.{k}": v.clone() for k, v in m.state_dict().items()},
    "tied dict": lambda m: dict(m.state_dict(keep_vars=True)),
}


@pytest.mark.parametrize("form", EMAS)
def test_averaged_weights_load_into_a_model_whatever_keeps_them(form: str) -> None:
    model = net(1)
    store = new_store()
    dist_ckpt.save({"model": net(2), "ema": EMAS[form](model)}, store)
    module: nn.Module = net(3)
    weights = dict(net(3).state_dict())
    report = dist_ckpt.load_weights(module, store, part="ema")
    assert equal(model, module)
    assert report.unexpected == ()
    dist_ckpt.load_weights(weights, store, part="ema")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    dist_ckpt.load_weights(net(4), store, part="ema", skip=["ema/2.*"], strict=False)
    renamed = net(5)
    names = {"ema": "model", "model": "other"}
    dist_ckpt.load({"model": renamed}, store, only="model", rename=names, strict=False)
    assert equal(model, renamed)


def test_tied_entries_of_a_dict_load_into_a_tied_module() -> None:
    store = new_store()
    shared = torch.ones(2, 2)
    dist_ckpt.save({"ema": {"0.weight": shared, "1.weight": shared}}, store)
    model: Any = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    dist_ckpt.load_weights(model, store, part="ema")
    assert torch.equal(model[1].weight, shared)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize(("stored", "live"), [(2, 4), (4, 2)])
def test_a_list_of_parameters_neither_loses_nor_gains_one(stored: int, live: int) -> None:
    one, two = net(1), net(2)
    store = new_store()
    dist_ckpt.save({"weights": list(one.parameters())[:stored]}, store)
    mine = list(two.parameters())[:live]
    before = [each.detach().clone() for each in mine]
    with pytest.raises(IncompatibleError, match=r"weights/value\.[23]"):
        dist_ckpt.load({"weights": mine}, store)
    assert all(torch.equal(now, then) for now, then in zip(mine, before, strict=True))
    state = {"weights": mine}
    dist_ckpt.load(state, store, strict=False)
    assert len(state["weights"]) == live, "a lenient load leaves alone what has no partner"
    shared = list(one.parameters())[: min(stored, live)]
    assert all(torch.equal(now, then) for now, then in zip(mine, shared, strict=False))
