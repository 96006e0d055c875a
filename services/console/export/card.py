"""The model card: what the adapter is, where it comes from, how good it is, how to load it.

Every figure is the log's. It names no device, because the log names none.
"""

import json

from services.console.export.peft_folder import FOLDER
from services.console.export.tuned import Tuned
from services.console.labels import spaced
from shared.engine.fitting import OUTPUT
from shared.heldout import Measured
from shared.runtime import project_version

Row = tuple[str, str]

_KINDS = {
    "lora_a": "LoRA (A and B tuned)",
    "lora_b": "LoRA (B tuned, A fixed)",
    "output_rows": "rows of the output matrix",
    "control": "control vectors",
    "prompt": "a soft prompt behind the text",
}


def front_matter(tuned: Tuned) -> str:
    """What a hub reads of a PEFT folder's card."""
    hub = tuned.base.hub_name
    lines = ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- seedwire"]
    if hub:  # a hub refuses names that it does not know
        lines.insert(0, f"base_model: {json.dumps(hub)}")
    return "\n".join(["---", *lines, "---", "", ""])


def text(tuned: Tuned, forms: list[str], *, inside: bool = False) -> str:
    """The card in Markdown, for the folder that holds `forms`; `inside`: for the PEFT folder."""
    parts = [
        f"# {tuned.job}: an adapter for {tuned.base.name}\n",
        "Tuned with [Seedwire](#how-it-was-tuned) by a fleet of devices that only ran the model: "
        "none of them backpropagated through it, and the data never left them.\n",
        _table([("", ""), *_facts(tuned)]),
        *_task(tuned),
        *_tuning(tuned),
        *_evaluation(tuned),
        "## How to load it\n",
        *(part for form in forms for part in _LOADING[form](tuned, inside)),
        *_licence(tuned),
    ]
    return "\n".join(parts)


def _facts(tuned: Tuned) -> list[Row]:
    variant, adapter = tuned.base.variant, tuned.adapter
    hidden = {"lora_b"} if "lora_a" in tuned.kinds else set[str]()
    kinds = [shown for kind, shown in _KINDS.items() if kind in tuned.kinds - hidden]
    return [
        ("base model", tuned.base.name),
        ("its file", f"`{variant.name}`, {variant.size_bytes:,} bytes"),
        ("SHA-256 of the file", f"`{variant.digest}`"),
        ("architecture", tuned.base.header.architecture),
        ("quantisation", tuned.base.header.quantisation),
        ("adapter", f"{' and '.join(kinds)}, d = {adapter.layout.d:,} parameters"),
        ("moves", ", ".join(_places(tuned))),
        ("round", str(adapter.round)),
        ("digest of the adapter", f"`{adapter.digest()}`"),
        ("made by", f"Seedwire {project_version()}, job {tuned.job}"),
    ]


def _places(tuned: Tuned) -> list[str]:
    """The model's tensors that are moved, those of all layers in one word."""
    layers: dict[str, list[int]] = {}
    for block in tuned.blocks.blocks:
        if block.kind == "prompt":
            layers[f"{len(block.rows)} embeddings before the answer"] = []
            continue
        name = "after layer" if block.kind == "control" else block.tensor.removesuffix(".weight")
        prefix, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        if prefix == "blk" and part:
            layers.setdefault(part, []).append(int(number))
        elif block.kind == "control":
            layers.setdefault(name, []).append(block.layer)
        else:
            layers.setdefault(name, [])
    return [f"{name} {_runs(found)}".strip() for name, found in layers.items()]


def _runs(layers: list[int]) -> str:
    """The numbers in order, neighbours as a run: 0-2, 5."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _task(tuned: Tuned) -> list[str]:
    task = tuned.spec.task
    if not task.labels:
        return [
            "## The task\n",
            "It was tuned to go on from a prompt with its completion.\n",
        ]
    words = list(spaced(task).items())
    lines = [
        "## The task\n",
        "It names the label of a text. Put the text into this prompt, and take the label whose "
        "word's first token is the likeliest of them to follow:\n",
        _fenced(task.template),
        _table([("label", "word"), *((label, f"`{word}`") for label, word in words)]),
    ]
    if task.loss == "choices":
        lines.append(
            "Only these first tokens were compared with each other; what else the model might "
            "say there was not tuned.\n"
        )
    return lines


def _tuning(tuned: Tuned) -> list[str]:
    closes = tuned.history.until(tuned.adapter.round)
    tuning = tuned.spec.tuning
    how = "in closed form from one pass" if tuning.how == "exact" else "by two passes each"
    moved = sum(closed.commit is not None for closed in closes)
    updates = sum(closed.updates for closed in closes)
    late = sum(closed.late for closed in closes)
    step = f"{tuning.step:g}, falling to {tuning.final_step:g} of it"
    rows = [
        ("rounds", f"{len(closes)} closed, {moved} moved it"),
        ("devices", f"up to {max(closed.devices for closed in closes)} in one round"),
        ("updates", f"{updates:,} in time, {late:,} late"),
        ("slopes measured", f"{sum(closed.probes for closed in closes):,}"),
        ("method", f"{tuning.method}, {tuning.directions} directions a round, slopes {how}"),
        ("step", f"{step}; momentum {tuning.momentum}/256"),
    ]
    return [
        "## How it was tuned\n",
        "Each device found, on its own data, how far to go along random directions that everybody "
        "regenerates from a seed, and sent those numbers alone. Their sum moves the adapter. The "
        "data is the devices' own: it was not collected, and is not described here.\n",
        _table([("", ""), *rows]),
    ]


def _evaluation(tuned: Tuned) -> list[str]:
    found = tuned.history.evaluations_until(tuned.adapter.round)
    if not found:
        return ["## Evaluation\n", "Nobody has measured it on held-out data.\n"]
    answers = tuned.spec.task.loss != "tokens"
    head = ("after round", "examples", *(["right", "accuracy"] if answers else []), "loss")
    rows: list[tuple[str, ...]] = [head]
    for measured in found:
        right = [str(measured.correct), _percent(measured.accuracy)] if answers else []
        examples = str(measured.examples)
        rows.append((str(measured.round - 1), examples, *right, _number(measured.loss)))
    final = tuned.history.evaluation_of(tuned.adapter.round)
    lines = [
        "## Evaluation\n",
        "On held-out rows of the devices that the operator trusts with them. The loss is in nats "
        f"per {'example' if tuned.spec.task.loss == 'choices' else 'token'}.\n",
        _table(rows),
    ]
    lines.append(
        "This very adapter was not measured.\n"
        if final is None
        else f"**This adapter: {_final(final, answers=answers)}.**\n"
    )
    if len(found) > 1 and tuned.history.is_best(tuned.adapter.round):
        lines.append(
            "It did best on these rows among the versions of its job, so another choice of rows "
            "would likely find it a little worse.\n"
        )
    return lines


def _final(measured: Measured, *, answers: bool) -> str:
    loss = f"loss {_number(measured.loss)}"
    return f"accuracy {_percent(measured.accuracy)}, {loss}" if answers else loss


def _gguf(tuned: Tuned, inside: bool) -> list[str]:
    base, name = tuned.base.variant.name, f"{tuned.job}-lora.gguf"
    more = f" --control-vector {tuned.job}-control.gguf" if "control" in tuned.kinds else ""
    python = f'from llama_cpp import Llama\n\nmodel = Llama("{base}", lora_path="{name}")'
    lines = ["llama.cpp, with the file that the fleet ran:\n"]
    if more:
        lines[0] = "llama.cpp, with the file that the fleet ran (both parts are the adapter):\n"
    lines.append(_fenced(f"llama-server -m {base} --lora {name}{more}", "sh"))
    if not more:
        lines += ["llama-cpp-python:\n", _fenced(python, "python")]
        lines += ["Ollama:\n", _fenced(f"ollama create {tuned.job} -f Modelfile", "sh")]
    return lines


def _control(tuned: Tuned, inside: bool) -> list[str]:
    if tuned.kinds != {"control"}:
        return []
    base, name = tuned.base.variant.name, f"{tuned.job}-control.gguf"
    return [
        "llama.cpp, with the file that the fleet ran:\n",
        _fenced(f"llama-server -m {base} --control-vector {name}", "sh"),
    ]


def _peft(tuned: Tuned, inside: bool) -> list[str]:
    base = tuned.base
    folder = "." if inside else FOLDER
    hub = base.hub_name or "OWNER/NAME of the base model on Hugging Face"
    same = f'base = AutoModelForCausalLM.from_pretrained(".", gguf_file="{base.variant.name}")'
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{hub}")',
        f'model = PeftModel.from_pretrained(base, "{folder}")',
    ]
    parts = [
        "transformers and peft:\n",
        _fenced("\n".join(lines), "python"),
        "Over weights that are not quantised the numbers differ a little from the fleet's. The "
        "fleet's own, with the GGUF file in this folder and the package `gguf`:\n",
        _fenced(same, "python"),
    ]
    if OUTPUT in tuned.names:
        untie = [
            "base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())",
            "base.config.tie_word_embeddings = False",
        ]
        parts += [
            "It moves rows of `lm_head`. Where the base ties that to its embeddings "
            "(`base.config.tie_word_embeddings`), peft warns, and the adapter is right as loaded; "
            "but to merge it, give the base an `lm_head` of its own first, or the embeddings move "
            "too:\n",
            _fenced("\n".join(untie), "python"),
        ]
    return parts


def _soft_prompt(tuned: Tuned, inside: bool) -> list[str]:
    lines = [
        "from safetensors.torch import load_file",
        "",
        f'prompt = load_file("{tuned.job}-prompt.safetensors")',
        "look_up = model.get_input_embeddings()",
        'soft = look_up(prompt["start"].long()) + prompt["added"]',
        "inputs = torch.cat([look_up(tokens), soft])[None]  # tokens: all before the answer",
        "logits = model(inputs_embeds=inputs).logits",
    ]
    return [
        "The proxy of the fleet (`seedwire serve`) answers with it. Elsewhere its embeddings are "
        "put between the tokens of what is asked, a template's words included, and the answer's; "
        "with transformers, over the same weights:\n",
        _fenced("\n".join(lines), "python"),
    ]


_LOADING = {
    "gguf": _gguf,
    "control-vector": _control,
    "peft": _peft,
    "soft-prompt": _soft_prompt,
}


def _licence(tuned: Tuned) -> list[str]:
    known = tuned.base.header.text("general.license")
    of = f" (its file says {known})" if known else ""
    return ["## Licence\n", f"As the base model's{of}.\n"]


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *others = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *others]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _fenced(code: str, language: str = "") -> str:
    fence = "```"
    while fence in code:
        fence += "`"
    return f"{fence}{language}\n{code}\n{fence}\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
