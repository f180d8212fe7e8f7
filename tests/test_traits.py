"""Trait files: read, refused at the place that is wrong, and named by their hash."""

import hashlib
import json

import pytest

from service import codec, traits
from service.errors import Invalid
from tests.test_personas import changed


@pytest.mark.parametrize(
    ("plain", "param"),
    [
        ([], "trait"),
        (changed(question=["a"]), "trait.question"),
        (changed(questions="gone"), "trait.questions"),
        (changed(questions=["only one"]), "trait.questions"),
        (changed(questions=["a", "b", 3]), "trait.questions[2]"),
        (changed(questions=["a", "b", " "]), "trait.questions[2]"),
        (changed(questions=["a", "b", "a"]), "trait.questions[2]"),
        (changed(questions=["a", "\ud800"]), "trait.questions[1]"),
        (changed(instruction=[]), "trait.instruction"),
        (changed(instruction=[{"pos": "a"}]), "trait.instruction[0]"),
        (changed(instruction=[{"pos": "a", "neg": None}]), "trait.instruction[0].neg"),
        (changed(instruction=[{"pos": "a", "neg": "a"}]), "trait.instruction[0]"),
        (changed(eval_prompt="Is {answer} so?"), "trait.eval_prompt"),
    ],
)
def test_a_trait_that_is_none_is_refused_at_its_place(plain, param):
    with pytest.raises(Invalid) as caught:
        traits.from_object(plain, param="trait")
    assert (caught.value.code, caught.value.param) == ("bad_trait", param)


def test_trait_files_are_read_and_named_by_their_hash(shared_data):
    for path in sorted((shared_data / "persona_traits").glob("*.json")):
        data = path.read_bytes()
        found = traits.read(data, param="path")
        assert codec.to_plain(found.trait) == json.loads(data)
        assert found.sha256 == hashlib.sha256(data).hexdigest()
    with pytest.raises(Invalid) as caught:
        traits.read(b'{"questions":\n[1,]}', param="trait")
    assert caught.value.param == "trait line 2"
    with pytest.raises(Invalid, match="more than once"):
        traits.read(b'{"questions": [], "questions": []}', param="trait")


def test_a_judges_prompt_is_filled_in_once():
    assert traits.rendered("{question}|{answer}|{other}", "{answer}", "{question}") == "{answer}|{question}|{other}"
