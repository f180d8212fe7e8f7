"""Conditional requests (RFC 9110, section 13): the headers, as conditions of the service."""

import re

from service.aliases import Condition
from service.errors import Invalid

_TAG = re.compile(r'(W/)?"([^"]*)"')
_TAGS = re.compile(rf"[ \t]*{_TAG.pattern}[ \t]*(,[ \t]*{_TAG.pattern}[ \t]*)*")


def condition(if_match: str | None, if_none_match: str | None) -> Condition:
    """What ``If-Match`` and ``If-None-Match`` say. Raises Invalid for what is neither ``*`` nor tags in quotes."""
    if if_none_match is not None and if_none_match.strip() != "*":
        detail = "Of If-None-Match only * makes sense here: the alias must not be there yet."
        raise Invalid("bad_etag", detail, param="If-None-Match")
    absent = if_none_match is not None
    if if_match is None:
        return Condition(absent=absent)
    if if_match.strip() == "*":
        return Condition(absent=absent, present=True)
    return Condition(absent=absent, revisions=_revisions(if_match))


def _revisions(tags: str) -> tuple[int, ...]:
    """Those among the entity tags that can be a revision: a weak tag never fits, nor does any other text."""
    if not _TAGS.fullmatch(tags):
        detail = f'If-Match takes the ETag of an alias in its quotes, as "3", or *; not {tags[:140]!r}.'
        raise Invalid("bad_etag", detail, param="If-Match")
    named = (text for weak, text in _TAG.findall(tags) if not weak)
    return tuple(int(text) for text in named if re.fullmatch("[1-9][0-9]{0,17}", text))
