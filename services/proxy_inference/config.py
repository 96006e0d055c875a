"""The proxy's settings."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.service import HttpSettings, Port


class Settings(HttpSettings, frozen=True):
    """Proxy inference: the fleet's tuned model behind an OpenAI-compatible HTTP server."""

    port: Port = 8080
    state_dir: Annotated[
        str, Meta(description="Where fetched models and the last versions lie.")
    ] = "~/.local/state/seedwire/proxy"
    model: Annotated[
        str,
        Meta(description="The base model's GGUF file; without it, it is fetched from the fleet."),
    ] = ""
    job: Annotated[
        str, Meta(description="Serve this job; without it, the job that published last.")
    ] = ""
    prefer: Annotated[
        Literal["best", "newest"],
        Meta(
            description="Which of a job's versions serves: the best on held-out rows of trusted "
            "devices (the newest, where there are none), or always the newest."
        ),
    ] = "best"
    large: Annotated[
        str,
        Meta(
            description="A large model, which the tuned small one steers: a GGUF file, or the "
            "address of an OpenAI-compatible server, http://HOST:PORT/v1; none: no."
        ),
    ] = ""
    large_name: Annotated[
        str, Meta(description="What that server calls the model, if it has more than one.")
    ] = ""
    large_key: Annotated[str, Meta(description="The bearer token that the server wants.")] = ""
    alpha: Annotated[
        float,
        Meta(
            ge=0.0, le=10.0, description="How strongly, where a request does not say proxy_alpha."
        ),
    ] = 1.0
    mode: Annotated[
        Literal["", "small", "large", "ensemble"],
        Meta(description="What answers where a request does not say proxy_mode; empty: the best."),
    ] = ""
    validation: Annotated[
        str,
        Meta(
            description="Rows as devices hold them; each mode is measured on the first 200 "
            "whenever a version begins to serve."
        ),
    ] = ""
    speculate: Annotated[
        bool,
        Meta(description="Let the small model draft what the ensemble says, where that pays."),
    ] = True
    api_key: Annotated[
        str, Meta(description="The bearer token that requests must bring; empty: none.")
    ] = ""
    threads: Annotated[
        int, Meta(ge=0, le=512, description="Threads that compute; 0: one for each core.")
    ] = 0
    context_tokens: Annotated[
        int,
        Meta(
            ge=256,
            le=2**22,
            description="Tokens that the cache holds, of all requests together; no prompt and "
            "answer are longer.",
        ),
    ] = 8192
    sequences: Annotated[
        int, Meta(ge=1, le=64, description="Answers that are computed at the same time.")
    ] = 8
    queue: Annotated[
        int, Meta(ge=0, le=100_000, description="Answers that may wait; beyond that, HTTP 429.")
    ] = 64
    keep_versions: Annotated[
        int, Meta(ge=1, le=1000, description="Versions of a job kept on disk, to roll back to.")
    ] = 5
    body_bytes: Annotated[
        int, Meta(ge=1024, le=2**30, description="The largest request body taken.")
    ] = 4 * 2**20
    drain_s: Annotated[
        float,
        Meta(ge=0.0, le=15.0, description="How long running answers may take when it is stopped."),
    ] = 12.0
