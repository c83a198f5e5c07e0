"""The server's log: a line is one line, whoever writes it."""

from __future__ import annotations

import io
import json
import logging

from bireme.server.log import LibraryLog, Log


def test_what_libraries_log_is_a_line_of_ours() -> None:
    out = io.StringIO()
    logger = logging.Logger("some.library")
    logger.addHandler(LibraryLog(Log("json", out)))
    logger.info("not worth a line")
    try:
        raise ValueError("a\nb")
    except ValueError:
        logger.exception("it went %s", "wrong")
    (line,) = out.getvalue().splitlines()
    found = json.loads(line)
    assert (found["message"], found["logger"]) == ("it went wrong", "some.library")
    assert "ValueError: a\nb" in found["traceback"]
