"""Who has to go where too many have come that have not said who they are."""

from __future__ import annotations

import socket

from dist_ckpt.ranks.channels import Channel, running_loop
from dist_ckpt.ranks.hub import Strangers
from dist_ckpt.threads import Latch


def some(count: int) -> list[Channel]:
    """Return so many that have come; nothing passes between them and the loop."""
    found: list[Channel] = []
    ready = Latch()

    def accept() -> None:
        for _ in range(count):
            ours, theirs = socket.socketpair()
            found.append(Channel(loop, ours, on_body=lambda _: None, on_lost=lambda _: None))
            theirs.close()
        ready.open()

    loop = running_loop()
    loop.call(accept)
    ready.wait()
    return found


def test_a_crowd_pushes_out_its_own() -> None:
    strangers = Strangers()
    lone, *crowd = some(4)
    strangers.add(lone, "10.0.0.1", 60.0)
    for one in crowd:
        strangers.add(one, "10.0.0.2", 60.0)
    for expected in crowd[:2]:
        assert strangers.in_the_way() is expected, "the oldest of them"
        strangers.remove(expected)
    assert lone in strangers
    assert len(strangers) == 2


def test_who_takes_too_long_is_found_and_forgotten() -> None:
    strangers = Strangers()
    slow, quick = some(2)
    strangers.add(slow, "10.0.0.1", 0.0)
    strangers.add(quick, "10.0.0.1", 3600.0)
    assert strangers.too_late() == [slow]
    strangers.remove(slow)
    assert list(strangers) == [quick]
    strangers.remove(quick)
    assert not len(strangers)
