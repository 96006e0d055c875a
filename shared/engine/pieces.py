"""Text of which it is known what is private: control tokens come from the template alone.

A row may hold `<|im_end|>` or `</s>`, by accident or to play another's part; there it is text. All
else is tokenized as one text, so that what meets at a border melts as it will in use.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shared.engine.model import Tokenizer


class Piece(NamedTuple):
    """Part of a text: somebody's, or the template's."""

    text: str
    private: bool


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces: Sequence[Piece], tokenizer: Tokenizer, *, start: bool) -> list[int]:
    """The tokens of all pieces as one text; what spells a control token in private text is text."""
    text = joined(pieces)
    if all(piece.private for piece in pieces):
        return tokenizer.tokenize(text, start=start, special=False)
    tokens: list[int] = []
    at = 0
    for low, high in [*_spelled(pieces, text, tokenizer), (len(text), len(text))]:
        if low > at or not high:
            tokens += tokenizer.tokenize(text[at:low], start=start and not at, special=True)
        if high > low:
            tokens += tokenizer.tokenize(text[low:high], start=start and not low, special=False)
        at = high
    return tokens


def _spelled(pieces: Sequence[Piece], text: str, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Where `text` spells a control token with a letter that is private."""
    private = list(_private_spans(pieces))
    at = 0
    while found := tokenizer.controls.search(text, at):
        low, high = found.span()
        if any(low < end and begin < high for begin, end in private):
            yield low, high
        at = high


def _private_spans(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    at = 0
    for piece in pieces:
        if piece.private and piece.text:
            yield at, at + len(piece.text)
        at += len(piece.text)
