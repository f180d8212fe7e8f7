"""Labelled examples for probes: two datasets, one with a label in its metadata, or a few sent with the request."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from service import codec, columns, datasets, example_ids, filters
from service.contracts import DatasetRecord, Example, Place
from service.datasets import Malformed, Parsed
from service.errors import Conflict, Invalid
from service.example_ids import Finder
from service.examples import Examples
from service.registry import DATASETS, Registry
from service.specs import Labels
from service.storage import Storage

pc: Any = pyarrow.compute  # its functions are made at import, where no type checker sees them
Rows = NDArray[np.int64]

_SHOWN = 10  # values of a label that an error lists
_SOURCE = "inline"


# --- a label in the metadata ------------------------------------------------------------------------


def split(storage: Storage, dataset: DatasetRecord, labels: Labels) -> tuple[Rows, Rows]:
    """Positions of the positive and of the negative examples of a dataset; those with another label are on neither
    side. Raises Invalid naming the field where the metadata have no such label.
    """
    examples = Examples(storage, [dataset])
    examples.field(labels.field, param="label")
    name = columns.name_of(columns.path_of(labels.field, param="label"))
    rest = {"not": {"in": [*labels.positive, None]}}
    tests = {
        "positive_values": {"in": list(labels.positive)},
        "negative_values": rest if labels.negative is None else {"in": list(labels.negative)},
    }
    found = {param: _matching(examples, name, test, param=param) for param, test in tests.items()}
    for param, rows in found.items():
        if not len(rows):
            detail = f"No example of {dataset.id!r} is {param.partition('_')[0]}: {_said(examples, labels.field)}"
            raise Invalid("no_such_label", detail, param=param)
    positive, negative = found.values()
    if len(np.intersect1d(positive, negative)):
        detail = f"A value of {labels.field!r} is named as positive and as negative: leave it out of one of them."
        raise Invalid("labelled_both_ways", detail, param="negative_values")
    return positive, negative


def _matching(examples: Examples, name: str, test: Mapping[str, Any], *, param: str) -> Rows:
    try:
        return np.flatnonzero(examples.mask(filters.parse({name: test})))
    except Invalid as error:
        raise Invalid(error.code, error.detail, param=param, context=error.context) from error


def _said(examples: Examples, name: str) -> str:
    counts = pc.value_counts(examples.field(name).combine_chunks()).to_pylist()
    counts = sorted((each for each in counts if each["values"] is not None), key=lambda each: -each["counts"])
    said = [f"{json.dumps(each['values'])} ({each['counts']})" for each in counts[:_SHOWN]]
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    return f"the values of {name!r} are {', '.join(said)}{more}."


# --- both sides -------------------------------------------------------------------------------------


def shared(storage: Storage, positive: DatasetRecord, negative: DatasetRecord) -> tuple[Rows, Rows]:
    """Positions of the examples that stand in both datasets, in either: the same texts, labelled both ways."""
    ours, theirs = (example_ids.unpack(datasets.read(storage, each, "ids")) for each in (positive, negative))
    there = Finder(theirs).positions(ours)
    rows = np.flatnonzero(there >= 0)
    return rows, there[rows]


def check_sides(storage: Storage, positive: DatasetRecord, negative: DatasetRecord) -> None:
    """Raise Invalid when every example of one side is on the other too."""
    alike = len(shared(storage, positive, negative)[0])
    if alike >= min(positive.examples, negative.examples):
        same = positive.fingerprint == negative.fingerprint or alike == max(positive.examples, negative.examples)
        detail = (
            "Both sides are the same examples: there is no direction between them."
            if same
            else "Every example of one side is on the other side too: nothing speaks for that side."
        )
        raise Invalid("identical_sides", detail, param="negative")


def told_both_ways(storage: Storage, positive: DatasetRecord, negative: DatasetRecord) -> list[str]:
    """The places of texts that stand on both sides, as people write them."""
    ours, theirs = shared(storage, positive, negative)
    pairs = [_places(storage, record, rows[:_SHOWN]) for record, rows in ((positive, ours), (negative, theirs))]
    said = [f"{one} and {other}" for one, other in zip(*pairs, strict=True)]
    return [*said, *[f"{len(ours) - _SHOWN} more"] * (len(ours) > _SHOWN)]


def _places(storage: Storage, record: DatasetRecord, rows: Rows) -> list[str]:
    found = Examples(storage, [record]).take(rows)
    return [f"{record.id} ({example.places[0].file}:{example.places[0].line})" for example in found]


def repeated(storage: Storage, dataset: DatasetRecord, rows: Rows) -> int:
    """How many of these examples stand on several lines of their dataset, of which the first one's label counts."""
    places = Examples(storage, [dataset]).stored(["places"]).column("places").take(pa.array(rows))
    return pc.sum(pc.greater(pc.list_value_length(places), 1)).as_py() or 0


# --- sent with the request --------------------------------------------------------------------------


def keep(
    storage: Storage, registry: Registry, sent: Sequence[str | Mapping[str, Any]], *, side: str, max_bytes: int
) -> DatasetRecord:
    """Register the examples of a request as a dataset named by its content; a string is plain text.

    Raises Invalid naming the one that is no example, or has nothing to train on.
    """
    parsed = Parsed(_SOURCE)
    for number, each in enumerate(sent):
        param = f"{side}[{number}]"
        raw = json.dumps({"text": each} if isinstance(each, str) else each).encode()
        if len(raw) > max_bytes:
            raise Invalid("example_too_long", f"An example is longer than {max_bytes} bytes.", param=param)
        try:
            content, metadata = datasets.parse_line(raw)
        except Malformed as error:
            raise Invalid(error.reason, f"{param}: {error}", param=param) from error
        if reason := datasets.untrainable(content):
            raise Invalid(reason[0], f"{param}: {reason[1]}", param=param)
        parsed.lines += 1
        identity, place = datasets.example_id(content), Place(_SOURCE, number + 1)
        known = parsed.examples.get(identity)
        if known is None:
            parsed.examples[identity] = Example(identity, content, metadata, (place,))
        else:
            parsed.duplicates += 1
            parsed.examples[identity] = replace(known, places=(*known.places, place))
    about = [[each.id, codec.to_plain(each)["metadata"], len(each.places)] for each in parsed.examples.values()]
    name = f"{_SOURCE}-{codec.digest([about, parsed.lines])[:16]}"
    record = registry.find(DATASETS, name)
    if record is None:
        record = datasets.publish(storage, name, parsed)
        with contextlib.suppress(Conflict):  # somebody else has sent the same
            registry.add(DATASETS, name, record)
    return record
