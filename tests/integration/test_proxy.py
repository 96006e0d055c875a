"""The proxy as a real process on the real llama.cpp, spoken to by OpenAI's own client."""

import asyncio
import io
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.support import tiny_gguf
from tests.support.near_ties import ALONE, alone, tokens
from tests.support.serving import Proxy, a_proxy

DEMO = Path(__file__).resolve().parents[2] / "deploy/demo/model/seedwire-demo-q8_0.gguf"


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncGenerator[Proxy, None]:
    async with a_proxy(tmp_path / "proxy", "--model", str(DEMO)) as proxy:
        await proxy.serves("base")
        yield proxy


@pytest.fixture
async def exact(tmp_path: Path) -> AsyncGenerator[Proxy, None]:
    """A model in F32, whose logits hardly depend on what shares the batch; two answers at a time,
    two wait."""
    model = tiny_gguf.write(tmp_path / "exact.gguf", quantized=False)
    options = ("--sequences", "2", "--queue", "2", "--context-tokens", "1024")
    async with a_proxy(tmp_path / "proxy", "--model", str(model), *options) as proxy:
        await proxy.serves("base")
        yield proxy


def a_client(proxy: Proxy, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0)


async def events(proxy: Proxy, path: str, body: dict[str, object]) -> list[dict[str, Any]]:
    """What a stream says, before its [DONE]."""
    async with proxy.http.post(proxy.url + path, json=body | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        text = (await response.read()).decode()  # fails on half a character
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_openais_own_client_chats_completes_streams_and_lists(demo: Proxy) -> None:
    async with a_client(demo) as client:
        models = [model.id async for model in client.models.list()]
        assert models == ["base"]
        assert (await client.models.retrieve("base")).owned_by == "seedwire"
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        chat = await client.chat.completions.create(
            model="base",
            messages=said,  # type: ignore[arg-type]
            max_completion_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
            seed=1,
        )
        choice = chat.choices[0]
        assert choice.message.role == "assistant"
        assert chat.system_fingerprint
        assert chat.system_fingerprint.startswith("base-")
        assert chat.usage
        assert chat.usage.completion_tokens == 8 or choice.finish_reason == "stop"
        assert choice.logprobs
        assert choice.logprobs.content
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob == token.logprob  # greedy
            assert bytes(token.bytes or []).decode(errors="replace") == token.token
        spoken = "".join(token.token for token in choice.logprobs.content)
        assert spoken == choice.message.content

        streamed = await client.chat.completions.create(
            model="base",
            messages=said,  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in streamed]
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == choice.message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
        assert chunks[-1].usage
        assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens

        completion = await client.completions.create(
            model="base", prompt=["One", "Two"], n=2, max_tokens=4, temperature=0, logprobs=2
        )
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
        assert completion.choices[0].text == completion.choices[1].text
        told = completion.choices[0].logprobs
        assert told
        assert told.tokens
        assert told.text_offset
        assert "".join(told.tokens) == completion.choices[0].text
        for token, at in zip(told.tokens, told.text_offset, strict=True):
            assert completion.choices[0].text[at:].startswith(token)


async def test_openais_own_client_gets_its_own_errors(demo: Proxy) -> None:
    async with a_client(demo) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-4", prompt="x")
        assert missing.value.code == "model_not_found"
        assert missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.completions.create(model="base", prompt="x", temperature=-1)
        assert wrong.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model="base", prompt="word " * 40_000)
        assert long.value.code == "context_length_exceeded"
        assert "room for" in long.value.message


async def test_a_stop_string_ends_the_text_before_it_streamed_or_not(demo: Proxy) -> None:
    whole = (await demo.complete("The function returns", max_tokens=40))["choices"][0]["text"]
    stop = whole[12:19]  # no border of tokens: it is cut by letters
    assert len(stop.strip()) > 2
    body: dict[str, object] = {"prompt": "The function returns", "temperature": 0}
    body |= {"max_tokens": 40, "stop": ["never said", stop]}
    answer = (await demo.post("/v1/completions", body))[1]["choices"][0]
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    said = await events(demo, "/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in said) == answer["text"]
    assert said[-1]["choices"][0]["finish_reason"] == "stop"


async def test_characters_of_several_tokens_come_whole_in_a_stream(exact: Proxy) -> None:
    # A model of random bytes: much of what it says is no UTF-8 at all, and must still be text.
    body: dict[str, object] = {"prompt": "é✓", "max_tokens": 120, "temperature": 1.5, "seed": 4}
    said = await events(exact, "/v1/completions", body)
    answer = (await exact.post("/v1/completions", body))[1]
    assert "".join(event["choices"][0]["text"] for event in said) == answer["choices"][0]["text"]
    bias = {str(token): 100.0 for token in tokens_of("✓")}
    more: dict[str, object] = {"logit_bias": bias, "temperature": 0.5}
    said = await events(exact, "/v1/completions", body | more)
    assert any("✓" in event["choices"][0]["text"] for event in said)


def tokens_of(text: str) -> list[int]:
    """The bytes of the tiny models' vocabulary: its tokens by their texts' bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    return [1 + order.index(byte) for byte in text.encode()]


async def test_a_seeded_answer_is_the_same_alone_and_among_others(exact: Proxy) -> None:
    # Short, among few candidates: how a batch is laid out moves the last bits of the logits, and a
    # draw that falls upon a border follows them.
    body = {"prompt": "the inner", "max_tokens": 12, "temperature": 0.8, "top_k": 4, "seed": 7}

    async def text(**more: object) -> list[str]:
        status, answer = await exact.post("/v1/completions", body | more)
        assert status == 200, answer
        return [choice["text"] for choice in answer["choices"]]

    alone = await text()
    assert await text() == alone
    both = await asyncio.gather(text(), text(seed=8, prompt="another text altogether"))
    assert both[0] == alone
    assert both[1] != alone
    several = await text(n=3)
    assert several[0] == alone[0]
    assert len(set(several)) == 3
    tokens = [0, *tokens_of("x")]
    assert (await exact.post("/v1/completions", body | {"prompt": tokens}))[0] == 200


async def test_a_conversation_that_goes_on_is_not_computed_anew(demo: Proxy) -> None:
    first = await demo.complete("A list of words: apple, pear, plum, fig, grape", max_tokens=8)
    prompt = "A list of words: apple, pear, plum, fig, grape" + first["choices"][0]["text"]
    again = await demo.complete(prompt + " and", max_tokens=4)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]


async def test_a_client_that_goes_away_frees_its_place_at_once(exact: Proxy) -> None:
    body = {"prompt": "a", "max_tokens": 900, "stream": True, "logit_bias": {"0": -100}}
    response = await exact.http.post(exact.url + "/v1/completions", json=body)
    await response.content.readany()
    assert await exact.metric("seedwire_proxy_sequences_running") == 1
    before = await exact.metric("seedwire_proxy_pass_tokens_total")
    response.close()
    await exact.until("seedwire_proxy_sequences_running", 0, 0)
    done = await exact.metric("seedwire_proxy_pass_tokens_total")
    assert done - before < 850
    await asyncio.sleep(0.2)
    assert await exact.metric("seedwire_proxy_pass_tokens_total") == done
    assert await exact.metric("seedwire_proxy_requests_in_flight") == 1  # this very question


async def test_a_full_queue_says_so_and_when_to_come_again(exact: Proxy) -> None:
    body = {"prompt": "a", "max_tokens": 500, "logit_bias": {"0": -100}}

    async def ask() -> tuple[int, str | None]:
        async with exact.http.post(exact.url + "/v1/completions", json=body) as response:
            answer = await response.json()
            if response.status == 429:
                assert answer["error"]["type"] == "rate_limit_error"
            return response.status, response.headers.get("Retry-After")

    asked = [asyncio.create_task(ask()) for _ in range(7)]
    await exact.until("seedwire_proxy_requests_waiting", 2)
    statuses = await asyncio.gather(*asked)
    assert sorted(status for status, _ in statuses) == [200] * 4 + [429] * 3
    assert {after for status, after in statuses if status == 429} == {"1"}
    status, answer = await exact.post("/v1/completions", body | {"n": 5})
    assert (status, answer["error"]["message"]) == (
        400,
        "5 answers in one request; at most 4 are served",
    )


async def test_answers_that_do_not_fit_the_cache_together_are_written_all_the_same(
    exact: Proxy,
) -> None:
    # Two answers of 600 tokens in a cache of 1024: the younger gives way and comes again.
    options: dict[str, object] = {"max_tokens": 600, "logit_bias": {"0": -100}}
    measure = alone((await exact.complete("a", logprobs=ALONE, **options))["choices"][0])
    answers = await asyncio.gather(
        exact.complete("a", logprobs=0, **options), exact.complete("a", logprobs=0, **options)
    )
    for answer in answers:
        assert answer["usage"]["completion_tokens"] == 600
        assert measure.explains(tokens(answer["choices"][0]))
    assert await exact.metric("seedwire_proxy_preemptions_total") >= 1


BAD: list[tuple[str, bytes, int, str]] = [
    ("/v1/completions", b"", 400, "not JSON"),
    ("/v1/completions", b"[]", 400, "Expected object, got array"),
    ("/v1/completions", b'{"prompt": "a", "x": ' + b"[" * 100_000, 400, "not JSON"),
    ("/v1/completions", b"{}", 400, "prompt"),
    ("/v1/completions", b'{"prompt": []}', 400, "prompt must be"),
    ("/v1/completions", b'{"prompt": ["a", [1]]}', 400, "prompt must be"),
    ("/v1/completions", b'{"prompt": [1, -1]}', 400, "-1 is no token"),
    ("/v1/completions", b'{"prompt": [4000000000]}', 400, "is no token"),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "'x' is no token"),
    ("/v1/completions", b'{"prompt": "a", "n": 1000}', 400, "n: Expected int"),
    ("/v1/completions", b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    ("/v1/completions", b'{"prompt": "a", "best_of": 3}', 400, "best_of is not served"),
    ("/v1/completions", b'{"prompt": "\xff"}', 400, "JSON"),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400, ""),
    ("/v1/chat/completions", b'{"messages": []}', 400, "messages"),
    ("/v1/chat/completions", b'{"messages": [{"role": "king"}]}', 400, "king"),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}',
        400,
        "tools is not served",
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        400,
        "only text is served",
    ),
    ("/v1/classify", b'{"text": "a"}', 400, "base has no labels"),
    ("/v1/nothing", b"{}", 404, "Not Found"),
    ("/v1/models", b"{}", 405, "Method Not Allowed"),
    ("/v1/seedwire/rollback", b'{"round": -1}', 400, "round"),
    ("/v1/seedwire/rollback", b"", 404, "base model serves"),
    ("/v1/completions", b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413, "larger than"),
]


async def test_bad_requests_are_told_what_is_wrong_and_harm_nobody(exact: Proxy) -> None:
    for path, body, status, why in BAD:
        async with exact.http.post(exact.url + path, data=io.BytesIO(body)) as response:
            answer = await response.json()
            assert response.status == status, (path, body[:60], answer)
            assert answer["error"].keys() == {"message", "type", "param", "code"}
            assert why in answer["error"]["message"], (body[:60], answer)
    assert (await exact.complete("a"))["usage"]["completion_tokens"] == 12


async def test_a_key_guards_all_but_the_health_and_other_sites_pages_are_refused(
    tmp_path: Path,
) -> None:
    model = tiny_gguf.write(tmp_path / "m.gguf")
    async with a_proxy(tmp_path / "p", "--model", str(model), "--api-key", "sesame") as proxy:
        await proxy.serves("base")
        for path in ("/v1/models", "/metrics", "/v1/seedwire/versions", "/nothing"):
            status, answer = await proxy.get(path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        async with a_client(proxy, "wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with a_client(proxy, "sesame") as client:
            assert [model.id async for model in client.models.list()] == ["base"]
        headers = {"Authorization": "Bearer sesame", "Origin": "http://elsewhere.example"}
        async with proxy.http.get(proxy.url + "/v1/models", headers=headers) as response:
            assert response.status == 403
    assert "sesame" not in (tmp_path / "p" / "proxy.log").read_text()


async def test_a_stopped_proxy_finishes_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "m.gguf")
    async with a_proxy(tmp_path / "p", "--model", str(model)) as proxy:
        await proxy.serves("base")
        body = {"prompt": "a", "max_tokens": 700, "logit_bias": {"0": -100}}
        running = asyncio.create_task(proxy.post("/v1/completions", body))
        await proxy.until("seedwire_proxy_sequences_running", 1)
        stopping = asyncio.create_task(proxy.child.stop())
        status, answer = await proxy.get("/health")
        while status == 200:
            status, answer = await proxy.get("/health")
        assert (status, answer["reason"]) == (503, "the server is stopping")
        async with proxy.http.post(proxy.url + "/v1/completions", json=body) as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
        status, answer = await running
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 700
        assert await stopping == 0


async def test_without_a_model_the_health_says_what_is_missing(tmp_path: Path) -> None:
    async with a_proxy(tmp_path / "p") as proxy:
        status, answer = await proxy.get("/health")
        assert status == 503
        assert "no job has published a version, and no --model" in answer["reason"]
        async with proxy.http.post(proxy.url + "/v1/completions", json={"prompt": "a"}) as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
        assert (await proxy.get("/healthz"))[0] == 200
        assert (await proxy.get("/v1/models"))[1]["data"] == []


async def test_numbers_that_are_not_finite_end_their_answer_and_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    broken = np.zeros((320, 64), np.float32)
    broken[77] = np.nan
    plus = {"token_embd.weight": broken}
    model = tiny_gguf.write(tmp_path / "m.gguf", quantized=False, plus=plus)
    async with a_proxy(tmp_path / "p", "--model", str(model)) as proxy:
        await proxy.serves("base")
        options: dict[str, object] = {"logit_bias": {"77": -100}, "max_tokens": 8}
        before = (await proxy.complete([5, 6, 7], **options))["choices"][0]["text"]
        status, answer = await proxy.post("/v1/completions", {"prompt": [5, 77, 6]})
        assert (status, answer["error"]["message"]) == (500, "the model's answer is not finite")
        assert (await proxy.complete([5, 6, 7], **options))["choices"][0]["text"] == before
        assert await proxy.metric("seedwire_proxy_answers_not_finite_total") == 1
