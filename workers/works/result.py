"""What a work leaves: tensors by file and name, and facts about them."""

from typing import Any

from numpy.typing import NDArray

Tensors = dict[str, dict[str, NDArray[Any]]]
Facts = dict[str, float | int | str]
Result = tuple[Tensors, Facts]
