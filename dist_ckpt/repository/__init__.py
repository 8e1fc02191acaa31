"""One run: list, open, begin, commit, keep, collect, verify."""

from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.repository.commit import Transaction
from dist_ckpt.repository.history import History, Record
from dist_ckpt.repository.repository import Repository
from dist_ckpt.repository.verify import VerifyReport

__all__ = ["Checkpoint", "History", "Record", "Repository", "Transaction", "VerifyReport"]
