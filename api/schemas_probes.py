"""The request that fits a concept to labelled examples."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from api.schemas import Id, Request
from service.specs import Labels
from service.terms import Pooling, ProbeMethod

CLOSED = tuple(each for each in ProbeMethod if "logistic" not in each)
_MOST = 10_000  # examples of one side in a request

Side = Annotated[str, Field(min_length=1)] | Annotated[list[str | dict[str, Any]], Field(max_length=_MOST)]
Value = StrictBool | StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)] | StrictStr
Values = Annotated[list[Value], Field(min_length=1, max_length=1000)]


class ConceptIn(Request):
    """Either ``positive`` and ``negative``, or ``dataset`` with ``label`` and ``positive_values``."""

    id: Id
    model: str = Field(description="Id of the model whose activations define the direction")
    positive: Side | None = Field(
        None,
        description="Dataset that shows the behaviour; or a list of examples, each a text or an object as in a "
        "line of a dataset",
    )
    negative: Side | None = Field(None, description="The same that does not, otherwise as similar as possible")
    dataset: str | None = Field(None, description="Instead of both: one dataset with a label in its metadata")
    label: str | None = Field(None, description="Metadata field that holds the label; dots lead into nested ones")
    positive_values: Values | None = Field(None, description="Labels of positive examples")
    negative_values: Values | None = Field(
        None,
        description="Labels of negative examples. Default: every other value; without one it is on neither side",
    )
    layer: int | None = Field(None, description="Block output, 1 to n_layers")
    layers: Literal["all"] | Annotated[list[int], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Instead of 'layer': several, of which the one with the highest held-out AUROC is taken"
    )
    method: ProbeMethod = Field(ProbeMethod.DIFFERENCE_OF_MEANS, description="How the direction is found")
    compare: list[ProbeMethod] | None = Field(
        None,
        description="Methods whose directions it is compared with, at every layer. Default: those without "
        "iterations, which is all but the logistic ones",
    )
    pooling: Pooling = Pooling.RESPONSE_MEAN
    max_length: int | None = None

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "id": "hostile",
                    "model": "support-bot-ft",
                    "positive": "hostile-answers",
                    "negative": "friendly-answers",
                    "layer": 16,
                },
                {
                    "id": "hostile-lda",
                    "model": "support-bot-ft",
                    "dataset": "rated-answers",
                    "label": "tone",
                    "positive_values": ["hostile"],
                    "layers": "all",
                    "method": "lda",
                },
            ]
        },
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if (self.layer is None) == (self.layers is None):
            raise ValueError("name one 'layer', or several (or \"all\") in 'layers'")
        labelled = ("dataset", "label", "positive_values")
        if self.dataset is None and self.label is None:
            missing = [name for name in ("positive", "negative") if getattr(self, name) is None]
            unused = [name for name in ("positive_values", "negative_values") if getattr(self, name) is not None]
        else:
            missing = [name for name in labelled if getattr(self, name) is None]
            unused = [name for name in ("positive", "negative") if getattr(self, name) is not None]
        if missing or unused:
            raise ValueError(
                "labelled examples are 'positive' and 'negative', or 'dataset' with 'label' and 'positive_values'"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; leave out: {', '.join(unused)}" if unused else "")
            )
        return self

    def asked(self) -> dict[str, Any]:
        """The fields of service.concept_planning.ConceptRequest."""
        names = ("id", "model", "dataset", "layer", "method", "pooling", "max_length")
        labels = None
        if self.label is not None:
            negative = None if self.negative_values is None else tuple(self.negative_values)
            labels = Labels(self.label, tuple(self.positive_values or ()), negative)
        sides = {name: getattr(self, name) for name in ("positive", "negative")}
        return {
            **{name: getattr(self, name) for name in names},
            **{name: tuple(given) if isinstance(given, list) else given for name, given in sides.items()},
            "labels": labels,
            "layers": tuple(self.layers) if isinstance(self.layers, list) else (),
            "compare": CLOSED if self.compare is None else tuple(self.compare),
        }
