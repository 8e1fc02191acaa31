"""The state of a training run: named parts, found by what they are.

What would be lost or go stale in it unseen is refused when it is built: parameters that are stepped
and in no part, and copies of what some object keeps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, singledispatch
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import ASGD, Adadelta, Adagrad, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import check_part
from dist_ckpt.state.early_stopping import EarlyStopping
from dist_ckpt.state.layout import address
from dist_ckpt.state.merging import is_of_module
from dist_ckpt.state.model import ModelPart, ModulesPart, holds_modules
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.optimizer_live import holds_optimizers
from dist_ckpt.state.part import Part
from dist_ckpt.state.rng import Generator, GeneratorPart, RngPart
from dist_ckpt.state.slots import PerRank
from dist_ckpt.state.tensors import TensorsPart
from dist_ckpt.state.values import SchedulerPart, Stateful, StatefulPart, ValuePart, keeps_state

_log = logging.getLogger("dist_ckpt")


class GlobalRng:
    """Stands for the random number generators of the process: what `TrainState(rng=)` is."""


class TrainState:
    """What a checkpoint holds and a restore brings back, as named parts.

    ```python
    import torch
    from dist_ckpt import PerRank, TrainState

    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model=model, optimizer=optimizer, history=[], worker=PerRank({"shard": 3}))
    ```

    Modules and optimizers become parts whose tensors are shared out between ranks. Anything else
    with `state_dict` and `load_state_dict`, or `get_state` and `set_state`, is asked for its state,
    and every other value is stored as it is. Several modules and several optimizers are fine, as
    parts or as a list or dict that is one part: an optimizer finds the names of its parameters in
    all of them. Random number generators and loaders with a state of their
    own (torchdata's `StatefulDataLoader`) are kept per rank.

    A part is the object that was given, not the variable that it came from: `TrainState(n=n)`
    stores the number that `n` was, whatever `n` becomes. Count in the state (`state["n"] += 1`), or
    in something that changes in place: a dict, a `Progress`, an object with `state_dict`.

    Args:
        rng: by default the generators of Python, numpy, torch and every CUDA device; None leaves
            them out.
        trainable_only: keep of every module only the parameters that require gradients, and the
            buffers of the submodules that own one: for adapters on a frozen base.
        parts: by name: a letter or `_`, then letters, digits, `_` or `-`, at most 64.

    Raises:
        UsageError: a bad name, or a value that cannot be the part it is asked to be.
    """

    def __init__(
        self, /, *, rng: object = GlobalRng(), trainable_only: bool = False, **parts: object
    ) -> None:
        _refuse_state_dict(parts, parts)
        self._build(parts, rng=rng, trainable_only=trainable_only)
        for name, value in parts.items():
            _refuse_snapshots(name, value)

    def _build(
        self,
        parts: Mapping[str, object],
        *,
        rng: object = GlobalRng(),
        trainable_only: object = False,
        home: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(trainable_only, bool):
            raise UsageError("trainable_only is an option, True or False: call the part otherwise")
        self._values = dict(parts)
        # The dict of the caller that the parts were taken from, and what was in it.
        self._home = home
        self._given = {} if home is None else dict(home)
        if rng is not None:  # leaving the generators out must be said, never forgotten
            self._values["rng"] = rng
        self._parts: dict[str, Part] = {}
        models: list[ModelPart] = []
        # Optimizers take names from models; the generators come last, as restoring may draw.
        for name, value in sorted(self._values.items(), key=lambda item: _turn(item[1])):
            part = _part_of(value, check_part(name), models)
            # Exactly: the others keep the object that they were given, see `check_current`.
            if type(part) is ValuePart and home is not None and name in home:
                part.lies_in(home)
            if trainable_only and isinstance(value, nn.Module):
                part = ModelPart(value, name=name, trainable_only=True)
            elif trainable_only and holds_modules(value):
                part = ModulesPart(value, name=name, trainable_only=True)
            self._parts[name] = part
            if isinstance(part, ModelPart):
                models.append(part)
        _check_parameters_held(self._parts)

    @classmethod
    def of(cls, state: TrainState | Mapping[str, object], *, once: bool = False) -> TrainState:
        """Return `state` if it is a `TrainState`, and one made of its items if it is a mapping.

        Plain values stay in the mapping: a save takes what is there then, and a load puts the
        loaded ones there.

        Args:
            state: either.
            once: whether a mapping may hold copies (`optimizer.state_dict()`), because it is saved
                now and never again.

        Raises:
            UsageError: neither, or nothing at all, or names that no part can have, or a copy, or
                the state dict of a module.
        """
        if isinstance(state, TrainState):
            return state
        if not isinstance(state, Mapping):
            raise UsageError(
                f"a state is a TrainState or a dict of parts by name, not {type(state).__name__}"
            )
        if not state:
            # The generators alone would be stored, which nobody means who gives nothing.
            raise UsageError(
                "the state is an empty dict: give it the parts to be saved or loaded, such as "
                "{'model': model, 'optimizer': optimizer}"
            )
        for name in state:
            if not isinstance(name, str):
                raise UsageError(
                    "a state is a TrainState or a dict of parts by name: names are strings, and "
                    f"{name!r} is of type {type(name).__name__}"
                )
        options = {key: state[key] for key in ("rng", "trainable_only") if key in state}
        parts = {name: value for name, value in state.items() if name not in options}
        _refuse_state_dict(state, parts)
        if not once:
            for name, value in parts.items():
                _refuse_snapshots(name, value)
        made = cls.__new__(cls)
        made._build(parts, **options, home=state)  # noqa: SLF001
        return made

    def check_current(self) -> None:
        """Check that the mapping which this state was made of still has the objects it had.

        Raises:
            UsageError: a module or another object was exchanged, or a part came or went: what is
                saved would be the old one.
        """
        if self._home is None:
            return
        if self._home.keys() != self._given.keys():
            changed = sorted(self._home.keys() ^ self._given.keys())
            raise UsageError(f"parts came into or left the dict that is the state: {changed}")
        for name, value in self._given.items():
            part = self._parts.get(name)
            if self._home[name] is not value and type(part) is not ValuePart:
                raise UsageError(
                    f"part {name!r} of the dict that is the state is another object now: build a "
                    "new state"
                )

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name, in the order to restore: models, optimizers, others, generators."""
        return dict(self._parts)

    def __iter__(self) -> Iterator[str]:
        """Return the names of the parts."""
        return iter(self._parts)

    def __getitem__(self, name: str) -> Any:
        """Return the live value of a part: what was given, or what a restore put in its place.

        Raises:
            KeyError: no such part.
        """
        part = self._parts[name]
        # Only a plain value may be another object later.
        return part.value if isinstance(part, ValuePart) else self._values[name]

    def __setitem__(self, name: str, value: object) -> None:
        """Give a plain value a new one; the next save stores that.

        Raises:
            KeyError: no such part.
            UsageError: the part is not a plain value.
        """
        part = self._parts[name]
        if type(part) is not ValuePart:
            kind = type(self[name]).__qualname__
            raise UsageError(
                f"part {name!r} is a {kind}, not a plain value: build a new TrainState"
            )
        part.value = value


@singledispatch
def _part_of(value: object, name: str, models: Sequence[ModelPart]) -> Part:
    _refuse_class(name, value)
    # Protocols, which dispatch by class cannot see. A part is taken as it is.
    if isinstance(value, Part):
        return value
    if holds_optimizers(value):
        return OptimizerPart(value, models=models, name=name)
    if holds_modules(value):
        return ModulesPart(value, name=name)
    if keeps_state(value):
        return StatefulPart(value, name=name)
    return ValuePart(value, name=name)


@_part_of.register
def _(value: nn.Module, name: str, models: Sequence[ModelPart]) -> Part:
    return ModelPart(value, name=name)


@_part_of.register
def _(value: Optimizer, name: str, models: Sequence[ModelPart]) -> Part:
    return OptimizerPart(value, models=models, name=name)


@_part_of.register
def _(value: LRScheduler, name: str, models: Sequence[ModelPart]) -> Part:
    return SchedulerPart(value, name=name)


@_part_of.register
def _(value: GlobalRng, name: str, models: Sequence[ModelPart]) -> Part:
    return RngPart(name=name)


@_part_of.register
def _(value: PerRank, name: str, models: Sequence[ModelPart]) -> Part:
    # What is shared out between ranks has no copy of its own on each.
    inner = value.value
    _refuse_class(name, inner)
    shared = holds_modules(inner) or holds_optimizers(inner)
    if shared or isinstance(inner, (nn.Module, Part, PerRank)):
        kind = type(inner).__qualname__
        raise UsageError(
            f"part {name!r}: a {kind} cannot be PerRank; give it as it is, or keep the values "
            "that differ between ranks in a dict of their own"
        )
    if isinstance(inner, Generator) and value.reshard is None:
        return GeneratorPart(inner, name=name)  # which is kept per rank in any case
    reshard = value.reshard or getattr(inner, "reshard", None)
    if keeps_state(inner):
        return StatefulPart(inner, name=name, per_rank=True, reshard=reshard)
    return ValuePart(inner, name=name, per_rank=True, reshard=reshard)


@_part_of.register
def _(value: DataLoader, name: str, models: Sequence[ModelPart]) -> Part:  # type: ignore[type-arg]
    if not isinstance(value, Stateful):
        raise UsageError(
            f"part {name!r}: a plain DataLoader has no position to keep; give the ElasticSampler "
            "that it draws from, or use torchdata's StatefulDataLoader"
        )
    # Each rank is somewhere else in its own share of the data.
    return _part_of(PerRank(value), name, models)


@_part_of.register
def _(value: Generator, name: str, models: Sequence[ModelPart]) -> Part:
    return GeneratorPart(value, name=name)


@singledispatch
def _turn(value: object) -> int:
    if holds_modules(value):
        return 0
    if holds_optimizers(value):
        return 1
    return 2  # schedulers, samplers, values


@_turn.register
def _(value: nn.Module | ModelPart) -> int:
    return 0


@_turn.register
def _(value: Optimizer | OptimizerPart) -> int:
    return 1


@_turn.register
def _(value: GlobalRng | RngPart | GeneratorPart) -> int:
    return 3


@_turn.register
def _(value: Generator) -> int:
    return 3


@_turn.register
def _(value: PerRank) -> int:
    return 3 if isinstance(value.value, Generator) else 2


def goes_by_name(part: Part) -> bool:
    """Tell whether the tensors of `part` have names of their own.

    A dict that was saved as one value is then seen as what its entries are called.
    """
    if type(part) is ValuePart:
        return part.has_names()
    return isinstance(part, (ModelPart, TensorsPart))


# Parameters that an optimizer of the state steps, and that are in no part of it.


_SHOWN = 5


def _check_parameters_held(parts: Mapping[str, Part]) -> None:
    """Check that every parameter that an optimizer steps is in a part.

    What is in none would come back as the program made it, under moments of another parameter. An
    optimizer without any model or tensor beside it is a state of its own.

    Raises:
        UsageError: some are in no part; the message names them by group and place.
    """
    optimizers = {name: part for name, part in parts.items() if isinstance(part, OptimizerPart)}
    models = [part for part in parts.values() if isinstance(part, ModelPart)]
    if not optimizers:
        return
    held = {id(p) for model in models for p in model.module.parameters()}
    loose = {
        name: {where: p for where, p in _stepped(part) if id(p) not in held}
        for name, part in optimizers.items()
    }
    if not any(loose.values()):
        return
    # Only now: asking other parts for what they hold may be costly, and hardly ever is needed.
    memory = _memory(parts)
    if not models and not memory:
        _tell_alone(", ".join(loose))
        return
    for name, parameters in loose.items():
        # What is lazy has no memory yet to be found by.
        lost = [w for w, p in parameters.items() if not is_lazy(p) and address(p) not in memory]
        if lost:
            rest = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
            raise UsageError(
                f"part {name!r} steps parameters that are in no part of the state: "
                f"{', '.join(lost[:_SHOWN])}{rest}. Give what they belong to as a part (a second "
                "model, or the float32 copies as a list of tensors), and build the optimizer after "
                "the model is sharded, moved or replaced"
            )


@cache
def _tell_alone(names: str) -> None:
    # Some mean it so: told once, and not refused.
    _log.warning("%s: no model is in this state beside its optimizer", names)


def tell_of_schedules(state: TrainState) -> None:
    """Say of optimizers that a scheduler is made for them, and of `state` that none is in it.

    Only where nothing in it is unknown: an object with a state of its own may hold the scheduler.
    """
    if not all(_holds_no_schedule(part, state[name]) for name, part in state.parts.items()):
        return
    optimizers = {name: value for name in state if isinstance(value := state[name], Optimizer)}
    # Every scheduler of torch puts this mark there, to tell in which order the two step.
    scheduled = [n for n, each in optimizers.items() if hasattr(each.step, "_wrapped_by_lr_sched")]
    if scheduled:
        _tell_unscheduled(", ".join(scheduled))


def _holds_no_schedule(part: Part, value: object) -> bool:
    if type(part) is StatefulPart:
        # A sampler, a GradScaler, a loader; anybody else's class may be a trainer's wrapper.
        kept = value.value if isinstance(value, PerRank) else value
        return type(kept).__module__.partition(".")[0] in ("dist_ckpt", "torch", "torchdata")
    kinds = (ModelPart, ModulesPart, OptimizerPart, RngPart, GeneratorPart, TensorsPart, ValuePart)
    return type(part) in kinds


@cache
def _tell_unscheduled(names: str) -> None:
    # Some have schedules without a state, and say last_epoch= at each start.
    _log.warning(
        "%s: its learning rate has a scheduler, which is no part of the state and would begin anew "
        "after a restart: give it a name in the state",
        names,
    )


def _is_per_rank(part: Part) -> bool:
    return isinstance(part, ValuePart) and part.per_rank


def _stepped(part: OptimizerPart) -> Iterator[tuple[str, torch.Tensor]]:
    for optimizer in part.optimizers:
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                yield f"group {i} parameter {j} of shape {_shape(parameter)}", parameter


def _shape(parameter: torch.Tensor) -> str:
    return "unknown" if is_lazy(parameter) else str(list(parameter.shape))


def _memory(parts: Mapping[str, Part]) -> set[tuple[int, int]]:
    """Return where the tensors of all parts but optimizers lie."""
    return {
        address(tensor)
        for part in parts.values()
        # What each rank has for itself may be a loader, which starts workers when it is asked.
        if not isinstance(part, OptimizerPart | RngPart) and not _is_per_rank(part)
        for tensor in part.capture().tensors.values()
    }


# Values that are copies of something's state: as parts of a training they can only go stale.


# By the keys that tell them: what torch's `state_dict` methods return, each a new dict per call.
_SHAPES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"state", "param_groups"}), "an optimizer"),
    (frozenset({"last_epoch", "_step_count"}), "a learning rate scheduler"),
    (frozenset({"last_epoch", "num_bad_epochs"}), "a learning rate scheduler"),
    (frozenset({"scale", "growth_factor", "_growth_tracker"}), "a GradScaler"),
    (frozenset({"epoch", "consumed", "global_batch", "shuffle"}), "an ElasticSampler"),
    (frozenset({"metric", "mode", "best_score", "best_step", "looks"}), "an EarlyStopping"),
    (frozenset({"_snapshot", "_steps_since_snapshot"}), "a StatefulDataLoader"),
)
_EXTRA = "_extra_state"
# Of Python's generator: the words of the Mersenne Twister, and the place in them.
_WORDS = 625
_DEEPEST = 8


def _refuse_snapshots(part: str, value: object) -> None:
    """Check that nothing in `value` is a copy of a state that goes on without it.

    Dicts of tensors are no copies: the state dict of a module holds the memory of its parameters.

    Raises:
        UsageError: something is; says what to give instead.
    """
    for where, what in _snapshots(value, part, 0):
        kind = what.split(" ", 1)[1]
        raise UsageError(
            f"{where} is what state_dict() of {what} returned: a copy, which training does not "
            f"change and a load does not bring back. Give the {kind} itself as a part "
            "(a dict that was saved before can be read by open_checkpoint(...).read_values(...))"
        )


def refuse_generator_states(part: str, value: object) -> None:
    """Check that `value` is no copy of the state of a random number generator, nor a tuple of some.

    Each save would store it as it was, and whoever sets a generator by it after a restart draws the
    numbers of the beginning again.

    Raises:
        UsageError: something is; says what to give instead.
    """
    for where, what in _generator_states(value, part):
        raise UsageError(
            f"{where} is what {what} returned: a copy, which is the same at each save. Leave it "
            "out, for the generators of Python, numpy, torch and CUDA are part of every state; a "
            "generator of your own is a part itself"
        )


def _refuse_state_dict(state: Mapping[str, object], parts: Mapping[str, object]) -> None:
    """Check that a state is not what `state_dict` of a module or an optimizer returned.

    Each entry would be a part, of a name that the next load of the object does not ask for.

    Args:
        state: what was given.
        parts: the entries of it that are parts.

    Raises:
        UsageError: it is; says what to give instead.
    """
    if _copied_from(parts) == "an optimizer":
        what = "an optimizer"
    elif _is_of_module(state, parts):
        what = "a module"
    else:
        return
    called = "model" if what == "a module" else "optimizer"
    raise UsageError(
        f"a state is a TrainState or a dict of parts by name, and this is what state_dict() of "
        f"{what} returned ({', '.join(list(parts)[:3])}, ...): each entry would be a part. Give "
        f'{{"{called}": {called}}}'
    )


def _is_of_module(state: Mapping[str, object], parts: Mapping[str, object]) -> bool:
    # No part has a dot in its name. What torch marks and has no dots is one of a single layer.
    if any("." in name and isinstance(item, torch.Tensor) for name, item in parts.items()):
        return True
    return (
        is_of_module(state)
        and bool(parts)
        and all(isinstance(item, torch.Tensor) or key == _EXTRA for key, item in parts.items())
    )


def _refuse_class(part: str, value: object) -> None:
    """Check that `value` is no class whose objects would be a part.

    Raises:
        UsageError: it is.
    """
    if isinstance(value, type) and hasattr(value, "state_dict"):
        raise UsageError(
            f"part {part!r} is {value.__qualname__}, a class, not an object of it: give what "
            f"{value.__qualname__}(...) returned"
        )


def _snapshots(value: object, where: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _DEEPEST:
        return
    if isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from _snapshots(item, f"{where}[{at}]", depth + 1)
    if not isinstance(value, Mapping):
        return
    kind = _copied_from(value)
    if kind is not None:
        yield where, kind
        return
    extra = [key for key in _module_entries(value) if str(key).endswith(_EXTRA)]
    if extra:
        yield f"{where}[{extra[0]!r}]", "a module"
    for key, item in value.items():
        yield from _snapshots(item, f"{where}[{key!r}]", depth + 1)


def _generator_states(value: object, where: str) -> Iterator[tuple[str, str]]:
    what = _generator_of(value)
    if what is not None:
        yield where, what
    elif isinstance(value, tuple):
        # What stands in a list or a dict may be another one by the time of the next save.
        for at, item in enumerate(value):
            yield from _generator_states(item, f"{where}[{at}]")


def _generator_of(value: object) -> str | None:
    if isinstance(value, Mapping):
        return "bit_generator.state" if value.keys() >= {"bit_generator", "state"} else None
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.uint8 or value.device.type != "cpu":
            return None
        # Bytes may be anything: only the state that holds right now is known for what it is.
        return "torch.get_rng_state()" if torch.equal(value, torch.get_rng_state()) else None
    if not isinstance(value, tuple):
        return None
    if len(value) == 5 and isinstance(value[0], str) and isinstance(value[1], np.ndarray):
        return "np.random.get_state()"
    if len(value) == 3 and isinstance(value[1], tuple) and len(value[1]) == _WORDS:
        return "random.getstate()"
    return None


def _copied_from(value: Mapping[Any, Any]) -> str | None:
    keys = value.keys()
    for shape, what in _SHAPES:
        if keys >= shape:
            if "param_groups" in shape and not _is_optimizer(value):
                continue
            return what
    return None


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    groups, state = value["param_groups"], value["state"]
    return (
        isinstance(state, Mapping)
        and isinstance(groups, (list, tuple))
        and all(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def _module_entries(value: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the keys of the state dict of a module under which no tensor is."""
    if is_of_module(value):
        yield from (key for key, item in value.items() if not isinstance(item, torch.Tensor))


# What the parts of a state are to a training.


Role: TypeAlias = Literal["model", "optimizer", "scheduler", "other"]


def parts_of(state: TrainState, *roles: Role) -> list[str]:
    """Return the names of the parts that are of one of `roles`."""
    return [name for name in state if _role(state[name]) in roles]


def stoppers_of(state: TrainState) -> list[EarlyStopping]:
    """Return the early stoppings among the parts."""
    return [value for name in state if isinstance(value := state[name], EarlyStopping)]


def main_model(state: TrainState) -> str:
    """Return the name of the model that given weights are for.

    Raises:
        UsageError: none is called `model`, and there is not exactly one.
    """
    models = parts_of(state, "model")
    if "model" in models:
        return "model"
    if len(models) != 1:
        raise UsageError(
            f"weights are for one model, and the state has {', '.join(models) or 'none'}: call one "
            "of the parts 'model'"
        )
    return models[0]


@singledispatch
def _role(value: object) -> Role:
    # By what it looks like: a wrapper, or a list of modules or optimizers, has no class to go by.
    if holds_modules(value):
        return "model"
    return "optimizer" if holds_optimizers(value) else "other"


@_role.register
def _(value: nn.Module) -> Role:
    return "model"


@_role.register
def _(value: Optimizer) -> Role:
    return "optimizer"


@_role.register
def _(value: LRScheduler) -> Role:
    return "scheduler"


# How many bytes this rank will write, guessed from the live state before any save.


_HEADER_BYTES_PER_TENSOR = 256


# A little too much costs nothing; a little too little moves the memory and splits its huge pages.
SPARE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A guess of one rank's share.

    Attributes:
        nbytes: size of its files.
        devices: where the tensors are.
    """

    nbytes: int
    devices: frozenset[torch.device]


def estimate(state: TrainState, *, world_size: int, limit_bytes: int | None = None) -> Estimate:
    """Guess this rank's share of a save of `state`; looks at shapes alone and asks nobody.

    What all ranks hold is shared out evenly, as the plan does it. An optimizer that has not stepped
    yet is taken to keep what its class keeps (two tensors for a parameter in the Adam family).
    Modules and optimizers count, other parts do not: they are small, or their size is not known
    without asking them for their state.

    Args:
        state: what is going to be saved.
        world_size: how many ranks save it together.
        limit_bytes: what it is at most, None for no limit.
    """
    nbytes, devices = 0.0, set()
    with torch.no_grad():  # taking the local part of a DTensor is a graph operation otherwise
        for tensor, count in _tensors(state):
            local, holders = _local(tensor, world_size)
            nbytes += count * (local.nbytes / holders + _HEADER_BYTES_PER_TENSOR)
            devices.add(local.device)
    # Without tensors nothing goes through the arena.
    spare_bytes = SPARE_BYTES if devices else 0
    guess = math.ceil(nbytes) + spare_bytes
    return Estimate(guess if limit_bytes is None else min(guess, limit_bytes), frozenset(devices))


def _tensors(state: TrainState) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield tensors, each with the number of stored ones that are as large as it."""
    for part in state.parts.values():
        if isinstance(part, ModelPart):
            module = part.module
            # Both without repetition: a tied parameter is written once.
            for tensor in (*module.parameters(), *module.buffers()):
                if not is_lazy(tensor) and tensor.device.type != "meta":
                    yield tensor, 1
        elif isinstance(part, OptimizerPart):
            for optimizer in part.optimizers:
                yield from _optimizer_tensors(optimizer)


def _optimizer_tensors(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, int]]:
    # A wrapper may be no optimizer of torch's and have no state by that name.
    state: Mapping[Any, Any] = getattr(optimizer, "state", {})
    for group in optimizer.param_groups:
        count = _moments(optimizer, group)
        for parameter in group["params"]:
            # By `get`, since reading an absent key would create it.
            kept = state.get(parameter)
            if isinstance(kept, dict) and kept:
                yield from ((value, 1) for value in kept.values() if torch.is_tensor(value))
            elif parameter.requires_grad and not is_lazy(parameter):
                yield parameter, count


def _moments(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    """Return how many tensors of a parameter's size its first step will make."""
    count = 0
    if "betas" in group or isinstance(optimizer, Adadelta | Rprop):
        count = 2
    elif isinstance(optimizer, Adagrad | ASGD | RMSprop):
        count = 1
    return count + sum(bool(group.get(key)) for key in ("momentum", "amsgrad", "centered"))


def _local(tensor: torch.Tensor, world_size: int) -> tuple[torch.Tensor, int]:
    """Return what of `tensor` lies here, and how many ranks hold the same."""
    if not isinstance(tensor, DTensor):
        return tensor, world_size
    mesh = tensor.device_mesh
    holders = [mesh.size(dim) for dim, each in enumerate(tensor.placements) if each.is_replicate()]
    return tensor.to_local(), math.prod(holders)
