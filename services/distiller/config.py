"""The distiller's settings."""

from typing import Annotated

from msgspec import Meta

from shared.service import ServiceSettings


class Settings(ServiceSettings, frozen=True):
    """Distillation: what the ensemble knows opens the next epoch of a job."""

    job: Annotated[str, Meta(description="The job, which waits for its next epoch.")] = ""
    small: Annotated[
        str,
        Meta(description="The small model's float checkpoint: a folder that transformers loads."),
    ] = ""
    large: Annotated[str, Meta(description="The large model's GGUF file; same tokenizer.")] = ""
    public: Annotated[
        str,
        Meta(description="JSON lines of public rows such as the devices'; labels may be missing."),
    ] = ""
    heldout: Annotated[
        str,
        Meta(description="Public rows to judge by; without it, a share of --public is held out."),
    ] = ""
    heldout_share: Annotated[float, Meta(gt=0.0, lt=1.0, description="That share.")] = 0.2
    rows: Annotated[
        int, Meta(ge=2, le=10_000_000, description="Public rows that are read, at most.")
    ] = 2000
    alpha: Annotated[
        float,
        Meta(ge=0.0, le=10.0, description="How strongly the small model steers the large one."),
    ] = 1.0
    answers: Annotated[
        float,
        Meta(ge=0.0, le=100.0, description="Weight (lambda) of the public rows' own answers."),
    ] = 0.5
    top_k: Annotated[
        int,
        Meta(ge=1, le=2**20, description="Tokens of each position that are told apart."),
    ] = 64
    temperature: Annotated[float, Meta(ge=0.1, le=10.0, description="Of both sides.")] = 1.0
    steps: Annotated[
        int,
        Meta(ge=0, le=1_000_000, description="Steps of Adam; 0: so many as read each row twice."),
    ] = 0
    batch_rows: Annotated[int, Meta(ge=1, le=4096, description="Rows of each step.")] = 16
    rate: Annotated[float, Meta(gt=0.0, le=1.0, description="Adam's rate at first.")] = 3e-3
    seed: Annotated[int, Meta(ge=0, le=2**31, description="Of the rows' order.")] = 1
    cache: Annotated[
        str,
        Meta(
            description="Where the models' answers are kept, up to max_cache_bytes; empty: nowhere."
        ),
    ] = "~/.cache/seedwire/distiller"
    max_cache_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Bytes of disk for the answers kept; those that were not used for longest "
            "make room for new ones, and are asked for again if they are wanted.",
        ),
    ] = 4 * 1024**3
    device: Annotated[
        str, Meta(description="What torch computes the small model on: cpu, cuda ...")
    ] = "cpu"
    threads: Annotated[
        int, Meta(ge=0, le=512, description="Threads that compute; 0: one for each core.")
    ] = 0
    force: Annotated[
        bool, Meta(description="Open the epoch even if the small model's held-out loss rose.")
    ] = False
    json: Annotated[bool, Meta(description="Print the result as one line of JSON.")] = False
