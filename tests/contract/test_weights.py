"""A model's weights as the file's types say them: ggml's own conversion is the gguf package's."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from shared.engine.gguf_file import read_header
from shared.engine.weights import Weights
from shared.errors import EngineError

Kind = gguf.GGMLQuantizationType
MADE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
HALVES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q3_K: (108,)}
"""Types that the package only reads: where a block's scales in half precision are."""
HEIGHT, WIDTH = 6, 512


def packed(kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Random weights of `kind`: (HEIGHT, bytes a row)."""
    random = np.random.default_rng(int(kind))
    if kind not in HALVES:
        data = random.standard_normal((HEIGHT, WIDTH)).astype(np.float32)
        return gguf.quants.quantize(data, kind).view(np.uint8)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (HEIGHT * WIDTH // weights, size)).astype(np.uint8)
    for at in HALVES[kind]:
        scales = random.standard_normal((len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(HEIGHT, -1)


@pytest.mark.parametrize("kind", [*MADE, *HALVES], ids=lambda kind: kind.name)
def test_weights_are_what_the_gguf_package_reads(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    data, vector = packed(kind), np.arange(5, dtype=np.float32)
    writer.add_tensor("first", vector)  # what comes after it begins elsewhere than at 0
    writer.add_tensor("matrix", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = Weights(str(path), read_header(str(path)))
    wanted = gguf.quants.dequantize(data, kind).reshape(HEIGHT, WIDTH)
    found = weights.matrix("matrix")
    assert (found.dtype, found.shape) == (np.float32, (HEIGHT, WIDTH))
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert weights.rows("matrix", 2, 5).tolist() == found[2:5].tolist()
    assert weights.vector("first").tolist() == vector.tolist()
    assert (weights.has("matrix"), weights.has("other")) == (True, False)
    with pytest.raises(EngineError, match=r"model\.gguf: no tensor other"):
        weights.matrix("other")
