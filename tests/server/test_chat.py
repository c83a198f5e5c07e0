"""`bireme chat`, through pipes and in a terminal, with the demo model and with a scripted server."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from scripted_server import ScriptedServer, serving

from bireme.cli import run

DEADLINE_S = 90


def piped(typed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bireme", "chat", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@dataclass
class Terminal:
    """A chat in a pseudo-terminal; `shown` is all that it has written."""

    process: subprocess.Popen[bytes]
    fd: int
    shown: str = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt_until(self, pattern: str) -> None:
        """Again and again, as people do: readline misses a signal that comes just before it waits."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            self.process.send_signal(signal.SIGINT)
            try:
                self.wait_for(pattern, within_s=0.5)
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def wait_for(self, pattern: str, within_s: float = DEADLINE_S) -> str:
        """What is shown from there on is left for the next call."""
        deadline = time.monotonic() + within_s
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} does not come; there is {self.shown!r}"
            self.shown += os.read(self.fd, 4096).decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bireme", "chat", *arguments],
        stdin=child, stdout=child, stderr=child, start_new_session=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"},
    )  # fmt: skip
    os.close(child)
    try:
        yield Terminal(process, parent)
        process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def test_the_demo_model_answers_lines_of_a_pipe_and_knows_what_was_said() -> None:
    done = piped("What does math.sqrt do?\n/reset\nWhat does math.sqrt do?\n", "demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Return the square root of x.") == 2
    assert "> " not in done.stdout
    assert re.search(r"\d+ tokens; first after \d+ ms, [\d.]+ tokens/s", done.stderr)


def test_a_conversation_that_grows_too_long_drops_its_oldest_turns() -> None:
    question = "What does os.path.join do? " * 30
    done = piped(f"{question}\n" * 5, "demo", "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    assert "the oldest turn was dropped" in done.stderr
    assert done.stderr.count("tokens; first after") == 5


def test_a_question_that_is_too_long_by_itself_is_refused() -> None:
    done = piped("word " * 3000 + "\nWhat does math.sqrt do?\n", "demo", "--quiet")
    assert done.returncode == 1
    assert "tokens; the context holds 1024" in done.stderr
    assert "Return the square root of x." in done.stdout


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves() -> None:
    with terminal("demo", "--max-tokens", "900", "--load-format", "dummy") as chat:  # says no end
        chat.wait_for("> ")
        chat.type("Tell me everything\n")
        chat.wait_for(r"│ [\d.]+ tokens/s")
        chat.process.send_signal(signal.SIGINT)
        chat.wait_for(r"stopped\r\n> ")
        chat.type("half a line")
        chat.wait_for("half a line")
        chat.interrupt_until("> ")
        chat.type("/help\n")
        chat.wait_for("/reset        forget what was said")
        chat.wait_for("> ")
        chat.type("\x04")
    assert chat.process.returncode == 0


def test_a_server_is_told_the_whole_conversation() -> None:
    with serving(ScriptedServer()) as server:
        done = piped(
            "one\n/system be brief\ntwo\n/nothing\n/exit\nthree\n", server.url, "--max-tokens", "3"
        )
    assert (done.returncode, done.stdout) == (0, "w w w \nw w w \n")
    assert [body["messages"] for body in server.bodies] == [
        [{"role": "user", "content": "one"}],
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "w w w "},
            {"role": "user", "content": "two"},
        ],
    ]
    assert "scripted at http" in done.stderr
    assert "there is no /nothing; /help lists what there is" in done.stderr


def test_a_server_that_says_too_long_is_asked_again_with_less() -> None:
    with serving(ScriptedServer(max_messages=3)) as server:
        done = piped("one\ntwo\nthree\n", server.url, "--max-tokens", "1")
    assert done.returncode == 0
    assert "too long; the oldest turn was dropped" in done.stderr
    last = [message["content"] for message in server.bodies[-1]["messages"]]
    assert last == ["two", "w ", "three"]


def test_a_failure_is_told_and_the_chat_goes_on() -> None:
    with serving(ScriptedServer(refuse_every=2)) as server:
        done = piped("one\ntwo\nthree\n", server.url, "--max-tokens", "1")
    assert (done.returncode, done.stdout) == (1, "w \nw \n")
    assert "400 Bad Request: request 2 is refused" in done.stderr
    assert [message["content"] for message in server.bodies[-1]["messages"]] == [
        "one", "w ", "three",
    ]  # fmt: skip


def test_an_answer_that_breaks_off_is_told() -> None:
    with serving(ScriptedServer(cut_every=1)) as server:
        done = piped("one\n", server.url, "--max-tokens", "3")
    assert (done.returncode, done.stdout) == (1, "w w \n")
    assert "broke off" in done.stderr


def test_stages_show_where_the_server_counts_them() -> None:
    with serving(ScriptedServer(counts_stages=True)) as server:
        done = piped("one\n", server.url)
    assert "; stage 0 100% busy, stage 1 0% busy" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["http://127.0.0.1:9", "-tp", "2"], "has its layout and its devices already"),
        (["demo", "--model", "m"], "--model names one of a server's models"),
        (["--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (
            ["http://127.0.0.1:9"],
            "nothing answers at http://127.0.0.1:9: connection refused; start",
        ),
        (
            ["127.0.0.1:8100"],
            "'127.0.0.1:8100' is no model or file; did you mean http://127.0.0.1:8100",
        ),
        (["localhost:8100/v1"], "did you mean http://localhost:8100/v1"),
    ],
)
def test_what_cannot_work_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert run(["chat", *arguments]) == 2
    assert complaint in capsys.readouterr().err
