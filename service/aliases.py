"""Aliases: a name that a team agrees on (`prod`) for an index version, switched in one step.

Who switches says which state he has seen, so that of two who do so at once exactly one wins and the other is told.
"""

import time
from dataclasses import dataclass

from redis import Redis

from service import codec, keys
from service.contracts import AliasRecord, IndexRecord
from service.errors import Conflict, Damaged, NotFound, PreconditionFailed, PreconditionRequired, Unavailable
from service.pointers import parsed
from service.registry import INDEXES, Registry, check_id

_TRIES = 3  # of a change whose lock is lost: Redis was flushed, or this process was paused


@dataclass(frozen=True)
class Condition:
    """What an alias must be for a change to go through. Nothing said: it must be new."""

    absent: bool = False
    present: bool = False
    revisions: tuple[int, ...] | None = None  # one of these; none at all fits nothing


def etag(alias: AliasRecord) -> str:
    return f'"{alias.revision}"'


def get(registry: Registry, name: str) -> AliasRecord:
    alias = registry.pointed(name).alias
    if alias is None:
        raise _not_found(registry, name)
    return alias


def switch(
    registry: Registry, redis: Redis, name: str, target: IndexRecord, condition: Condition
) -> tuple[AliasRecord, bool]:
    """Point ``name`` at ``target``; the alias, and whether it is new.

    One whose file is damaged is made anew, if the condition is that there is one, whatever it is. Raises Conflict
    when an index has the name, PreconditionRequired, PreconditionFailed, Damaged.
    """
    check_id(name, param="name")
    for _ in range(_TRIES):
        with registry.pointers.held(name) as token:
            text = registry.pointers.text(name)
            try:
                seen = parsed(name, text)
            except Damaged:
                if not condition.present:
                    raise
                _check_not_index(registry, redis, name)
                seen, alias = _unreadable(name), None
            else:
                alias = seen if seen and seen.index else None
                if alias is None:
                    _check_not_index(registry, redis, name)
                _check(condition, name, alias)
            if alias is not None and alias.index == target.id:
                return alias, False
            made = AliasRecord(
                name=name,
                index=target.id,
                revision=1 + (seen.revision if seen else 0),
                updated_at=codec.now(),
                previous=alias.index if alias else None,
            )
            if registry.pointers.replace(token, text, made):
                return made, alias is None
    raise _lost(name)


def remove(registry: Registry, name: str, condition: Condition) -> None:
    """Take the alias away; what it pointed at stays. Raises NotFound, PreconditionRequired, PreconditionFailed, and
    Damaged as ``switch`` does.
    """
    check_id(name, param="name")
    for _ in range(_TRIES):
        with registry.pointers.held(name) as token:
            text = registry.pointers.text(name)
            try:
                seen = parsed(name, text)
            except Damaged:
                if not condition.present:
                    raise
                seen = _unreadable(name)
            else:
                if seen is None or not seen.index:
                    raise _not_found(registry, name)
                _check(condition, name, seen)
            gone = AliasRecord(name, "", seen.revision, codec.now(), seen.index or None)
            if registry.pointers.replace(token, text, gone):
                return
    raise _lost(name)


def _unreadable(name: str) -> AliasRecord:
    """What stands for an alias that nobody can read, as if it had been removed. Its revision is lost; the time is
    above all that were ever counted to, so that no old ETag fits what comes after.
    """
    return AliasRecord(name, "", int(1000 * time.time()), "")


def check_not_alias(registry: Registry, name: str) -> None:
    """Raise Conflict when an index may not be called ``name`` because an alias is."""
    alias = registry.pointers.stored(name)
    if alias is not None and alias.index:
        raise Conflict(
            "name_is_alias",
            f"{name!r} is an alias, of {alias.index}. Choose another name for the index, or remove the alias.",
            param="name",
        )


def _check_not_index(registry: Registry, redis: Redis, name: str) -> None:
    # The counter stands for a build that is under way: it would be published under the alias's name.
    try:
        published = registry.pointed(name).newest is not None
    except Damaged:  # of an alias, perhaps a removed one whose name an index has taken
        published = any(item.startswith(f"{name}@v") for item in registry.stored_ids(INDEXES))
    if published or redis.exists(keys.index_versions(name)):
        raise Conflict(
            "name_is_index",
            f"{name!r} is the name of an index, published or being built. Choose another one for the alias.",
            param="name",
        )


def _check(condition: Condition, name: str, alias: AliasRecord | None) -> None:
    if alias is None:
        if condition.present or condition.revisions is not None:
            raise PreconditionFailed(
                "alias_changed",
                f"There is no alias {name!r}: it was removed, or never made. Make it without If-Match.",
                param="name",
            )
        return
    context = {"index": alias.index, "revision": alias.revision, "etag": etag(alias)}
    if condition.absent:
        detail = f"There is an alias {name!r} already: it points at {alias.index} (revision {alias.revision})."
        raise PreconditionFailed("alias_exists", detail, param="name", context=context)
    if condition.revisions is not None and alias.revision not in condition.revisions:
        raise PreconditionFailed(
            "alias_changed",
            f"Alias {name!r} was changed meanwhile: it points at {alias.index} now (revision {alias.revision}). "
            f"Nothing was done; if the change is still wanted, ask again with If-Match: {etag(alias)}.",
            param="name",
            context=context,
        )
    if condition.revisions is None and not condition.present:
        raise PreconditionRequired(
            "precondition_required",
            f"Others rely on alias {name!r}, which points at {alias.index}. Say which revision you change: "
            f"If-Match: {etag(alias)} (--if-revision {alias.revision}), or If-Match: * (--force) whatever it is.",
            param="name",
            context=context,
        )


def _not_found(registry: Registry, name: str) -> NotFound:
    known = ", ".join([alias.name for alias in registry.aliases()][:10]) or "none yet"
    return NotFound("alias_not_found", f"There is no alias {name[:140]!r}. Known: {known}.", param="name")


def _lost(name: str) -> Unavailable:
    detail = f"Redis forgot again and again who may change alias {name!r}. Look at it, then try again."
    return Unavailable("alias_busy", detail, param="name")
