"""Operator and aggregator: what a job is, and how it is asked for, stopped and listed."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from shared.messages.base import Count, Digest, Finite, Label, Message, Name, Record, Round, Seconds

Loss = Literal["tokens", "choices"]
How = Literal["probe", "exact"]
Distribution = Literal["signs", "gauss8"]


class Block(Record, frozen=True):
    """A run of parameters that share a place in the model and a scale.

    `lora_b` is one rank slot of the B of a LoRA on `tensor`: `shape` is (d_out,), its row of A has
    `d_in` entries. `lora_a` is added to that row of A, which the job's seed makes, of the same
    tensor and slot: (d_in,). `control` is added to the residual stream after layer `layer`:
    (n_embd,). `output_rows` is added to the rows `rows` of the output matrix: (len(rows), n_embd).
    `prompt` stands between a row's prompt and its answer as embeddings of its own, those of the
    tokens `rows` and `unit` times the block: (len(rows), n_embd).
    `scale` s multiplies the block's part of every direction by 2^s.
    """

    kind: Literal["lora_a", "lora_b", "control", "output_rows", "prompt"]
    tensor: Annotated[str, Meta(max_length=120)]
    shape: Annotated[list[Annotated[int, Meta(ge=1, le=2**24)]], Meta(min_length=1, max_length=2)]
    scale: Annotated[int, Meta(ge=0, le=12)] = 0
    slot: Annotated[int, Meta(ge=0, lt=4096)] = 0
    d_in: Annotated[int, Meta(ge=0, le=2**24)] = 0
    layer: Annotated[int, Meta(ge=0, lt=4096)] = 0
    rows: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=2**16)] = []
    unit: Annotated[float, Meta(gt=0.0, le=1e6)] | UnsetType = UNSET
    """Of a prompt alone: what a parameter of 1 adds to an embedding as the first layer sees it."""


class Variant(Record, frozen=True):
    """One GGUF file of the model: what a device may hold and where else it may be had."""

    digest: Digest
    size_bytes: Count
    name: Annotated[str, Meta(max_length=200)]
    url: Annotated[str, Meta(max_length=2000)] | None = None


class Manifest(Record, frozen=True):
    """What the adapter's numbers are; its bytes, as logged, are part of every digest.

    The job's `seed` makes the A that each LoRA begins with and the directions alike.
    """

    epoch: Annotated[int, Meta(ge=0, lt=2**32)]
    architecture: Annotated[str, Meta(max_length=64)]
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    blocks: Annotated[list[Block], Meta(min_length=1, max_length=2**16)]
    variants: Annotated[list[Variant], Meta(min_length=1, max_length=64)]
    d: Annotated[int, Meta(ge=1, le=2**28)]
    distribution: Distribution = "signs"
    update_rule: Literal["plain", "momentum"] = "plain"
    v: Annotated[int, Meta(ge=1)] = 1
    a_epoch: Annotated[int, Meta(ge=0, lt=2**32)] | UnsetType = UNSET
    """Whose A each LoRA begins with: that of this earlier epoch; unset: its own."""

    @property
    def epoch_of_a(self) -> int:
        return self.epoch if self.a_epoch is UNSET else self.a_epoch


class Task(Record, frozen=True):
    """How a row of private data becomes an example, and what its loss is.

    For rows of `text` and `label`: `template` holds `{text}`, `labels` maps each label to its word.
    Rows of `prompt` and `completion` need neither. `choices` compares the words' first tokens.
    """

    loss: Loss
    template: Annotated[str, Meta(max_length=4000)] = "{text}"
    labels: Annotated[dict[Label, Label], Meta(max_length=1000)] = {}
    max_tokens: Annotated[int, Meta(ge=2, le=32768)] = 256


class Tuning(Record, frozen=True):
    """The method and its numbers.

    `step` is the learning rate of the mean loss in units of theta (per nat), or, with
    `normalise: rms`, the length of a step along a direction whose slope is the pool's root mean
    square. Both fall linearly to `final_step` of themselves at the last round.
    """

    method: Annotated[str, Meta(max_length=32)] = "seedwire"
    how: How = "probe"
    rounds: Annotated[int, Meta(ge=1, lt=2**31)] = 100
    directions: Annotated[int, Meta(ge=1, le=2**16)] = 512
    eps: Annotated[float, Meta(ge=1e-6, le=10.0)] = 0.01
    batch_rows: Annotated[int, Meta(ge=1, le=2**20)] = 32
    step: Annotated[float, Meta(gt=0.0, le=1e6)] = 0.01
    final_step: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    normalise: Literal["none", "rms"] = "rms"
    clip: Annotated[float, Meta(gt=0.0, le=1e6)] = 3.0
    """A slope is held within `clip` times the pool's root mean square."""
    momentum: Annotated[int, Meta(ge=0, le=255)] = 0
    """k of V = (k V >> 8) + sum c z; 230 is about 0.9."""
    local_steps: Annotated[int, Meta(ge=0, le=4096)] = 0
    """fedkseed: steps that a device walks in a round, each along one direction of the pool.
    seedwire with `how: exact`: steps of Adam that a device takes by itself; 0: it sends its
    gradient. `step` is then the share of the fleet's mean move that a round makes."""
    local_rows: Annotated[int, Meta(ge=1, le=2**20)] = 64
    """Mini-batch of each of seedwire's local steps."""
    local_rate: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.01
    """Adam's step in seedwire's local steps; falls linearly to `final_step` of itself."""
    candidates: Annotated[int, Meta(ge=1, le=64)] = 1
    """fwdllm: of so many times `directions`, every second commit takes those most alike to the
    commit before it; 1: never."""
    variance: Literal["raw", "normalised"] = "raw"
    """fwdllm: what two halves of the estimates are judged by, over the block `monitored`. `raw`:
    the mean of (a - b)^2 / 2 over its parameters, at most `threshold`. `normalised`: the
    signal-to-noise <a, b> / (|a - b|^2 / 4), at least `threshold`."""
    threshold: Annotated[float, Meta(gt=0.0, le=1e12)] = 0.1
    monitored: Annotated[int, Meta(ge=0, lt=2**16)] = 0
    most_more: Annotated[int, Meta(ge=0, le=40)] = 40
    """fwdllm: so many rounds more at most on one batch, then it commits whatever the halves say."""


class Pacing(Record, frozen=True):
    """When a round closes: with enough, at its deadline with what came, or abandoned."""

    enough_devices: Annotated[int, Meta(ge=1, le=2**20)] = 1
    enough_probes: Annotated[int, Meta(ge=1, le=2**40)] = 64
    deadline_s: Annotated[float, Meta(gt=0.0, le=1e7)] = 60.0
    minimum_probes: Annotated[int, Meta(ge=1, le=2**40)] = 1
    over_selection: Annotated[float, Meta(ge=1.0, le=10.0)] = 1.3
    lateness_rounds: Annotated[int, Meta(ge=0, le=16)] = 4


class Evaluation(Record, frozen=True):
    """How often trusted devices measure the adapter on their held-out rows; 0: never."""

    every_rounds: Annotated[int, Meta(ge=0, le=2**31)] = 10
    enough_devices: Annotated[int, Meta(ge=1, le=2**16)] = 1
    patience: Annotated[int, Meta(ge=0, le=2**31)] = 0
    """After so many measurements in a row without a better one tuning is over; 0: it goes on to
    its last round."""
    allow_devices: Annotated[list[Name], Meta(max_length=10_000)] = []
    """Whose measurements count; empty: those of every device that says it is trusted."""


class JobSpec(Record, frozen=True):
    """All of a job but its manifest."""

    task: Task
    tuning: Tuning = Tuning()
    pacing: Pacing = Pacing()
    evaluation: Evaluation = Evaluation()
    snapshot_every: Annotated[int, Meta(ge=1, le=2**31)] = 50
    allow_devices: Annotated[list[Name], Meta(max_length=100_000)] = []
    """Who may take part; empty: everyone."""
    epochs: Annotated[int, Meta(ge=1, le=2**16)] = 1
    """After the rounds of any but the last of them the job waits for an OpenEpoch."""


class SubmitJob(Message, frozen=True):
    """The operator asks for a job. `manifest` is an encoded Manifest."""

    job: Name
    spec: JobSpec
    manifest: Annotated[bytes, Meta(max_length=400_000)]


class StopJob(Message, frozen=True):
    """The operator ends a job at the next close."""

    job: Name


class BlobRef(Record, frozen=True):
    """A file in the blob store: its SHA-256, its size."""

    digest: Digest
    size_bytes: Count


class Distilled(Record, frozen=True):
    """What distillation did to an adapter before an epoch began with it.

    Losses are in nats per example (`choices`) or token, of public rows that were held out; they and
    accuracies are None where no such row has an answer. `before` is the adapter that the epoch
    before ended with, and the ensemble with its anchor; `after` the epoch's start and its anchor.
    """

    alpha: Annotated[float, Meta(ge=0.0, le=10.0)]
    """How strongly the small model steered the large one."""
    rows: Count
    """Public rows that were learned from."""
    heldout_rows: Count
    tokens: Count
    """Sent forward through the small model to learn."""
    steps: Count
    teacher_entropy_before: Finite
    """Of the ensemble on the held-out rows, nats."""
    teacher_entropy_after: Finite
    kl_before: Finite
    """KL(ensemble || small model) on the held-out rows: the ensemble before."""
    kl_after: Finite
    """Of the same ensemble, to the distilled model."""
    held_out_loss_before: Finite | None = None
    """Of the small model."""
    held_out_loss_after: Finite | None = None
    ensemble_loss_before: Finite | None = None
    ensemble_loss_after: Finite | None = None
    large_loss: Finite | None = None
    accuracy_before: Finite | None = None
    accuracy_after: Finite | None = None


class OpenEpoch(Message, frozen=True):
    """The operator has a job that waits go on in its next epoch, which `manifest` describes.

    `start` and `anchor` are adapters over that manifest as they lie in blobs.
    """

    job: Name
    manifest: Annotated[bytes, Meta(max_length=400_000)]
    start: BlobRef
    """Where theta begins: after the job's last round, without velocity."""
    anchor: BlobRef | None = None
    """What stands for the base model in the ensemble from now on."""
    distilled: Distilled | None = None


class ListJobs(Message, frozen=True):
    """The operator asks what jobs there are."""


class JobAccepted(Message, frozen=True):
    job: Name


class Refused(Message, frozen=True):
    """A request cannot be carried out; `reason` names the mend."""

    reason: str


class JobSummary(Record, frozen=True):
    job: Name
    status: Literal["running", "finishing", "waiting", "ended"]
    """`waiting`: for the next of its epochs to be opened."""
    epoch: Count
    round: Round
    rounds: Count
    digest: Digest
    reason: str = ""
    accuracy: Finite | None = None
    loss: Finite | None = None
    epochs: Count = 1


class JobsListed(Message, frozen=True):
    jobs: list[JobSummary]


class ListDevices(Message, frozen=True):
    """The operator asks the scheduler for its registry."""


class DeviceSummary(Record, frozen=True):
    device: Name
    seen_s_ago: Seconds
    job: str = ""
    doing: str = ""
    rows: Count = 0
    tokens_per_s: Finite = 0.0
    rounds: Count = 0
    reward: Finite = 0.0
    problem: str = ""
    rows_refused: Count = 0
    """Rows beside `rows`, held-out ones among them, that it cannot use."""


class DevicesListed(Message, frozen=True):
    devices: list[DeviceSummary]
