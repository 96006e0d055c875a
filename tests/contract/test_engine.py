"""What every engine must do, asked through the child process of both."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from shared import adapter
from shared.adapter import Adapter
from shared.codec import encode_manifest
from shared.engine.process import EngineProcess
from shared.engine.protocol import (
    Apply,
    CloseJob,
    Done,
    Evaluate,
    Evaluated,
    Facts,
    Inspect,
    Opened,
    OpenJob,
    Probe,
    Probed,
    Restore,
    Standing,
    Walk,
    Walked,
)
from shared.errors import EngineDied, EngineError
from shared.messages import Block, Commit, Manifest, ProbeResult, Task, Variant
from shared.messages import Walk as Walking
from tests.support import tiny_gguf
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
TASK = Task("choices", "{text}\nAnswer:", {"0": " a", "1": " b", "2": " the"}, max_tokens=64)
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Bench:
    """One engine's child, a model for it, and data."""

    kind: str
    engine: EngineProcess
    model: str
    data: str
    facts: Facts

    @property
    def output_rows(self) -> Block:
        rows, width = self.facts.tokens, self.facts.n_embd
        return Block("output_rows", "output.weight", [len(rows), width], rows=rows)

    @property
    def lora(self) -> list[Block]:
        name = "blk.0.mix.weight" if self.kind == "fake" else "blk.0.attn_q.weight"
        d_out, d_in = self.facts.matrices[name]
        return [Block("lora_b", name, [d_out], slot=slot, d_in=d_in) for slot in range(2)]

    @property
    def control(self) -> Block:
        return Block("control", "", [self.facts.n_embd], layer=1)

    @property
    def prompt(self) -> Block:
        shape = [3, self.facts.n_embd]
        return Block("prompt", "token_embd.weight", shape, rows=[5, 6, 7], unit=1.0)

    async def open(self, *blocks: Block, **changes: object) -> Opened:
        request = OpenJob(
            job="j",
            manifest=a_manifest(self.facts.architecture, *blocks),
            task=TASK,
            model=self.model,
            data=self.data,
            heldout=self.data,
            device="dev",
        )
        request = msgspec.structs.replace(request, **changes)
        answer = await self.engine.ask(request, timeout_s=TIMEOUT_S)
        assert isinstance(answer, Opened)
        return answer

    async def probe(self, digest: str, **changes: object) -> Probed:
        request = Probe(
            job="j",
            round=1,
            stream_round=1,
            how="probe",
            ranges=[(0, 4), (9, 2)],
            eps=1e-3,
            batch_rows=8,
            scope=(0, 1),
            digest=digest,
        )
        request = msgspec.structs.replace(request, **changes)
        answer = await self.engine.ask(request, timeout_s=TIMEOUT_S)
        assert isinstance(answer, Probed)
        return answer

    async def evaluate(self, digest: str) -> Evaluated:
        answer = await self.engine.ask(Evaluate(job="j", digest=digest), timeout_s=TIMEOUT_S)
        assert isinstance(answer, Evaluated)
        return answer


def a_manifest(architecture: str, *blocks: Block) -> bytes:
    return encode_manifest(
        Manifest(
            epoch=0,
            architecture=architecture,
            seed=11,
            blocks=list(blocks),
            variants=[Variant("0" * 64, 1, "tiny")],
            d=sum(int(np.prod(block.shape)) for block in blocks),
        )
    )


def differences(result: ProbeResult) -> NDArray[np.int32]:
    return np.frombuffer(result.differences, "<i4")


@pytest.fixture(params=["fake", "llama"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    data = tmp_path / "rows.jsonl"
    texts = ["then he ran in", "the other bear", "in a bin"]
    data.write_bytes(
        b"\n".join(
            msgspec.json.encode({"text": f"{texts[n % 3]} {n}", "label": n % 3}) for n in range(24)
        )
    )
    model = "fake"
    if request.param == "llama":
        model = str(tiny_gguf.write(tmp_path / "tiny.gguf", quantized=False))
    engine = EngineProcess(request.param)
    words = list(TASK.labels.values())
    facts = await engine.ask(
        Inspect(path=model, words=words, template=TASK.template), timeout_s=TIMEOUT_S
    )
    assert isinstance(facts, Facts)
    yield Bench(request.param, engine, model, str(data), facts)
    await engine.close()


async def test_inspect_says_what_a_job_needs(bench: Bench) -> None:
    facts = bench.facts
    assert len(set(facts.tokens)) == 3
    assert facts.matrices["output.weight"] == [facts.n_vocab, facts.n_embd]
    assert not facts.tied
    assert facts.n_ctx_train >= 1024
    assert facts.parameters > facts.n_vocab * facts.n_embd


async def test_a_job_opens_moves_and_resumes_like_the_adapter_everyone_holds(
    bench: Bench, tmp_path: Path
) -> None:
    opened = await bench.open(bench.output_rows)
    witness = Adapter.fresh(a_manifest(bench.facts.architecture, bench.output_rows))
    assert opened.digest == witness.digest()
    assert (opened.rows, opened.heldout_rows, opened.refused_rows) == (24, 24, 0)
    commit = Commit(0, [adapter.term(1, (0, 1), [(0, 2)], np.array([2**20, -(2**19)]))])
    witness.apply(1, commit)
    moved = await bench.engine.ask(Apply(job="j", round=1, commit=commit), timeout_s=TIMEOUT_S)
    assert moved == Standing(round=1, digest=witness.digest())
    at_theta = await bench.evaluate(witness.digest())
    (tmp_path / "snapshot").write_bytes(witness.to_bytes())
    await bench.open(bench.output_rows)
    restored = await bench.engine.ask(
        Restore(job="j", path=str(tmp_path / "snapshot")), timeout_s=TIMEOUT_S
    )
    assert restored == moved
    assert (await bench.evaluate(witness.digest())).result == at_theta.result
    assert await bench.engine.ask(CloseJob(job="j"), timeout_s=TIMEOUT_S) == Done()


async def test_the_same_work_twice_gives_the_same_integers(bench: Bench) -> None:
    opened = await bench.open(*bench.lora, bench.control)
    first = await bench.probe(opened.digest, scope=(0, 3))
    assert differences(first.result).any()
    assert first.result == (await bench.probe(opened.digest, scope=(0, 3))).result
    again = await bench.open(*bench.lora, bench.control)
    assert first.result == (await bench.probe(again.digest, scope=(0, 3))).result


async def test_the_first_step_of_a_walk_is_a_probe_and_the_engine_stays(bench: Bench) -> None:
    opened = await bench.open(*bench.lora)
    asked = Walk(
        job="j",
        round=1,
        part=0,
        stream_round=0,
        directions=64,
        walk=Walking(steps=1, step=0.1, held=1e3),
        eps=1e-3,
        batch_rows=4096,
        scope=(0, 2),
        digest=opened.digest,
    )
    walked = await bench.engine.ask(asked, timeout_s=TIMEOUT_S)
    assert isinstance(walked, Walked)
    result = walked.result
    assert (result.steps, result.share, result.dropped) == (1, opened.rows, 0)
    probed = await bench.probe(
        opened.digest, stream_round=0, ranges=result.ranges, batch_rows=4096, scope=(0, 2)
    )
    told = np.frombuffer(result.differences, "<i4") * probed.result.weight
    assert told == pytest.approx(differences(probed.result), abs=probed.result.weight / 2 + 1)
    longer = msgspec.structs.replace(asked, walk=Walking(steps=12, step=0.1), batch_rows=2)
    walked = await bench.engine.ask(longer, timeout_s=TIMEOUT_S)
    assert isinstance(walked, Walked)
    assert walked.result.steps == 12
    assert walked.passes > 0
    again = await bench.engine.ask(longer, timeout_s=TIMEOUT_S)
    assert isinstance(again, Walked)
    assert again.result == walked.result


async def test_exact_is_what_the_probes_differences_tend_to(bench: Bench) -> None:
    opened = await bench.open(*bench.lora, bench.output_rows)
    probed = await bench.probe(opened.digest, scope=(2, 1))
    exact = await bench.probe(opened.digest, scope=(2, 1), how="exact")
    assert differences(probed.result) == pytest.approx(differences(exact.result), rel=0.01, abs=200)
    assert probed.result.loss == pytest.approx(exact.result.loss, rel=1e-5)
    assert probed.passes > exact.passes > 0
    assert (await bench.probe(opened.digest, scope=(2, 1), how="exact")).passes == 0


async def test_evaluations_from_sites_and_from_passes_agree(bench: Bench) -> None:
    opened = await bench.open(bench.output_rows)
    from_sites = await bench.evaluate(opened.digest)
    assert (await bench.evaluate(opened.digest)).passes == 0
    opened = await bench.open(bench.control)
    from_passes = await bench.evaluate(opened.digest)
    assert from_passes.result.loss == pytest.approx(from_sites.result.loss, rel=1e-5)
    assert from_passes.result.correct == from_sites.result.correct
    assert from_passes.result.weight == from_passes.result.examples == 24


async def test_rows_of_prompt_and_completion_are_weighed_by_their_tokens(
    bench: Bench, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"in the {n}", "completion": " bin a b"} for n in range(4)]
    data.write_bytes(b"\n".join([*map(msgspec.json.encode, rows), b'{"prompt": "x"}']))
    opened = await bench.open(
        bench.control, data=str(data), heldout=str(data), task=Task("tokens", max_tokens=64)
    )
    assert (opened.rows, opened.refused_rows) == (4, 2)
    assert opened.refused[0] == f"{data}:5: field completion is missing"
    probed = await bench.probe(opened.digest, batch_rows=4)
    assert probed.result.weight > 2 * 4
    evaluated = await bench.evaluate(opened.digest)
    assert evaluated.result.weight == probed.result.weight
    assert evaluated.result.loss == pytest.approx(probed.result.loss / 2**20, rel=1e-6)


async def test_a_refusal_costs_nothing_else(bench: Bench) -> None:
    opened = await bench.open(bench.control)
    generation = bench.engine.generation
    with pytest.raises(EngineError, match="catch up first"):
        await bench.evaluate("0" * 64)
    with pytest.raises(EngineError, match="job other is not open"):
        await bench.probe(opened.digest, job="other")
    with pytest.raises(EngineError, match="scope"):
        await bench.probe(opened.digest, scope=(0, 9))
    with pytest.raises(EngineError, match=r"gone\.jsonl: cannot be read"):
        await bench.open(bench.control, job="other", data="gone.jsonl")
    await bench.evaluate(opened.digest)
    assert bench.engine.generation == generation


async def test_a_child_that_dies_costs_one_request(bench: Bench) -> None:
    opened = await bench.open(bench.control)
    pid = bench.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGABRT)
    with pytest.raises(EngineDied, match="SIGABRT"):
        await bench.evaluate(opened.digest)
    assert bench.engine.pid is None
    with pytest.raises(EngineError, match="not open"):
        await bench.evaluate(opened.digest)
    assert bench.engine.generation == 2
    again = await bench.open(bench.control)
    await bench.evaluate(again.digest)
    assert bench.engine.peak_rss_mb > 10


async def test_an_abort_in_the_middle_of_a_pass_costs_one_request(tmp_path: Path) -> None:
    engine = EngineProcess("fake")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}')
    bench = Bench("fake", engine, "fake:abort", str(tmp_path / "rows.jsonl"), a_fact())
    opened = await bench.open(bench.control)
    with pytest.raises(EngineDied, match="SIGABRT during Probe"):
        await bench.probe(opened.digest)
    marker, model = tmp_path / "once", tmp_path / "model.json"
    marker.touch()
    model.write_bytes(msgspec.json.encode({"abort_file": str(marker)}))
    with pytest.raises(EngineDied):
        await bench.probe((await bench.open(bench.control, model=str(model))).digest)
    await bench.probe((await bench.open(bench.control, model=str(model))).digest)
    await engine.close()


async def test_a_child_that_hangs_or_is_no_longer_wanted_is_ended(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}')
    model = tmp_path / "slow.json"
    model.write_text('{"delay_s": 60}')
    engine = EngineProcess("fake")
    bench = Bench("fake", engine, str(model), str(tmp_path / "rows.jsonl"), a_fact())
    opened = await bench.open(bench.control)
    with pytest.raises(EngineDied, match=r"did not answer Evaluate within 0\.2 s"):
        await engine.ask(Evaluate(job="j", digest=opened.digest), timeout_s=0.2)
    opened = await bench.open(bench.control)
    pid = engine.pid
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await bench.evaluate(opened.digest)
    assert engine.pid is None
    await engine.close()
    assert pid is not None
    assert not is_running(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal is Linux's own")
async def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    script, told = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(
        "import asyncio, pathlib, sys\n"
        "from shared.engine.process import EngineProcess\n"
        "from shared.engine.protocol import Inspect\n"
        "async def main():\n"
        "    engine = EngineProcess('fake')\n"
        "    await engine.ask(Inspect(path='fake'), timeout_s=30)\n"
        "    pathlib.Path(sys.argv[1]).write_text(f'{engine.pid}.')\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(script), str(told)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    await wait_until(lambda: told.exists() and told.read_text().endswith("."), timeout_s=30)
    pid = int(told.read_text()[:-1])
    assert is_running(pid)
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not is_running(pid))


def test_the_daemon_s_side_imports_neither_numpy_nor_llama_cpp() -> None:
    code = (
        "import sys, shared.engine.process\n"
        "assert not {'numpy', 'llama_cpp'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def a_fact() -> Facts:
    return Facts("fake", 32, 1, 1024, 1024, tied=False, matrices={}, tokens=[2, 3, 4])


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="../shared/models is not here")
@pytest.mark.parametrize("file", ["q8_0.gguf", "q4_k_m.gguf"])
async def test_exact_agrees_with_probes_on_a_trained_quantized_model(
    tmp_path: Path, file: str
) -> None:
    model = str(SHARED / "models" / "llama-1m" / file)
    task = Task(
        "choices",
        "{text}\nTopic:",
        {"0": " World", "1": " Sports", "2": " Business", "3": " Technology"},
        max_tokens=128,
    )
    data = tmp_path / "news.jsonl"
    with (SHARED / "data" / "ag_news" / "train.jsonl").open() as news:
        data.write_text("".join(line for line, _ in zip(news, range(16), strict=False)))
    engine = EngineProcess("llama")
    words = list(task.labels.values())
    facts = await engine.ask(
        Inspect(path=model, words=words, template=task.template), timeout_s=TIMEOUT_S
    )
    assert isinstance(facts, Facts)
    bench = Bench("llama", engine, model, str(data), facts)
    opened = await bench.open(bench.output_rows, task=task)
    probed = await bench.probe(opened.digest, ranges=[(0, 8)], eps=2e-3, batch_rows=16)
    exact = await bench.probe(opened.digest, ranges=[(0, 8)], eps=2e-3, batch_rows=16, how="exact")
    wanted = differences(exact.result)
    noise = 0.02 * float(np.sqrt(np.mean(wanted.astype(float) ** 2)))
    assert differences(probed.result) == pytest.approx(wanted, rel=0.02, abs=noise)
    await engine.close()


async def test_probes_of_a_soft_prompt_send_a_batchs_texts_once(bench: Bench) -> None:
    opened = await bench.open(bench.prompt)
    first = await bench.probe(opened.digest, ranges=[(0, 1)])
    again = await bench.probe(opened.digest, ranges=[(1, 6)])
    rows, prompt = 8, 3
    assert again.passes == 2 * 6 * rows * prompt
    texts = first.passes - 3 * rows * prompt  # at theta, and to both sides of it
    assert texts > rows * prompt
    assert differences(again.result).any()
    other = await bench.probe(opened.digest, round=2, ranges=[(1, 6)])
    assert other.passes > 13 * rows * prompt  # other rows


async def test_a_soft_prompt_is_asked_for_by_its_text(bench: Bench) -> None:
    question = Inspect(path=bench.model, template="{text}\nAnswer:", prompt=" in the")
    facts = await bench.engine.ask(question, timeout_s=TIMEOUT_S)
    assert isinstance(facts, Facts)
    assert len(facts.prompt) >= 2
    assert all(0 <= token < facts.n_vocab for token in facts.prompt)
    assert 0.01 < facts.prompt_rms < 100
