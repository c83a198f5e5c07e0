"""A Hugging Face Hub of one process: what huggingface_hub asks for to list and fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves `models` (id -> file name -> bytes); `status` other than 200 answers everything.

    `asked` lists (method, path); `fetched` the files whose bytes went over the wire.
    """

    daemon_threads = True

    def __init__(self, models: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.status = models, 200
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def fetched(self) -> set[str]:
        return {
            path.rpartition(f"/resolve/{COMMIT}/")[2]
            for method, path in self.asked
            if method == "GET" and "/resolve/" in path
        }


@contextmanager
def serving(models: Mapping[str, Mapping[str, bytes]]) -> Iterator[FakeHub]:
    with FakeHub(models) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if self.server.status != 200:
            self._send(self.server.status, b"{}")
            return
        for model, files in self.server.models.items():
            if path in (f"/api/models/{model}", f"/api/models/{model}/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                self._send_json({"id": model, "sha": COMMIT, "siblings": siblings})
                return
            if path == f"/api/models/{model}/tree/{COMMIT}":
                self._send_json([_tree_entry(name, data) for name, data in files.items()])
                return
            for name, data in files.items():
                if path in (f"/{model}/resolve/{COMMIT}/{name}", f"/{model}/resolve/main/{name}"):
                    self._send(200, data, ETag=f'"{_blob_id(data)}"')
                    return
        self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _tree_entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
