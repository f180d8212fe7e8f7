"""Jobs in Redis: submit, claim, renew, record, finish.

A job is a hash; its id travels through a stream that dispatchers read as one consumer group. The lease
is the idle time of the stream entry: the holder resets it by heartbeats, and an entry idle for longer
than the lease is claimed by somebody else. Every claim raises the job's *epoch*, and every write of a
holder carries its epoch and is refused (in one Lua step) when a newer one exists: a dispatcher that
was merely slow cannot overwrite what its successor does.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from service import codec, keys
from service.contracts import JobEvent, JobRecord, Progress
from service.errors import Conflict, Damaged, Invalid, LeaseLost, NotFound
from service.terms import TERMINAL, JobKind, JobState

log = logging.getLogger(__name__)

_ID = re.compile(r"job-[0-9a-f]+")
_JSON_FIELDS = ("spec", "progress", "result", "error")

# Write fields and append one event if the caller still holds the job. 1: written, 0: not the holder.
_WRITE = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'running' then
  return 0
end
for i = 6, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'type', ARGV[3], 'data', ARGV[4])
if ARGV[5] ~= '0' then
  redis.call('EXPIRE', KEYS[1], ARGV[5])
  redis.call('EXPIRE', KEYS[2], ARGV[5])
end
return 1
"""

# Take a job: epoch + 1, running. Returns the new epoch, or nothing when there is nothing to take: the job
# has ended, is to be cancelled, or stands in the queue twice and is held through the other entry.
_CLAIM = """
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'queued' and state ~= 'running' then return nil end
if state == 'running' and redis.call('HGET', KEYS[1], 'entry') ~= ARGV[4] then return nil end
if redis.call('HGET', KEYS[1], 'cancel_requested') == 'true' then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'finished_at', ARGV[1], 'updated_at', ARGV[1])
  redis.call('XADD', KEYS[2], '*', 'type', 'state', 'data', '{"state":"cancelled"}')
  redis.call('EXPIRE', KEYS[1], ARGV[5])
  redis.call('EXPIRE', KEYS[2], ARGV[5])
  return nil
end
local attempt = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'state', 'running', 'entry', ARGV[4], 'updated_at', ARGV[1])
redis.call('HSETNX', KEYS[1], 'started_at', ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'type', 'state', 'data',
  cjson.encode({state = 'running', attempt = attempt, epoch = epoch, dispatcher = ARGV[3]}))
return epoch
"""

# Heartbeat: reset the entry's idle time, only for the holder of the epoch.
_RENEW = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'running' then
  return 0
end
redis.call('XCLAIM', KEYS[2], ARGV[2], ARGV[3], 0, ARGV[4], 'JUSTID')
return 1
"""

# Cancel a job that nobody holds at once; ask the holder of a running one.
_CANCEL = """
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'queued' then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'finished_at', ARGV[1], 'updated_at', ARGV[1])
  redis.call('XADD', KEYS[2], '*', 'type', 'state', 'data', '{"state":"cancelled"}')
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
elseif state == 'running' then
  redis.call('HSET', KEYS[1], 'cancel_requested', 'true')
end
return state
"""


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until the lease runs out or a newer epoch exists."""

    job: JobRecord
    entry: str  # id in the stream
    consumer: str


class Jobs:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._write = redis.register_script(_WRITE)
        self._claim = redis.register_script(_CLAIM)
        self._renew = redis.register_script(_RENEW)
        self._cancel = redis.register_script(_CANCEL)

    # --- the asking side ----------------------------------------------------------------------------

    def submit(self, kind: JobKind, spec: Any) -> JobRecord:
        """Record a job and queue it, in one transaction; ``spec`` is one of the JobSpec dataclasses."""
        at = codec.now()
        job = JobRecord(_new_id(), kind, codec.to_plain(spec), JobState.QUEUED, 0, 0, at, at)
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(keys.job(job.id), mapping=_to_hash(job))
        pipe.zadd(keys.JOBS, {job.id: time.time()})
        _add_event(pipe, job.id, "state", {"state": JobState.QUEUED})
        pipe.xadd(keys.QUEUE, {"job": job.id})
        pipe.execute()
        return job

    def submit_once(self, key: str, kind: JobKind, spec: Any) -> JobRecord:
        """The unfinished job that makes ``key``, or a new one: the same question asked twice is one job."""
        with self._redis.lock(keys.lock(key), timeout=keys.LOCK_TTL_S):
            known = self.latest(key)
            if known is not None and known.state not in TERMINAL:
                return known
            job = self.submit(kind, spec)
            self._redis.set(keys.latest_job_for(key), job.id, ex=keys.MAKING_TTL_S)
            return job

    def latest(self, key: str) -> JobRecord | None:
        """The last job that ``submit_once`` was given for ``key``."""
        job_id: Any = self._redis.get(keys.latest_job_for(key))
        return self._known(job_id) if job_id else None

    def _known(self, job_id: str) -> JobRecord | None:
        """The job, unless its record cannot be read: then another one is needed."""
        try:
            return self.find(job_id)
        except Damaged as error:
            log.error("%s (%s)", error, error.__cause__)
            return None

    def find(self, job_id: str) -> JobRecord | None:
        if not _ID.fullmatch(job_id):
            return None
        raw: Any = self._redis.hgetall(keys.job(job_id))
        return _from_hash(raw) if raw else None

    def get(self, job_id: str) -> JobRecord:
        job = self.find(job_id)
        if job is None:
            raise NotFound("job_not_found", f"There is no job {job_id!r} (finished jobs are kept for 30 days).")
        return job

    def recent(self, limit: int = 50) -> list[JobRecord]:
        """The newest jobs first; ids whose record has expired are dropped from the list."""
        ids: Any = self._redis.zrevrange(keys.JOBS, 0, limit - 1)
        found = []
        for job_id in ids:
            try:
                job = self.find(job_id)
            except Damaged as error:
                log.error("left out: %s (%s)", error, error.__cause__)
                continue
            if job is None:
                self._redis.zrem(keys.JOBS, job_id)
            else:
                found.append(job)
        return found

    def events(self, job_id: str, after: str = "0", limit: int = 500) -> list[JobEvent]:
        """Events after the cursor, oldest first. Raises NotFound, or Invalid for a malformed cursor."""
        self.get(job_id)
        try:
            raw: Any = self._redis.xrange(keys.job_events(job_id), min=f"({after}", count=limit)
        except ResponseError as error:
            raise Invalid(
                "bad_cursor", f"{after!r} is no cursor; use the one of the last page.", param="after"
            ) from error
        return [
            JobEvent(cursor, _entry_time(cursor), fields["type"], json.loads(fields["data"]))
            for cursor, fields in raw
        ]

    def cancel(self, job_id: str) -> JobRecord:
        """Ask for the job to stop; at once when it waits, at the next shard when it runs."""
        job = self.get(job_id)
        state = self._cancel(
            keys=[keys.job(job_id), keys.job_events(job_id)], args=[codec.now(), keys.FINISHED_TTL_S]
        )
        if state in TERMINAL:
            raise Conflict("job_finished", f"Job {job_id} is {job.state} already.")
        return self.get(job_id)

    # --- the working side ---------------------------------------------------------------------------

    def announce(self, name: str, lease_s: float) -> None:
        """Say that a dispatcher is alive; believed for twice the lease."""
        self._redis.set(keys.DISPATCHER, name, px=int(2000 * lease_s))

    def dispatcher_alive(self) -> bool:
        return bool(self._redis.exists(keys.DISPATCHER))

    def claim(self, consumer: str, lease_s: float, block_s: float = 1.0) -> Claim | None:
        """The next job for ``consumer``: one whose lease ran out, else a new one, else None."""
        while True:
            entry = self._next_entry(consumer, int(lease_s * 1000), int(block_s * 1000))
            if entry is None:
                return None
            entry_id, job_id = entry
            try:
                self.find(job_id)  # a record that cannot be read must not be raised to running
                taken: Any = self._claim(
                    keys=[keys.job(job_id), keys.job_events(job_id)],
                    args=[codec.now(), keys.EVENTS_KEPT, consumer, entry_id, keys.FINISHED_TTL_S],
                )
                if taken:
                    return Claim(self.get(job_id), entry_id, consumer)
            except Damaged as error:
                self._bury(job_id, error)
            self._forget(entry_id)  # cancelled, finished by another holder, or not readable

    def renew(self, claim: Claim) -> None:
        """Heartbeat; raises LeaseLost when somebody else holds the job."""
        arguments = [claim.job.epoch, keys.QUEUE_GROUP, claim.consumer, claim.entry]
        if not self._renew(keys=[keys.job(claim.job.id), keys.QUEUE], args=arguments):
            raise _lost(claim.job)

    def record(self, claim: Claim, event: str, data: Mapping[str, Any], **fields: Any) -> None:
        """Append an event and set fields, as the holder; raises LeaseLost when it is not ours any more."""
        flat = [word for name, value in fields.items() for word in (name, _to_field(name, value))]
        kept_s = keys.FINISHED_TTL_S if fields.get("state") in TERMINAL else 0
        written = self._write(
            keys=[keys.job(claim.job.id), keys.job_events(claim.job.id)],
            args=[
                claim.job.epoch,
                keys.EVENTS_KEPT,
                event,
                json.dumps(data),
                kept_s,
                *flat,
                "updated_at",
                codec.now(),
            ],
        )
        if not written:
            raise _lost(claim.job)

    def finish(self, claim: Claim, state: JobState, **fields: Any) -> None:
        """End the job as ``state`` with its ``result`` or ``error`` and take it off the queue."""
        data = {"state": state, **{name: value for name, value in fields.items() if value is not None}}
        self.record(claim, "state", data, state=state, finished_at=codec.now(), **fields)
        self._forget(claim.entry)

    def release(self, claim: Claim) -> None:
        """Put the job back for another dispatcher at once; the attempt does not count."""
        attempts = claim.job.attempts - 1
        data = {"state": JobState.QUEUED, "reason": "dispatcher stopped"}
        self.record(claim, "state", data, state=JobState.QUEUED, attempts=attempts)
        self._redis.xadd(keys.QUEUE, {"job": claim.job.id})
        self._forget(claim.entry)

    def _next_entry(self, consumer: str, lease_ms: int, block_ms: int) -> tuple[str, str] | None:
        try:
            entries = self._overdue(consumer, lease_ms)
            if not entries:
                new: Any = self._redis.xreadgroup(
                    keys.QUEUE_GROUP, consumer, {keys.QUEUE: ">"}, count=1, block=block_ms
                )
                entries = new[0][1] if new else []
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._create_group()  # first start, or Redis was flushed
            return None
        return (entries[0][0], entries[0][1]["job"]) if entries else None

    def _overdue(self, consumer: str, lease_ms: int) -> list[Any]:
        """At most one entry whose holder has been silent for longer than the lease, taken over.

        Not XAUTOCLAIM: it looks at ten entries per call only, and a dead holder may stand behind many living.
        """
        pending: Any = self._redis.xpending_range(
            keys.QUEUE, keys.QUEUE_GROUP, min="-", max="+", count=1, idle=lease_ms
        )
        if not pending:
            return []
        entry = pending[0]["message_id"]
        taken: Any = self._redis.xclaim(keys.QUEUE, keys.QUEUE_GROUP, consumer, lease_ms, [entry])
        if not taken:  # somebody was faster, or the entry is gone from the stream
            return []
        return [item for item in taken if item[1]]

    def _create_group(self) -> None:
        try:
            self._redis.xgroup_create(keys.QUEUE, keys.QUEUE_GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _bury(self, job_id: str, error: Damaged) -> None:
        """End a job whose record cannot be read; who asks for it is told so, for as long as jobs are kept."""
        log.error("%s", error)
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(keys.job(job_id), mapping={"state": JobState.FAILED, "error": json.dumps(error.as_dict())})
        _add_event(pipe, job_id, "state", {"state": JobState.FAILED, "error": error.as_dict()})
        pipe.expire(keys.job(job_id), keys.FINISHED_TTL_S)
        pipe.expire(keys.job_events(job_id), keys.FINISHED_TTL_S)
        pipe.execute()

    def _forget(self, entry: str) -> None:
        pipe = self._redis.pipeline(transaction=True)
        pipe.xack(keys.QUEUE, keys.QUEUE_GROUP, entry)
        pipe.xdel(keys.QUEUE, entry)
        pipe.execute()


def _new_id() -> str:
    """Sorts by time of creation; 40 random bits keep two in one millisecond apart."""
    return f"job-{int(time.time() * 1000):011x}{secrets.token_hex(5)}"


def _entry_time(cursor: str) -> str:
    """A stream id starts with the milliseconds at which Redis took the entry."""
    at = datetime.fromtimestamp(int(cursor.partition("-")[0]) / 1000, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _lost(job: JobRecord) -> LeaseLost:
    return LeaseLost("lease_lost", f"Job {job.id} is not held under epoch {job.epoch} any more.")


def _add_event(pipe: Redis, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
    fields: Any = {"type": kind, "data": json.dumps(data)}
    pipe.xadd(keys.job_events(job_id), fields, maxlen=keys.EVENTS_KEPT, approximate=True)


def _to_field(name: str, value: Any) -> str:
    if name in _JSON_FIELDS:
        return codec.encode(value) if isinstance(value, Progress) else json.dumps(value)
    return str(value)


def _to_hash(job: JobRecord) -> Any:
    plain = codec.to_plain(job)
    plain["cancel_requested"] = str(job.cancel_requested).lower()
    return {name: _to_field(name, value) for name, value in plain.items() if value is not None}


def _from_hash(raw: Mapping[str, str]) -> JobRecord:
    try:
        plain = {name: json.loads(value) if name in _JSON_FIELDS else value for name, value in raw.items()}
        return codec.from_plain(JobRecord, plain)
    except ValueError as error:  # pydantic's ValidationError is one
        detail = f"The record of job {raw.get('id')!r} cannot be read: it is not what was written. Submit it again."
        raise Damaged("damaged_record", detail) from error
