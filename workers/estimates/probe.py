"""What a worker measures for an estimate: loading, eigenvectors, storage, and one trial of each kind of work.

Trials run the very functions of a build on a batch or two of the real examples; only what earlier stages would have
made, eigenvectors and heads, is replaced by random numbers of the same shape.
"""

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from service.contracts import ArrayInfo, DatasetRecord, Example
from service.storage import Storage
from service.terms import IndexKind, Pooling
from service.work import (
    AnswersWork,
    CovarianceWork,
    DifferenceSpec,
    JacobianWork,
    Location,
    LossRowsWork,
    MomentWork,
    PassSpec,
    Reading,
    ScoutWork,
    Tracked,
    Work,
)
from workers import curvature, differences, passes
from workers.batches import BATCH_COST, plan
from workers.gradients import Sides
from workers.masks import split
from workers.models import Loaded, shape
from workers.prepare import prepare
from workers.readout import Gather, Lines, Readout, beside
from workers.works import answers, factors, rows

_WHOLE = 1024  # largest matrix whose eigenvectors are computed for the estimate; beyond it time grows by the cube
_BLOCK = 16 << 20  # bytes written and read to measure storage
_SMALL = 16  # files
STEPS = 32  # tokens of each answer that a trial generates

Shapes = Mapping[str, tuple[int, int, int]]  # module → d_out, d_in, block
Kept = dict[str, tuple[int, int]]  # module → p_out, p_in: eigenvectors per side


@dataclass(frozen=True)
class Source:
    """Some examples of a dataset."""

    dataset: DatasetRecord
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Survey:
    """``lengths``: by source and example, tokens of each of its windows, empty when it is set aside."""

    shapes: Shapes
    width: int
    device: str
    load_s: float
    load_bytes: int  # most memory until the model was there
    held_bytes: int  # afterwards
    lengths: tuple[tuple[tuple[int, ...], ...], ...]
    eigen_s: Mapping[int, float]  # d → seconds for the eigenvectors of (d, d)
    write_s: float  # per byte
    read_s: float  # per byte
    touch_s: float  # per byte: one pass over numbers that are in memory
    file_s: float  # per file


@dataclass(frozen=True)
class Trial:
    """One kind of work. ``kept``: its eigenvectors per side; ``heads``: rows, coordinates and modules of each."""

    name: str
    work: Work
    location: Location
    source: Source
    kept: Kept
    heads: tuple[tuple[int, int, tuple[str, ...]], ...] = ()
    coordinates: int = 0  # of the gradient kind
    count: int = 1  # rows of J


@dataclass(frozen=True)
class Cost:
    """``peak_bytes``: of the process; ``device_bytes``: of the GPU, when there is one."""

    seconds: float
    units: float
    peak_bytes: int
    device_bytes: int
    tokens: float = 0.0  # of an answer, on average, as far as can be told
    steps: float = 0.0  # until all answers of a batch have ended


# --- survey -----------------------------------------------------------------------------------------


def survey(
    loaded: Loaded,
    reading: Reading,
    tracked: Tracked,
    pooling: Pooling | None,
    examples: Sequence[Sequence[Example]],
    storage: Storage,
    *,
    load_s: float,
    load_bytes: int,
) -> Survey:
    held = resident()
    shapes = factors.shapes_of(loaded, tracked)
    sizes = sorted({size for shape in shapes.values() for size in shape[:2]})
    write_s, read_s, file_s = _storage_rates(storage)
    return Survey(
        shapes=shapes,
        width=loaded.width,
        device=loaded.device.type,
        load_s=load_s,
        load_bytes=load_bytes,
        held_bytes=held,
        lengths=tuple(_lengths(loaded, reading, pooling, some) for some in examples),
        eigen_s={size: _eigen_seconds(size) for size in sizes},
        write_s=write_s,
        read_s=read_s,
        touch_s=_touch_rate(),
        file_s=file_s,
    )


def _lengths(
    loaded: Loaded, reading: Reading, pooling: Pooling | None, examples: Sequence[Example]
) -> tuple[tuple[int, ...], ...]:
    prepared = prepare(loaded, reading, examples, trains=pooling is None, pooling=pooling, windows=True)
    found = []
    for position in range(len(examples)):
        tokens = prepared.tokens.get(position)
        found.append(tuple(map(len, split(tokens, reading.max_length))) if tokens is not None else ())
    return tuple(found)


def _eigen_seconds(size: int) -> float:
    run = min(size, _WHOLE)
    covariance = np.cov(np.random.default_rng(0).standard_normal((run, 2 * run))).reshape(run, run)
    began = time.perf_counter()
    curvature.eigenvectors(covariance)
    return (time.perf_counter() - began) * (size / run) ** 3


def _storage_rates(storage: Storage) -> tuple[float, float, float]:
    folder, data = f"probes/{uuid.uuid4().hex}", bytes(_BLOCK)
    names = [f"{folder}/{number}" for number in range(_SMALL + 1)]
    try:
        began = time.perf_counter()
        digest = storage.write(names[0], data)
        written = time.perf_counter()
        storage.read(names[0], sha256=digest)
        read = time.perf_counter()
        for name in names[1:]:
            storage.write(name, b"0")
        small = time.perf_counter()
    finally:
        for name in names:
            storage.remove(name)
    return (written - began) / _BLOCK, (read - written) / _BLOCK, (small - read) / _SMALL


def _touch_rate() -> float:
    block = np.ones((32, _BLOCK // 128), dtype=np.float32)
    began = time.perf_counter()
    np.einsum("rk,rk->k", block, block, dtype=np.float64)
    return (time.perf_counter() - began) / _BLOCK


# --- trials -----------------------------------------------------------------------------------------


def measure(loaded: Loaded, trial: Trial, examples: Sequence[Example]) -> Cost:
    """Once to warm up, on one example, and once for the clock."""
    forget_peak()
    run = _runner(loaded, trial)
    shortest = min(examples, key=lambda example: len(str(example.content)))
    run([shortest])
    began = time.perf_counter()
    tokens, steps = run(examples) or (0.0, 0.0)
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    device = torch.cuda.max_memory_allocated() if loaded.device.type == "cuda" else 0
    return Cost(seconds, 0.0, peak(), device, tokens, steps)


Run = Callable[[Sequence[Example]], tuple[float, float] | None]


def _runner(loaded: Loaded, trial: Trial) -> Run:  # noqa: PLR0911
    work = trial.work
    stand_in = _sides(loaded, trial.kept)
    match work:
        case PassSpec():
            readout = _readout(loaded, trial, work, stand_in)
            return lambda some: _drop(passes.run(loaded, readout, work, some))
        case DifferenceSpec():
            answer = np.full(max(1, STEPS), loaded.tokenizer.eos_token_id or 0, dtype=np.int64)
            return lambda some: _drop(differences.run(loaded, [answer] * len(some), work, some))
        case CovarianceWork():
            return lambda some: _drop(factors.covariances(work, None, loaded, some))
        case MomentWork():
            return lambda some: _drop(factors.moments_on(work, stand_in, loaded, some))
        case LossRowsWork():
            return lambda some: _drop(rows.loss_rows_on(work, stand_in, loaded, some))
        case JacobianWork() | ScoutWork():
            directions = torch.randn(trial.count, loaded.width, device=loaded.device)
            return lambda some: _drop(rows.jacobian_on(work, stand_in, loaded, some, directions))
        case AnswersWork():
            return lambda some: _answering(loaded, work, some)
        case _:
            raise TypeError(f"no trial of {type(work).__name__}")


def _drop(_result: object) -> None:
    """Results are of no interest here."""


def _answering(loaded: Loaded, work: AnswersWork, examples: Sequence[Example]) -> tuple[float, float]:
    """Answers of a few tokens; how many they, and the longest of them, would have come to, if each token is as
    likely to be the last as these were.
    """
    most = work.spec.max_new_tokens
    short = replace(work, spec=replace(work.spec, max_new_tokens=min(STEPS, most)))
    tensors, facts = answers.answers(short, None, loaded, examples)
    lengths, count = tensors[answers.FILE]["lengths"], max(1, int(facts["examples"]))
    ended = int((lengths < min(STEPS, most)).sum())
    if not ended:
        return float(most), float(most)
    each = float(lengths.sum()) / ended
    return min(most, each), min(most, each * (1 + np.log(count)))


def _sides(loaded: Loaded, kept: Kept) -> dict[str, Sides]:
    found = {}
    for name, (p_out, p_in) in kept.items():
        weight = shape(loaded.modules[name])
        out, into = (
            torch.randn(size, p, device=loaded.device) * size**-0.5
            for size, p in zip(weight, (p_out, p_in), strict=True)
        )
        found[name] = Sides(out, into)
    return found


def _readout(loaded: Loaded, trial: Trial, work: PassSpec, sides: Mapping[str, Sides]) -> Readout:
    """As readout.make would give it: coordinates spread evenly over the modules."""
    device = loaded.device
    total = sum(side.size for side in sides.values())
    gathers, start = {}, 0
    array = None
    if work.gradient is not None:
        for name, count in _shares({name: side.size for name, side in sides.items()}, trial.coordinates).items():
            index = torch.arange(count, device=device) * (sides[name].size // max(1, count))
            everything = trial.coordinates >= total
            gathers[name] = Gather(start, count, None if everything else index, torch.ones(count, device=device))
            start += count
        array = ArrayInfo(IndexKind.GRADIENT, None, start)
    heads = []
    for head, (r, count, names) in zip(work.influence.heads if work.influence else (), trial.heads, strict=True):
        reached = {name: sides[name].size for name in names}
        lines = {}
        for name, own in _shares(reached, count).items():
            index = torch.arange(own, device=device) * (reached[name] // max(1, own))
            lines[name] = Lines(None if own == reached[name] else index, torch.randn(r, own, device=device))
        heads.append((head.array, lines))
    return Readout(beside(loaded, sides), gathers, array, tuple(heads))


def _shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """``count`` spread over modules in proportion to their sizes."""
    total = max(1, sum(sizes.values()))
    stops = np.cumsum([0, *sizes.values()]) * min(count, total) // total
    return {name: int(stops[n + 1] - stops[n]) for n, name in enumerate(sizes)}


# --- cost and memory --------------------------------------------------------------------------------


def cost_of(lengths: Sequence[int], budget: int, device: str) -> float:
    """What the batches of these lengths cost, in tokens: padded ones, and what starting each batch costs."""
    each = BATCH_COST.get(device, BATCH_COST["cuda"])
    groups = plan(lengths, budget, each)
    return sum(len(group) * max(lengths[row] for row in group) + each for group in groups)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return _status("VmRSS")


def peak() -> int:
    """The most it has held since ``forget_peak``."""
    return _status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
