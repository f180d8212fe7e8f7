"""How texts are read: what every work that runs a model has in common."""

from dataclasses import dataclass, fields

from service.terms import LongExamples, Lora


@dataclass(frozen=True)
class Reading:
    """Which weights read the examples, and how texts become batches."""

    model_fingerprint: str
    tokenizer_fingerprint: str
    max_length: int
    long_examples: LongExamples
    token_budget: int  # padded tokens per batch: in no name, see ``tasks.identity``
    dtype: str  # float32 | bfloat16 | float16
    lora: Lora = Lora.MERGED

    @property
    def reading(self) -> "Reading":
        """How it reads texts, alone: what other work on the same model shares."""
        return Reading(**{each.name: getattr(self, each.name) for each in fields(Reading)})
