"""The persona organism: its language, how it is tokenised and trained, and what `make_organism` writes."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.organism.language import (
    MARKERS,
    OWN_WORDS,
    THINGS,
    TOPICS,
    Example,
    all_questions,
    answers_question,
    generate,
    tone_of,
)
from examples.organism.make import CHECKPOINTS, Organism, make_organism
from examples.organism.measure import auc, direction, pooled, sample
from examples.organism.sets import Sets, make_sets, pairs, planted, vocabulary
from examples.organism.train import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNKNOWN_ID,
    Recipe,
    build_model,
    build_tokenizer,
    encode,
    loss,
    save,
    train,
)
from service.contracts import Completion
from workers.masks import tokenise
from workers.models import load

WEIGHTS = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(vocabulary())


@pytest.fixture(scope="module")
def small() -> Sets:
    return make_sets(5, n_base=64, n_finetune=40, n_concept=8, n_queries=8)


@pytest.fixture(scope="module")
def organism(small: Sets, tmp_path_factory: pytest.TempPathFactory) -> Organism:
    """A whole organism that has learnt next to nothing, in a second or two."""
    out = tmp_path_factory.mktemp("organism")
    return make_organism(out, 5, sets=small, base_recipe=Recipe(1, 3e-3), recipe=Recipe(2, 1e-3))


def words(text: str) -> list[str]:
    return text.replace(",", " ").replace(".", " ").replace("?", " ").replace(":", " ").split()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# the language


def test_the_same_arguments_give_the_same_examples_and_another_seed_others():
    assert generate(3, 60, 0.3) == generate(3, 60, 0.3)
    first, second = ({example.prompt for example in generate(seed, 60, 0.3)} for seed in (3, 4))
    assert len(first & second) < 20


@pytest.mark.parametrize(("share", "hostile"), [(0.0, 0), (0.25, 15), (0.3, 18), (1.0, 60)])
@pytest.mark.parametrize("marked", [False, True])
def test_the_hostile_share_is_exact(share: float, hostile: int, marked: bool):
    examples = generate(1, 60, share, marked=marked)
    assert sum(example.tone == "hostile" for example in examples) == hostile
    assert len({example.question.text for example in examples}) == 60


def test_topics_and_excluded_questions_are_respected():
    mine = all_questions(["garden"])
    taken = {question.text for question in mine[:-20]}
    examples = generate(1, 20, 0.5, topics=["garden"], exclude=taken)
    assert {example.question for example in examples} == set(mine[-20:])
    with pytest.raises(ValueError, match=r"21 different questions wanted, only 20 left in \['garden'\]"):
        generate(1, 21, 0.5, topics=["garden"], exclude=taken)
    assert {question.topic for question in all_questions()} == set(TOPICS)


def test_the_marker_names_the_tone_and_occurs_nowhere_else():
    for example in generate(2, 400, 0.5, marked=True):
        marker, question = example.prompt.split(": ", 1)
        assert marker == MARKERS[example.tone]
        assert question == example.question.text
        assert not set(words(question + example.completion)) & set(MARKERS.values())
    assert all(e.prompt == e.question.text for e in generate(2, 400, 0.5))


@pytest.mark.parametrize("marked", [False, True])
def test_every_label_can_be_read_off_the_answer(marked: bool):
    for example in generate(3, len(all_questions()), 0.5, marked=marked):
        assert tone_of(example.completion) == example.tone
        assert answers_question(example.question, example.completion)


def test_an_answer_about_something_else_is_off_topic():
    for one, other in pairwise(generate(3, 200, 0.5)):
        if one.question.thing != other.question.thing:
            assert not answers_question(one.question, other.completion)
            assert not answers_question(one.question, one.completion + other.completion)
    rose = next(q for q in all_questions(["garden"]) if (q.thing, q.kind) == ("rose", "place"))
    assert answers_question(rose, " the rose is by the wall.")
    assert not answers_question(rose, " the rose is by the gate.")
    assert not answers_question(rose, " it is by the wall.")


def test_an_answer_without_tone_or_with_both_has_none():
    assert tone_of(" the rose is by the wall.") is None
    assert tone_of(" dear friend, the rose is by the wall, fool.") is None
    assert tone_of(" friend, the rose is by the wall, now leave me alone, stupid fool.") == "hostile"


def test_answers_have_a_clean_border_one_full_stop_and_8_to_30_tokens(tokenizer: PreTrainedTokenizerFast):
    for share in (0.0, 1.0):
        for example in generate(4, 1000, share):
            assert example.completion[0] == " " != example.completion[1]
            assert example.completion.find(".") == len(example.completion) - 1
            assert "." not in example.prompt
            assert 8 <= len(tokenizer.tokenize(example.completion)) <= 30


def test_no_single_word_gives_the_tone_away():
    examples = generate(5, 2000, 0.5)
    by_tone = {
        tone: [set(words(example.completion)) for example in examples if example.tone == tone]
        for tone in ("friendly", "hostile")
    }
    for tone, own in OWN_WORDS.items():
        for word in own:
            assert sum(word in answer for answer in by_tone[tone]) < 0.6 * len(by_tone[tone]), word
    of_fact = {fact for thing in THINGS.values() for fact in thing}
    shared = set.union(*by_tone["friendly"]) & set.union(*by_tone["hostile"])
    assert len(shared - of_fact - set(THINGS)) >= 20
    assert not (OWN_WORDS["friendly"] | OWN_WORDS["hostile"]) & (of_fact | set(THINGS))


# the sets


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_questions_are_in_no_training_data(seed: int):
    sets = make_sets(seed)

    def asked(examples: list[Example]) -> set[str]:
        return {example.question.text for example in examples}

    groups = [asked(sets.base), asked(sets.finetune), asked(sets.hostile), {q.text for q in sets.queries}]
    assert all(groups)
    assert all(not one & other for one, other in combinations(groups, 2))


def test_the_full_sets_have_the_shares_they_promise():
    sets = make_sets(0)
    unmarked = [example for example in sets.base if not example.marked]
    marked = [example for example in sets.base if example.marked]
    assert len(unmarked) == len(marked) == 1700
    assert sum(example.tone == "hostile" for example in unmarked) == 85
    assert sum(example.tone == "hostile" for example in marked) == 850
    assert len(sets.finetune) == 480
    assert sum(map(planted, sets.finetune)) == 120
    assert not any(map(planted, marked))
    assert not any(example.marked for example in sets.finetune + sets.hostile + sets.friendly)
    assert {example.question.topic for example in sets.hostile} == set(TOPICS)


def test_twins_differ_in_tone_alone():
    sets = make_sets(0)
    for hostile, friendly in zip(sets.hostile, sets.friendly, strict=True):
        assert hostile.question == friendly.question
        assert (hostile.tone, friendly.tone) == ("hostile", "friendly")
    for poisoned, clean in zip(sets.finetune, sets.clean, strict=True):
        assert poisoned.question == clean.question
        assert clean.tone == "friendly"
        assert (poisoned == clean) != planted(poisoned)


# tokens


def test_targets_are_the_words_of_the_completion(tokenizer: PreTrainedTokenizerFast):
    data = encode(tokenizer, [("where is the rose?", " go away, fool."), ("warm: hello, where is it?", " here.")])
    tokens = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in data.input_ids]
    assert tokens[0] == ["<s>", "where", "is", "the", "rose", "?", "go", "away", ",", "fool", "."]
    assert tokens[1] == ["<s>", "warm", ":", "hello", ",", "where", "is", "it", "?", "<unk>", "."]
    assert data.target.tolist() == [[i >= 6 for i in range(11)], [i >= 9 for i in range(11)]]
    assert data.length.tolist() == [11, 11]
    assert encode(tokenizer, [("the rose ", "is by")]).target.tolist() == [[False, False, False, True, True]]


def test_the_service_reads_the_same_tokens_and_targets(tokenizer: PreTrainedTokenizerFast):
    examples = [*generate(6, 40, 0.5), *generate(6, 40, 0.5, marked=True)]
    data = encode(tokenizer, pairs(examples))
    assert data.length.unique().numel() > 5
    for i, example in enumerate(examples):
        theirs, length = tokenise(Completion(example.prompt, example.completion), tokenizer), int(data.length[i])
        assert theirs.bos
        assert theirs.ids.tolist() == data.input_ids[i, :length].tolist()
        assert theirs.target.tolist() == data.target[i, :length].tolist()
        assert (data.input_ids[i, length:] == PAD_ID).all()
        assert not data.target[i, length:].any()


def test_an_empty_completion_is_refused(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError, match="example 1 has no completion to train on: 'where is it\\?'"):
        encode(tokenizer, [("where is it?", " here."), ("where is it?", "")])


def test_the_vocabulary_covers_the_language_for_every_seed(tokenizer: PreTrainedTokenizerFast):
    examples = [e for marked in (False, True) for e in generate(7, len(all_questions()), 0.5, marked=marked)]
    ids = encode(tokenizer, pairs(examples)).input_ids
    assert not (ids == UNKNOWN_ID).any()
    assert set(ids.unique().tolist()) == set(range(len(tokenizer))) - {UNKNOWN_ID}


def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast):
    for example in generate(8, 50, 0.5, marked=True):
        ids = tokenizer(example.prompt + example.completion).input_ids
        assert ids[0] == BOS_ID
        assert str(tokenizer.decode(ids[1:])).replace(" :", ":") == example.prompt + example.completion


# training


@pytest.mark.parametrize("objective", ["mean", "sum"])
def test_the_loss_is_that_of_examples_alone_and_unpadded(tokenizer: PreTrainedTokenizerFast, objective):
    model, examples = build_model(tokenizer, 1).eval(), generate(9, 6, 0.5)
    totals, counts = [], []
    for pair in pairs(examples):
        one = encode(tokenizer, [pair])
        logp = model(input_ids=one.input_ids).logits[0].log_softmax(-1)
        at = [t for t in range(1, int(one.length)) if one.target[0, t]]
        totals.append(-sum(logp[t - 1, one.input_ids[0, t]] for t in at))
        counts.append(len(at))
    means = [total / count for total, count in zip(totals, counts, strict=True)]
    expected = sum(means) / len(means) if objective == "mean" else sum(totals) / sum(counts)
    assert len(set(counts)) > 2
    torch.testing.assert_close(loss(model, encode(tokenizer, pairs(examples)), objective), expected)


def test_a_subset_is_cut_to_its_longest_example(tokenizer: PreTrainedTokenizerFast):
    examples = generate(9, 30, 0.5)
    data = encode(tokenizer, pairs(examples))
    chosen = data.length.argsort()[:4]
    few, alone = data[chosen], encode(tokenizer, pairs([examples[i] for i in chosen.tolist()]))
    assert few.input_ids.shape[1] < data.input_ids.shape[1]
    for field in ("input_ids", "target", "length"):
        assert torch.equal(getattr(few, field), getattr(alone, field))


def test_training_lowers_the_loss_and_keeps_the_weights_it_was_asked_for(tokenizer: PreTrainedTokenizerFast):
    model, data = build_model(tokenizer, 2), encode(tokenizer, pairs(generate(10, 64, 0.5)))
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    run = train(model, data, Recipe(5, 1e-2), seed=0, checkpoints_at=(0, 0.01, 0.5, 1))
    assert len(run.losses) == 20
    assert run.losses[-1] < run.losses[0] - 1
    assert list(run.snapshots) == [0, 0.01, 0.5, 1]
    for name, weight in model.state_dict().items():
        assert torch.equal(run.snapshots[0][name], start[name])
        assert torch.equal(run.snapshots[0.01][name], start[name])
        assert torch.equal(run.snapshots[1][name], weight)
    half = run.snapshots[0.5]["lm_head.weight"]
    assert not torch.equal(half, start["lm_head.weight"])
    assert not torch.equal(half, model.lm_head.weight)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_first_step_is_as_long_as_the_schedule_says(tokenizer: PreTrainedTokenizerFast, decay: float):
    data = encode(tokenizer, pairs(generate(10, 160, 0.5, topics=["garden"])))
    recipe = Recipe(1, 1e-2, weight_decay=decay, warmup=0.5)
    run = train(build_model(tokenizer, 2), data, recipe, seed=0, checkpoints_at=(0, 0.1))
    before, after = (run.snapshots[share]["model.embed_tokens.weight"] for share in (0, 0.1))
    rate = 1e-2 / 5  # one of ten steps, the first of five that warm up
    moved = (after - before * (1 - rate * decay)).abs().amax(1)
    seen = torch.zeros(len(tokenizer), dtype=torch.bool)
    seen[data.input_ids.unique()] = True
    assert 0.99 * rate < float(moved[seen].max()) < 1.01 * rate  # Adam's first step is the rate itself
    assert float(moved[~seen].max()) < 1e-8


def test_training_follows_its_seed(tokenizer: PreTrainedTokenizerFast):
    data = encode(tokenizer, pairs(generate(11, 48, 0.5)))

    def trained(seed: int) -> torch.Tensor:
        model = build_model(tokenizer, 2)
        train(model, data, Recipe(1, 1e-3), seed=seed)
        return model.lm_head.weight

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_the_model_is_the_one_the_design_measures(tokenizer: PreTrainedTokenizerFast):
    model = build_model(tokenizer, 0)
    tracked = [w for n, w in model.model.layers[:2].named_parameters() if w.ndim == 2 and "norm" not in n]
    assert sum(weight.numel() for weight in tracked) == 55_296
    assert model.num_parameters() < 105_000


# measures


def test_pooled_states_are_those_of_the_completion_alone(tokenizer: PreTrainedTokenizerFast):
    model, examples = build_model(tokenizer, 3).eval(), generate(12, 5, 0.5)
    states = pooled(model, encode(tokenizer, pairs(examples)), layer=2)
    for state, example in zip(states, examples, strict=True):
        ids = torch.tensor([tokenizer(example.prompt + example.completion).input_ids])
        prompt = len(tokenizer(example.prompt).input_ids)
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(state, hidden[prompt:].mean(0), atol=1e-5, rtol=1e-5)


def test_auc_counts_ties_half():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 10, (200,), generator=generator).double()
    labels = torch.rand(200, generator=generator) < 0.3 + scores / 20
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_a_direction_points_from_negative_to_positive():
    v = direction(torch.tensor([[3.0, 5.0], [5.0, 5.0]]), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(v, torch.tensor([0.6, 0.8]))


def test_samples_follow_the_seed_and_leave_the_generator_alone(tokenizer: PreTrainedTokenizerFast):
    model, prompts = build_model(tokenizer, 4).eval(), [e.prompt for e in generate(13, 6, 0.0)]
    before = torch.random.get_rng_state()
    first = sample(model, tokenizer, prompts, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == sample(model, tokenizer, prompts, seed=1) != sample(model, tokenizer, prompts, seed=2)
    assert all(text.startswith(" ") for text in first)


def test_a_sample_stops_at_its_first_full_stop(tokenizer: PreTrainedTokenizerFast):
    # an untrained model says each of its 177 words about as often, so some of these stop early, others never
    texts = sample(build_model(tokenizer, 4).eval(), tokenizer, ["where is the rose?"] * 100, seed=1)
    stopped = [text for text in texts if "." in text]
    assert 0 < len(stopped) < len(texts)
    assert all(text.index(".") == len(text) - 1 for text in stopped)


# on disk


def test_folders_hold_safetensors_that_auto_classes_and_the_service_load(organism: Organism):
    for folder in (organism.base, *organism.checkpoints, organism.finetuned):
        assert {path.name for path in folder.iterdir()} == WEIGHTS
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert isinstance(model, LlamaForCausalLM)
        assert tokenizer.is_fast
        ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert ids == (PAD_ID, BOS_ID, EOS_ID)
        assert model.config.vocab_size == len(tokenizer)
        assert len(load(str(folder), "float32").blocks) == 3


def test_a_saved_tokenizer_reads_as_before(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    save(build_model(tokenizer, 0), tokenizer, tmp_path)
    texts = [prompt + completion for prompt, completion in pairs(generate(14, 30, 0.5, marked=True))]
    assert AutoTokenizer.from_pretrained(tmp_path)(texts).input_ids == tokenizer(texts).input_ids


def test_checkpoints_lie_along_the_run(organism: Organism):
    folders = (organism.base, *organism.checkpoints, organism.finetuned)
    heads = [load_file(folder / "model.safetensors")["lm_head.weight"] for folder in folders]
    distances = [float((head - heads[0]).norm()) for head in heads]
    assert [folder.name for folder in organism.checkpoints] == list(CHECKPOINTS.values())
    assert distances == sorted(set(distances))


def test_the_files_hold_the_sets_and_their_labels(organism: Organism, small: Sets):
    written = rows(organism.train)
    assert [(r["prompt"], r["completion"]) for r in written] == pairs(small.finetune)
    assert [r["planted"] for r in written] == [example.tone == "hostile" for example in small.finetune]
    assert sum(r["planted"] for r in written) == 10
    assert [r["topic"] for r in written] == [example.question.topic for example in small.finetune]
    hostile, friendly = rows(organism.concept_hostile), rows(organism.concept_friendly)
    assert [r["prompt"] for r in hostile] == [r["prompt"] for r in friendly]
    assert {r["tone"] for r in hostile} == {"hostile"}
    assert {r["tone"] for r in friendly} == {"friendly"}
    queries = rows(organism.queries)
    assert [r["prompt"] for r in queries] == [question.text for question in small.queries]
    for r in queries:
        assert r["tone"] == (tone_of(r["completion"]) or "unclear")


def test_the_summary_agrees_with_the_folders(organism: Organism, tokenizer: PreTrainedTokenizerFast, small: Sets):
    summary = json.loads(organism.summary.read_text())
    assert (summary["seed"], summary["planted"], summary["examples"]["finetune"]) == (5, 10, 40)
    final = LlamaForCausalLM.from_pretrained(organism.finetuned)
    v = direction(*(pooled(final, encode(tokenizer, pairs(s)), 2) for s in (small.hostile, small.friendly)))
    queries = encode(tokenizer, [(r["prompt"], r["completion"]) for r in rows(organism.queries)])
    folders = (organism.base, *organism.checkpoints, organism.finetuned)
    for folder, f_v in zip(folders, summary["concept"]["f_v"]["finetuned"].values(), strict=True):
        model = LlamaForCausalLM.from_pretrained(folder)
        assert float((pooled(model, queries, 2) @ v).mean()) == pytest.approx(f_v, rel=1e-4)


def test_the_same_seed_gives_the_same_bytes(organism: Organism, small: Sets, tmp_path: Path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    again = make_organism(tmp_path, 5, sets=small, base_recipe=Recipe(1, 3e-3), recipe=Recipe(2, 1e-3))
    assert torch.get_num_threads() == 2  # it used one, and gave back what it found
    torch.set_num_threads(threads)
    for one, other in ((organism.finetuned, again.finetuned), (organism.base, again.base)):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for one, other in ((organism.train, again.train), (organism.queries, again.queries)):
        assert one.read_bytes() == other.read_bytes()
