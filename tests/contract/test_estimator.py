"""The estimate of real probes against autograd's gradient, on a tiny model in torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared import directions
from shared.codec import encode_manifest
from shared.engine.examples import choice_tokens
from shared.engine.fake import Words
from shared.engine.job import Job
from shared.engine.model import Adaptation, Example, Losses, Sites
from shared.engine.probing import NAT, probe
from shared.engine.protocol import Facts, OpenJob, Probe
from shared.messages import Block, Manifest, Task, Variant
from shared.messages.jobs import Distribution

torch: Any = pytest.importorskip("torch")

WIDTH, VOCABULARY, SEED = 16, 128, 11
TASK = Task("choices", "{text}\nAnswer:", {"0": " dull", "1": " fine", "2": " odd"})
BLOCKS = [
    Block("lora_b", "blk.0.mix.weight", [WIDTH], d_in=WIDTH),
    Block("control", "", [WIDTH], layer=1),
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
        found: list[Any] = []
        for example in examples:
            state = self._embedding[torch.tensor(example.tokens.astype(np.int64))].mean(0) * 3
            mixed = state + torch.tanh(self._mix @ state + b * (self._a @ state)) + control
            logits = (self._output + rows.reshape(3, WIDTH)) @ mixed / 4
            found.append(torch.logsumexp(logits, 0) - logits[int(example.targets[0])])
        return torch.stack(found)

    def measure(self, examples: Sequence[Example]) -> Losses:
        loss = self.losses(examples, self._values).numpy()
        ones = np.ones(len(examples), np.int64)
        return Losses(loss, ones, ones > 0)

    def sites(self, examples: Sequence[Example]) -> list[Sites]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


class TorchEngine:
    def inspect(self, path: str, words: list[str], template: str) -> Facts:
        raise NotImplementedError

    def open(self, path: str, blocks: Adaptation, threads: int, max_tokens: int) -> TorchModel:
        return TorchModel(blocks)


@pytest.mark.parametrize("distribution", ["signs", "gauss8"])
@pytest.mark.parametrize("stream_round", [1, 2, 3])
def test_the_mean_of_probes_is_autograds_gradient(
    tmp_path: Path, distribution: Distribution, stream_round: int
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"word{n} word{n % 5}", "label": str(n % 3)} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Manifest(0, "t", SEED, BLOCKS, [Variant("0" * 64, 1, "t")], D, distribution)
    request = OpenJob("j", encode_manifest(made), TASK, "t", str(data), "", device="a")
    job = Job(request, TorchEngine())
    job.adapter.theta += np.random.default_rng(1).integers(-(2**21), 2**21, D).astype("i4")
    count, eps = 1536, 1e-3
    asked = Probe(
        "j", 1, stream_round, "probe", [(0, count)], eps, 64, (0, 3), job.adapter.digest()
    )
    result = probe(job, asked)
    slopes = np.frombuffer(result.differences, "<i4") / NAT / (2 * eps) / result.weight

    model = job.model
    assert isinstance(model, TorchModel)
    theta = torch.tensor(job.adapter.values().astype(np.float64), requires_grad=True)
    model.losses(job.examples(job.rows_of(1)), theta).mean().backward()
    gradient = np.asarray(theta.grad.numpy(), np.float64)

    products = directions.dots(SEED, stream_round, [(0, count)], gradient, 0, distribution)
    assert slopes == pytest.approx(products, rel=2e-3, abs=2e-4)
    z = np.array(
        [directions.one(SEED, stream_round, index, 0, D, distribution) for index in range(count)]
    )
    estimate = slopes @ z / count
    power = float(gradient @ gradient)
    assert float(estimate @ gradient) / power == pytest.approx(1, abs=5 * np.sqrt(2 / count))
    cosine = float(estimate @ gradient) / np.sqrt(power * float(estimate @ estimate))
    assert cosine == pytest.approx(np.sqrt(count / (count + D)), abs=0.02)
