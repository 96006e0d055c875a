"""Wire types, one file per conversation, and the unions that a subject may carry.

Knows nothing of how they travel.
"""

from shared.messages.base import Message, Range, Ranges
from shared.messages.jobs import (
    Block,
    DevicesListed,
    DeviceSummary,
    Evaluation,
    JobAccepted,
    JobsListed,
    JobSpec,
    JobSummary,
    ListDevices,
    ListJobs,
    Manifest,
    Pacing,
    Refused,
    StopJob,
    SubmitJob,
    Task,
    Tuning,
    Variant,
)
from shared.messages.log import (
    AdapterEvaluated,
    BlobRef,
    Commit,
    Contribution,
    DetailEvent,
    EpochOpened,
    EvaluationSums,
    FoldedUpdate,
    Frozen,
    JobEnded,
    JobOpened,
    LogEvent,
    ModelPublished,
    PoolSums,
    RoundClosed,
    RoundOpened,
    RoundReport,
    Term,
    UpdatesFolded,
)
from shared.messages.telemetry import ServiceReport
from shared.messages.updates import (
    EvaluateResult,
    ProbeResult,
    SubmitUpdate,
    UpdateKey,
    UpdateSettled,
)
from shared.messages.work import (
    STOPPED,
    ComeBack,
    DecisionMade,
    DeviceReport,
    EvaluateWork,
    ProbeWork,
    RequestWork,
    Speed,
    WakeUp,
    WorkAssigned,
)

AnyMessage = (
    SubmitJob
    | StopJob
    | ListJobs
    | JobAccepted
    | Refused
    | JobsListed
    | ListDevices
    | DevicesListed
    | JobOpened
    | EpochOpened
    | RoundOpened
    | RoundClosed
    | AdapterEvaluated
    | ModelPublished
    | JobEnded
    | UpdatesFolded
    | RoundReport
    | SubmitUpdate
    | UpdateSettled
    | RequestWork
    | WorkAssigned
    | ComeBack
    | WakeUp
    | DeviceReport
    | DecisionMade
    | ServiceReport
)
"""Every message there is, told apart by its `type`."""

__all__ = [
    "STOPPED",
    "AdapterEvaluated",
    "AnyMessage",
    "BlobRef",
    "Block",
    "ComeBack",
    "Commit",
    "Contribution",
    "DecisionMade",
    "DetailEvent",
    "DeviceReport",
    "DeviceSummary",
    "DevicesListed",
    "EpochOpened",
    "EvaluateResult",
    "EvaluateWork",
    "Evaluation",
    "EvaluationSums",
    "FoldedUpdate",
    "Frozen",
    "JobAccepted",
    "JobEnded",
    "JobOpened",
    "JobSpec",
    "JobSummary",
    "JobsListed",
    "ListDevices",
    "ListJobs",
    "LogEvent",
    "Manifest",
    "Message",
    "ModelPublished",
    "Pacing",
    "PoolSums",
    "ProbeResult",
    "ProbeWork",
    "Range",
    "Ranges",
    "Refused",
    "RequestWork",
    "RoundClosed",
    "RoundOpened",
    "RoundReport",
    "ServiceReport",
    "Speed",
    "StopJob",
    "SubmitJob",
    "SubmitUpdate",
    "Task",
    "Term",
    "Tuning",
    "UpdateKey",
    "UpdateSettled",
    "UpdatesFolded",
    "Variant",
    "WakeUp",
    "WorkAssigned",
]
