"""The adapter as a LoRA for llama.cpp, and a Modelfile for Ollama.

Differs in: LoRA and output rows stand in one file, each tensor with a rank of its own.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from services.console.export import soft_prompt
from services.console.export.tuned import Tuned
from shared.engine.fitting import OUTPUT
from shared.engine.gguf_file import Entry, Tensor, lora_entries, write_file
from shared.runtime import project_version

Dtype = Literal["f32", "f16"]
_TYPES = {"f32": (np.float32, 0), "f16": (np.float16, 1)}
"""numpy's type, and what `general.file_type` says of it."""


def obstacle(tuned: Tuned) -> str:
    """Why there is no such LoRA; empty where there is one."""
    if soft := soft_prompt.unwritten("gguf", tuned):
        return soft
    if tuned.kinds == {"control"}:
        return (
            "gguf: the adapter is control vectors, which no LoRA can hold; "
            "--form control-vector writes them"
        )
    if OUTPUT in tuned.names and tuned.base.is_tied:
        return (
            "gguf: the model's output is its embedding table (tied), and llama.cpp has no LoRA "
            "for the rows of such an output; --form peft writes them for transformers"
        )
    return ""


def write(tuned: Tuned, folder: Path, dtype: Dtype = "f32") -> list[Path]:
    """The LoRA and, where Ollama can carry the whole adapter, a Modelfile are in `folder`.

    The scale is 1 for whoever multiplies by alpha / rank: alpha is the largest rank, and the B of
    a smaller one makes up for it.
    """
    pairs = tuned.pairs()
    alpha = max(len(a) for a, _ in pairs.values())
    kind, file_type = _TYPES[dtype]
    tensors: list[Tensor] = []
    for name, (a, b) in pairs.items():
        tensors.append((f"{name}.lora_a", a.astype(kind)))
        tensors.append((f"{name}.lora_b", (b * np.float32(len(a) / alpha)).astype(kind)))
    entries = lora_entries(tuned.adapter.manifest.architecture, alpha=float(alpha))
    entries |= described(tuned) | {"general.file_type": file_type}
    path = folder / f"{tuned.job}-lora.gguf"
    write_file(path, entries, tensors)
    if "control" in tuned.kinds:
        return [path]
    (folder / "Modelfile").write_text(_modelfile(tuned, path.name), encoding="utf-8")
    return [path, folder / "Modelfile"]


def described(tuned: Tuned) -> dict[str, Entry]:
    """What a file says of where it comes from."""
    base, adapter = tuned.base, tuned.adapter
    entries: dict[str, Entry] = {
        "general.name": tuned.job,
        "general.description": f"Tuned by Seedwire {project_version()} over {base.name}",
        "general.base_model.count": 1,
        "general.base_model.0.name": base.name,
    }
    if base.source:
        entries["general.base_model.0.repo_url"] = base.source
    return entries | {
        "seedwire.job": tuned.job,
        "seedwire.round": adapter.round,
        "seedwire.adapter_digest": adapter.digest(),
        "seedwire.base_file": base.variant.name,
        "seedwire.base_sha256": base.variant.digest,
    }


def _modelfile(tuned: Tuned, adapter: str) -> str:
    base = tuned.base.variant.name
    lines = [
        f"# Put {base} (SHA-256 {tuned.base.variant.digest})",
        f"# beside this file, then: ollama create {tuned.job} -f Modelfile",
        f"FROM ./{base}",
        f"ADAPTER ./{adapter}",
    ]
    template = tuned.spec.task.template
    if tuned.spec.task.labels:
        if '"""' in template:
            lines.append("# The job's prompt holds triple quotes, which no TEMPLATE can: send it.")
        else:
            prompt = template.replace("{{", '{{ "{{" }}').replace("{text}", "{{ .Prompt }}")
            lines.append(f'TEMPLATE """{prompt}"""')
        lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"
