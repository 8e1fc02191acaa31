"""The parameters and groups of an optimizer, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_ckpt.state.groups import group_name, is_group_name
from dist_ckpt.state.model import ModelPart

STATE = "state."


@dataclass(frozen=True)
class View:
    """One optimizer as it is now.

    Attributes:
        prefix: what all its names begin with; empty for the only one of its part.
        parameters: by name, in the order of the groups.
        groups: the live groups by name.
        members: by group, the names of its parameters.
    """

    prefix: str
    parameters: dict[str, torch.Tensor]
    groups: dict[str, dict[str, Any]]
    members: dict[str, list[str]]

    @classmethod
    def of(
        cls, groups: Iterable[dict[str, Any]], names: Mapping[int, str], *, prefix: str = ""
    ) -> View:
        """Name what is in `groups`; `names` has the parameters of models by `id`."""
        parameters: dict[str, torch.Tensor] = {}
        by_name: dict[str, dict[str, Any]] = {}
        members: dict[str, list[str]] = {}
        for i, group in enumerate(groups):
            listed = []
            for j, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"group{i}.param{j}")
                while name in parameters:  # a module may be called group0, too
                    name += "_"
                parameters[name] = parameter
                listed.append(name)
            called = prefix + group_name(i, listed)
            by_name[called] = group
            members[called] = listed
        return cls(prefix, parameters, by_name, members)

    @property
    def sizes(self) -> list[int]:
        """How many parameters each group has."""
        return [len(listed) for listed in self.members.values()]

    def name(self, parameter: str, key: str) -> str:
        """Return what `key` of the state of a parameter is called."""
        return f"{self.prefix}{STATE}{parameter}.{key}"

    def owner(self, name: str) -> tuple[str, str] | None:
        """Split what `name` made, where a parameter of that name exists."""
        start = self.prefix + STATE
        if name.startswith(start):
            rest = name.removeprefix(start)
            cut = rest.rfind(".")
            while cut > 0:  # a parameter's name has dots, and so may a key
                if rest[:cut] in self.parameters:
                    return rest[:cut], rest[cut + 1 :]
                cut = rest.rfind(".", 0, cut)
        return None

    def is_group(self, name: str) -> bool:
        """Tell whether `name` is that of a group of this optimizer, live or stored."""
        return name.startswith(self.prefix) and is_group_name(name.removeprefix(self.prefix))


def parameter_names(
    models: Sequence[ModelPart], parameters: Iterable[torch.Tensor]
) -> dict[int, str]:
    """Return the names of those of `parameters` that belong to a model, by `id`."""
    # By identity: a parameter does not know its name.
    mine = {id(parameter) for parameter in parameters}
    by_model = [(model.name, model.parameter_names()) for model in models]
    spanned = [(name, names) for name, names in by_model if mine & names.keys()]
    out: dict[int, str] = {}
    for model_name, names in spanned:
        # One model needs no prefix, so a second one in the state does not rename anything.
        prefix = f"{model_name}." if len(spanned) > 1 else ""
        for key, name in names.items():
            out.setdefault(key, prefix + name)
    return out
