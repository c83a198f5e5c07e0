"""Stop strings: none leaks, nothing else is lost, however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bireme.text.stop_strings import StopStrings

TEXT = st.text("abc", max_size=30)


def run(
    stops: list[str], pieces: list[str], *, is_included: bool = False
) -> tuple[str, str | None]:
    search = StopStrings(stops, is_included=is_included)
    text = "".join(search.add(piece) for piece in pieces)
    return text + search.finish(), search.found


@given(st.lists(TEXT.filter(bool), min_size=1, max_size=3), st.lists(TEXT, max_size=8))
def test_the_cut_of_the_text_does_not_matter(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    assert run(stops, pieces) == run(stops, [whole]) == run(stops, list(whole))


@given(st.lists(TEXT.filter(bool), min_size=1, max_size=3), st.lists(TEXT, max_size=8))
def test_all_text_before_the_stop_string_is_given_and_nothing_after(
    stops: list[str], pieces: list[str]
) -> None:
    whole = "".join(pieces)
    text, found = run(stops, pieces)
    if found is None:
        assert text == whole
        assert not any(stop in whole for stop in stops)
    else:
        assert whole.startswith(text + found)
        assert not any(stop in (text + found)[:-1] for stop in stops)
        assert run(stops, pieces, is_included=True) == (text + found, found)


def test_what_may_be_the_beginning_of_a_stop_string_waits() -> None:
    search = StopStrings(["</end>"])
    assert [search.add(piece) for piece in ("a <", "/b ", "</en", "d> c")] == ["a ", "</b ", "", ""]
    assert search.found == "</end>"


def test_a_stop_string_that_ends_in_ignored_text_does_not_count_and_one_that_reaches_out_does() -> (
    None
):
    search = StopStrings(["END", "x"])
    assert search.add("x EN", is_ignored=True) + search.add("Dy") == "x "
    assert search.found == "END"
