"""A save under the stock entry points: the commit by rank 0, and one rank's share of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dist_ckpt.dcp.edge import part_and_name
from dist_ckpt.dcp.faces import Face, agreed, local_face
from dist_ckpt.dcp.items import described, paths_of, tensors_of
from dist_ckpt.dcp.planners import value_of
from dist_ckpt.dcp.turns import in_stock_save
from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CheckpointError, UsageError
from dist_ckpt.foreign.dcp_runs import NAMING, aside_name, naming_version, path_of
from dist_ckpt.foreign.dcp_tree import FACES, TREE, TREE_FILE, encode_faces, encode_tree
from dist_ckpt.format.files import FileEntry, bytes_digest
from dist_ckpt.format.index import Held, Index, volume
from dist_ckpt.format.manifest import FilesTotal, Manifest, RankTimings, encode_document, longest
from dist_ckpt.format.segments import Spent
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.planning.describe import LocalBox, local_boxes
from dist_ckpt.planning.files import (
    Document,
    RankShare,
    StagedFile,
    WrittenFile,
    build_index,
    plan_files,
    stage_documents,
    versions,
)
from dist_ckpt.planning.owners import Owned
from dist_ckpt.planning.placing import check_as_stock
from dist_ckpt.repository import Transaction
from dist_ckpt.repository.history import delete_attempt
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.layout import check_tensor, dtype_name
from dist_ckpt.storage.disk import aligned_buffer
from dist_ckpt.threads import Latch

# How often stock's own call is looked at: nothing waits for that but the removal of files.
_LOOK_SECONDS = 0.2


@decodable
class StockReport(msgspec.Struct, frozen=True):
    """What a rank wrote, and how long it took; on rank 0 the file of the tree, too.

    What is several tensors behind one face is in `faces`, by the number of the item in the plan;
    what is large in the Python values is in `aside`.
    """

    save_id: str
    files: list[WrittenFile]
    documents: list[Document]
    stage_seconds: float
    write_seconds: float
    faces: dict[int, Face]
    aside: list[Held]
    tree: WrittenFile | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.nbytes for file in self.files)


class StockAttempt:
    """An attempt between its plans and its results, on rank 0.

    Args:
        transaction: where the files go.
        plans: by rank; let go of when the save is over.
    """

    def __init__(self, transaction: Transaction, plans: Sequence[SavePlan]) -> None:
        self.transaction = transaction
        self._plans = plans

    def clean_up(self) -> None:
        """Remove what all ranks wrote, unless the checkpoint may exist; for when all have ended.

        What cannot be removed now is garbage for the next job's first save.
        """
        self._plans = ()
        # Also where the outcome is not known: the manifest may be there, and its files must stay.
        if not self.transaction.may_exist:
            with suppress(CheckpointError):
                store, step = self.transaction.store, self.transaction.step
                delete_attempt(store, step, self.transaction.save_id)

    def clean_up_when(self, over: Latch) -> None:
        """Do so when the save is over: nothing tells a writer that it failed on another rank.

        In a thread: who tells it may be a destructor, which must not wait for a store. And one that
        comes late, where the error is kept or waits for the garbage collection: so stock's own call
        is looked at as well.
        """
        caller = threading.get_ident()
        seen = in_stock_save(caller)  # false if another program follows the protocol

        def wait() -> None:
            while not over.wait(_LOOK_SECONDS):
                if seen and not in_stock_save(caller):
                    break
            self.clean_up()

        threading.Thread(target=wait, name="dist_ckpt-tidy", daemon=True).start()

    def faces(self, reports: Sequence[StockReport]) -> dict[str, Any]:
        """Return what is to be kept of tensors that are several, by flattened name.

        Raises:
            IncompatibleError: their shards do not belong together.
        """
        plans = [tensors_of(plan) for plan in self._plans]
        return agreed(plans, [report.faces for report in reports])

    def commit(
        self,
        reports: Sequence[StockReport],
        *,
        metrics: Mapping[str, float],
        metadata: Mapping[str, Any],
    ) -> None:
        """Make the checkpoint exist, given the report of each rank.

        Raises:
            IntegrityError: a rank wrote other files than were planned.
            FencedError: a newer claim owns the run; nothing was committed.
            AlreadyExists: another attempt committed the step.
            StorageError: the commit did not take effect.
        """
        transaction = self.transaction
        shares = [
            RankShare(
                *described(plan, _boxes(report), report.aside), report.files, report.documents
            )
            for plan, report in zip(self._plans, reports, strict=True)
        ]
        # Compares every report with the plan, and so comes before anything of the commit is stored.
        index = with_tree(build_index(shares), reports[0].tree)
        aside = any(report.aside for report in reports)
        parts = [tensor.part for tensor in index.tensors]
        parts += [entry.part for entry in index.objects]

        draft = Manifest(
            step=transaction.step,
            save_id=transaction.save_id,
            claim=transaction.claim,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=len(reports),
            # By this readers know that the names are those of a stock state dict (format-v1, 4.4).
            versions=versions() | {NAMING: naming_version(aside=aside)},
            # A manifest names no part twice (format-v1, section 6); the order is that of the index.
            parts=list(dict.fromkeys(parts)),
            files=FilesTotal.of(file.nbytes for file in index.files),
            metrics=dict(metrics),
            metadata=dict(metadata),
            timings=longest([_timings(report) for report in reports]),
            # A storage writer is not told what the program has loaded.
            parent_step=None,
        )

        spent = [Spent(each.stage_seconds, each.write_seconds) for each in reports]
        # Stock carries the whole reports to rank 0, so no rank puts a segment of its own.
        transaction.commit(encode_whole(index, spent), draft)


def _boxes(report: StockReport) -> dict[int, Sequence[Held]]:
    return {number: face.held for number, face in report.faces.items()}


def _timings(report: StockReport) -> RankTimings:
    return RankTimings(
        stage_seconds=report.stage_seconds,
        write_seconds=report.write_seconds,
        nbytes=report.nbytes,
    )


# One rank's share of a stock save: Python values encoded, tensors copied into images of files.


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
                # With rank and length of the name in it: no entry has such a name (format-v1, 4.4).
                prefix=aside_name(rank, name),
                large_only=True,
            )
            beside += local_boxes({part: large})
    documents = {part: encode_document(objects) for part, objects in values.items()}
    live = getattr(planner, "state_dict", {})
    sources: list[WriteItem | LocalBox] = []
    faces: dict[int, Face] = {}
    for number, item in enumerate(tensors_of(plan)):
        # The plan of torch does not say how a DTensor is cut otherwise, and would be believed.
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
            # `torch.frombuffer` refuses a count of 0.
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


# What the Writer adds to a checkpoint for the tree of its state dict: one more file.


def tree_file(metadata: Metadata, faces: Mapping[str, Mapping[str, Any]]) -> StagedFile | None:
    """Return the file that keeps the tree, None if the names alone tell it.

    Args:
        metadata: what the planner said.
        faces: what is noted of entries that are several tensors behind one face.

    Raises:
        UsageError: the planner's data hold something of an unknown type, named by its path.
    """
    data = metadata.planner_data
    paths: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    told = {fqn: path_of(*part_and_name(fqn, paths)) for fqn in metadata.state_dict_metadata}
    # The usual case: what the names tell by themselves is not stored a second time.
    if data == told and not faces:
        return None
    kept = {TREE: encode_tree(data)}
    if faces:
        kept[FACES] = encode_faces(faces)
    return replace(stage_documents(0, kept), name=TREE_FILE)


def with_tree(index: Index, tree: WrittenFile | None) -> Index:
    """Return `index` with the file of the tree, if there is one: nothing in it is an entry."""
    if tree is None:
        return index
    entry = FileEntry.of(tree.name, tree.nbytes, tree.blocks, tree.lengths)
    return replace(index, files=(*index.files, entry))
