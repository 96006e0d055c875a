"""A soft prompt from the command line through a fleet to the proxy and into a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from services.proxy_inference.vocabulary import Detokenizer
from shared import nats_bus
from shared.dataset import Row, split_template
from shared.engine.examples import choice_tokens, example, with_prompt
from shared.engine.llama import LlamaEngine
from shared.engine.model import Adaptation, Example
from shared.engine.native import load
from shared.messages import (
    AdapterEvaluated,
    Block,
    EpochOpened,
    Evaluation,
    JobSpec,
    LogEvent,
    Pacing,
    RoundClosed,
    Task,
    Tuning,
)
from tests.integration.test_export import a_job, refused, seedwire, start_device
from tests.support import tiny_gguf
from tests.support.broker import BrokerProcess
from tests.support.fleet import a_fleet, a_task
from tests.support.jobs import adapter_after
from tests.support.publishing import Publisher, a_manifest
from tests.support.serving import a_proxy

TASK = Task(
    loss="choices",
    template="Of {text}\nit is ",
    labels={"one": "g", "two": "h", "three": "q", "four": "Z"},
    max_tokens=48,
)
TEXT = "a long story about the inner ear and what is within it"


def losses(events: list[LogEvent]) -> list[float]:
    """Of the evaluations, in their order."""
    return [event.loss / event.weight for event in events if isinstance(event, AdapterEvaluated)]


async def test_a_fleet_learns_a_soft_prompt(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=2) as fleet:
        spec = JobSpec(
            task=a_task(),
            tuning=Tuning(rounds=12, directions=24, batch_rows=40, eps=0.05, step=0.2),
            pacing=Pacing(enough_devices=2, enough_probes=48, deadline_s=20.0),
            evaluation=Evaluation(every_rounds=4),
        )
        block = Block("prompt", "token_embd.weight", [4, 32], rows=[5, 6, 7, 8], unit=1.0)
        job = fleet.job("soft", spec, [block])
        await fleet.submit(job)
        events = await fleet.events_until("soft")
    closes = [event for event in events if isinstance(event, RoundClosed)]
    assert adapter_after(job.manifest, events).digest() == closes[-1].digest
    measured = losses(events)
    assert measured[-1] < measured[0] - 0.01, measured


@pytest.mark.timeout(200)  # a dozen processes, one after the other
async def test_a_job_from_the_command_line_learns_and_is_exported_as_numbers(
    tmp_path: Path,
) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    more = ["--adapter", "prompt", "--prompt-text", "in the", "--prompt-tokens", "5"]
    more += ["--rounds", "12", "--enough-probes", "32", "--batch-rows", "40"]
    more += ["--step", "0.3", "--momentum", "0"]
    async with a_fleet(tmp_path, devices=0) as fleet:
        await start_device(fleet, model)
        events = await a_job(fleet, "soft", model, *more)
        measured = [event.loss for event in events if isinstance(event, RoundClosed)]
        assert measured[0] is not None
        assert measured[11] is not None
        assert measured[11] < measured[0] - 0.2, measured  # a random model learns rows by heart
        (opened,) = [event for event in events if isinstance(event, EpochOpened)]
        final = adapter_after(opened.manifest, events)
        (block,) = final.manifest.blocks
        assert block.shape == [5, tiny_gguf.Shape().width]
        assert block.rows == (block.rows[-2:] * 3)[-5:]  # the text's tokens, again and again

        to = ["--to", str(tmp_path / "out")]
        why = await refused(fleet, "soft", "--form", "gguf", *to)
        assert "gguf: it has no place for a soft prompt" in why
        assert "--form soft-prompt writes its numbers" in why
        last = ["--round", str(final.round)]
        code, output, errors = await seedwire(fleet, "export", "soft", *last, *to)
        assert code == 0, output + errors
        files = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert files == ["README.md", "soft-prompt.safetensors"]
        tensors = load_file(tmp_path / "out" / "soft-prompt.safetensors")
        assert tensors["start"].tolist() == block.rows
        theta = final.values().reshape(block.shape)
        assert isinstance(block.unit, float)
        assert tensors["added"].tolist() == (np.float32(block.unit) * theta).tolist()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "a soft prompt behind the text" in card
        assert 'load_file("soft-prompt.safetensors")' in card


async def test_the_proxy_answers_with_the_prompt_that_devices_tune(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    sure = np.random.default_rng(2).standard_normal((320, 64), np.float32)  # few near ties
    plus = {"output.weight": sure}
    model = tiny_gguf.write(tmp_path / "tiny.gguf", quantized=False, plus=plus)
    rows = [70, 71, 72, 80, 90]
    block = Block("prompt", "token_embd.weight", [5, 64], rows=rows, unit=0.5)
    manifest = a_manifest(model, "llama", [block])
    link = await nats_bus.connect([broker.url], name="publisher")
    shown = [[7, 8, 9, 70, 71, 80, 72, 12, 70], [100, 101, 102, 72, 80]]
    try:
        publisher = await Publisher.on(link)
        await publisher.open("soft", manifest, TASK)
        values = np.random.default_rng(5).standard_normal(manifest.d)
        adapter = await publisher.publish("soft", 1, values)
        arguments = ("--servers", broker.url, "--model", str(model))
        async with a_proxy(tmp_path / "proxy", *arguments) as proxy:
            await proxy.serves("soft@1")
            told = await proxy.complete(shown, max_tokens=6, logprobs=1)
            again = await proxy.complete(shown, max_tokens=6, logprobs=1)
            base = await proxy.complete(shown, max_tokens=6, logprobs=1, model="base")
            _, classified = await proxy.post("/v1/classify", {"text": TEXT})
            status, echo = await proxy.post("/v1/completions", {"prompt": "a", "echo": True})
            assert (status, echo["error"]["param"]) == (400, "echo")
            assert "has a soft prompt" in echo["error"]["message"]
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
            status, chat = await proxy.post("/v1/chat/completions", body | {"max_tokens": 4})
            assert status == 200, chat
    finally:
        await link.close()
    assert told["usage"]["prompt_tokens"] == sum(len(one) + len(rows) for one in shown)
    spoken = [choice["text"] for choice in told["choices"]]
    assert spoken == [choice["text"] for choice in again["choices"]]
    assert spoken != [choice["text"] for choice in base["choices"]]

    blocks, offsets = manifest.blocks, adapter.layout.offsets
    adaptation = Adaptation("llama", manifest.seed, manifest.epoch, blocks, offsets)
    engine = LlamaEngine().open(str(model), adaptation, 1, 64)
    engine.stand(adapter.values())
    tokens = spelled(model)
    written = [
        [tokens[token] for token in choice["logprobs"]["tokens"]] for choice in told["choices"]
    ]
    examples = [
        Example(np.array([*before, *after[:-1]], np.int32), np.array(after, np.int32))
        for before, after in zip(shown, written, strict=True)
    ]
    said = [-sum(choice["logprobs"]["token_logprobs"]) for choice in told["choices"]]
    measured = engine.measure(examples)
    assert said == pytest.approx(measured.loss, abs=2e-2)
    assert measured.right.all()  # it is greedy

    engine.choose_among(choice_tokens(TASK, engine))
    head, tail = split_template(TASK.template)
    asked = [
        example(Row(head, TEXT, tail, word, index), with_prompt(TASK, adaptation), engine)
        for index, word in enumerate(TASK.labels.values())
    ]
    assert len(asked[0].tokens) == 48 - len(rows)  # cut as devices cut it
    shares = np.exp(-engine.measure(asked).loss)
    assert list(classified["probabilities"].values()) == pytest.approx(shares, abs=5e-3)
    engine.close()


def spelled(model: Path) -> dict[str, int]:
    """Tokens by how the proxy tells them."""
    vocabulary = Detokenizer(load(str(model), vocabulary_only=True))
    return {vocabulary.shown(token): token for token in range(vocabulary.size)}
