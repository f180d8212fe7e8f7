"""Repair: the jobs that built an index version, run again over what is intact of it, and compared.

Nothing is deleted beforehand. What is damaged is marked (service/results.py), so that the job finds it missing and
makes it again; only the recorded bytes may take its place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from redis import Redis

from service import codec, indexes, results, shards, succession
from service.contracts import IndexRecord, JobContext
from service.damage import explained, is_damage, remedy
from service.errors import Damaged, NotFound
from service.jobs import Jobs
from service.registry import ALL, INDEXES, Registry
from service.specs import Built, IndexManifest
from service.storage import Storage, sha256_bytes
from service.tasks import ShardManifest, libraries
from service.terms import JobKind
from service.verify import (
    ARTIFACT,
    CHANGED,
    CONCEPT,
    DATASET,
    MISSING,
    RECORD,
    SAE,
    SHARD,
    UNREADABLE,
    Damage,
    Report,
    verify,
)

R = TypeVar("R")

Make = Callable[[JobKind, Mapping[str, Any], str], IndexManifest]  # of which version
CANNOT = "cannot_repair"
_ROUNDS = 5  # what lies behind a damaged manifest is seen when that one is whole
_TOLD = 1000  # damaged files in a job's result


def healing(storage: Storage, context: JobContext, work: Callable[[bool], R]) -> R:
    """What ``work`` gives, which is started again when it meets a damaged shard or artifact: that is made again.

    ``work`` is told whether to look for marks behind what refers to other artifacts: once something is marked.
    """
    met: set[str] = set()
    while True:
        try:
            return work(bool(met))
        except (Damaged, NotFound) as error:
            folder = _folder(error.param) if is_damage(error) and error.code != results.NOT_EXACTLY else None
            if folder is None or folder in met:
                raise
            met.add(folder)
            results.mark(storage, folder)
            context.log(f"{error.detail} It is made again.", file=error.param)


def check(storage: Storage, registry: Registry, index_id: str, context: JobContext) -> Report:
    """Verify a version as a job."""

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        context.progress(stage, done, total, unit=unit)

    return verify(storage, index_id, known=registry.remembered(INDEXES, index_id), progress=progress)


def summary(report: Report) -> dict[str, Any]:
    """A report as the result of a job."""
    told = [codec.to_plain(each) for each in report.damage[:_TOLD]]
    about = {"index": report.index, "files": report.files, "bytes": report.bytes}
    return {**about, "damaged": len(report.damage), "damage": told}


class Repair:
    """One repair of one version. ``make`` runs a job up to its manifest, without publishing it."""

    def __init__(
        self, redis: Redis, registry: Registry, storage: Storage, context: JobContext, index_id: str, make: Make
    ) -> None:
        self._jobs = Jobs(redis)
        self._registry = registry
        self._storage = storage
        self._context = context
        self._index = index_id
        self._make = make
        self._marked: dict[str, Damage] = {}  # by folder
        self._met: set[str] = set()  # folders that a job has found damaged, and another one was asked for

    def run(self) -> dict[str, Any]:
        """Until nothing is damaged, or nothing more can be done. Raises Damaged saying what is left."""
        met: dict[str, None] = {}
        try:
            report = self._check()
            for _ in range(_ROUNDS):
                before = [each.file for each in report.damage]
                met |= dict.fromkeys(before)
                if before:
                    self._mend(report.damage)
                    report = self._check()
                if not report.damage or [each.file for each in report.damage] == before:
                    break
        except (Damaged, NotFound) as error:
            if error.code == results.NOT_EXACTLY:
                self._let_go()
            if not is_damage(error) or error.code in {results.NOT_EXACTLY, CANNOT}:
                raise
            raise self._stuck(error) from error
        left = {each.file for each in report.damage}
        done = [file for file in met if file not in left]
        if left:
            self._let_go()
            raise self._unmended(report.damage, done)
        return {"index": self._index, "files": report.files, "repaired": len(done), "mended": done[:_TOLD]}

    def _check(self) -> Report:
        return check(self._storage, self._registry, self._index, self._context)

    # --- one round ------------------------------------------------------------------------------------

    def _mend(self, damage: Sequence[Damage]) -> None:
        left = [each for each in damage if not self._put_back(each)]
        if data := [each for each in left if each.file.startswith("datasets/")]:
            raise self._unmended(data, [])
        of_build = [each for each in left if each.file == f"indexes/{self._index}/{indexes.BUILD}"]
        if of_build:
            self._put_back_build()
        for each in left:
            if each.belongs_to in {SHARD, ARTIFACT}:
                self._mark(each)
        own = [each for each in left if each.owner == self._index and each not in of_build]
        for version in self._to_run([each.owner for each in self._marked.values()]):
            if not own and not any(self._open()):
                return
            self._again(version)
        if own:
            self._put_back_own(self._again(self._index))

    def _put_back(self, damage: Damage) -> bool:
        """A record whose copy in Redis is whole."""
        folder, _, rest = damage.file.partition("/")
        collection = next((each for each in ALL if each.name == folder), None)
        if damage.belongs_to != RECORD or collection is None or not rest.endswith("/record.json"):
            return False
        known = self._registry.remembered(collection, damage.owner)
        if known is None:
            return False
        self._registry.restore(collection, damage.owner, known)
        self._context.log(f"{damage.file} was put back from its copy in Redis.", file=damage.file)
        return True

    def _put_back_build(self) -> None:
        """The job's record says the same, as long as it is kept."""
        record = self._record()
        job = self._jobs.find(record.job) if record else None
        if record is None or job is None:
            return
        manifest = indexes.read_manifest(self._storage, record)
        of_shard = shards.read_manifest(self._storage, manifest.sections[0].shards[0].key)
        built = Built(job.id, record.created_at, libraries(of_shard.versions), job.kind, job.spec)
        data = codec.seal(codec.canonical(codec.to_plain(built)).decode()).encode()
        self._storage.write(f"indexes/{self._index}/{indexes.BUILD}", data)

    def _mark(self, damage: Damage) -> None:
        folder = _folder(damage.file)
        assert folder is not None  # noqa: S101
        before = self._marked.get(folder)
        if before is None or (before.pinned is None and damage.pinned is not None):
            self._marked[folder] = damage
            results.mark(self._storage, folder, manifest=damage.pinned, versions=self._versions())

    def _versions(self) -> Mapping[str, str] | None:
        """What the rows of the version were computed with."""
        record = self._record()
        if record is None:
            return None
        try:
            refs = indexes.read_manifest(self._storage, record).sections[0].shards
        except (Damaged, NotFound):
            return None
        files = (f"{shards.folder(ref.key)}/{shards.MANIFEST}" for ref in refs)
        found = (results.intact(self._storage, file, ShardManifest) for file in files)
        return next((manifest.versions for manifest in found if manifest is not None), None)

    def _open(self) -> Iterator[str]:
        """Marked folders that have not been made again."""
        return (folder for folder in self._marked if self._storage.exists(f"{folder}/{results.MARK}"))

    def _again(self, version: str) -> IndexManifest:
        """The manifest of the version from its job, whatever of its results is missing made again."""
        built = self._built(version)
        while True:
            self._context.log(f"The job that built {version} runs again; what is intact is not computed again.")
            try:
                return healing(
                    self._storage, self._context, lambda _careful: self._make(built.kind, built.spec, version)
                )
            except (Damaged, NotFound) as error:
                if error.code == results.NOT_EXACTLY:
                    raise self._other_bytes(error) from error
                if not is_damage(error) or not self._made_before(version, error.param):
                    raise

    def _made_before(self, version: str, file: str | None) -> bool:
        """Have what the version's job reads, and does not make, made again by the job of one that came before."""
        folder = _folder(file)
        if folder is None or file is None or folder in self._met:
            return False
        self._met.add(folder)
        key = folder.rpartition("/")[2]
        before = self._chain(version)[:-1]
        makers = [each for each in self._to_run([key]) if each in before]
        if makers:
            kind = SHARD if folder.startswith("shards/") else ARTIFACT
            self._mark(Damage(file, UNREADABLE, kind, key, self._pinned(key)))
        for each in makers:
            self._again(each)
        return bool(makers)

    def _pinned(self, key: str) -> str | None:
        """The sha256 by which a version of the chain names a shard."""
        for version in self._chain():
            record = self._record(version)
            try:
                sections = indexes.read_manifest(self._storage, record).sections if record else ()
            except (Damaged, NotFound):
                continue
            for ref in (ref for section in sections for ref in section.shards):
                if ref.key == key:
                    return ref.sha256
        return None

    def _put_back_own(self, manifest: IndexManifest) -> None:
        """The version's own manifest and record, when what was made again is what stood there."""
        file = f"indexes/{self._index}/{indexes.MANIFEST}"
        data = codec.encode(manifest).encode()
        record = self._record()
        if record is not None:
            same = sha256_bytes(data) == record.manifest_sha256
        else:  # then the manifest that is left has to agree
            same = self._storage.exists(file) and self._storage.read(file) == data
        if not same:
            raise Damaged(
                results.NOT_EXACTLY,
                f"The manifest of {self._index} that its job makes now is not the one that was published. Nothing "
                "was replaced. Repair it on a machine and with libraries like those that built it, or build a new "
                "version.",
                param=file,
                context={"file": file},
            )
        self._context.check()
        self._storage.write(file, data)
        if record is None:
            built = self._built(self._index)
            record = replace(indexes.describe(manifest, job=built.job), created_at=built.created_at)
            record = replace(record, manifest_sha256=sha256_bytes(data))
        self._registry.restore(INDEXES, self._index, record)

    # --- which jobs -----------------------------------------------------------------------------------

    def _to_run(self, keys: Sequence[str]) -> list[str]:
        """The versions whose jobs made these results, first ones first; all of the chain when no manifest tells."""
        if not keys:
            return []
        chain = self._chain()
        naming = []
        for version in chain:
            try:
                text = self._storage.read(f"indexes/{version}/{indexes.MANIFEST}").decode(errors="replace")
            except NotFound:
                text = None
            if text is None or any(key in text for key in keys):
                naming.append(version)
        return naming or chain

    def _chain(self, last: str | None = None) -> list[str]:
        """The version and those that it was made from, the first one first."""
        chain: list[str] = []
        version = last or self._index
        while version is not None and version not in chain:
            chain.append(version)
            version = succession.parent_of(self._storage, self._registry, version) or self._source(version)
        return chain[::-1]

    def _source(self, version: str) -> str | None:
        try:
            return self._built(version).spec.get("source")
        except Damaged:
            return None

    def _built(self, version: str) -> Built:
        """The job that built a version: from ``build.json``, or from the job's own record."""
        built = results.intact(self._storage, f"indexes/{version}/{indexes.BUILD}", Built)
        if built is not None:
            return built
        record = self._record(version)
        job = self._jobs.find(record.job) if record else None
        if record is None or job is None:
            file = f"indexes/{version}/{indexes.BUILD}"
            raise Damaged(
                CANNOT,
                f"{file} is damaged, and the job that built {version} is forgotten: nobody knows what to run "
                "again. Build a new version.",
                param=file,
                context={"file": file},
            )
        return Built(job.id, record.created_at, {}, job.kind, job.spec)

    def _record(self, version: str | None = None) -> IndexRecord | None:
        """From wherever it is whole."""
        known = self._registry.remembered(INDEXES, version or self._index)
        file = f"indexes/{version or self._index}/record.json"
        return known or results.intact(self._storage, file, IndexRecord)

    # --- what cannot be mended ------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Shards that could not be made as they were: the next build may make them as it can, since indexes name
        them by their hash. Artifacts they do not, and would not notice others: those stay refused.
        """
        for folder in list(self._open()):
            if self._marked[folder].belongs_to == SHARD:
                results.give_up(self._storage, folder)

    def _other_bytes(self, error: Damaged | NotFound) -> Damaged:
        """The same error, saying which shard it is."""
        key = (_folder(error.param) or "").rpartition("/")[2]
        record = self._record()
        try:
            sections = indexes.read_manifest(self._storage, record).sections if record else ()
        except (Damaged, NotFound):
            sections = ()
        for section in sections:
            for number, ref in enumerate(section.shards):
                if ref.key == key:
                    kinds = ", ".join(dict.fromkeys(str(array.kind) for array in section.arrays))
                    detail = f"Shard {number} of {self._index} ({kinds}): {error.detail}"
                    return Damaged(
                        error.code, detail, param=error.param, context={**error.context, "shard": number}
                    )
        return Damaged(error.code, error.detail, param=error.param, context=error.context)

    def _stuck(self, error: Damaged | NotFound) -> Damaged:
        """The same error, saying what to do about the file without which the job cannot run."""
        if error.param is None or _folder(error.param) is None:
            return explained(error, self._index)
        what = MISSING if isinstance(error, NotFound) or error.code == "missing_artifact" else CHANGED
        kind = SHARD if error.param.startswith("shards/") else ARTIFACT
        return self._unmended([Damage(error.param, what, kind, self._index)], [])

    def _unmended(self, left: Sequence[Damage], done: Sequence[str]) -> Damaged:
        first = left[0]
        _, what = remedy(first.file, None)
        if first.belongs_to not in {DATASET, CONCEPT, SAE} and not first.file.startswith("datasets/"):
            what = "Put it back from a backup, or build a new version."
        others = f" So are {len(left) - 1} other files." if len(left) > 1 else ""
        mended = f" {len(done)} files were repaired." if done else ""
        detail = (
            f"{first.file} of {self._index} is {first.what}, and cannot be computed again.{others}{mended} {what}"
        )
        told = [codec.to_plain(each) for each in left[:_TOLD]]
        return Damaged(
            CANNOT,
            detail,
            param=first.file,
            context={"file": first.file, "damage": told, "mended": list(done)},
        )


def _folder(file: str | None) -> str | None:
    """The folder of the shard or the artifact that a file belongs to."""
    parts = (file or "").split("/")
    return "/".join(parts[:3]) if len(parts) == 4 and parts[0] in {"shards", "artifacts"} else None
