"""The estimate of real probes against autograd's gradient, on a tiny model in torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared import directions
from shared.codec import encode_manifest
from shared.directions import GAUSS8, GAUSS_UNIT
from shared.engine.block_sites import BlockSites
from shared.engine.examples import choice_tokens
from shared.engine.fake import Words
from shared.engine.job import Job
from shared.engine.last_block import LastBlock
from shared.engine.model import Adaptation, Example, Losses, Sites
from shared.engine.probing import NAT, probe
from shared.engine.protocol import Facts, OpenJob, Probe
from shared.errors import EngineError
from shared.messages import Block, Manifest, Task, Variant
from shared.messages.jobs import Distribution

torch: Any = pytest.importorskip("torch")
torch.set_num_threads(1)

WIDTH, VOCABULARY, ROWS = 16, 128, 12
COUNT, EPS = 2048, 1e-3
TASK = Task("choices", "{text}\nAnswer:", {"0": " dull", "1": " fine", "2": " odd"})
BLOCKS = [
    Block("lora_b", "blk.0.mix.weight", [WIDTH], d_in=WIDTH),
    Block("control", "", [WIDTH], layer=1, scale=1),
    Block(
        "output_rows",
        "output.weight",
        [3, WIDTH],
        rows=choice_tokens(TASK, Words(VOCABULARY)),
    ),
]
D = 5 * WIDTH


class TorchModel(Words):
    """Mean embedding, a mixing layer with LoRA and control vector, output rows; float64."""

    def __init__(self, blocks: Adaptation) -> None:
        super().__init__(VOCABULARY)
        generator = torch.Generator().manual_seed(3)

        def table(rows: int) -> Any:
            return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)

        self._embedding, self._mix, self._output = table(VOCABULARY), table(WIDTH) / 4, table(3)
        self._a = torch.tensor(blocks.fixed_a(0), dtype=torch.float64)
        self._values: Any = torch.zeros(D, dtype=torch.float64)
        self.forwarded = 0

    def choose_among(self, tokens: list[int]) -> None:
        """The output rows are the choices'."""

    def stand(self, values: NDArray[np.float32]) -> None:
        self._values = torch.tensor(values.astype(np.float64))

    def losses(self, examples: Sequence[Example], values: Any) -> Any:
        b, control, rows = values[:WIDTH], values[WIDTH : 2 * WIDTH], values[2 * WIDTH :]
        tokens = [torch.tensor(example.tokens.astype(np.int64)) for example in examples]
        states = torch.stack([self._embedding[each].mean(0) * 3 for each in tokens])
        lora = torch.outer(states @ self._a, b)
        mixed = states + torch.tanh(states @ self._mix.T + lora) + control
        logits = mixed @ (self._output + rows.reshape(3, WIDTH)).T / 4
        targets = torch.tensor([int(example.targets[0]) for example in examples])
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def parts(self, examples: Sequence[Example]) -> list[slice]:
        return [slice(0, len(examples))]

    def measure(self, examples: Sequence[Example]) -> Losses:
        loss = self.losses(examples, self._values).numpy()
        ones = np.ones(len(examples), np.int64)
        return Losses(loss, ones, ones > 0)

    def sites(self, examples: Sequence[Example]) -> list[Sites]:
        raise NotImplementedError

    def last_block(self) -> LastBlock:
        raise EngineError("this model has no blocks; use how: probe")

    def block_sites(self, examples: Sequence[Example], block: LastBlock) -> list[BlockSites]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


class TorchEngine:
    def inspect(self, path: str, words: list[str], template: str, prompt: str = "") -> Facts:
        raise NotImplementedError

    def open(self, path: str, blocks: Adaptation, threads: int, max_tokens: int) -> TorchModel:
        return TorchModel(blocks)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"word{n} word{n % 5}", "label": str(n % 3)} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("distribution", ["signs", "gauss8"])
@settings(deadline=None, max_examples=4, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 2**63 - 1),
    place=st.integers(0, 2**31),
    stream_round=st.integers(0, 2**20),
    spread=st.sampled_from([0, 2**18, 2**22]),
)
def test_the_mean_of_probes_is_autograds_gradient(
    data: Path, distribution: Distribution, seed: int, place: int, stream_round: int, spread: int
) -> None:
    made = Manifest(0, "t", seed, BLOCKS, [Variant("0" * 64, 1, "t")], D, distribution)
    request = OpenJob("j", encode_manifest(made), TASK, "t", str(data), "", device="a")
    job = Job(request, TorchEngine())
    random = np.random.default_rng(place)
    job.adapter.theta += random.integers(-spread, spread, D, endpoint=True).astype("i4")
    everything = [(0, COUNT)]
    asked = Probe("j", 1, stream_round, "probe", everything, EPS, 64, (0, 3), job.adapter.digest())
    result = probe(job, asked)
    slopes = np.frombuffer(result.differences, "<i4") / NAT / (2 * EPS) / result.weight
    gradient = exact_gradient(job)

    products = directions.dots(seed, stream_round, everything, gradient, 0, distribution)
    assert slopes == pytest.approx(products, rel=2e-3, abs=3e-4)
    z = np.array(
        [directions.one(seed, stream_round, index, 0, D, distribution) for index in range(COUNT)]
    )
    is_unbiased(slopes @ z / COUNT, gradient, distribution)


def exact_gradient(job: Job) -> NDArray[np.float64]:
    """Of the mean loss, in the blocks' own units: a block moves by 2^scale of what is committed."""
    model = job.model
    assert isinstance(model, TorchModel)
    theta = torch.tensor(job.adapter.values().astype(np.float64), requires_grad=True)
    model.losses(job.examples(job.rows_of(1)), theta).mean().backward()
    return np.asarray(theta.grad.numpy(), np.float64) * job.layout.magnitudes


def is_unbiased(
    estimate: NDArray[np.float64], gradient: NDArray[np.float64], distribution: Distribution
) -> None:
    """Slope, cosine and every entry are off by no more than chance puts them.

    A bell of 256 entries is a little narrower than the normal one: its mean square is 0.995.
    """
    entries = GAUSS8 / GAUSS_UNIT if distribution == "gauss8" else np.array([-1.0, 1.0])
    square, fourth = float((entries**2).mean()), float((entries**4).mean())
    power = float(gradient @ gradient)
    assert float(estimate @ gradient) / power == pytest.approx(square, abs=5 * np.sqrt(2 / COUNT))
    cosine = float(estimate @ gradient) / np.sqrt(power * float(estimate @ estimate))
    assert cosine == pytest.approx(np.sqrt(COUNT / (COUNT + D)), abs=0.02)
    own = gradient**2
    variance = (square**2 * (power - 2 * own) + fourth * own) / COUNT
    far = (estimate - square * gradient) ** 2 / variance
    assert far.mean() == pytest.approx(1, abs=5 * np.sqrt(2 / D))
    assert far.max() < 25
