"""The arena: the reusable host buffer that a save is written from, and the copies into it."""

from dist_ckpt.staging.arena import Arena

__all__ = ["Arena"]
