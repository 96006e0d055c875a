"""What a request does with its logits: an answer that is written, a choice that is made. Pure."""

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Sequence
from services.proxy_inference.sampling import Draft, Drafter, Sampler, log_probabilities, top
from services.proxy_inference.stopping import Writer

Finish = Literal["stop", "length", "error"]


class Alphabet(Protocol):
    """What of a vocabulary an answer needs."""

    def bytes_of(self, token: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Mark:
    """One token with its log-probabilities; `logprob` is None where nothing came before it."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    start: int = 0
    """Where its text begins in the answer, in characters."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What became visible of an answer, and, with its last piece, why it ended."""

    text: str = ""
    marks: list[Mark] = field(default_factory=list[Mark])
    finish: Finish | None = None
    error: str = ""
    scores: list[float] = field(default_factory=list[float])
    """Of a choice: the logit of each."""


class Run(Protocol):
    """One sequence's owner. The worker calls `take` once for every pass that read logits for it."""

    @property
    def sequence(self) -> Sequence: ...

    def take(self, logits: NDArray[np.float32], drafts: Several[Draft] = ()) -> Piece | None:
        """Use the rows (m, n_vocab) of the sequence's next m positions; what became visible.

        With `drafts` there is a row more than drafts: each row but the first is what follows if the
        drafts before it are taken. A piece with `finish` is the last.
        """
        ...

    def drafter(self) -> Drafter | None:
        """Who proposes what may be written next; None where there is nothing to draft."""
        ...

    @property
    def left(self) -> int:
        """How many tokens may still be written."""
        ...


class Answer:
    """A text that is written token by token."""

    def __init__(
        self,
        sequence: Sequence,
        alphabet: Alphabet,
        sampler: Sampler,
        *,
        max_tokens: int,
        stops: list[str],
        ends: frozenset[int],
        marks: int | None = None,
        echo: bool = False,
    ) -> None:
        """`ends`: the tokens that end it. `marks`: so many likeliest tokens are told for each one;
        None: no log-probabilities. `echo`: the prompt is part of the answer; the sequence reads
        its logits where they are wanted.
        """
        self.sequence = sequence
        self.written = 0
        self._alphabet = alphabet
        self._ends = ends
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._writer = Writer(stops)
        self._top = marks
        self._hidden: list[Mark] = []
        self._prompt_tokens = len(sequence.tokens)
        self._first = ""
        self._echoed: list[Mark] = []
        self._at = sequence.read_from
        if echo:
            self._open_with_prompt()
        self._offset = len(self._first)

    @property
    def left(self) -> int:
        return self._max_tokens - self.written

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    @property
    def marked(self) -> bool:
        """Whether log-probabilities are told."""
        return self._top is not None

    def drafter(self) -> Drafter | None:
        return self._sampler.drafter() if self.left > 1 and self._sampler.drafts else None

    def take(self, logits: NDArray[np.float32], drafts: Several[Draft] = ()) -> Piece | None:
        rows = len(logits)
        known = min(max(self._prompt_tokens - 1 - self._at, 0), rows)
        if known:
            self._mark_prompt(logits[:known])
        self._at += known
        if known == rows:
            return None
        told = Piece(self._first, self._echoed)
        self._first, self._echoed = "", []
        if not self._max_tokens:
            return _joined(told, Piece(finish="length"))
        for row, draft in zip(logits[known:], [*drafts, None], strict=True):
            self._at += 1
            before = len(self.sequence.tokens)
            told = _joined(told, self._next(row, draft))
            taken = self.sequence.tokens[before:]
            if told.finish or draft is None or taken != [draft.token]:
                break
        return told if told.text or told.marks or told.finish else None

    def _next(self, logits: NDArray[np.float32], draft: Draft | None) -> Piece | None:
        token = self._sampler.choose(logits, draft)
        self.written += 1
        if token in self._ends:
            return self._ended("stop")
        self.sequence.tokens.append(token)
        if self._top is not None:
            self._hidden.append(_mark(logits, token, self._top))
        shown = self._writer.write(self._alphabet.bytes_of(token))
        marks = self._revealed(shown.starts)
        if self._writer.stopped:
            return Piece(shown.text, marks, "stop")
        if self.written >= self._max_tokens:
            last = self._ended("length")
            return Piece(shown.text + last.text, marks + last.marks, last.finish)
        return Piece(shown.text, marks) if shown.text or marks else None

    def _ended(self, finish: Finish) -> Piece:
        rest = self._writer.finish()
        why: Finish = "stop" if self._writer.stopped else finish
        return Piece(rest.text, self._revealed(rest.starts), why)

    def _revealed(self, starts: tuple[int, ...]) -> list[Mark]:
        if self._top is None:
            return []
        shown, self._hidden = self._hidden[: len(starts)], self._hidden[len(starts) :]
        return [
            Mark(mark.token, mark.logprob, mark.top, self._offset + start)
            for mark, start in zip(shown, starts, strict=True)
        ]

    def _open_with_prompt(self) -> None:
        """The prompt's text comes first; it is not looked through for stop strings."""
        writer = Writer()
        starts: list[int] = []
        for token in self.sequence.tokens:
            shown = writer.write(self._alphabet.bytes_of(token))
            self._first += shown.text
            starts += shown.starts
        rest = writer.finish()
        self._first += rest.text
        starts += rest.starts
        if self._top is not None:
            self._echoed = [
                Mark(token, None, [], start)
                for token, start in zip(self.sequence.tokens, starts, strict=True)
            ]

    def _mark_prompt(self, logits: NDArray[np.float32]) -> None:
        """Rows of positions whose next token is the prompt's own."""
        if self._top is None:
            return
        for row, position in zip(logits, range(self._at, self._at + len(logits)), strict=True):
            plain = self._echoed[position + 1]
            mark = _mark(row, plain.token, self._top)
            self._echoed[position + 1] = Mark(mark.token, mark.logprob, mark.top, plain.start)


class Choice:
    """One question with given answers: it ends with the logits of `tokens`."""

    def __init__(self, sequence: Sequence, tokens: list[int]) -> None:
        self.sequence = sequence
        self._tokens = tokens

    @property
    def left(self) -> int:
        return 0

    def drafter(self) -> None:
        return None

    def take(self, logits: NDArray[np.float32], drafts: Several[Draft] = ()) -> Piece | None:
        scores = logits[-1][self._tokens].astype(np.float64)
        return Piece(finish="stop", scores=scores.tolist())


def _joined(piece: Piece, more: Piece | None) -> Piece:
    if more is None:
        return piece
    return Piece(piece.text + more.text, piece.marks + more.marks, more.finish)


def _mark(logits: NDArray[np.float32], token: int, count: int) -> Mark:
    values = log_probabilities(logits)
    likeliest = [(one, float(values[one])) for one in top(values, count)]
    return Mark(token, float(values[token]), likeliest)
