"""Sticky affinity routing for Celery: a tag has one worker at a time, in order, in batches."""

from celery_affinity.app import Affinity
from celery_affinity.batches import BatchRequest
from celery_affinity.context import AffinityContext, current
from celery_affinity.events import tag_acquired, tag_released
from celery_affinity.exceptions import (
    AffinityError,
    AmbiguousQueueError,
    BatchResultError,
    BuriedError,
    ConfigurationError,
    MissingTagError,
    NoSuchWorkerError,
    OperationError,
    OwnTagWaitError,
    SchemaVersionError,
    ShardsError,
    TagError,
    UndeclaredQueueError,
)
from celery_affinity.guard import refuse_workers_without_affinity
from celery_affinity.settings import AffinityQueue, AffinitySettings
from celery_affinity.task import affinity_task
from celery_affinity.types import (
    ChangeRecord,
    DeadLetter,
    EvacuationRecord,
    Finding,
    HoldRecord,
    LeaderRecord,
    PulseRecord,
    QueueStats,
    QueueStatus,
    SlotRecord,
    StatusRecord,
    TagExplanation,
    TagRecord,
    TaskExplanation,
    WorkerRecord,
)

__version__ = "0.1.0"

refuse_workers_without_affinity()

__all__ = (
    # set up
    "Affinity",
    "AffinityQueue",
    "AffinitySettings",
    # tasks
    "AffinityContext",
    "BatchRequest",
    "affinity_task",
    "current",
    "tag_acquired",
    "tag_released",
    # records
    "ChangeRecord",
    "DeadLetter",
    "EvacuationRecord",
    "Finding",
    "HoldRecord",
    "LeaderRecord",
    "PulseRecord",
    "QueueStats",
    "QueueStatus",
    "SlotRecord",
    "StatusRecord",
    "TagExplanation",
    "TagRecord",
    "TaskExplanation",
    "WorkerRecord",
    # errors
    "AffinityError",
    "AmbiguousQueueError",
    "BatchResultError",
    "BuriedError",
    "ConfigurationError",
    "MissingTagError",
    "NoSuchWorkerError",
    "OperationError",
    "OwnTagWaitError",
    "SchemaVersionError",
    "ShardsError",
    "TagError",
    "UndeclaredQueueError",
)
