"""Wire types, one file per conversation, and the unions that a subject may carry.

Knows nothing of how they travel.
"""

from shared.messages.base import Message, Range, Ranges
from shared.messages.identity import (
    ConnectionRefused,
    DeviceRevoked,
    DevicesInvited,
    Enroll,
    Enrolled,
    IdentitiesListed,
    Identity,
    InviteDevices,
    ListIdentities,
    RevokeDevice,
)
from shared.messages.jobs import (
    BlobRef,
    Block,
    DevicesListed,
    DeviceSummary,
    Distilled,
    Evaluation,
    JobAccepted,
    JobsListed,
    JobSpec,
    JobSummary,
    ListDevices,
    ListJobs,
    Manifest,
    OpenEpoch,
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
    Commit,
    Contribution,
    DetailEvent,
    EpochOpened,
    EvaluationSums,
    FoldedUpdate,
    Frozen,
    Importance,
    JobEnded,
    JobOpened,
    LocalSteps,
    LogEvent,
    ModelPublished,
    PoolSums,
    RoundClosed,
    RoundOpened,
    RoundReport,
    Term,
    UpdatesFolded,
    Walk,
    WalkSums,
    WriterStarted,
)
from shared.messages.telemetry import ServiceReport
from shared.messages.updates import (
    EvaluateResult,
    ProbeResult,
    SubmitUpdate,
    UpdateKey,
    UpdateSettled,
    WalkResult,
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
    WalkWork,
    WorkAssigned,
)

AnyMessage = (
    SubmitJob
    | StopJob
    | OpenEpoch
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
    | WriterStarted
    | SubmitUpdate
    | UpdateSettled
    | RequestWork
    | WorkAssigned
    | ComeBack
    | WakeUp
    | DeviceReport
    | DecisionMade
    | ServiceReport
    | InviteDevices
    | DevicesInvited
    | Enroll
    | Enrolled
    | RevokeDevice
    | DeviceRevoked
    | ListIdentities
    | IdentitiesListed
    | ConnectionRefused
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
    "ConnectionRefused",
    "Contribution",
    "DecisionMade",
    "DetailEvent",
    "DeviceReport",
    "DeviceRevoked",
    "DeviceSummary",
    "DevicesInvited",
    "DevicesListed",
    "Distilled",
    "Enroll",
    "Enrolled",
    "EpochOpened",
    "EvaluateResult",
    "EvaluateWork",
    "Evaluation",
    "EvaluationSums",
    "FoldedUpdate",
    "Frozen",
    "IdentitiesListed",
    "Identity",
    "Importance",
    "InviteDevices",
    "JobAccepted",
    "JobEnded",
    "JobOpened",
    "JobSpec",
    "JobSummary",
    "JobsListed",
    "ListDevices",
    "ListIdentities",
    "ListJobs",
    "LocalSteps",
    "LogEvent",
    "Manifest",
    "Message",
    "ModelPublished",
    "OpenEpoch",
    "Pacing",
    "PoolSums",
    "ProbeResult",
    "ProbeWork",
    "Range",
    "Ranges",
    "Refused",
    "RequestWork",
    "RevokeDevice",
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
    "Walk",
    "WalkResult",
    "WalkSums",
    "WalkWork",
    "WorkAssigned",
    "WriterStarted",
]
