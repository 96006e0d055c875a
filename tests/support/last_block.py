"""Jobs whose adapter is LoRA on every matrix of a small model's last block, and output rows."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from shared.adapter import Layout
from shared.codec import encode_manifest
from shared.engine.gguf_file import read_header
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine
from shared.engine.protocol import OpenJob, Probe
from shared.messages import Block, Manifest, Task, Variant

SEED = 5
LABELS = {"0": " a", "1": " b", "2": " the"}
TASKS = {
    "choices": Task("choices", "{text}\nAnswer:", LABELS, max_tokens=64),
    "tokens": Task("tokens", max_tokens=64),
}
ROWS = {"choices": [257, 258, 263, 40], "tokens": [257, 70, 33, 16]}
"""Output rows to adapt: the labels' tokens and one that is no choice; tokens of the completions."""

_SAID = ("then he ran in", "the other bear sat there in the bin and ate", "in a bin")


def rows_of(loss: str, count: int = 10) -> list[dict[str, str]]:
    """Rows of different lengths, no two alike."""
    texts = [f"{_SAID[number % 3]} {number}" for number in range(count)]
    if loss == "choices":
        return [{"text": text, "label": str(number % 3)} for number, text in enumerate(texts)]
    ends = [" a bin" * (number % 4) + "." for number in range(count)]
    return [{"prompt": text, "completion": end} for text, end in zip(texts, ends, strict=True)]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def last_block(
    path: Path, *, rank: int = 2, rows: Sequence[int] = (), tune_a: bool = True
) -> list[Block]:
    """LoRA on each matrix of the last block of the model at `path`, and its output rows `rows`.

    The blocks' scales differ, the rows are in two blocks, and with `tune_a` each LoRA's A moves in
    all slots but the first.
    """
    header = read_header(str(path))
    prefix = f"blk.{int(header.number('block_count')) - 1}."
    blocks: list[Block] = []
    for name, shape in sorted(header.tensors.items()):
        if name.startswith(prefix) and len(shape) == 2:
            for slot in range(rank):
                blocks.append(
                    Block("lora_b", name, [shape[1]], slot=slot, d_in=shape[0], scale=slot)
                )
                if tune_a and slot:
                    blocks.append(Block("lora_a", name, [shape[0]], slot=slot))
    width = int(header.number("embedding_length"))
    parts = [list(rows[:1]), list(rows[1:])] if rows else []
    return blocks + [
        Block("output_rows", "output.weight", [len(part), width], rows=part, scale=1)
        for part in parts
    ]


def a_job(
    path: Path,
    loss: str,
    blocks: Sequence[Block],
    *,
    data: Path | None = None,
    heldout: Path | None = None,
    spread: float = 0.0,
) -> Job:
    """A device's job on llama.cpp, its theta random with entries of about `spread`."""
    architecture = read_header(str(path)).architecture
    made = Manifest(0, architecture, SEED, list(blocks), [Variant("0" * 64, 1, "tiny")], 1)
    made = msgspec.structs.replace(made, d=Layout(made).d)
    data = data or write_rows(path.with_name(f"{loss}.jsonl"), rows_of(loss))
    request = OpenJob(
        job="j",
        manifest=encode_manifest(made),
        task=TASKS[loss],
        model=str(path),
        data=str(data),
        heldout=str(heldout or ""),
        device="a",
    )
    job = Job(request, LlamaEngine())
    random = np.random.default_rng(3).standard_normal(made.d)
    job.adapter.theta[:] = (spread * 2**24 * random).astype(np.int32)
    return job


def a_probe(job: Job, **changes: object) -> Probe:
    """An exact round of all rows and 24 directions over every block."""
    request = Probe(
        job="j",
        round=1,
        stream_round=1,
        how="exact",
        ranges=[(0, 24)],
        eps=0.01,
        batch_rows=64,
        scope=job.layout.everything,
        digest=job.adapter.digest(),
    )
    return msgspec.structs.replace(request, **changes)
