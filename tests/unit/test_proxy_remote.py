"""A large model behind servers of several kinds: what is found out, fetched, and refused."""

import asyncio
import re
import socket
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from services.proxy_inference.remote import reading
from services.proxy_inference.remote.client import opened
from services.proxy_inference.remote.link import Patience
from services.proxy_inference.remote.reading import answer
from services.proxy_inference.remote.spelling import Spelling
from services.proxy_inference.sampling import Sampling
from services.proxy_inference.vocabulary import Detokenizer
from shared.engine.native import load, start
from shared.errors import ConfigError, EngineError, TransientError
from tests.support import tiny_gguf
from tests.support.large_servers import LargeServer, serving

SHORT = Patience(answer_s=2.0, give_up_s=0.3)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    start()
    path = tiny_gguf.write(tmp_path_factory.mktemp("large") / "tiny.gguf")
    return Detokenizer(load(str(path), vocabulary_only=True))


def logs(row: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = row.astype(np.float64) - float(row.max())
    return shifted - np.log(np.exp(shifted).sum())


async def test_vllms_answers_are_read_by_token_id(vocabulary: Detokenizer) -> None:
    tokens = vocabulary.tokenize("a story", start=True)
    async with (
        serving(LargeServer(vocabulary, "vllm")) as server,
        opened(server.url, vocabulary) as large,
    ):
        can = large.capabilities
        assert (can.takes_ids, can.names_ids, can.top) == (True, True, 20)
        assert (can.pulls, can.before_temperature, can.before_bias) == (True, True, True)
        assert (can.reach, can.entries) == (100.0, 1000)
        assert any("/tokenize" in how for how in can.agreement)
        exact = logs(server.logits(tokens))
        found = await large.logits(tokens, np.zeros(vocabulary.size))
    assert server.asked[-1]["prompt"] == tokens
    order = np.argsort(-exact)
    assert found.k == 20
    np.testing.assert_allclose(found.logits[order[:20]], exact[order[:20]], atol=1e-6)
    assert found.missing == pytest.approx(1.0 - np.exp(exact[order[:20]]).sum(), abs=1e-6)
    assert np.exp(found.logits).sum() == pytest.approx(1.0)
    assert found.logits[order[20:]].max() <= exact[order[19]] + 1e-6


@pytest.mark.parametrize("shape", ["llama-server", "own"])
async def test_llama_servers_answers_tell_the_whole_distribution(
    vocabulary: Detokenizer, shape: str
) -> None:
    tokens = vocabulary.tokenize("a story", start=True)
    server = LargeServer(vocabulary, shape, most_logprobs=10_000)  # type: ignore[arg-type]
    async with serving(server), opened(server.url, vocabulary) as large:
        assert (large.capabilities.takes_ids, large.capabilities.names_ids) == (True, True)
        assert large.capabilities.told == vocabulary.size
        found = await large.logits(tokens, np.zeros(vocabulary.size))
    assert found.k == vocabulary.size
    assert found.missing < 1e-9
    np.testing.assert_allclose(found.logits, logs(server.logits(tokens)), atol=1e-6)


async def test_a_server_that_speaks_text_is_believed_only_where_a_text_names_one_token(
    vocabulary: Detokenizer,
) -> None:
    tokens = vocabulary.tokenize("a story", start=True)
    server = LargeServer(vocabulary, "text", most_logprobs=10_000, strict=True)
    base = np.random.default_rng(5).normal(0.0, 1.0, vocabulary.size)
    async with serving(server), opened(server.url, vocabulary) as large:
        assert (large.capabilities.takes_ids, large.capabilities.names_ids) == (False, False)
        found = await large.logits(tokens, base)
    exact = logs(server.logits(tokens))
    named = [one for one in range(vocabulary.size) if _plain(vocabulary, one)]
    np.testing.assert_allclose(found.logits[named], exact[named], atol=1e-6)
    others = np.setdiff1d(np.arange(vocabulary.size), named)
    assert found.missing == pytest.approx(np.exp(exact[others]).sum(), abs=1e-6)
    shape = found.logits[others] - base[others]  # half characters: the small base's shape
    np.testing.assert_allclose(shape, shape[0], atol=1e-6)
    assert server.asked[-1]["prompt"] == "a story"


def _plain(vocabulary: Detokenizer, token: int) -> bool:
    data = vocabulary.bytes_of(token)
    return bool(data) and data.isascii()


@pytest.mark.parametrize("biases", [True, False])
async def test_where_a_text_ends_the_server_is_made_to_speak_of_the_other_tokens(
    vocabulary: Detokenizer, biases: bool
) -> None:
    """Of a position whose likeliest token ends the text, servers tell nothing."""
    tokens = vocabulary.tokenize("a story", start=True)
    server = LargeServer(vocabulary, "text", most_logprobs=10_000, biases=biases)
    base = np.zeros(vocabulary.size)
    base[vocabulary.end] = 4.0
    async with serving(server), opened(server.url, vocabulary) as large:
        server.ends_after = tokens[-1]
        found = await large.logits(tokens, base)
        if biases:
            assert await large.token(tokens, {}, Sampling(temperature=0.0)) == vocabulary.end
    exact = logs(server.logits(tokens))
    if not biases:
        assert (found.k, found.missing) == (0, 1.0)
        return
    assert found.k > 0
    named = ~large.nameless
    np.testing.assert_allclose(found.logits[named], exact[named], atol=1e-6)
    assert int(found.logits.argmax()) == vocabulary.end


async def test_without_enough_log_probabilities_a_bias_is_sent_and_a_token_drawn(
    vocabulary: Detokenizer,
) -> None:
    tokens = vocabulary.tokenize("a story", start=True)
    server = LargeServer(vocabulary, "text", most_logprobs=0, usual_top_k=3)
    drawn: Counter[int | None] = Counter()
    async with serving(server), opened(server.url, vocabulary) as large:
        assert not large.capabilities.pulls
        likely = np.argsort(100.0 * large.nameless - server.logits(tokens))
        two, ten = int(likely[1]), int(likely[9])
        bias = {two: 1.5, ten: 4.0}
        for seed in range(400):
            drawn[await large.token(tokens, bias, Sampling(temperature=0.8), seed=seed)] += 1
        nameless = large.nameless
    row = server.logits(tokens)
    row[[two, ten]] += [1.5, 4.0]
    exact = np.exp(logs(row / 0.8))
    exact = np.append(np.where(nameless, 0.0, exact), exact[nameless].sum())
    share = np.array([drawn[token] / 400 for token in [*range(vocabulary.size), None]])
    noise = 0.5 * np.sqrt(2 * exact * (1 - exact) / np.pi / 400).sum()
    assert 0.5 * np.abs(share - exact).sum() < 2 * noise + 0.02


async def test_log_probabilities_from_after_the_sampler_are_asked_where_it_changes_nothing(
    vocabulary: Detokenizer,
) -> None:
    tokens = vocabulary.tokenize("a story", start=True)
    server = LargeServer(vocabulary, "llama-server", told="processed", most_logprobs=10_000)
    async with serving(server), opened(server.url, vocabulary) as large:
        can = large.capabilities
        assert (can.before_temperature, can.before_bias) == (False, False)
        found = await large.logits(tokens, np.zeros(vocabulary.size))
    np.testing.assert_allclose(found.logits, logs(server.logits(tokens)), atol=1e-6)


async def test_a_token_that_was_drawn_and_is_not_among_the_likeliest_bounds_nothing(
    vocabulary: Detokenizer,
) -> None:
    server = LargeServer(vocabulary, "vllm", told="processed")
    async with serving(server), opened(server.url, vocabulary) as large:
        assert not large.capabilities.before_temperature  # so it is asked to draw
        for number in range(30, 60):
            tokens = [1, 2, number]
            exact = logs(server.logits(tokens))
            order = np.argsort(-exact)[:20]
            found = await large.logits(tokens, np.zeros(vocabulary.size))
            np.testing.assert_allclose(found.logits[order], exact[order], atol=1e-6)


async def refusal(vocabulary: Detokenizer, server: LargeServer, **how: str) -> str:
    """Why a server is not taken as a large model."""
    async with serving(server):
        with pytest.raises(ConfigError) as refused:
            async with opened(server.url, vocabulary, patience=SHORT, **how):  # type: ignore[arg-type]
                pass
        assert server.url in str(refused.value)
        return str(refused.value)


async def test_what_cannot_be_a_large_model_is_refused_with_its_mend(
    vocabulary: Detokenizer,
) -> None:
    async def why(server: LargeServer, **how: str) -> str:
        return await refusal(vocabulary, server, **how)

    mute = LargeServer(vocabulary, "text", most_logprobs=0, biases=False)
    assert "--logits_all true" in await why(mute)
    drafted = LargeServer(vocabulary, "llama-server", told="drafted")
    assert "-md" in await why(drafted)
    assert "raw_logprobs" in await why(LargeServer(vocabulary, "vllm", told="logits"))
    assert "tokenizer" in await why(LargeServer(vocabulary, "vllm", apart=1))
    assert "tokenizer" in await why(LargeServer(vocabulary, "text", apart=1))
    assert "--large-key" in await why(LargeServer(vocabulary, key="sesame"), key="wrong")
    two = LargeServer(vocabulary, models=("one", "two"))
    assert "--large-name" in await why(two)
    assert "no such model" in await why(two, name="three")


async def test_a_large_model_of_another_vocabulary_is_refused_by_the_names_of_its_tokens(
    vocabulary: Detokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = LargeServer(vocabulary, "vllm")
    shifted = Shifted(vocabulary)
    monkeypatch.setattr(server, "tokenize", server.models_)  # it counts alike and tells no ids
    async with serving(server):
        server.vocabulary = shifted  # type: ignore[assignment]
        with pytest.raises(ConfigError, match="tokenizer is not this model's"):
            async with opened(server.url, vocabulary, patience=SHORT):
                pass


class Shifted:
    """A vocabulary with the same words under other numbers."""

    def __init__(self, of: Detokenizer) -> None:
        self._of = of
        self.size, self.end = of.size, of.end

    def tokenize(self, text: str, *, start: bool) -> list[int]:
        return self._of.tokenize(text, start=start)

    def bytes_of(self, token: int) -> bytes:
        return self._of.bytes_of(1 + token % 250)


async def test_a_key_goes_with_every_request_and_into_no_log(
    vocabulary: Detokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    server = LargeServer(vocabulary, key="sesame")
    async with serving(server), opened(server.url, vocabulary, key="sesame") as large:
        await large.logits([1, 2, 3], np.zeros(vocabulary.size))
    captured = capsys.readouterr()
    assert "sesame" not in captured.out + captured.err
    with pytest.raises(ConfigError) as refused:
        async with opened("http://me:sesame@127.0.0.1:9/v1", vocabulary):
            pass
    assert "sesame" not in str(refused.value)


async def test_a_busy_server_is_asked_again_and_no_more_than_so_many_at_once(
    vocabulary: Detokenizer,
) -> None:
    server = LargeServer(vocabulary)
    async with serving(server), opened(server.url, vocabulary, at_once=3) as large:
        server.busy, server.most_at_once = 2, 0
        row = np.zeros(vocabulary.size)
        async with asyncio.TaskGroup() as tasks:
            found = [tasks.create_task(large.logits([1, 2, n], row)) for n in range(12)]
        assert all(one.result().k == 20 for one in found)
        assert 1 < server.most_at_once <= 3
        assert large.retries == 2


async def test_a_server_that_is_gone_is_given_up_with_its_name_and_found_again(
    vocabulary: Detokenizer,
) -> None:
    server = LargeServer(vocabulary)
    row = np.zeros(vocabulary.size)
    async with serving(server), opened(server.url, vocabulary, patience=SHORT) as large:
        server.busy = 10_000
        with pytest.raises(TransientError, match=r"large model at http://127.* HTTP 503: Loading"):
            await large.logits([1, 2], row)
        server.busy = 0
        assert (await large.logits([1, 2], row)).k == 20
    nobody = socket.create_server(("127.0.0.1", 0))
    port = nobody.getsockname()[1]
    nobody.close()
    with pytest.raises(ConfigError, match="start it first"):
        async with opened(f"http://127.0.0.1:{port}", vocabulary, patience=SHORT):
            pass


async def test_another_model_behind_the_same_address_is_noticed(vocabulary: Detokenizer) -> None:
    server = LargeServer(vocabulary, "text")
    async with serving(server), opened(server.url, vocabulary) as large:
        server.apart = 1
        with pytest.raises(EngineError, match="another model is served"):
            await large.logits(
                vocabulary.tokenize("a story", start=True), np.zeros(vocabulary.size)
            )


async def test_in_the_middle_of_a_character_a_server_that_takes_text_is_not_asked(
    vocabulary: Detokenizer,
) -> None:
    tokens = vocabulary.tokenize("z\u00e9", start=True)
    assert len(vocabulary.bytes_of(tokens[-1])) == 1  # its last byte
    server = LargeServer(vocabulary, "text", most_logprobs=10_000)
    base = np.random.default_rng(5).normal(0.0, 1.0, vocabulary.size)
    async with serving(server), opened(server.url, vocabulary) as large:
        before = len(server.asked)
        found = await large.logits(tokens[:-1], base)
        assert (found.k, found.missing) == (0, 1.0)
        np.testing.assert_allclose(found.logits, logs(base), atol=1e-9)
        assert await large.token(tokens[:-1], {}, Sampling()) is None
        assert len(server.asked) == before


async def test_tokens_that_their_text_does_not_give_are_said_to_have_drifted(
    vocabulary: Detokenizer,
) -> None:
    canonical = vocabulary.tokenize(" the", start=True)
    letters = [canonical[0], *(vocabulary.tokenize(one, start=False)[0] for one in " the")]
    assert letters != canonical
    server = LargeServer(vocabulary, "text", most_logprobs=10_000)
    base = np.zeros(vocabulary.size)
    async with serving(server), opened(server.url, vocabulary) as large:
        assert not (await large.logits(canonical, base)).drifted
        assert (await large.logits(letters, base)).drifted


async def test_what_was_written_and_has_no_text_leaves_the_word_to_the_small_models(
    vocabulary: Detokenizer,
) -> None:
    unused = vocabulary.size - 1
    written = [*vocabulary.tokenize("a story", start=True), unused]
    base = np.random.default_rng(5).normal(0.0, 1.0, vocabulary.size)
    async with (
        serving(LargeServer(vocabulary, "text")) as server,
        opened(server.url, vocabulary) as large,
    ):
        assert not large.hears(written)
        assert (await large.logits(written, base)).missing == 1.0
        with pytest.raises(EngineError, match="control token"):
            large.check(written)


async def test_a_long_text_is_spelled_aside_and_asked_for_all_the_same(
    vocabulary: Detokenizer,
) -> None:
    tokens = vocabulary.tokenize("a story of the inner ear " * 100, start=True)
    assert len(tokens) > 1000
    async with (
        serving(LargeServer(vocabulary, "text")) as server,
        opened(server.url, vocabulary) as large,
    ):
        found = await large.logits(tokens, np.zeros(vocabulary.size))
    assert found.k > 0
    assert not found.drifted
    assert server.asked[-1]["prompt"] == "a story of the inner ear " * 100


class Few:
    """A vocabulary of a few tokens by their bytes; the first is the end."""

    size, end, ends = 7, 0, frozenset({0})
    controls = re.compile("(?!)")

    def bytes_of(self, token: int) -> bytes:
        return (b"", b" ", b" \xe2", b"a", b"\xe2\x80", "\ufffd".encode(), b"b\xe2")[token]

    def tokenize(self, text: str, *, start: bool, special: bool = True) -> list[int]:
        return []

    def spelling(self, token: int) -> str:
        return "<end>"


def test_a_text_that_several_tokens_may_be_told_as_names_none() -> None:
    spelling = Spelling(Few())
    assert spelling.token("a") == 3
    assert spelling.token(" ") is None  # or what is left of " \xe2" without its half character
    assert spelling.token("\ufffd") is None
    assert spelling.token("b") is None  # some servers would say "b\ufffd"
    assert spelling.nameless.tolist() == [True, True, True, False, True, True, True]


def test_a_prompt_that_spells_a_control_token_is_not_sent_as_text(vocabulary: Detokenizer) -> None:
    spelling = Spelling(vocabulary)
    said = vocabulary.tokenize("say <|end|> now", start=True, special=False)
    with pytest.raises(EngineError, match="control token"):
        spelling.prompt(said)
    meant = vocabulary.tokenize("say <|end|> now", start=True, special=True)
    found = spelling.prompt(meant)
    assert found is not None
    assert (found.text, found.count, found.drifted) == ("say <|end|> now", len(meant), False)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"logprobs": {"tokens": ["a"]}}]}',
        b'{"choices": ["a"]}',
        b'{"choices": [{"text": "a"}], "usage": ["b"]}',
        b'{"content": "", "completion_probabilities": [{"token": "", "logprob": 1%b}]}'
        % (b"0" * 400),
        b"[" * 100_000,
    ],
)
def test_what_is_no_completion_is_told_with_the_servers_name(body: bytes) -> None:
    with pytest.raises(EngineError, match="http://large"):
        answer(body, "http://large")
    assert reading.refusal(body), "and as the body of an error it is told, not failed by"


def test_an_error_whose_words_are_no_utf8_is_told_as_far_as_it_can_be() -> None:
    assert reading.refusal(b'"\xff"') == '"\ufffd"'
