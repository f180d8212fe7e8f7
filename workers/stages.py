"""The steps that jobs are made of, as the dispatcher drives them: cut into tasks, hand out, collect.

Everything is found again by its key, so each step is its own checkpoint.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import artifacts, codec, datasets, shards
from service.contracts import ArrayInfo, DatasetRecord, JobContext
from service.errors import Invalid
from service.rows import F32
from service.specs import DifferencePlan
from service.storage import Storage
from service.tasks import LOWERED, Artifact, ShardManifest, Task, identity
from service.terms import ConceptFunction, Pooling
from service.work import (
    FORMAT,
    AnswersWork,
    ArtifactWork,
    CovarianceWork,
    CurvatureSpec,
    DifferenceSpec,
    EigenWork,
    JacobianWork,
    LambdaWork,
    Location,
    MomentWork,
    NarrowWork,
    PassSpec,
    Reading,
    ShapesWork,
    ShardWork,
    Tracked,
)
from workers.actor import find
from workers.eigenbasis import EIGEN, LAMBDA, modules
from workers.pool import Runner

_PARTS = 8  # of the curvature's sample: sums are kept by part until they are reduced
_SMALLEST_PART = 64
_ANSWERS = 32  # examples per task: generating is slow, and what is done is kept
_ROWS = 32  # of J per task: each repeats the forward, which is small beside 32 backwards


class Stages:
    """Bound to one job: its context hears of progress, and may stop the work at any task."""

    def __init__(self, storage: Storage, pool: Runner, context: JobContext, *, careful: bool = False) -> None:
        """``careful``: something is damaged, so look at the parts of a curvature too before taking it for there."""
        self.storage = storage
        self._pool = pool
        self.context = context
        self._told: set[str] = set()  # smaller token budgets that have been logged
        self._careful = careful
        self.prefix = ""  # in front of every stage's name: which checkpoint it is about

    def telling(self, context: JobContext) -> "Stages":
        """The same workers for another context: one that tells something else of what they do."""
        return Stages(self.storage, self._pool, context, careful=self._careful)

    # --- rows ---------------------------------------------------------------------------------------

    def rows(
        self,
        stage: str,
        location: Location,
        spec: PassSpec,
        dataset: DatasetRecord,
        *,
        size: int,
        chosen: Sequence[int] | None = None,
    ) -> list[ShardManifest]:
        """The shards of a pass over the dataset, or over ``chosen`` positions of it, in order."""
        ids = self.ids(dataset)
        tasks = shards.cut(location, spec, dataset, ids, range(len(ids)) if chosen is None else chosen, size)
        return self.run(stage, tasks, unit="examples")

    def differences(
        self,
        location: Location,
        reading: Reading,
        plan: DifferencePlan,
        answerer: Location,
        dataset: DatasetRecord,
        *,
        layers: tuple[int, ...],
        pooling: Pooling,
        size: int,
        chosen: Sequence[int] | None = None,
    ) -> list[ShardManifest]:
        """The shards of a_l(x, y) − a_l(x, y'), after the answers y' that are not there yet; cut as by ``rows``."""
        ids = self.ids(dataset)
        whole = range(len(ids)) if chosen is None else chosen
        cuts = [whole[start : start + size] for start in range(0, len(whole), size)]
        parts = [[cut[first : first + _ANSWERS] for first in range(0, len(cut), _ANSWERS)] for cut in cuts]
        theirs = replace(
            reading,
            model_fingerprint=plan.answerer.fingerprint,
            max_length=min(reading.max_length, plan.context_length or reading.max_length),
        )
        sources = [(dataset, part) for of_shard in parts for part in of_shard]
        work = AnswersWork(theirs, plan.answers)
        stage = f"answers of {plan.answerer.name}"
        made = iter(self.artifacts(stage, [work] * len(sources), location=answerer, sources=sources))
        tasks = []
        for number, (cut, of_shard) in enumerate(zip(cuts, parts, strict=True)):
            keys = tuple(next(made).key for _ in of_shard)
            spec = DifferenceSpec(
                **vars(reading), layers=layers, pooling=pooling, answers=keys, ends=plan.answers.ends
            )
            tasks += shards.cut(location, spec, dataset, ids, cut, size, first=number)
        return self.run("differences", tasks, unit="examples")

    def ids(self, dataset: DatasetRecord) -> list[str]:
        return datasets.read_table(self.storage, dataset).column("id").to_pylist()

    def derive(self, stage: str, works: Sequence[ShardWork]) -> list[ShardManifest]:
        """Shards computed from other shards."""
        tasks = [shards.derived(work, f"{stage}, shard {number}") for number, work in enumerate(works)]
        return self.run(stage, tasks, unit="shards")

    # --- artifacts ----------------------------------------------------------------------------------

    def artifacts(
        self,
        stage: str,
        works: Sequence[ArtifactWork],
        *,
        location: Location | None = None,
        sources: Sequence[tuple[DatasetRecord, Sequence[int]]] | None = None,
        unit: str = "parts",
    ) -> list[Artifact]:
        """One artifact for every work; ``sources`` says which examples each of them reads."""
        ids: dict[str, list[str]] = {}
        tasks = []
        for number, work in enumerate(works):
            dataset, rows = sources[number] if sources else (None, ())
            if dataset is not None and dataset.id not in ids:
                ids[dataset.id] = self.ids(dataset)
            read = [ids[dataset.id][row] for row in rows] if dataset is not None else []
            key = key_of(work, read)
            title = f"{stage}, part {number + 1} of {len(works)}"
            tasks.append(Task(key, title, work, location, dataset, tuple(rows)))
        return self.run(stage, tasks, unit=unit)

    def shapes(
        self, location: Location, reading: Reading, tracked: Tracked, *, blocks: int | None = None
    ) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every tracked module, or of those in the first ``blocks``."""
        (found,) = self.artifacts("modules", [ShapesWork(reading, tracked)], location=location)
        sizes = {name: [int(number) for number in str(said).split()] for name, said in found.facts.items()}
        return {
            name: (d_out, d_in) for name, (d_out, d_in, block) in sizes.items() if blocks is None or block <= blocks
        }

    def curvature(
        self,
        location: Location,
        reading: Reading,
        tracked: Tracked,
        spec: CurvatureSpec,
        dataset: DatasetRecord,
        *,
        most_bytes: int,
    ) -> str:
        """EK-FAC of the tracked modules, fitted on a seeded sample; the artifact's key.

        The key covers weights, tokenizer, mask rule, settings and the sample's examples: a stale one cannot
        be found. Modules are done in groups whose factors fit into ``most_bytes``; each group reads the sample
        again.
        """
        ids = self.ids(dataset)
        chosen = sample_rows(ids, spec.examples, spec.seed)
        about = [identity(each) for each in (reading, tracked, spec)]
        key = codec.digest([FORMAT, "curvature", *about, [ids[row] for row in chosen]])
        if self._is_there(key):
            return key
        size = max(_SMALLEST_PART, -(-len(chosen) // _PARTS))
        parts = [(dataset, chosen[start : start + size]) for start in range(0, len(chosen), size)]
        groups = grouped(self.shapes(location, reading, tracked), most_bytes)

        def over_sample(stage: str, works: Sequence[ArtifactWork]) -> list[list[Artifact]]:
            """What each work gives on every part of the sample, without the empty ones."""
            found = self.artifacts(
                stage,
                [work for work in works for _ in parts],
                location=location,
                sources=[part for _ in works for part in parts],
            )
            each = [found[start : start + len(parts)] for start in range(0, len(found), len(parts))]
            return [[part for part in of_work if part.facts["examples"]] for of_work in each]

        covariances = over_sample(
            "curvature: covariances", [CovarianceWork(reading, tracked, spec, group) for group in groups]
        )
        if not all(covariances):
            detail = f"No example of the curvature's sample of {dataset.id!r} has a token to predict."
            raise Invalid("empty_sample", detail, param="dataset")
        names = [name for group in groups for name in group]
        summed = [
            EigenWork(tuple(part.key for part in of_group), name)
            for group, of_group in zip(groups, covariances, strict=True)
            for name in group
        ]
        eigen = self.artifacts("curvature: eigenvectors", summed, unit="modules")
        bases = {name: found.key for name, found in zip(names, eigen, strict=True)}
        moments = over_sample(
            "curvature: eigenvalues",
            [MomentWork(reading, tracked, spec, tuple((name, bases[name]) for name in group)) for group in groups],
        )
        averaged = [
            LambdaWork(tuple(part.key for part in of_group), name)
            for group, of_group in zip(groups, moments, strict=True)
            for name in group
        ]
        squares = self.artifacts("curvature: λ", averaged, unit="modules")
        facts: dict[str, float | int | str] = {"examples": int(squares[0].facts["examples"])}
        for name, square in zip(names, squares, strict=True):
            facts |= {EIGEN + name: bases[name], LAMBDA + name: square.key}
        artifacts.publish(self.storage, key, {}, facts=facts)
        return key

    def _is_there(self, curvature: str) -> bool:
        known = artifacts.made(self.storage, curvature)
        parts = known.facts.items() if known is not None and self._careful else ()
        named = [str(key) for fact, key in parts if fact.startswith((EIGEN, LAMBDA))]
        return known is not None and all(artifacts.made(self.storage, key) is not None for key in named)

    def narrowed(self, curvature: str, p: int | None, scouts: Sequence[tuple[str, ...]]) -> str:
        """The curvature with p eigenvectors per side of every module; None: itself. ``scouts``: by question."""
        if p is None:
            return curvature
        key = codec.digest([FORMAT, "narrowed", curvature, p, list(scouts)])
        if self._is_there(key):
            return key
        names = modules(self.storage, curvature)
        works = [NarrowWork(curvature, name, p, tuple(scouts)) for name in names]
        found = self.artifacts("choosing eigenvectors", works, unit="modules")
        facts: dict[str, float | int | str] = {}
        for name, artifact in zip(names, found, strict=True):
            facts |= {EIGEN + name: artifact.key, LAMBDA + name: artifact.key}
        artifacts.publish(self.storage, key, {}, facts=facts)
        return key

    def jacobian(
        self,
        location: Location,
        reading: Reading,
        query_set: DatasetRecord,
        *,
        curvature: str,
        layer: int,
        pooling: Pooling,
        function: ConceptFunction,
        directions: str | None,
        count: int,
    ) -> tuple[str, ...]:
        """J(Q, l), or D·J for stored directions D (count rows): the keys of its blocks of rows."""
        about = (reading, curvature, layer, pooling, function, directions)
        works = [JacobianWork(*about, start, min(start + _ROWS, count)) for start in range(0, count, _ROWS)]
        whole = (query_set, range(query_set.examples))
        found = self.artifacts(
            f"Jacobian over {query_set.id}, layer {layer}", works, location=location, sources=[whole] * len(works)
        )
        return tuple(artifact.key for artifact in found)

    def store(self, key: list[Any], stem: str, tensors: Mapping[str, Any]) -> str:
        """A small artifact that the dispatcher makes itself; one that is there already stays as it is."""
        name = codec.digest([FORMAT, *key])
        if artifacts.made(self.storage, name) is None:
            artifacts.publish(self.storage, name, {stem: tensors})
        return name

    # --- both ---------------------------------------------------------------------------------------

    def run(self, stage: str, tasks: Sequence[Task], *, unit: str) -> list[Any]:
        """The results of all tasks in order; those in storage are not computed again."""
        stage = self.prefix + stage
        weight = (lambda task: len(task.rows)) if unit == "examples" else (lambda _task: 1)
        total = sum(map(weight, tasks))
        found: dict[str, Any] = {}
        for task in tasks:
            if (there := find(self.storage, task)) is not None:
                found[task.key] = there
        done = resumed = sum(weight(task) for task in tasks if task.key in found)
        quarantined = sum(len(getattr(manifest, "quarantined", ())) for manifest in found.values())
        if found:
            noun = "shards" if unit == "examples" else unit
            self.context.log(f"{len(found)} of {len(tasks)} {noun} are there already.", stage=stage)
        self.context.progress(stage, done, total, unit=unit, resumed=resumed, quarantined=quarantined)

        tokens = 0

        def on_done(task: Task, manifest: Any) -> None:
            nonlocal done, quarantined, tokens
            found[task.key] = manifest
            tokens += _tokens_of(manifest)
            self._tell_memory(manifest.versions.get(LOWERED), stage)
            done += weight(task)
            quarantined += len(getattr(manifest, "quarantined", ()))
            self.context.progress(
                stage, done, total, unit=unit, resumed=resumed, quarantined=quarantined, tokens=tokens
            )

        missing = list({task.key: task for task in tasks if task.key not in found}.values())
        if missing:
            self._pool.run(missing, on_done=on_done, check=self.context.check, log_event=self.context.log)
        return [found[task.key] for task in tasks]

    def _tell_memory(self, budget: str | None, stage: str) -> None:
        if budget is not None and budget not in self._told:
            self._told.add(budget)
            self.context.log(
                f"A worker ran out of memory; its batches hold at most {budget} tokens from now on. Set "
                "WHENCE_TOKEN_BUDGET lower to spare it the attempt.",
                stage=stage,
            )

    def stored(self, manifests: Sequence[ShardManifest], number: int = 0) -> F32:
        """All rows of the ``number``-th array of these shards."""
        return np.concatenate([self.rows_of(manifest, manifest.arrays[number].info) for manifest in manifests])

    def rows_of(self, manifest: ShardManifest, array: ArrayInfo) -> F32:
        """One array of a shard, (rows, dims)."""
        return shards.read_rows(self.storage, manifest, array)

    def numbers(self, key: str, stem: str) -> dict[str, NDArray[Any]]:
        """The tensors of one file of an artifact."""
        return artifacts.read(self.storage, artifacts.get(self.storage, key), stem)


def key_of(work: ArtifactWork, read: Sequence[str] = ()) -> str:
    """The name of a work's artifact; ``read``: ids of the examples that it reads."""
    return codec.digest([FORMAT, type(work).__name__, identity(work), list(read)])


def _tokens_of(result: ShardManifest | Artifact) -> int:
    """How many tokens were read or written for it."""
    return result.tokens if isinstance(result, ShardManifest) else int(result.facts.get("tokens", 0))


def grouped(shapes: Mapping[str, tuple[int, int]], most_bytes: int, products: int = 1) -> list[tuple[str, ...]]:
    """The modules in order, in as few groups as keep what EK-FAC holds of each within ``most_bytes``, when one
    fits at all: both covariances or eigenbases in float32, and ``products`` matrices (d_out, d_in), λ as a rule.
    """
    groups: list[list[str]] = []
    room = 0
    for name, (d_out, d_in) in shapes.items():
        need = 4 * (d_out**2 + d_in**2 + products * d_out * d_in)
        if not groups or need > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(name)
        room -= need
    return [tuple(group) for group in groups]


def sample_rows(ids: Sequence[str], count: int, seed: int) -> list[int]:
    """At most ``count`` positions, chosen by a hash of seed and id: not by order, so that appending examples
    or sorting the file keeps most of the sample.
    """
    return sorted(shuffled(ids, seed)[:count])


def shuffled(ids: Sequence[str], seed: int) -> list[int]:
    """All positions in a seeded order that depends on the ids alone."""
    return sorted(range(len(ids)), key=lambda row: hashlib.sha256(f"{seed}:{ids[row]}".encode()).digest())
