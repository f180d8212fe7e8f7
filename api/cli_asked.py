"""The options that say what is ranked and by what: `whence query` and `whence compare` have them in common."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

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
    }


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
