"""What `train(resume_from_checkpoint=...)` means."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from dist_ckpt.errors import ErrorKind, NotFound, UsageError
from dist_ckpt.format.names import parse_step_dir
from dist_ckpt.loading.loader import LoadReport
from dist_ckpt.run import Run
from dist_ckpt.storage.resolve import Place, resolve

if TYPE_CHECKING:
    from dist_ckpt.checkpointer import Checkpointer

# What a folder of transformers is called, by which people name a step.
_FOLDER = re.compile(r"checkpoint-([0-9]+)")

_ADVICE = (
    "with a Trainer: train(resume_from_checkpoint=True) goes on from the newest checkpoint, "
    "train(..., discard_newer=True) gives up what is newer than its start, and another output_dir "
    "keeps both"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerStart:
    """Where a training goes on from; without any of these it begins.

    Attributes:
        newest: from the newest checkpoint of the run.
        or_begin: with `newest`: a run without one begins.
        step: from this one of the run.
        place: from another run, or a step directory of one.
        folder: from what transformers itself wrote there, which it loads itself.
        discard_newer: whether what the run has beyond that is given up.
    """

    newest: bool = False
    or_begin: bool = False
    step: int | None = None
    place: str | None = None
    folder: str | None = None
    discard_newer: bool = False

    @classmethod
    def of(
        cls, resume: object, place: Place, *, output_dir: str, discard_newer: bool = False
    ) -> TrainerStart:
        """Return what the arguments of `train` mean.

        Args:
            resume: True for the newest, "auto" for the newest where there is one, a step, a path or
                a URL; None or False for a beginning.
            place: the run.
            output_dir: where transformers itself would have left checkpoints.
            discard_newer: see the class.

        Raises:
            UsageError: `resume` is none of these.
        """
        if resume is None or resume is False:
            return cls(discard_newer=discard_newer)
        if resume is True or resume == "auto":
            folder = _left_by_transformers(output_dir)
            # A run that has a checkpoint counts before the folder that it was begun from.
            if folder is not None and Run(place).latest() is None:
                return cls(folder=folder)
            begins = resume == "auto"
            return cls(newest=True, or_begin=begins, discard_newer=discard_newer)
        if isinstance(resume, str | os.PathLike):
            return cls(**_named(os.fspath(resume), place), discard_newer=discard_newer)
        try:
            # By `index`: numbers of numpy are steps, too, and 1.0 is none.
            return cls(step=index(resume), discard_newer=discard_newer)  # type: ignore[arg-type]
        except TypeError:
            raise UsageError(
                "resume_from_checkpoint is True, 'auto', a step, or where a checkpoint is, not "
                f"{resume!r}"
            ) from None

    def restore(self, checkpointer: Checkpointer) -> LoadReport | None:
        """Restore what this names; return None where the training begins.

        Raises:
            NotFound: there is nothing to go on from.
            UsageError: the run has checkpoints that would be left behind.
        """
        try:
            if self.newest:
                checkpointer.restore(discard_newer=self.discard_newer)
            elif self.step is not None or self.place is not None:
                checkpointer.restore(
                    step=self.step, url=self.place, discard_newer=self.discard_newer
                )
            else:
                checkpointer.restore("none", discard_newer=self.discard_newer)
        except UsageError as error:
            if error.kind in (ErrorKind.STEP_BEHIND, ErrorKind.NOT_RESTORED):
                # The error speaks of calls that a Trainer makes, and nobody else.
                error.add_note(_ADVICE)
            raise
        if self.newest and checkpointer.restored is None and not self.or_begin:
            raise NotFound(
                "train(resume_from_checkpoint=True): the run has no checkpoint to go on from; "
                "'auto' begins where there is none",
                kind=ErrorKind.NO_CHECKPOINT,
            )
        return checkpointer.restored


def _left_by_transformers(output_dir: str) -> str | None:
    found = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    return found if found is not None and _is_of_transformers(found) else None


def _is_of_transformers(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, TRAINER_STATE_NAME))


def _named(text: str, place: Place) -> dict[str, Any]:
    """Return the fields that a text stands for."""
    # As a flag or a config has it, where everything is text.
    if text.isascii() and text.isdecimal():
        return {"step": int(text)}
    run = Run(place).url
    # By URL, as a place can be spelled in many ways.
    if Run(text).url == run:
        return {"newest": True}
    if _is_of_transformers(text):
        return {"folder": text}
    parent, _, name = text.rstrip("/").rpartition("/")
    found = _FOLDER.fullmatch(name)
    # `checkpoint-500` is step 500 of this run, though there is no such folder.
    step = int(found[1]) if found else parse_step_dir(name)
    if step is not None and parent and resolve(parent).url == run:
        return {"step": step}
    return {"place": text}
