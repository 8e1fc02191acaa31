"""What a module shows in its state dict and does not take: what quantizing libraries keep there.

torch's own load would leave it in the list of unexpected keys. It is filled where the module keeps
it, if it can be seen to be kept, or given back to a parameter whose quantization is a value with
`as_dict` and `from_dict` (bitsandbytes). All else is refused while nothing has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dist_ckpt.errors import IncompatibleError, describe, is_refusal

_ATTRIBUTE = "quant_state"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A parameter that shows what it was quantized with.

    Attributes:
        prefix: of the names that it shows.
        owner: the module that has it.
        parameter: the parameter itself.
    """

    prefix: str
    owner: nn.Module
    parameter: nn.Parameter

    def give(self, stored: Mapping[str, torch.Tensor], part: str) -> None:
        """Give it what was stored, by the names that it has for it.

        Raises:
            IncompatibleError: it makes something else of that.
        """
        state = getattr(self.parameter, _ATTRIBUTE)
        where = f"{part}: what {self.prefix!r} was quantized with"
        _check_plain(stored, where)
        try:
            made = type(state).from_dict(dict(stored), device=self.parameter.device)
            again = made.as_dict(packed=True)
        except Exception as error:
            if not is_refusal(error):
                raise
            raise IncompatibleError(f"{where} is refused: {describe(error)}") from error
        if again.keys() != stored.keys() or not all(
            torch.equal(again[name].cpu(), tensor.cpu()) for name, tensor in stored.items()
        ):
            raise IncompatibleError(f"{where} does not come back as it was stored")
        setattr(self.parameter, _ATTRIBUTE, made)
        if getattr(self.owner, _ATTRIBUTE, None) is state:  # the module may keep it as well
            setattr(self.owner, _ATTRIBUTE, made)


def quantized_by(module: nn.Module, raw_name: str) -> Quantized | None:
    """Return the parameter below `module` that shows `raw_name` as a part of its quantization."""
    owner, rest = _owner(module, raw_name)
    name, dot, key = rest.partition(".")
    parameter = owner._parameters.get(name)  # noqa: SLF001
    state = getattr(parameter, _ATTRIBUTE, None)
    if (
        not dot
        or parameter is None
        or state is None
        or not callable(getattr(type(state), "from_dict", None))
    ):
        return None
    try:
        shown = state.as_dict(packed=True)
    except Exception:
        return None  # whatever it is, it is something else
    if not isinstance(shown, dict) or key not in shown:
        return None
    return Quantized(raw_name.removesuffix(key), owner, parameter)


def give_quantized(
    quantized: Mapping[str, Quantized],
    raw_names: Mapping[str, str],
    read: Mapping[str, torch.Tensor],
    part: str,
) -> None:
    """Give parameters what they were quantized with.

    Args:
        quantized: by the name of what they show of it, the parameter.
        raw_names: what the module calls each.
        read: what was read for each.
        part: what the module is called, for messages.

    Raises:
        IncompatibleError: see `Quantized.give`.
    """
    together: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read.items():
        prefix = quantized[name].prefix
        together.setdefault(prefix, {})[raw_names[name].removeprefix(prefix)] = tensor
    owners = {each.prefix: each for each in quantized.values()}
    for prefix, stored in together.items():
        owners[prefix].give(stored, part)


def is_untold(module: nn.Module, raw_name: str) -> bool:
    """Tell whether nothing in `module` would take `raw_name` out of a state dict.

    Given that it is no parameter, buffer or extra state: so it is where all modules on the way to
    it are loaded by torch's own method, without a hook.
    """
    each: nn.Module | None = module
    for component in [*raw_name.split("."), ""]:
        if each is None:
            break
        plain = type(each)._load_from_state_dict is nn.Module._load_from_state_dict  # noqa: SLF001
        own = {"_load_from_state_dict", "load_state_dict"} & vars(each).keys()
        replaced = type(each).load_state_dict is not nn.Module.load_state_dict
        if own or replaced or not plain or each._load_state_dict_pre_hooks:  # noqa: SLF001
            return False
        each = each._modules.get(component)  # noqa: SLF001
    return True


def _owner(module: nn.Module, raw_name: str) -> tuple[nn.Module, str]:
    """Return the innermost module on the way to `raw_name`, and what of the name is left."""
    while True:
        first, _, rest = raw_name.partition(".")
        inner = module._modules.get(first)  # noqa: SLF001
        if inner is None or not rest:
            return module, raw_name
        module, raw_name = inner, rest


def _check_plain(stored: Mapping[str, torch.Tensor], where: str) -> None:
    """Check the packed values: their dtypes are looked up by name, and are to be dtypes."""
    for name, tensor in stored.items():
        if not name.startswith(f"{_ATTRIBUTE}."):
            continue
        try:
            packed = json.loads(bytes(tensor.cpu().numpy()))
            named = [packed[key] for key in packed if key.endswith("dtype")]
            plain = all(isinstance(getattr(torch, each, None), torch.dtype) for each in named)
        except (TypeError, ValueError, RecursionError, RuntimeError) as error:
            raise IncompatibleError(f"{where} is malformed: {describe(error)}") from error
        if not plain:
            raise IncompatibleError(f"{where} is malformed: {named} are no dtypes")
