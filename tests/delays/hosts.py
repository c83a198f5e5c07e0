"""Two network namespaces, as two hosts, and a link between them that carries no more than it is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from planting import Plant

LINK = "wire"  # the interface's name on either host
BURST_BYTES = 1600  # that a link which was idle takes at once


class Hosts:
    """Shaped is what goes from the first host to the second."""

    def __init__(self) -> None:
        self.names = [f"bireme-{os.getpid()}-{host}" for host in ("a", "b")]

    def __enter__(self) -> Hosts:
        """Skips where this user, or this machine, cannot have them."""
        if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
            pytest.skip(f"needs {' and '.join(missing)} of iproute2")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"needs the right to make a shaped link: {error.stderr.strip()}")
        return self

    def _make(self) -> None:
        _remove_orphans()
        first, second = self.names
        for name in self.names:
            _run(f"ip netns add {name}")
        _run(f"ip link add {LINK} netns {first} type veth peer name {LINK} netns {second}")
        for index, name in enumerate(self.names):
            _run(f"ip -n {name} addr add 10.99.0.{index + 1}/24 dev {LINK}")
            for interface in ("lo", LINK):
                _run(f"ip -n {name} link set {interface} up")
        with self.shaped(10**9):
            pass

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(f"ip netns del {name}".split(), capture_output=True)

    @contextmanager
    def holding(self, plant: Plant, num_ranks: int) -> Iterator[None]:
        """Ranks that join meanwhile: the first half on the first host, the others on the second."""
        places = [plant.folder / f"host-{rank}" for rank in range(num_ranks)]
        for rank, place in enumerate(places):
            place.write_text(f"/run/netns/{self.names[2 * rank // num_ranks]} {LINK}")
        try:
            yield
        finally:
            for place in places:
                place.unlink()

    @contextmanager
    def shaped(self, bytes_per_s: int) -> Iterator[None]:
        where = f"ip netns exec {self.names[0]} tc qdisc"
        limits = f"rate {8 * bytes_per_s}bit burst {BURST_BYTES} limit 100mb"
        _run(f"{where} add dev {LINK} root tbf {limits}")
        try:
            yield
        finally:
            _run(f"{where} del dev {LINK} root")

    def num_bytes(self) -> int:
        """That went through the shaped link since it is."""
        told = _run(f"ip netns exec {self.names[0]} tc -s -j qdisc show dev {LINK}")
        return int(json.loads(told)[0]["bytes"])


def _remove_orphans() -> None:
    """Namespaces of tests that were killed: they outlive their maker."""
    for name in _run("ip netns list").split():
        made = re.fullmatch(r"bireme-(\d+)-[ab]", name)
        if made and not Path(f"/proc/{made[1]}").exists():
            _run(f"ip netns del {name}")


def _run(command: str) -> str:
    return subprocess.run(
        command.split(), capture_output=True, text=True, check=True, timeout=10
    ).stdout
