"""The adapter as a folder that peft loads over a Hugging Face model."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from services.console.export import soft_prompt
from services.console.export.tuned import Tuned
from shared.engine import hub_names

FOLDER = "peft"


def obstacle(tuned: Tuned) -> str:
    """Why there is no such folder; empty where there is one."""
    if soft := soft_prompt.unwritten("peft", tuned):
        return soft
    if "control" in tuned.kinds:
        others = "--form control-vector writes them"
        if len(tuned.kinds) > 1:
            others += " and --form gguf the rest; one without the other is another adapter"
        return f"peft: it has no place for control vectors; {others}"
    architecture = tuned.adapter.manifest.architecture
    nameless = [name for name in tuned.names if hub_names.module(architecture, name) is None]
    if nameless:
        return (
            f"peft: {nameless[0]} is no matrix of Hugging Face's {architecture}; --form gguf has it"
        )
    return ""


def write(tuned: Tuned, folder: Path) -> list[Path]:
    """`adapter_config.json` and `adapter_model.safetensors` (F32) are in `folder`/peft."""
    header = tuned.base.header
    heads = hub_names.Heads(
        int(header.number("attention.head_count")), int(header.number("attention.head_count_kv"))
    )
    tensors: dict[str, NDArray[np.float32]] = {}
    ranks: dict[str, int] = {}
    for tensor, (a, b) in tuned.pairs().items():
        module = hub_names.module(header.architecture, tensor)
        assert module is not None, "there is an obstacle"
        ranks[module] = len(a)
        place = f"base_model.model.{module}"
        tensors[f"{place}.lora_A.weight"] = np.ascontiguousarray(a)
        rows = hub_names.their_rows(header.architecture, tensor, heads, len(b))
        tensors[f"{place}.lora_B.weight"] = np.ascontiguousarray(b[rows])
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(tuned.base.name, ranks), indent=2)
    (target / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    (target / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    return [target / "adapter_config.json", target / "adapter_model.safetensors"]


def _config(base: str, ranks: dict[str, int]) -> dict[str, object]:
    """Every module by its whole name; alpha is its rank, so that its scale is 1."""
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
