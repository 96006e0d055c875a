"""`seedwire export`: which forms are written, and what is said of those that are not."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from services.console import options
from services.console.export import card, control_vector, gguf_lora, peft_folder, soft_prompt
from services.console.export.gather import gather
from services.console.export.tuned import Tuned
from services.console.failure import Failure, Usage
from services.console.job_commands import LOCAL, talk
from services.console.printing import Printer
from shared import subjects
from shared.nats_bus import NatsBus


class Form(StrEnum):
    """What an adapter can be written as."""

    GGUF = "gguf"
    CONTROL_VECTOR = "control-vector"
    PEFT = "peft"
    SOFT_PROMPT = "soft-prompt"


_OBSTACLES = {
    Form.GGUF: gguf_lora.obstacle,
    Form.CONTROL_VECTOR: control_vector.obstacle,
    Form.PEFT: peft_folder.obstacle,
    Form.SOFT_PROMPT: soft_prompt.obstacle,
}
CARD = "README.md"


@dataclass(frozen=True)
class Written:
    """What is there now, and why the other forms are not."""

    files: list[Path]
    refused: dict[Form, str]


def export(
    job: Annotated[str, typer.Argument(help="The job whose adapter it is.")],
    servers: options.Servers = LOCAL,
    round: Annotated[
        int | None,
        typer.Option(
            "--round",
            min=1,
            help="The adapter as it was after this round, replayed from the log; otherwise the "
            "published one that did best on held-out rows, or the newest of them.",
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where to (JOB-export).")
    ] = None,
    form: Annotated[
        list[Form] | None,
        typer.Option(
            "--form",
            help="A LoRA for llama.cpp and Ollama (gguf), a folder for peft and transformers "
            "(peft), control vectors for llama.cpp, a soft prompt's numbers; may be repeated. "
            "Default: every form that the adapter has.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The job's GGUF file; otherwise its header is read from the store."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What Hugging Face calls the base model, such as owner/name; otherwise what the "
            "GGUF file says.",
        ),
    ] = None,
    dtype: Annotated[
        gguf_lora.Dtype, typer.Option(help="The numbers of the GGUF LoRA; f16 rounds them.")
    ] = "f32",
    as_json: options.Json = False,
) -> None:
    """Write a job's adapter for llama.cpp, Ollama, and transformers, with a model card."""
    printer = Printer(as_json=as_json)
    folder = to or Path(f"{job}-export")

    async def work(bus: NatsBus) -> None:
        _check(job, folder, model)
        tuned = await gather(bus, job, round=round, model=model, base_name=base, printer=printer)
        try:
            written = write(tuned, folder, form or [], dtype)
        except OSError as error:
            raise Failure(f"cannot write to {folder}: {error.strerror}") from error
        printer.result(_as_json(tuned, written), _as_text(tuned, written))

    talk(servers, work, as_json=as_json)


def write(tuned: Tuned, folder: Path, forms: list[Form], dtype: gguf_lora.Dtype) -> Written:
    """The adapter is in `folder` in all of `forms`; none: in every form that it has.

    Raises:
        Failure: one of `forms` does not exist for it; nothing is written.
    """
    wanted = [form for form in Form if form in (forms or Form)]
    refused = {form: why for form in wanted if (why := _OBSTACLES[form](tuned))}
    chosen = [form for form in wanted if form not in refused]
    if (forms and refused) or not chosen:
        raise Failure("; ".join(refused.values()))
    if "control" not in tuned.kinds:
        refused.pop(Form.CONTROL_VECTOR, None)  # nobody would look for it
    if "prompt" not in tuned.kinds:
        refused.pop(Form.SOFT_PROMPT, None)
    if {"control"} < tuned.kinds and not {Form.GGUF, Form.CONTROL_VECTOR} <= set(chosen):
        raise Failure(
            "the adapter is a LoRA and control vectors, and one without the other is another "
            "adapter: give both --form gguf and --form control-vector"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    if Form.GGUF in chosen:
        files += gguf_lora.write(tuned, folder, dtype)
    if Form.CONTROL_VECTOR in chosen:
        files += control_vector.write(tuned, folder)
    if Form.SOFT_PROMPT in chosen:
        files += soft_prompt.write(tuned, folder)
    if Form.PEFT in chosen:
        files += peft_folder.write(tuned, folder)
        files.append(folder / peft_folder.FOLDER / CARD)
        files[-1].write_text(
            card.front_matter(tuned) + card.text(tuned, ["peft"], inside=True), encoding="utf-8"
        )
    files.append(folder / CARD)
    files[-1].write_text(card.text(tuned, [*chosen]), encoding="utf-8")
    return Written(files, refused)


def _check(job: str, folder: Path, model: Path | None) -> None:
    if not subjects.NAME.match(job):
        raise Usage(f"{job!r} is no job's name: 1 to 64 of A-Z a-z 0-9 _ -")
    if folder.exists() and not folder.is_dir():
        raise Usage(f"--to {folder}: there is a file of that name; name a directory")
    if model is not None and not model.is_file():
        raise Usage(f"--model {model}: there is no such file")


def _as_json(tuned: Tuned, written: Written) -> dict[str, object]:
    return {
        "job": tuned.job,
        "round": tuned.adapter.round,
        "digest": tuned.adapter.digest(),
        "base": {"name": tuned.base.name, "sha256": tuned.base.variant.digest},
        "files": written.files,
        "refused": written.refused,
    }


def _as_text(tuned: Tuned, written: Written) -> str:
    lines = [f"job {tuned.job}, round {tuned.adapter.round}, adapter {tuned.adapter.digest()}"]
    lines += [f"{path}: {path.stat().st_size:,} bytes" for path in written.files]
    return "\n".join([*lines, *(f"not written: {why}" for why in written.refused.values())])
