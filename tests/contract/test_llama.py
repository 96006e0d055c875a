"""What llama.cpp must do for us, asked of the model itself, without a child process."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from shared.engine import last_layer
from shared.engine.llama import LlamaEngine, LlamaModel
from shared.engine.model import Adaptation, Example
from shared.errors import EngineError
from shared.messages import Block
from tests.support import tiny_gguf

EXAMPLES = [
    Example(np.arange(5, 5 + length, dtype=np.int32), np.array(targets, np.int32))
    for length, targets in ((9, [1]), (17, [0]), (30, [2]))
]
GENERATED = [Example(one.tokens, one.tokens[-3:].copy()) for one in EXAMPLES]
ROWS = [12, 40, 77]
Opener = Callable[..., LlamaModel]


def an_adaptation(architecture: str, *blocks: Block) -> Adaptation:
    sizes = [int(np.prod(block.shape)) for block in blocks]
    offsets = [0, *np.cumsum(sizes).tolist()]
    return Adaptation(architecture, 11, 0, list(blocks), offsets)


@pytest.fixture
def a_model(tmp_path: Path) -> Opener:
    def build(*blocks: Block, architecture: str = "llama", **options: object) -> LlamaModel:
        path = tmp_path / f"{architecture}.gguf"
        tiny_gguf.write(path, architecture, **options)  # type: ignore[arg-type]
        return LlamaEngine().open(str(path), an_adaptation(architecture, *blocks), 1, 64)

    return build


def some_lora(architecture: str) -> list[Block]:
    if architecture == "phi3":
        return [Block("lora_b", "blk.1.attn_qkv.weight", [128], d_in=64)]
    return [Block("lora_b", "blk.1.attn_q.weight", [64], slot=slot, d_in=64) for slot in range(3)]


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_every_architecture_carries_every_kind_of_block(a_model: Opener, architecture: str) -> None:
    rows = Block("output_rows", "output.weight", [3, 64], rows=ROWS)
    control = Block("control", "", [64], layer=1)
    blocks = [*some_lora(architecture), control, rows]
    model = a_model(*blocks, architecture=architecture)
    model.choose_among(ROWS)
    bare = model.measure(EXAMPLES).loss
    offsets = an_adaptation(architecture, *blocks).offsets
    random = np.random.default_rng(3)
    for start, end in itertools.pairwise(offsets):
        values = np.zeros(offsets[-1], np.float32)
        values[start:end] = 0.3 * random.standard_normal(end - start)
        model.stand(values)
        assert np.abs(model.measure(EXAMPLES).loss - bare).max() > 1e-3
    model.stand(np.zeros(offsets[-1], np.float32))
    assert model.measure(EXAMPLES).loss.tolist() == bare.tolist()
    model.close()


def test_an_adapter_at_zero_is_no_adapter_bit_for_bit(a_model: Opener) -> None:
    blocks = [*some_lora("llama"), Block("control", "", [64], layer=1)]
    bare = a_model(Block("control", "", [64], layer=1)).measure(GENERATED)
    model = a_model(*blocks)
    model.stand(np.ones(256, np.float32))
    assert model.measure(GENERATED).loss.tolist() != bare.loss.tolist()
    model.stand(np.zeros(256, np.float32))
    assert model.measure(GENERATED).loss.tolist() == bare.loss.tolist()


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_lora_moves_the_loss_as_the_same_weights_made_with_numpy(
    a_model: Opener, architecture: str
) -> None:
    blocks = some_lora(architecture)
    adaptation = an_adaptation(architecture, *blocks)
    values = 0.2 * np.random.default_rng(5).standard_normal(adaptation.offsets[-1])
    values = values.astype(np.float32)
    product = sum(
        np.outer(adaptation.part(number, values), adaptation.fixed_a(number))
        for number in range(len(blocks))
    )
    plus = {blocks[0].tensor: np.asarray(product, np.float32)}
    merged = a_model(*blocks, architecture=architecture, quantized=False, plus=plus)
    wanted = merged.measure(GENERATED).loss
    model = a_model(*blocks, architecture=architecture, quantized=False)
    base = model.measure(GENERATED).loss
    model.stand(values)
    assert np.abs(wanted - base).max() > 0.05
    assert model.measure(GENERATED).loss == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
@pytest.mark.parametrize("choices", [ROWS, [12, 40, 90], []])
def test_output_rows_give_the_losses_that_their_sites_predict(
    a_model: Opener, architecture: str, choices: list[int]
) -> None:
    rows = Block("output_rows", "output.weight", [3, 64], rows=ROWS)
    model = a_model(rows, architecture=architecture)
    model.choose_among(choices)
    examples = EXAMPLES if choices else GENERATED
    sites = model.sites(examples)
    deltas = (0.05 * np.random.default_rng(7).standard_normal((3, 64))).astype(np.float32)
    model.stand(deltas.ravel())
    measured = model.measure(examples)
    predicted = last_layer.losses(sites, deltas.astype(np.float64))
    assert measured.loss == pytest.approx(predicted.loss, abs=1e-4)
    assert measured.right.tolist() == predicted.right.tolist()
    assert measured.weight.tolist() == predicted.weight.tolist()


def test_a_tied_model_serves_the_closed_form_and_refuses_probes(a_model: Opener) -> None:
    rows = Block("output_rows", "output.weight", [3, 64], rows=ROWS)
    model = a_model(rows, tied=True)
    assert len(model.sites(GENERATED)) == 3
    with pytest.raises(EngineError, match=r"use how: exact, or a GGUF with its own output\.weight"):
        model.stand(np.ones(192, np.float32))


def test_a_diverged_pass_leaves_nothing_behind(a_model: Opener) -> None:
    model = a_model(*some_lora("llama"), Block("control", "", [64], layer=1))
    before = model.measure(GENERATED).loss
    model.stand(np.full(256, np.inf, np.float32))
    assert not np.isfinite(model.measure(GENERATED).loss).all()
    model.stand(np.zeros(256, np.float32))
    assert model.measure(GENERATED[:1]).loss.tolist() == pytest.approx(before[:1].tolist())
    assert model.measure(GENERATED).loss.tolist() == before.tolist()


def test_an_example_that_is_too_long_is_an_error_not_an_abort(a_model: Opener) -> None:
    model = a_model(Block("control", "", [64], layer=1))
    long = Example(np.full(600, 5, np.int32), np.array([1], np.int32))
    with pytest.raises(EngineError, match="600 tokens; at most 256 fit"):
        model.measure([long])


def test_reloading_adapters_keeps_memory_and_files_as_they_are(a_model: Opener) -> None:
    model = a_model(*some_lora("llama"))
    random = np.random.default_rng(1)

    def reload(times: int) -> tuple[float, int]:
        for _ in range(times):
            model.stand(random.standard_normal(192).astype(np.float32))
            model.measure(EXAMPLES)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir("/proc/self/fd"))

    megabytes, files = reload(50)
    later_megabytes, later_files = reload(300)
    assert later_files == files
    assert later_megabytes < megabytes + 4


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (
            Block("lora_b", "blk.9.attn_q.weight", [64], d_in=64),
            r"no tensor blk\.9\.attn_q\.weight",
        ),
        (Block("lora_b", "blk.0.attn_q.weight", [32], d_in=64), r"attn_q\.weight has shape"),
        (Block("control", "", [64], layer=0), r"a layer in 1\.\.1"),
        (Block("control", "", [32], layer=1), r"needs shape \[64\]"),
        (Block("output_rows", "output.weight", [1, 64], rows=[320]), "rows below 320"),
    ],
)
def test_blocks_that_the_model_has_no_place_for_are_named(
    a_model: Opener, block: Block, why: str
) -> None:
    with pytest.raises(EngineError, match=why):
        a_model(block)


def test_files_that_cannot_be_used_are_refused_with_the_mend(tmp_path: Path) -> None:
    engine, control = LlamaEngine(), an_adaptation("llama", Block("control", "", [64], layer=1))

    def refused(path: Path, why: str, max_tokens: int = 64) -> None:
        with pytest.raises(EngineError, match=why) as caught:
            engine.open(str(path), control, 1, max_tokens)
        assert str(path) in str(caught.value)

    whole = tiny_gguf.write(tmp_path / "whole.gguf")
    refused(tmp_path / "gone.gguf", "cannot be read: No such file")
    for size in (20, 5_000, whole.stat().st_size - 100):
        short = tmp_path / f"short{size}.gguf"
        short.write_bytes(whole.read_bytes()[:size])
        refused(short, "cut short.*fetch the file again")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(other, "not a GGUF file")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "not a GGUF file")
    mamba = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    mamba.write_header_to_file()
    mamba.write_kv_data_to_file()
    mamba.close()
    refused(tmp_path / "mamba.gguf", "unknown architecture mamba: supported are llama, qwen2")
    refused(
        tiny_gguf.write(tmp_path / "q.gguf", "qwen2"), "architecture qwen2, the manifest is for"
    )
    refused(whole, "max_tokens 4096 is beyond the 1024", max_tokens=4096)
