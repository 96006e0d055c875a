"""What the engine's child process is asked, over a pipe, and what it answers.

Each is one MessagePack map, told apart by `type`. The daemon's side imports neither numpy nor
llama_cpp: arrays stay in the child. `Model` is what an engine must offer to be worked with there.
"""

from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from shared.messages import (
    Commit,
    EvaluateResult,
    LocalSteps,
    ProbeResult,
    Ranges,
    Task,
    WalkResult,
)
from shared.messages import Walk as Walking
from shared.messages.jobs import How


class Request(msgspec.Struct, frozen=True, tag_field="type", tag=True):
    """Something the child should do. It answers in order, one at a time."""


class Inspect(Request, frozen=True):
    """Open a GGUF just long enough to tell what it is. Answered by Facts."""

    path: str
    words: list[str] = []
    """Each is tokenized as it would follow the template's end: its first token is returned."""
    template: str = "{text}"
    prompt: str = ""
    """What a soft prompt would start as: its tokens, and their embeddings' size, are returned."""


class OpenJob(Request, frozen=True):
    """Load model and data for a job at theta = 0, round 0 of `epoch`. Answered by Opened.

    `data` and `heldout` are files or directories of rows; either may be empty.
    """

    job: str
    manifest: bytes
    task: Task
    model: str
    data: str
    heldout: str
    device: str
    threads: int = 1


class Look(Request, frozen=True):
    """See what data has come, gone or changed; the next round takes it. Answered by Held."""

    job: str


class Restore(Request, frozen=True):
    """Stand at a snapshot, the bytes of an adapter. Answered by Standing."""

    job: str
    path: str


class Apply(Request, frozen=True):
    """Apply the close of `round`. Answered by Standing."""

    job: str
    round: int
    commit: Commit | None


class Probe(Request, frozen=True):
    """Measure slopes on the device's batch of `round`. Answered by Probed."""

    job: str
    round: int
    stream_round: int
    how: How
    ranges: Ranges
    eps: float
    batch_rows: int
    scope: tuple[int, int]
    digest: str
    batch_round: int = 0
    """Whose mini-batch it is: 0, that of `round`."""
    local: LocalSteps | None = None


class Walk(Request, frozen=True):
    """Walk from the adapter along directions of the pool [0, directions). Answered by Walked."""

    job: str
    round: int
    part: int
    stream_round: int
    directions: int
    walk: Walking
    eps: float
    batch_rows: int
    scope: tuple[int, int]
    digest: str


class Evaluate(Request, frozen=True):
    """Measure loss and accuracy on the held-out rows. Answered by Evaluated."""

    job: str
    digest: str


class CloseJob(Request, frozen=True):
    """Forget a job. Answered by Done."""

    job: str


class Answer(msgspec.Struct, frozen=True, tag_field="type", tag=True):
    """What the child says back."""


class Facts(Answer, frozen=True):
    """What a GGUF is. `matrices` maps each 2-D tensor to [d_out, d_in]."""

    architecture: str
    n_embd: int
    n_layer: int
    n_vocab: int
    n_ctx_train: int
    tied: bool
    matrices: dict[str, list[int]]
    tokens: list[int]
    """First token of each word asked for."""
    parameters: int = 0
    last_block: list[str] = []
    """The matrices of the last block, if there is a closed form for it."""
    prompt: list[int] = []
    """The tokens of the prompt asked for, as it would follow the template's end."""
    prompt_rms: float = 0.0
    """Root mean square of their embeddings' entries, as the first layer sees them."""


class Held(Answer, frozen=True):
    """`refused` are rows that could not be used: `<file>:<line>: why`; at most 20 of them."""

    rows: int
    heldout_rows: int
    refused_rows: int
    refused: list[str]


class Opened(Held, frozen=True):
    """The job is open, with the adapter `digest`."""

    digest: str


class Standing(Answer, frozen=True):
    """Where the adapter stands now."""

    round: int
    digest: str


class Probed(Answer, frozen=True):
    result: ProbeResult
    seconds: float
    passes: int


class Walked(Answer, frozen=True):
    result: WalkResult
    seconds: float
    passes: int


class Evaluated(Answer, frozen=True):
    result: EvaluateResult
    seconds: float
    passes: int


class Done(Answer, frozen=True):
    pass


class Failed(Answer, frozen=True):
    """The request could not be carried out; the child lives on."""

    reason: str
    bug: bool = False
    """Not a refusal but an unexpected exception; `reason` holds its traceback."""


RequestUnion = Inspect | OpenJob | Look | Restore | Apply | Probe | Walk | Evaluate | CloseJob
AnswerUnion = Facts | Held | Opened | Standing | Probed | Walked | Evaluated | Done | Failed

Kind = Annotated[str, Meta(max_length=32)]


class Worker(Protocol):
    """The async face of a child: what the daemon and the console hold."""

    async def ask(self, request: RequestUnion, *, timeout_s: float) -> AnswerUnion:
        """The child's answer; a Failed is raised as EngineError.

        Raises:
            EngineError: the child refused.
            EngineDied: the child ended, or did not answer in time and was ended.
        """
        ...

    @property
    def peak_rss_mb(self) -> float:
        """Highest resident memory of any child so far, MB."""
        ...

    async def close(self) -> None: ...
