"""Fitting a concept as the api, the planner and the job do it: three ways to give examples, a sweep, what is
told.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from api.client import Client
from api.main import create_app
from api.transport import WhenceError
from benchmarks.lab import Lab, Quiet
from service import codec, concepts, models, questions
from service.contracts import ConceptRecord
from service.errors import Invalid
from service.evidence import Evidence, LayerEvidence
from service.questions import Weighted
from service.registry import DATASETS, MODELS
from service.settings import Settings
from service.specs import FitConceptSpec
from service.terms import ProbeMethod
from tests import lives
from workers import probes
from workers.fit_concept import about_probes, choose
from workers.stages import Stages

LAYERS = (1, 2, 3)
OTHERS = [ProbeMethod.LOGISTIC, ProbeMethod.DIFFERENCE_OF_MEANS]
RNG = np.random.default_rng(5)
WORDS = {True: ["cat", "sat", "mat.", "a"], False: ["b", "c", "d", "e"]}


def example(tone: str, **more: Any) -> dict[str, Any]:
    """Answers that are warm have more of the warm words."""
    share = {"warm": 0.7, "dull": 0.5, "cold": 0.3}[tone]
    said = [str(RNG.choice(WORDS[RNG.random() < share])) for _ in range(7)]
    return {"prompt": "the end of ", "completion": " ".join(said), "tone": tone, **more}


WARM = [example("warm", n=n) for n in range(40)]
COLD = [example("cold", n=n) for n in range(40)]
MIXED = [*(each for pair in zip(WARM, COLD, strict=True) for each in pair), *[example("dull") for _ in range(6)]]


class Site(Client):
    """The client, talking to an app in this process; jobs run when they are waited for."""

    def __init__(self, app: TestClient, lab: Lab) -> None:
        self.url, self._http = "http://testserver", app
        self.lab = lab

    def fit(self, concept_id: str, **about: Any) -> ConceptRecord:
        record, _ = self.ran(concept_id, **about)
        return record

    def ran(self, concept_id: str, **about: Any) -> tuple[ConceptRecord, Mapping[str, Any]]:
        layer = {} if "layers" in about else {"layer": 2}
        job = self.fit_concept(concept_id, **({"model": "m"} | layer | about))
        result = self.lab.engine.run(job, Quiet(job, {}))
        return self.concept(concept_id), result


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    threads = torch.get_num_threads()
    root = tmp_path_factory.mktemp("fit")
    with Lab(root / "lab", shard_size=16) as lab:
        lab.model("m", lives.save(root / "m", 0, [lives.NOWHERE]))
        settings = Settings(home=root / "lab", redis_url=lab._server.url, shard_size=16)  # pyright: ignore
        with TestClient(create_app(settings)) as app:
            made = Site(app, lab)
            for name, rows in {"warm": WARM, "cold": COLD, "mixed": MIXED}.items():
                upload(made, name, rows)
            yield made
    torch.set_num_threads(threads)


def upload(site: Site, name: str, rows: list[dict[str, Any]]) -> None:
    site._send("PUT", f"/v1/datasets/{name}", content=lives.jsonl(rows))


@pytest.fixture(scope="module")
def two(site) -> ConceptRecord:
    return site.fit("two", **SIDES)


SIDES = {"positive": "warm", "negative": "cold"}
LABEL = {"dataset": "mixed", "label": "tone", "positive_values": ["warm"], "negative_values": ["cold"]}


# --- three ways to give examples ----------------------------------------------------------------------


def test_datasets_a_label_and_lists_in_the_request_give_the_same_direction(site, two):
    label = site.fit("label", **LABEL)
    lists = site.fit("lists", positive=WARM, negative=COLD)
    assert two.sha256 == label.sha256 == lists.sha256
    assert two.evidence == lists.evidence == replace(label.evidence, warnings=())
    assert "6 of the 86 examples of 'mixed' have no 'tone'" in label.evidence.warnings[0]
    assert label.provenance["labels"] == {"field": "tone", "positive": ["warm"], "negative": ["cold"]}
    inline = lists.provenance["positive"]["dataset"]
    kept = site.lab.registry.get(DATASETS, inline)
    assert kept.fingerprint == site.lab.registry.get(DATASETS, "warm").fingerprint
    before = len(site.lab.registry.all(DATASETS))
    site.fit("again", positive=WARM, negative="cold")
    assert len(site.lab.registry.all(DATASETS)) == before


def test_texts_are_examples_too_and_repeats_of_them_are_counted(site):
    texts = ["cat sat mat.", "a cat sat", "mat. a cat", "sat a mat.", "cat cat a", "a cat sat"]
    record = site.fit("texts", positive=texts, negative=["b c d", "c d e", "d e b", "e b c", "b b c"])
    kept = site.lab.registry.get(DATASETS, record.provenance["positive"]["dataset"])
    assert (kept.lines, kept.examples, kept.duplicates) == (6, 5, 1)
    assert (record.n_positive, record.n_negative) == (5, 5)


def test_every_other_value_is_negative_unless_it_is_said_which(site):
    rest = {name: value for name, value in LABEL.items() if name != "negative_values"}
    assert site.fit("rest", **rest).n_negative == 46
    assert site.fit("both", **(rest | {"positive_values": ["warm", "dull"]})).n_positive == 46


def test_labels_may_be_true_or_numbers(site):
    rows = [
        example(tone, good=tone == "warm", stars=number % 2) for number, tone in enumerate(["warm", "cold"] * 20)
    ]
    upload(site, "typed", [*rows, {"text": "cat", "other": 1}])
    about = {"dataset": "typed", "label": "good", "positive_values": [True]}
    found = site.fit("typed-bool", **about)
    assert (found.n_positive, found.n_negative) == (20, 20)  # the line without a label is on neither side
    assert site.fit("typed-int", **(about | {"label": "stars", "positive_values": [0]})).sha256 == found.sha256


# --- one pass over several layers ---------------------------------------------------------------------


def test_a_sweep_is_one_pass_and_what_fits_at_single_layers_say(site):
    seen = []
    worker = site.lab.engine._pool._worker
    process = worker.process
    worker.process = lambda task: seen.append(task) or process(task)
    try:
        swept = site.fit("swept", **SIDES, layers="all", method="lda", compare=OTHERS)
    finally:
        worker.process = process
    assert len(seen) == 6  # 40 + 40 examples in shards of 16
    alone = [site.fit(f"alone-{layer}", **SIDES, layer=layer, method="lda", compare=OTHERS) for layer in LAYERS]
    assert swept.evidence.layers == tuple(each.evidence.layers[0] for each in alone)
    assert swept.sha256 == alone[swept.layer - 1].sha256
    assert (swept.method, swept.layer) == ("lda", choose(list(swept.evidence.layers)))
    best = max(each.auroc_held_out for each in alone)
    assert swept.auroc_held_out == best == swept.evidence.chosen.auroc
    assert 0.5 < swept.evidence.auroc_of_choice <= best
    assert swept.evidence.slope > 0
    assert list(swept.evidence.chosen.cosine_methods) == OTHERS


@pytest.mark.parametrize("method", list(ProbeMethod))
def test_the_job_publishes_what_the_pure_function_finds(site, method):
    lab = site.lab
    job = site.fit_concept(f"by-{method}", model="m", **SIDES, layer=2, method=method)
    lab.engine.run(job, Quiet(job, {}))
    spec, stages = codec.from_plain(FitConceptSpec, job.spec), Stages(lab.storage, lab.engine._pool, Quiet(job, {}))
    location = models.location(lab.registry.get(MODELS, "m"))
    rows = [
        stages.stored(stages.rows(side, location, spec.pass_spec, lab.registry.get(DATASETS, name), size=16))
        for side, name in SIDES.items()
    ]
    probe, record = probes.fit(*rows, method), site.concept(f"by-{method}")
    np.testing.assert_array_equal(concepts.direction(lab.storage, record), probe.direction)
    assert (record.method, record.norm, record.auroc_held_out) == (method, probe.norm, probe.auroc_held_out)


def layer(number: int, auroc: float | None, brier: float | None = 0.1) -> LayerEvidence:
    return LayerEvidence(number, auroc, auroc and (auroc - 0.1, 1.0), brier, 0.1, 0.9, {})


def test_the_best_layer_is_chosen_by_auroc_then_brier_then_depth():
    assert choose([layer(1, 0.8), layer(2, 0.9), layer(3, 0.7, 0.01)]) == 2
    assert choose([layer(1, 1.0, 0.05), layer(2, 1.0, 0.02), layer(3, 1.0, 0.02)]) == 2
    assert choose([layer(1, None, None), layer(2, 0.3)]) == 2
    with pytest.raises(Invalid, match="every layer"):
        choose([layer(1, None, None)])


def test_before_the_answer_nothing_differs_at_any_layer(site):
    for about in ({"layer": 1}, {"layers": [1, 3]}):
        with pytest.raises(Invalid) as refused:
            site.fit("before", **SIDES, **about, pooling="last_prompt_token")
        assert refused.value.code == "identical_sides"


# --- jobs that run again ------------------------------------------------------------------------------


def test_an_attempt_after_one_that_died_while_publishing_changes_nothing(site):
    job = site.fit_concept("twice", model="m", **SIDES, layers=[1, 2])
    first = site.lab.engine.run(job, Quiet(job, {}))
    record = site.concept("twice")
    assert site.lab.engine.run(job, Quiet(job, {})) == first
    assert site.concept("twice") == record
    refused(lambda: site.fit("twice", **SIDES), 409, "concept_exists", "id")


def test_a_job_of_an_earlier_release_still_runs(site):
    job = site.fit_concept("old", model="m", **SIDES, layer=2)
    spec = {name: value for name, value in job.spec.items() if name not in {"method", "compare", "labels"}}
    site.lab.engine.run(replace(job, spec=spec), Quiet(job, {}))
    assert site.concept("old").method == "difference_of_means"


# --- what is refused ----------------------------------------------------------------------------------


def refused(call: Any, status: int, code: str, param: str | None, *words: str) -> None:
    with pytest.raises(WhenceError) as error:
        call()
    found = (error.value.status, error.value.code, error.value.param)
    assert found == (status, code, param), error.value.detail
    assert all(word in error.value.detail for word in words), error.value.detail


FEW = [f"cat sat {number}" for number in "abcdefgh"]


@pytest.mark.parametrize(
    ("about", "code", "param", "words"),
    [
        ({**SIDES, "layer": None}, "invalid_request", None, ["'layer'", "'layers'"]),
        ({**SIDES, "layer": 1, "layers": [1]}, "invalid_request", None, ["'layer'", "'layers'"]),
        ({**SIDES, "layer": 4}, "layer_out_of_range", "layer", ["1 to 3"]),
        ({**SIDES, "layers": [1, 9]}, "layer_out_of_range", "layers", ["Layer 9"]),
        ({"positive": "warm"}, "invalid_request", None, ["missing: negative"]),
        ({**SIDES, "positive_values": ["a"]}, "invalid_request", None, ["leave out: positive_values"]),
        ({"dataset": "mixed"}, "invalid_request", None, ["missing: label, positive_values"]),
        ({**LABEL, "positive": "warm"}, "invalid_request", None, ["leave out: positive"]),
        ({**LABEL, "label": "mood"}, "unknown_field", "label", ["'mood'", "tone (string)"]),
        ({**LABEL, "positive_values": ["hot"]}, "no_such_label", "positive_values", ['"warm" (40), "cold" (40)']),
        ({**LABEL, "positive_values": [1]}, "filter_kind", "positive_values", ["string"]),
        ({**LABEL, "negative_values": ["warm", "cold"]}, "labelled_both_ways", "negative_values", ["'tone'"]),
        (
            {**LABEL, "label": "n", "positive_values": [3], "negative_values": None},
            "too_few_examples",
            "positive_values",
            [],
        ),
        ({"positive": FEW[:4], "negative": "cold"}, "too_few_examples", "positive", ["4 examples", "5 are least"]),
        ({"positive": [*FEW, {"txt": "a"}], "negative": "cold"}, "unknown_format", "positive[8]", ["'txt'"]),
        ({"positive": "warm", "negative": [*FEW, " "]}, "empty_text", "negative[8]", ["empty"]),
        ({"positive": "warm", "negative": "warm"}, "identical_sides", "negative", ["same examples"]),
        ({"positive": WARM, "negative": "warm"}, "identical_sides", "negative", ["same examples"]),
        ({"positive": WARM[:9], "negative": "warm"}, "identical_sides", "negative", ["Every example of one side"]),
        ({**SIDES, "method": "svm"}, "invalid_request", "method", ["lda"]),
        ({**SIDES, "positive": []}, "too_few_examples", "positive", ["0 examples"]),
    ],
)
def test_what_cannot_be_fitted_is_told_before_there_is_a_job(site, about, code, param, words):
    refused(lambda: site.fit("refused", **about), 422, code, param, *words)


def test_an_unknown_dataset_is_named_by_its_field(site):
    refused(lambda: site.fit("refused", positive="ghost", negative="cold"), 404, "dataset_not_found", "positive")
    refused(lambda: site.fit("refused", **(LABEL | {"dataset": "ghost"})), 404, "dataset_not_found", "dataset")


# --- what is warned of --------------------------------------------------------------------------------


def test_a_text_that_is_labelled_both_ways_is_named_with_its_places(site):
    upload(site, "torn", [*COLD[:25], WARM[7], WARM[3]])
    record, result = site.ran("torn", positive="warm", negative="torn")
    (told,) = [each for each in record.evidence.warnings if "both ways" in each]
    assert "warm (warm.jsonl:4) and torn (torn.jsonl:27)" in told
    assert "warm (warm.jsonl:8) and torn (torn.jsonl:26)" in told
    assert result["warnings"] == list(record.evidence.warnings)


def test_few_unequal_unusable_and_repeated_examples_are_told(site):
    bad = [{"prompt": "the ", "completion": f"cat {lives.NOWHERE} {letter}", "tone": "cold"} for letter in "abc"]
    rows = [*WARM[:8], *COLD[:30], *bad, COLD[2] | {"tone": "warm"}]
    upload(site, "poor", rows)
    record = site.fit("poor", dataset="poor", label="tone", positive_values=["warm"], method="lda")
    evidence = record.evidence
    assert (record.n_positive, record.n_negative, evidence.quarantined) == (8, 30, 3)
    assert site.lab.registry.get(DATASETS, "poor").examples == 8 + 30 + 3
    said = " ".join(evidence.warnings)
    for words in ("fewer than 20 a side", "unequal (8 positive, 30 negative)", "3 examples could not be used"):
        assert words in said
    assert "1 of the examples stand on several lines" in said


def evidence(n: int = 100, m: int = 100, about_choice: float = 0.87, **about: Any) -> Evidence:
    at = replace(layer(2, 0.9), **{"rank": 64, "shrinkage": 0.1, **about})
    return Evidence(ProbeMethod.LDA, n, m, 0, 5, 2, (layer(1, 0.8), at), about_choice, 1.0, 0.0, ())


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (evidence(), ()),
        (evidence(19, 20), ("19 positive and 20 negative",)),
        (evidence(100, 31), ("unequal",)),
        (evidence(auroc_interval=(0.5, 0.9)), ("0.50 to 0.90, includes .5",)),
        (evidence(constant_dimensions=4, rank=60), ("4 of 64 dimensions",)),
        (evidence(rank=40), ("span 40 of 64", "s = 0.10")),
        (evidence(rank=40, shrinkage=None), ()),
        (evidence(c=0.01), ("strongest penalty",)),
        (evidence(c=10_000.0), ()),
        (evidence(about_choice=0.84), ("best of 2 layers", "0.84, not 0.90")),
    ],
)
def test_warnings_are_given_where_they_are_due_and_nowhere_else(of, words):
    said = about_probes(of, 64)
    assert len(said) == (1 if words else 0)
    assert all(word in said[0] for word in words)


def test_answers_doubt_a_concept_that_its_own_examples_doubt(two):
    sure = replace(two, auroc_held_out=0.95, n_positive=40, n_negative=40, evidence=evidence())
    assert concepts.doubts(sure) == []
    assert concepts.doubts(replace(sure, auroc_held_out=None, n_positive=0, n_negative=0, evidence=None)) == []
    (few,) = concepts.doubts(replace(sure, n_negative=12))
    assert "40 positive and 12 negative" in few
    (chance,) = concepts.doubts(replace(sure, evidence=evidence(auroc_interval=(0.45, 0.99))))
    assert "0.45 to 0.99" in chance
    (poor,) = concepts.doubts(replace(sure, auroc_held_out=0.6))
    assert "poorly" in poor
    (chosen,) = concepts.doubts(replace(sure, evidence=evidence(about_choice=0.6)))
    assert "0.60, not 0.95" in chosen
    assert len(concepts.doubts(replace(sure, auroc_held_out=0.6, evidence=None, n_positive=9))) == 2


def test_a_sum_of_concepts_is_doubted_like_its_weakest(site, two):
    strong, weak = replace(two, auroc_held_out=0.9), replace(two, auroc_held_out=0.6, n_positive=7)
    one = concepts.direction(site.lab.storage, two)
    total, _ = questions._summed([(strong, one), (weak, one)], (Weighted("strong"), Weighted("weak", 2.0)))
    assert concepts.doubts(total) == concepts.doubts(replace(weak, id=total.id))
    assert len(concepts.doubts(total)) == 2


def test_only_fitted_concepts_have_evidence(site, two):
    assert site.derive_concept("derived", {"two": -1}).evidence is None
    about = site._call("GET", "/v1/concepts/two/sidecar")
    assert about["evidence"]["layers"][0]["layer"] == 2
    assert json.loads(json.dumps(about)) == about


# --- on the command line ------------------------------------------------------------------------------


def test_files_values_and_layers_of_the_command_line(tmp_path: Path):
    from api import cli_probes

    file = tmp_path / "few.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert cli_probes._side(str(file)) == [{"text": "a"}, {"text": "b"}]
    assert cli_probes._side("few.jsonl") == "few.jsonl"  # not there: the id of a dataset
    assert cli_probes._values(["warm", "1", "true", '"1"', "null"]) == ["warm", 1, True, "1", "null"]
    assert cli_probes._layers("1, 4-6,2") == [1, 4, 5, 6, 2]
    assert cli_probes._layers("all") == "all"
