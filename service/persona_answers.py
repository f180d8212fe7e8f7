"""The answers behind a persona vector: stored with the vector, read without a model."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from service import artifacts, codec
from service.errors import NotFound
from service.personas import PERSONA, Answered
from service.registry import CONCEPTS, Registry
from service.storage import Storage

FILE = "answers"
_KEY = re.compile(r"[0-9a-f]{64}")


def publish(storage: Storage, key: str, answered: Sequence[Answered], facts: dict[str, Any]) -> None:
    """Store them under the job's key; what is there already stays."""
    told = np.frombuffer(codec.canonical([codec.to_plain(each) for each in answered]), dtype=np.uint8)
    artifacts.publish(storage, key, {FILE: {"json": told}}, facts=facts, answer=True)


def read(storage: Storage, registry: Registry, reference: str) -> list[Answered]:
    """Those of a persona concept, or of the key that a failed job names. Raises NotFound, Damaged."""
    key = reference
    if not _KEY.fullmatch(reference):
        record = registry.get(CONCEPTS, reference)
        if record.method != PERSONA:
            detail = f"Concept {record.id!r} was made by {record.method}: no answers stand behind it."
            raise NotFound("no_answers", detail, param="reference")
        key = str(record.provenance["answers"])
    known = artifacts.find(storage, key)
    if known is None or FILE not in artifacts.stems(known):
        raise NotFound("no_answers", f"No answers are stored under {reference!r}.", param="reference")
    told = json.loads(artifacts.read(storage, known, FILE)["json"].tobytes())
    return [codec.from_plain(Answered, each) for each in told]
