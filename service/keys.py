"""Every Redis key, its type, how long it lives, and why.

Storage is the truth for everything except jobs; the registry keys below can be rebuilt from it.
"""

PREFIX = "whence:"

# Stream of job ids waiting for or held by a dispatcher. Entries are deleted when their job ends.
QUEUE = PREFIX + "jobs:queue"
QUEUE_GROUP = "dispatchers"

# Sorted set of job ids by creation time, for listing. An id leaves when its job record has expired.
JOBS = PREFIX + "jobs:all"

# A finished job and its events are kept this long, then forgotten: results live in storage.
FINISHED_TTL_S = 30 * 24 * 3600

# Progress may come many times a second for days; what is older than this many events is dropped.
EVENTS_KEPT = 10_000

# Name of a dispatcher that lives, for twice its lease: /readyz tells whether one is there.
DISPATCHER = PREFIX + "dispatcher"


def job(job_id: str) -> str:
    """Hash: the fields of a JobRecord, those that are not strings as JSON."""
    return f"{PREFIX}job:{job_id}"


def job_events(job_id: str) -> str:
    """Stream: what happened to the job, in order; its entry ids are the cursors of the api."""
    return f"{PREFIX}job:{job_id}:events"


def records(collection: str) -> str:
    """Hash id → record (JSON) of models, datasets, concepts, SAEs or indexes. No TTL: a copy of storage."""
    return f"{PREFIX}{collection}"


# There while the hashes above hold all that storage does; gone after a flush, and then they are filled again.
REGISTRY_FILLED = PREFIX + "registry:filled"


def registry_filling(token: str) -> str:
    """String: a rebuild that has begun. A flush meanwhile takes it away, and then the rebuild begins again."""
    return f"{PREFIX}registry:filling:{token}"


# Longer than reading every record of a large storage takes.
FILLING_TTL_S = 3600

# Hash name → newest published version of the index, only ever raised. No TTL: a copy of storage.
NEWEST = PREFIX + "newest"

# Hash name → AliasRecord (JSON), or nothing where storage must be asked: the alias is being switched, or cannot be
# read. No TTL: a copy of storage.
ALIASES = PREFIX + "aliases"


def index_versions(name: str) -> str:
    """Counter of versions handed out for an index name. No TTL; restarts above what storage holds."""
    return f"{PREFIX}index:{name}:versions"


def latest_job_for(key: str) -> str:
    """String: the job that is making a cached result, so that the same question asked twice is one job."""
    return f"{PREFIX}making:{key}"


# Long enough for any build; a job that ended is noticed by its state, not by this.
MAKING_TTL_S = 7 * 24 * 3600

# Hash (path, size, mtime) → sha256. Hashing 15 GB of weights takes half a minute, once.
FILE_HASHES = PREFIX + "file-hashes"

# Two requests that create the same id at the same moment; held for milliseconds.
LOCK_TTL_S = 60


def lock(name: str) -> str:
    """String: who creates ``name`` just now."""
    return f"{PREFIX}lock:{name}"
