"""`whence concepts persona` and `whence concepts answers`: persona vectors, and what stands behind them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from api.cli_concepts import concepts_app
from api.terminal import DEFAULT_URL, AsJson, Detach, Url, connect, console, wait_for
from service.contracts import JobRecord
from service.personas import Answered, SystemPrompt

_SHOWN = 300  # characters of an answer


@concepts_app.command("persona")
def fit_persona(
    trait: Annotated[Path, typer.Argument(help="Trait file: instruction pairs, questions, eval_prompt.")],
    model: Annotated[str, typer.Option(help="Id of the model that answers.")],
    concept_id: Annotated[
        str | None, typer.Option("--id", help="Of the concept. Default: the file's name.")
    ] = None,
    layers: Annotated[str, typer.Option(help="Such as 16, or 12,16,20, or 8-20. Default: all.")] = "",
    each_layer: Annotated[
        bool, typer.Option("--each-layer", help="A concept for every layer, ID-l12 and so on; else the best one.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Answers per instruction, question and side.", min=1)] = 10,
    temperature: Annotated[float, typer.Option(help="Of the answers; 0: greedy.", min=0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the answers.", min=0)] = 0,
    judge_model: Annotated[
        str | None, typer.Option(help="Have this model judge, at an endpoint that the server allows.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Its base URL, as in WHENCE_JUDGES. Default: the only one there.")
    ] = None,
    positive_above: Annotated[
        float, typer.Option(help="Its score above which the trait shows.", min=0, max=100)
    ] = 50,
    negative_below: Annotated[float, typer.Option(help="Its score below which it does not.", min=0, max=100)] = 50,
    judge_concept: Annotated[str | None, typer.Option(help="Have a registered concept judge instead.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of that concept. Default: half-way between the means of both sides.")
    ] = None,
    system_prompt: Annotated[
        SystemPrompt, typer.Option(help="Where the template puts it, or in front of the question.")
    ] = SystemPrompt.TEMPLATE,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and answer.")] = None,
    on_server: Annotated[
        bool, typer.Option("--on-server", help="TRAIT is a path on the server, under one of its roots.")
    ] = False,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """A persona vector: what the model's answers have in common when it is told to show a trait, and not otherwise.

    `whence concepts persona evil.json --model bot --layers 8-20 --judge-model gpt-4.1-mini`

    The model answers every question under every positive and negative system prompt; the judge keeps the pairs
    that show the trait; the concept is the difference of the answers' mean activations. `--samples 1
    --max-new-tokens 100` is a quick first look. What was answered and judged is kept: after a failure the same
    command goes on with it.
    """
    if judge_model and judge_concept:
        raise typer.BadParameter("a model or a concept judges, not both: --judge-model or --judge-concept")
    judge: dict[str, Any] = {"kind": "none"}
    if judge_model:
        judge = {"kind": "http", "model": judge_model, "url": judge_url}
        judge |= {"positive_above": positive_above, "negative_below": negative_below}
    elif judge_concept:
        judge = {"kind": "probe", "concept": judge_concept, "threshold": threshold}
    elif judge_url:
        raise typer.BadParameter("--judge-url needs --judge-model: which model there judges?")
    if not on_server and not trait.is_file():
        raise typer.BadParameter(f"There is no file {trait}.")
    options: dict[str, Any] = {"path": str(trait)} if on_server else {"trait": trait}
    options |= {"layers": _layers(layers), "each_layer": each_layer, "samples": samples, "max_length": max_length}
    options |= {"judge": judge, "system_prompt": system_prompt}
    options["answers"] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    with connect(url) as client:
        job = client.fit_persona(concept_id or trait.stem, model=model, **options)
        if detach:
            console.print(job.id)
            return
        _show(wait_for(client, job))


@concepts_app.command("answers")
def answers(
    reference: Annotated[str, typer.Argument(help="A persona concept, or what a job names as 'answers'.")],
    side: Annotated[str | None, typer.Option(help="positive or negative.")] = None,
    kept: Annotated[bool | None, typer.Option("--kept/--dropped", help="Only those of pairs that are.")] = None,
    count: Annotated[int, typer.Option("-n", help="How many to show.", min=1, max=10_000)] = 20,
    into: Annotated[
        Path | None, typer.Option(help="Write all of them here as JSONL, which `whence datasets add` takes.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """The answers behind a persona vector: their texts, scores, and whether the pair was kept or why not.

    `whence concepts answers evil --side positive --kept --into evil-answers.jsonl` writes conversations (question
    and answer, the system prompt among the metadata) that can serve as a query set.
    """
    with connect(url) as client:
        if into is not None:
            with into.open("w", encoding="utf-8") as file:
                lines = [_line(each) for each in client.all_persona_answers(reference, side=side, kept=kept)]
                file.writelines(lines)
            console.print(f"{len(lines)} answers in {into}", highlight=False)
            return
        page = client.persona_answers(reference, side=side, kept=kept, limit=count)
    if as_json:
        console.print_json(data=page.model_dump(mode="json"))
        return
    for each in page.items:
        score = "" if each.score is None else f" {each.score:.4g}"
        verdict = "kept" if each.kept else f"left out: {each.reason}"
        where = f"instruction {each.instruction}, question {each.question}, sample {each.sample}"
        console.print(f"[bold]{each.side}{score}[/bold] [dim]{verdict}; {where}[/dim]", highlight=False)
        console.print(f"  {escape(each.prompt)}\n  → {escape(each.answer[:_SHOWN])}", highlight=False)
    console.print(f"{len(page.items)} of {page.total} answers", highlight=False)


def _line(each: Answered) -> str:
    """As a conversation without its system prompt: what training data of that kind would look like."""
    messages = [{"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.answer}]
    about = {name: value for name, value in vars(each).items() if name not in {"prompt", "answer"}}
    return json.dumps({"messages": messages, **about}, ensure_ascii=False) + "\n"


def _layers(said: str) -> list[int]:
    found: list[int] = []
    try:
        for part in filter(None, said.replace(" ", "").split(",")):
            low, dash, high = part.partition("-")
            found += range(int(low), int(high) + 1) if dash else [int(low)]
    except ValueError:
        raise typer.BadParameter(f"{said}: layers are numbers, as in 16, or 12,16,20, or 8-20") from None
    return found


def _show(job: JobRecord) -> None:
    result = dict(job.result or {})
    pairs = result["pairs"]
    for each in result["sweep"]:
        area, apart = each["auroc_held_out"], each["separation"]
        mark = " *" if each["layer"] == result["layer"] else ""
        console.print(
            f"layer {each['layer']:3d}: held-out AUROC {area:.3f}, {apart:.2f} deviations apart{mark}",
            highlight=False,
        )
    left_out = ", ".join(f"{count} {reason}" for reason, count in pairs["dropped"].items()) or "none"
    console.print(f"{pairs['kept']} of {pairs['made']} pairs kept; left out: {left_out}", highlight=False)
    for warning in result["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False)
    made = result["concept"] if isinstance(result["concept"], list) else [result["concept"]]
    console.print(
        f"concept {', '.join(made)}; whence concepts answers {made[0]} shows the answers", highlight=False
    )
