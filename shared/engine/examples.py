"""Rows become tokens: where the answer begins, and what is cut when a row is too long.

Of a text it is the beginning that goes, so that the template's end, where the model is asked,
always survives; of a conversation its oldest exchanges, and then the beginning of what was said.
Only what is too long in spite of that loses the end of its answer.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile

import msgspec
import numpy as np

from shared.dataset import Row, Turn, split_template
from shared.engine.model import TEMPLATE_EDGE, Adaptation, Example, Tokenizer
from shared.engine.pieces import Piece, tokens_of
from shared.errors import EngineError
from shared.messages import Task

_FEWEST = 8
"""Tokens of a row that it would be senseless to cut further."""

_CUTS = 32
"""Halvings that find how much of a conversation's last exchange fits."""


def example(row: Row | Turn, task: Task, tokenizer: Tokenizer) -> Example:
    """`row` as tokens, at most `task.max_tokens` of them.

    Raises:
        EngineError: the model's chat template refuses the conversation.
    """
    before, said = _pieces(row, tokenizer)
    prompt = tokens_of(before, tokenizer, start=True)
    if isinstance(row, Row) and task.loss == "choices":
        tokens = _shortened(prompt, row, task.max_tokens, tokenizer)
        return Example(np.array(tokens, np.int32), np.array([row.label], np.int32))
    answer = _following(before, prompt, said, tokenizer, start=True)
    if isinstance(row, Row) and row.label < 0 and tokenizer.end >= 0:
        answer = [*answer, tokenizer.end]
    answer = answer[: max(task.max_tokens - min(len(prompt), task.max_tokens // 2), 1)]
    limit = task.max_tokens - len(answer) + 1
    if isinstance(row, Row):
        prompt = _shortened(prompt, row, limit, tokenizer)
    elif len(prompt) > limit:
        prompt = _shortened_turn(row, limit, tokenizer)
    tokens = [*prompt, *answer[:-1]]
    return Example(np.array(tokens, np.int32), np.array(answer, np.int32))


def with_prompt(task: Task, blocks: Adaptation) -> Task:
    """`task` for rows that leave the soft prompt room in `max_tokens`, where there is one.

    Raises:
        EngineError: nothing would be left of a row.
    """
    prompt = len(blocks.prompt_tokens)
    if prompt and task.max_tokens < prompt + _FEWEST:
        raise EngineError(
            f"task: max_tokens {task.max_tokens} leaves no room for rows beside a prompt of "
            f"{prompt}; use at least {prompt + _FEWEST}, or fewer --prompt-tokens"
        )
    return msgspec.structs.replace(task, max_tokens=task.max_tokens - prompt) if prompt else task


def messages(turn: Turn) -> list[Mapping[str, str]]:
    """What was said before the answer, as a chat template takes it."""
    return [{"role": role, "content": content} for role, content in turn.before]


def first_tokens(words: list[str], template: str, tokenizer: Tokenizer) -> list[int]:
    """The first token of each word as it would follow the template's end."""
    return [tokens_after(template, word, tokenizer)[0] for word in words]


def tokens_after(template: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """`text` as it would follow the template's end."""
    edge = split_template(template)[1] or TEMPLATE_EDGE
    asked = [Piece(edge, False)]
    before = tokens_of(asked, tokenizer, start=False)
    return _following(asked, before, [Piece(text, False)], tokenizer, start=False)


def choice_tokens(task: Task, tokenizer: Tokenizer) -> list[int]:
    """The token that stands for each label of a `choices` task.

    Raises:
        EngineError: two label words begin with the same token.
    """
    words = list(task.labels.values())
    tokens = first_tokens(words, task.template, tokenizer)
    seen: dict[int, str] = {}
    for word, token in zip(words, tokens, strict=True):
        if token in seen:
            raise EngineError(
                f"label words {seen[token]!r} and {word!r} begin with the same token; change one"
            )
        seen[token] = word
    return tokens


def _pieces(row: Row | Turn, tokenizer: Tokenizer) -> tuple[list[Piece], list[Piece]]:
    """What stands before the answer, and the answer."""
    if isinstance(row, Turn):
        return tokenizer.chat.pieces(messages(row)), tokenizer.chat.answer(row.answer)
    before = [Piece(row.head, False), Piece(row.body, True), Piece(row.tail, False)]
    before = [piece for piece in before if piece.text]
    return before, [Piece(row.completion, row.label < 0)]


def _following(
    before: list[Piece],
    before_tokens: list[int],
    said: list[Piece],
    tokenizer: Tokenizer,
    *,
    start: bool,
) -> list[int]:
    """The tokens of `said` after `before`; alone where the two would melt into one token."""
    both = tokens_of([*before, *said], tokenizer, start=start)
    if both[: len(before_tokens)] == before_tokens and len(both) > len(before_tokens):
        return both[len(before_tokens) :]
    return tokens_of(said, tokenizer, start=False)


def _shortened(prompt: list[int], row: Row, limit: int, tokenizer: Tokenizer) -> list[int]:
    """`prompt` without so many tokens of the text's left that `limit` remain."""
    excess = len(prompt) - limit
    if excess <= 0:
        return prompt
    head = len(tokenizer.tokenize(row.head, start=True))
    tail = len(tokenizer.tokenize(row.tail, start=False))
    kept = min(head, max(limit - tail, 0))
    return prompt[:kept] + prompt[kept + excess :]


def _shortened_turn(turn: Turn, limit: int, tokenizer: Tokenizer) -> list[int]:
    """The prompt's newest exchanges that fit; of the last what fits, with the template whole."""
    said = messages(turn)
    system = list(takewhile(lambda message: message["role"] == "system", said))
    starts = [n for n, message in enumerate(said) if n > len(system) and message["role"] == "user"]
    pieces = tokenizer.chat.pieces(said)
    for first in starts:
        try:
            pieces = tokenizer.chat.pieces([*system, *said[first:]])
        except EngineError:  # this template wants another beginning
            continue
        tokens = tokens_of(pieces, tokenizer, start=True)
        if len(tokens) <= limit:
            return tokens
    none, all_ = 0, sum(len(piece.text) for piece in pieces if piece.private)
    for _ in range(_CUTS):
        if none >= all_:
            break
        half = (none + all_) // 2
        if len(tokens_of(_without(pieces, half), tokenizer, start=True)) <= limit:
            all_ = half
        else:
            none = half + 1
    return tokens_of(_without(pieces, all_), tokenizer, start=True)[-limit:]


def _without(pieces: Sequence[Piece], letters: int) -> list[Piece]:
    """`pieces` without the first `letters` of what is private."""
    left: list[Piece] = []
    for text, private in pieces:
        gone = min(letters, len(text)) if private else 0
        letters -= gone
        left.append(Piece(text[gone:], private))
    return left
