"""A soft prompt behind the rows' texts: what llama.cpp says with it, and what a probe sends."""

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from shared import directions
from shared.codec import encode_manifest
from shared.engine.embeddings import Embeddings
from shared.engine.examples import with_prompt
from shared.engine.gguf_file import read_header
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine, LlamaModel
from shared.engine.model import Adaptation, Example
from shared.engine.probing import NAT, probe
from shared.engine.protocol import OpenJob, Probe
from shared.errors import EngineError
from shared.messages import Block, Manifest, Task, Variant
from tests.support import tiny_gguf

WIDTH = tiny_gguf.Shape().width
CHOICES = [12, 40, 77]
START = [50, 51, 52, 53, 54]
PROMPT = Block("prompt", "token_embd.weight", [5, WIDTH], rows=START, unit=1.0)
CONTROL = Block("control", "", [WIDTH], layer=1)
CHOSEN = [
    Example(np.arange(5, 5 + length, dtype=np.int32), np.array([target], np.int32))
    for length, target in ((9, 1), (17, 0), (30, 2), (40, 1))
]
WRITTEN = [Example(one.tokens, one.tokens[-3:].copy()) for one in CHOSEN]
ROWS = {"choices": CHOSEN, "tokens": WRITTEN}
SENT = {"choices": 4 * 5, "tokens": 4 * (5 + 2)}
Opener = Callable[..., LlamaModel]


def an_adaptation(architecture: str, *blocks: Block) -> Adaptation:
    offsets = [0, *accumulate(int(np.prod(block.shape)) for block in blocks)]
    return Adaptation(architecture, 11, 0, list(blocks), offsets)


@pytest.fixture
def a_model(tmp_path: Path) -> Opener:
    def build(
        *blocks: Block, architecture: str = "llama", max_tokens: int = 64, **options: Any
    ) -> LlamaModel:
        path = tmp_path / f"{architecture}.gguf"
        tiny_gguf.write(path, architecture, **options)
        adaptation = an_adaptation(architecture, *blocks)
        model = LlamaEngine().open(str(path), adaptation, 1, max_tokens)
        model.stand(np.zeros(adaptation.offsets[-1], np.float32))
        return model

    return build


def spelled_out(rows: Sequence[Example], start: list[int]) -> list[Example]:
    """The rows with `start` as plain tokens where the prompt stands."""
    return [
        Example(np.insert(row.tokens, row.asked, start).astype(np.int32), row.targets)
        for row in rows
    ]


def random_values(seed: int, count: int = 5 * WIDTH, scale: float = 0.3) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize("loss", list(ROWS))
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_at_zero_it_is_the_text_that_it_starts_as(
    a_model: Opener, architecture: str, quantized: bool, loss: str
) -> None:
    options = {"architecture": architecture, "quantized": quantized}
    plain, soft = a_model(CONTROL, **options), a_model(PROMPT, **options)
    rows = ROWS[loss]
    for model in (plain, soft):
        model.choose_among(CHOICES if loss == "choices" else [])
    found = soft.measure(rows)
    wanted = plain.measure(spelled_out(rows, START))
    other = plain.measure(spelled_out(rows, [60, 61, 62, 63, 64]))
    # Texts and prompt are two batches here and one there: kernels round otherwise.
    noise = 0.06 if quantized else 0.01
    assert found.loss == pytest.approx(wanted.loss, abs=noise)
    assert found.weight.tolist() == wanted.weight.tolist()
    assert np.abs(found.loss - other.loss).max() > 3 * noise


@pytest.mark.parametrize("loss", list(ROWS))
@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_a_probe_sends_prompt_and_answer_and_says_what_a_whole_pass_says_bit_for_bit(
    a_model: Opener, architecture: str, loss: str
) -> None:
    soft, fresh = (a_model(PROMPT, architecture=architecture) for _ in range(2))
    rows = ROWS[loss]
    for model in (soft, fresh):
        model.choose_among(CHOICES if loss == "choices" else [])
    first = soft.measure(rows).loss
    texts = sum(row.asked for row in rows)
    assert soft.forwarded == texts + SENT[loss]
    said = first
    for number in range(1, 4):
        soft.stand(random_values(number))
        said = soft.measure([*rows]).loss  # known by what the rows are, not by the list
        assert soft.forwarded == texts + (number + 1) * SENT[loss]
    fresh.stand(random_values(3))
    assert fresh.measure(rows).loss.tolist() == said.tolist()
    assert np.abs(said - first).max() > 0.01
    soft.measure(rows[:2])  # others take the cache
    soft.stand(np.zeros(5 * WIDTH, np.float32))
    assert soft.measure(rows).loss.tolist() == first.tolist()


def test_rows_that_the_cache_cannot_hold_together_say_what_they_say_in_parts(
    a_model: Opener,
) -> None:
    soft = a_model(PROMPT, quantized=False)
    random = np.random.default_rng(3)
    many = [
        Example(random.integers(5, 300, 40).astype(np.int32), np.array([n % 3], np.int32))
        for n in range(300)
    ]
    soft.choose_among(CHOICES)
    whole = soft.measure(many)
    assert soft.forwarded == 300 * 45
    parts = [soft.measure(many[low : low + 20]).loss for low in range(0, 300, 20)]
    assert whole.loss == pytest.approx(np.concatenate(parts), abs=0.01)
    assert len(set(whole.loss.round(3))) > 200
    soft.measure(many)
    assert soft.forwarded == 3 * 300 * 45  # nothing was kept, and all of it is counted
    for part in soft.parts(many):
        for _ in range(4):
            soft.measure(many[part])
    assert soft.forwarded == 4 * 300 * 45 + 3 * 300 * 5  # part by part all is kept
    assert [part.start for part in soft.parts(many)][1:] == [
        part.stop for part in soft.parts(many)
    ][:-1]


def test_probes_of_a_batch_beyond_the_cache_send_its_texts_twice_and_not_each_time(
    tmp_path: Path,
) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    data = tmp_path / "rows.jsonl"
    lines = [{"text": f"{n} " * 12, "label": str(n % 2)} for n in range(300)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = Task("choices", "{text}\nIs:", {"0": " a", "1": " b"}, 96)
    made = Manifest(0, "llama", 7, [PROMPT], [Variant("0" * 64, 1, "tiny")], 5 * WIDTH)
    request = OpenJob("j", encode_manifest(made), task, str(model), str(data), "", device="a")
    job = Job(request, LlamaEngine())
    examples = job.examples(job.rows_of(1))
    assert len(job.model.parts(examples)) > 3
    whole = Probe("j", 1, 1, "probe", [(4, 2)], 0.05, 300, (0, 1), job.adapter.digest())
    result = probe(job, whole)
    texts = sum(example.asked for example in examples)
    assert job.model.forwarded == 2 * texts + 5 * 300 * 5  # for the losses at theta, for probes
    for place, index in enumerate((4, 5)):
        z = directions.one(7, 1, index, 0, 5 * WIDTH, "signs")
        sides: list[float] = []
        for sign in (1.0, -1.0):
            job.model.stand((sign * 0.05 * z).astype(np.float32))
            sides.append(float(job.model.measure(examples).loss.sum()))
        told = np.frombuffer(result.differences, "<i4")[place] / NAT
        assert told == pytest.approx(sides[0] - sides[1], abs=1e-5)


def test_other_blocks_that_move_have_the_texts_sent_anew(a_model: Opener) -> None:
    lora = Block("lora_b", "blk.0.attn_v.weight", [32], d_in=WIDTH)
    model, fresh = a_model(PROMPT, lora), a_model(PROMPT, lora)
    values = np.concatenate([random_values(1), random_values(2, 32)])
    model.measure(WRITTEN)
    sent = model.forwarded
    model.stand(values)
    found = model.measure(WRITTEN).loss
    assert model.forwarded == 2 * sent
    fresh.stand(values)
    assert found.tolist() == fresh.measure(WRITTEN).loss.tolist()


def test_sites_of_output_rows_behind_a_prompt_predict_its_losses(a_model: Opener) -> None:
    rows = Block("output_rows", "output.weight", [3, WIDTH], rows=CHOICES)
    model = a_model(PROMPT, rows)
    model.choose_among(CHOICES)
    model.stand(np.concatenate([random_values(4), np.zeros(3 * WIDTH, np.float32)]))
    measured = model.measure(CHOSEN).loss
    sites = model.sites(CHOSEN)
    logits = np.concatenate([site.rows for site in sites])
    targets = np.concatenate([site.target_logit for site in sites])
    assert np.log(np.exp(logits).sum(axis=1)) - targets == pytest.approx(measured, abs=1e-4)


def test_a_diverged_prompt_leaves_nothing_behind(a_model: Opener) -> None:
    model = a_model(PROMPT)
    before = model.measure(WRITTEN).loss
    model.stand(np.full(5 * WIDTH, np.inf, np.float32))
    assert not np.isfinite(model.measure(WRITTEN).loss).all()
    model.stand(np.zeros(5 * WIDTH, np.float32))
    assert model.measure(WRITTEN).loss.tolist() == before.tolist()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_embeddings_are_read_as_they_were_quantised(tmp_path: Path, kind: str) -> None:
    """Against the gguf package's own arithmetic."""
    table = np.random.default_rng(1).standard_normal((40, WIDTH)).astype(np.float32)
    quantisation = gguf.GGMLQuantizationType[kind]
    packed: NDArray[Any] = gguf.quants.quantize(table, quantisation)
    path = tmp_path / "table.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tensor("token_embd.weight", packed, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = np.array([3, 39, 0, 3], np.int32)
    found = Embeddings(str(path), read_header(str(path))).rows(tokens)
    wanted = gguf.quants.dequantize(packed, quantisation)[tokens] * np.sqrt(np.float32(WIDTH))
    assert found.tolist() == wanted.astype(np.float32).tolist()


@pytest.mark.parametrize("loss", list(ROWS))
@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_slopes_are_autograds(tmp_path: Path, architecture: str, loss: str) -> None:
    from tests.support import hf_gguf

    torch = hf_gguf.torch
    twin = hf_gguf.twin(tmp_path, architecture)
    block = msgspec.structs.replace(PROMPT, unit=0.25)
    model = LlamaEngine().open(str(twin.path), an_adaptation(architecture, block), 1, 64)
    rows = ROWS[loss]
    model.choose_among(CHOICES if loss == "choices" else [])

    theta = torch.tensor(random_values(7), requires_grad=True)
    look_up = twin.hf.get_input_embeddings()
    soft = look_up(torch.tensor(START)) + 0.25 * theta.reshape(5, WIDTH)
    total = torch.zeros(())
    for row in rows:
        tokens = torch.tensor(row.tokens.astype(np.int64))
        parts = [look_up(tokens[: row.asked]), soft, look_up(tokens[row.asked :])]
        logits = twin.hf(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(row.targets) :]
        logits = logits[:, CHOICES] if loss == "choices" else logits
        targets = torch.tensor(row.targets.astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    total.backward()
    gradient = theta.grad.numpy().astype(np.float64)

    values = random_values(7)
    model.stand(values)
    assert model.measure(rows).loss.sum() == pytest.approx(float(total.detach()), abs=0.03)
    random, eps = np.random.default_rng(8), 0.05
    slopes: list[float] = []
    products: list[float] = []
    for _ in range(64):
        z = random.choice([-1.0, 1.0], values.size).astype(np.float32)
        z[random.permutation(values.size)[: values.size // 2]] = 0.0
        sides: list[float] = []
        for sign in (1.0, -1.0):
            model.stand((values + sign * eps * z).astype(np.float32))
            sides.append(float(model.measure(rows).loss.sum()))
        slopes.append((sides[0] - sides[1]) / (2 * eps))
        products.append(float(gradient @ z))
    assert np.corrcoef(slopes, products)[0, 1] > 0.99
    assert np.dot(slopes, products) / np.dot(products, products) == pytest.approx(1, abs=0.05)


def test_rows_are_cut_so_that_the_prompt_fits(a_model: Opener) -> None:
    task = Task("tokens", max_tokens=40)
    assert with_prompt(task, an_adaptation("llama", PROMPT)).max_tokens == 35
    assert with_prompt(task, an_adaptation("llama", CONTROL)) is task
    with pytest.raises(EngineError, match=r"max_tokens 12 leaves no room.*use at least 13"):
        with_prompt(Task("tokens", max_tokens=12), an_adaptation("llama", PROMPT))
    long = Example(np.full(600, 5, np.int32), np.array([1], np.int32))
    with pytest.raises(EngineError, match=r"600 tokens; at most \d+ fit"):
        a_model(PROMPT).measure([long])


@pytest.mark.parametrize(
    ("change", "why"),
    [({"shape": [5, 32]}, "needs width 64"), ({"rows": [50, 51, 52, 53, 320]}, "tokens below 320")],
)
def test_a_prompt_that_the_model_has_no_place_for_is_named(
    a_model: Opener, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(EngineError, match=why):
        a_model(msgspec.structs.replace(PROMPT, **change))
