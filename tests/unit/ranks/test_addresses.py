"""Which addresses of this host are published, and in which order they are tried."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from dist_ckpt.ranks import rendezvous
from dist_ckpt.ranks.addresses import chosen_interfaces, host_addresses
from dist_ckpt.ranks.rendezvous import Address


def test_addresses_of_this_host_are_those_that_others_can_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for text in host_addresses():
        address = ipaddress.ip_address(text)
        assert not address.is_loopback
        assert not address.is_link_local
        # It is this host's: something can listen there.
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        socket.create_server((text, 0), family=family).close()


@pytest.mark.parametrize("named", ["none-such", "", "none-such,also-none"])
def test_interfaces_that_are_not_there_choose_nothing(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    assert chosen_interfaces() == []


@pytest.mark.parametrize(
    ("master", "hosts"),
    [
        ("10.0.0.7", ["10.0.0.7", "10.1.0.1", "fd00::1", "node-0"]),
        ("10.1.0.1", ["10.1.0.1", "fd00::1", "node-0"]),
        ("master.example", ["10.1.0.1", "fd00::1", "master.example", "node-0"]),
        ("", ["10.1.0.1", "fd00::1", "node-0"]),
    ],
)
def test_addresses_are_tried_before_names(master: str, hosts: list[str]) -> None:
    address = Address(master, "node-0", ("10.1.0.1", "fd00::1"), 1)
    assert rendezvous.hosts_of(address) == hosts
    here = Address(master, socket.gethostname(), ("10.1.0.1", "fd00::1"), 1)
    assert rendezvous.hosts_of(here)[:2] == ["127.0.0.1", "::1"]
