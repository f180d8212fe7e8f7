"""Jobs on a real Redis: one holder at a time, fenced by its epoch; ends are final; nothing waits for ever."""

import random
import threading
import time
from typing import Any

import pytest
from redis import Redis

from service import codec, keys
from service.contracts import JobRecord, Progress
from service.errors import Conflict, Damaged, Invalid, LeaseLost, NotFound
from service.jobs import Claim, Jobs
from service.redis_server import EmbeddedRedis, connect
from service.specs import FitConceptSpec
from service.terms import TERMINAL, JobKind, JobState, LongExamples
from service.work import GradientSpec, PassSpec, Reading, Tracked

READING = Reading("f", "t", 128, LongExamples.TRUNCATE_LEFT, 8192, "float32")
PASS = PassSpec(**vars(READING), activation=None, gradient=GradientSpec(Tracked(2)), objective=None)
SPEC = FitConceptSpec("c", "m", "positive", "negative", PASS, 256)
LONG = 60.0  # a lease that does not run out in these tests
AT_ONCE = 0.0  # as a lease: whoever holds the job, it is taken over


def submit(jobs: Jobs) -> str:
    return jobs.submit(JobKind.FIT_CONCEPT, SPEC).id


def take(jobs: Jobs, consumer: str = "one", lease_s: float = LONG) -> Claim:
    claim = maybe(jobs, consumer, lease_s)
    assert claim is not None
    return claim


def maybe(jobs: Jobs, consumer: str, lease_s: float) -> Claim | None:
    return jobs.claim(consumer, lease_s, block_s=0.001)


@pytest.fixture(autouse=True)
def group(jobs: Jobs) -> None:
    """The first claim after a start only creates the consumer group."""
    assert maybe(jobs, "first", LONG) is None


def types(jobs: Jobs, job_id: str) -> list[str]:
    return [event.data.get("state", event.type) for event in jobs.events(job_id)]


def snapshot(redis: Redis, job_id: str) -> Any:
    return redis.hgetall(keys.job(job_id)), redis.xrange(keys.job_events(job_id)), redis.xlen(keys.QUEUE)


# --- a life -------------------------------------------------------------------------------------------


def test_a_job_runs_from_submit_to_success(jobs: Jobs, redis: Redis) -> None:
    submitted = jobs.submit(JobKind.FIT_CONCEPT, SPEC)
    assert (submitted.state, submitted.attempts, submitted.epoch) == (JobState.QUEUED, 0, 0)
    assert jobs.get(submitted.id) == submitted
    assert codec.from_plain(FitConceptSpec, submitted.spec) == SPEC

    claim = take(jobs)
    assert (claim.job.state, claim.job.attempts, claim.job.epoch) == (JobState.RUNNING, 1, 1)
    assert claim.job.started_at is not None
    progress = Progress("build", 5, 10, "examples", rate=2.5, eta_s=2.0, quarantined=1)
    jobs.record(claim, "progress", {"done": 5}, progress=progress)
    assert jobs.get(submitted.id).progress == progress
    jobs.record(claim, "log", {"message": "é"})

    jobs.finish(claim, JobState.SUCCEEDED, result={"index": "a@v1"})
    finished = jobs.get(submitted.id)
    assert (finished.state, finished.result, finished.error) == (JobState.SUCCEEDED, {"index": "a@v1"}, None)
    assert finished.finished_at is not None
    assert types(jobs, submitted.id) == ["queued", "running", "progress", "log", "succeeded"]
    assert jobs.events(submitted.id)[-1].data["result"] == {"index": "a@v1"}
    assert (redis.xlen(keys.QUEUE), maybe(jobs, "two", AT_ONCE)) == (0, None)


def test_a_failed_job_keeps_its_error(jobs: Jobs) -> None:
    error = {"code": "bad", "detail": "Bad.", "param": "path", "lines": [1, 2]}
    job_id = submit(jobs)
    jobs.finish(take(jobs), JobState.FAILED, error=error)
    assert (jobs.get(job_id).state, jobs.get(job_id).error) == (JobState.FAILED, error)


def test_jobs_are_taken_in_the_order_in_which_they_came(jobs: Jobs) -> None:
    ids = [submit(jobs) for _ in range(5)]
    assert [take(jobs, f"c{n}").job.id for n in range(5)] == ids
    assert maybe(jobs, "late", LONG) is None


def test_jobs_submitted_before_any_dispatcher_lived_are_not_lost(jobs: Jobs, redis: Redis) -> None:
    redis.flushall()
    job_id = submit(jobs)
    maybe(jobs, "first", LONG)
    assert take(jobs).job.id == job_id


def test_the_newest_jobs_are_listed_first_and_expired_ones_dropped(jobs: Jobs, redis: Redis) -> None:
    ids = [submit(jobs) for _ in range(4)]
    redis.delete(keys.job(ids[2]))
    assert [job.id for job in jobs.recent()] == [ids[3], ids[1], ids[0]]
    assert redis.zcard(keys.JOBS) == 3
    assert [job.id for job in jobs.recent(limit=1)] == [ids[3]]


def test_an_unknown_job_is_not_found(jobs: Jobs) -> None:
    assert jobs.find("job-0") is None
    for ask in (jobs.get, jobs.events, jobs.cancel):
        with pytest.raises(NotFound) as missing:
            ask("job-0")
        assert missing.value.code == "job_not_found"


@pytest.mark.parametrize("end", ["finished", "cancelled while it waited", "cancelled while it ran"])
def test_an_ended_job_and_its_events_are_forgotten_after_thirty_days(jobs: Jobs, redis: Redis, end: str) -> None:
    job_id = submit(jobs)
    if end == "cancelled while it waited":
        jobs.cancel(job_id)
        maybe(jobs, "one", LONG)
    else:
        jobs.finish(take(jobs), JobState.SUCCEEDED if end == "finished" else JobState.CANCELLED)
    for key in (keys.job(job_id), keys.job_events(job_id)):
        assert 0 < redis.ttl(key) <= keys.FINISHED_TTL_S
    assert redis.xlen(keys.QUEUE) == 0


def test_a_waiting_or_running_job_never_expires(jobs: Jobs, redis: Redis) -> None:
    job_id = submit(jobs)
    assert redis.ttl(keys.job(job_id)) == -1
    jobs.release(take(jobs))
    jobs.renew(take(jobs))
    assert {redis.ttl(keys.job(job_id)), redis.ttl(keys.job_events(job_id))} == {-1}


# --- events -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 3, 500])
def test_paging_by_cursor_gives_every_event_once_in_order(jobs: Jobs, page: int) -> None:
    job_id = submit(jobs)
    claim = take(jobs)
    for number in range(10):
        jobs.record(claim, "log", {"n": number})
    seen, cursor = [], "0"
    while found := jobs.events(job_id, after=cursor, limit=page):
        assert len(found) <= page
        assert found[0].cursor not in [event.cursor for event in seen]
        seen += found
        cursor = found[-1].cursor
    assert [event.data.get("n") for event in seen] == [None, None, *range(10)]
    assert jobs.events(job_id, after=cursor) == []
    jobs.record(claim, "log", {"n": 10})
    assert [event.data for event in jobs.events(job_id, after=cursor)] == [{"n": 10}]


def test_an_event_tells_when_it_happened(jobs: Jobs) -> None:
    before = codec.now()
    (event,) = jobs.events(submit(jobs))
    assert before <= event.at <= codec.now()


@pytest.mark.parametrize(
    "cursor", ["abc", "", "-", "+", "$", ">", "(0", "1-2-3", "-5", "1-*", "9" * 30, "ä", "18446744073709551616"]
)
def test_a_malformed_cursor_is_refused(jobs: Jobs, cursor: str) -> None:
    job_id = submit(jobs)
    with pytest.raises(Invalid) as refused:
        jobs.events(job_id, after=cursor)
    assert (refused.value.code, refused.value.param) == ("bad_cursor", "after")


# --- lease and epoch ----------------------------------------------------------------------------------


def test_a_job_within_its_lease_is_nobody_elses(jobs: Jobs) -> None:
    submit(jobs)
    take(jobs, "one")
    assert maybe(jobs, "two", LONG) is None
    assert maybe(jobs, "one", LONG) is None


def test_a_silent_holder_loses_the_job_and_one_that_renews_keeps_it(jobs: Jobs) -> None:
    lease_s = 0.4
    silent, alive = submit(jobs), submit(jobs)
    take(jobs, "silent", lease_s)
    held = take(jobs, "alive", lease_s)
    for _ in range(6):
        time.sleep(lease_s / 5)
        jobs.renew(held)
    taken = take(jobs, "two", lease_s)
    assert (taken.job.id, taken.job.attempts, taken.job.epoch) == (silent, 2, 2)
    assert jobs.get(alive).epoch == 1


HOLDERS_ACTS = {
    "renew": lambda jobs, claim: jobs.renew(claim),
    "record": lambda jobs, claim: jobs.record(claim, "progress", {"done": 1}, progress=Progress("s", 1, 2, "x")),
    "finish": lambda jobs, claim: jobs.finish(claim, JobState.SUCCEEDED, result={"by": claim.consumer}),
    "fail": lambda jobs, claim: jobs.finish(claim, JobState.FAILED, error={"code": "x"}),
    "release": lambda jobs, claim: jobs.release(claim),
}
WHATS_NEW = {
    "taken over": lambda jobs, _: take(jobs, "new", AT_ONCE),
    "taken over by a namesake": lambda jobs, _: take(jobs, "old", AT_ONCE),
    "taken over and finished": lambda jobs, _: jobs.finish(take(jobs, "new", AT_ONCE), JobState.SUCCEEDED),
    "taken over and released": lambda jobs, _: jobs.release(take(jobs, "new", AT_ONCE)),
    "finished": lambda jobs, old: jobs.finish(old, JobState.SUCCEEDED, result={"first": 1}),
    "released": lambda jobs, old: jobs.release(old),
}


@pytest.mark.parametrize("act", HOLDERS_ACTS)
@pytest.mark.parametrize("news", WHATS_NEW)
def test_who_holds_a_job_no_more_changes_nothing(jobs: Jobs, redis: Redis, act: str, news: str) -> None:
    job_id = submit(jobs)
    old = take(jobs, "old")
    WHATS_NEW[news](jobs, old)
    before = snapshot(redis, job_id)
    with pytest.raises(LeaseLost):
        HOLDERS_ACTS[act](jobs, old)
    assert snapshot(redis, job_id) == before


def test_an_old_renewal_does_not_prolong_the_new_lease(jobs: Jobs, redis: Redis) -> None:
    submit(jobs)
    old = take(jobs, "old")
    take(jobs, "new", AT_ONCE)
    with pytest.raises(LeaseLost):
        jobs.renew(old)
    (pending,) = redis.xpending_range(keys.QUEUE, keys.QUEUE_GROUP, "-", "+", 10)
    assert pending["consumer"] == "new"


@pytest.mark.parametrize("holders", [3, 11, 30])
def test_a_dead_holder_is_found_behind_any_number_of_living_ones(jobs: Jobs, holders: int) -> None:
    for _ in range(holders + 1):
        submit(jobs)
    claims = [take(jobs, f"c{n}") for n in range(holders + 1)]
    time.sleep(0.3)
    for claim in claims[:-1]:
        jobs.renew(claim)
    assert take(jobs, "new", 0.25).job.id == claims[-1].job.id


def test_a_released_job_is_there_at_once_and_the_attempt_does_not_count(jobs: Jobs, redis: Redis) -> None:
    job_id = submit(jobs)
    jobs.release(take(jobs, "one"))
    assert (jobs.get(job_id).state, jobs.get(job_id).attempts) == (JobState.QUEUED, 0)
    again = take(jobs, "two", LONG)
    assert (again.job.id, again.job.attempts, again.job.epoch) == (job_id, 1, 2)
    assert redis.xlen(keys.QUEUE) == 1
    assert types(jobs, job_id) == ["queued", "running", "queued", "running"]


def test_two_consumers_never_hold_the_same_job(redis_server: EmbeddedRedis, jobs: Jobs) -> None:
    ids = {submit(jobs) for _ in range(50)}
    holders: dict[str, str] = {}
    twice: list[str] = []
    guard = threading.Lock()

    def consume(name: str) -> None:
        client = connect(redis_server.url)
        mine = Jobs(client)
        while (claim := maybe(mine, name, LONG)) is not None:
            with guard:
                if claim.job.id in holders:
                    twice.append(claim.job.id)
                holders[claim.job.id] = name
            time.sleep(0.002)
            mine.record(claim, "log", {"by": name})
            mine.finish(claim, JobState.SUCCEEDED, result={"by": name})
        client.close()

    threads = [threading.Thread(target=consume, args=(f"c{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert twice == []
    assert set(holders) == ids
    for job_id in ids:
        job = jobs.get(job_id)
        assert (job.state, job.attempts, job.epoch) == (JobState.SUCCEEDED, 1, 1)
        assert job.result == {"by": holders[job_id]}


def test_a_job_that_stands_in_the_queue_twice_is_still_held_once(jobs: Jobs, redis: Redis) -> None:
    # As when the reply to a submit or release is lost and the client sends it again.
    job_id = submit(jobs)
    redis.xadd(keys.QUEUE, {"job": job_id})
    claim = take(jobs, "one")
    assert maybe(jobs, "two", LONG) is None
    jobs.finish(claim, JobState.SUCCEEDED)
    assert maybe(jobs, "two", AT_ONCE) is None
    assert redis.xlen(keys.QUEUE) == 0


def test_a_holder_that_dies_right_after_recording_the_end_leaves_nothing_to_do(jobs: Jobs, redis: Redis) -> None:
    job_id = submit(jobs)
    jobs.record(take(jobs), "state", {"state": "succeeded"}, state=JobState.SUCCEEDED)
    assert maybe(jobs, "two", AT_ONCE) is None
    assert redis.xlen(keys.QUEUE) == 0
    assert (jobs.get(job_id).state, jobs.get(job_id).attempts) == (JobState.SUCCEEDED, 1)


# --- cancel -------------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once_and_never_handed_out(jobs: Jobs, redis: Redis) -> None:
    job_id, other = submit(jobs), submit(jobs)
    job = jobs.cancel(job_id)
    assert job.state == JobState.CANCELLED
    assert job.finished_at is not None
    assert take(jobs).job.id == other
    assert jobs.get(job_id).attempts == 0
    assert types(jobs, job_id) == ["queued", "cancelled"]
    assert redis.xlen(keys.QUEUE) == 1


def test_the_holder_of_a_running_job_is_asked_and_ends_it(jobs: Jobs) -> None:
    job_id = submit(jobs)
    claim = take(jobs)
    for _ in range(2):
        job = jobs.cancel(job_id)
        assert (job.state, job.cancel_requested) == (JobState.RUNNING, True)
    jobs.renew(claim)
    jobs.finish(claim, JobState.CANCELLED)
    assert jobs.get(job_id).state == JobState.CANCELLED


def test_a_job_that_is_put_back_after_it_was_cancelled_does_not_run_again(jobs: Jobs) -> None:
    job_id = submit(jobs)
    claim = take(jobs)
    jobs.cancel(job_id)
    jobs.release(claim)
    assert maybe(jobs, "two", LONG) is None
    assert jobs.get(job_id).state == JobState.CANCELLED


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_finished_job_cannot_be_cancelled(jobs: Jobs, redis: Redis, state: JobState) -> None:
    job_id = submit(jobs)
    jobs.finish(take(jobs), state)
    before = snapshot(redis, job_id)
    with pytest.raises(Conflict) as refused:
        jobs.cancel(job_id)
    assert refused.value.code == "job_finished"
    assert snapshot(redis, job_id) == before


# --- the same question once ---------------------------------------------------------------------------


def test_the_same_question_is_one_job_until_it_ends(jobs: Jobs) -> None:
    first = jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC)
    assert jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC).id == first.id
    assert jobs.submit_once("other", JobKind.FIT_CONCEPT, SPEC).id != first.id
    claim = take(jobs)
    assert jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC).id == first.id
    jobs.finish(claim, JobState.FAILED, error={"code": "x"})
    again = jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC)
    assert again.id != first.id
    assert again.state == JobState.QUEUED
    assert jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC).id == again.id


def test_a_job_whose_record_is_damaged_is_in_nobodys_way(jobs: Jobs, redis: Redis) -> None:
    first = jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC)
    redis.hset(keys.job(first.id), "spec", "{oops")
    with pytest.raises(Damaged, match="Submit it again"):
        jobs.get(first.id)
    again = jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC)
    assert take(jobs).job.id == again.id


def test_asked_many_times_at_once_it_is_still_one_job(redis_server: EmbeddedRedis, jobs: Jobs) -> None:
    start = threading.Barrier(6)
    found: list[JobRecord] = []

    def ask() -> None:
        client = connect(redis_server.url)
        start.wait()
        found.append(Jobs(client).submit_once("k", JobKind.FIT_CONCEPT, SPEC))
        client.close()

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job in found}) == 1
    assert len(jobs.recent()) == 1


# --- Redis forgets ------------------------------------------------------------------------------------


def test_a_flushed_redis_serves_new_jobs_and_refuses_the_old_holder(jobs: Jobs, redis: Redis) -> None:
    lost = submit(jobs)
    claim = take(jobs)
    jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC)
    redis.flushall()
    redis.script_flush()
    for act in HOLDERS_ACTS.values():
        with pytest.raises(LeaseLost):
            act(jobs, claim)
    assert (jobs.find(lost), jobs.recent()) == (None, [])
    new = jobs.submit_once("k", JobKind.FIT_CONCEPT, SPEC)
    maybe(jobs, "first", LONG)  # creates the consumer group again
    assert take(jobs, "two").job.id == new.id


def test_an_entry_whose_job_is_gone_does_not_stop_the_queue(jobs: Jobs, redis: Redis) -> None:
    gone, other = submit(jobs), submit(jobs)
    redis.delete(keys.job(gone))
    assert take(jobs).job.id == other
    assert redis.xlen(keys.QUEUE) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "build_inde\x18"), ("spec", "{"), ("created_at", ""), ("attempts", "q")]
)
def test_a_damaged_record_is_told_and_does_not_stop_the_queue(
    jobs: Jobs, redis: Redis, field: str, value: str
) -> None:
    # FACTS.md: a flipped byte in the append-only file is loaded silently.
    broken, other = submit(jobs), submit(jobs)
    if value:
        redis.hset(keys.job(broken), field, value)
    else:
        redis.hdel(keys.job(broken), field)
    with pytest.raises(Damaged):
        jobs.get(broken)
    assert [job.id for job in jobs.recent()] == [other]
    claim = take(jobs)
    assert claim.job.id == other
    jobs.finish(claim, JobState.SUCCEEDED)
    assert redis.xlen(keys.QUEUE) == 0
    assert 0 < redis.ttl(keys.job(broken)) <= keys.FINISHED_TTL_S


def test_a_living_dispatcher_is_known_for_twice_its_lease(jobs: Jobs) -> None:
    assert not jobs.dispatcher_alive()
    jobs.announce("one", 0.05)
    assert jobs.dispatcher_alive()
    time.sleep(0.15)
    assert not jobs.dispatcher_alive()


# --- simulation ---------------------------------------------------------------------------------------


class World:
    """Consumers that claim, steal, dawdle and die by chance, and what must hold after every step."""

    def __init__(self, jobs: Jobs, seed: int) -> None:
        self.jobs, self.chance = jobs, random.Random(seed)
        self.ids = [submit(jobs) for _ in range(3)]
        self.claims: list[Claim] = []
        self.holder: dict[str, Claim | None] = dict.fromkeys(self.ids)
        self.ended: dict[str, JobRecord] = {}

    def step(self) -> None:
        getattr(self, self.chance.choice(["claim", "steal", "write", "write", "end", "release", "cancel"]))()
        for job_id in self.ids:
            job = self.jobs.get(job_id)
            assert job == self.ended.get(job_id, job)
            assert (job.state == JobState.RUNNING) == (self.holder[job_id] is not None)
            if job.state in TERMINAL:
                self.ended.setdefault(job_id, job)

    def claim(self, lease_s: float = LONG) -> None:
        claim = maybe(self.jobs, self.chance.choice("abc"), lease_s)
        if claim is None:
            assert all(self.jobs.get(job_id).state != JobState.QUEUED for job_id in self.ids)
            return
        assert claim.job.id not in self.ended
        assert lease_s == AT_ONCE or self.holder[claim.job.id] is None
        assert all(claim.job.epoch > old.job.epoch for old in self.claims if old.job.id == claim.job.id)
        self.claims.append(claim)
        self.holder[claim.job.id] = claim

    def steal(self) -> None:
        self.claim(AT_ONCE)

    def write(self) -> None:
        self.act(lambda claim: self.jobs.record(claim, "log", {}), keeps=True)

    def end(self) -> None:
        state = self.chance.choice(sorted(TERMINAL))
        self.act(lambda claim: self.jobs.finish(claim, state), keeps=False)

    def release(self) -> None:
        self.act(self.jobs.release, keeps=False)

    def cancel(self) -> None:
        job_id = self.chance.choice(self.ids)
        if self.chance.random() < 0.1 and job_id not in self.ended and self.holder[job_id] is None:
            assert self.jobs.cancel(job_id).state == JobState.CANCELLED

    def act(self, act: Any, *, keeps: bool) -> None:
        """By any claim there ever was: only the newest of an unfinished job may do anything."""
        if not self.claims:
            return
        claim = self.chance.choice(self.claims)
        if self.holder[claim.job.id] is not claim:
            with pytest.raises(LeaseLost):
                act(claim)
            return
        act(claim)
        if not keeps:
            self.holder[claim.job.id] = None


@pytest.mark.parametrize("seed", range(10))
def test_in_any_order_of_events_one_holder_writes_and_ends_are_final(jobs: Jobs, seed: int) -> None:
    world = World(jobs, seed)
    for _ in range(40):
        world.step()
    while (claim := maybe(jobs, "last", AT_ONCE)) is not None:
        jobs.finish(claim, JobState.SUCCEEDED)
    assert {jobs.get(job_id).state for job_id in world.ids} <= TERMINAL
