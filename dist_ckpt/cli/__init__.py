"""The command line `dist-ckpt`: what `dist_ckpt.Run` returns, on a screen or as JSON."""

from dist_ckpt.cli.app import main

__all__ = ["main"]
