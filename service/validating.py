"""A validation asked for: which scores, which retrainings, and its report or the job that makes it."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from service import adapters, artifacts, codec
from service.contracts import ConceptRecord, JobRecord, ModelRecord, Point
from service.errors import Invalid, NotFound
from service.groups import coded
from service.jobs import Jobs
from service.loading import IndexLoader
from service.models import end_point, end_tokens
from service.planning import declared_points
from service.questions import Query
from service.registry import DATASETS, MODELS, Registry
from service.retrainings import drawn
from service.row_blocks import id_bytes
from service.settings import Settings
from service.storage import Storage
from service.tasks import identity
from service.terms import JobKind, Lora, LossReduction, Method
from service.training import FULL_RATE, LORA_RATE, LoraRecipe, Recipe, Schedule
from service.validation_records import Budget, Design, Plan, Report
from service.validation_spec import INPUTS, Trait, ValidateSpec
from service.whole import Scored, WholeRankings
from service.work import FORMAT, AnswersSpec

T = TypeVar("T")

REPORT, PLAN = "report", "plan"  # stems: JSON as bytes
_ID = re.compile(r"[0-9a-f]{64}")
_NARROWED = ("exclude_modules", "layers_to_transform")  # what words in names do not say of an adapter
_OF_QUERY_SET = {Method.CONCEPT_INFLUENCE, Method.INFLUENCE_FUNCTION}  # those whose question names it


@dataclass(frozen=True)
class RecipeRequest:
    """None: the default. ``lora`` None: as the index's model was made; True: a LoRA of the usual size."""

    learning_rate: float | None = None
    epochs: int = 1
    batch_size: int = 16
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.05
    clip: float | None = 1.0
    weight_decay: float = 0.0
    loss_reduction: LossReduction | None = None
    lora: LoraRecipe | bool | None = None


@dataclass(frozen=True)
class TraitRequest:
    """Let every retrained model answer the query set's prompts, and count the answers that show the trait."""

    threshold: float | None = None
    temperature: float = 1.0
    max_new_tokens: int = 200
    seed: int = 0


@dataclass(frozen=True)
class ValidationRequest:
    """``query``: whose scores are judged; its query set is what the retrained models are measured on."""

    query: Query
    recipe: RecipeRequest
    design: Design
    budget: Budget
    trait: TraitRequest | None = None


@dataclass(frozen=True)
class Validation:
    """What is known of one: the plan once the first run is measured, the report once all are done."""

    id: str
    job: JobRecord | None
    plan: Plan | None
    report: Report | None


class ValidationService:
    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        jobs: Jobs,
        loader: IndexLoader,
        whole: WholeRankings,
        settings: Settings,
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._loader = loader
        self._whole = whole
        self._settings = settings

    def run(self, request: ValidationRequest) -> Validation | JobRecord:
        """The validation when its report is there, or the job that must run first: the query's own, then the one
        that retrains. Raises as ``QueryService.run``, and Invalid naming the field where it can never work.
        """
        query = request.query
        named = query.query_set
        if query.method not in _OF_QUERY_SET:
            query = replace(query, query_set=None)
        scored = self._whole.scores(replace(query, k=1))
        if isinstance(scored, JobRecord):
            return scored
        query_set = named or scored.prepared.matched.query_set
        if query_set is None:
            detail = f"Name the dataset on which retrained models are measured: {query.method} has none of its own."
            raise Invalid("query_set_needed", detail, param="query_set")
        spec = self._plan(request, scored, query_set)
        report = find_report(self._storage, spec.key)
        if report is not None:
            return Validation(spec.key, self._jobs.latest(spec.key), find_plan(self._storage, spec.key), report)
        return self._jobs.submit_once(spec.key, JobKind.VALIDATE, spec)

    def get(self, reference: str) -> Validation:
        """By its id or by its job's. Raises NotFound."""
        job, key = None, reference
        if reference.startswith("job-"):
            job = self._jobs.get(reference)
            key = str(job.spec.get("key"))
        known = _ID.fullmatch(key) is not None
        plan = find_plan(self._storage, key) if known else None
        report = find_report(self._storage, key) if known and plan is not None else None  # it comes second
        job = job or (self._jobs.latest(key) if known else None)
        if (plan is None and job is None) or (job is not None and job.kind != JobKind.VALIDATE):
            detail = f"There is no validation {reference!r}; its id is 'key' in its job's spec."
            raise NotFound("validation_not_found", detail, param="reference")
        return Validation(key, job, plan, report)

    # --- planning -------------------------------------------------------------------------------------

    def _plan(self, request: ValidationRequest, scored: Scored, query_set: str) -> ValidateSpec:
        index, asked = scored.prepared.index, scored.prepared.asked
        model = self._registry.get(MODELS, index.model)
        base = base_of(model, self._registry)
        measured_on = self._registry.get(DATASETS, query_set, param="query_set")
        recipe = self._recipe(request.recipe, model, index.loss_reduction)
        dtype = self._settings.dtype if recipe.lora is not None else "float32"  # weights that move need all bits
        reading = replace(
            self._loader.manifest(index).spec.reading,
            model_fingerprint=base.fingerprint,
            lora=Lora.MERGED,
            dtype=dtype,
        )
        concept, direction = asked.concept, None
        if concept is not None and asked.vector is not None:
            unit = (asked.vector / np.linalg.norm(asked.vector)).astype(np.float32)
            direction = self._store("directions", {"rows": unit[None]})
        inputs = self._inputs(request.design, scored)
        trait = self._trait(request.trait, concept, model)
        pooling = concept.pooling if concept is not None else index.pooling
        ranked = [index.manifest_sha256, inputs, measured_on.fingerprint]
        point = [pooling, direction, concept.layer if concept is not None else None, asked.function]
        trained = [codec.to_plain(each) if each is not None else None for each in (recipe, trait)]
        bounds = [codec.to_plain(each) for each in (request.design, request.budget)]
        key = codec.digest([FORMAT, "validation", identity(reading), ranked, point, trained, bounds])
        return ValidateSpec(
            key=key,
            index=index.id,
            model=model.id,
            base=base,
            reading=reading,
            inputs=inputs,
            left_out=len(scored.examples) - len(scored.scores),
            query_set=measured_on.id,
            pooling=pooling,
            direction=direction,
            layer=concept.layer if concept is not None else None,
            function=asked.function,
            recipe=recipe,
            design=request.design,
            budget=request.budget,
            trait=trait,
            shard_size=self._settings.shard_size,
            about=_about(request, scored, model, base, query_set),
        )

    def _recipe(self, asked: RecipeRequest, model: ModelRecord, reduction: LossReduction) -> Recipe:
        lora = asked.lora
        if lora is None:
            lora = None if model.adapter is None else lora_of(Path(model.adapter))
        elif isinstance(lora, bool):
            lora = LoraRecipe() if lora else None
        fields = {name: value for name, value in vars(asked).items() if name in Recipe.__dataclass_fields__}
        return Recipe(
            **fields
            | {
                "learning_rate": asked.learning_rate or (FULL_RATE if lora is None else LORA_RATE),
                "loss_reduction": asked.loss_reduction or reduction,
                "lora": lora,
                "autocast": lora is None and self._settings.dtype != "float32",
            }
        )

    def _trait(self, asked: TraitRequest | None, concept: ConceptRecord | None, model: ModelRecord) -> Trait | None:
        if asked is None:
            return None
        if concept is None:
            detail = "A trait rate reads answers along a concept's direction; influence_function has none."
            raise Invalid("trait_not_used", detail, param="trait")
        ends = end_tokens(Path(model.path))
        answers = AnswersSpec(asked.temperature, asked.max_new_tokens, asked.seed, ends)
        if asked.threshold is not None:
            return Trait(answers, asked.threshold)
        sides = [concept.provenance.get(side) for side in ("positive", "negative")]
        names = [side["dataset"] for side in sides if isinstance(side, Mapping) and "dataset" in side]
        if len(set(names)) != 2:  # one with labels: its mean is where most of its examples are
            detail = (
                f"Concept {concept.id!r} was not fitted on two datasets, so there is no half-way between them: say "
                "above which ⟨v̂, a⟩ an answer shows the trait, in 'trait.threshold'."
            )
            raise Invalid("threshold_needed", detail, param="trait.threshold")
        for name in names:
            self._registry.get(DATASETS, name, param="trait.threshold")
        return Trait(answers, None, *names)

    def _inputs(self, design: Design, scored: Scored) -> str:
        """What is ranked with its scores and groups, in the order of ids: stored, as it is too large for a record.

        Draws every subset once, to refuse at once what can never be drawn.
        """
        if design.subsets == 0 and (design.seeds == 0 or not design.fractions):
            detail = (
                "A validation needs subsets, or curves: subsets are 0, and so are seeds, or there are no fractions."
            )
            raise Invalid("empty_design", detail, param="design")
        ids = [item.decode() for item in scored.examples.ids[scored.positions].tolist()]
        order = np.argsort(np.array(ids), kind="stable")
        ids = [ids[row] for row in order]
        scores = scored.scores[order].astype(np.float64)
        tensors: dict[str, Any] = {"ids": id_bytes(tuple(ids)), "scores": scores}
        groups = None
        if design.group_by is not None and design.subsets:
            codes, _ = coded(scored.examples, design.group_by, param="design.group_by")
            groups = codes[scored.positions][order]
            tensors["groups"] = groups
        drawn(design, ids, groups)
        return self._store(INPUTS, tensors)

    def _store(self, stem: str, tensors: dict[str, Any]) -> str:
        """An input of the job, named by its content."""
        said = [[name, list(each.shape), each.tobytes().hex()] for name, each in sorted(tensors.items())]
        key = codec.digest([FORMAT, "validation", stem, said])
        if artifacts.find_answer(self._storage, key, stem) is None:
            artifacts.publish(self._storage, key, {stem: tensors}, answer=True)
        return key


def base_of(model: ModelRecord, registry: Registry) -> Point:
    """Where the training of a model began: its declared base, or the first of its checkpoints.

    Raises Invalid for a model that declares neither.
    """
    if model.base is not None:
        return end_point(registry.get(MODELS, model.base, param="index"))
    points = declared_points(model)
    if not points or points[0].fingerprint == model.fingerprint:
        detail = (
            f"Model {model.id!r} declares neither a base nor a checkpoint to start from: register it with 'base', "
            "the model that it is a fine-tune of, and build the index again."
        )
        raise Invalid("no_base", detail, param="index")
    return points[0]


def find_report(storage: Storage, key: str) -> Report | None:
    """The report of the validation ``key``; None where there is none, or it is damaged: it can be made again."""
    return _record(storage, key, REPORT, Report)


def find_plan(storage: Storage, key: str) -> Plan | None:
    """The plan of the validation ``key``."""
    return _record(storage, plan_key(key), PLAN, Plan)


def _record(storage: Storage, key: str, stem: str, kind: type[T]) -> T | None:
    found = artifacts.find_answer(storage, key, stem)
    return codec.decode(kind, found[1]["json"].tobytes()) if found is not None else None


def plan_key(key: str) -> str:
    return codec.digest([FORMAT, "plan of a validation", key])


def as_tensor(record: Any) -> dict[str, Any]:
    """A record as a stored tensor: JSON text in bytes."""
    return {"json": np.frombuffer(codec.encode(record).encode(), dtype=np.uint8)}


def lora_of(folder: Path) -> LoraRecipe:
    """The shape of a model's own LoRA. Raises Invalid where one rank and one alpha do not describe it."""
    config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        detail = f"The maps of {folder} have different ranks or alphas: say in the recipe what is to be trained."
        raise Invalid("lora_not_uniform", detail, param="recipe.lora")
    r, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    if config.get("use_rslora"):
        alpha *= r**0.5  # alpha/√r there is alpha/r here
    targets = config.get("target_modules") or ()
    words = not isinstance(targets, str) and not any(config.get(name) for name in _NARROWED)
    return LoraRecipe(r, alpha, tuple(sorted(targets)) if words and targets else adapters.maps(folder))


def _about(
    request: ValidationRequest, scored: Scored, model: ModelRecord, base: Point, query_set: str
) -> dict[str, Any]:
    query, asked = request.query, scored.prepared.asked
    return {
        "index": scored.prepared.index.id,
        "model": model.id,
        "base": base.name,
        "method": query.method,
        "concept": asked.concept.id if asked.concept else None,
        "layer": asked.concept.layer if asked.concept else None,
        "query_set": query_set,
        "concept_function": asked.function,
        "damping": scored.prepared.matched.damping,
        "outcome": "f_v" if asked.concept else "negative_loss",
        "warnings": list(scored.prepared.warnings),
        "design": asdict(request.design),
        "budget": asdict(request.budget),
    }
