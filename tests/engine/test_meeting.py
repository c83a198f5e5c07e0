"""Where ranks of several hosts meet: at one address, and at no other."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from bireme.parallel.meeting import come_to_meeting, hold_meeting

LISTENING = "0A"


def listening_at() -> set[str]:
    """Addresses at which this process listens, as the kernel writes them."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(fd)
        except FileNotFoundError:  # of the listing itself
            continue
        inodes.add(name.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and words[9] in inodes:
                found.add(words[1])
    return found


def test_it_is_held_at_the_socket_that_was_bound_and_nowhere_else() -> None:
    before = listening_at()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    held = hold_meeting(listener, 10.0)
    come = come_to_meeting("127.0.0.1", port, 10.0)
    come.set("a", "b")
    assert held.get("a") == b"b"
    assert listening_at() - before == {f"0100007F:{port:04X}"}
