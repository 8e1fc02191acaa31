"""The addresses of this host: which of them rank 0 listens on, and where others may look for it."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from dist_ckpt.errors import CoordinationError

# Of these the training itself is told which interface leads to its peers.
_CHOSEN = "GLOO_SOCKET_IFNAME"
# A host with containers has many interfaces; only the first ones are worth a try.
_MOST_ADDRESSES = 16
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_IPV6_TABLE = Path("/proc/net/if_inet6")
_TRIES = 8


def chosen_interfaces() -> list[str]:
    """Return the interfaces of this host that the training was told to use."""
    named = os.environ.get(_CHOSEN, "").split(",")
    return [name for _, name in socket.if_nameindex() if name in named]


def host_addresses() -> list[str]:
    """Return the addresses of this host at which others may reach it; of chosen interfaces alone.

    Loopback and link-local addresses are left out: they mean something else to every host.
    """
    names = chosen_interfaces() or [name for _, name in socket.if_nameindex()]
    return [address for name in names for address in _addresses_of(name)][:_MOST_ADDRESSES]


def listening(*, loopback: bool) -> list[socket.socket]:
    """Return sockets that listen on one free port, on no more addresses than must be.

    Args:
        loopback: whether all ranks are on this host.

    Raises:
        CoordinationError: there is none.
    """
    chosen = [] if loopback else chosen_interfaces()
    own = host_addresses() if chosen else []
    for _ in range(_TRIES if own else 0):
        with suppress(OSError):  # another program has that port at another address
            return _on_each(own)
    # Names that rank 0 has for itself may mean loopback here and an address elsewhere, so where
    # nobody said how others come in, every address is listened to.
    tries = ["127.0.0.1", "::1"] if loopback or (chosen and not own) else []
    for address in (*tries, "::", "0.0.0.0"):
        with suppress(OSError):  # a host without that kind of address
            return [_on(address, 0)]
    raise CoordinationError(
        "rank 0 cannot listen on any address of its host, so no rank can reach it",
        ranks={0: "cannot listen"},
    )


def _on_each(addresses: Sequence[str]) -> list[socket.socket]:
    found = [_on(addresses[0], 0)]
    try:
        port = found[0].getsockname()[1]
        found.extend(_on(address, port) for address in addresses[1:])
    except OSError:
        for each in found:
            each.close()
        raise
    return found


def _on(address: str, port: int) -> socket.socket:
    found = socket.create_server(
        (address, port),
        family=socket.AF_INET6 if ":" in address else socket.AF_INET,
        backlog=socket.SOMAXCONN,
        dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6(),
    )
    found.setblocking(False)
    return found


def _addresses_of(name: str) -> Iterator[str]:
    for text in (*_ipv4_of(name), *_ipv6_of(name)):
        address = ipaddress.ip_address(text)
        if not (address.is_loopback or address.is_link_local or address.is_unspecified):
            yield text


def _ipv4_of(name: str) -> Iterator[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, suppress(OSError):
        # No address of that kind, or another system: there names have to do.
        answer = fcntl.ioctl(asked, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
        yield socket.inet_ntoa(answer[20:24])


def _ipv6_of(name: str) -> Iterator[str]:
    with suppress(OSError):
        for line in _IPV6_TABLE.read_text().splitlines():
            digits, *_, interface = line.split()
            if interface == name:
                yield str(ipaddress.IPv6Address(int(digits, 16)))
