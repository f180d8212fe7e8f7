"""`whence indexes`: build, extend, list, and what is not in one."""

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from api.terminal import (
    DEFAULT_URL,
    AsJson,
    Detach,
    PoolingOption,
    Url,
    connect,
    follow_job,
    show_estimate,
    show_table,
    wait_for,
)
from service.terms import (
    Checkpoints,
    ConceptFunction,
    FactorLabels,
    FactorPositions,
    IndexKind,
    LongExamples,
    Lora,
    LossReduction,
    Pooling,
    Projection,
)

Asked = tuple[dict[str, Any], str, bool]


def _with_options_of(request: Callable[..., Asked]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that takes the options of ``request`` and runs on what it makes of them."""

    def made(run: Callable[..., None]) -> Callable[..., None]:
        @wraps(request)
        def command(*given: Any, **named: Any) -> None:
            run(*request(*given, **named))

        command.__doc__ = run.__doc__
        return command

    return made


indexes_app = typer.Typer(no_args_is_help=True, help="What is stored per training example, ready to be queried.")

FunctionsOption = Annotated[
    list[ConceptFunction] | None,
    typer.Option("--concept-function", help="f_v of the embeddings; repeatable. Default: dot."),
]
DampingsOption = Annotated[
    list[float] | None,
    typer.Option("--damping", min=0, help="Of the embeddings, in units of the mean λ; repeatable. Default: 1."),
]


def _request(
    name: Annotated[str, typer.Argument(help="Name of the index; building again makes a new version.")],
    model: Annotated[str, typer.Option(help="Id of a model.")],
    dataset: Annotated[str, typer.Option(help="Id of a dataset.")],
    kind: Annotated[
        list[IndexKind] | None, typer.Option(help="Repeatable. Default: activation and gradient.")
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Block output, from 1; repeatable. Default: the middle one.")
    ] = None,
    pooling: PoolingOption = Pooling.RESPONSE_MEAN,
    loss_reduction: Annotated[
        LossReduction, typer.Option(help="How token losses become L(z).")
    ] = LossReduction.MEAN,
    projection: Annotated[
        Projection, typer.Option(help="EK-FAC eigenvectors, or random signs as a baseline without curvature.")
    ] = Projection.EIGEN,
    projection_dim: Annotated[
        int | None,
        typer.Option(help="p per side of a module. Default: all up to width 128, then 64; rademacher: 16."),
    ] = None,
    coordinates: Annotated[int, typer.Option(help="Kind gradient: numbers per example.", min=1)] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the rademacher projection.", min=0)] = 0,
    query_set: Annotated[
        list[str] | None, typer.Option(help="Kind influence: dataset Q that f_v is measured on; repeatable.")
    ] = None,
    concept_function: FunctionsOption = None,
    damping: DampingsOption = None,
    embedding_coordinates: Annotated[
        int | None,
        typer.Option(help="Coordinates behind each embedding. Default: as many as memory allows.", min=1),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Directions per embedding. Default: all hidden dimensions.", min=1)
    ] = None,
    direction: Annotated[
        list[str] | None, typer.Option(help="Concept that a lower rank must contain; repeatable.")
    ] = None,
    checkpoints: Annotated[
        Checkpoints, typer.Option(help="Embeddings are summed over all points of the run, or taken at its end.")
    ] = Checkpoints.ALL,
    modules: Annotated[
        str, typer.Option(help="Linear maps to track: all, or words in their names: attn, mlp, q_proj,v_proj.")
    ] = "all",
    stride: Annotated[
        int, typer.Option(help="Track every n-th block, counted back from the deepest layer.", min=1)
    ] = 1,
    lora: Annotated[
        Lora, typer.Option(help="Of an adapter: track the weights it is merged into, or its own maps.")
    ] = Lora.MERGED,
    answer_temperature: Annotated[
        float, typer.Option(help="Kind difference: how the base samples its own answers; 0 is greedy.", min=0)
    ] = 1.0,
    answer_tokens: Annotated[int, typer.Option(help="Kind difference: the longest answer.", min=1)] = 1000,
    answer_seed: Annotated[int, typer.Option(help="Kind difference: decides the answers.", min=0)] = 0,
    curvature_examples: Annotated[
        int, typer.Option(help="Training examples that the curvature is fitted on.", min=1)
    ] = 4096,
    curvature_seed: Annotated[int, typer.Option(help="Decides which, and the sampled labels.", min=0)] = 0,
    curvature_labels: Annotated[
        FactorLabels, typer.Option(help="Sampled from the model, or the data's own.")
    ] = FactorLabels.SAMPLED,
    curvature_positions: Annotated[
        FactorPositions, typer.Option(help="The curvature's loss at every token, or at the targets.")
    ] = FactorPositions.TARGETS,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per example. Default: the model's context, at most 2048.")
    ] = None,
    long_examples: Annotated[
        LongExamples, typer.Option(help="What happens to longer ones; they are counted.")
    ] = LongExamples.TRUNCATE_RIGHT,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> Asked:
    """What a build is asked with, where to ask, and whether to wait."""
    options: dict[str, Any] = {
        "name": name,
        "model": model,
        "dataset": dataset,
        "layers": layer or [],
        "pooling": pooling,
        "loss_reduction": loss_reduction,
        "projection": projection,
        "projection_dim": projection_dim,
        "coordinates": coordinates,
        "seed": seed,
        "query_sets": query_set or [],
        "embedding_coordinates": embedding_coordinates,
        "rank": rank,
        "directions": direction or [],
        "checkpoints": checkpoints,
        "modules": modules,
        "stride": stride,
        "lora": lora,
        "answers": {"temperature": answer_temperature, "max_new_tokens": answer_tokens, "seed": answer_seed},
        "curvature": {
            "examples": curvature_examples,
            "seed": curvature_seed,
            "labels": curvature_labels,
            "positions": curvature_positions,
        },
        "max_length": max_length,
        "long_examples": long_examples,
    }
    options |= {"kinds": kind} if kind else {}
    options |= _named(concept_function, damping)
    return options, url, detach


@indexes_app.command("build")
@_with_options_of(_request)
def build_index(options: dict[str, Any], url: str, detach: bool) -> None:
    """Build an index: EK-FAC curvature, then one pass of the model over the dataset for all its kinds.

    Kind `influence` needs a `--query-set`; it answers every concept at its layers without a model.
    """
    with connect(url) as client:
        follow_job(client, client.build_index(**options), detach)


@indexes_app.command("estimate")
@_with_options_of(_request)
def estimate_index(options: dict[str, Any], url: str, detach: bool) -> None:
    """Time, memory and disk that a build with the same options would take, from a short measurement on the workers.

    What is in storage already, a curvature or finished shards, is not counted again.
    """
    with connect(url) as client:
        job = client.estimate_index(**options)
        if detach:
            follow_job(client, job, detach)
        else:
            show_estimate(wait_for(client, job).result or {})


@indexes_app.command("extend")
def extend_index(
    reference: Annotated[str, typer.Argument(help="name or name@v3, with kind gradient")],
    query_set: Annotated[list[str], typer.Option(help="Dataset Q that f_v is measured on; repeatable.")],
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Block output, from 1; repeatable. Default: the deepest that the index tracks."),
    ] = None,
    pooling: PoolingOption = Pooling.RESPONSE_MEAN,
    concept_function: FunctionsOption = None,
    damping: DampingsOption = None,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """Add influence embeddings for more query sets, layers or dampings: a new version, from stored coordinates.

    The training data is not read again. The embeddings are those of the model itself, not summed over its run.
    """
    options: dict[str, Any] = {"layers": layer or [], "pooling": pooling}
    options |= _named(concept_function, damping)
    with connect(url) as client:
        follow_job(client, client.extend_index(reference, query_sets=query_set, **options), detach)


@indexes_app.command("list")
def list_indexes(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Published indexes, every version."""
    with connect(url) as client:
        records = client.indexes()
    show_table(records, ("name", "version", "model", "dataset", "pooling", "arrays", "bytes"), as_json)


@indexes_app.command("quarantine")
def index_quarantine(
    reference: Annotated[str, typer.Argument(help="name or name@v3")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """What of the source is not in the index, and why."""
    with connect(url) as client:
        page = client.index_quarantine(reference)
    show_table(page.items, ("id", "reason", "detail", "places"), as_json)


def _named(functions: list[ConceptFunction] | None, dampings: list[float] | None) -> dict[str, Any]:
    """Those of both that were given; the server has the defaults."""
    found = {"concept_functions": functions, "dampings": dampings}
    return {name: values for name, values in found.items() if values}
