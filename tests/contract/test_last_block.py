"""The last block in closed form says what llama.cpp says of it, and its gradient is autograd's."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared import directions
from shared.engine import block_sites, block_weights
from shared.engine.block_weights import BlockWeights
from shared.engine.closed_form import ClosedForm
from shared.engine.evaluating import evaluate
from shared.engine.gguf_file import read_header
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine
from shared.engine.model import Adaptation, Example, Losses
from shared.engine.probing import NAT, probe
from shared.engine.protocol import Evaluate
from shared.engine.site_cache import SiteCache
from shared.errors import EngineError
from shared.messages import Block
from tests.support import hf_gguf, tiny_gguf
from tests.support.hf_gguf import torch
from tests.support.last_block import (
    ROWS,
    SEED,
    a_job,
    a_probe,
    last_block,
    rows_of,
    write_rows,
)

WIDE = tiny_gguf.Shape(layers=3, heads=6, kv_heads=2, head=24)
"""Three queries share a key, and heads are wider than width / heads."""
USUAL = tiny_gguf.Shape(layers=3)
SHAPES = {"llama": USUAL, "qwen2": USUAL, "qwen3": WIDE}

FREQUENCIES = np.linspace(1.0, 8.0, 8).astype(np.float32)
VARIANTS: dict[str, dict[str, Any]] = {
    "rope_freqs": {"also": {"rope_freqs.weight": FREQUENCIES}},
    "linear": {
        "entries": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    },
    "linear unless named otherwise": {"entries": {"llama.rope.scaling.factor": 4.0}},
    "linear as old files say it": {"entries": {"llama.rope.scale_linear": 4.0}},
    "no scaling": {
        "entries": {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
    },
    "base": {"entries": {"llama.rope.freq_base": 500.0}},
    "wide heads": {"shape": WIDE},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model .* .tie_word_embeddings=True. and:UserWarning"
)
Twins = Callable[..., hf_gguf.Twin]


@pytest.fixture(scope="module")
def a_twin(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    def build(architecture: str, *, tied: bool = False) -> hf_gguf.Twin:
        folder = tmp_path_factory.mktemp("models")
        return hf_gguf.twin(folder, architecture, tied=tied, shape=SHAPES[architecture])

    return build


def closed_of(job: Job) -> ClosedForm:
    assert job.closed is not None
    return job.closed


def engines(job: Job) -> Losses:
    """What llama.cpp says with the adapter loaded."""
    job.model.stand(job.adapter.values())
    return job.model.measure(job.examples(job.rows_of(1)))


def says_as_llama_cpp_does(job: Job) -> None:
    """With theta where it stands, each loss is off by no more than half-precision caches make."""
    moved = engines(job)
    ours = job.losses(job.rows_of(1))
    job.model.stand(np.zeros(job.layout.d, np.float32))
    base = job.model.measure(job.examples(job.rows_of(1)))
    effect = np.abs(moved.loss - base.loss).mean()
    assert effect > 0.1
    assert np.abs(ours.loss - moved.loss).max() < 5e-3 * effect
    assert ours.weight.tolist() == moved.weight.tolist()
    assert ours.right.tolist() == moved.right.tolist()


@pytest.mark.parametrize("loss", ["choices", "tokens"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", SHAPES)
def test_losses_are_llama_cpps_with_the_same_lora_loaded(
    a_twin: Twins, architecture: str, tied: bool, loss: str
) -> None:
    twin = a_twin(architecture, tied=tied)
    rows = [] if tied else ROWS[loss]  # llama.cpp carries no rows of a tied matrix
    job = a_job(twin.path, loss, last_block(twin.path, rows=rows), spread=0.3)
    assert len(closed_of(job).numbers) == len(job.adapter.manifest.blocks)
    says_as_llama_cpp_does(job)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_llama_cpps_however_positions_are_turned(tmp_path: Path, variant: str) -> None:
    options: dict[str, Any] = {"shape": USUAL, "quantized": False}
    path = tiny_gguf.write(tmp_path / "model.gguf", **options | VARIANTS[variant])
    plain = tiny_gguf.write(tmp_path / "plain.gguf", **options)
    job, other = (a_job(each, "tokens", last_block(each), spread=0.3) for each in (path, plain))
    says_as_llama_cpp_does(job)
    apart = np.abs(engines(job).loss - engines(other).loss).max()
    assert (apart > 0.05) == (variant != "no scaling"), "the entry is no dead letter"


def test_losses_of_a_quantised_block_are_llama_cpps_but_for_its_rounding(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf")
    job = a_job(path, "tokens", last_block(path, rows=ROWS["tokens"]), spread=0.3)
    ours, moved = job.losses(job.rows_of(1)), engines(job)
    assert ours.loss == pytest.approx(moved.loss, rel=0.02)
    job.adapter.theta[:] = 0
    assert job.losses(job.rows_of(1)).loss == pytest.approx(engines(job).loss, rel=5e-3)


# ---- the gradient


def in_torch(job: Job, twin: hf_gguf.Twin, values: Any) -> Any:
    """Summed loss of the job's rows by transformers, its last block and output moved by `values`.

    Added by hand: B A x beside each matrix, and each output row.
    """
    model, blocks = twin.hf.model.layers[-1], job.adapter.manifest.blocks
    shape = SHAPES[twin.architecture]
    modules = {
        "attn_q": model.self_attn.q_proj,
        "attn_k": model.self_attn.k_proj,
        "attn_v": model.self_attn.v_proj,
        "attn_output": model.self_attn.o_proj,
        "ffn_gate": model.mlp.gate_proj,
        "ffn_up": model.mlp.up_proj,
        "ffn_down": model.mlp.down_proj,
    }
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
    added: dict[tuple[str, int], tuple[Any, Any]] = {}
    output = twin.hf.lm_head.weight.detach()
    adaptation = Adaptation(twin.architecture, SEED, 0, blocks, job.layout.offsets)
    for number, block in enumerate(blocks):
        start, end = job.layout.offsets[number : number + 2]
        part = values[start:end].reshape(block.shape)
        if block.kind == "output_rows":
            output = output.index_add(0, torch.tensor(block.rows), part)
            continue
        role = block.tensor.split(".")[2]
        if block.kind == "lora_a":  # it stands behind its B
            b, a = added[role, block.slot]
            added[role, block.slot] = (b, a + part)
            continue
        if twin.architecture == "llama" and role in heads:
            order = np.arange(block.shape[0])[:, None].astype(np.float32)
            placed = hf_gguf.interleaved(order, heads[role])[:, 0].astype(np.int64)
            part = part[torch.tensor(np.argsort(placed))]
        added[role, block.slot] = (part, torch.tensor(adaptation.fixed_a(number)))
    hooks = [
        module.register_forward_hook(
            adding([pair for (role, _), pair in added.items() if role == name])
        )
        for name, module in modules.items()
    ]
    each = [lost(twin.hf, example, output, job) for example in job.examples(job.rows_of(1))]
    for hook in hooks:
        hook.remove()
    return torch.stack(each).sum()


def adding(pairs: list[tuple[Any, Any]]) -> Callable[[Any, tuple[Any, ...], Any], Any]:
    """A hook that adds B A x to what a matrix makes of x."""

    def hook(_: Any, given: tuple[Any, ...], found: Any) -> Any:
        return found + sum(torch.outer(given[0][0] @ a, b)[None] for b, a in pairs)

    return hook


def lost(hf: Any, example: Example, output: Any, job: Job) -> Any:
    tokens = torch.tensor(example.tokens.astype(np.int64))[None]
    logits = hf.model(tokens).last_hidden_state[0, -len(example.targets) :] @ output.T
    if job.request.task.loss == "choices":
        words = job.request.task.labels.values()
        logits = logits[
            :, [job.model.tokenize(f"\nAnswer:{word}", start=False)[-1] for word in words]
        ]
    targets = torch.tensor(example.targets.astype(np.int64))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("tune_a", [True, False])
@pytest.mark.parametrize("loss", ["choices", "tokens"])
@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True)]
)
def test_the_gradient_of_each_block_is_autograds(
    a_twin: Twins, architecture: str, tied: bool, loss: str, tune_a: bool
) -> None:
    twin = a_twin(architecture, tied=tied)
    blocks = last_block(twin.path, rows=ROWS[loss], tune_a=tune_a)
    job = a_job(twin.path, loss, blocks, spread=0.2)
    closed = closed_of(job)
    sites = job.sites(closed, job.rows_of(1))
    ours, gradient = closed.gradient(sites, job.adapter.values())
    assert ours.loss.tolist() == closed.losses(sites, job.adapter.values()).loss.tolist()
    values = torch.tensor(job.adapter.values(), requires_grad=True)
    whole = in_torch(job, twin, values)
    whole.backward()
    assert ours.loss.sum() == pytest.approx(whole.item(), rel=1e-3)
    wanted = values.grad.numpy().astype(np.float64)
    for number, block in enumerate(job.adapter.manifest.blocks):
        span = slice(*job.layout.offsets[number : number + 2])
        length = np.linalg.norm(wanted[span])
        apart = np.linalg.norm(gradient[span] - wanted[span])
        assert length > 1e-3, block.tensor
        assert apart < 0.03 * length, (block.tensor, block.slot)


def test_an_exact_update_is_the_gradients_products_with_the_directions(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False)
    job = a_job(path, "choices", last_block(path, rows=ROWS["choices"]), spread=0.2)
    closed = closed_of(job)
    _, gradient = closed.gradient(job.sites(closed, job.rows_of(1)), job.adapter.values())
    request = a_probe(job)
    wanted = directions.dots(SEED, 1, [(0, 24)], gradient * job.layout.magnitudes, 0, "signs")
    told = np.frombuffer(probe(job, request).differences, "<i4") / NAT / (2 * request.eps)
    assert told == pytest.approx(wanted, abs=1e-3 * float(np.abs(wanted).max()))
    first, blocks = 3, 5  # a scope that begins and ends within the block
    part = probe(job, a_probe(job, scope=(first, blocks)))
    start, count = job.layout.span((first, blocks))
    slopes = (gradient * job.layout.magnitudes)[start : start + count]
    wanted = directions.dots(SEED, 1, [(0, 24)], slopes, start, "signs")
    told = np.frombuffer(part.differences, "<i4") / NAT / (2 * request.eps)
    assert told == pytest.approx(wanted, abs=1e-3 * float(np.abs(wanted).max()))


def test_probes_and_the_closed_form_agree(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False)
    job = a_job(path, "tokens", last_block(path, rows=ROWS["tokens"]), spread=0.1)
    exact, probed = (
        np.frombuffer(probe(job, a_probe(job, how=how)).differences, "<i4").astype(np.float64)
        for how in ("exact", "probe")
    )
    assert np.linalg.norm(exact - probed) < 0.02 * np.linalg.norm(exact)


# ---- examples side by side


@pytest.mark.parametrize("loss", ["choices", "tokens"])
def test_what_else_is_measured_changes_no_example(
    tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", "qwen3", quantized=False, shape=WIDE)
    job = a_job(path, loss, last_block(path, rows=ROWS[loss]), spread=0.2)
    closed, values = closed_of(job), job.adapter.values()
    sites = job.sites(closed, job.rows_of(1))
    assert len({len(example.tokens) for example in job.examples(job.rows_of(1))}) >= 3
    assert (
        loss == "choices"
        or len({len(example.targets) for example in job.examples(job.rows_of(1))}) > 2
    )
    whole, gradient = closed.gradient(sites, values)
    alone = [closed.gradient([one], values) for one in sites]
    assert np.concatenate([one.loss for one, _ in alone]) == pytest.approx(whole.loss, rel=1e-5)
    assert [int(one.weight[0]) for one, _ in alone] == whole.weight.tolist()
    assert [bool(one.right[0]) for one, _ in alone] == whole.right.tolist()
    apart = np.linalg.norm(sum(part for _, part in alone) - gradient)
    assert apart < 1e-4 * np.linalg.norm(gradient)
    monkeypatch.setattr(block_sites, "_AT_ONCE", 50)
    backwards, other = closed.gradient(sites[::-1], values)
    assert backwards.loss[::-1] == pytest.approx(whole.loss, rel=1e-5)
    assert np.linalg.norm(other - gradient) < 1e-4 * np.linalg.norm(gradient)


@pytest.mark.parametrize("loss", ["choices", "tokens"])
def test_a_large_model_whose_weights_are_not_kept_says_the_same(
    tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", "qwen2")
    blocks = last_block(path, rows=ROWS[loss])

    def told() -> tuple[Losses, NDArray[np.float64]]:
        job = a_job(path, loss, blocks, spread=0.2)
        closed = closed_of(job)
        return closed.gradient(job.sites(closed, job.rows_of(1)), job.adapter.values())

    kept, gradient = told()
    monkeypatch.setattr(block_weights, "_KEPT", 0)
    monkeypatch.setattr(block_weights, "_AT_ONCE", 50 * 64)  # 7 runs of the 320 output rows
    anew, other = told()
    assert anew.loss == pytest.approx(kept.loss, rel=1e-5)
    assert anew.right.tolist() == kept.right.tolist()
    assert np.linalg.norm(other - gradient) < 1e-4 * np.linalg.norm(gradient)


def test_the_sites_of_a_row_are_the_same_whatever_shared_its_pass(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False)
    job = a_job(path, "tokens", last_block(path), spread=0.2)
    closed, examples = closed_of(job), job.examples(job.rows_of(1))
    job.model.stand(np.zeros(job.layout.d, np.float32))
    together = closed.losses(closed.sites(examples), job.adapter.values()).loss
    for number, example in enumerate(examples):
        alone = closed.losses(closed.sites([example]), job.adapter.values())
        assert alone.loss[0] == pytest.approx(together[number], rel=1e-3)


# ---- models without a closed form


YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
}
WITHOUT: dict[str, dict[str, Any]] = {
    "gemma3": {"architecture": "gemma3"},
    "phi3": {"architecture": "phi3"},
    "yarn": {"entries": YARN},
    "a bias where none is known": {"also": {"blk.1.attn_output.bias": np.ones(64, np.float32)}},
    "a bias of the output": {
        "architecture": "qwen2",
        "also": {"output.bias": np.ones(320, np.float32)},
    },
    "heads told by layer": {"shape": tiny_gguf.Shape(layers=3, by_layer=True)},
    "one block": {"shape": tiny_gguf.Shape(layers=1)},
}


@pytest.mark.parametrize("case", WITHOUT)
def test_a_last_block_that_is_not_known_is_probed_and_never_exact(
    tmp_path: Path, case: str
) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False, **WITHOUT[case])
    assert LlamaEngine().inspect(str(path), [], "").last_block == []
    job = a_job(path, "choices", last_block(path)[:2], spread=0.1)
    with pytest.raises(EngineError, match="use how: probe"):
        probe(job, a_probe(job))
    probed = probe(job, a_probe(job, how="probe"))
    assert np.frombuffer(probed.differences, "<i4").any()
    digest = job.adapter.digest()
    with pytest.raises(EngineError, match="heldout"):
        evaluate(job, Evaluate("j", digest))
    assert job.losses(job.rows_of(1)).loss.tolist() == engines(job).loss.tolist()


@pytest.mark.parametrize(("kind", "of"), [(999, "type 999"), (24, "type 24"), (9, "type 9")])
def test_weights_of_a_type_that_nobody_reads_end_no_process(
    tmp_path: Path, kind: int, of: str
) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf")
    data, name = bytearray(path.read_bytes()), b"blk.1.ffn_norm.weight"
    at = data.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, kind)
    path.write_bytes(data)
    assert LlamaEngine().inspect(str(path), [], "").last_block == []
    with pytest.raises(EngineError, match=rf"ffn_norm\.weight is of {of}, .* use how: probe"):
        BlockWeights(str(path), read_header(str(path)))


def test_a_known_last_block_is_told_by_its_matrices(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", "qwen2", shape=USUAL)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    found = LlamaEngine().inspect(str(path), [], "").last_block
    assert sorted(found) == sorted(f"blk.2.{name}.weight" for name in names)


def test_lora_before_the_last_block_is_probed(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False)
    deeper = Block("lora_b", "blk.0.attn_q.weight", [64], d_in=64)
    job = a_job(path, "choices", [deeper, *last_block(path)], spread=0.1)
    with pytest.raises(EngineError, match="use how: probe"):
        probe(job, a_probe(job))


def test_a_control_vector_behind_the_last_block_is_measured_not_derived(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False)
    behind = Block("control", "blk.1", [64], layer=1)
    job = a_job(path, "choices", [*last_block(path), behind], spread=0.5)
    assert job.losses(job.rows_of(1)).loss == pytest.approx(engines(job).loss, rel=1e-3)


# ---- what a row costs


def test_sites_are_measured_once_and_data_that_grows_costs_what_is_new(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf")
    rows = rows_of("tokens", 12)
    data = write_rows(tmp_path / "rows.jsonl", rows[:9])
    heldout = write_rows(tmp_path / "heldout.jsonl", rows)
    job = a_job(path, "tokens", last_block(path), data=data, heldout=heldout)

    def tokens(count: int) -> int:
        return sum(len(example.tokens) for example in job.examples(job.heldout()[:count]))

    probe(job, a_probe(job))
    assert job.model.forwarded == tokens(9)
    job.adapter.theta += 2**20
    job.adapter.apply(1, None)
    probe(job, a_probe(job, round=2, stream_round=2))
    assert job.model.forwarded == tokens(9)
    evaluate(job, Evaluate("j", job.adapter.digest()))
    assert job.model.forwarded == tokens(12)
    write_rows(data, rows_of("tokens", 14))
    probe(job, a_probe(job, round=9, stream_round=9))
    new = job.rows_of(9)[12:]
    assert len(new) == 2
    new_tokens = sum(len(example.tokens) for example in job.examples(new))
    assert job.model.forwarded == tokens(12) + new_tokens


def test_sites_are_measured_anew_where_a_deeper_block_has_moved(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False, shape=USUAL)
    deeper = Block("control", "blk.1", [64], layer=1)
    blocks = [deeper, *last_block(path, rows=ROWS["choices"])]
    job = a_job(path, "choices", blocks, spread=0.0)
    still = job.losses(job.rows_of(1)).loss
    sent = job.model.forwarded
    job.adapter.theta[:] = 2**22
    moved = job.losses(job.rows_of(1)).loss
    assert job.model.forwarded == 2 * sent
    assert np.abs(moved - still).max() > 0.1
    assert moved == pytest.approx(engines(job).loss, rel=2e-3)


LIMIT = 20_000


class Small(SiteCache):
    """Room for a few rows."""

    def __init__(self) -> None:
        super().__init__(LIMIT)


def kept_bytes(job: Job) -> int:
    cache = job._cache  # pyright: ignore[reportPrivateUsage]
    return sum(kept.size_bytes for row in job.rows_of(1) if (kept := cache.get(row)) is not None)


def test_what_is_kept_of_a_row_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", quantized=False)
    monkeypatch.setattr("shared.engine.job.SiteCache", Small)
    job = a_job(path, "choices", last_block(path), spread=0.1)
    wanted = job.losses(job.rows_of(1)).loss
    sent = job.model.forwarded
    assert job.losses(job.rows_of(1)).loss == pytest.approx(wanted, rel=1e-3)
    assert sent < job.model.forwarded <= 2 * sent
    assert kept_bytes(job) <= LIMIT
