"""Two hosts on this machine: network namespaces, each with addresses and a cable of its own.

A switch of this machine joins them, so that both also reach a server here at `Hosts.outside`, and
nothing else. Where namespaces are not allowed, as for anybody but root, hosts are loopback
addresses: each has its own, and no cable that could be cut.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000
_NETWORK_BITS, _NETWORK_BITS_6 = 24, 64


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        number: 0 or 1.
        name: its hostname, which nobody can resolve; "" for a loopback address.
        address: of its interface.
        address_6: the same as IPv6; "" where there is none.
        interface: how it calls its interface.
    """

    number: int
    name: str
    address: str
    address_6: str
    interface: str

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` there."""
        return [*(("ip", "netns", "exec", self.name) if self.name else ()), *command]

    def enter(self) -> None:
        """Be there from now on, with the connections that this thread makes and those it starts."""
        if not self.name:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with (_NAMESPACES / self.name).open() as namespace:
            _check(libc.setns(namespace.fileno(), _CLONE_NEWNET))
        _check(libc.unshare(_CLONE_NEWUTS))
        socket.sethostname(self.name)


class Hosts:
    """Both hosts, and the switch between them; can be handed to other processes.

    Attributes:
        hosts: the two.
        outside: where they reach servers of this machine.
        is_real: whether they have cables.
    """

    def __init__(self, key: str, *, real: bool) -> None:
        self.is_real = real
        self._key = key
        if real:
            number = int(key, 16)
            network = f"10.{64 + number % 64}.{number // 64 % 256}"
            network_6 = f"fd77:{key[:4]}:{key[4:]}:1"
            self.outside = f"{network}.1"
            self.hosts = tuple(
                Host(n, f"dc-{key}-{n}", f"{network}.{n + 10}", f"{network_6}::{n + 10}", INTERFACE)
                for n in (0, 1)
            )
        else:
            self.outside = "127.0.0.1"
            lo = "lo" if sys.platform == "linux" else "lo0"
            self.hosts = tuple(Host(n, "", f"127.0.0.{n + 10}", "", lo) for n in (0, 1))

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def cut(self, number: int) -> None:
        """Pull the cable of a host: nothing comes or goes, and neither end is told."""
        self._switches("link", "set", self._cable(number), "down")

    def mend(self, number: int) -> None:
        """Put the cable back."""
        self._switches("link", "set", self._cable(number), "up")

    def behind_a_router(self) -> str:
        """Return an address of host 0 in a network of its own, to which host 1 has a route."""
        first, second = self.hosts
        address = f"172.31.{first.address.split('.')[2]}.10"
        _ip("-n", first.name, "address", "add", f"{address}/32", "dev", "lo")
        _ip("-n", second.name, "route", "add", f"{address}/32", "via", first.address)
        return address

    def forget_ipv4(self) -> None:
        """Leave IPv6 alone to both."""
        for host in self.hosts:
            _ip("-n", host.name, "-4", "address", "flush", "dev", INTERFACE)

    def make(self) -> None:
        """Make namespaces, switch and cables.

        Raises:
            PermissionError: this process may not, or the programs for it are missing.
        """
        # The network of this process by a name, so that cables can be pulled from within a host.
        _ip("netns", "attach", self._outside, str(os.getpid()))
        self._switches("link", "add", self._switch, "type", "bridge")
        place = f"{self.outside}/{_NETWORK_BITS}"
        self._switches("address", "add", place, "dev", self._switch)
        self._switches("link", "set", self._switch, "up")
        for host in self.hosts:
            self._plug_in(host)

    def remove(self) -> None:
        """Take everything away; whatever still runs there has no network any more."""
        for link in (*map(self._cable, (0, 1)), self._switch):
            with suppress(PermissionError):  # it was never made
                self._switches("link", "delete", link)
        for name in (*(host.name for host in self.hosts), self._outside):
            with suppress(PermissionError):
                _ip("netns", "delete", name)

    def _plug_in(self, host: Host) -> None:
        cable, inside, place = self._cable(host.number), ("-n", host.name), ("dev", INTERFACE)
        _ip("netns", "add", host.name)
        peer = ("peer", "name", INTERFACE, "netns", host.name)
        self._switches("link", "add", cable, "type", "veth", *peer)
        self._switches("link", "set", cable, "master", self._switch, "up")
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "address", "add", f"{host.address}/{_NETWORK_BITS}", *place)
        with suppress(PermissionError):  # a kernel without IPv6
            six = f"{host.address_6}/{_NETWORK_BITS_6}"
            _ip(*inside, "-6", "address", "add", six, *place, "nodad")
        _ip(*inside, "link", "set", INTERFACE, "up")

    @property
    def _outside(self) -> str:
        return f"dc-{self._key}-outside"

    @property
    def _switch(self) -> str:
        return f"dc{self._key}s"

    def _cable(self, number: int) -> str:
        return f"dc{self._key}c{number}"

    def _switches(self, *arguments: str) -> None:
        _ip("-n", self._outside, *arguments)


def _ip(*arguments: str) -> None:
    command = ["ip", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError as error:
        raise PermissionError("ip is not installed") from error
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Give two hosts: real ones where this process may make them, else loopback addresses."""
    hosts = Hosts(secrets.token_hex(3), real=True)
    try:
        hosts.make()
    except PermissionError as error:
        hosts.remove()
        sys.stderr.write(f"two hosts are loopback addresses, without a cable, because {error}\n")
        yield Hosts("", real=False)
        return
    try:
        yield hosts
    finally:
        hosts.remove()


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
