"""Which stored tensor goes where in a plain value: decided before anything of it is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dist_ckpt.state.decoding import Layout, layouts_in, parse_document
from dist_ckpt.state.encoding import fillable
from dist_ckpt.state.layout import alias_of, dtype_name, empty_beside
from dist_ckpt.state.merging import held_containers, is_held, named_misfits
from dist_ckpt.state.part import Stored, TensorSpec

VALUE = "value"
"""The name of the one object that such a part consists of."""


@dataclass(frozen=True)
class ValueFit:
    """How a live value and a stored one fit.

    Attributes:
        tensors: what to fill, by stored name.
        missing: names of live tensors that are not stored, where that matters.
        unexpected: names of stored tensors that have no live one, where that matters.
        exchanged: names of live tensors in whose place another one comes.
        held: the ids of the containers whose entries stay.
        resized: by name, the rule by which a tensor of another shape is loaded in part.
        learned: by name, the live tensors that are parameters or require gradients, in whose place
            another one comes that is to be the same.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    exchanged: list[str] = field(default_factory=list)
    held: Collection[int] = ()
    resized: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, torch.Tensor] = field(default_factory=dict)

    def as_learned(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return `tensors`, each a parameter, and with gradients, where the live one is."""
        here = self.learned.keys() & tensors.keys()
        made = {name: _as_learned(self.learned[name], tensors[name]) for name in here}
        return {**tensors, **made} if made else tensors


def fit_value(
    live: object, stored: Stored, wanted: Sequence[str], *, path: str, stays: bool
) -> ValueFit:
    """Fit the stored object `value` and its tensors to the `live` value.

    A tensor that fits is filled where it lies. One of another shape or dtype is a misfit where
    somebody else holds it; where it lies in the value alone another one takes its place.

    Args:
        live: the value.
        stored: what there is.
        wanted: the tensors that the stored value refers to.
        path: what the value is called, for messages.
        stays: whether a tensor that is the whole value must stay itself.

    Raises:
        UsageError: the live value holds something that cannot be stored.
    """
    held = held_containers(live)
    node = parse_document(stored.objects[VALUE], path)
    mismatches = list(named_misfits(live, node, VALUE, held))
    here = fillable(live, path=path, prefix=VALUE)
    # All of them before the first alias is made, which would hold its memory.
    fixed = {name for name, tensor in here.items() if tensor.is_meta or is_held(tensor)}
    if stays:
        fixed.add(VALUE)
    if stays and isinstance(live, torch.Tensor):
        # One that is several is told by the names of these.
        mismatches += [(name, True) for name in here if name not in wanted]
        mismatches += [(name, False) for name in wanted if name not in here]
    layouts = dict(layouts_in(node))
    fit = ValueFit(held=held)
    for name in wanted:
        spec = stored.tensors.get(name)
        if spec is None:
            fit.missing.append(name)
        elif name not in here:
            fit.tensors[name] = fresh(name, spec, stored, layouts)
        elif name in fixed or _fits(here[name], spec) or stored.resize(name) is not None:
            # In-place writes to a leaf that requires grad would be refused.
            fit.tensors[name] = alias_of(here[name])
            if (rule := stored.resize(name)) is not None:
                fit.resized[name] = rule
        else:
            fit.tensors[name] = beside(here[name], name, stored, layouts)
            fit.exchanged.append(name)
    fit.missing.extend(name for name, lacks in mismatches if lacks and name not in fit.missing)
    fit.unexpected.extend(name for name, lacks in mismatches if not lacks)
    return fit


def beside(
    live: torch.Tensor | None, name: str, stored: Stored, layouts: Mapping[str, Layout]
) -> torch.Tensor:
    """Return an unfilled tensor for `name`, laid out as `live` if it has the shape of that."""
    spec = stored.tensors[name]
    if live is not None and tuple(live.shape) == spec.shape:
        return empty_beside(live, spec)
    return fresh(name, spec, stored, layouts)


def fresh(
    name: str, spec: TensorSpec, stored: Stored, layouts: Mapping[str, Layout]
) -> torch.Tensor:
    """Return an unfilled tensor for what has no live one: a DTensor for what was one."""
    made = stored.lay_out(name, spec, layouts[name]) if name in layouts else None
    return empty_beside(torch.empty(0), spec) if made is None else made


def is_learned(tensor: torch.Tensor) -> bool:
    """Tell whether a plain tensor in the place of `tensor` would not be trained as that is."""
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _as_learned(live: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    # torch takes gradients of these alone, and what is stored may be of another dtype.
    grad = live.requires_grad and (made.is_floating_point() or made.is_complex())
    if isinstance(live, nn.Parameter):
        return nn.Parameter(made, requires_grad=grad)
    return made.requires_grad_(grad)


def _fits(live: torch.Tensor, spec: TensorSpec) -> bool:
    return tuple(live.shape) == spec.shape and dtype_name(live.dtype) == spec.dtype
