"""`seedwire export` at a real fleet: devices with llama.cpp, a broker, the command line."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any, cast

import gguf
import llama_cpp
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from deploy.demo.processes import Child
from services.console.export.gather import FIRST_CHUNKS, base_of
from services.console.failure import EXIT_FAILURE, EXIT_USAGE, Failure
from services.console.printing import Printer
from shared import blobs, log, subjects
from shared.bus import Stored
from shared.engine.gguf_file import read_header
from shared.memory_bus import MemoryBus
from shared.messages import (
    AdapterEvaluated,
    Block,
    JobSpec,
    LogEvent,
    Manifest,
    ModelPublished,
    RoundClosed,
    Task,
    Tuning,
    Variant,
)
from tests.support import tiny_gguf
from tests.support.fleet import Fleet, a_fleet, rows, write_rows
from tests.support.hubs import MemoryHub
from tests.support.jobs import judged

ROOT = Path(__file__).resolve().parents[2]
COMMAND_S = 90.0
ROUNDS, SNAPSHOT_EVERY = 9, 4
TAIL = " is "
"""It ends in a space, so that the tokens of both labels' words begin with their own letters."""
SPEC = f"""
snapshot_every = {SNAPSHOT_EVERY}
[evaluation]
every_rounds = 3
[tuning]
directions = 32
"""


async def seedwire(fleet: Fleet, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of one command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.console", *arguments, "--servers", fleet.broker.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    async with asyncio.timeout(COMMAND_S):
        output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def refused(fleet: Fleet, *arguments: str, code: int = EXIT_FAILURE) -> str:
    """What a command that must fail says."""
    found, output, errors = await seedwire(fleet, "export", *arguments)
    assert (found, output) == (code, ""), errors
    return errors


async def start_device(fleet: Fleet, model: Path) -> None:
    """A trusted device with llama.cpp."""
    data = write_rows(fleet.folder / "rows.jsonl", rows(40))
    heldout = write_rows(fleet.folder / "heldout.jsonl", rows(60, offset=100_000))
    arguments = ["--device", "till", "--servers", fleet.broker.url, "--models", str(model)]
    arguments += ["--data", str(data), "--heldout", str(heldout), "--trusted", "true"]
    arguments += ["--state-dir", str(fleet.folder / "state" / "till")]
    child = Child("till", "edge_client", arguments, fleet.folder / "till.log")
    fleet.devices["till"] = child
    await child.start()


async def a_job(fleet: Fleet, name: str, model: Path, *more: str) -> list[LogEvent]:
    """A job's facts, once it has ended."""
    spec = fleet.folder / "spec.toml"
    spec.write_text(SPEC)
    line = f"--name {name} --model {model} --labels fruit,metal --spec {spec} --deadline 20"
    options = [*line.split(), "--template", f"{{text}}{TAIL}", *more]
    code, output, errors = await seedwire(fleet, "job", "submit", *options)
    assert code == 0, output + errors
    async with asyncio.timeout(COMMAND_S):
        return await fleet.events_until(name)


@pytest.mark.timeout(300)  # twenty processes, one after the other
async def test_a_job_is_exported_with_what_its_log_says_of_it(tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    async with a_fleet(tmp_path, devices=0) as fleet:
        await start_device(fleet, model)
        events = await a_job(fleet, "mail", model, "--rounds", str(ROUNDS))
        closed = {event.round: event for event in events if isinstance(event, RoundClosed)}
        out = tmp_path / "out"
        code, output, errors = await seedwire(fleet, "export", "mail", "--to", str(out))
        assert code == 0, output + errors
        held_out = judged(events)
        best = held_out.ranked()[0]
        assert best.digest in output
        check_card((out / "README.md").read_text(), events, model, best)
        assert (out / "peft" / "README.md").read_text().startswith("---\nlibrary_name: peft")
        first, told = held_out.measured[0], held_out.of(best.digest)
        assert told is not None
        lora = str(out / "mail-lora.gguf")
        right, loss = classified(model, lora, fleet.folder / "heldout.jsonl")
        assert abs(right - told.correct) <= 1  # a tie may fall otherwise in another batch
        assert loss == pytest.approx(told.loss, abs=0.01)
        assert right > first.correct
        folder = load_file(out / "peft" / "adapter_model.safetensors")
        a = folder["base_model.model.lm_head.lora_A.weight"]
        exported = {tensor.name: tensor.data for tensor in gguf.GGUFReader(lora).tensors}
        assert a.tolist() == exported["output.weight.lora_a"].tolist()
        attention = ("attn_q", "attn_k", "attn_v", "attn_output")  # the default: the last block
        for name in (*(f"blk.1.{part}.weight" for part in attention), "output.weight"):
            assert exported[f"{name}.lora_b"].any(), name

        # Snapshots of early rounds are gone: the commits lead there too, or from a later snapshot.
        for round in (2, SNAPSHOT_EVERY, ROUNDS):
            again = ["--to", str(tmp_path / f"r{round}"), "--round", str(round), "--json"]
            code, output, errors = await seedwire(
                fleet, "export", "mail", *again, "--model", str(model), "--base", "owner/tiny"
            )
            assert code == 0, errors
            said = cast(dict[str, Any], json.loads(output))
            assert (said["round"], said["digest"]) == (round, closed[round].digest)
            assert said["base"]["name"] == "owner/tiny"
            (tensors,) = [file for file in said["files"] if file.endswith(".safetensors")]
            assert load_file(tensors)

        nothing = tmp_path / "nothing"
        to = ["--to", str(nothing)]
        assert f"rounds 1 to {ROUNDS + 1}" in await refused(fleet, "mail", "--round", "99", *to)
        why = await refused(fleet, "mail", "--form", "control-vector", "--form", "gguf", *to)
        assert "no control vectors; --form gguf or peft" in why
        other = tiny_gguf.write(tmp_path / "other.gguf", seed=2)
        why = await refused(fleet, "mail", "--model", str(other), *to)
        assert f"the job's model is tiny.gguf with {blobs.reference(model).digest}" in why
        assert "no job is called nobody" in await refused(fleet, "nobody", *to)
        why = await refused(fleet, "mail", "--to", str(model), code=EXIT_USAGE)
        assert "name a directory" in why
        assert not nothing.exists()

        few = ["--rounds", "1", "--enough-probes", "32"]
        await a_job(fleet, "steer", model, "--adapter", "control", *few)
        folder = tmp_path / "steer"
        code, output, errors = await seedwire(fleet, "export", "steer", "--to", str(folder))
        assert (code, output.count("not written: ")) == (0, 2), output + errors
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["README.md", "steer-control.gguf"]
        assert "--form control-vector" in await refused(fleet, "steer", "--form", "peft", *to)

        # The engine of tests is no language model, and a job that has done nothing has no adapter.
        spec = JobSpec(task=Task(loss="choices", labels={"a": "x", "b": "y"}), tuning=Tuning())
        await fleet.submit(fleet.job("made-up", spec))
        assert "architecture fake" in await refused(fleet, "made-up", *to)
        line = f"--name quiet --model {other} --labels fruit,metal --adapter lora --no-upload"
        code, output, errors = await seedwire(fleet, "job", "submit", *line.split())
        assert code == 0, output + errors
        why = await refused(fleet, "quiet", "--json", *to)
        assert "no round of job quiet has closed yet" in json.loads(why)["error"]


def check_card(text: str, events: list[LogEvent], model: Path, of: ModelPublished) -> None:
    """Every figure of the card is one that the log has up to `of`."""
    closes = [one for one in events if isinstance(one, RoundClosed) and one.round <= of.round]
    ref = blobs.reference(model)
    facts = dict(re.findall(r"^\| ([a-zA-Z0-9 -]+) \| (.+) \|$", text, re.MULTILINE))
    assert facts["SHA-256 of the file"] == f"`{ref.digest}`"
    assert facts["its file"] == f"`tiny.gguf`, {ref.size_bytes:,} bytes"
    assert facts["quantisation"] == "Q8_0"
    assert facts["digest of the adapter"] == f"`{of.digest}`"
    assert facts["rounds"] == f"{len(closes)} closed, {min(ROUNDS, of.round)} moved it"
    assert facts["devices"] == "up to 1 in one round"
    assert facts["updates"] == f"{sum(event.updates for event in closes)} in time, 0 late"
    assert facts["slopes measured"] == f"{sum(event.probes for event in closes)}"
    assert facts["fruit"] == "`fruit`"
    last = of.round + (of.round <= ROUNDS)  # it is measured in the round after it
    measured = [one for one in events if isinstance(one, AdapterEvaluated) and one.round <= last]
    assert len(measured) >= 2
    for event in measured:
        loss, accuracy = event.loss / event.weight, event.correct / event.examples
        row = f"| {event.round - 1} | {event.examples} | {event.correct} | {accuracy:.1%} |"
        assert f"{row} {loss:.4f} |" in text
        final = f"**This adapter: accuracy {accuracy:.1%}, loss {loss:.4f}.**"
        assert (final in text) == (event is measured[-1])
    assert "till" not in text  # devices are counted, never named


def classified(model: Path, lora: str, heldout: Path) -> tuple[int, float]:
    """How many rows stock llama.cpp answers rightly with the exported LoRA, and its mean loss."""
    stock = llama_cpp.Llama(
        str(model), lora_path=lora, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False
    )
    words = [stock.tokenize(word, add_bos=False)[0] for word in (b"fruit", b"metal")]
    found = [json.loads(line) for line in heldout.read_text().splitlines()]
    right, loss = 0, 0.0
    for row in found:
        stock.reset()
        stock.eval(stock.tokenize(f"{row['text']}{TAIL}".encode()))
        context = stock._ctx  # pyright: ignore[reportPrivateUsage]
        logits = np.ctypeslib.as_array(context.get_logits(), shape=(stock.n_vocab(),))[words]
        target = ("fruit", "metal").index(row["label"])
        right += int(logits.argmax() == target)
        loss += float(np.logaddexp(*logits) - logits[target])
    return right, loss / len(found)


async def test_no_more_of_a_stored_model_is_read_than_its_header(
    memory_hub: MemoryHub, tmp_path: Path
) -> None:
    shape = tiny_gguf.Shape(width=32, vocabulary=60_000)
    model = tiny_gguf.write(tmp_path / "large.gguf", shape=shape)
    link = memory_hub.broker.connect("console")
    await log.ensure_streams(link)
    ref = await blobs.put(link, model)
    reading = Counting(link)
    variant = Variant(ref.digest, ref.size_bytes, model.name)
    block = Block("output_rows", "output.weight", [1, 32], rows=[5])
    manifest = Manifest(0, "llama", 7, [block], [variant], 32)
    found = await base_of(cast(MemoryBus, reading), manifest, None, Printer(as_json=True))
    assert found == (variant, read_header(str(model)))
    chunks = -(-ref.size_bytes // blobs.CHUNK_BYTES)
    assert FIRST_CHUNKS < reading.chunks < chunks
    missing = msgspec.structs.replace(variant, digest="0" * 64)
    missing_manifest = msgspec.structs.replace(manifest, variants=[missing])
    with pytest.raises(Failure, match="name the file with --model"):
        await base_of(link, missing_manifest, None, Printer(as_json=True))


class Counting:
    """A link that counts what is read of the store."""

    def __init__(self, link: MemoryBus) -> None:
        self._link = link
        self.chunks = 0

    async def get_last(self, stream: str, subject: str) -> Stored | None:
        assert stream == subjects.BLOBS_STREAM
        self.chunks += 1
        return await self._link.get_last(stream, subject)
