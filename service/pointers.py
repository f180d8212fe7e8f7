"""Names that move: which version of an index is the newest, and what an alias points at.

Redis answers, in one round trip; storage decides. The newest version of a name is only ever raised. An alias is
one file, replaced atomically under a lock on its name. While that happens its entry in Redis is empty, which sends
readers to the file: they see the old target or the new one, whether the writer gets to the end or dies on the way.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.exceptions import LockError

from service import codec, keys, results
from service.contracts import AliasRecord
from service.errors import Damaged, NotFound, Unavailable
from service.storage import Storage

log = logging.getLogger(__name__)

_WAIT_S = 10.0  # for somebody else's change of the same name, which takes milliseconds

# Raise the newest version of a name; one that Redis does not know is only made where ARGV[3] says so.
_RAISE = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if not known and ARGV[3] ~= '1' then return 0 end
if (tonumber(known or '0') or 0) < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return 1
"""

# Send readers to storage and start the lock's time anew, if the lock is still ours. 1: it is.
_OPEN = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[3], '')
return 1
"""

# Copy what storage holds, if the lock is still ours. 1: it is.
_CLOSE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[2], ARGV[2]) else redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
return 1
"""


@dataclass(frozen=True)
class Pointed:
    """What a name stands for. ``filled``: Redis holds all that storage does, so that nothing means nothing."""

    alias: AliasRecord | None
    newest: int | None
    filled: bool


class Pointers:
    def __init__(self, redis: Redis, storage: Storage) -> None:
        self._redis = redis
        self._storage = storage
        self._raise = redis.register_script(_RAISE)
        self._open = redis.register_script(_OPEN)
        self._close = redis.register_script(_CLOSE)

    # --- asking -------------------------------------------------------------------------------------

    def read(self, name: str) -> Pointed:
        """As Redis has it, in one round trip."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.exists(keys.REGISTRY_FILLED)
        pipe.hget(keys.ALIASES, name)
        pipe.hget(keys.NEWEST, name)
        filled, alias, newest = pipe.execute()
        known = int(newest) if newest and newest.isdecimal() else None  # else storage is asked, and it is set again
        return Pointed(self._decode(name, alias), known, bool(filled))

    def aliases(self) -> tuple[list[AliasRecord], bool]:
        """Every alias as Redis has it, by name, and whether it holds all of them."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.exists(keys.REGISTRY_FILLED)
        pipe.hgetall(keys.ALIASES)
        filled, raw = pipe.execute()
        found = []
        for name in sorted(raw):
            try:
                alias = self._decode(name, raw[name])
            except Damaged as error:
                log.error("left out: %s", error)
                continue
            found += [alias] if alias else []
        return found, bool(filled)

    def names(self) -> list[str]:
        """Every name of an index or an alias that Redis knows."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hkeys(keys.NEWEST)
        pipe.hkeys(keys.ALIASES)
        indexes, aliases = pipe.execute()
        return sorted({*indexes, *aliases})

    def stored(self, name: str) -> AliasRecord | None:
        """As storage has it, one that was removed as well. Raises Damaged."""
        return parsed(name, self.text(name))

    def text(self, name: str) -> bytes | None:
        """The alias's file as it lies in storage, damaged or not; None: there is none."""
        try:
            return self._storage.read(_key(name))
        except NotFound:
            return None

    def known_names(self) -> list[str]:
        """Of all that storage or Redis holds an alias of."""
        known: Any = self._redis.hkeys(keys.ALIASES)
        return sorted({*self._storage.folders("aliases"), *known})

    # --- the newest version -------------------------------------------------------------------------

    def knows_newest(self, name: str) -> bool:
        return bool(self._redis.hexists(keys.NEWEST, name))

    def raise_newest(self, name: str, version: int, *, make: bool, pipe: Redis | None = None) -> None:
        """Let ``name`` stand for ``version`` unless it stands for a later one. A name that Redis has forgotten is
        left alone without ``make``: a later version may be in storage.
        """
        self._raise(keys=[keys.NEWEST], args=[name, version, int(make)], client=pipe)

    # --- aliases ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self, name: str, *, wait_s: float = _WAIT_S) -> Iterator[bytes]:
        """The right to decide what ``name`` is, as the token of a lock. Raises Unavailable."""
        lock = self._redis.lock(keys.lock(f"name:{name}"), timeout=keys.LOCK_TTL_S, sleep=0.02)
        if not lock.acquire(blocking_timeout=wait_s):
            raise Unavailable(
                "name_busy",
                f"Somebody is changing what {name!r} stands for; nothing was done. Try again: at the latest in "
                f"{keys.LOCK_TTL_S} s the name is free.",
                param="name",
            )
        try:
            yield lock.local.token
        finally:
            with contextlib.suppress(LockError):  # lost on the way: who has it now looks at storage first
                lock.release()

    def replace(self, token: bytes, seen: bytes | None, record: AliasRecord) -> bool:
        """Make ``record`` what the alias is; False, and nothing is done, when it is not ours now, or its file does
        not hold the bytes ``seen`` any more.

        ``token`` is that of ``held``. A holder that was paused for longer than a lock lives finds out here.
        """
        arguments = [token, keys.LOCK_TTL_S, record.name]
        if not self._open(keys=[keys.lock(f"name:{record.name}"), keys.ALIASES], args=arguments):
            return False
        try:
            if self.text(record.name) != seen:
                return False
            self._storage.write(_key(record.name), results.sealed(record))
        finally:  # also when writing failed: nobody knows better than storage what came of it
            ours, _ = self._copy(token, record.name)
        if not ours:  # Redis was flushed meanwhile, and may have been filled again from the old file
            try:
                with self.held(record.name) as again:
                    self._copy(again, record.name)
            except Unavailable:
                self._redis.hset(keys.ALIASES, record.name, "")
        return True

    def refresh(self, name: str) -> AliasRecord | None:
        """Copy the alias from storage to Redis and return it. Where it is being changed, or cannot be read (raises
        Damaged), Redis is only told to send readers to storage.
        """
        try:
            with self.held(name, wait_s=0) as token:
                return self._copy(token, name)[1]
        except Unavailable:
            self._redis.hsetnx(keys.ALIASES, name, "")
            return _living(self.stored(name))
        except Damaged:
            self._redis.hsetnx(keys.ALIASES, name, "")
            raise

    def _copy(self, token: bytes, name: str) -> tuple[bool, AliasRecord | None]:
        """Tell Redis what storage holds; whether the lock was still ours, and what it is."""
        alias = _living(self.stored(name))
        arguments = [token, name, results.sealed(alias) if alias else ""]
        return bool(self._close(keys=[keys.lock(f"name:{name}"), keys.ALIASES], args=arguments)), alias

    def _decode(self, name: str, cached: str | None) -> AliasRecord | None:
        if cached is None:
            return None
        try:
            return codec.unseal(AliasRecord, cached)
        except ValueError:  # empty, or not as it was written
            return _living(self.stored(name))


def parsed(name: str, text: bytes | None) -> AliasRecord | None:
    """The alias in a file. Raises Damaged for what is not as it was written, or the file of another alias."""
    if text is None:
        return None
    try:
        alias = codec.unseal(AliasRecord, text)
        if alias.name != name:
            raise ValueError(f"it is the file of alias {alias.name!r}")
    except ValueError as error:
        detail = f"{_key(name)} is not what was written: {str(error)[:300]}."
        raise Damaged("damaged_record", detail, param=_key(name)) from error
    return alias


def _living(alias: AliasRecord | None) -> AliasRecord | None:
    return alias if alias is not None and alias.index else None


def _key(name: str) -> str:
    return f"aliases/{name}/record.json"
