"""The rank that keeps a step from its end is told from those that wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from bireme.engine.culprit import Standing, find_culprit
from bireme.engine.process_stat import is_stopped
from bireme.trace import Now, SpanKind

DONE = Now(7, 40, None)
AHEAD = Now(8, 2, SpanKind.RECV)
IN_RECV = Now(7, 2, SpanKind.RECV)


def reduces(num_begun: int) -> Now:
    return Now(7, num_begun, SpanKind.ALL_REDUCE)


@pytest.mark.parametrize(
    ("ranks", "culprit"),
    [
        pytest.param([Now(7, 9, SpanKind.COMPUTE), reduces(10), IN_RECV, IN_RECV], 0, id="busy"),
        pytest.param([reduces(3), Now(6, 40, None), IN_RECV, IN_RECV], 1, id="not-begun"),
        pytest.param([reduces(3), Now(7, 0, None), IN_RECV, IN_RECV], 1, id="just-begun"),
        pytest.param([AHEAD, AHEAD, reduces(9), Now(7, 9, SpanKind.SAMPLE)], 3, id="sampling"),
        pytest.param([DONE, DONE, reduces(8), reduces(9)], 2, id="one-collective-behind"),
        pytest.param([reduces(9), reduces(8), IN_RECV, IN_RECV], 1, id="upstream-of-receivers"),
        pytest.param([DONE, AHEAD, DONE, DONE], None, id="all-through"),
    ],
)
def test_the_one_who_does_not_wait_is_named(ranks: list[Now], culprit: int | None) -> None:
    seen = {index: Standing(index // 2, False, now) for index, now in enumerate(ranks)}
    assert find_culprit(seen, 7) == culprit


def test_a_stopped_process_is_named_even_where_it_seems_to_wait_or_to_be_through() -> None:
    for now in (IN_RECV, DONE):
        seen = {0: Standing(0, False, Now(7, 9, SpanKind.COMPUTE)), 1: Standing(1, True, now)}
        assert find_culprit(seen, 7) == 1


def test_a_standing_says_what_a_rank_was_doing() -> None:
    says = {
        "step 7 not begun": Standing(0, False, Now(6, 40, None)),
        "last seen in all_reduce of step 7": Standing(0, False, reduces(3)),
        "last seen in step 7": Standing(0, False, Now(7, 1, SpanKind.STEP)),
        "its process is stopped, last seen at the end of step 7": Standing(0, True, DONE),
    }
    assert {standing.describe(7): standing for standing in says.values()} == says


def test_the_kernel_says_whether_a_process_is_stopped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_stopped(process.pid)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert is_stopped(process.pid)
    process.kill()
    process.communicate()
    assert not is_stopped(process.pid)
