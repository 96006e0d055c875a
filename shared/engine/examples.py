"""Rows become tokens: where the answer begins, and what is cut when a row is too long.

The text alone is shortened, from its left, so that the template's end, where the model is asked,
always survives. Only a row that is too long in spite of that loses the end of its answer.
"""

import numpy as np

from shared.dataset import Row, split_template
from shared.engine.model import TEMPLATE_EDGE, Example, Tokenizer
from shared.errors import EngineError
from shared.messages import Task


def example(row: Row, task: Task, tokenizer: Tokenizer) -> Example:
    """`row` as tokens, at most `task.max_tokens` of them."""
    prompt = tokenizer.tokenize(row.prompt, start=True)
    if task.loss == "choices":
        tokens = _shortened(prompt, row, task.max_tokens, tokenizer)
        return Example(np.array(tokens, np.int32), np.array([row.label], np.int32))
    answer = _following(row.prompt, prompt, row.completion, tokenizer, start=True)
    if row.label < 0 and tokenizer.end >= 0:
        answer = [*answer, tokenizer.end]
    answer = answer[: max(task.max_tokens - min(len(prompt), task.max_tokens // 2), 1)]
    prompt = _shortened(prompt, row, task.max_tokens - len(answer) + 1, tokenizer)
    tokens = [*prompt, *answer[:-1]]
    return Example(np.array(tokens, np.int32), np.array(answer, np.int32))


def first_tokens(words: list[str], template: str, tokenizer: Tokenizer) -> list[int]:
    """The first token of each word as it would follow the template's end."""
    edge = split_template(template)[1] or TEMPLATE_EDGE
    before = tokenizer.tokenize(edge, start=False)
    return [_following(edge, before, word, tokenizer, start=False)[0] for word in words]


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


def _following(
    before: str, before_tokens: list[int], text: str, tokenizer: Tokenizer, *, start: bool
) -> list[int]:
    """The tokens of `text` after `before`; alone where the two would melt into one token."""
    both = tokenizer.tokenize(before + text, start=start)
    if both[: len(before_tokens)] == before_tokens and len(both) > len(before_tokens):
        return both[len(before_tokens) :]
    return tokenizer.tokenize(text, start=False)


def _shortened(prompt: list[int], row: Row, limit: int, tokenizer: Tokenizer) -> list[int]:
    """`prompt` without so many tokens of the text's left that `limit` remain."""
    excess = len(prompt) - limit
    if excess <= 0:
        return prompt
    head = len(tokenizer.tokenize(row.head, start=True))
    tail = len(tokenizer.tokenize(row.tail, start=False))
    kept = min(head, max(limit - tail, 0))
    return prompt[:kept] + prompt[kept + excess :]
