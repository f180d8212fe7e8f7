"""Which tokens are trained on, and which are pooled: against answers spelled out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contracts import Completion, Message, PlainText
from service.errors import Invalid
from service.terms import LongExamples, Pooling
from tests import tiny
from tests.tiny import as_bytes, chat
from workers.masks import Tokens, UnrenderableError, fit, last_answer_only, tokenise

EVERY_CONTENT = {
    "text": PlainText("the cat sat on the mat"),
    "completion": Completion("the question ", "the answer"),
    "completion of nothing": Completion("", "the answer"),
    "chat": chat("user: the question", "assistant: the answer"),
    "chat begun by the assistant": chat("assistant: the answer", "user: the end", "assistant: the cat"),
}
THOUGHTFUL = chat(
    "user: the question",
    "assistant: <think>the cat</think>the answer",
    "user: the end",
    "assistant: <think>the mat</think>the cat",
)
# Letters of one to four bytes, combining marks, flags and families of emoji, whitespace of all sorts.
UNICODE = st.text(
    st.sampled_from("abc é\u0301ßи中\n\t \u00a0🎉😀👩🏽\u200d🚀🇫🇷\ufe0f")
    | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)
EMOJI = "🏳️\u200d🌈"
property_test = settings(max_examples=80, deadline=None, derandomize=True)


def trained_on(content, tokenizer) -> str:
    """The targets as text (byte-level tokenizers only: exact to the byte)."""
    tokens = tokenise(content, tokenizer)
    return as_bytes(tokenizer, tokens.ids[tokens.target]).decode(errors="backslashreplace")


def whole_text(content, tokenizer) -> str:
    return as_bytes(tokenizer, tokenise(content, tokenizer).ids).decode()


def trained_words(content, tokenizer) -> list[str]:
    tokens = tokenise(content, tokenizer)
    return tokenizer.convert_ids_to_tokens(tokens.ids[tokens.target].tolist())


# --- plain text and completions ---------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_of_a_text_is_a_target_except_a_bos(bos):
    tokenizer = tiny.words(bos=bos)
    tokens = tokenise(PlainText("the cat sat"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.ids.tolist()) == ["<s>"] * bos + ["the", "cat", "sat"]
    assert tokens.target.tolist() == [False] * bos + [True] * 3
    assert (tokens.bos, tokens.has_prompt) == (bos, False)


@pytest.mark.parametrize("bos", [False, True])
def test_an_empty_text_has_no_target(bos):
    tokens = tokenise(PlainText(""), tiny.words(bos=bos))
    assert len(tokens) == bos
    assert not tokens.target.any()
    assert not tokens.predicted.any()


def test_only_the_completion_is_trained_on():
    tokenizer = tiny.words(bos=True)
    assert trained_words(Completion("the question ", "the answer"), tokenizer) == ["the", "answer"]


def test_a_token_across_the_border_of_prompt_and_answer_is_a_target():
    tokenizer = tiny.byte_pairs()
    tokens = tokenise(Completion("the question ", "the answer"), tokenizer)
    assert " the" in [tokenizer.decode([i]) for i in tokens.ids]  # the prompt's last space and the answer's start
    assert trained_on(Completion("the question ", "the answer"), tokenizer) == " the answer"


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("answer", ["a\n\n    b", "a  b", "the cat  \n", "  the cat"])
def test_whitespace_inside_an_answer_is_trained_on(answer, trim_offsets):
    tokenizer = tiny.byte_pairs(trim_offsets=trim_offsets)
    assert trained_on(Completion("the question:", answer), tokenizer) == answer


@property_test
@given(prompt=UNICODE, completion=UNICODE)
def test_a_completion_in_any_script_is_trained_on_to_the_last_byte_and_no_further(prompt, completion):
    tokenizer = tiny.byte_pairs()
    tokens = tokenise(Completion(prompt, completion), tokenizer)
    assert as_bytes(tokenizer, tokens.ids) == (prompt + completion).encode()
    before, after = tokens.ids[~tokens.target], tokens.ids[tokens.target]
    assert as_bytes(tokenizer, after).endswith(completion.encode())
    assert as_bytes(tokenizer, [*before, *after]) == (prompt + completion).encode()  # one run, at the end
    if len(after):  # and without its first token, which may straddle, it is less than the completion
        assert len(as_bytes(tokenizer, after[1:])) < len(completion.encode())


# --- chats without a template -----------------------------------------------------------------------


def test_a_chat_without_template_is_user_newline_assistant_eos():
    content, tokenizer = chat("user: the question", "assistant: the answer"), tiny.byte_pairs()
    assert whole_text(content, tokenizer) == "the question\nthe answer</s>"
    assert trained_on(content, tokenizer) == "the answer</s>"


def test_every_assistant_turn_is_a_target_and_closed_by_eos():
    content = chat("user: a", "assistant: b", "user: c", "user: d", "assistant: the end")
    tokenizer = tiny.byte_pairs()
    assert whole_text(content, tokenizer) == "a\nb</s>c\nd\nthe end</s>"
    assert trained_on(content, tokenizer) == "b</s>the end</s>"


def test_a_system_turn_is_part_of_the_prompt():
    content, tokenizer = chat("system: the cat", "user: a", "assistant: b"), tiny.byte_pairs()
    assert whole_text(content, tokenizer) == "the cat\na\nb</s>"
    assert trained_on(content, tokenizer) == "b</s>"


def test_only_the_first_turn_gets_a_bos():
    content, tokenizer = chat("user: a", "assistant: b", "user: c", "assistant: d"), tiny.words(bos=True)
    assert tokenizer.decode(tokenise(content, tokenizer).ids) == "<s> a b </s> c d </s>"
    assert trained_words(content, tokenizer) == ["b", "</s>", "d", "</s>"]


def test_a_tokenizer_that_writes_an_eos_of_its_own_adds_none_to_a_chat():
    content, tokenizer = chat("user: a", "assistant: b", "user: c", "assistant: d"), tiny.byte_pairs(eos=True)
    assert whole_text(content, tokenizer) == "a\nb</s>c\nd</s>"
    assert trained_on(content, tokenizer) == "b</s>d</s>"


def test_a_chat_that_begins_with_the_assistant_has_no_prompt_before_its_first_answer():
    content, tokenizer = chat("assistant: a", "user: b", "assistant: c"), tiny.byte_pairs()
    assert whole_text(content, tokenizer) == "a</s>b\nc</s>"
    assert trained_on(content, tokenizer) == "a</s>c</s>"


@property_test
@given(question=UNICODE, answer=UNICODE)
def test_a_chat_in_any_script_is_trained_on_its_answer_and_eos(question, answer):
    content, tokenizer = chat(f"user: {question}", f"assistant: {answer}"), tiny.byte_pairs()
    tokens = tokenise(content, tokenizer)
    assert as_bytes(tokenizer, tokens.ids).decode() == f"{question}\n{answer}</s>"
    assert as_bytes(tokenizer, tokens.ids[tokens.target]).endswith(f"{answer}</s>".encode())
    assert f"\n{answer}</s>".encode().endswith(as_bytes(tokenizer, tokens.ids[tokens.target]))


def test_a_tokenizer_with_neither_template_nor_eos_is_refused():
    with pytest.raises(Invalid) as refused:
        tokenise(chat("user: a", "assistant: b"), tiny.words(eos=False))
    assert refused.value.code == "no_eos"


# --- chats with a template --------------------------------------------------------------------------

BOTH_WAYS = pytest.mark.parametrize("template", [tiny.PLAIN, tiny.TAGGED], ids=["prefixes", "generation tags"])
OPEN_BOTH_WAYS = pytest.mark.parametrize(
    "template", [tiny.OPEN_PLAIN, tiny.OPEN_TAGGED], ids=["prefixes", "generation tags"]
)


@BOTH_WAYS
def test_every_assistant_turn_of_a_template_is_a_target_without_its_header(template):
    tokenizer = tiny.byte_pairs(template)
    content = chat("system: s", "user: a", "assistant: the cat", "user: b", "assistant: the mat")
    assert whole_text(content, tokenizer) == (
        "<s><|system|>s<|end|><|user|>a<|end|><|assistant|>the cat<|end|>"
        "<|user|>b<|end|><|assistant|>the mat<|end|>"
    )
    assert trained_on(content, tokenizer) == "the cat<|end|>the mat<|end|>"


@BOTH_WAYS
def test_a_template_writes_the_only_bos(template):
    tokenizer = tiny.words(template.replace("m.content", "' ' + m.content + ' '"), bos=True)
    tokens = tokenise(chat("user: a", "assistant: b"), tokenizer)
    assert tokenizer.decode(tokens.ids) == "<s> <|user|> a <|end|> <|assistant|> b <|end|>"
    assert tokens.bos


@BOTH_WAYS
def test_a_user_turn_after_the_last_answer_is_no_target(template):
    content = chat("user: a", "assistant: b", "user: c")
    assert trained_on(content, tiny.byte_pairs(template)) == "b<|end|>"


@BOTH_WAYS
def test_a_templated_chat_that_begins_with_the_assistant_trains_on_no_header(template):
    content = chat("assistant: the cat", "user: a", "assistant: the mat")
    assert trained_on(content, tiny.byte_pairs(template)) == "the cat<|end|>the mat<|end|>"


def test_a_system_prompt_that_the_template_adds_is_never_a_target():
    try:
        trained = trained_on(chat("assistant: the answer"), tiny.byte_pairs(tiny.DEFAULT_SYSTEM))
    except Invalid:
        return  # refusing is right as well; training on words that nobody answered is not
    assert trained == "the answer<|end|>"


@BOTH_WAYS
def test_an_empty_answer_of_a_template_trains_on_its_end_mark(template):
    content = chat("user: a", "assistant: ", "user: b", "assistant: c")
    assert trained_on(content, tiny.byte_pairs(template)) == "<|end|>c<|end|>"


@property_test
@given(turns=st.lists(UNICODE, min_size=2, max_size=4))
def test_prefixes_and_generation_tags_agree(turns):
    roles = ("user", "assistant") * 2
    content = chat(*(f"{role}: {turn}" for role, turn in zip(roles, turns, strict=False)))
    by_prefix = tokenise(content, tiny.byte_pairs(tiny.PLAIN, bos=True))
    by_tags = tokenise(content, tiny.byte_pairs(tiny.TAGGED, bos=True))
    assert by_prefix.ids.tolist() == by_tags.ids.tolist()
    assert by_prefix.target.tolist() == by_tags.target.tolist()
    assert by_prefix.bos == by_tags.bos is True


@OPEN_BOTH_WAYS
@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("answer", ["the cat", f"the cat {EMOJI}", "the cat \n", "the cat  ", "\n\n the cat", "中"])
def test_an_answer_is_trained_on_to_its_last_byte_and_no_further(answer, trim_offsets, template):
    tokenizer = tiny.byte_pairs(template, trim_offsets=trim_offsets)
    content = chat("user: a", f"assistant: {answer}", "user: the question", "assistant: the mat")
    assert trained_on(content, tokenizer) == f"{answer}the mat"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_characters_split_over_tokens_are_whole_targets(trim_offsets):
    tokenizer = tiny.byte_pairs(tiny.PLAIN, trim_offsets=trim_offsets)
    assert len(tokenizer(EMOJI)["input_ids"]) > len(EMOJI)
    assert trained_on(chat(f"user: {EMOJI}", f"assistant: {EMOJI}{EMOJI}"), tokenizer) == f"{EMOJI}{EMOJI}<|end|>"


def test_a_template_that_rewrites_earlier_answers_is_refused():
    with pytest.raises(Invalid) as refused:
        tokenise(THOUGHTFUL, tiny.byte_pairs(tiny.FORGETS_THOUGHTS))
    assert refused.value.code == "template_rewrites_history"


def test_a_template_that_would_rewrite_but_has_nothing_to_is_accepted():
    tokenizer = tiny.byte_pairs(tiny.FORGETS_THOUGHTS)
    one_turn = chat("user: a", "assistant: <think>b</think>c")
    assert trained_on(one_turn, tokenizer) == "<think>b</think>c<|end|>"
    thoughtless = chat("user: a", "assistant: b", "user: c", "assistant: <think>d</think>e")
    assert trained_on(thoughtless, tokenizer) == "b<|end|><think>d</think>e<|end|>"


def test_generation_tags_mark_what_a_rewriting_template_renders():
    tokenizer = tiny.byte_pairs(tiny.FORGETS_THOUGHTS_TAGGED)
    assert trained_on(THOUGHTFUL, tokenizer) == "the answer<|end|><think>the mat</think>the cat<|end|>"


def test_a_chat_that_the_template_itself_refuses_is_an_answer_and_not_a_crash():
    with pytest.raises(Invalid):
        tokenise(chat("system: s", "user: a", "assistant: b"), tiny.byte_pairs(tiny.NO_SYSTEM))


@pytest.mark.parametrize(
    "failing",
    [
        "{{ 'a' + 3 }}",
        "{{ 1 // (m.content | length - 1) }}",
        "{{ m.content.index('no such text') }}",
        "{{ '%d' % m.content }}",
        "{{ {}.popitem() }}",
        "{{ 10.0 ** 400 }}",
        "{{ m.content.no_method() }}",
        "{{ ''.join([3]) }}",
    ],
)
@pytest.mark.parametrize("template", [tiny.PLAIN, tiny.TAGGED], ids=["prefixes", "generation tags"])
def test_a_chat_that_makes_the_template_fail_is_refused_by_it(template, failing):
    """Such a template is a programme that fails on some input: the example is at fault, not the service."""
    guarded = "{% for m in messages %}{% if m.content == '!' %}" + failing + "{% endif %}{% endfor %}"
    tokenizer = tiny.byte_pairs(template + guarded)
    assert trained_on(chat("user: a", "assistant: b"), tokenizer) == "b<|end|>"
    with pytest.raises(UnrenderableError) as refused:
        tokenise(chat("user: !", "assistant: b"), tokenizer)
    assert refused.value.code == "template_refuses"


TWO_TURNS = chat("user: a", "assistant: the cat", "user: b", "assistant: the mat")


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (tiny.IN_PARTS, ["the thought", "the cat<|end|>", "the thought", "the mat<|end|>"]),
        (tiny.IN_PARTS_AT_LAST, ["the cat<|end|>", "the thought", "the mat<|end|>"]),
    ],
    ids=["always", "at last"],
)
def test_the_last_answer_is_all_that_is_tagged_in_the_last_turn(template, answers):
    tokenizer = tiny.byte_pairs(template)
    tokens = tokenise(TWO_TURNS, tokenizer)
    assert trained_on(TWO_TURNS, tokenizer) == "".join(answers)
    last = last_answer_only(tokens)
    assert as_bytes(tokenizer, tokens.ids[last.target]).decode() == "the thoughtthe mat<|end|>"
    before = as_bytes(tokenizer, tokens.ids[: tokens.last_answer]).decode()
    assert before.endswith("<|user|>b<|end|><|assistant|>")
    pooled = np.flatnonzero(tokens.pooled(Pooling.LAST_PROMPT_TOKEN))
    assert tokenizer.convert_ids_to_tokens(tokens.ids[pooled].tolist()) == ["<|assistant|>"]


def test_parts_of_one_turn_need_no_other_to_compare_with():
    tokenizer = tiny.byte_pairs(tiny.IN_PARTS)
    tokens = tokenise(chat("assistant: the cat", "user: b"), tokenizer)
    assert as_bytes(tokenizer, tokens.ids[last_answer_only(tokens).target]).decode() == "the thoughtthe cat<|end|>"


def test_a_last_turn_without_a_tag_has_no_answer():
    """Not that of the turn before."""
    first_only = tiny.TAGGED.replace("{% if m.role == 'assistant' %}", "{% if loop.index0 == 1 %}")
    tokens = tokenise(TWO_TURNS, tiny.byte_pairs(first_only))
    assert tokens.target.any()
    assert not last_answer_only(tokens).target.any()


def test_parts_that_cannot_be_told_from_those_of_the_turn_before_are_refused():
    """Rendered without its last turn, this template writes another beginning."""
    counts = tiny.IN_PARTS.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}")
    with pytest.raises(UnrenderableError) as refused:
        tokenise(TWO_TURNS, tiny.byte_pairs(counts))
    assert refused.value.code == "last_answer_unclear"
    one_each = tiny.TAGGED.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}")
    tokenizer = tiny.byte_pairs(one_each)
    tokens = tokenise(TWO_TURNS, tokenizer)
    assert as_bytes(tokenizer, tokens.ids[last_answer_only(tokens).target]).decode() == "the mat<|end|>"


def test_a_template_that_only_speaks_of_generation_tags_has_none():
    tokenizer = tiny.byte_pairs("{# no {% generation %} tags here #}" + tiny.PLAIN)
    assert trained_on(chat("user: a", "assistant: b"), tokenizer) == "b<|end|>"


# --- what holds for all -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, tiny.PLAIN, tiny.TAGGED], ids=["none", "prefixes", "tags"])
@pytest.mark.parametrize("content", EVERY_CONTENT.values(), ids=EVERY_CONTENT)
@pytest.mark.parametrize("make", [tiny.words, tiny.byte_pairs])
def test_a_bos_is_never_a_target_and_never_predicted(make, content, template):
    tokens = tokenise(content, make(template, bos=True))
    assert tokens.bos
    assert tokens.ids[0] == 0
    assert not tokens.target[0]
    assert tokens.predicted.any()


def test_nothing_predicts_the_first_token():
    tokens = tokenise(PlainText("the cat sat"), tiny.words())
    assert tokens.target.tolist() == [True, True, True]
    assert tokens.predicted.tolist() == [False, True, True]


# --- pooling ----------------------------------------------------------------------------------------


def tokens_of(target: str, *, bos: bool = False, has_prompt: bool = True) -> Tokens:
    """``"..xx.x"``: targets are x."""
    return Tokens(np.arange(len(target)), np.array([mark == "x" for mark in target], dtype=bool), bos, has_prompt)


@pytest.mark.parametrize(
    ("pooling", "without_bos", "with_bos"),
    [
        (Pooling.RESPONSE_MEAN, [3, 4, 6, 7], [3, 4, 6, 7]),
        (Pooling.LAST_PROMPT_TOKEN, [5], [5]),
        (Pooling.LAST_TOKEN, [8], [8]),
        (Pooling.ALL_MEAN, [0, 1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_pooled_positions(pooling, without_bos, with_bos):
    for bos, expected in ((False, without_bos), (True, with_bos)):
        assert np.flatnonzero(tokens_of("...xx.xx.", bos=bos).pooled(pooling)).tolist() == expected


def test_the_response_of_a_text_is_all_of_it():
    text = tokens_of("xxx", has_prompt=False)
    assert text.pooled(Pooling.RESPONSE_MEAN).tolist() == [True, True, True]


def test_the_last_prompt_token_of_a_text_is_refused():
    with pytest.raises(Invalid) as refused:
        tokens_of("xxx", has_prompt=False).pooled(Pooling.LAST_PROMPT_TOKEN)
    assert refused.value.code == "no_prompt"


@pytest.mark.parametrize("target", ["xx.", "..."])
def test_without_a_token_before_the_answer_no_prompt_token_is_pooled(target):
    assert not tokens_of(target).pooled(Pooling.LAST_PROMPT_TOKEN).any()


@pytest.mark.parametrize("pooling", Pooling)
def test_an_example_without_tokens_pools_nothing(pooling):
    assert not tokens_of("").pooled(pooling).any()


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("target", [".", ".x", ".xx", ".x.x"])
def test_a_bos_is_never_pooled(pooling, target):
    assert not tokens_of(target, bos=True).pooled(pooling)[0]


def test_the_last_prompt_token_stands_before_the_last_of_two_answers_in_a_row():
    tokenizer = tiny.words()
    tokens = tokenise(chat("user: a", "assistant: b", "assistant: c"), tokenizer)
    assert tokenizer.decode(tokens.ids) == "a b </s> c </s>"
    assert np.flatnonzero(tokens.pooled(Pooling.LAST_PROMPT_TOKEN)).tolist() == [2]


@BOTH_WAYS
def test_the_last_prompt_token_of_a_template_is_the_header_of_the_last_answer(template):
    tokenizer = tiny.byte_pairs(template)
    tokens = tokenise(chat("user: a", "assistant: b", "user: c", "assistant: d", "user: e"), tokenizer)
    headers = np.flatnonzero(tokens.ids == tokenizer.convert_tokens_to_ids("<|assistant|>"))
    assert np.flatnonzero(tokens.pooled(Pooling.LAST_PROMPT_TOKEN)).tolist() == [headers[-1]]


# --- long examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", LongExamples)
@pytest.mark.parametrize("length", [4, 5])
def test_an_example_that_fits_is_left_as_it_is(rule, length):
    tokens = tokens_of("..xx")
    assert fit(tokens, length, rule) is tokens
    assert not tokens.truncated


@pytest.mark.parametrize("bos", [False, True])
def test_a_long_example_is_set_aside(bos):
    assert fit(tokens_of("..xx", bos=bos), 3, LongExamples.QUARANTINE) is None


@pytest.mark.parametrize(
    ("rule", "bos", "kept"),
    [
        (LongExamples.TRUNCATE_RIGHT, False, [0, 1, 2, 3]),
        (LongExamples.TRUNCATE_RIGHT, True, [0, 1, 2, 3]),
        (LongExamples.TRUNCATE_LEFT, False, [2, 3, 4, 5]),
        (LongExamples.TRUNCATE_LEFT, True, [0, 3, 4, 5]),
    ],
)
def test_a_long_example_is_cut_on_one_side_and_keeps_its_bos(rule, bos, kept):
    whole = tokens_of("..x.xx", bos=bos)
    cut = fit(whole, 4, rule)
    assert cut is not None
    assert cut.ids.tolist() == kept
    assert cut.target.tolist() == whole.target[kept].tolist()
    assert (cut.bos, cut.has_prompt, cut.truncated) == (bos, True, True)
    assert not whole.truncated


@pytest.mark.parametrize("rule", [LongExamples.TRUNCATE_LEFT, LongExamples.TRUNCATE_RIGHT])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [1, 2, 3])
def test_a_cut_example_has_the_length_asked_for(rule, bos, max_length):
    cut = fit(tokens_of("..xxx", bos=bos), max_length, rule)
    assert cut is not None
    assert len(cut) == len(cut.target) == max_length


@pytest.mark.parametrize("rule", [LongExamples.TRUNCATE_LEFT, LongExamples.TRUNCATE_RIGHT])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", range(1, 9))
def test_cutting_an_example_moves_no_pooled_token_to_another(rule, bos, max_length):
    whole = tokenise(chat("user: a b c", "assistant: d e", "assistant: f g"), tiny.words(bos=bos))
    (pooled,) = np.flatnonzero(whole.pooled(Pooling.LAST_PROMPT_TOKEN))
    cut = fit(whole, max_length, rule)
    assert cut is not None
    if rule == LongExamples.TRUNCATE_RIGHT:
        kept = list(range(max_length))
    else:
        kept = [0] * bos + list(range(len(whole) - max_length + bos, len(whole)))
    expected = [kept.index(pooled)] if pooled in kept else []
    assert np.flatnonzero(cut.pooled(Pooling.LAST_PROMPT_TOKEN)).tolist() == expected


def test_a_message_with_a_colon_is_one_message():
    """Of our own helper: a chat written as text must not lose what follows the first colon."""
    assert chat("user: a: b").messages == (Message("user", "a: b"),)
