"""The adapter's soft prompt as a file of numbers: no program has a form of its own for a suffix.

PEFT's prompt tuning puts its embeddings before the text, ours stand behind it; so the file is not
called PEFT's, and the card says how it is used.
"""

from pathlib import Path

from safetensors.numpy import save_file

from services.console.export.tuned import Tuned


def obstacle(tuned: Tuned) -> str:
    """Why there is no such file; empty where there is one."""
    if "prompt" not in tuned.kinds:
        return "soft-prompt: the adapter has no soft prompt; --form gguf or peft writes it"
    return unwritten("soft-prompt", tuned) if tuned.kinds != {"prompt"} else ""


def unwritten(form: str, tuned: Tuned) -> str:
    """Why the adapter is not in `form` if it has a soft prompt; empty otherwise."""
    if "prompt" not in tuned.kinds:
        return ""
    if tuned.kinds != {"prompt"}:
        return (
            f"{form}: no file holds a soft prompt and other blocks together, and one without the "
            "other is another adapter; serve it with `seedwire serve`"
        )
    return (
        f"{form}: it has no place for a soft prompt, which stands behind the text; --form "
        "soft-prompt writes its numbers, and `seedwire serve` answers with it"
    )


def write(tuned: Tuned, folder: Path) -> list[Path]:
    """`start` (p,) int32 and `added` (p, n_embd) F32 are in `folder`/JOB-prompt.safetensors."""
    path = folder / f"{tuned.job}-prompt.safetensors"
    added = tuned.blocks.prompt_moved(tuned.adapter.values())
    tensors = {"start": tuned.blocks.prompt_tokens, "added": added}
    save_file(tensors, path, {"format": "pt", "seedwire.job": tuned.job})
    return [path]
