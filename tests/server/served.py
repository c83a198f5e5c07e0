"""`bireme serve` as people start it: a child process, its address, and what it says."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 90


@dataclass
class Served:
    """A running server; `told` is what it has written to standard error, line by line."""

    process: subprocess.Popen[str]
    scheme: str = "http"
    host: str = "127.0.0.1"
    port: int = 0
    curl: str = ""  # the line to type next
    told: list[str] = field(default_factory=list)
    _lines: queue.Queue[str | None] = field(default_factory=queue.Queue)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def listen(self) -> None:
        """Takes what the process says, so that it never waits for us."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line from here on that has it."""
        while True:
            line = self._lines.get(timeout=DEADLINE_S)
            assert line is not None, f"{pattern!r} does not come; there is {self.told}"
            self.told.append(line)
            if found := re.search(pattern, line):
                return found

    def wait_ready(self) -> None:
        found = self.wait_for(r"^serving .* at (https?)://(.+):(\d+)/v[12]")
        self.scheme, self.host, self.port = found[1], found[2], int(found[3])
        self.curl = self.wait_for(r"^  (curl http.*)$")[1]

    def end(self) -> int:
        """The exit status; what was said until then is in `told`."""
        status = self.process.wait(DEADLINE_S)
        while (line := self._lines.get(timeout=DEADLINE_S)) is not None:
            self.told.append(line)
        return status

    def descendants(self) -> list[int]:
        """The engine, then its ranks and what else it has started."""
        found, left = [], [self.pid]
        while left:
            more = children(left.pop(0))
            found += more
            left += more
        return found

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own; `body` is JSON unless it is bytes."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        own = {} if body is None else {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, raw, {**own, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The only sample of a gauge or a counter."""
        (found,) = re.findall(
            rf"^bireme:{name}{{.*}} (\S+)$", self.ask("GET", "/metrics").text, re.M
        )
        return float(found)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """As all errors are told."""
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"]
        return error


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def leftovers() -> set[str]:
    """What a server may have put beside its processes."""
    folders = (Path("/tmp"), Path("/dev/shm"))
    return {str(path) for folder in folders for path in folder.glob("*bireme*")}


def arguments(model: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "bireme", "serve", model, *options]


@contextmanager
def started(
    *options: str, model: str = "demo", env: dict[str, str] | None = None, port: bool = True
) -> Iterator[Served]:
    """Not ready yet; killed at the end unless it has ended by itself."""
    own = ["--port", "0"] if port else []
    process = subprocess.Popen(
        arguments(model, *own, *options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )
    server = Served(process)
    listening = threading.Thread(target=server.listen)
    listening.start()
    try:
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(DEADLINE_S)
            finally:
                process.kill()
        listening.join(DEADLINE_S)
        assert process.stderr is not None
        process.stderr.close()


@contextmanager
def serving(*options: str, **more: Any) -> Iterator[Served]:
    """Ready."""
    with started(*options, **more) as server:
        server.wait_ready()
        yield server
