"""The server's log on standard error: a line a request, for people or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

from bireme.server.config import LogFormat


class Log:
    """Lines of a text and fields; what a client sent is quoted, so that a line stays one."""

    def __init__(self, form: LogFormat, out: TextIO | None = None) -> None:
        self._form, self._out = form, out

    def say(self, text: str, **fields: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._form == "json":
            line = json.dumps({"time": now, "message": text, **fields})
        else:
            told = " ".join(f"{name}={_told(value)}" for name, value in fields.items())
            line = f"{now[11:23]} {text}{' ' if told else ''}{told}"
        self.show(line)

    def show(self, *lines: str) -> None:
        """As they are. Where they cannot be written any more, the server goes on without."""
        with suppress(OSError):
            print(*lines, sep="\n", file=self._out or sys.stderr, flush=True)


class LibraryLog(logging.Handler):
    """What libraries log, as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        more = {}
        if record.exc_info:
            more["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        self._log.say(record.getMessage(), logger=record.name, **more)


def _told(value: Any) -> str:
    if isinstance(value, str) and value and value.isprintable() and not set(' "=') & set(value):
        return value
    return json.dumps(value)
