"""Our Writer and Reader under the names of torch's, put wherever torch has its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# The last two derive from the classes of torch: they have to have done so before.
from torch.distributed.checkpoint import (
    _fsspec_filesystem,
    _storage_utils,
    filesystem,
    format_utils,
    hf_storage,
)

from dist_ckpt.dcp import Reader, Writer
from dist_ckpt.repository import Repository
from dist_ckpt.storage import LocalStore

_USERS = (filesystem, _storage_utils, format_utils)
_LEFT = (_fsspec_filesystem, hf_storage)


class FileSystemWriter(Writer):
    """Our Writer with the arguments of torch's, of which only the place is heard.

    A step is not overwritten, so each save to one place is the next step of its run, of which
    the Reader takes the newest.
    """

    def __init__(self, path: Any, *_: Any, **__: Any) -> None:
        super().__init__(path)
        self.path = Path(path)

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id:
            self.__init__(checkpoint_id)  # type: ignore[misc]  # another place, as in torch

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        steps = Repository(LocalStore(self.path)).steps()
        super().reset(steps[-1] + 1 if steps else 0)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    validate_checkpoint_id = filesystem.FileSystemWriter.validate_checkpoint_id  # type: ignore[assignment]


class FileSystemReader(Reader):
    """Our Reader with the arguments of torch's."""

    def __init__(self, path: Any, *_: Any, **__: Any) -> None:
        super().__init__(path)
        self.path = Path(path)

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id:
            self.__init__(checkpoint_id)  # type: ignore[misc]

    validate_checkpoint_id = filesystem.FileSystemReader.validate_checkpoint_id  # type: ignore[assignment]


def _replace() -> None:
    ours: dict[Any, type] = {
        filesystem.FileSystemWriter: FileSystemWriter,
        filesystem.FileSystemReader: FileSystemReader,
    }
    for name, module in [*sys.modules.items()]:
        if name.startswith("torch.distributed.checkpoint") and module not in _LEFT:
            for own, value in [*vars(module).items()]:
                if isinstance(value, type) and value in ours:
                    setattr(module, own, ours[value])
    assert all(vars(user)["FileSystemReader"] is FileSystemReader for user in _USERS)


_replace()
