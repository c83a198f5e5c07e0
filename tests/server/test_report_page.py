"""Reports in headless Chromium, as files without a network: they draw, zoom, and can be used by everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from test_page import CHROMIUM, PHONE, WIDE, Watched, browser, check_accessible, check_fits

from bireme.cli import run as command
from bireme.observe.run_folder import RunFolder
from bireme.report.data import run_data
from bireme.report.document import document

__all__ = ["browser"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to draw pages with")

SMALL = ["--batch", "8", "--input-len", "16", "--output-len", "24"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with tensor parallelism, and of it and one with uneven stages side by side."""
    folder = tmp_path_factory.mktemp("reports")
    runs = {"even": ["-tp", "2"], "uneven": ["--layers-per-stage", "7,1"]}
    for name, layout in runs.items():
        assert command(["profile", "demo", *layout, *SMALL, "-o", str(folder / name)]) == 0
    for out, shown in (("one.html", ["even"]), ("two.html", list(runs))):
        named = [str(folder / name) for name in shown]
        assert command(["report", *named, "-o", str(folder / out)]) == 0
    return folder


@pytest.fixture(scope="module")
def pipeline_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a vision pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    sweep = ["--batch", "8", "--micro-batches", "4", "--runs", "1", "-o", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent.parent)  # ranks find `vision.networks` here
        network = ["vision.networks:Network", "--image-size", "8", "--device", "cpu"]
        assert command(["pipeline", *network, *sweep]) == 0
    out = folder / "report.html"
    assert command(["report", str(folder / "run"), "-o", str(out)]) == 0
    return out


@pytest.fixture(params=[("light", WIDE), ("dark", WIDE), ("light", PHONE)], ids=str)
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    scheme, (width, height) = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    watched = Watched(context.new_page())
    yield watched.page
    context.close()
    assert watched.errors == []
    assert {url.partition(":")[0] for url in watched.urls} <= {"file", "data"}


def test_it_draws_and_fits_and_can_be_read_by_everybody(page: Page, reports: Path) -> None:
    page.goto((reports / "two.html").as_uri())
    articles = page.get_by_role("article")
    expect(articles).to_have_count(2)
    for article in articles.all():
        expect(article.locator("svg.gantt rect").first).to_be_attached()
        for title in (
            "What the doctor finds",
            "Where the time went",
            "Latencies",
            "Memory",
            "Layout",
        ):
            expect(article.get_by_role("heading", name=title)).to_be_visible()
    expect(articles.nth(0).get_by_role("heading", name="Collectives by size")).to_be_visible()
    expect(articles.nth(1).get_by_text("stage 0 holds up the others")).to_be_visible()
    check_fits(page)
    check_accessible(page)


def test_two_runs_are_on_one_scale(page: Page, reports: Path) -> None:
    page.goto((reports / "two.html").as_uri())
    first, second = page.locator("svg.gantt").all()
    expect(second.locator("rect").first).to_be_attached()

    def scales() -> list[list[str]]:
        return [it.locator("text.axis").all_text_contents() for it in (first, second)]

    whole = scales()
    assert whole[0] == whole[1]
    second.press("+")
    assert scales()[0] == scales()[1] != whole[0]
    cards = page.locator(".card", has=page.get_by_role("heading", name="Memory"))
    widths = [
        sum(float(str(it.get_attribute("width")).rstrip("%")) for it in bar.locator("rect").all())
        for bar in cards.locator("svg.ledger-bar").all()
    ]
    assert len(widths) == 4
    assert max(widths) == pytest.approx(100)
    assert sum(width > 99.99 for width in widths) == 1, "the fullest of both runs"


def test_what_a_plan_predicted_is_below_what_was_measured(
    page: Page, pipeline_report: Path
) -> None:
    page.goto(pipeline_report.as_uri())
    measured, predicted = page.locator("svg.gantt").all()
    expect(measured.locator("rect").first).to_be_attached()
    expect(predicted.locator("rect").first).to_be_attached()
    expect(page.get_by_role("heading", name="As the plan predicted it: modelled")).to_be_visible()
    expect(page.get_by_role("rowheader", name="bubble of rank 1")).to_be_visible()
    expect(page.get_by_role("heading", name="By micro-batches")).to_be_visible()
    expect(page.get_by_role("heading", name="Latencies")).to_have_count(0)

    def scales() -> list[list[str]]:
        return [it.locator("text.axis").all_text_contents() for it in (measured, predicted)]

    assert scales()[0] == scales()[1]
    before = scales()[0]
    for picture in (measured, predicted):
        picture.press("+")
        assert scales()[0] == scales()[1] != before
        picture.press("0")
        assert scales() == [before, before]
    check_fits(page)
    check_accessible(page)


def test_one_can_look_closer(page: Page, reports: Path) -> None:
    page.goto((reports / "one.html").as_uri())
    picture = page.locator("svg.gantt")
    expect(picture.locator("rect").first).to_be_attached()
    before = picture.locator("text.axis").all_text_contents()
    picture.press("+")
    picture.press("+")
    assert picture.locator("text.axis").all_text_contents() != before
    page.get_by_role("button", name="Show all").click()
    assert picture.locator("text.axis").all_text_contents() == before


AREAS = """() => {
  const drawn = document.querySelector('svg.gantt svg');
  const found = {};
  for (const it of drawn.querySelectorAll('rect, path')) {
    const look = it.getAttribute('class');
    if (!/^(step-\\d|row-compute)$/.test(look)) continue;
    const parts = it.tagName === 'rect'
      ? [['y', 'width', 'height'].map((name) => Number(it.getAttribute(name)))]
      : [...it.getAttribute('d').matchAll(/M\\S+ (\\S+?)h(\\S+?)v(\\S+?)h/g)].map((it) => it.slice(1).map(Number));
    for (const [y, width, height] of parts) {
      const rank = Math.floor(y / 24);
      found[rank] = (found[rank] ?? 0) + width * height;
    }
  }
  return Object.values(found).map((area) => area / (19 * Number(drawn.getAttribute('width'))));
}"""


def test_shares_of_time_stay_where_there_is_no_room_for_bars(page: Page, reports: Path) -> None:
    run = RunFolder(reports / "even")
    data = run_data(run, 300)
    (reports / "long.html").write_text(document([data]))
    page.goto((reports / "long.html").as_uri())
    expect(page.locator("svg.gantt path").first).to_be_attached()
    expect(page.locator(".readout")).to_contain_text(f"{run.profile.num_steps} steps of 2 ranks in")
    expect(page.locator(".readout")).to_contain_text("as shares of each")
    for area, rank in zip(page.evaluate(AREAS), run.ledger.told.ranks, strict=True):
        assert area == pytest.approx(rank.shares["compute"], abs=0.01)
    page.get_by_role("button", name="Show the last steps").click()
    ticks = page.locator("svg.gantt text.axis")
    expect(ticks.first).not_to_have_text("0")
    texts = ticks.all_text_contents()
    assert len(set(texts)) == len(texts)
    assert page.locator('svg.gantt rect[class^="step-"]').count() > 0
