"""Addresses of this host: what was given, which interface has one, and a socket that is bound to it alone."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from bireme.errors import RequestError

_SIOCGIFADDR = 0x8915  # the IPv4 address of an interface


def parse_address(text: str, what: str, port: int | None = None) -> tuple[str, int]:
    """'10.0.0.1:4000' as an address and a port; `port` stands for one that is not given."""
    host, colon, tail = text.rpartition(":")
    if text.endswith("]") or not colon or (":" in host and not host.startswith("[")):
        host, tail = text, "" if port is None else str(port)
    host = host.strip("[]")
    if not host or not tail.isdecimal() or int(tail) > 65535:
        wanted = "ADDRESS:PORT" if port is None else "ADDRESS, or ADDRESS:PORT"
        raise RequestError(f"{what} {text!r} is no address; give {wanted}, like 10.0.0.1:4000")
    return resolve(host, what), int(tail)


def resolve(host: str, what: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise RequestError(f"{what} {host!r} has no address: {error.strerror}") from None
    return str(found)


def bound(address: str, port: int = 0) -> socket.socket:
    """Listens at an address of `interface_of`, and nowhere else; RequestError where it cannot."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    )  # connections of an earlier run linger
    try:
        sock.bind((address, port))
        sock.listen()
    except OSError as error:
        sock.close()
        raise RequestError(f"{address}:{port} cannot be listened at: {error.strerror}") from None
    return sock


def interface_of(address: str) -> str:
    """RequestError where no interface of this host has it."""
    found = ipaddress.ip_address(address)
    if found.is_unspecified:
        raise RequestError(
            f"{address} is every address of this host; give the one that others reach"
        )
    if found.is_loopback:
        return "lo"
    names = [name for _, name in socket.if_nameindex()]
    for name in names:
        if address in (_ipv4_of(name), *_ipv6_of(name)):
            return name
    raise RequestError(
        f"{address} is at no interface of this host ({', '.join(names)}); give one that is"
    )


def _ipv4_of(interface: str) -> str | None:
    """None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


def _ipv6_of(interface: str) -> list[str]:
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return [
        str(ipaddress.IPv6Address(bytes.fromhex(row[0]))) for row in rows if row[5] == interface
    ]
