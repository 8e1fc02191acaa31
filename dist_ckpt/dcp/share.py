"""One rank's share of a stock save: Python values encoded, tensors copied into images of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dist_ckpt.dcp.edge import part_and_name
from dist_ckpt.dcp.faces import Face, local_face
from dist_ckpt.dcp.items import described, paths_of, tensors_of
from dist_ckpt.dcp.planners import value_of
from dist_ckpt.errors import UsageError
from dist_ckpt.foreign.dcp_runs import aside_name
from dist_ckpt.format import document
from dist_ckpt.format.boxes import volume
from dist_ckpt.format.digest import bytes_digest
from dist_ckpt.planning.describe import Held, LocalBox, local_boxes
from dist_ckpt.planning.files import StagedFile, plan_files, stage_documents
from dist_ckpt.planning.index import Document
from dist_ckpt.planning.owners import Owned
from dist_ckpt.planning.placing import check_as_stock
from dist_ckpt.state.layout import check_tensor, dtype_name
from dist_ckpt.state.objects import encode
from dist_ckpt.storage.direct import aligned_buffer


@dataclass(frozen=True, slots=True)
class StockShare:
    """What one rank writes.

    Attributes:
        planner: gives the tensors, each when its turn comes, since that may take memory.
        sources: what each of `held` is copied from: an item of the plan, or the memory itself.
        held: the boxes.
        owned: the same, as what is to be written.
        documents: the encoded Python values by part.
        faces: what is several tensors behind one face, by the number of the item.
        aside: the boxes of what is large in the Python values, the last ones of `held`.
    """

    planner: SavePlanner
    sources: Sequence[WriteItem | LocalBox]
    held: Sequence[Held]
    owned: Sequence[Owned]
    documents: Mapping[str, bytes]
    faces: Mapping[int, Face]
    aside: Sequence[Held]

    def described_documents(self) -> list[Document]:
        """Return what rank 0 must know of the Python values."""
        return [
            Document(part, False, len(data), bytes_digest(data))
            for part, data in self.documents.items()
        ]


def resolve_share(rank: int, plan: SavePlan, planner: SavePlanner) -> StockShare:
    """Encode the Python values of `plan`, taken from `planner` as they are, not as its pickles.

    Raises:
        UsageError: a value of an unknown type, named by its path; or see `value_of`, `local_face`.
    """
    paths = paths_of(plan)
    values: dict[str, dict[str, bytes]] = {}
    beside: list[LocalBox] = []
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO:
            part, name = part_and_name(item.index.fqn, paths)
            large: dict[str, torch.Tensor] = {}
            values.setdefault(part, {})[name] = encode(
                value_of(planner, item),
                path=item.index.fqn,
                tensors=large,
                prefix=aside_name(rank, name),
                large_only=True,
            )
            beside += local_boxes({part: large})
    documents = {part: document.encode(objects) for part, objects in values.items()}
    live = getattr(planner, "state_dict", {})
    sources: list[WriteItem | LocalBox] = []
    faces: dict[int, Face] = {}
    for number, item in enumerate(tensors_of(plan)):
        check_as_stock(live.get(item.index.fqn), f"tensor {item.index.fqn!r}")
        found = local_face(planner, item, paths)
        if found is not None:
            faces[number] = found.face
        sources += [item] if found is None else found.boxes
    aside = [box.held for box in beside]
    boxes = described(plan, {number: face.held for number, face in faces.items()}, aside)
    return StockShare(planner, [*sources, *beside], *boxes, documents, faces, aside)


def file_images(rank: int, share: StockShare) -> Iterator[StagedFile]:
    """Yield each file that `rank` writes, one in memory at a time.

    Raises:
        UsageError: a tensor has no data, is sparse or quantized, or is not what was planned.
    """
    for plan in plan_files(rank, share.held, share.owned):
        image = aligned_buffer(plan.layout.nbytes)
        image[: len(plan.layout.header)] = plan.layout.header
        for owned, offset in zip(plan.owned, plan.layout.offsets, strict=True):
            if volume(owned.box):
                _copy(share, owned.held, image, offset)
        yield StagedFile(plan.name, image, plan.layout.blocks)
        del image  # before the next one is made
    if share.documents:
        yield stage_documents(rank, share.documents)


def _copy(share: StockShare, number: int, image: memoryview, offset: int) -> None:
    source, held = share.sources[number], share.held[number]
    resolved: object
    if isinstance(source, LocalBox):
        fqn, resolved = held.name, source.memory
    else:
        fqn, resolved = source.index.fqn, share.planner.resolve_data(source)
    if not isinstance(resolved, torch.Tensor) or isinstance(resolved, DTensor):
        kind = type(resolved).__qualname__
        raise UsageError(f"the planner gave a {kind} for tensor {fqn!r}: expected its local memory")
    tensor = check_tensor(resolved, fqn)
    found = (dtype_name(tensor.dtype), tuple(tensor.shape))
    # A planner that transforms what it gives, but not what it plans, would be stored as something
    # that its description is not.
    if found != (held.dtype, held.sizes):
        raise UsageError(
            f"the planner gave {found[0]}{list(found[1])} for tensor {fqn!r}, planned was "
            f"{held.dtype}{list(held.sizes)}: plan what resolve_data returns"
        )
    target = torch.frombuffer(image, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    target.view(tensor.shape).copy_(tensor)
