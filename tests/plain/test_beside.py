"""Ledgers beside one another, and that they look as on the live page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from piped import US, Piped

from bireme.observe import drawing
from bireme.observe.beside import COLOURS, HATCHES, STEP_COLOURS, bars_beside, rows_beside
from bireme.observe.causes import Row

FOLDER = Path(drawing.__file__).parent
SHORT = Piped(2, 3, 1, lambda *_: 1000 * US).run().ledger()
LONG = Piped(2, 3, 1, lambda *_: 2000 * US).run().ledger()
SVG = "{http://www.w3.org/2000/svg}"


def test_rows_stand_under_the_ranks_that_they_are_of() -> None:
    lines = rows_beside({"short": SHORT, "long": LONG}).splitlines()
    assert "short, 6" in lines[0]
    assert "long, 12" in lines[0]
    assert lines[1].split()[4:] == ["rank", "0", "rank", "1", "rank", "0", "rank", "1"]
    assert len({len(line) for line in lines}) == 1
    ranks = [*SHORT.ranks, *LONG.ranks]
    shown = {line[:16].strip(): [float(it) for it in line[16:].split()] for line in lines[2:]}
    assert shown["compute"] == [round(100 * rank.share(Row.COMPUTE), 1) for rank in ranks]
    assert "token dependency" in shown
    assert "collective wait" not in shown
    assert all(abs(sum(column) - 100) < 0.5 for column in zip(*shown.values(), strict=True))


def test_bars_share_one_scale_and_count_steps_from_the_first() -> None:
    document = ElementTree.fromstring(bars_beside({"<short>": SHORT, "long": LONG})._repr_svg_())
    titles = {it: it.findtext(f"{SVG}title") or "" for it in document.iter(f"{SVG}rect")}
    of_step_0 = [it for it, title in titles.items() if title.startswith("compute, step 0")]
    widths = [float(it.get("width", "")) for it in of_step_0]
    assert widths[2] / widths[0] > 1.9
    texts = [it.text for it in document.iter(f"{SVG}text")]
    assert any(str(text).startswith("<short>: 6") for text in texts)
    last = bars_beside({"long": LONG}, num_steps=1).svg
    assert "compute, step 0" in last
    assert "compute, step 2" not in last


def test_they_look_as_on_the_live_page() -> None:
    css, js = (FOLDER / "drawing.css").read_text(), (FOLDER / "rows.js").read_text()
    light = dict(re.findall(r"--([\w-]+): ([^;]+);", css.partition("@media")[0]))
    assert [light[f"step-{step}"] for step in range(len(STEP_COLOURS))] == list(STEP_COLOURS)
    for row, colour in COLOURS.items():
        (name,) = re.findall(rf"^\.row-{row} {{ fill: var\(--([\w-]+)\)", css, re.MULTILINE)
        assert light[name] == colour
    for row, (colour, path) in HATCHES.items():
        own = re.findall(rf"^\.hatch-{row} path {{ stroke: var\(--([\w-]+)\)", css, re.MULTILINE)
        assert light[own[0] if own else "hatch"] == colour
        assert f'name: "{row}"' in js
        assert re.search(rf'name: "{row}".*hatch: "{re.escape(path)}"', js)
    assert {Row.COMPUTE, *COLOURS, *HATCHES} == set(Row)
