"""What `exact` says of output rows is autograd's derivative, of any sites and of a whole model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared import directions
from shared.codec import encode_manifest
from shared.engine import last_layer
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine
from shared.engine.model import Example, Sites
from shared.engine.probing import NAT, probe
from shared.engine.protocol import OpenJob, Probe
from shared.messages import Block, Manifest, Task, Variant
from tests.support import hf_gguf
from tests.support.hf_gguf import SHAPE, torch

SEED, COUNT, EPS = 5, 24, 0.01
LABELS = {"0": " a", "1": " b", "2": " the"}
TASKS = {
    "choices": Task("choices", "{text}\nAnswer:", LABELS, max_tokens=64),
    "tokens": Task("tokens", max_tokens=64),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model .* .tie_word_embeddings=True. and:UserWarning"
)


def lost(logits: Any, allowed: list[int], targets: list[int]) -> Any:
    """Summed loss of (m, n_vocab) logits, softmax over the tokens `allowed`."""
    among = torch.log_softmax(logits[:, allowed], 1)
    return -among[torch.arange(len(targets)), [allowed.index(target) for target in targets]].sum()


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[int]]:
    """A seed, the adapted rows, the tokens that compete, and the targets among these."""
    tokens = st.integers(0, 19)
    adapted = draw(st.lists(tokens, min_size=1, max_size=6, unique=True))
    allowed = draw(st.lists(tokens, min_size=2, max_size=20, unique=True))
    targets = draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=7))
    return draw(st.integers(0, 2**31)), adapted, allowed, targets


@settings(deadline=None, max_examples=80)
@given(worlds())
def test_loss_and_gradient_of_any_sites_are_autograds(
    world: tuple[int, list[int], list[int], list[int]],
) -> None:
    seed, adapted, allowed, targets = world
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(len(targets), 5)).astype(np.float32)
    output, deltas = random.normal(size=(20, 5)) * 3, random.normal(size=(len(adapted), 5))
    base = hidden.astype(np.float64) @ output.T
    others = [token for token in allowed if token not in adapted]
    rest = np.array([np.logaddexp.reduce(row[others], initial=-np.inf) for row in base])
    sites = Sites(
        hidden=hidden,
        rows=np.where(np.isin(adapted, allowed), base[:, adapted], -np.inf),
        rest=rest,
        rest_max=base[:, others].max(axis=1, initial=-np.inf),
        target=np.array([adapted.index(t) if t in adapted else -1 for t in targets], np.int32),
        target_logit=base[np.arange(len(targets)), targets],
    )
    moved = torch.tensor(deltas, requires_grad=True)
    whole = torch.tensor(output).index_add(0, torch.tensor(adapted), moved)
    loss = lost(torch.tensor(hidden.astype(np.float64)) @ whole.T, allowed, targets)
    loss.backward()
    ours = last_layer.losses([sites], deltas)
    assert float(ours.loss[0]) == pytest.approx(loss.item(), abs=1e-9)
    gradient = np.asarray(moved.grad.numpy(), np.float64)
    assert last_layer.gradient([sites], deltas) == pytest.approx(gradient, abs=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", ["choices", "tokens"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_exact_update_is_autograds_gradient_of_the_whole_model(
    tmp_path: Path, architecture: str, loss: str, tied: bool
) -> None:
    twin, task = hf_gguf.twin(tmp_path, architecture, tied=tied), TASKS[loss]
    data = tmp_path / "rows.jsonl"
    said = ["then he ran in", "the other bear", "in a bin"]
    kinds = {
        "choices": [{"text": f"{said[n % 3]} {n}", "label": str(n % 3)} for n in range(10)],
        "tokens": [{"prompt": said[n % 3], "completion": f" {n} a bin"} for n in range(10)],
    }
    data.write_text("".join(json.dumps(row) + "\n" for row in kinds[loss]))
    rows = [257, 258, 263, 40] if loss == "choices" else [257, 70, 33, 16]
    blocks = [
        Block("output_rows", "output.weight", [2, SHAPE.width], rows=rows[:2], scale=1),
        Block("output_rows", "output.weight", [2, SHAPE.width], rows=rows[2:]),
    ]
    d = 4 * SHAPE.width
    variants = [Variant("0" * 64, 1, "twin")]
    manifest = encode_manifest(Manifest(0, architecture, SEED, blocks, variants, d))
    request = OpenJob("j", manifest, task, str(twin.path), str(data), "", device="a")
    job = Job(request, LlamaEngine())
    job.adapter.theta += np.random.default_rng(2).integers(-(2**21), 2**21, d).astype("i4")
    asked = Probe("j", 1, 1, "exact", [(0, COUNT)], EPS, 64, (0, 2), job.adapter.digest())
    result = probe(job, asked)

    values = job.adapter.values().reshape(4, SHAPE.width)
    deltas = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    allowed = list(range(SHAPE.vocabulary))
    if loss == "choices":
        allowed = [
            job.model.tokenize(f"\nAnswer:{word}", start=False)[-1] for word in LABELS.values()
        ]
    each = [
        lost(adapted(twin.hf, example, rows, deltas), allowed, targets_of(example, allowed, loss))
        for example in job.examples(job.rows_of(1))
    ]
    whole = torch.stack(each).sum()
    whole.backward()
    assert result.loss / NAT == pytest.approx(whole.item(), rel=1e-3)
    gradient = deltas.grad.numpy().astype(np.float64).ravel() * job.layout.magnitudes
    wanted = directions.dots(SEED, 1, [(0, COUNT)], gradient, 0, "signs")
    ours = np.frombuffer(result.differences, "<i4") / NAT / (2 * EPS)
    assert ours == pytest.approx(wanted, abs=5e-3 * float(np.sqrt(np.mean(wanted**2))))


def adapted(hf: Any, example: Example, rows: list[int], deltas: Any) -> Any:
    """Logits (m, n_vocab) where the example is asked, its output rows moved and nothing else."""
    tokens = torch.tensor(example.tokens.astype(np.int64))[None]
    with torch.no_grad():
        state = hf.model(tokens).last_hidden_state[0, -len(example.targets) :]
    matrix = hf.lm_head.weight.detach().index_add(0, torch.tensor(rows), deltas)
    return state @ matrix.T


def targets_of(example: Example, allowed: list[int], loss: str) -> list[int]:
    targets: NDArray[np.int32] = example.targets
    return [allowed[target] if loss == "choices" else int(target) for target in targets]
