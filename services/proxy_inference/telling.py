"""How answers are sent: whole, or piece by piece as server-sent events."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from services.proxy_inference import answers
from services.proxy_inference.answers import Form, Head, Json
from services.proxy_inference.requests import Refusal
from services.proxy_inference.running import Answer, Finish, Mark, Piece
from services.proxy_inference.service import Way
from shared.http import json_response


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, understood: the answers to write and how they are told."""

    way: Way
    runs: list[Answer]
    form: Form
    head: Head
    prompt_tokens: int
    stream: bool
    usage: bool


@dataclass(slots=True)
class _Choice:
    """One answer, as it is gathered."""

    text: str = ""
    marks: list[Mark] = field(default_factory=list[Mark])
    finish: Finish | None = None


def check(piece: Piece) -> None:
    """Raises Refusal for an answer that failed."""
    if piece.finish == "error":
        raise Refusal(500, piece.error, code="engine_failed")


async def gathered(
    asked: Asked, pieces: AsyncGenerator[tuple[int, Piece], None]
) -> web.StreamResponse:
    """All answers at once, when they are whole."""
    choices = [_Choice() for _ in asked.runs]
    async for index, piece in pieces:
        check(piece)
        choice = choices[index]
        choice.text += piece.text
        choice.marks += piece.marks
        choice.finish = piece.finish or choice.finish
    told = [
        asked.form.whole(index, choice.text, choice.marks, choice.finish)
        for index, choice in enumerate(choices)
    ]
    return json_response(asked.head.of(asked.form.kind, told) | {"usage": _usage(asked)})


async def streamed(
    request: web.Request, asked: Asked, pieces: AsyncGenerator[tuple[int, Piece], None]
) -> web.StreamResponse:
    """Every piece as it comes, as server-sent events."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/event-stream"
    response.charset = "utf-8"
    await response.prepare(request)
    kind, extra = asked.form.part_kind, {"usage": None} if asked.usage else {}
    openings = [asked.form.opening(index) for index in range(len(asked.runs))]
    for opening in filter(None, openings):
        await response.write(_event(asked.head.of(kind, [opening]) | extra))
    async for index, piece in pieces:
        if piece.finish == "error":
            await response.write(
                _event(answers.error(piece.error, "server_error", None, "engine_failed"))
            )
            return response
        told: list[Json] = []
        if piece.text or piece.marks:
            told.append(asked.form.part(index, piece.text, piece.marks, None))
        if piece.finish:
            told.append(asked.form.part(index, "", [], piece.finish))
        data = b"".join(_event(asked.head.of(kind, [one]) | extra) for one in told)
        await response.write(data)
    if asked.usage:
        await response.write(_event(asked.head.of(kind, []) | {"usage": _usage(asked)}))
    await response.write(b"data: [DONE]\n\n")
    return response


def _usage(asked: Asked) -> Json:
    written = sum(run.written for run in asked.runs)
    reused = sum(run.sequence.reused for run in asked.runs)
    return answers.usage(asked.prompt_tokens, written, reused)


def _event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
