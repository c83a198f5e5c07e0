"""The page at `/` and its files. They hold nothing of the server, so they need no key; what they show does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from bireme.observe import drawing

_FOLDERS = (Path(__file__).parent, Path(drawing.__file__).parent)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _files() -> Iterator[tuple[str, Path]]:
    for folder in _FOLDERS:
        for path in sorted(folder.iterdir()):
            if path.suffix in _TYPES:
                yield "/" if path.name == "index.html" else f"/page/{path.name}", path


PAGE_PATHS = tuple(path for path, _ in _files())


def page_routes(*, has_keys: bool) -> APIRouter:
    """The page is told whether to ask for a key, so that it need not be refused to learn it."""
    router = APIRouter(include_in_schema=False)
    for path, file in _files():
        content = file.read_bytes()
        if path == "/":
            content = content.replace(b'data-has-keys="no"', b'data-has-keys="yes"', has_keys)
        router.add_api_route(path, _answer(content, _TYPES[file.suffix]), methods=["GET", "HEAD"])
    return router


def _answer(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return answer
