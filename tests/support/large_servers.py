"""Servers of a large model that answer as vLLM's and llama-server's do, where those cannot run.

The model is arithmetic over a real vocabulary: logits that hang on the last tokens, the same for
whoever asks. The shapes, limits and refusals are those of the servers' own sources.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from services.proxy_inference.vocabulary import Detokenizer

Row = NDArray[np.float64]


@dataclass
class LargeServer:
    """What it is like; `url` is its address while it runs."""

    vocabulary: Detokenizer
    shape: Literal["vllm", "llama-server", "own", "text"] = "vllm"
    """`own`: an old llama-server, with /completion alone. `text`: OpenAI's, without ids."""
    most_logprobs: int = 20
    """0: it tells none."""
    told: Literal["raw", "processed", "logits", "drafted"] = "raw"
    biases: bool = True
    usual_top_k: int = 0
    """What it filters by where a request does not say."""
    key: str = ""
    models: tuple[str, ...] = ("large",)
    strict: bool = False
    """Fields that are not OpenAI's are refused."""
    apart: int = 0
    """Its tokenizer counts so many tokens more."""
    ends_after: int = -1
    """After this token the likeliest by far is the one that ends a text."""
    busy: int = 0
    """So many requests are answered with 503 first."""
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    at_once: int = 0
    most_at_once: int = 0

    def logits(self, tokens: list[int]) -> Row:
        """(n_vocab,) after `tokens`; but for `ends_after` no text ends."""
        random = np.random.default_rng(tokens[-3:])
        row = random.normal(0.0, 2.5, self.vocabulary.size)
        row[[token for token in range(len(row)) if not self.vocabulary.bytes_of(token)]] = -30.0
        if tokens[-1] == self.ends_after:
            row[self.vocabulary.end] = 12.0
        return row

    async def models_(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body["content" if self.shape in ("llama-server", "own") else "prompt"]
        tokens = self.vocabulary.tokenize(text, start=True) + [0] * self.apart
        return web.json_response({"tokens": tokens, "count": len(tokens)})

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        own = self.shape == "own"
        prompt, length = body["prompt"], body["n_predict" if own else "max_tokens"]
        wanted = body.get("n_probs" if own else "logprobs")
        if self.strict and (unknown := body.keys() & {"top_k", "return_tokens_as_token_ids"}):
            return _refused(400, f"Unrecognized request arguments supplied: {sorted(unknown)}")
        if not isinstance(prompt, str) and self.shape == "text":
            return _refused(422, "Input should be a valid string")
        if self.shape == "vllm" and body.get("top_k") == 0:
            return _refused(400, "top_k must be -1 (disable), or at least 1, got 0.")
        if wanted and wanted > self.most_logprobs and self.shape != "llama-server":
            return _refused(
                400,
                f"Requested sample logprobs of {wanted}, which is greater than max allowed: "
                f"{self.most_logprobs}",
            )
        tokens: list[int] = [] if isinstance(prompt, str) else prompt
        if isinstance(prompt, str):
            tokens = self.vocabulary.tokenize(prompt, start=True) + [0] * self.apart
        written: list[tuple[int, Row, bool]] = []
        random = np.random.default_rng(body.get("seed"))
        for place in range(length):
            row = self.logits([*tokens, *(one for one, _, _ in written)])
            chosen, processed = self._chosen(row, body, random)
            if chosen == self.vocabulary.end:
                break
            told = processed if self.told == "processed" else row
            written.append((chosen, told, self.told == "drafted" and place > 0))
        return web.json_response(self._told(body, tokens, written, wanted))

    def _chosen(self, row: Row, body: Any, random: np.random.Generator) -> tuple[int, Row]:
        """The token, and the logits it was drawn from."""
        given = body.get("logit_bias") or {}
        pairs = given.items() if isinstance(given, dict) else given
        processed = row.copy()
        for token, value in pairs if self.biases else ():
            processed[int(token)] += value
        if body["temperature"] == 0:
            return int(processed.argmax()), processed
        processed /= body["temperature"]
        if (top_k := body.get("top_k", self.usual_top_k)) > 0:
            processed[np.argsort(-processed)[top_k:]] = -np.inf
        return int(random.choice(len(row), p=np.exp(_logs(processed)))), processed

    def _told(
        self, body: Any, tokens: list[int], written: list[tuple[int, Row, bool]], wanted: int | None
    ) -> dict[str, Any]:
        text = b"".join(self.vocabulary.bytes_of(one) for one, _, _ in written)
        shown = text.decode(errors="replace")
        telling = bool(wanted) and self.most_logprobs > 0
        if self.shape == "own":
            return {
                "content": shown,
                "tokens": [one for one, _, _ in written] if body.get("return_tokens") else [],
                "stop_type": "limit",
                "tokens_evaluated": len(tokens),
                "completion_probabilities": self._listed(written, wanted or 0) if telling else [],
            }
        finish = "length" if len(written) == body["max_tokens"] else "stop"
        logprobs: dict[str, Any] | None = None
        if telling and self.shape == "llama-server":
            logprobs = {"content": self._listed(written, wanted or 0)}
        elif telling:
            logprobs = self._by_name(written, wanted or 0, ids="return_tokens_as_token_ids" in body)
        return {
            "object": "text_completion",
            "model": self.models[0],
            "choices": [{"index": 0, "text": shown, "logprobs": logprobs, "finish_reason": finish}],
            "usage": {"prompt_tokens": len(tokens), "completion_tokens": len(written)},
        }

    def _values(self, row: Row) -> Row:
        return row if self.told == "logits" else _logs(row)

    def _listed(self, written: list[tuple[int, Row, bool]], wanted: int) -> list[Any]:
        """llama-server's: a list of objects with ids, texts and bytes."""

        def one(token: int, value: float) -> dict[str, Any]:
            data = self.vocabulary.bytes_of(token)
            text = data.decode(errors="ignore")
            return {"id": token, "token": text, "bytes": list(data), "logprob": value}

        found: list[Any] = []
        for chosen, row, drafted in written:
            values = self._values(row)
            top = np.argsort(-values)[:wanted]
            value = 0.0 if drafted else float(values[chosen])
            likeliest = [] if drafted else [one(int(t), float(values[t])) for t in top]
            found.append(one(chosen, value) | {"top_logprobs": likeliest})
        return found

    def _by_name(
        self, written: list[tuple[int, Row, bool]], wanted: int, *, ids: bool
    ) -> dict[str, Any]:
        """OpenAI's: an object of names; vLLM puts the chosen one first, whatever its rank."""

        def name(token: int) -> str:
            if ids and self.shape == "vllm":
                return f"token_id:{token}"
            return self.vocabulary.bytes_of(token).decode(errors="replace")

        tops: list[dict[str, float]] = []
        for chosen, row, _ in written:
            values = self._values(row)
            order = [chosen, *(int(t) for t in np.argsort(-values)[:wanted])]
            tops.append({name(token): max(float(values[token]), -9999.0) for token in order})
        return {
            "tokens": [name(chosen) for chosen, _, _ in written],
            "token_logprobs": [float(self._values(row)[one]) for one, row, _ in written],
            "top_logprobs": tops,
        }

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _refused(401, "Invalid API Key")
        if self.busy:
            self.busy -= 1
            return web.json_response(
                {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
                status=503,
                headers={"Retry-After": "0"},
            )
        if request.method == "POST":
            self.asked.append(await request.json())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0.001)
            return await handler(request)
        finally:
            self.at_once -= 1

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guarded])
        application.add_routes([web.get("/v1/models", self.models_)])
        if self.shape != "text":
            application.add_routes([web.post("/tokenize", self.tokenize)])
        path = "/completion" if self.shape == "own" else "/v1/completions"
        application.add_routes([web.post(path, self.complete)])
        return application


@asynccontextmanager
async def serving(server: LargeServer) -> AsyncGenerator[LargeServer, None]:
    runner = web.AppRunner(server.application())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port: int = runner.addresses[0][1]
        server.url = f"http://127.0.0.1:{port}/v1"
        yield server
    finally:
        await runner.cleanup()


def _logs(row: Row) -> Row:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def _refused(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return web.json_response({"error": error}, status=status)
