"""A dict of tensors as a part: each one is loaded in place, under its key."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping

import torch

from dist_ckpt.errors import UsageError
from dist_ckpt.state.adapters import fit_adapter
from dist_ckpt.state.layout import check_tensor, is_beside, memory_of
from dist_ckpt.state.module_state import partners
from dist_ckpt.state.part import Captured, Stored, Targets
from dist_ckpt.state.spread import pieces


class TensorsPart:
    """Named tensors without a module around them: a state dict, filled where it lies.

    One on the meta device is replaced in the dict by the real one. One that is several tensors
    behind one face is these, `key.<attribute>` each.
    """

    def __init__(
        self, tensors: object, *, name: str = "model", passed_over: Collection[str] = ()
    ) -> None:
        """Take the dict itself, not a copy.

        Args:
            tensors: the dict.
            name: of the part, for messages.
            passed_over: names of what is no weight: of such an entry it does not matter if it is
                stored and not in the dict, or the other way round.

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
        self._passed_over = frozenset(passed_over)

    def capture(self) -> Captured:
        """Return the live tensors."""
        leaves = self._leaves()
        found = {key: check_tensor(each, f"{self.name}.{key}") for key, each in leaves.items()}
        return Captured(found, {})

    def targets(self, stored: Stored) -> Targets:
        """Return the live tensors that are stored.

        Raises:
            UsageError: one is on the meta device, and the dict cannot take another.
        """
        targets = Targets(unexpected=sorted(stored.objects))
        leaves = self._leaves()
        found, optional = self._partners(stored, leaves)
        aliases: dict[int, torch.Tensor] = {}
        for key, tensor in leaves.items():
            alias = check_tensor(tensor, f"{self.name}.{key}", meta=True)
            if alias.device.type == "meta":
                if key not in self.tensors:
                    raise UsageError(
                        f"{self.name}.{key} is on the meta device, and one of several tensors "
                        "behind one face: give it memory first"
                    )
                if not isinstance(self.tensors, MutableMapping):
                    raise UsageError(f"{self.name}.{key} is on the meta device: give a dict")
            if key in found:
                # One alias for tied names: on the meta device that is all that ties them.
                targets.tensors[found[key]] = aliases.setdefault(id(tensor), alias)
                # Of what is several, the rows of one are no rows.
                if key in self.tensors and (rule := stored.resize(found[key])) is not None:
                    targets.resized[found[key]] = rule
            elif key not in optional:
                targets.missing.append(key)
        # A name whose memory is filled under another one is not missing.
        filled = {memory_of(leaves[key]) for key in found}
        missing = [key for key in targets.missing if memory_of(leaves[key]) not in filled]
        targets.missing[:] = missing
        unknown = stored.tensors.keys() - targets.tensors.keys() - self._passed_over
        targets.unexpected.extend(
            sorted(
                name
                for name in unknown
                # What makes a weight of high precision quicker to use is nothing to who has that.
                if not (is_beside(name) and name.rpartition(".")[0] in targets.tensors)
            )
        )
        return targets

    def _leaves(self) -> dict[str, torch.Tensor]:
        """Return what is stored, by name.

        Raises:
            UsageError: two have one name, or one is sharded in a way that nobody can follow.
        """
        found: dict[str, torch.Tensor] = {}
        for key, tensor in self.tensors.items():
            for name, each in pieces(tensor, f"{self.name}.{key}").items():
                if key + name in found or (name and key + name in self.tensors):
                    raise UsageError(
                        f"{self.name}: two tensors would be stored as {key + name!r}, of which "
                        f"{key!r} is one of several behind one face: rename the other"
                    )
                found[key + name] = each
        return found

    def _partners(
        self, stored: Stored, leaves: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, str], Collection[str]]:
        """Return the stored name of each leaf that has one, and the leaves that need none."""
        if not stored.is_adapter:
            names = leaves.keys(), stored.tensors.keys()
            return partners(*names, is_foreign=stored.is_foreign), self._passed_over
        adapter = fit_adapter(leaves.keys(), stored.tensors.keys(), self.name)
        return adapter.found, self._passed_over | (leaves.keys() - adapter.own)

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put real tensors in the place of those on the meta device; others are filled already."""
        if isinstance(self.tensors, MutableMapping):
            real = {}
            leaves = self._leaves()
            for key, name in self._partners(stored, leaves)[0].items():
                if name in tensors and leaves[key].device.type == "meta":
                    real[id(leaves[key])] = tensors[name]
            for key, tensor in self.tensors.items():
                if id(tensor) in real:  # under all names that it has
                    self.tensors[key] = real[id(tensor)]
