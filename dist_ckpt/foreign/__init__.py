"""Checkpoints of other programs, read as sources: stock DCP, torch files, safetensors."""
