"""The same model at the cost of a larger one: a GGUF file with layers appended that add nothing.

The last matrices of an appended layer's attention and feed-forward are zero, so the logits are
those of the model itself, while every pass computes and reads all of its weights. They are copies
of the model's first layer, the feed-forward repeated to the width that is asked for; `deci` is
llama with widths told by layer.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

_ZERO = ("attn_output.weight", "ffn_down.weight")
_WIDER = ("ffn_up.weight", "ffn_gate.weight")


def lengthen(source: Path, target: Path, layers: int, *, times: int = 1) -> Path:
    """`target`: the llama model `source` with `layers` more, whose feed-forward is `times` as wide.

    Raises:
        ValueError: the model is not of architecture llama.
    """
    reader = gguf.GGUFReader(source)
    if _value(reader, "general.architecture") != "llama":
        raise ValueError(f"{source}: only llama models can be lengthened")
    own = int(_value(reader, "llama.block_count"))
    width = int(_value(reader, "llama.feed_forward_length"))
    writer = gguf.GGUFWriter(target, "deci")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        if name.startswith("llama."):
            name = f"deci{name.removeprefix('llama')}"
            by_layer = ("head_count", "head_count_kv", "feed_forward_length")
            if name.endswith("block_count"):
                value = own + layers
            elif name.endswith(by_layer):
                more = times * width if name.endswith("feed_forward_length") else value
                value, kind, inner = [value] * own + [more] * layers, gguf.GGUFValueType.ARRAY, kind
        writer.add_key_value(name, value, kind, inner)
    first = [tensor for tensor in reader.tensors if tensor.name.startswith("blk.0.")]
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for number in range(own, own + layers):
        for tensor in first:
            data = tensor.data
            if tensor.name.endswith(_WIDER):
                data = np.concatenate([data] * times)
            elif tensor.name.endswith("ffn_down.weight"):
                data = np.concatenate([data] * times, axis=1)
            if tensor.name.endswith(_ZERO):
                data = np.zeros_like(data)
            name = tensor.name.replace("blk.0.", f"blk.{number}.")
            writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _value(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()
