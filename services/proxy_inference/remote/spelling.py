"""Tokens as the text that a server takes and gives, and what cannot be told apart that way. Pure.

A server that takes no token ids tokenizes our text anew; one that gives none names tokens by what
they add to a text. Half a character has no text, and neither has a control token: such tokens, and
any whose text another token shares, have no name there.
"""

import codecs
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError


class Alphabet(Protocol):
    """What of our vocabulary is needed."""

    size: int
    end: int
    ends: frozenset[int]

    @property
    def controls(self) -> re.Pattern[str]: ...

    def tokenize(self, text: str, *, start: bool, special: bool = True) -> list[int]: ...

    def bytes_of(self, token: int) -> bytes: ...

    def spelling(self, token: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Spelled:
    """A prompt as text: how many tokens that makes, and whether they are others than ours."""

    text: str
    count: int
    drifted: bool


class Spelling:
    """Our vocabulary, as a server that speaks text sees it."""

    def __init__(self, alphabet: Alphabet) -> None:
        self.alphabet = alphabet
        self.start = alphabet.tokenize("", start=True)
        """What comes before every text; a server puts it there of its own."""

    def prompt(self, tokens: Sequence[int]) -> Spelled | None:
        """The text of `tokens`; None while it ends in the middle of a character.

        Raises:
            EngineError: as text it would have control tokens that `tokens` have not.
        """
        alphabet = self.alphabet
        begins = len(self.start)
        body = tokens[begins:] if list(tokens[:begins]) == self.start else tokens
        pieces = [alphabet.bytes_of(token) or alphabet.spelling(token).encode() for token in body]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(b"".join(pieces))
        if decoder.getstate()[0]:
            return None
        again = alphabet.tokenize(text, start=True)
        if self._controls(again) != self._controls(tokens):
            raise EngineError(
                "the prompt spells a control token as plain text; the large model's server takes "
                "only text and would read it as one: leave it out, or use a server that takes "
                "token ids"
            )
        return Spelled(text, len(again), again != list(tokens))

    def token(self, text: str) -> int | None:
        """The one token that a server can mean by `text`."""
        return self._named.get(text)

    def first(self, text: str) -> int | None:
        """The token that `text` begins with: the one it names, or else how we would split it.

        None for what is no UTF-8, of which a text says nothing.
        """
        named = self.token(text)
        if named is not None or "\ufffd" in text:
            return named
        split = self.alphabet.tokenize(text, start=False, special=False)
        return split[0] if split else None

    @cached_property
    def nameless(self) -> NDArray[np.bool_]:
        """(n_vocab,): the tokens that no text names."""
        nameless = np.ones(self.alphabet.size, bool)
        nameless[list(self._named.values())] = False
        return nameless

    @cached_property
    def texts(self) -> frozenset[str]:
        """All that a token may be called, and whatever a control token is."""
        left, put = self._texts
        controls = {self.alphabet.spelling(n) for n, text in enumerate(left) if not text}
        return frozenset(left) | frozenset(put) | controls

    @cached_property
    def _texts(self) -> tuple[list[str], list[str]]:
        """By token: servers leave out what is no UTF-8, or put U+FFFD for it."""
        spelled = [self.alphabet.bytes_of(token) for token in range(self.alphabet.size)]
        left = [data.decode(errors="ignore") for data in spelled]
        return left, [data.decode(errors="replace") for data in spelled]

    @cached_property
    def _named(self) -> dict[str, int]:
        left, put = self._texts
        uses = Counter(left)
        uses.update(one for one, other in zip(put, left, strict=True) if one != other)
        return {
            text: token
            for token, text in enumerate(left)
            if text and uses[text] == 1 and put[token] == text
        }

    def _controls(self, tokens: Sequence[int]) -> list[int]:
        alphabet = self.alphabet
        return [
            token
            for token in tokens[len(self.start) :]
            if 0 <= token < alphabet.size and not alphabet.bytes_of(token)
        ]
