"""Persona vectors (arXiv 2507.21509): what a job makes of a trait, and what became of every answer."""

from dataclasses import dataclass
from enum import StrEnum

from service.judging import Judge
from service.traits import TraitFile
from service.work import AnswersSpec, Reading

PERSONA = "persona"
FOLDS = 5  # of the questions
FEWEST_PAIRS, FEW_PAIRS = 5, 20  # refused below, warned below


class SystemPrompt(StrEnum):
    """Where a system prompt stands. Without a chat template its text and a newline come first, either way."""

    TEMPLATE = "template"  # where the chat template puts it; one that takes none is refused
    IN_QUESTION = "in_question"  # in the user's turn: its text, a blank line, the question


@dataclass(frozen=True)
class PersonaSpec:
    """Answers under every instruction, question and sample, on both sides; a direction per layer from them."""

    key: str
    id: str
    model: str
    file: TraitFile
    reading: Reading
    answers: AnswersSpec
    samples: int
    system_prompt: SystemPrompt
    layers: tuple[int, ...]
    each_layer: bool  # a concept for every layer; else for the one that tells held-out questions apart best
    judge: Judge

    def concept_ids(self) -> dict[int, str]:
        """The id of a layer's concept, if that layer becomes one."""
        several = self.each_layer and len(self.layers) > 1
        return {layer: f"{self.id}-l{layer}" if several else self.id for layer in self.layers}


@dataclass(frozen=True)
class Prompt:
    """One answer to make; its randomness is decided by these texts and numbers alone."""

    side: str  # positive | negative
    instruction: int  # numbers in the trait file, from 0
    question: int
    sample: int


@dataclass(frozen=True)
class Answered:
    """An answer and what became of it. ``reason``: why its pair is left out."""

    side: str
    instruction: int
    question: int
    sample: int
    system: str
    prompt: str
    answer: str
    tokens: int
    kept: bool
    score: float | None = None
    judge_said: str | None = None
    reason: str | None = None


def all_prompts(spec: PersonaSpec) -> list[Prompt]:
    """Every answer that is made, both of a pair next to each other."""
    return [
        Prompt(side, instruction, question, sample)
        for instruction in range(len(spec.file.trait.instruction))
        for question in range(len(spec.file.trait.questions))
        for sample in range(spec.samples)
        for side in ("positive", "negative")
    ]


def texts_of(spec: PersonaSpec, prompt: Prompt) -> tuple[str, str]:
    """System prompt and question."""
    pair = spec.file.trait.instruction[prompt.instruction]
    return pair.pos if prompt.side == "positive" else pair.neg, spec.file.trait.questions[prompt.question]
