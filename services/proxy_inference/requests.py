"""What clients may ask, as OpenAI's API spells it: forms and ranges here, meaning in `http`.

Fields that we do not know are ignored, as clients send many; those that would change the answer
and are not served are refused by name.
"""

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from services.proxy_inference.sampling import Sampling

Kind = TypeVar("Kind")
Mode = Literal["small", "large", "ensemble"]
"""The tuned small model, the large one as it is, or the large one steered by the small one."""

_PATH = re.compile(r" - at `\$\.?([^`]*)`")

Stop = str | Annotated[list[Annotated[str, Meta(max_length=1000)]], Meta(max_length=16)]
Answers = Annotated[int, Meta(ge=1, le=16)]
Length = Annotated[int, Meta(ge=0, le=2**31)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Alpha = Annotated[float, Meta(ge=0.0, le=10.0)]
Bias = Annotated[dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=4096)]


class Refusal(Exception):
    """A request that is not served: its HTTP status, and what OpenAI's error object says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_s = retry_s


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What both APIs have."""

    model: Annotated[str, Meta(max_length=300)] | None = None
    max_tokens: Length | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Answers | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    proxy_mode: Mode | None = None
    proxy_alpha: Alpha | None = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        found = [self.stop] if isinstance(self.stop, str) else self.stop
        return [stop for stop in found if stop]

    def sampling(self, vocabulary: int) -> Sampling:
        """Raises Refusal for a bias on what is no token."""
        bias: dict[int, float] = {}
        for name, value in (self.logit_bias or {}).items():
            if not name.isascii() or not name.isdecimal() or int(name) >= vocabulary:
                raise Refusal(
                    400,
                    f"logit_bias: {name[:40]!r} is no token of this model; it has 0 to "
                    f"{vocabulary - 1}",
                    param="logit_bias",
                )
            bias[int(name)] = value
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            bias=bias,
        )


class CompletionRequest(Common, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Answers | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or its tokens.

        Raises:
            Refusal: the list mixes forms, or is empty.
        """
        given = self.prompt
        if isinstance(given, str):
            return [given]
        numbers = [one for one in given if isinstance(one, int)]
        if numbers and len(numbers) == len(given):
            return [numbers]
        texts = [one for one in given if not isinstance(one, int)]
        if not given or len({type(one) for one in given}) > 1:
            raise Refusal(
                400,
                "prompt must be a text, a list of texts, a list of tokens or a list of such lists",
                param="prompt",
            )
        return list(texts)


class Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """Role and content as a template takes them.

        Raises:
            Refusal: it has something else than text.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            for part in self.content:
                if part.type != "text" or part.text is None:
                    raise Refusal(
                        400,
                        f"messages: a part of type {part.type!r}; only text is served",
                        param="messages",
                    )
            return {"role": role, "content": "".join(part.text or "" for part in self.content)}
        return {"role": role, "content": self.content or ""}


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str


class ChatRequest(Common, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None
    response_format: ResponseFormat | None = None


class ClassifyRequest(msgspec.Struct, frozen=True):
    """POST /v1/classify; of model `base`, by the labels of the job that serves by default."""

    text: Annotated[str, Meta(min_length=1)]
    model: Annotated[str, Meta(max_length=300)] | None = None
    proxy_mode: Mode | None = None
    proxy_alpha: Alpha | None = None


class RollbackRequest(msgspec.Struct, frozen=True):
    """POST /v1/seedwire/rollback."""

    round: Annotated[int, Meta(ge=0, lt=2**32)] | None = None


def decoded(body: bytes, kind: type[Kind]) -> Kind:
    """The request in a body.

    Raises:
        Refusal: it is not JSON, or not of the form; names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        param = found[1] or None if found else None
        why = _PATH.sub("", text).replace("`", "")
        if param is None and (missing := re.search(r"required field `([^`]*)`", text)):
            param = missing[1]
        where = f"{param}: " if param else ""
        raise Refusal(400, f"{where}{why}", param=param, code="invalid_value") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error


def unserved(request: ChatRequest | CompletionRequest) -> None:
    """Raises Refusal for what would change the answer and is not served."""
    refused: str | None = None
    if isinstance(request, ChatRequest):
        form = request.response_format
        if request.tools or request.functions:
            refused = "tools"
        elif form is not None and form.type != "text":
            refused = "response_format"
        elif request.top_logprobs is not None and not request.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    else:
        if request.suffix:
            refused = "suffix"
        elif request.best_of not in (None, request.n or 1):
            refused = "best_of"
        elif request.echo and request.stops:
            raise Refusal(400, "echo and stop together are not served", param="stop")
    if refused is not None:
        raise Refusal(
            400, f"{refused} is not served here; leave it out", param=refused, code="unsupported"
        )
