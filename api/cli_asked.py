"""The options that say what is ranked and by what: `whence query` and `whence compare` have them in common."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from api.where import parse as parse_where
from service.terms import ConceptFunction, IndexKind, Method, Order


def asked(
    index: Annotated[str, typer.Option(help="name, or name@v3 for one version.")],
    concept: Annotated[
        str | None, typer.Option(help="Id of a concept; influence_function asks about the loss and takes none.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="vector_filter reads activations, the others gradients.")
    ] = Method.VECTOR_FILTER,
    order: Annotated[Order, typer.Option(help="Those that push toward the concept most, or least.")] = Order.MOST,
    query_set: Annotated[
        str | None,
        typer.Option(help="Dataset on which f_v or the loss is measured; may be left out with one embedded set."),
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="In units of the mean λ. Default: 1, or what embeddings have.", min=0)
    ] = None,
    concept_function: Annotated[
        ConceptFunction | None, typer.Option(help="f_v of concept_influence. Default: dot.")
    ] = None,
    through: Annotated[
        IndexKind | None, typer.Option(help="influence or gradient. Default: embeddings where there are any.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="A further concept in a weighted sum, as NAME or NAME=WEIGHT; repeatable."),
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="Instead of a concept: a .npy file with a direction; needs --layer.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of the vector: the block it is an output of.", min=1)] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Rank only examples with such metadata: topic=harbor, score>=1, name^=abc, topic=a|b; repeatable."
        ),
    ] = None,
) -> dict[str, Any]:
    """The fields of ``api.schemas.QuestionIn``."""
    return {
        "index": index,
        "concept": concept,
        "method": method,
        "order": order,
        "query_set": query_set,
        "damping": damping,
        "concept_function": concept_function,
        "through": through,
        "concepts": _summed(concept, add),
        "vector": None if vector is None else _numbers(vector),
        "layer": layer,
        "filter": filter_of(where) if where else None,
    } | ({"concept": None} if add else {})


def _summed(concept: str | None, add: list[str] | None) -> list[dict[str, Any]] | None:
    if not add:
        return None
    found: list[dict[str, Any]] = [{"id": concept}] if concept else []
    for each in add:
        name, _, weight = each.partition("=")
        try:
            found.append({"id": name, "weight": float(weight or 1)})
        except ValueError:
            raise typer.BadParameter(f"--add is NAME or NAME=WEIGHT, a number: found {each!r}.") from None
    return found


def filter_of(where: list[str]) -> dict[str, Any] | None:
    try:
        return parse_where(where)
    except ValueError as error:
        raise typer.BadParameter(f"--where: {error}") from None


def _numbers(path: Path) -> list[float]:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False).astype(float).reshape(-1).tolist()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--vector {path}: {error}. It must be a .npy file of numbers.") from error


def with_asked(run: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of ``asked`` and its own; it is given what ``asked`` makes of them first."""
    shared = inspect.signature(asked).parameters
    own = list(inspect.signature(run).parameters.values())[1:]

    def command(**given: Any) -> None:
        options = asked(**{name: given.pop(name) for name in shared})
        run(options, **given)

    command.__doc__ = run.__doc__
    command.__name__ = run.__name__
    command.__signature__ = inspect.Signature([*shared.values(), *own])  # pyright: ignore[reportFunctionMemberAccess]
    return command
