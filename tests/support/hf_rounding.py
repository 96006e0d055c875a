"""A checkpoint in the forms that llama.cpp runs, and what those forms cost in transformers.

llama.cpp rounds a file's matrices once and what is multiplied by them at each pass, to the same
form. Doing both to a transformers model says how far a loss may be off for that alone: the noise of
the quantisation, measured without llama.cpp.
"""

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from shared.engine.model import Example
from tests.support.hf_gguf import logits, torch

Kind = gguf.GGMLQuantizationType


def packed(path: Path, kind: Kind) -> Path:
    """Beside the F32 file at `path` one of the same model with its matrices in `kind`."""
    reader = gguf.GGUFReader(path)
    found = reader.fields[gguf.Keys.General.ARCHITECTURE]
    made = path.with_name(f"{path.stem}-{kind.name}.gguf")
    writer = gguf.GGUFWriter(made, found.contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and field is not found:
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], of)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            data = gguf.quants.quantize(tensor.data, kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def rounded(hf: Any, kind: Kind) -> Any:
    """A copy of a transformers model whose matrices, and all that they multiply, are in `kind`."""

    def around(values: Any) -> Any:
        flat = np.ascontiguousarray(values.numpy().reshape(-1, values.shape[-1]))
        back = gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)
        return torch.tensor(back.astype(np.float32).reshape(values.shape))

    def before(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (around(given[0]),)

    made = copy.deepcopy(hf)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.copy_(around(weight))
    for module in made.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(before)
    return made


def losses(hf: Any, examples: list[Example], choices: list[int]) -> NDArray[np.float64]:
    """Mean losses of the examples by a transformers model, nats: (n,).

    With `choices`, softmax is over these tokens alone, and targets are among them.
    """
    found: list[float] = []
    for example in examples:
        said = logits(hf, example.tokens)[-len(example.targets) :].astype(np.float64)
        said = said[:, choices] if choices else said
        highest = said.max(axis=1, keepdims=True)
        whole = highest[:, 0] + np.log(np.exp(said - highest).sum(axis=1))
        told = said[np.arange(len(said)), example.targets]
        found.append(float((whole - told).mean()))
    return np.array(found)
