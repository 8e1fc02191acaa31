"""The arena: the reusable host buffer that a save is written from, and the copies into it."""

from dist_ckpt.staging.arena import Arena
from dist_ckpt.staging.copy import copy_box

__all__ = ["Arena", "copy_box"]
