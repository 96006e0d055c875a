"""The two OpenAI endpoints and the classifier: requests become runs, pieces become answers."""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar
from uuid import uuid4

import msgspec
import numpy as np
from aiohttp import web

from services.proxy_inference.answers import ChatForm, CompletionForm, Form, Head, Json
from services.proxy_inference.batching import Sequence
from services.proxy_inference.ensemble.ensemble import Ensemble
from services.proxy_inference.pool import Held
from services.proxy_inference.remote.doubt import shown
from services.proxy_inference.remote.ensemble import RemoteEnsemble
from services.proxy_inference.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Refusal,
    decoded,
    unserved,
)
from services.proxy_inference.running import Answer, Choice, Piece
from services.proxy_inference.sampling import Sampler
from services.proxy_inference.service import Proxy, Way
from services.proxy_inference.telling import Asked, check, gathered, streamed
from services.proxy_inference.vocabulary import Detokenizer
from shared.dataset import Row, check_task, split_template
from shared.engine.examples import choice_tokens, example
from shared.engine.pieces import tokens_of
from shared.errors import EngineError
from shared.http import json_response
from shared.messages import Task

Given = ParamSpec("Given")
Result = TypeVar("Result")

_LONG_BYTES = 32 * 1024
_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; a chat answer is as long as the context lets it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What differs between the two APIs."""

    prefix: str
    form: Form
    prompts: list[list[int]]
    length: int | None
    stops: list[str]
    ends: frozenset[int]
    marks: int | None
    echo: bool = False


class Completing:
    """Handlers of /v1/completions, /v1/chat/completions and /v1/classify."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = decoded(body, CompletionRequest)
        unserved(asked)
        async with self._proxy.lent(asked.model) as held:
            vocabulary = held.generation.weights.vocabulary
            prompts = [
                await _off_loop(len(body), _tokens, prompt, vocabulary)
                for prompt in asked.prompts()
            ]
            form = CompletionForm(vocabulary, marked=asked.logprobs is not None)
            wanted = Wanted(
                "cmpl",
                form,
                prompts,
                _COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens,
                asked.stops,
                vocabulary.ends,
                asked.logprobs,
                bool(asked.echo),
            )
            way = self._proxy.way(held, asked.proxy_mode, asked.proxy_alpha)
            return await self._answer(request, self._understood(held, way, asked, wanted))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = decoded(body, ChatRequest)
        unserved(asked)
        messages = [message.plain() for message in asked.messages]
        async with self._proxy.lent(asked.model) as held:
            vocabulary = held.generation.weights.vocabulary
            try:
                template = vocabulary.chat
                prompt = await _off_loop(len(body), _conversation, messages, vocabulary)
            except EngineError as error:
                raise Refusal(400, str(error), param="messages") from error
            marks = (asked.top_logprobs or 0) if asked.logprobs else None
            length = asked.max_completion_tokens
            wanted = Wanted(
                "chatcmpl",
                ChatForm(vocabulary, marked=marks is not None),
                [prompt],
                asked.max_tokens if length is None else length,
                [*asked.stops, *template.end_of_turn],
                _ends(template.end_of_turn, vocabulary),
                marks,
            )
            way = self._proxy.way(held, asked.proxy_mode, asked.proxy_alpha)
            return await self._answer(request, self._understood(held, way, asked, wanted))

    async def classify(self, request: web.Request) -> web.Response:
        body = await request.read()
        asked = decoded(body, ClassifyRequest)
        if not asked.text.strip():
            raise Refusal(400, "text is empty", param="text")
        async with self._proxy.lent(asked.model) as held:
            spec = self._proxy.spec_of(held)
            if spec is None or not spec.task.labels:
                raise Refusal(
                    400,
                    f"{held.name} has no labels; name a job that was submitted with labels, or "
                    "use /v1/completions (base takes the labels of the job that serves)",
                    param="model",
                )
            way = self._proxy.way(held, asked.proxy_mode, asked.proxy_alpha)
            room = spec.task.max_tokens - len(way.prompt)
            task = msgspec.structs.replace(spec.task, loss="choices", max_tokens=room)
            try:
                check_task(task)
                prompt, choices = await _off_loop(
                    len(body), _question, asked.text, task, held.generation.weights.vocabulary
                )
            except EngineError as error:
                raise Refusal(400, str(error), param="model") from error
            prompt += way.prompt
            _check_length(way, prompt, "text")
            _check_sent(way, prompt, "text")
            self._proxy.admit(1)
            self._proxy.metrics.tokens.labels("prompt").inc(len(prompt))
            run = Choice(Sequence(prompt, alpha=way.alpha), choices)
            async with self._proxy.running(way.speaker, [run]) as pieces:
                _, piece = await anext(pieces)
            check(piece)
            found = _classified(list(task.labels), piece.scores)
            found |= {"model": held.name, "system_fingerprint": way.fingerprint}
            return json_response(found | self._told(way, [run]))

    async def _answer(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        self._proxy.admit(len(asked.runs))
        began = time.monotonic()
        try:
            async with self._proxy.running(asked.way.speaker, asked.runs) as pieces:
                timed = self._timed(asked, pieces, began)
                if asked.stream:
                    return await streamed(request, asked, timed)
                return await gathered(asked, timed)
        finally:
            self._count(asked, time.monotonic() - began)

    def _understood(
        self, held: Held, way: Way, request: CompletionRequest | ChatRequest, wanted: Wanted
    ) -> Asked:
        vocabulary = held.generation.weights.vocabulary
        sampling = request.sampling(vocabulary.size)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        runs: list[Answer] = []
        if wanted.echo and way.prompt:
            raise Refusal(
                400,
                f"{held.name} has a soft prompt between a prompt and its answer, which cannot be "
                "told as text: leave out echo",
                param="echo",
            )
        pushed = isinstance(way.speaker, RemoteEnsemble) and not way.speaker.pulls
        if pushed and wanted.marks is not None:
            raise Refusal(
                400,
                "the large model's server tells no log-probabilities: leave out logprobs, or ask "
                "with proxy_mode small",
                param="logprobs",
            )
        prompts = [[*prompt, *way.prompt] for prompt in wanted.prompts]
        for prompt in prompts:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            _check_length(way, prompt, param)
            _check_sent(way, prompt, param)
            left = way.limit - len(prompt)
            reads = 0 if wanted.echo and wanted.marks is not None else None
            for _ in range(request.n or 1):
                answer = Answer(
                    Sequence(prompt, read_from=reads, alpha=way.alpha),
                    vocabulary,
                    Sampler(sampling, seed, len(runs), repeats=request.seed is not None),
                    max_tokens=left if wanted.length is None else min(wanted.length, left),
                    stops=wanted.stops,
                    ends=wanted.ends,
                    marks=wanted.marks,
                    echo=wanted.echo,
                )
                runs.append(answer)
        head = Head(
            f"{wanted.prefix}-{uuid4().hex}",
            int(time.time()),
            held.name,
            way.fingerprint,
            self._told(way, []),
        )
        return Asked(
            way,
            runs,
            wanted.form,
            head,
            sum(len(prompt) for prompt in prompts),
            bool(request.stream),
            bool(request.stream_options and request.stream_options.include_usage),
        )

    def _told(self, way: Way, runs: list[Answer] | list[Choice]) -> Json:
        """What answers say of how they were made, where there is more than one way."""
        if self._proxy.pool.large is None:
            return {}
        told: Json = {"mode": way.mode, "alpha": way.alpha, "exact": True}
        if isinstance(way.speaker, RemoteEnsemble):
            doubts = [run.sequence.doubt for run in runs if run.sequence.doubt is not None]
            told |= shown(doubts, pulled=way.speaker.pulls)
        return {"proxy": told}

    async def _timed(
        self, asked: Asked, pieces: AsyncGenerator[tuple[int, Piece], None], began: float
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        first = True
        async for index, piece in pieces:
            if first:
                self._proxy.metrics.first_token_s.observe(time.monotonic() - began)
                first = False
            asked.head.also.update(self._told(asked.way, asked.runs))
            yield index, piece

    def _count(self, asked: Asked, seconds: float) -> None:
        metrics = self._proxy.metrics
        metrics.request_s.observe(seconds)
        metrics.tokens.labels("prompt").inc(asked.prompt_tokens)
        metrics.tokens.labels("cached").inc(sum(run.sequence.reused for run in asked.runs))
        metrics.tokens.labels("written").inc(sum(run.written for run in asked.runs))


async def _off_loop(
    size: int, call: Callable[Given, Result], *given: Given.args, **named: Given.kwargs
) -> Result:
    """What `call` returns; in a thread where a text is so long that it would hold up the others."""
    if size < _LONG_BYTES:
        return call(*given, **named)
    return await asyncio.to_thread(call, *given, **named)


def _conversation(messages: list[dict[str, str]], vocabulary: Detokenizer) -> list[int]:
    """The messages in the model's template; what spells a control token in them is text."""
    return tokens_of(vocabulary.chat.pieces(messages), vocabulary, start=True)


def _question(text: str, task: Task, vocabulary: Detokenizer) -> tuple[list[int], list[int]]:
    """The prompt that devices measure their rows by, and the token that stands for each label."""
    head, tail = split_template(task.template)
    row = Row(head, text, tail, next(iter(task.labels.values())), 0)
    prompt: list[int] = example(row, task, vocabulary).tokens.tolist()
    return prompt, choice_tokens(task, vocabulary)


def _tokens(prompt: str | list[int], vocabulary: Detokenizer) -> list[int]:
    """A completion's prompt; control tokens may be spelled in it, it is the caller's template."""
    if isinstance(prompt, str):
        found = vocabulary.tokenize(prompt, start=True)
        if not found and vocabulary.end >= 0:
            return [vocabulary.end]
    else:
        found = prompt
        wrong = [token for token in prompt if not 0 <= token < vocabulary.size]
        if wrong:
            raise Refusal(
                400,
                f"prompt: {wrong[0]} is no token of this model; it has 0 to {vocabulary.size - 1}",
                param="prompt",
            )
    if not found:
        raise Refusal(400, "prompt is empty", param="prompt")
    return found


def _ends(stops: Iterable[str], vocabulary: Detokenizer) -> frozenset[int]:
    """What ends a chat answer: the vocabulary's ends, and stop strings that are control tokens."""
    ends = set(vocabulary.ends)
    for stop in stops:
        if vocabulary.controls.fullmatch(stop):
            found = vocabulary.tokenize(stop, start=False)
            ends.update(found if len(found) == 1 else [])
    return frozenset(ends)


def _check_length(way: Way, prompt: list[int], param: str) -> None:
    if len(prompt) >= way.limit:
        raise Refusal(
            400,
            f"the prompt has {len(prompt)} tokens; prompt and answer together have room for "
            f"{way.limit}: shorten it",
            param=param,
            code="context_length_exceeded",
        )


def _check_sent(way: Way, prompt: list[int], param: str) -> None:
    """Raises Refusal for what the large model does not know, or would take for another prompt."""
    if isinstance(way.speaker, Ensemble | RemoteEnsemble):
        try:
            way.speaker.check(prompt)
        except EngineError as error:
            raise Refusal(400, str(error), param=param) from error


def _classified(labels: list[str], scores: list[float]) -> Json:
    values = np.array(scores)
    weights = np.exp(values - values.max())
    shares = weights / weights.sum()
    if not math.isfinite(float(shares.sum())):
        raise Refusal(500, "the model's answer is not finite", code="engine_failed")
    return {
        "label": labels[int(shares.argmax())],
        "probabilities": dict(zip(labels, shares.tolist(), strict=True)),
    }
