"""What tuning costs a device: speed and memory beside running a 118 MB model, and the daemon's own.

Baseline of the speeds: llama_decode alone, of the same batches of 512 tokens with the same logits
read, in the same process, alternating with the probes. A probe's time is all of it: tokens,
directions, rewritten adapters, decoding, losses. Times are the process's own CPU seconds, of one
thread: other work on the machine does not count. Baseline of the memory: a process that decodes.

Backpropagation: LoRA of the same rank on the same matrices, by torch, peft and AdamW, on a model of
the same shape and a batch of as many rows and tokens, with logits at the last position alone. torch
cannot train through Q8_0, so its weights are bfloat16 or float32, whichever peaks lower; without
gradient checkpointing, which would trade a further pass for activations. Its peak holds torch
itself, as ours holds llama.cpp: `edge.backprop_framework_mb` says how much that is.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as typed

from deploy.demo.processes import Child
from shared import adapter
from shared.broker import start_broker
from shared.codec import encode_manifest
from shared.engine import layout
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine
from shared.engine.model import Example
from shared.engine.probing import probe
from shared.engine.process import EngineProcess
from shared.engine.protocol import Apply, Evaluate, Opened, OpenJob, Probe, Standing
from shared.messages import Block, Commit, Manifest, Task, Variant
from tests.bench.figure import Figure
from tests.support import tiny_gguf

native: Any = typed
SHAPE = tiny_gguf.Shape(
    width=1024, layers=8, heads=16, kv_heads=8, feed_forward=2816, vocabulary=8192
)
RANK = 8
ROWS, TOKENS_A_ROW = 8, 64
PAIRS, PROBES = 4, 3
TASK = Task("choices", "{text} Answer:", {"0": " a", "1": " b"}, max_tokens=TOKENS_A_ROW)
TIMEOUT_S = 600.0


async def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny_gguf.write(Path(folder) / "model.gguf", shape=SHAPE))
        data = Path(folder) / "rows.jsonl"
        rows = [{"text": f"{n} the other bear " * 20, "label": n % 2} for n in range(ROWS)]
        data.write_text("\n".join(map(json.dumps, rows)))
        found = [
            *_speeds("cvec", model, str(data), 0.95),
            *_speeds("lora", model, str(data), 0.90),
        ]
        training = await _training_mb(model, str(data))
        inference = float(_in_a_process("inference", model))
        peaks = [json.loads(_in_a_process("backprop", kind)) for kind in ("bfloat16", "float32")]
        agent, bare = await _agent_rss_mb(Path(folder), data)
    framework, backprop = min(peaks, key=lambda one: one[1])
    return [
        *found,
        Figure("edge.memory_ratio", training / inference, "ratio", 1.0, target=1.1),
        Figure("edge.agent_rss_mb", agent, "MB", bare, target=60),
        Figure("edge.training_peak_mb", training, "MB", inference),
        Figure("edge.backprop_memory_ratio", backprop / inference, "ratio", training / inference),
        Figure("edge.backprop_peak_mb", backprop, "MB", training),
        Figure("edge.backprop_framework_mb", framework, "MB"),
    ]


def _speeds(kind: str, model: str, data: str, target: float) -> list[Figure]:
    probing, plain, ratio = json.loads(_in_a_process("speed", model, data, kind))
    return [
        Figure(f"edge.speed_ratio_{kind}", ratio, "ratio", 1.0, target=target),
        Figure(f"edge.probing_{kind}", probing, "tokens/s", plain),
    ]


def _in_a_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.bench.edge", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _blocks(kind: str) -> list[Block]:
    if kind == "cvec":
        return [Block("control", "", [SHAPE.width], layer=n) for n in range(1, SHAPE.layers)]
    kv = SHAPE.width // SHAPE.heads * SHAPE.kv_heads
    return [
        Block("lora_b", f"blk.{layer}.{name}.weight", [outs], slot=slot, d_in=SHAPE.width)
        for layer in range(SHAPE.layers)
        for name, outs in (("attn_q", SHAPE.width), ("attn_v", kv))
        for slot in range(RANK)
    ]


def _opening(kind: str, model: str, data: str) -> OpenJob:
    blocks = _blocks(kind)
    manifest = Manifest(
        epoch=0,
        architecture="llama",
        seed=7,
        blocks=blocks,
        variants=[Variant("0" * 64, 1, "random")],
        d=sum(block.shape[0] for block in blocks),
    )
    return OpenJob(
        job="bench",
        manifest=encode_manifest(manifest),
        task=TASK,
        model=model,
        data=data,
        heldout=data,
        device="bench",
    )


def _probing(digest: str, blocks: int, first: int, count: int = PROBES) -> Probe:
    return Probe(
        job="bench",
        round=1,
        stream_round=1,
        how="probe",
        ranges=[(first, count)],
        eps=0.01,
        batch_rows=ROWS,
        scope=(0, blocks),
        digest=digest,
    )


def _speed(model: str, data: str, kind: str) -> tuple[float, float, float]:
    """Tokens a second of probing and of plain decoding, and the median of their ratios by pairs."""
    job = Job(_opening(kind, model, data), LlamaEngine())
    batches = layout.batches(job.examples(job.rows_of(0)[:ROWS]), 512, ROWS, ROWS)
    tokens = sum(len(batch.tokens) for batch in batches)
    decode = _plain_decoder(model)
    digest, blocks = job.adapter.digest(), len(_blocks(kind))
    decode(batches)
    probe(job, _probing(digest, blocks, 0))
    seconds: list[tuple[float, float]] = []
    for pair in range(PAIRS):
        began = time.process_time()
        for _ in range(2 * PROBES):
            decode(batches)
        between = time.process_time()
        probe(job, _probing(digest, blocks, pair * PROBES))  # two passes each: S0 is known
        seconds.append((between - began, time.process_time() - between))
    sent = 2 * PROBES * tokens
    plain = statistics.median(sent / one for one, _ in seconds)
    probing = statistics.median(sent / other for _, other in seconds)
    return probing, plain, statistics.median(one / other for one, other in seconds)


def _plain_decoder(path: str) -> Callable[[list[layout.Batch]], None]:
    """Decodes batches with llama.cpp and nothing else; reads one logit of each."""
    wanted = native.llama_model_default_params()
    wanted.n_gpu_layers = 0
    model = native.llama_model_load_from_file(path.encode(), wanted)
    settings = native.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_seq_max = ROWS
    settings.n_threads = settings.n_threads_batch = 1
    settings.kv_unified = True
    context = native.llama_init_from_model(model, settings)
    sent = native.llama_batch_init(512, 0, 1)

    def decode(batches: list[layout.Batch]) -> None:
        for batch in batches:
            sent.n_tokens = len(batch.tokens)
            for n in range(sent.n_tokens):
                sent.token[n], sent.pos[n] = int(batch.tokens[n]), int(batch.positions[n])
                sent.n_seq_id[n], sent.seq_id[n][0] = 1, int(batch.sequences[n])
                sent.logits[n] = int(batch.read[n])
            native.llama_memory_clear(native.llama_get_memory(context), False)
            if native.llama_decode(context, sent):
                raise RuntimeError("llama.cpp could not decode")
            native.llama_get_logits(context)[0]

    return decode


def _inference_mb(model: str) -> float:
    """Peak memory of a process that decodes as many tokens, MB."""
    random = np.random.default_rng(1)
    examples = [
        Example(random.integers(5, 300, TOKENS_A_ROW).astype(np.int32), np.zeros(1, np.int32))
        for _ in range(ROWS)
    ]
    decode = _plain_decoder(model)
    for _ in range(4):
        decode(layout.batches(examples, 512, ROWS, ROWS))
    return _peak_mb()


def _backprop_mb(dtype: str) -> tuple[float, float]:
    """Peak memory of a process before it has a model, and after steps of backpropagation, MB."""
    import torch  # only this process needs them
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    framework = _peak_mb()
    shape = LlamaConfig(
        hidden_size=SHAPE.width,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        intermediate_size=SHAPE.feed_forward,
        vocab_size=SHAPE.vocabulary,
        max_position_embeddings=SHAPE.context,
        tie_word_embeddings=False,
    )
    lora = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"])
    model: Any = get_peft_model(LlamaForCausalLM(shape), lora)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for _ in range(4):
        tokens = torch.randint(5, 300, (ROWS, TOKENS_A_ROW))
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, 0, :2]
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(ROWS) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return framework, _peak_mb()


def _peak_mb() -> float:
    """Highest resident memory of this process, MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return float(peak.split()[1]) / 1024


async def _training_mb(model: str, data: str) -> float:
    """Peak memory of an engine's child that probes, commits and evaluates at d of about 1e5, MB."""
    opening = _opening("lora", model, data)
    scope = (0, len(_blocks("lora")))
    engine = EngineProcess("llama")
    opened = await engine.ask(opening, timeout_s=TIMEOUT_S)
    assert isinstance(opened, Opened)
    await engine.ask(_probing(opened.digest, scope[1], 0, 4), timeout_s=TIMEOUT_S)
    coefficients = np.full(512, 1000)
    commit = Commit(0, [adapter.term(1, scope, [(0, 512)], coefficients)])
    moved = await engine.ask(Apply(job="bench", round=1, commit=commit), timeout_s=TIMEOUT_S)
    assert isinstance(moved, Standing)
    await engine.ask(_probing(moved.digest, scope[1], 0, 2), timeout_s=TIMEOUT_S)
    await engine.ask(Evaluate(job="bench", digest=moved.digest), timeout_s=TIMEOUT_S)
    await engine.close()
    return engine.peak_rss_mb


async def _agent_rss_mb(folder: Path, data: Path) -> tuple[float, float]:
    """Peak memory of a connected daemon without work, and of a bare NATS client, MB."""
    async with start_broker(folder / "nats") as broker:
        at = ["--servers", broker.url, "--state-dir", str(folder / "state")]
        daemon = Child(
            "agent", "edge_client", ["--device", "agent", *at, "--data", str(data)], folder / "log"
        )
        bare = Child("bare", "deploy.demo.outsider", [broker.url], folder / "log")
        for child in (daemon, bare):
            await child.start()
        await asyncio.sleep(10)
        for child in (daemon, bare):
            child.measure()
            await child.stop()
    return daemon.peak_rss_mb, bare.peak_rss_mb


def main() -> None:
    what, *arguments = sys.argv[1:]
    measures: dict[str, Callable[..., object]] = {
        "speed": _speed,
        "inference": _inference_mb,
        "backprop": _backprop_mb,
    }
    sys.stdout.write(json.dumps(measures[what](*arguments)))


if __name__ == "__main__":
    main()
