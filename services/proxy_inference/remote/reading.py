"""What servers answer, in the shapes that are about. Pure.

OpenAI's completions name the likeliest tokens by text, in one object; vLLM's do so too, or as
`token_id:N` where that is asked for; llama-server's are lists of objects with ids, under /v1 as
well as under its own /completion.
"""

from dataclasses import dataclass
from typing import Any, cast

import msgspec

from shared.errors import EngineError

BY_ID = "token_id:"
_NOT_OURS = (
    msgspec.DecodeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What reading JSON of another shape ends in: whoever serves it, no pass of ours fails by it."""


@dataclass(frozen=True, slots=True)
class Named:
    """One token as a server tells it; `id` is None where it is told by text alone."""

    id: int | None
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Position:
    """One position of an answer: the token that was chosen, and the likeliest ones."""

    chosen: Named
    top: list[Named]


@dataclass(frozen=True, slots=True)
class Answer:
    """The first choice of a completion."""

    text: str
    positions: list[Position]
    tokens: list[int]
    """The ids of what was written, where the server told them."""
    ended: bool
    """Whether a token that ends a text was chosen before the length was reached."""
    prompt_tokens: int | None


def answer(body: bytes, where: str) -> Answer:
    """What a server's 200 says.

    Raises:
        EngineError: it is no completion; names the server.
    """
    try:
        return _answer(msgspec.json.decode(body))
    except _NOT_OURS as error:
        raise EngineError(f"{where} answered what is no completion ({error!r})") from error


def refusal(body: bytes) -> str:
    """Why a server did not answer, from the body of a 4xx or 5xx."""
    try:
        found: Any = msgspec.json.decode(body)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = cast("dict[str, Any]", found)[key]
    except _NOT_OURS:
        found = body.decode(errors="replace")
    return " ".join(str(found).split())[:300] or "no reason given"


def _answer(found: Any) -> Answer:
    if "choices" not in found:  # llama-server's own
        return Answer(
            str(found["content"]),
            [_position(one) for one in found.get("completion_probabilities") or []],
            [int(token) for token in found.get("tokens") or []],
            found.get("stop_type") in ("eos", "word") or found.get("stopped_eos") is True,
            found.get("tokens_evaluated"),
        )
    choice = found["choices"][0]
    told = choice.get("logprobs") or {}
    if told.get("content") is not None:
        positions = [_position(one) for one in told["content"]]
    else:
        positions = _by_name(told)
    usage = found.get("usage") or {}
    tokens = [int(token) for token in choice.get("token_ids") or []]
    if not tokens:
        ids = [one.chosen.id for one in positions if one.chosen.id is not None]
        tokens = ids if len(ids) == len(positions) else []
    return Answer(
        str(choice.get("text") or ""),
        positions,
        tokens,
        choice.get("finish_reason") == "stop",
        usage.get("prompt_tokens"),
    )


def _position(one: Any) -> Position:
    return Position(_listed(one), [_listed(each) for each in one.get("top_logprobs") or []])


def _listed(one: Any) -> Named:
    if "bytes" in one and one["bytes"] is not None:
        text = bytes(one["bytes"]).decode(errors="replace")
    else:
        text = str(one["token"])
    number = one.get("id")
    return Named(None if number is None else int(number), text, float(one["logprob"]))


def _by_name(told: Any) -> list[Position]:
    tokens, chosen = told.get("tokens") or [], told.get("token_logprobs") or []
    top = told.get("top_logprobs") or [None] * len(tokens)
    return [
        Position(
            _called(token, logprob),
            [_called(name, value) for name, value in (likeliest or {}).items()],
        )
        for token, logprob, likeliest in zip(tokens, chosen, top, strict=True)
    ]


def _called(name: str, logprob: float) -> Named:
    if name.startswith(BY_ID) and name[len(BY_ID) :].isdecimal():
        return Named(int(name[len(BY_ID) :]), "", float(logprob))
    return Named(None, name, float(logprob))
