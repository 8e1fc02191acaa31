"""What is installed for a comparison exchanges nothing that is installed already."""

from __future__ import annotations

from pathlib import Path

from tools.install_peers import command

ROOT = Path(__file__).resolve().parents[3]


def test_peers_are_pinned_and_come_alone() -> None:
    words = command(ROOT)
    assert "--no-deps" in words
    names = words[words.index("constraints.txt") + 1 :]
    assert {"torchsnapshot", "torch_checkpointing"} <= set(names)
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(names) <= pins
    assert "torch" not in names
