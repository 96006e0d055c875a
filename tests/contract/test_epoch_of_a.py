"""A later epoch that goes on over an earlier one's A is the same model to whoever builds it."""

from pathlib import Path

import numpy as np
import pytest
from msgspec import UNSET
from msgspec.structs import replace

from services.console.export.history import History
from services.console.export.tuned import Base, Tuned
from services.proxy_inference.generation import (
    _adaptation,  # pyright: ignore[reportPrivateUsage]
)
from shared.adapter import Adapter, next_epoch
from shared.codec import decode_manifest, encode_manifest
from shared.engine.gguf_file import read_header
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine
from shared.messages import JobSpec, Manifest
from tests.support import tiny_gguf
from tests.support.last_block import TASKS, a_job, last_block


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


def test_devices_proxy_and_export_build_the_a_that_the_manifest_names(model: Path) -> None:
    first = a_job(model, "choices", last_block(model), spread=0.1)
    rows = first.rows_of(1)
    manifest = decode_manifest(first.request.manifest)
    second = next_epoch(manifest)
    theta = first.adapter.theta

    def loss(of: Manifest) -> float:
        request = replace(first.request, manifest=encode_manifest(of))
        job = Job(request, LlamaEngine())
        job.adapter = Adapter.placed(request.manifest, 7, theta)
        found = float(job.losses(rows).loss.sum())
        job.model.close()
        return found

    def exported(of: Manifest) -> dict[str, bytes]:
        adapter = Adapter.placed(encode_manifest(of), 7, theta)
        base = Base(of.variants[0], read_header(str(model)))
        tuned = Tuned("j", JobSpec(TASKS["choices"]), adapter, base, History("j"))
        return {name: a.tobytes() for name, (a, _) in tuned.pairs().items()}

    def served(of: Manifest) -> bytes:
        adaptation = _adaptation(Adapter.placed(encode_manifest(of), 7, theta))
        return adaptation.fixed_a(0).tobytes()

    other = replace(second, a_epoch=UNSET)
    assert loss(second) == loss(manifest)
    assert abs(loss(other) - loss(manifest)) > 1e-3
    assert exported(second) == exported(manifest) != exported(other)
    assert served(second) == served(manifest) != served(other)
    assert not np.array_equal(theta, np.zeros_like(theta))
    first.model.close()
