"""What the live page keeps, and what it forgets: with the key, at rest, and without its server."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, expect
from served import Served, serving
from streaming import Streaming
from test_page import (
    CHROMIUM,
    KEY,
    Watched,
    be_ready,
    browser,
    check_accessible,
    enter,
    keyed,
    opened,
)

__all__ = ["browser", "keyed", "opened"]

STEP_ENDS = """(picture) => {
  const inside = picture.querySelector('svg');
  const end = (it) => Number(it.getAttribute('x')) + Number(it.getAttribute('width'));
  return [Number(inside.getAttribute('width')), [...inside.querySelectorAll('rect[class^="step-"]')].map(end)];
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to draw pages with")


def test_a_key_that_is_forgotten_takes_the_conversation_along(opened: Watched) -> None:
    page = opened.page
    enter(page)
    log, message = page.locator("#chat-log"), page.get_by_label("Message", exact=True)
    message.fill("What does textwrap.dedent do?")
    message.press("Enter")
    expect(log.locator(".assistant")).not_to_be_empty()
    expect(log).to_have_attribute("aria-busy", "false")
    page.route("**/v1/chat/completions", lambda _: None)  # goes nowhere, so that it is running
    with page.expect_event("requestfailed", lambda it: it.url.endswith("/v1/chat/completions")):
        message.fill("a secret")
        message.press("Enter")
        expect(log.locator(".user")).to_have_count(2)
        message.fill("another secret")
        page.get_by_role("button", name="Forget the key").click()
    page.unroute("**/v1/chat/completions")
    enter(page)
    be_ready(page)
    expect(log).to_have_attribute("aria-busy", "false")
    expect(log).to_be_empty()
    expect(message).to_have_value("")


def test_the_last_steps_stay_when_the_server_is_at_rest(opened: Watched, keyed: Served) -> None:
    page = opened.page
    enter(page)
    be_ready(page)
    Streaming(keyed, api_key=KEY, max_tokens=60).text()
    gantt = page.get_by_role(
        "img", name=re.compile(r"^Last steps: \d+ steps? of 4 ranks in .*, [3-9] s ago\.")
    )  # as many as were made in the second before the page asked
    expect(gantt).to_be_visible()
    expect(page.locator("#gantt .readout")).to_contain_text(re.compile(r"\d+ steps? .* s ago$"))
    assert gantt.locator('rect[class^="step-"]').count() >= 4
    width, ends = gantt.evaluate(STEP_ENDS)
    assert max(ends) > 0.8 * width, "there is nothing of the rest behind them"


def test_it_goes_on_when_the_server_comes_back(browser: Browser) -> None:
    with serving("--dtype", "float32") as server:
        page = browser.new_page()
        watched = Watched(page)
        page.goto(f"{server.url}/")
        be_ready(page)
        server.process.terminate()
        server.end()
        expect(page.get_by_role("status")).to_contain_text("trying again")
        expect(page.get_by_role("alert")).to_contain_text("Nothing is known of the server since")
        assert page.locator(".rank .state").last.inner_text() == "unknown"
        assert set(page.locator("#figures dd").all_inner_texts()) == {"\u2013"}
        expect(page.get_by_role("img", name=re.compile(": now"))).to_have_count(0)
        check_accessible(page)
    with serving("--dtype", "float32", "-pp", "2", "--port", str(server.port), port=False):
        be_ready(page)
        expect(page.locator(".rank")).to_have_count(2)
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.locator(".rank .state").last).to_have_text("idle")
        expect(page.locator("#layout")).to_have_text("tp 1 x pp 2, float32, cpu")
        page.close()
    assert watched.errors == []
    assert {status for status, _ in watched.refused} <= {503}
