"""What is wrong with a call is said when it is made, and nothing is written before."""

from __future__ import annotations

import itertools
import random
import re
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt import Checkpointer, TrainState, keep, policy
from dist_ckpt.errors import ErrorKind, NotFound, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.memory import MemoryStore

STATE: dict[str, Any] = {"n": 1}
_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-early-{next(_names)}")


def refused(call: Callable[[], object], match: str) -> UsageError:
    with pytest.raises(UsageError, match=match) as caught:
        call()
    return caught.value


class Thing:
    pass


class Own:
    """A component that says what it is made of."""

    def __init__(self, content: object) -> None:
        self.content = content

    def state_dict(self) -> dict[str, object]:
        return {"content": self.content}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.content = state_dict["content"]


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"thing": Thing()}

    def set_extra_state(self, state: Any) -> None:
        pass


# ------------------------------------------------------------------ the state


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"a": [1, {"b": Thing()}]}, r"part\.a\[1\]\.b, a .*Thing"),
        (Thing(), "part, a .*Thing"),
        (Own({1, Thing()}), r"part\.content\.<member>"),
        (dist_ckpt.PerRank({"fn": print}), r"part\.fn"),
        (WithExtra(1, 1), r"part\._extra_state\.thing"),
        ({"a": torch.eye(2).to_sparse()}, r"part\.a"),
    ],
)
def test_a_type_that_cannot_be_stored(part: object, path: str) -> None:
    store = new_store()
    error = refused(lambda: Checkpointer(store, {"part": part}), f"cannot store {path}")
    assert error.kind is ErrorKind.UNENCODABLE
    assert store.list_children() == []


def test_an_optimizer_with_such_an_option() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["hook"] = print
    match = r"cannot store optimizer\..*hook"
    refused(lambda: Checkpointer(new_store(), {"model": model, "optimizer": optimizer}), match)


class Unready:
    """Has no state before it has begun."""

    def state_dict(self) -> dict[str, object]:
        raise RuntimeError("begin first")

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        pass


class Loader(Own):
    """Begins, and draws from the global generator, when it is asked where it is."""

    def __iter__(self) -> object:
        return iter(())

    def state_dict(self) -> dict[str, object]:
        return {"content": torch.rand(1)}


def test_what_may_be_ready_later_is_no_error() -> None:
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    state = {"meta": meta, "lazy": nn.LazyLinear(2), "unready": Unready()}
    Checkpointer(new_store(), state).close()


def test_looking_draws_no_random_number() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    before = torch.get_rng_state(), random.getstate()
    state = {"model": model, "optimizer": optimizer, "loader": Loader(1)}
    Checkpointer(new_store(), state).close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not optimizer.state


@pytest.mark.parametrize(
    "value",
    [
        np.random.default_rng(1),
        random.Random(1),
        torch.Generator(),
        {"python": 1},
        torch.get_rng_state(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_takes_the_place_of_the_generators_of_the_process(value: Any) -> None:
    message = "part 'rng' is a .*which would not be kept. Call it otherwise"
    for call in (
        lambda: Checkpointer(new_store(), {"n": 1, "rng": value}),
        lambda: Checkpointer(new_store(), TrainState(n=1, rng=value)),
        lambda: dist_ckpt.save({"n": 1, "rng": value}, new_store()),
    ):
        refused(call, message)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (random.getstate, r"x is what random.getstate\(\)"),
        (lambda: (0, (random.getstate(),)), r"x\[1\]\[0\] is what random"),
        (np.random.get_state, r"x is what np.random.get_state\(\)"),
        (lambda: np.random.get_state(legacy=False), "x is what bit_generator.state"),
        (lambda: (1, np.random.default_rng(1).bit_generator.state), r"x\[1\] is what bit_gen"),
        (torch.get_rng_state, r"x is what torch.get_rng_state\(\)"),
    ],
)
def test_a_copy_of_the_state_of_a_generator_is_no_part(
    make: Callable[[], object], match: str
) -> None:
    store = new_store()
    refused(lambda: Checkpointer(store, {"n": 1, "x": make()}), f"{match}.*part of every state")
    dist_ckpt.save({"n": 1, "x": make()}, store)  # as torch.save does, once
    loaded = {"n": 0, "x": make()}
    assert dist_ckpt.load(loaded, store).step == 0
    # What only looks like one.
    alike = [(3, (1, 2), None), ("a", 1, 2, 3, 4), torch.zeros(9, dtype=torch.uint8), {"state": 1}]
    Checkpointer(new_store(), {"n": 1, "x": alike}).close()
    # What may be bound anew before each save.
    Checkpointer(new_store(), {"n": 1, "x": {"py": make()}, "y": [make()]}).close()


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"keep": 3}, r"keep= takes .* such as keep.latest\(3\), not 3"),
        ({"keep": keep.latest}, "which was not called"),
        ({"keep": "latest"}, "keep= takes"),
        ({"keep": keep}, "keep= takes"),
        ({"keep": policy.every(3)}, "keep= takes"),
        ({"keep": [keep.latest(3)]}, "keep= takes"),
        ({"keep": True}, "keep= takes"),
        ({"when": 2}, r"when= takes .* such as policy.every\(2\), not 2"),
        ({"when": policy.every}, "which was not called"),
        ({"when": "epoch"}, "when= takes"),
        ({"when": policy}, "when= takes"),
        ({"when": keep.latest(3)}, "when= takes"),
        ({"when": policy.Better}, "was not called"),
        ({"when": 2, "every_steps": 3}, "when= takes"),
        ({"every_steps": 0}, "steps must be a positive integer, not 0"),
        ({"every_steps": True}, "steps must be a positive integer"),
        ({"every_steps": 2.5}, "steps must be a positive integer"),
        ({"every_steps": "500"}, "steps must be a positive integer"),
        ({"timeout_seconds": -1}, "timeout_seconds"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds"),
        ({"timeout_seconds": None}, "timeout_seconds"),
        ({"timeout_seconds": True}, "timeout_seconds"),
        ({"timeout_seconds": "30"}, "timeout_seconds"),
        ({"staging": "overlap"}, "staging must be one of"),
        ({"memory_limit_bytes": "1GB"}, "memory_limit_bytes"),
        ({"check_replicas": "yes"}, "check_replicas"),
        ({"ranks": "rank0"}, "ranks is 'all' or 'alone'"),
        ({"ranks": 0}, "ranks is 'all' or 'alone'"),
        ({"process_group": "dp"}, "process_group is a torch process group"),
        ({"process_group": -100}, "not in the process group"),
        ({"metadata": ["a"]}, "metadata is a dict"),
        ({"metadata": "a"}, "metadata is a dict"),
        ({"metadata": {"a": {"b": Thing()}}}, r"metadata\['a'\]\['b'\] is a Thing"),
        ({"metadata": {"a": [datetime(2026, 1, 1)]}}, r"metadata\['a'\]\[0\] is a datetime"),  # noqa: DTZ001
        ({"metadata": {"lr": float("nan")}}, r"metadata\['lr'\]"),
        ({"metadata": {1: 2}}, "metadata"),
        ({"metadata": {"a": {1, 2}}}, r"metadata\['a'\] is a set"),
        ({"metadata": {"a": 2**70}}, r"metadata\['a'\]"),
        ({"metadata": {"a": b"x"}}, r"metadata\['a'\] is a bytes"),
    ],
)
def test_a_bad_argument_of_a_checkpointer(arguments: dict[str, Any], match: str) -> None:
    store = new_store()
    refused(lambda: Checkpointer(store, STATE, **arguments), match)
    assert store.list_children() == []


def test_a_part_of_a_composed_policy_is_looked_at_too() -> None:
    refused(lambda: Checkpointer(new_store(), STATE, keep=keep.latest(3) | 2), "keep= takes")  # type: ignore[operator]
    refused(lambda: Checkpointer(new_store(), STATE, when=policy.every(3) | 2), "when= takes")  # type: ignore[operator]


class OwnKeep:
    def kept(self, records: Any) -> dict[int, str]:
        return {record.step: "mine" for record in records}


class OwnWhen:
    scope = policy.Scope.LOCAL

    def due(self, moment: policy.Moment) -> str | None:
        return "mine" if moment.step == 2 else None


def test_policies_of_the_users_own_are_policies() -> None:
    store = new_store()
    when: Any = OwnWhen()
    with Checkpointer(store, STATE, keep=OwnKeep(), when=when, save_last=False) as ckpt:
        for step in (1, 2, 3):
            ckpt.step(step)
    assert Repository(store).steps() == [2]
    refused(lambda: Checkpointer(store, STATE, keep=OwnKeep), "was not called")  # type: ignore[arg-type]


PLACES = [None, "", b"runs", 3, ["runs"], ("a", "b"), object(), Thing]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: type(place).__name__)
@pytest.mark.parametrize(
    "call",
    [
        lambda place: Checkpointer(place, STATE),
        lambda place: dist_ckpt.save(STATE, place),
        lambda place: dist_ckpt.async_save(STATE, place),
        lambda place: dist_ckpt.load(TrainState(n=1), place),
        lambda place: dist_ckpt.load_weights(nn.Linear(1, 1), place),
        lambda place: dist_ckpt.open_checkpoint(place),
        lambda place: Checkpointer(new_store(), STATE).restore(url=place or ""),
        lambda place: dist_ckpt.dcp.Writer(place),
        lambda place: dist_ckpt.dcp.Reader(place),
    ],
    ids=[
        "Checkpointer",
        "save",
        "async_save",
        "load",
        "load_weights",
        "open",
        "restore",
        "Writer",
        "Reader",
    ],
)
def test_a_place_that_is_none(
    place: Any, call: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: call(place), "a place is a path, a URL or a Store|bad url|bad path")
    assert not list(tmp_path.iterdir())  # a folder called None, for one


class PathLike:
    def __fspath__(self) -> str:
        return "run"


def test_every_kind_of_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    like: Any = PathLike()
    dist_ckpt.save(STATE, like)
    for place in (like, tmp_path / "run", "run", str(tmp_path / "run")):
        assert dist_ckpt.load(TrainState(n=0), place).step == 0
        dist_ckpt.open_checkpoint(place).close()


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda o: Checkpointer("unused", STATE, **o("evry_steps")), "every_steps"),
        (lambda o: Checkpointer("unused", STATE, **o("stagging")), "staging"),
        (lambda o: Checkpointer("unused", STATE, **o("meta_data")), "metadata"),
        (lambda o: Checkpointer("unused", STATE, **o("timeout")), "timeout_seconds"),
        (lambda o: Checkpointer("unused", STATE, **o("rank")), "ranks"),
        (lambda o: dist_ckpt.save(STATE, "unused", **o("setp")), "step"),
        (lambda o: dist_ckpt.save(STATE, "unused", **o("memory_limit")), "memory_limit_bytes"),
        (lambda o: dist_ckpt.async_save(STATE, "unused", **o("metric")), "metrics"),
        (lambda o: dist_ckpt.load(STATE, "unused", **o("stirct")), "strict"),
        (lambda o: dist_ckpt.load(STATE, "unused", **o("stpe")), "step"),
        (lambda o: dist_ckpt.load_weights(nn.Linear(1, 1), "unused", **o("parts")), "part"),
        (lambda o: dist_ckpt.load_weights(nn.Linear(1, 1), "unused", **o("devise")), "device"),
        (lambda o: dist_ckpt.open_checkpoint("unused", **o("verfy")), "verify"),
        (lambda o: Checkpointer("unused", STATE).restore(**o("onyl")), "only"),
        (lambda o: dist_ckpt.flags.parse({"checkpoint_dir": "a", **o("keep_lats")}), "keep_last"),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest(
    call: Any, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(lambda: call(lambda name: {name: 1}), "unknown")
    assert re.search(rf"did you mean '{near}'", error.message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ranks", "timeout_seconds", "part", "process_group"])
def test_what_another_call_knows_is_not_taken_for_a_slip(name: str) -> None:
    options: Any = {name: 1}
    with Checkpointer(new_store(), STATE, save_last=False) as ckpt:
        error = refused(lambda: ckpt.restore(**options), f"unknown option '{name}'")
    assert "did you mean" not in error.message


@pytest.mark.parametrize("part", [None, 3, b"model", [], "", "mod*"])
def test_a_part_has_a_name(part: Any) -> None:
    store = new_store()
    dist_ckpt.save({"model": nn.Linear(1, 1)}, store)
    refused(lambda: dist_ckpt.load_weights(nn.Linear(1, 1), store, part=part), "bad part name")
    with dist_ckpt.open_checkpoint(store) as opened:
        for look in (opened.read_values, opened.__getitem__):
            with pytest.raises(NotFound, match=r"has no (part|tensor)"):
                look(part)
        assert opened.get(part) is None
        assert part not in opened


@pytest.mark.parametrize("rank", [1, -1, None, "0", 0.0, True])
def test_values_are_of_a_rank_that_there_was(rank: Any) -> None:
    store = new_store()
    dist_ckpt.save({"seen": dist_ckpt.PerRank([3])}, store)
    with dist_ckpt.open_checkpoint(store) as opened:
        assert list(opened.read_values("seen", rank=np.int64(0)).values()) == [[3]]
        refused(lambda: opened.read_values("seen", rank=rank), "one of the ranks that saved")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"global_batch": None}, "global_batch is an integer, not None"),
        ({"global_batch": 2.0}, "global_batch is an integer, not 2.0"),
        ({"seed": "0"}, "seed is an integer, not '0'"),
        ({"seed": float("nan")}, "seed is an integer, not nan"),
        ({"rank": "0"}, "rank is an integer, not '0'"),
        ({"world_size": 1.5}, "world_size is an integer, not 1.5"),
        ({"shuffle": 1}, "shuffle is True or False, not 1"),
        ({"drop_last": "no"}, "drop_last is True or False, not 'no'"),
    ],
)
def test_a_bad_argument_of_a_sampler(arguments: dict[str, Any], match: str) -> None:
    refused(lambda: dist_ckpt.ElasticSampler(8, **{"global_batch": 2, **arguments}), match)
    sampler = dist_ckpt.ElasticSampler(np.int64(8), global_batch=np.int64(2), seed=np.int64(1))
    assert len(sampler) == 4
    assert all(type(each) in (int, bool) for each in sampler.state_dict().values())


def test_a_hook_and_an_encoder_are_functions() -> None:
    hook: Any = "reshard"
    refused(lambda: dist_ckpt.PerRank(1, reshard=hook), "reshard= takes a function")
    for name in ("encode", "decode"):
        functions: Any = {"encode": str, "decode": str, name: 3}
        call = lambda: dist_ckpt.register_type(Thing, name="early-thing", **functions)  # noqa: B023, E731
        refused(call, f"{name}= takes a function, not 3")


def test_counts_of_an_early_stopping_are_a_copy() -> None:
    counts = dist_ckpt.EarlyStopping("val/loss", patience=2).state_dict()
    refused(lambda: TrainState(n=1, stopper=counts), "Give the EarlyStopping itself")


def test_options_of_a_store_are_by_name() -> None:
    options: Any = 3
    refused(lambda: dist_ckpt.Run("unused", storage_options=options), "storage_options are a map")


def test_a_device_without_memory_here_is_named() -> None:
    store = new_store()
    dist_ckpt.save({"model": nn.Linear(1, 1)}, store)
    device = "xpu" if torch.cuda.is_available() else "cuda"
    model = nn.Linear(1, 1, device="meta")
    refused(
        lambda: dist_ckpt.load_weights(model, store, device=device), f"device='{device}' has no mem"
    )
    assert model.weight.is_meta


@pytest.mark.parametrize("value", [1, "yes", None])
def test_verify_is_true_or_false(value: Any, tmp_path: Path) -> None:
    refused(lambda: dist_ckpt.open_checkpoint(tmp_path, verify=value), "verify is True or False")


@pytest.mark.parametrize("source", [None, 3, ["--resume"]])
def test_flags_are_of_the_kinds_there_are(source: Any) -> None:
    refused(lambda: Checkpointer.from_args(source, STATE), "checkpoint flags are")


# ------------------------------------------------------------------ numbers of other libraries

KINDS: list[Callable[[int], Any]] = [np.int64, np.uint8, torch.tensor, np.array]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_step_may_be_any_integer(kind: Callable[[int], Any]) -> None:
    store = new_store()
    stopper = dist_ckpt.EarlyStopping("loss", patience=kind(3))
    progress = dist_ckpt.Progress()
    when = policy.at(kind(2)) | policy.last(kind(5)) | policy.every(epochs=kind(2))
    kept = keep.latest(kind(9)) | keep.every(kind(1))
    state = {"stopper": stopper, "progress": progress}
    with Checkpointer(store, state, every_steps=kind(3), when=when, keep=kept) as ckpt:
        for step in range(1, 7):
            progress.add(steps=kind(1), samples=kind(4))
            ckpt.step(kind(step), metrics={"loss": -step if step == 1 else 0})
        ckpt.epoch_end(kind(2))
        ckpt.save(kind(7))
        ckpt.epoch_end(kind(4), step=kind(8))
    dist_ckpt.save(state, store, step=kind(9))
    dist_ckpt.async_save(state, store, step=kind(10)).wait()
    assert Repository(store).steps() == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    with Checkpointer(store, {"progress": progress}) as ckpt:  # it looks, and saves nothing
        assert ckpt.restore(step=kind(7), strict=False) == 7
        assert type(ckpt.restore(step=kind(7), strict=False)) is int
    assert dist_ckpt.load(state, store, step=kind(9)).step == 9
    with dist_ckpt.open_checkpoint(store, step=kind(8)) as opened:
        assert opened.step == 8
        assert opened.read_values("progress")["value"]["samples"] == 24
    assert (type(stopper.best_step), type(progress.samples)) == (int, int)


@pytest.mark.parametrize("step", [True, np.True_, torch.tensor(True), 1.0, "1", None, -1, 10**10])
def test_what_is_no_step(step: Any) -> None:
    store = new_store()
    with Checkpointer(store, STATE, every_steps=1) as ckpt:
        for call in (ckpt.step, ckpt.save):
            refused(lambda call=call: call(step), "bad step")  # type: ignore[misc]
        if step is not None:
            refused(lambda: ckpt.epoch_end(1, step=step), "bad step")
        if step != 10**10:
            refused(lambda: ckpt.epoch_end(step), "an epoch is an integer")
    refused(lambda: dist_ckpt.save(STATE, store, step=step), "bad step")
    assert Repository(store).steps() == []


def test_names_that_are_unique_need_no_registration() -> None:
    store = new_store()
    dist_ckpt.save({"id": uuid.UUID(int=1)}, store)
    state = TrainState(id=None)
    dist_ckpt.load(state, store)
    assert state["id"] == uuid.UUID(int=1)


class EmptyAtFirst:
    """As many samplers: it knows something only when it is at work."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, list[int]]:
        return {"seen": self.seen} if self.seen else {}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.seen = list(state.get("seen", []))


def test_the_first_look_says_nothing_of_what_is_empty_still(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler = EmptyAtFirst()
    with Checkpointer(new_store(), {"sampler": sampler}) as ckpt:
        sampler.seen.append(3)
        ckpt.save(1)
    assert "returned nothing" not in caplog.text


def test_metrics_are_by_name() -> None:
    with Checkpointer(new_store(), STATE, every_steps=1) as ckpt:
        for call in (ckpt.step, ckpt.epoch_end, ckpt.save):
            refused(lambda call=call: call(1, metrics=["loss"]), "by name, not a list")  # type: ignore[misc]
    refused(
        lambda: dist_ckpt.save(STATE, new_store(), metrics=["loss"]),  # type: ignore[arg-type]
        "by name, not a list",
    )


# ---------------------------------------------------------------- a schedule that nobody keeps


def scheduled(name: str) -> tuple[dict[str, Any], Any]:
    """Return a state without its scheduler, and the scheduler."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"model": model, name: optimizer, "history": []}, schedule


def test_a_scheduler_that_is_in_no_state_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    state, schedule = scheduled("opt_forgotten")
    state["sampler"] = dist_ckpt.ElasticSampler(8, global_batch=2)
    for _ in range(2):
        Checkpointer(new_store(), state, every_steps=1).close()
    assert caplog.text.count("opt_forgotten: its learning rate has a scheduler") == 1
    assert schedule.last_epoch == 0


@pytest.mark.parametrize("kept_by", ["itself", "wrapper", "nobody"])
def test_a_scheduler_that_is_kept_is_not(kept_by: str, caplog: pytest.LogCaptureFixture) -> None:
    state, schedule = scheduled(f"opt_{kept_by}")
    if kept_by == "nobody":
        # One that has no scheduler.
        state[f"opt_{kept_by}"] = torch.optim.SGD(state["model"].parameters(), lr=0.1)
    else:
        state["schedule"] = schedule if kept_by == "itself" else Own(schedule.state_dict())
    Checkpointer(new_store(), state, every_steps=1).close()
    assert "has a scheduler" not in caplog.text
