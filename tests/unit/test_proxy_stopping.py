"""What of a text may be shown while it is written."""

from hypothesis import given
from hypothesis import strategies as st

from services.proxy_inference.stopping import Writer

letters = st.text("ab✓", max_size=24)
stops = st.lists(st.text("ab✓", min_size=1, max_size=4), max_size=3)
cuts = st.lists(st.integers(1, 5), min_size=1, max_size=60)


def pieces_of(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` cut into tokens of the given sizes, taken over and over."""
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    return pieces


@given(text=letters, stop=stops, sizes=cuts)
def test_nothing_of_a_stop_string_and_no_half_character_is_ever_shown(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    places = [at for one in stop if (at := text.find(one)) >= 0]
    writer, shown = Writer(stop), ""
    for piece in pieces_of(text.encode(), sizes):
        shown += writer.write(piece).text
        assert "�" not in shown
        if not places:
            assert text.startswith(shown)
    shown += writer.finish().text
    assert writer.stopped == bool(places)
    if not places:
        assert shown == text
    else:  # the stop that is complete first ends it; none of its letters are shown
        assert text.startswith(shown)
        assert len(shown) in places
        assert not any(one in shown for one in stop)


@given(text=letters, sizes=cuts)
def test_every_token_becomes_visible_once_with_the_place_it_began_at(
    text: str, sizes: list[int]
) -> None:
    writer, starts = Writer(["zz"]), list[int]()
    pieces = pieces_of(text.encode(), sizes)
    for piece in pieces:
        starts += writer.write(piece).starts
    starts += writer.finish().starts
    assert len(starts) == len(pieces)
    assert starts == sorted(starts)
    for piece, start in zip(pieces, starts, strict=True):
        whole = piece.decode(errors="ignore")
        assert len(whole) < len(piece) or text[start:].startswith(whole)


def test_a_stop_over_three_tokens_hides_those_tokens_too() -> None:
    writer = Writer(["END"])
    assert writer.write(b"one ").starts == (0,)
    assert writer.write(b"twoE").text == "two"
    assert writer.write(b"N") == writer.write(b"")
    ended = writer.write(b"D three")
    assert (ended.text, ended.starts, writer.stopped) == ("", (), True)
    assert writer.write(b"more").text == ""
    assert writer.finish().text == ""


def test_what_only_looked_like_a_stop_is_shown_after_all() -> None:
    writer = Writer(["\n\n"])
    assert writer.write(b"a\n").text == "a"
    assert writer.write(b"b").text == "\nb"
    assert writer.write(b"\n").text == ""
    assert writer.finish().text == "\n"


def test_bytes_that_are_no_character_are_replaced_only_when_that_is_certain() -> None:
    writer = Writer()
    assert writer.write(b"\xe2\x9c").text == ""
    assert writer.write(b"\x93").text == "✓"
    assert writer.write(b"\xe2").text == ""
    assert writer.finish().text == "�"
