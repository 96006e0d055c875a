"""A model that was cut short or whose bytes were changed is read, or refused by its name."""

import os
import re
import struct
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from services.console.failure import Failure
from services.console.manifest import AdapterOptions, manifest
from services.console.spec import Wanted
from services.console.submit import Submission, inspect
from shared.engine.gguf_file import read_header
from shared.engine.llama import LlamaEngine
from shared.engine.process import EngineProcess
from shared.engine.protocol import Inspect
from shared.errors import EngineDied, EngineError
from shared.messages import Variant
from tests.support.jobs import a_job

MODEL = Path("deploy/demo/model/seedwire-demo-q8_0.gguf")
MOST_S = 5.0

_DATA = MODEL.read_bytes()
_HEADER = read_header(str(MODEL))
_WEIGHTS = min(start for _, start in _HEADER.places.values())
_TENSORS = _DATA.index(next(iter(_HEADER.tensors)).encode()) - 8
_TOKENS = _DATA.index(b"tokenizer.ggml.tokens")


@pytest.fixture(scope="module")
def engine() -> LlamaEngine:
    return LlamaEngine()


@pytest.fixture
async def process() -> AsyncIterator[EngineProcess]:
    process = EngineProcess("llama")
    yield process
    await process.close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(_DATA)
    return path


@contextmanager
def changed(path: Path, at: int, data: bytes) -> Generator[None]:
    """The model with other bytes at one place."""
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, at)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), _DATA[at : at + len(data)], at)


async def refusal(process: EngineProcess, path: Path) -> str:
    """Why the engine's process refuses a model; empty if it does not."""
    try:
        await process.ask(Inspect(str(path), ["yes", "no"], "{text}\n", "\n"), timeout_s=MOST_S)
    except EngineDied as error:
        return f"{path}: {error}; "
    except EngineError as error:
        return str(error)
    return ""


async def test_a_model_with_a_byte_changed_anywhere_is_read_or_refused_by_its_name(
    process: EngineProcess, scratch: Path
) -> None:
    random, refused = Random(1), 0
    for low, high in [(0, _TOKENS), (_TOKENS, _TENSORS), (_TENSORS, _WEIGHTS)] * 150:
        at = random.randrange(low, high)
        byte = random.choice([_DATA[at] ^ 1 << random.randrange(8), 0, 255])
        with changed(scratch, at, bytes([byte])):
            why = await refusal(process, scratch)
        refused += bool(why)
        assert not why or (why.startswith(f"{scratch}: ") and "\n" not in why), (at, byte)
    assert refused > 100


async def test_a_model_cut_anywhere_is_refused_by_its_name(
    process: EngineProcess, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    for size in (*range(0, _WEIGHTS, 997), *range(_WEIGHTS, len(_DATA), 399_989)):
        path.write_bytes(_DATA[:size])
        why = await refusal(process, path)
        assert why.startswith(f"{path}: ")
        assert ("fetch the file again" if size >= 4 else "convert the model") in why


async def test_a_model_that_ends_llama_cpp_is_named_with_the_reason(scratch: Path) -> None:
    """Two tokens alike, over which it ends the process."""
    wanted = Wanted(a_job().spec, AdapterOptions())
    submission = Submission("job", scratch, wanted, lambda _: wanted)
    one, other = (_DATA.index(struct.pack("<Q", 1) + text, _TOKENS) + 8 for text in (b"!", b"#"))
    with changed(scratch, one, _DATA[other : other + 1]), pytest.raises(Failure) as told:
        await inspect(submission)
    said = str(told.value)
    assert said.startswith(f"--model {scratch}: the engine was ended by SIGABRT")
    assert re.search(r"GGML_ASSERT.*fetch the file again", said)


def value_of(name: str) -> int:
    """Where a number of the header begins."""
    return _DATA.index(name.encode()) + len(name) + 4


def proposed(engine: LlamaEngine, path: Path) -> None:
    """All that a job could tune of the model has been thought of."""
    facts = engine.inspect(str(path), ["yes", "no"], "{text}\n", "\n")
    variant = Variant("a" * 64, len(_DATA), "model.gguf", None)
    labels = {"a": "yes", "b": "no"}
    for kind in ("last-block", "output-rows", "lora", "control", "prompt"):
        with suppress(Failure):
            options = AdapterOptions(kind=kind)
            manifest(facts, options, labels=labels, variant=variant, seed=1, momentum=True)


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (value_of("llama.block_count"), struct.pack("<I", 2**20)),
        (value_of("llama.block_count"), struct.pack("<I", 2)),
        (value_of("llama.embedding_length"), struct.pack("<I", 0)),
        (value_of("llama.context_length") - 4, struct.pack("<If", 6, 3e38)),
        (_DATA.index(b"token_embd.weight"), b"tokem"),
    ],
)
def test_sizes_that_no_tensor_bears_out_are_damage(
    at: int, data: bytes, engine: LlamaEngine, scratch: Path
) -> None:
    with (
        changed(scratch, at, data),
        pytest.raises(EngineError, match=r"model.gguf: damaged.*; fetch the"),
    ):
        proposed(engine, scratch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llama.attention.head_count", struct.pack("<I", 2**30)),
        ("llama.attention.head_count_kv", struct.pack("<I", 2**30)),
        ("llama.rope.dimension_count", struct.pack("<I", 2**20)),
        ("llama.rope.dimension_count", struct.pack("<I", 63)),
        ("llama.rope.freq_base", struct.pack("<f", -1.0)),
    ],
)
def test_numbers_that_no_last_block_can_have_cost_it_its_closed_form_alone(
    name: str, value: bytes, engine: LlamaEngine, scratch: Path
) -> None:
    with changed(scratch, value_of(name), value):
        proposed(engine, scratch)
        assert not engine.inspect(str(scratch), [], "").last_block
