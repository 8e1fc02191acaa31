"""A dict of tensors as a part: each one is loaded in place, under its key."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch

from dist_ckpt.errors import UsageError
from dist_ckpt.state.layout import check_tensor
from dist_ckpt.state.part import Captured, Stored, Targets


class TensorsPart:
    """Named tensors without a module around them: a state dict, filled where it lies.

    One on the meta device is replaced in the dict by the real one.
    """

    def __init__(self, tensors: object, *, name: str = "model") -> None:
        """Take the dict itself, not a copy.

        Raises:
            UsageError: it is no dict of tensors by name.
        """
        if not isinstance(tensors, Mapping):
            kind = type(tensors).__qualname__
            raise UsageError(f"{name} is a module or a dict of tensors by name, not a {kind}")
        for key, tensor in tensors.items():
            if not (isinstance(key, str) and isinstance(tensor, torch.Tensor)):
                raise UsageError(
                    f"{name} is a dict of tensors by name here, but has a "
                    f"{type(tensor).__qualname__} under {key!r}"
                )
        self.tensors: Mapping[str, torch.Tensor] = tensors
        self.name = name

    def capture(self) -> Captured:
        """Return the live tensors."""
        found = {key: check_tensor(t, f"{self.name}.{key}") for key, t in self.tensors.items()}
        return Captured(found, {})

    def targets(self, stored: Stored) -> Targets:
        """Return the live tensors that are stored.

        Raises:
            UsageError: one is on the meta device, and the dict cannot take another.
        """
        targets = Targets(unexpected=sorted(stored.objects))
        aliases: dict[int, torch.Tensor] = {}
        for key, tensor in self.tensors.items():
            alias = check_tensor(tensor, f"{self.name}.{key}", meta=True)
            if alias.device.type == "meta" and not isinstance(self.tensors, MutableMapping):
                raise UsageError(f"{self.name}.{key} is on the meta device: give a dict")
            if key in stored.tensors:
                targets.tensors[key] = aliases.setdefault(id(tensor), alias)
            else:
                targets.missing.append(key)
        targets.unexpected.extend(sorted(stored.tensors.keys() - self.tensors.keys()))
        return targets

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put real tensors in the place of those on the meta device; others are filled already."""
        for key, tensor in tensors.items():
            if self.tensors[key].device.type == "meta" and isinstance(self.tensors, MutableMapping):
                self.tensors[key] = tensor
