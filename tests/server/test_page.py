"""The live page in headless Chromium, of a real server: it draws, updates, and can be used by everybody.

Skipped where there is no Chromium (Debian's package `chromium`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, expect, sync_playwright
from served import Served, serving
from streaming import Streaming

KEY = "a key"
OPTIONS = ("--dtype", "float32", "-tp", "2", "-pp", "2", "--api-key", KEY, "--no-log-requests")
CHROMIUM = shutil.which("chromium")
WIDE, PHONE = (1280, 900), (390, 844)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to draw pages with")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with serving(*OPTIONS) as running:
        yield running


@dataclass
class Watched:
    """A page, and what went wrong in it: errors in its console, answers that were refused."""

    page: Page
    errors: list[str] = field(default_factory=list)
    refused: set[tuple[int, str]] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("response", self._on_response)

    def _on_console(self, message: ConsoleMessage) -> None:
        is_of_network = message.text.startswith("Failed to load resource")  # is in `refused`
        if message.type in ("error", "warning") and not is_of_network:
            self.errors.append(message.text)

    def _on_response(self, response: Response) -> None:
        self.urls.add(response.url)
        if response.status >= 400:
            self.refused.add((response.status, re.sub("^https?://[^/]+", "", response.url)))


@pytest.fixture
def opened(browser: Browser, keyed: Served) -> Iterator[Watched]:
    """At the server's address, without a key. Nothing may go wrong that the test does not expect."""
    context = browser.new_context(viewport={"width": WIDE[0], "height": WIDE[1]})
    context.set_default_timeout(30_000)  # of a busy machine
    expect.set_options(timeout=30_000)
    watched = Watched(context.new_page())
    watched.page.goto(f"{keyed.url}/")
    yield watched
    context.close()
    assert watched.errors == []
    assert all(url.startswith(keyed.url) and KEY not in url for url in watched.urls)


def enter(page: Page, key: str = KEY) -> None:
    page.get_by_label("API key", exact=True).fill(key)
    page.get_by_role("button", name="Show the server").click()


def be_ready(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("ready", timeout=20_000)


def check_accessible(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    told = [(it["id"], [node["html"] for node in it["nodes"]]) for it in found]
    assert told == []


def check_fits(page: Page) -> None:
    """Nothing lies beside the page."""
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.evaluate("window.innerWidth")


def test_it_is_empty_without_the_key(opened: Watched) -> None:
    page = opened.page
    expect(page.get_by_label("API key", exact=True)).to_be_focused()
    expect(page.locator("#live")).to_be_hidden()
    assert "demo" not in page.locator("body").inner_text()
    assert not any("/debug/live" in url for url in opened.urls), "it does not try without"
    check_accessible(page)
    enter(page, "another key")
    expect(page.get_by_role("alert")).to_have_text("The server does not take this key.")
    expect(page.locator("#live")).to_be_hidden()
    assert opened.refused == {(401, "/debug/live")}
    enter(page)
    be_ready(page)
    kept = page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]")
    assert kept == [1, 0, ""]
    page.get_by_role("button", name="Forget the key").click()
    expect(page.locator("#live")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0


def test_it_draws_what_the_server_does(opened: Watched, keyed: Served) -> None:
    page = opened.page
    enter(page)
    be_ready(page)
    expect(page.locator("#model")).to_have_text("demo")
    stages = page.get_by_role("list", name="Stages, in their order")
    expect(stages.locator(".rank")).to_have_count(4)
    expect(stages.get_by_text("idle", exact=True)).to_have_count(4)
    stream = Streaming(keyed, api_key=KEY, max_tokens=700)
    expect(stages.get_by_text(re.compile(r"^[\d.]+ steps/s$"))).to_have_count(4)
    gantt = page.get_by_role("img", name=re.compile(r"^Last steps: 1\d steps of 4 ranks in .*ms"))
    expect(gantt).to_be_visible()
    for look in ('rect[class^="step-"]', 'rect[fill="url(#hatch-token_dependency)"]'):
        assert gantt.locator(look).count() > 4, look
    check_zoom(page)
    expect(page.locator("#figures dd").first).to_have_text(re.compile(r"^[1-9]"))
    table = page.get_by_role("group", name="Ledger as a table")
    page.locator("#ledger summary").click()
    expect(table.get_by_role("row")).to_have_count(5)
    page.locator("#memory summary").click()
    memory = page.get_by_role("group", name="Memory as a table").get_by_role("columnheader")
    assert memory.all_inner_texts() == [
        "rank", "weights", "KV cache, reserved", "steps, planned", "planned in all",
    ]  # fmt: skip
    for chart in (
        "Tokens a second",
        "Running and waiting",
        "KV cache in use",
        "Time to first token",
    ):
        expect(page.get_by_role("img", name=re.compile(f"^{chart}.*: now"))).to_be_visible()
    assert page.locator(".chart canvas").count() == 6
    for scheme in ("light", "dark"):
        for width, height in (WIDE, PHONE):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": height})
            check_fits(page)
            check_accessible(page)
    stream.text()
    assert opened.refused == set()


def check_zoom(page: Page) -> None:
    """By keys and buttons alone; while it is paused nothing changes by itself."""
    pause = page.get_by_role("button", name="Pause")
    pause.press("Enter")
    expect(pause).to_have_attribute("aria-pressed", "true")

    def shown() -> list[str]:
        return page.locator("svg.gantt text.axis").all_text_contents()

    whole = shown()
    page.locator("svg.gantt").focus()
    for _ in range(3):
        page.keyboard.press("+")
    zoomed = shown()
    assert zoomed != whole
    page.keyboard.press("ArrowRight")
    assert shown() != zoomed
    page.get_by_role("button", name="Show all").press("Enter")
    assert shown() == whole
    page.locator("svg.gantt").focus()
    page.locator("svg.gantt").hover()
    page.mouse.wheel(0, -400)
    expect(page.locator("svg.gantt text.axis").first).not_to_have_text("0")
    page.keyboard.press("0")
    pause.press("Enter")


def test_the_chat_answers_stops_and_shows_errors(opened: Watched) -> None:
    page = opened.page
    enter(page)
    message, log = (
        page.get_by_label("Message", exact=True),
        page.get_by_role("log", name="Conversation"),
    )
    answers = log.locator(".assistant")
    message.fill("What does textwrap.dedent do?")
    message.press("Enter")
    expect(answers.first).to_contain_text("textwrap.dedent(text")  # behind it is what was sampled
    expect(log).to_have_attribute("aria-busy", "false")
    page.route("**/v1/chat/completions", lambda _: None)  # goes nowhere, so that it can be stopped
    message.fill("And what <b>else</b>?")
    message.press("Enter")
    expect(log.locator(".user").last).to_have_text("And what <b>else</b>?")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(message).to_have_value("And what <b>else</b>?")  # to be asked again
    expect(log.locator("p")).to_have_count(2)
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="New").click()
    expect(log.locator("p")).to_have_count(0)
    message.fill("too long " * 1000)
    message.press("Enter")
    expect(page.locator("#chat-error")).to_contain_text("the context holds")
    assert opened.refused == {(400, "/v1/chat/completions")}


@pytest.mark.parametrize(
    ("share", "counts", "expected"),
    [
        (0.5, [0, 10, 10, 10], 1.5),  # in the middle of (1, 2]
        (0.5, [4, 8, 8, 8], 1.0),
        (0.9, [0, 0, 0, 5], 4.0),  # beyond the last bound
        (0.99, [0, 0, 0, 0], None),
    ],
)
def test_quantiles_are_those_of_prometheus(
    opened: Watched, share: float, counts: list[int], expected: float | None
) -> None:
    ask = "async (it) => (await import('/page/history.js')).quantileOf(...it)"
    assert opened.page.evaluate(ask, [share, [1, 2, 4], counts]) == expected


def test_a_rank_that_nobody_asked_for_long_is_not_stuck(opened: Watched) -> None:
    """Not until it has made no step for a while since it was asked."""
    ask = """async () => {
      const { RanksView } = await import('/page/ranks.js');
      const place = document.createElement('div');
      const view = new RanksView(place);
      const at = (time_s, num_running, num_steps_total) => {
        const ranks = [{ name: 'rank 0', stage: 0, tp_rank: 0, device: 'cpu' }];
        const stats = { num_running, ranks: [{ num_steps_total, stage: 0 }] };
        view.draw({ time_s, failed_rank: '', server: { ranks }, stats, ledger: null }, { rate: () => null });
        return place.querySelector('.rank').dataset.is;
      };
      return [at(0, 0, 5), at(600, 0, 5), at(601, 1, 5), at(604, 1, 5), at(605, 1, 6), at(606, 0, 6)];
    }"""
    found = opened.page.evaluate(ask)
    assert found == ["idle", "idle", "working", "stuck", "working", "idle"]


def test_a_server_that_began_anew_counts_anew(opened: Watched) -> None:
    ask = """async () => {
      const { History } = await import('/page/history.js');
      const history = new History();
      const at = (time_s, created, tokens) => {
        const counters = { generation_tokens_total: tokens };
        history.add({ time_s, server: { created }, stats: null, counts: { counters, histograms: {} } });
        return history.points.at(-1).values.generated;
      };
      return [at(0, 7, 100), at(1, 7, 110), at(2, 9, 500), at(3, 9, 530)];
    }"""
    assert opened.page.evaluate(ask) == [None, 10, None, 30]
