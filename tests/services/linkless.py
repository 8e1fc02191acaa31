"""A file system without hard links, as drives in the cloud and FAT are: a FUSE mount in memory.

`python -m tests.services.linkless FOLDER` mounts it there, says "ready", and ends when it is
unmounted. It knows neither links nor renames that replace nothing nor preallocation, and it does
not flush folders. It speaks the protocol of the kernel itself, so nothing has to be installed, but
only root may mount it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_MAX_WRITE = 128 << 10
_ROOT = 1
_HEADER = struct.Struct("<IIQQIIII")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_OPENED = struct.pack("<QII", 0, 0, 0)


@dataclass
class _Node:
    number: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    children: dict[bytes, _Node] = field(default_factory=dict)


class _Refused(Exception):
    """The answer to a request is an error code."""


class LinklessFileSystem:
    """Nodes in memory, and what the kernel may ask of them."""

    def __init__(self) -> None:
        self._nodes = {_ROOT: _Node(_ROOT, stat.S_IFDIR | 0o755)}
        self._answers: Mapping[int, Callable[[_Node, bytes], bytes]] = {
            1: self._lookup,
            3: lambda node, _: self._attributes(node),
            4: self._set_attributes,
            9: lambda node, body: self._add(node, body[8:-1], stat.S_IFDIR | 0o755),
            10: lambda node, body: self._remove(node, body[:-1]),
            11: lambda node, body: self._remove(node, body[:-1]),
            12: self._rename,
            14: lambda *_: _OPENED,
            15: self._read,
            16: self._write,
            17: lambda *_: struct.pack("<5Q4I24x", *[1 << 20] * 5, 4096, 255, 4096, 0),
            18: lambda *_: b"",
            20: lambda *_: b"",
            25: lambda *_: b"",
            26: self._begin,
            27: lambda *_: _OPENED,
            28: self._list,
            29: lambda *_: b"",
            35: lambda node, body: self._add(node, body[16:-1], stat.S_IFREG | 0o644) + _OPENED,
        }

    def serve(self, fd: int) -> None:
        """Answer requests until the file system is unmounted."""
        while True:
            try:
                request = os.read(fd, _MAX_WRITE + 8192)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            _, opcode, unique, number, *_ = _HEADER.unpack_from(request)
            if opcode in (2, 36, 42):  # what is forgotten or interrupted gets no answer
                continue
            code, answer = 0, b""
            try:
                # Links (13), flushes of folders (30), preallocation (43) and renames with flags
                # (45) are among what is not known.
                unknown = {13: errno.EPERM, 30: errno.EINVAL}.get(opcode, errno.ENOSYS)
                known = self._answers.get(opcode)
                if known is None:
                    raise _Refused(unknown)
                answer = known(self._nodes[number or _ROOT], request[_HEADER.size :])
            except _Refused as refused:
                code = int(refused.args[0])
            os.write(fd, struct.pack("<IiQ", 16 + len(answer), -code, unique) + answer)

    def _begin(self, _: _Node, body: bytes) -> bytes:
        (readahead,) = struct.unpack_from("<I", body, 8)
        limits = (12, 10, _MAX_WRITE, 1, 0, 0, 0)
        return struct.pack("<4I2HIIHHI28x", 7, 31, readahead, 0, *limits)

    def _child(self, node: _Node, name: bytes) -> _Node:
        if name not in node.children:
            raise _Refused(errno.ENOENT)
        return node.children[name]

    def _lookup(self, node: _Node, body: bytes) -> bytes:
        return self._entry(self._child(node, body[:-1]))

    def _entry(self, node: _Node) -> bytes:
        return struct.pack("<QQQQII", node.number, 0, 0, 0, 0, 0) + self._packed(node)

    def _attributes(self, node: _Node) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self._packed(node)

    def _packed(self, node: _Node) -> bytes:
        size = len(node.data)
        return _ATTRIBUTES.pack(
            *(node.number, size, -(-size // 512), 0, 0, 0),
            *(0, 0, 0, node.mode, 1, 0, 0, 0, 4096, 0),
        )

    def _set_attributes(self, node: _Node, body: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        if valid & 8:
            node.data[:] = node.data[:size].ljust(size, b"\0")
        return self._attributes(node)

    def _add(self, node: _Node, name: bytes, mode: int) -> bytes:
        if name in node.children:
            raise _Refused(errno.EEXIST)
        made = _Node(len(self._nodes) + 1, mode)
        self._nodes[made.number] = node.children[name] = made
        return self._entry(made)

    def _remove(self, node: _Node, name: bytes) -> bytes:
        if self._child(node, name).children:
            raise _Refused(errno.ENOTEMPTY)
        del node.children[name]
        return b""

    def _rename(self, node: _Node, body: bytes) -> bytes:
        (target,) = struct.unpack_from("<Q", body)
        old, new, _ = body[8:].split(b"\0")
        self._nodes[target].children[new] = self._child(node, old)
        del node.children[old]
        return b""

    def _read(self, node: _Node, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(node.data[offset : offset + size])

    def _write(self, node: _Node, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        node.data.extend(bytes(max(0, offset + size - len(node.data))))
        node.data[offset : offset + size] = body[40 : 40 + size]
        return struct.pack("<II", size, 0)

    def _list(self, node: _Node, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        found = b""
        for position, (name, child) in enumerate(list(node.children.items())[offset:], offset + 1):
            kind = stat.S_IFMT(child.mode) >> 12
            entry = struct.pack("<QQII", child.number, position, len(name), kind) + name
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


@contextmanager
def linkless_mount(folder: Path) -> Iterator[Path]:
    """Mount a file system without hard links at `folder`.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    command = [sys.executable, "-m", "tests.services.linkless", str(folder)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise PermissionError("no FUSE file system can be mounted here")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main(folder: str) -> int:
    """Mount the file system at `folder` and serve it; return the status to exit with."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        return 1
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"linkless", os.fsencode(folder), b"fuse", 6, options.encode()):
        return 1
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    LinklessFileSystem().serve(fd)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
