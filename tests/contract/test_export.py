"""What is exported says in stock llama.cpp, transformers and peft what the fleet's adapter says.

The models are random, in float32 on both sides and with a float32 cache, so that what remains is
the order of additions: 4e-6 of logits around 4. Gemma's activation is a half-precision table in
llama.cpp, which alone makes 2e-3.
"""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from services.console.export import card, control_vector, gguf_lora, peft_folder
from services.console.export.command import Form, write
from services.console.export.history import History
from services.console.export.tuned import Base, Tuned
from services.console.failure import Failure
from shared.adapter import Adapter, Layout
from shared.blobs import reference
from shared.codec import encode_manifest
from shared.engine.gguf_file import read_header
from shared.engine.llama import LlamaEngine
from shared.engine.llama_adapters import Control, Lora
from shared.engine.model import Example
from shared.messages import Block, EpochOpened, JobSpec, Manifest, RoundClosed, Task, Variant
from tests.support import hf_gguf, tiny_gguf
from tests.support.hf_gguf import SHAPE, Twin, logits, torch

peft: Any = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model .* .tie_word_embeddings=True. and:UserWarning"),
]

ROWS = [12, 40, 77]
TOKENS = np.array([5, *ROWS, 9, 12, 100, 3, 250, 61, 77, 18, 7, 7, 200, 33], np.int32)
"""The adapted rows' own tokens are among them: a merge that moves embeddings shows."""
FAR = 0.2
"""Logits that are further apart than that are another adapter's."""

Twins = Callable[..., Twin]


@pytest.fixture(scope="module")
def a_twin(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    folder = tmp_path_factory.mktemp("models")

    def build(architecture: str, *, tied: bool = False) -> Twin:
        return hf_gguf.twin(folder, architecture, tied=tied)

    return build


def noise(architecture: str) -> float:
    return 1e-2 if architecture == "gemma3" else 5e-5


def loras(twin: Twin) -> list[Block]:
    """Every matrix of layer 1 and the attention's of layer 0, of two ranks; some rows of A move."""
    blocks: list[Block] = []
    for name, shape in read_header(str(twin.path)).tensors.items():
        if name.startswith("blk.") and len(shape) == 2 and not name.startswith("blk.0.ffn"):
            rank = 2 if "ffn" in name else 3
            d_in, d_out = shape
            blocks += [Block("lora_b", name, [d_out], slot=n, d_in=d_in) for n in range(rank)]
            if name.startswith("blk.1."):
                blocks.append(Block("lora_a", name, [d_in], slot=1))
    return blocks


def some_rows() -> Block:
    return Block("output_rows", "output.weight", [len(ROWS), SHAPE.width], rows=ROWS)


def a_control() -> Block:
    return Block("control", "blk.1", [SHAPE.width], layer=1)


def a_tuned(twin: Twin, *blocks: Block, task: Task | None = None) -> Tuned:
    """An adapter of `blocks` with random numbers."""
    ref = reference(twin.path)
    variant = Variant(ref.digest, ref.size_bytes, twin.path.name)
    manifest = Manifest(0, twin.architecture, 7, list(blocks), [variant], 1)
    manifest = msgspec.structs.replace(manifest, d=Layout(manifest).d)
    data = encode_manifest(manifest)
    adapter = Adapter(data)
    theta = 0.2 * np.random.default_rng(2).standard_normal(manifest.d)
    adapter.theta = (theta * 2**24).astype(np.int32)
    adapter.round = 1
    spec = JobSpec(task=task or Task(loss="tokens"))
    history = History("job", spec, EpochOpened(job="job", epoch=0, manifest=data, digest="0" * 64))
    closed = RoundClosed(
        job="job",
        epoch=0,
        round=1,
        reason="enough",
        commit=None,
        digest=adapter.digest(),
        detail_sequence=1,
    )
    history.evolve(closed)
    return Tuned("job", spec, adapter, Base(variant, read_header(str(twin.path))), history)


def stock(twin: Twin, **options: Any) -> llama_cpp.Llama:
    """The model as a user of llama-cpp-python loads it, with a float32 cache."""
    return llama_cpp.Llama(
        str(twin.path),
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        logits_all=True,
        verbose=False,
        **options,
    )


def said(model: llama_cpp.Llama) -> NDArray[np.float32]:
    """Logits after each of TOKENS: (n, n_vocab)."""
    model.reset()
    model.eval(TOKENS.tolist())
    return model.scores[: len(TOKENS)].copy()


def fleet(twin: Twin, tuned: Tuned) -> NDArray[np.float32]:
    """What a device's adapter makes of the same model."""
    model = stock(twin)
    pointer, context = model._model.model, model._ctx.ctx  # pyright: ignore[reportPrivateUsage]
    lora = Lora(pointer, context, tuned.base.header, tuned.blocks)
    lora.set(tuned.adapter.values())
    Control(context, pointer, tuned.blocks).set(tuned.adapter.values())
    found = said(model)
    lora.close()
    return found


def apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_the_fleet_s_logits_come_out_of_stock_llama_cpp_and_of_peft(
    a_twin: Twins, tmp_path: Path, architecture: str
) -> None:
    twin = a_twin(architecture)
    base = said(stock(twin))
    assert apart(base, logits(twin.hf, TOKENS)) < noise(architecture)

    tuned = a_tuned(twin, *loras(twin), some_rows())
    write(tuned, tmp_path, [], "f32")
    wanted = fleet(twin, tuned)
    assert apart(wanted, base) > FAR
    lora = said(stock(twin, lora_path=str(tmp_path / "job-lora.gguf")))
    assert apart(lora, wanted) < 5e-5
    loaded = peft.PeftModel.from_pretrained(twin.hf, tmp_path / "peft")
    assert apart(logits(loaded, TOKENS), wanted) < noise(architecture)
    merged = loaded.merge_and_unload()
    assert apart(logits(merged, TOKENS), wanted) < noise(architecture)


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_a_device_s_losses_are_those_of_the_exported_folder(
    a_twin: Twins, tmp_path: Path, architecture: str
) -> None:
    twin = a_twin(architecture)
    tuned = a_tuned(twin, *loras(twin), some_rows())
    peft_folder.write(tuned, tmp_path)
    said = logits(peft.PeftModel.from_pretrained(twin.hf, tmp_path / "peft"), TOKENS)
    targets = TOKENS[-4:]
    last = torch.tensor(said[-5:-1])
    wanted = torch.nn.functional.cross_entropy(last, torch.tensor(targets).long(), reduction="sum")
    device = LlamaEngine().open(str(twin.path), tuned.blocks, 1, 64)
    device.stand(tuned.adapter.values())
    measured = device.measure([Example(TOKENS[:-1].copy(), targets.copy())])
    device.close()
    # A device's cache is in half precision.
    assert measured.loss[0] == pytest.approx(float(wanted), abs=0.02)


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_exported_control_vectors_steer_as_the_fleet_s_do(
    a_twin: Twins, tmp_path: Path, architecture: str
) -> None:
    twin = a_twin(architecture)
    tuned = a_tuned(twin, a_control())
    written = write(tuned, tmp_path, [], "f32")
    assert sorted(written.refused) == [Form.GGUF, Form.PEFT]
    model = stock(twin)
    base = said(model)
    steer(model, tmp_path / "job-control.gguf", architecture)
    assert apart(said(model), base) > FAR
    assert said(model).tolist() == fleet(twin, tuned).tolist()


def test_a_lora_with_control_vectors_is_two_files_that_together_are_the_adapter(
    a_twin: Twins, tmp_path: Path
) -> None:
    twin = a_twin("qwen3")
    tuned = a_tuned(twin, *loras(twin), a_control())
    written = write(tuned, tmp_path, [], "f32")
    assert "without the other is another adapter" in written.refused[Form.PEFT]
    model = stock(twin, lora_path=str(tmp_path / "job-lora.gguf"))
    half = said(model)
    steer(model, tmp_path / "job-control.gguf", "qwen3")
    wanted = fleet(twin, tuned)
    assert apart(half, wanted) > FAR
    assert apart(said(model), wanted) < 5e-5
    assert not (tmp_path / "Modelfile").exists()  # Ollama would run half of it
    for form in (Form.GGUF, Form.CONTROL_VECTOR):
        with pytest.raises(Failure, match="give both"):
            write(tuned, tmp_path / "half", [form], "f32")


def steer(model: llama_cpp.Llama, path: Path, architecture: str) -> None:
    """What llama.cpp's `--control-vector` does with a file."""
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == architecture
    assert reader.fields["controlvector.layer_count"].contents() == SHAPE.layers - 1
    data = np.zeros((SHAPE.layers - 1, SHAPE.width), np.float32)
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        data[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
    context = model._ctx.ctx  # pyright: ignore[reportPrivateUsage]
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    last = SHAPE.layers
    code = llama_cpp.llama_set_adapter_cvec(context, pointer, data.size, SHAPE.width, 1, last)
    assert code == 0


def test_rows_of_a_tied_output_are_right_in_peft_and_merge_after_the_card_s_mend(
    a_twin: Twins, tmp_path: Path
) -> None:
    twin = a_twin("llama", tied=True)
    tuned = a_tuned(twin, some_rows())
    with pytest.raises(Failure, match=r"llama\.cpp has no LoRA for the rows .* --form peft"):
        write(tuned, tmp_path / "none", [Form.GGUF], "f32")
    assert not (tmp_path / "none").exists()
    write(tuned, tmp_path, [], "f32")
    base = logits(twin.hf, TOKENS)
    rows, hidden = tuned.pairs()["output.weight"][0], hidden_states(twin)
    wanted = base.copy()
    wanted[:, ROWS] += hidden @ rows.T
    assert apart(wanted, base) > FAR
    loaded = peft.PeftModel.from_pretrained(twin.hf, tmp_path / "peft")
    assert apart(logits(loaded, TOKENS), wanted) < 5e-5
    assert apart(logits(loaded.merge_and_unload(), TOKENS), wanted) > FAR

    again = hf_gguf.twin(tmp_path, "llama", tied=True)
    text = (tmp_path / "peft" / "README.md").read_text()
    (mend,) = re.findall(r"```python\n(base\.lm_head.*?)```", text, re.DOTALL)
    exec(mend, {"base": again.hf, "torch": torch})
    merged = peft.PeftModel.from_pretrained(again.hf, tmp_path / "peft").merge_and_unload()
    assert apart(logits(merged, TOKENS), wanted) < 5e-5


def hidden_states(twin: Twin) -> NDArray[np.float32]:
    with torch.no_grad():
        return twin.hf.model(torch.tensor(TOKENS).long()[None]).last_hidden_state[0].numpy()


def test_half_precision_rounds_the_lora_and_says_so(a_twin: Twins, tmp_path: Path) -> None:
    twin = a_twin("llama")
    tuned = a_tuned(twin, *loras(twin), some_rows())
    path, _ = gguf_lora.write(tuned, tmp_path, "f16")
    assert apart(said(stock(twin, lora_path=str(path))), fleet(twin, tuned)) < 1e-2
    fields = gguf.GGUFReader(path).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_F16
    assert fields["seedwire.adapter_digest"].contents() == tuned.adapter.digest()
    assert fields["seedwire.base_sha256"].contents() == reference(twin.path).digest


def test_the_modelfile_asks_the_job_s_question(a_twin: Twins, tmp_path: Path) -> None:
    twin = a_twin("llama")
    labels = {"a": "good", "b": "bad"}
    task = Task(loss="choices", template="Say {{x}}: {text}\nIs it", labels=labels)
    gguf_lora.write(a_tuned(twin, some_rows(), task=task), tmp_path)
    assert (tmp_path / "Modelfile").read_text().splitlines()[2:] == [
        "FROM ./llama.gguf",
        "ADAPTER ./job-lora.gguf",
        'TEMPLATE """Say {{ "{{" }}x}}: {{ .Prompt }}',
        'Is it"""',
        "PARAMETER temperature 0",
    ]
    gguf_lora.write(a_tuned(twin, some_rows()), tmp_path)
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()


def test_forms_that_do_not_exist_are_refused_with_those_that_do(a_twin: Twins) -> None:
    twin = a_twin("llama")
    lora = a_tuned(twin, *loras(twin))
    assert "--form gguf or peft" in control_vector.obstacle(lora)
    control = a_tuned(twin, a_control())
    assert "--form control-vector" in gguf_lora.obstacle(control)
    assert "--form control-vector" in peft_folder.obstacle(control)
    strange = a_tuned(twin, Block("lora_b", "blk.0.attn_gate.weight", [64], d_in=64))
    assert "no matrix of Hugging Face's llama; --form gguf" in peft_folder.obstacle(strange)
    assert gguf_lora.obstacle(strange) == ""


def test_a_card_says_who_loads_what_and_that_nobody_measured_it(a_twin: Twins) -> None:
    tuned = a_tuned(a_twin("llama"), *loras(a_twin("llama")), a_control())
    text = card.text(tuned, ["gguf", "control-vector"])
    assert "--lora job-lora.gguf --control-vector job-control.gguf" in text
    assert "Nobody has measured it" in text
    assert "peft" not in text
    assert "attn_q 0-1" in text
    assert "| quantisation | F32 |" in text
