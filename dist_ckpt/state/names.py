"""Canonical names: what a parameter is called whatever the module is wrapped in."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from dist_ckpt.errors import UsageError

# Known by their full names, so that none of them is imported for the question alone. Value: the
# attribute that holds the wrapped module.
_WRAPPERS: dict[tuple[str, str], str] = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("lightning.fabric.wrappers", "_FabricModule"): "_forward_module",
    ("lightning_fabric.wrappers", "_FabricModule"): "_forward_module",
    # Not to be taken off by a user, but averaged weights are to load into a plain model, too.
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
    ): "_checkpoint_wrapped_module",
}
# Of these the names are met in stored files only: no module here is one.
_ELSEWHERE = ("_fsdp_wrapped_module", "_fpw_module")
_WRAPPED_IN = frozenset((*_WRAPPERS.values(), *_ELSEWHERE))
_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


def wrapped_attribute(module: nn.Module) -> str | None:
    """Return the attribute under which the wrapper `module` holds what it wraps, if it is one."""
    # All bases, because frameworks subclass DDP.
    for cls in type(module).__mro__:
        attribute = _WRAPPERS.get((cls.__module__, cls.__qualname__))
        if attribute is not None:
            return attribute
    return None


def canonical_name(root: nn.Module, name: str) -> str:
    """Return `name`, an entry of the state dict of `root`, without what wrappers put into it.

    Only a component under which a wrapper of the module tree really holds its module is
    dropped: a submodule that a user called `module` keeps its name.
    """
    node: object = root
    kept: list[str] = []
    for component in name.split("."):
        dropped = False
        # Some wrappers take their component out of the names by a hook, others leave it in.
        while isinstance(node, nn.Module) and (attribute := wrapped_attribute(node)) is not None:
            node = getattr(node, attribute)  # go in, whether the name says so or not
            if component == attribute:
                dropped = True
                break
        if not dropped:
            kept.append(component)
            node = getattr(node, component, None)  # a parameter ends the walk
    return ".".join(kept)


def refuse_fsdp1(root: nn.Module, part: str) -> None:
    """Raise `UsageError` if `root` holds a module whose parameters are flat and nameless."""
    for name, module in root.named_modules():
        if any((cls.__module__, cls.__qualname__) == _FSDP1 for cls in type(module).__mro__):
            raise UsageError(
                f"{part} holds a FullyShardedDataParallel module at {name or 'its root'!r}, which "
                "flattens its parameters: shard it with torch.distributed.fsdp.fully_shard. Or let "
                "torch name them: dcp.save of get_state_dict(model, optimizer) with "
                "storage_writer=dist_ckpt.dcp.Writer(run), and dcp.load with dist_ckpt.dcp.Reader; "
                "what is saved so loads into any other layout by dist_ckpt.load"
            )


def partners(
    wanted: Collection[str], stored: Collection[str], *, is_foreign: bool
) -> dict[str, str]:
    """Return the stored name for each wanted one that has a partner.

    That is the same name. What has none is looked for without the names that wrappers put in front
    of or into others (`module.`, `_orig_mod.`): a dict of tensors does not say what it was wrapped
    in, nor does a wrapper that nobody here knows. Two that would fall together are no partners.
    Where not one is found, and another program gave the names, what all names of one side begin
    with is left away (`model.`, of a module in which the network is an attribute), if one side then
    is in the other. A model of the program's own that is another one is told so.
    """
    found = {name: name for name in wanted if name in stored}
    loose = [name for name in stored if name not in found]
    without: dict[str, str | None] = {}
    for name in loose:
        short = _without_wrappers(name)
        without[short] = None if short in without else name
    asked: dict[str, str | None] = {}
    for name in wanted:
        if name not in found:
            short = _without_wrappers(name)
            asked[short] = None if short in asked else name
    for short, asking in asked.items():
        partner = without.get(short)
        if asking is not None and partner is not None:
            found[asking] = partner
    if found or not is_foreign:
        return found
    return _without_beginning(_known(asked), _known(without))


def _known(names: Mapping[str, str | None]) -> dict[str, str]:
    return {short: name for short, name in names.items() if name is not None}


def _without_beginning(wanted: dict[str, str], stored: dict[str, str]) -> dict[str, str]:
    """Return the partners of names of which one side has a beginning that the other lacks."""
    for shorter, other, are_wanted in ((stored, wanted, False), (wanted, stored, True)):
        rest = shorter
        while (first := _beginning(rest)) is not None:
            rest = {name.removeprefix(first): full for name, full in rest.items()}
            common = rest.keys() & other.keys()
            if common and len(common) in (len(rest), len(other)):
                if are_wanted:
                    return {rest[name]: other[name] for name in common}
                return {other[name]: rest[name] for name in common}
    return {}


def _beginning(names: Collection[str]) -> str | None:
    """Return the component that all `names` begin with, and its dot; None without one."""
    firsts = {name.partition(".")[0] for name in names if "." in name}
    if len(firsts) != 1 or not all("." in name for name in names):
        return None
    return f"{firsts.pop()}."


def wrapper_prefix(names: Collection[str]) -> str:
    """Return what a wrapper put in front of all `names`, dots included; empty without one.

    Not of a name without dots: that is the wrapper's own (how often it has averaged).
    """
    inner = [name.split(".") for name in names if "." in name]
    prefix = ""
    while inner and len(firsts := {parts[0] for parts in inner if len(parts) > 1}) == 1:
        first = firsts.pop()
        if first not in _WRAPPED_IN or any(len(parts) == 1 for parts in inner):
            break
        prefix += f"{first}."
        inner = [parts[1:] for parts in inner]
    return prefix


def _without_wrappers(name: str) -> str:
    *inner, last = name.split(".")
    return ".".join([each for each in inner if each not in _WRAPPED_IN] + [last])
