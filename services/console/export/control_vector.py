"""The adapter's control vectors as llama.cpp's `--control-vector` reads them."""

from pathlib import Path

from services.console.export import soft_prompt
from services.console.export.gguf_lora import described
from services.console.export.tuned import Tuned
from shared.engine.gguf_file import Entry, write_file


def obstacle(tuned: Tuned) -> str:
    """Why there is no such file; empty where there is one."""
    if soft := soft_prompt.unwritten("control-vector", tuned):
        return soft
    if "control" in tuned.kinds:
        return ""
    return "control-vector: the adapter has no control vectors; --form gguf or peft writes it"


def write(tuned: Tuned, folder: Path) -> list[Path]:
    """The control vectors are in `folder`: `direction.N` is added after layer N, F32."""
    header = tuned.base.header
    entries: dict[str, Entry] = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": header.architecture,
        "controlvector.layer_count": int(header.number("block_count")) - 1,
    }
    tensors = [(f"direction.{layer}", vector) for layer, vector in sorted(tuned.vectors().items())]
    path = folder / f"{tuned.job}-control.gguf"
    write_file(path, entries | described(tuned), tensors)
    return [path]
