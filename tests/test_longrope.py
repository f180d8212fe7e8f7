"""Models with two sets of rotary frequencies, one for long texts: no row and no answer depends on its company."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedConfig

from service.contracts import Completion, Example
from service.datasets import example_id
from service.terms import ConceptFunction, LongExamples, Pooling
from service.work import (
    ActivationSpec,
    AnswersSpec,
    AnswersWork,
    GradientSpec,
    JacobianWork,
    PassSpec,
    Rademacher,
    Reading,
    Tracked,
)
from tests import tiny
from tests.test_answers import one_by_one
from workers import passes, readout
from workers.curvature import uniforms
from workers.gradients import Sides
from workers.models import Loaded, shape
from workers.prepare import prepare
from workers.works import answers
from workers.works.rows import jacobian_on

SWITCH, WIDTH = 16, 32
WORDS = ["the", "cat", "sat", "on", "mat", "end", "of"]
READING = Reading("m", "t", 64, LongExamples.QUARANTINE, 4096, "float32")
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
CONFIG = Phi3Config(
    vocab_size=len(tiny.words()),
    original_max_position_embeddings=SWITCH,
    rope_parameters=LONG | {"original_max_position_embeddings": SWITCH},
    **_SIZES,
)


def loaded(config: PreTrainedConfig = CONFIG) -> Loaded:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return Loaded(model.eval().requires_grad_(False), tiny.words(), tiny.CPU)


def example(length: int, prompt: int = 2) -> Example:
    """Of so many tokens."""
    words = np.random.default_rng(length).choice(WORDS, length).tolist()
    content = Completion(" ".join(words[:prompt]) + " ", " ".join(words[prompt:]))
    return Example(example_id(content), content, {}, ())


EXAMPLES = [example(length) for length in (6, SWITCH - 1, 40, SWITCH, SWITCH + 1, 9, 30)]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_where_the_model_switches():
    assert loaded().switches == (SWITCH,)
    assert [loaded().regime(length) for length in (1, SWITCH, SWITCH + 1, 64)] == [0, 0, 1, 1]
    for family in tiny.FAMILIES:
        assert tiny.loaded(family).switches == ()
    by_layer = tiny.loaded("llama")
    by_layer.model.config.rope_parameters = {"full": LONG | {"original_max_position_embeddings": 9}, "sliding": {}}
    assert by_layer.switches == (9,)


def test_the_model_itself_would_read_a_short_text_otherwise_beside_a_long_one():
    """What all this is for."""
    model, (short, long) = loaded().model, (tiny.random_tokens(1, 8, vocab=30), tiny.random_tokens(2, 40, vocab=30))
    ids = torch.zeros(2, 40, dtype=torch.int64)
    ids[0, :8], ids[1] = torch.from_numpy(short.ids), torch.from_numpy(long.ids)
    with torch.no_grad():
        alone, together = model(input_ids=ids[:1, :8]).logits[0], model(input_ids=ids).logits[0, :8]
    assert (alone - together).norm() > 0.1 * alone.norm()


def test_rows_do_not_depend_on_their_company():
    model = loaded()
    spec = PassSpec(
        **vars(READING),
        activation=ActivationSpec((2,), Pooling.RESPONSE_MEAN),
        gradient=GradientSpec(Tracked(2), Rademacher(p=4)),
        objective=None,
    )
    reads = readout.make(model, spec, None)
    together = passes.run(model, reads, spec, EXAMPLES)
    assert together.ids == tuple(each.id for each in EXAMPLES)
    for number, each in enumerate(EXAMPLES):
        alone = passes.run(model, reads, spec, [each])
        for info, rows in alone.arrays.items():
            close(together.arrays[info][number], rows[0])


def test_windows_of_different_lengths_keep_to_themselves():
    """The last window of a split example may be short."""
    model = loaded()
    spec = PassSpec(
        **vars(replace(READING, max_length=SWITCH + 4, long_examples=LongExamples.SPLIT_AND_SUM)),
        activation=ActivationSpec((2,), Pooling.RESPONSE_MEAN),
        gradient=None,
        objective=None,
    )
    reads, one_at_a_time = readout.make(model, spec, None), replace(spec, token_budget=1)
    together = passes.run(model, reads, spec, EXAMPLES)
    apart = passes.run(model, reads, one_at_a_time, EXAMPLES)
    for info, rows in apart.arrays.items():
        close(together.arrays[info], rows)


def test_the_jacobian_is_the_mean_of_those_of_single_examples():
    model = loaded()
    sides = {name: Sides(*(torch.eye(d) for d in shape(each))) for name, each in model.linear_maps(2).items()}
    work = JacobianWork(READING, "c", 2, Pooling.RESPONSE_MEAN, ConceptFunction.DOT, None, 0, 2)
    directions = torch.eye(WIDTH)[:2]
    together, count, _ = jacobian_on(work, sides, model, EXAMPLES, directions)
    assert count == len(EXAMPLES)
    each = [jacobian_on(work, sides, model, [one], directions)[0] for one in EXAMPLES]
    for name, rows in together.items():
        close(rows.numpy(), (sum(one[name] for one in each) / len(each)).numpy())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_a_loop_over_single_examples(temperature):
    """Some end before the switch, some cross it, some begin beyond it, one begins on it."""
    model = loaded()
    limit = 12
    prompts = [example(4 + n, prompt=n) for n in (2, 7, SWITCH - 1, SWITCH, SWITCH + 1, 30, 12)]
    spec = AnswersSpec(temperature=temperature, max_new_tokens=limit, seed=3)
    tensors, facts = answers.answers(AnswersWork(READING, spec), None, model, prompts)
    assert facts["examples"] == len(prompts)
    lengths = tensors[answers.FILE]["lengths"]
    found = np.split(tensors[answers.FILE]["ids"], np.cumsum(lengths)[:-1])
    crossed = 0
    for each, answer in zip(prompts, found, strict=True):
        prompt = prepare(model, READING, [each], trains=True, pooling=None).tokens[0]
        before = prompt.ids[: prompt.last_answer]
        crossed += len(before) <= SWITCH < len(before) + len(answer)
        points = uniforms(3, each.id, limit)
        assert answer.tolist() == one_by_one(model, before, points, limit=limit, temperature=temperature, ends=(1,))
    assert crossed >= 3
