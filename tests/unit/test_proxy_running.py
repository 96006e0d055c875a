"""One answer, token by token, from logits made by hand."""

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Sequence
from services.proxy_inference.running import Answer, Choice, Piece
from services.proxy_inference.sampling import Sampler, Sampling, log_probabilities

LETTERS = "abcdefghij"
END = 9


class Letters:
    def bytes_of(self, token: int) -> bytes:
        return b"" if token == END else LETTERS[token].encode()


def logits_for(*tokens: int) -> NDArray[np.float32]:
    """Rows in which these tokens are the likeliest."""
    rows = np.tile(-0.1 * np.arange(10, dtype=np.float32), (len(tokens), 1))
    rows[np.arange(len(tokens)), list(tokens)] = 5.0
    return rows


def an_answer(prompt: list[int], **options: object) -> Answer:
    marks, echo = options.get("marks"), bool(options.get("echo"))
    return Answer(
        Sequence(prompt, read_from=0 if echo and marks is not None else None),
        Letters(),
        Sampler(Sampling(temperature=0), 0),
        max_tokens=options.get("max_tokens", 8),  # type: ignore[arg-type]
        stops=options.get("stops", []),  # type: ignore[arg-type]
        ends=frozenset({END}),
        marks=marks,  # type: ignore[arg-type]
        echo=echo,
    )


def written(answer: Answer, *tokens: int) -> list[Piece]:
    pieces = [answer.take(logits_for(token)) for token in tokens]
    return [piece for piece in pieces if piece is not None]


def test_an_answer_ends_at_its_length_at_an_end_token_or_at_a_stop() -> None:
    pieces = written(an_answer([0], max_tokens=3), 1, 2, 3)
    assert [(piece.text, piece.finish) for piece in pieces] == [
        ("b", None),
        ("c", None),
        ("d", "length"),
    ]
    answer = an_answer([0])
    assert [(p.text, p.finish) for p in written(answer, 1, END)] == [("b", None), ("", "stop")]
    assert answer.written == 2
    assert answer.sequence.tokens == [0, 1]
    pieces = written(an_answer([0], stops=["cd"], marks=0), 1, 2, 3)
    assert "".join(piece.text for piece in pieces) == "b"
    assert [mark.token for piece in pieces for mark in piece.marks] == [1]
    assert pieces[-1].finish == "stop"


def test_what_was_held_back_for_a_stop_comes_with_the_end_and_its_marks_in_order() -> None:
    answer = an_answer([0], stops=["cde"], marks=1, max_tokens=3)
    pieces = written(answer, 1, 2, 3)
    assert "".join(piece.text for piece in pieces) == "bcd"
    marks = [mark for piece in pieces for mark in piece.marks]
    assert [(mark.token, mark.start) for mark in marks] == [(1, 0), (2, 1), (3, 2)]
    wanted = float(log_probabilities(logits_for(2)[0])[2])
    assert marks[1].logprob == wanted
    assert marks[1].top == [(2, wanted)]


def test_an_echoed_prompt_has_the_log_probabilities_of_its_own_tokens() -> None:
    answer = an_answer([3, 1, 4], echo=True, marks=1, max_tokens=1)
    rows = logits_for(1, 2, 7)
    assert answer.take(rows[:2]) is None  # in two passes, as a long prompt comes
    piece = answer.take(rows[2:])
    assert piece is not None
    assert (piece.text, piece.finish) == ("dbeh", "length")
    assert [mark.token for mark in piece.marks] == [3, 1, 4, 7]
    assert [mark.start for mark in piece.marks] == [0, 1, 2, 3]
    assert piece.marks[0].logprob is None
    assert piece.marks[1].logprob == float(log_probabilities(rows[0])[1])
    assert piece.marks[2].logprob == float(log_probabilities(rows[1])[4])
    assert piece.marks[2].top[0][0] == 2


def test_an_echo_of_nothing_more_than_the_prompt() -> None:
    piece = an_answer([3, 1], echo=True, max_tokens=0).take(logits_for(5))
    assert piece == Piece("db", [], "length")


def test_a_choice_is_the_logits_of_its_tokens() -> None:
    piece = Choice(Sequence([1, 2]), [4, 7]).take(logits_for(7))
    assert piece is not None
    assert piece.finish == "stop"
    assert piece.scores == logits_for(7)[0, [4, 7]].tolist()
