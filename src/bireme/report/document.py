"""One HTML file that needs no other: styles, modules and data are in it.

A module in a `data:` URL cannot name another by its path, so that the import map gives each a name.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bireme.observe import drawing
from bireme.observe.run_folder import RunFolder
from bireme.report.data import MOST_BARS, RunData, run_data

_HERE, _DRAWING = Path(__file__).parent, Path(drawing.__file__).parent
_MODULES = (
    "elements.js",
    "rows.js",
    "gantt.js",
    "ledger.js",
    "memory.js",
    "sizes.js",
    "throughput.js",
)
_MARK = b'<meta name="generator" content="bireme report">'
_IMPORT = re.compile(r'(?<=from )"\./([\w.]+)"')


def report(runs: Sequence[RunFolder]) -> str:
    """Of one run, or of several side by side."""
    return document([run_data(run, MOST_BARS // len(runs)) for run in runs])


def is_report(path: Path) -> bool:
    """Whether this module wrote the file."""
    with path.open("rb") as file:
        return _MARK in file.read(512)


def document(runs: Sequence[RunData]) -> str:
    modules = {_name(file): _as_url(_module(_DRAWING / file)) for file in _MODULES}
    parts = {
        "title": " and ".join(run.title for run in runs),
        "style": (_DRAWING / "drawing.css").read_text() + (_HERE / "report.css").read_text(),
        "imports": _as_script({"imports": modules}),
        "data": _as_script(runs),
        "script": _module(_HERE / "report.js"),
    }
    page = (_HERE / "report.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda found: _escaped(found[1], parts), page)


def _escaped(name: str, parts: dict[str, str]) -> str:
    return _text(parts[name]) if name == "title" else parts[name]


def _text(value: str) -> str:
    return value.replace("&", "&amp;").replace("<", "&lt;")


def _as_script(value: object) -> str:
    """JSON that ends no element of HTML."""
    return msgspec.json.encode(value).decode().replace("<", "\\u003c")


def _module(path: Path) -> str:
    return _IMPORT.sub(lambda found: f'"{_name(found[1])}"', path.read_text())


def _name(file: str) -> str:
    return f"bireme/{file}"


def _as_url(source: str) -> str:
    return "data:text/javascript;base64," + base64.b64encode(source.encode()).decode()
