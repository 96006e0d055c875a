"""The console's commands against a running proxy, as a user or a script runs them."""

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.demo.processes import ROOT
from shared import nats_bus
from shared.messages import Block, Task
from tests.support import tiny_gguf
from tests.support.broker import BrokerProcess
from tests.support.publishing import Publisher, a_manifest
from tests.support.serving import Proxy, a_proxy

LABELS = {"fruit": "g", "metal": "q"}


async def seedwire(proxy: Proxy, *words: str, said: str = "", key: str = "") -> tuple[int, str]:
    """A command's exit code, and what it printed on either stream."""
    environment = os.environ | {"SEEDWIRE_URL": proxy.url, "COLUMNS": "100"}
    if key:
        environment["SEEDWIRE_API_KEY"] = key
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.console", *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        cwd=ROOT,
    )
    out, _ = await process.communicate(said.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(errors="replace")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gguf.write(tmp_path / "tiny.gguf", quantized=False)


async def test_one_answer_is_printed_or_is_json_and_a_pipe_is_a_message(
    tmp_path: Path, model: Path
) -> None:
    options = ("--max-tokens", "8", "--temperature", "0")
    arguments = ("--model", str(model), "--api-key", "open")
    async with a_proxy(tmp_path / "p", *arguments) as proxy:
        code, text = await seedwire(proxy, "chat", "-m", "hello")
        assert (code, "set SEEDWIRE_API_KEY" in text) == (1, True)
        code, text = await seedwire(proxy, "chat", "-m", "hello", "--json", *options, key="open")
        assert code == 0, text
        answer = json.loads(text)
        assert answer["usage"]["completion_tokens"] <= 8
        for said in (("chat", "-m", "hello"), ("chat",)):
            code, plain = await seedwire(proxy, *said, *options, said="hello", key="open")
            assert (code, plain.rstrip("\n")) == (0, answer["content"].rstrip("\n"))
        code, text = await seedwire(proxy, "chat", "--model", "x", "-m", "y", "--json", key="open")
        assert code == 1
        assert "no model 'x'" in json.loads(text)["error"]
        for way, wanted in (("small", 0), ("ensemble", 1)):
            said = ("chat", "-m", "hello", "--mode", way, *options)
            code, text = await seedwire(proxy, *said, key="open")
            assert (code, "start the proxy with --large" in text) == (wanted, bool(wanted))
        url = proxy.url
        proxy.url = "http://127.0.0.1:9"
        code, text = await seedwire(proxy, "chat", "-m", "hello")
        assert (code, "no server answers at http://127.0.0.1:9" in text) == (69, True)
        assert "start one with `seedwire up`" in text
        proxy.url = url


async def test_lines_are_labelled_and_versions_rolled_back_from_the_console(
    broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    rows = Block("output_rows", "output.weight", [2, 64], rows=[72, 82])
    manifest = a_manifest(model, "llama", [rows])
    link = await nats_bus.connect([broker.url], name="publisher")
    publisher = await Publisher.on(link)
    await publisher.open("mail", manifest, Task(loss="choices", template="{text} ", labels=LABELS))
    arguments = ("--model", str(model), "--servers", broker.url)
    async with a_proxy(tmp_path / "p", *arguments) as proxy:
        for round in (1, 2):
            values = [0.0] * 128 if round == 1 else [0.5] * 64 + [-0.5] * 64
            await publisher.publish("mail", round, np.array(values))
            await proxy.serves(f"mail@{round}")
        code, text = await seedwire(proxy, "chat", said="a ripe pear\n\nshiny ore\n")
        assert code == 0, text
        lines = [line.split() for line in text.splitlines()]
        assert sorted(line[0] for line in lines) == ["fruit", "fruit", "metal", "metal"]
        assert all(line[-1].endswith("%") for line in lines)
        code, text = await seedwire(proxy, "chat", "--json", said="a ripe pear\nshiny ore\n")
        answers = [json.loads(line) for line in text.splitlines()]
        assert [answer["model"] for answer in answers] == ["mail@2", "mail@2"]
        for answer in answers:
            assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
            assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)

        code, text = await seedwire(proxy, "serve", "versions")
        assert code == 0
        assert [line for line in text.splitlines() if "mail@2" in line and "serves" in line]
        code, text = await seedwire(proxy, "serve", "rollback", "--json")
        assert (code, json.loads(text)["serving"]) == (0, "mail@1")
        code, text = await seedwire(proxy, "serve", "rollback")
        assert (code, "no version older than round 1 is kept" in text) == (1, True)
        code, text = await seedwire(proxy, "serve", "follow")
        assert (code, "mail@2 serves" in text) == (0, True)
    await link.close()
