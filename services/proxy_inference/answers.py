"""What answers look like on the wire, as OpenAI's API spells it. Pure: dicts from plain values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.proxy_inference.running import Finish, Mark

Json = dict[str, object]


class Spelling(Protocol):
    """How tokens are told to people."""

    def bytes_of(self, token: int) -> bytes: ...

    def shown(self, token: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str
    also: Json = field(default_factory=dict[str, object])

    def of(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        } | self.also


def usage(prompt: int, written: int, reused: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def error(message: str, kind: str, param: str | None, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class CompletionForm:
    """/v1/completions."""

    kind = part_kind = "text_completion"

    def __init__(self, spelling: Spelling, *, marked: bool) -> None:
        self._spelling = spelling
        self._marked = marked

    def opening(self, index: int) -> Json | None:
        """What a stream says of a choice before its text; nothing here."""
        return None

    def part(self, index: int, text: str, marks: Sequence[Mark], finish: Finish | None) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(marks) if self._marked else None,
            "finish_reason": finish,
        }

    whole = part

    def _logprobs(self, marks: Sequence[Mark]) -> Json:
        shown = self._spelling.shown
        return {
            "tokens": [shown(mark.token) for mark in marks],
            "token_logprobs": [mark.logprob for mark in marks],
            "top_logprobs": [
                None
                if mark.logprob is None
                else {shown(token): value for token, value in reversed(mark.top)}
                for mark in marks
            ],
            "text_offset": [mark.start for mark in marks],
        }


class ChatForm:
    """/v1/chat/completions."""

    kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def __init__(self, spelling: Spelling, *, marked: bool) -> None:
        self._spelling = spelling
        self._marked = marked

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, text: str, marks: Sequence[Mark], finish: Finish | None) -> Json:
        return {
            "index": index,
            "delta": {"content": text} if text or finish is None else {},
            "logprobs": self._logprobs(marks),
            "finish_reason": finish,
        }

    def whole(self, index: int, text: str, marks: Sequence[Mark], finish: Finish | None) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(marks),
            "finish_reason": finish,
        }

    def _logprobs(self, marks: Sequence[Mark]) -> Json | None:
        if not self._marked:
            return None
        content: list[Json] = []
        for mark in marks:
            likeliest = [self._token(token, value) for token, value in mark.top]
            content.append(self._token(mark.token, mark.logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float | None) -> Json:
        return {
            "token": self._spelling.shown(token),
            "logprob": value,
            "bytes": list(self._spelling.bytes_of(token)),
        }


Form = CompletionForm | ChatForm
