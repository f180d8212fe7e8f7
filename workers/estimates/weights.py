"""What the artifacts of a build weigh: exact shapes, from those of the modules, without any of the numbers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service import artifacts
from service.basis import SPECTRUM
from service.storage import Storage
from service.tasks import Task
from service.work import (
    AnswersWork,
    BasisWork,
    CovarianceWork,
    EigenWork,
    GatherWork,
    GradientSpec,
    Head,
    HeadWork,
    JacobianWork,
    LambdaWork,
    LossRowsWork,
    MixWork,
    MomentWork,
    NarrowWork,
    PassSpec,
    Rademacher,
    ScoutWork,
    ShapesWork,
)
from workers.directions import FILE
from workers.eigenbasis import LAMBDA, modules
from workers.estimates.probe import Kept, Shapes

_FILE_BYTES = 200  # a safetensors header, and the file's line in the manifest


@dataclass(frozen=True)
class Weight:
    """Bytes ``written`` and ``read`` by an artifact's task, and the facts and tensors that builds look at."""

    written: int
    read: int = 0
    files: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Weights:
    """Remembers what it has weighed, by key: later artifacts are made of earlier ones."""

    def __init__(self, storage: Storage, shapes: Shapes) -> None:
        self._storage = storage
        self._shapes = shapes
        self._lambdas: dict[str, tuple[int, int]] = {}
        self._rows: dict[str, tuple[int, tuple[str, ...]]] = {}  # rows, modules
        self._sizes: dict[str, int] = {}
        self.answer_tokens = 0.0  # of one answer, on average

    # --- what later work is made of ---------------------------------------------------------------------

    def kept(self, curvature: str, layer: int | None = None) -> Kept:
        """The eigenvectors per side of every module, or of those in blocks up to ``layer``."""
        facts = artifacts.get(self._storage, curvature).facts
        found = {}
        for name in modules(self._storage, curvature):
            if layer is not None and self._shapes[name][2] > layer:
                continue
            key = str(facts[LAMBDA + name])
            if key not in self._lambdas:
                square = artifacts.read(self._storage, artifacts.get(self._storage, key), "lambda")["square"]
                self._lambdas[key] = (square.shape[0], square.shape[1])
            found[name] = self._lambdas[key]
        return found

    def coordinates(self, gradient: GradientSpec) -> int:
        """How many numbers a gradient row holds."""
        chosen = gradient.projection
        if isinstance(chosen, Rademacher):
            sizes = self._shapes.values()
            return sum(min(chosen.p, d_out) * min(chosen.p, d_in) for d_out, d_in, _ in sizes)
        return int(artifacts.get(self._storage, chosen.basis).facts["coordinates"])

    def rademacher(self, p: int) -> Kept:
        return {name: (min(p, d_out), min(p, d_in)) for name, (d_out, d_in, _) in self._shapes.items()}

    def sides(self, work: PassSpec) -> Kept:
        """What every module is projected on in a pass."""
        if work.gradient is not None and isinstance(work.gradient.projection, Rademacher):
            return self.rademacher(work.gradient.projection.p)
        chosen = work.influence or (work.gradient.projection if work.gradient else None)
        return self.kept(chosen.curvature) if chosen is not None else {}  # pyright: ignore

    def head(self, head: Head) -> tuple[int, int, tuple[str, ...]]:
        """Rows r, coordinates K and modules of a head."""
        artifact = artifacts.get(self._storage, head.artifact)
        names = self._rows[artifact.key][1] if artifact.key in self._rows else tuple(artifacts.stems(artifact))
        return head.array.dims, int(artifact.facts["coordinates"]), names

    # --- one task -------------------------------------------------------------------------------------

    def of(self, task: Task) -> Weight:  # noqa: PLR0911, PLR0912  (one line for every kind of work)
        work, examples = task.work, len(task.rows)
        read_examples = {"examples": examples, "tokens": 0, "quarantined": 0}
        match work:
            case ShapesWork():
                return Weight(100 * len(self._shapes), facts=_said(self._shapes))
            case CovarianceWork(modules=names):
                return Weight(self._squares(names), files=1 + len(names), facts=read_examples)
            case EigenWork(parts, name):
                d_out, d_in, _ = self._shapes[name]
                squares = self._squares([name])
                return Weight(squares + 8 * (d_out + d_in), len(parts) * squares, 2)
            case MomentWork(bases=bases):
                names = [name for name, _ in bases]
                return Weight(self._products(names), self._squares(names), 1 + len(names), read_examples)
            case LambdaWork(parts, name):
                self._lambdas[task.key] = self._shapes[name][:2]
                product, facts = self._products([name]), {"mean": 1.0, "examples": 1}
                return Weight(product, len(parts) * product, 2, facts)
            case ScoutWork(modules=names):
                sides = sum(8 * sum(self._shapes[name][:2]) for name in names)
                read = self._squares(names) + self._products(names)
                return Weight(sides, read, 1 + len(names), {"total": 1.0})
            case NarrowWork(_, name, p):
                return self._narrow(task.key, name, p)
            case JacobianWork():
                kept = self.kept(work.curvature, work.layer)
                return self._block(task.key, work.stop - work.start, kept, self._bases(kept), read_examples)
            case LossRowsWork():
                kept = self.kept(work.curvature)
                return self._block(task.key, 1 if work.mean else examples, kept, self._bases(kept), read_examples)
            case MixWork(rows, directions):
                count = len(artifacts.read(self._storage, artifacts.get(self._storage, directions), FILE)["rows"])
                names = self.rows_of(rows[0])[1]
                columns = self._columns(rows[0])
                self._rows[task.key] = (count, names)
                self._sizes[task.key] = 4 * count * columns
                return Weight(
                    4 * count * columns, self._read(rows), 1 + len(names), {**read_examples, "rows": count}
                )
            case BasisWork():
                sizes = self.kept(work.curvature).values()
                count = min(work.coordinates, sum(p_out * p_in for p_out, p_in in sizes))
                spectrum = {SPECTRUM: {"square": np.ones(count), "mean": np.ones(count)}}
                facts = {"damping": work.damping, "coordinates": count}
                read = self._read(key for rows in (*work.jacobians, work.losses) for key in rows)
                return Weight(24 * count, read, 2 + len(sizes), facts, spectrum)
            case HeadWork():
                return self._head(task.key, work)
            case GatherWork(basis, rows):
                count = sum(self.rows_of(key)[0] for key in rows)
                columns = int(artifacts.get(self._storage, basis).facts["coordinates"])
                facts = {**read_examples, "rows": count, "columns": columns}
                return Weight(4 * count * columns, self._read(rows), 2, facts)
            case AnswersWork():
                return Weight(int(4 * examples * (1 + self.answer_tokens)), 0, 2, read_examples)
            case _:
                raise TypeError(f"{type(work).__name__} is no part of a build")

    def rows_of(self, key: str) -> tuple[int, tuple[str, ...]]:
        """How many rows a stored block has, and of which modules."""
        if key not in self._rows:
            artifact = artifacts.get(self._storage, key)
            self._rows[key] = (int(artifact.facts["rows"]), tuple(artifacts.stems(artifact)))
        return self._rows[key]

    def _columns(self, key: str) -> int:
        """Numbers in a row of a block."""
        rows, names = self.rows_of(key)
        if key in self._sizes:
            return self._sizes[key] // (4 * rows)
        artifact = artifacts.get(self._storage, key)
        return sum(artifacts.read(self._storage, artifact, name)["rows"].shape[1] for name in names)

    def _read(self, keys: Iterable[str]) -> int:
        return sum(4 * self.rows_of(key)[0] * self._columns(key) for key in keys)

    def _narrow(self, key: str, name: str, p: int) -> Weight:
        d_out, d_in, _ = self._shapes[name]
        p_out, p_in = self._lambdas[key] = (min(p, d_out), min(p, d_in))
        written = 4 * (d_out * p_out + d_in * p_in + p_out * p_in)
        return Weight(written, self._squares([name]) + self._products([name]), 3, {"mean": 1.0})

    def _block(self, key: str, count: int, kept: Kept, read: int, facts: Mapping[str, Any]) -> Weight:
        self._rows[key] = (count, tuple(kept))
        self._sizes[key] = size = 4 * count * sum(p_out * p_in for p_out, p_in in kept.values())
        return Weight(size, read, 1 + len(kept), {**facts, "rows": count})

    def _head(self, key: str, work: HeadWork) -> Weight:
        count = sum(self.rows_of(each)[0] for each in work.rows)
        names = self.rows_of(work.rows[0])[1]
        kept = self.kept(work.curvature)
        of = sum(kept[name][0] * kept[name][1] for name in names)
        most = min(of, work.coordinates or of)
        self._rows[key] = (count, names)
        facts = {"coordinates": most, "of": of}
        return Weight(4 * most * (1 + count), 2 * self._read(work.rows), 1 + len(names), facts)

    def _squares(self, names: Sequence[str]) -> int:
        """Of both covariances, or eigenbases, in float32."""
        return sum(4 * (self._shapes[name][0] ** 2 + self._shapes[name][1] ** 2) for name in names)

    def _products(self, names: Sequence[str]) -> int:
        """Of λ, in float32."""
        return sum(4 * self._shapes[name][0] * self._shapes[name][1] for name in names)

    def _bases(self, kept: Kept) -> int:
        """Of the kept eigenvectors."""
        shapes = self._shapes
        return sum(4 * (shapes[name][0] * p[0] + shapes[name][1] * p[1]) for name, p in kept.items())


def _said(shapes: Shapes) -> dict[str, str]:
    """As the artifact of a ShapesWork says it."""
    return {name: " ".join(map(str, sizes)) for name, sizes in shapes.items()}


def file_bytes(files: int) -> int:
    """What files weigh besides their numbers."""
    return _FILE_BYTES * files
