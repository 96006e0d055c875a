"""Whether a GGUF file, the manifest's blocks and the task go together; no llama.cpp needed."""

from shared.engine.gguf_file import Header, read_header
from shared.engine.model import Adaptation
from shared.errors import EngineError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
OUTPUT = "output.weight"
_TABLE = "token_embd.weight"
_LARGEST = 2**32 - 1
"""Of a number that says how large the model is."""


def supported_header(path: str) -> Header:
    """The header of a model that llama.cpp and we can work with.

    Raises:
        EngineError: it is missing, damaged, of another architecture, or says of its tensors what
            is not so.
    """
    header = read_header(path)
    if header.architecture not in ARCHITECTURES:
        raise EngineError(
            f"{path}: unknown architecture {header.architecture or '(none)'}: "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    _check_sizes(path, header)
    return header


def _check_sizes(path: str, header: Header) -> None:
    """Find sizes that no tensor bears out: whoever went by them might never come to an end."""
    sizes: list[int] = []
    for name in ("block_count", "embedding_length", "context_length"):
        entry = f"{header.architecture}.{name}"
        size = header.metadata.get(entry)
        if not isinstance(size, int) or not 0 < size <= _LARGEST:
            raise EngineError(f"{path}: damaged: its {entry} is {size}; fetch the file again")
        sizes.append(size)
    layers, width, _ = sizes
    table = header.tensors.get(_TABLE, ())
    if len(table) != 2 or table[0] != width:
        raise EngineError(
            f"{path}: damaged: {_TABLE} has shape {list(table)} in a model of width {width}; "
            "fetch the file again"
        )
    layer, beyond = f"blk.{layers - 1}.", f"blk.{layers}."
    found = [any(name.startswith(one) for name in header.tensors) for one in (layer, beyond)]
    if found != [True, False]:
        raise EngineError(
            f"{path}: damaged, or a part of a model: {layers} layers are not what its tensors are "
            "of; fetch the whole file again"
        )


def check_fit(path: str, header: Header, blocks: Adaptation, max_tokens: int) -> None:
    """Find what the model has no place for.

    Raises:
        EngineError: names the block or the length, and what would fit.
    """
    trained = int(header.number("context_length"))
    if max_tokens > trained:
        raise EngineError(
            f"task: max_tokens {max_tokens} is beyond the {trained} of {path}; lower it"
        )
    if blocks.architecture != header.architecture:
        raise EngineError(
            f"{path}: architecture {header.architecture}, the manifest is for "
            f"{blocks.architecture}; use the job's model"
        )
    width, layers = int(header.number("embedding_length")), int(header.number("block_count"))
    vocabulary = header.tensors.get(_TABLE, (0, 0))[1]
    for block in blocks.blocks:
        if block.kind == "control":
            if block.shape != [width] or not 1 <= block.layer < layers:
                raise EngineError(
                    f"{path}: control of shape {block.shape} after layer {block.layer}: "
                    f"needs shape [{width}] and a layer in 1..{layers - 1}"
                )
        elif block.kind == "output_rows":
            if block.shape[1] != width or max(block.rows) >= vocabulary:
                raise EngineError(
                    f"{path}: output rows of shape {block.shape} up to {max(block.rows)}: "
                    f"needs width {width} and rows below {vocabulary}"
                )
        elif block.kind == "prompt":
            if block.shape[1] != width or max(block.rows) >= vocabulary:
                raise EngineError(
                    f"{path}: a prompt of shape {block.shape} that starts as tokens up to "
                    f"{max(block.rows)}: needs width {width} and tokens below {vocabulary}"
                )
        elif block.kind == "lora_b":
            _fit_lora(path, header, block.tensor, [block.d_in, block.shape[0]])
    kinds = {block.kind for block in blocks.blocks if block.tensor == OUTPUT}
    if {"lora_b", "output_rows"} <= kinds:
        raise EngineError(f"manifest: {OUTPUT} has both LoRA and output rows; choose one")
    bent = [name for name in ("final_logit_softcapping", "logit_scale") if header.number(name)]
    if bent and "output_rows" in {block.kind for block in blocks.blocks}:
        raise EngineError(f"{path}: {bent[0]} bends the logits; adapt other blocks than rows")


def _fit_lora(path: str, header: Header, tensor: str, shape: list[int]) -> None:
    if tensor not in header.tensors:
        mend = "use a GGUF with its own" if tensor == OUTPUT else "use the job's model, it has"
        raise EngineError(f"{path}: no tensor {tensor}; {mend} {tensor}")
    if list(header.tensors[tensor]) != shape or tensor == _TABLE:
        raise EngineError(
            f"{path}: {tensor} has shape {list(header.tensors[tensor])}, the manifest's LoRA wants "
            f"a matrix of {shape} (d_in, d_out)"
        )
