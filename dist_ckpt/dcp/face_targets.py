"""Where stored tensors go in what is several of them behind one face, under torch's own loads."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dist_ckpt.dcp.catalog import Catalog
from dist_ckpt.dcp.faces import laid_out
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.loading.wanted import Wanted
from dist_ckpt.planning.describe import local_boxes
from dist_ckpt.state.layout import dtype_name, dtype_of
from dist_ckpt.state.rebuilding import difference, how_made
from dist_ckpt.state.spread import pieces
from dist_ckpt.state.wrapped import is_wrapped, label_of, local_of, stored_shape


def live_face(found: Catalog, item: ReadItem, planner: LoadPlanner) -> torch.Tensor | None:
    """Return the live tensor for `item` if that is several behind one face, live or as stored.

    Not so where a plain tensor takes what is one of them, and whole by itself.
    """
    live, fqn = getattr(planner, "state_dict", {}).get(item.dest_index.fqn), item.storage_index.fqn
    several = is_wrapped(live) or (fqn in found.faces and fqn not in found.tensors)
    return live if several and isinstance(live, torch.Tensor) else None


def face_targets(
    found: Catalog, item: ReadItem, live: torch.Tensor, given: torch.Tensor | None = None
) -> list[Wanted]:
    """Return where the tensors go that are stored for `item`.

    Args:
        found: what is stored.
        item: what is wanted.
        live: the tensor of the state dict.
        given: what a planner wants filled instead of what is on this rank of `live`.

    Raises:
        IncompatibleError: they do not fit; nothing was changed.
    """
    fqn, stored = item.storage_index.fqn, found.source.tensors
    if not is_wrapped(live):
        _refuse(found, fqn, live, "give a tensor of that class: none is converted")
    here = local_of(live)
    value = here if given is None else given
    if tuple(item.lengths) != tuple(here.shape) or tuple(value.shape) != tuple(here.shape):
        _refuse(found, fqn, live, f"only all {list(here.shape)} of this rank can be read at once")
    if not is_wrapped(value):
        _refuse(found, fqn, live, "resolve_tensor of the planner has to return one, too")
    whole = laid_out(value, live)
    if fqn in found.faces:
        problem = difference(how_made(whole), found.faces[fqn])
        if problem is not None:
            _refuse(found, fqn, live, f"stored and in the state dict are {problem}")
    wanted: list[Wanted] = []
    for suffix, tensor in pieces(whole, fqn).items():
        number = found.tensors.get(fqn + suffix)
        if number is None:
            _refuse(found, fqn, live, f"no {fqn + suffix!r} is stored")
        entry = stored[number]
        kept, has = (entry.dtype, entry.shape), (dtype_name(tensor.dtype), stored_shape(tensor))
        if kept != has:
            was, now = (f"{dtype}{list(shape)}" for dtype, shape in (kept, has))
            _refuse(found, fqn, live, f"{fqn + suffix!r} is stored as {was}, and is {now} here")
        boxes = local_boxes({entry.part: {entry.name: tensor}})
        wanted += [Wanted(number, box, dtype_of(entry.dtype)) for box in boxes]
    return wanted


def _refuse(found: Catalog, fqn: str, live: torch.Tensor, why: str) -> NoReturn:
    noted = found.faces.get(fqn)
    stored = "a plain tensor" if fqn in found.tensors else "no tensor by itself"
    if noted is not None:
        stored = f"a {noted.get('class')}, which is several tensors in one"
    kind = label_of(type(local_of(live)))
    raise IncompatibleError(
        f"{fqn!r} is {stored} in {found.source.where}, and the state dict has a {kind}: {why}; it "
        "was not changed",
        kind=ErrorKind.STATE_MISMATCH,
    )
