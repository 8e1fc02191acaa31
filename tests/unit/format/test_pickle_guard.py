"""Pickles that harm the unpickler itself are refused before it sees them."""

from __future__ import annotations

import pickle  # noqa: TID251 - only to make what is to be refused
import struct
from collections import OrderedDict

import pytest

from dist_ckpt.format.pickle_guard import check_pickle

HARMFUL = {
    "a key nested so deep that its hash ends the process": (
        b"\x80\x02}" + b")" + b"\x85" * 3_000_000 + b"Ns."
    ),
    "the same by way of the memo": b"\x80\x02}" + b")" + b"\x85q\x00h\x00" * 40 + b"Ns.",
    "a memo of gigabytes": b"\x80\x02]r" + struct.pack("<I", 60_000_000) + b".",
    "cut short": pickle.dumps({"a": [1, 2, 3]})[:-3],
    "nothing": b"",
    "no pickle": b"PK\x03\x04",
    "more taken than there is": b"\x80\x02a.",
    "a memo that was never filled": b"\x80\x02h\x05.",
}


@pytest.mark.parametrize("what", HARMFUL)
def test_it_is_refused(what: str) -> None:
    with pytest.raises((ValueError, KeyError, IndexError)):
        check_pickle(HARMFUL[what])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_programs_write_passes(protocol: int) -> None:
    shared = [1.5, "x", None, True, b"y"]
    value = OrderedDict(a=shared, b=(shared, {"k": (1, (2, 3))}), c={4, 5}, d=-(2**70))
    check_pickle(pickle.dumps(value, protocol))
