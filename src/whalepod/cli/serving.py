"""Commands that write text and serve it."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from whalepod.cli.base import JsonOption, app, make_console, option, print_json, text_progress
from whalepod.spec.errors import UserError

_LAYOUT = "Over several devices"
ServeTp = Annotated[int, option("Ways every matrix and its heads are split; 1.", panel=_LAYOUT)]
ServePp = Annotated[int, option("Pipeline stages; 1.", panel=_LAYOUT)]
ServeDp = Annotated[
    int, option("Replicas of the attention, each with requests of its own; 1.", panel=_LAYOUT)
]
ServeEp = Annotated[int, option("Devices that share the experts out, of tp x dp; 1.", panel=_LAYOUT)]
CacheOption = Annotated[
    float | None, option("Of each device; half of what weights leave free.", "--cache-gib")
]
SpeculateOption = Annotated[
    bool, option("Guess tokens with the model's multi-token prediction.", "--speculate")
]


@app.command()
def generate(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    prompt: Annotated[str | None, option("The text to continue.")] = None,
    batch: Annotated[
        Path | None, option('Instead: a .jsonl file of {"prompt": ...} or {"messages": [...]}.')
    ] = None,
    out: Annotated[
        Path | None, option("Where a batch's texts go, a line of JSON each; the terminal.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this joint probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp32, fp8 or int8.")] = "auto",
    tp: ServeTp = 1,
    pp: ServePp = 1,
    dp: ServeDp = 1,
    ep: ServeEp = 1,
    cache_gib: CacheOption = None,
    speculate: SpeculateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes text: one prompt streamed to the terminal, or a file of them all at once."""
    from whalepod.serve import generate as generate_
    from whalepod.serve.batch import read_lines
    from whalepod.serve.predict import predict_written, predicted_line
    from whalepod.serve.request import Sampling
    from whalepod.serve.start import open_engine

    if (prompt is None) == (batch is None):
        raise UserError("give --prompt, or --batch with a file of them")
    sampling = Sampling(temperature, top_k, top_p, seed)
    config = _engine(context, path)
    told = make_console(stderr=True)
    lines = None if batch is None else read_lines(batch)
    if lines is not None and as_json and out is None:
        raise UserError("--json prints figures: name a file for the texts with --out")

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    with open_engine(config, told.print if batch else lambda _: None) as engine:
        if engine is None:  # a rank that follows
            return
        if lines is not None:
            _run_batch(engine, config, lines, out, max_new_tokens, sampling, as_json)
            return
        assert prompt is not None
        if not as_json:
            show(prompt)
        on_text = None if as_json else show
        result = generate_.continued(engine, engine.tokenizer, prompt, max_new_tokens, sampling, on_text)
    predicted = predict_written(config, [(result.prompt_tokens, result.new_tokens)])
    if as_json:
        print_json(dataclasses.asdict(result) | {"predicted": predicted})
        return
    print()
    told.print(
        f"[{result.prompt_tokens} prompt tokens at {result.prefill_tokens_per_s:,.0f}/s, "
        f"{result.new_tokens} new at {result.decode_tokens_per_s:,.0f}/s, "
        f"cache {result.cache_bytes_per_token:,} bytes per token]"
    )
    told.print(predicted_line(predicted, result.decode_tokens_per_s))


@app.command()
def serve(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes one that is free.", min=0, max=65535)] = 8000,
    model_name: Annotated[str | None, option("What clients call the model; the folder's name.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Clients must send one of these.", envvar="WHALEPOD_API_KEY", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp32, fp8 or int8.")] = "auto",
    tp: ServeTp = 1,
    pp: ServePp = 1,
    dp: ServeDp = 1,
    ep: ServeEp = 1,
    cache_gib: CacheOption = None,
    speculate: SpeculateOption = False,
    max_running: Annotated[int, typer.Option(help="Sequences at once, of each replica.", min=1)] = 64,
    max_step_tokens: Annotated[
        int, typer.Option(help="Tokens through the model at once; fewer: steadier streams.", min=1)
    ] = 512,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; beyond, 429.", min=0)] = 256,
    drain_s: Annotated[float, typer.Option(help="On SIGTERM, for what runs to finish.", min=0)] = 30.0,
) -> None:
    """Serves an OpenAI-compatible API, metrics at /metrics and a page to chat on."""
    from whalepod.serve.http.open import ServerOptions, serve_forever

    more = {"max_running": max_running, "max_step_tokens": max_step_tokens, "max_waiting": max_queue}
    engine = _engine(context, path, **more)
    options = ServerOptions(host, port, model_name, tuple(api_key or ()), drain_s)
    serve_forever(engine, options, make_console(stderr=True).print)


@app.command("bench-serve")
def bench_serve(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="A run's folder, a Hugging Face folder, or a server's URL (http://...).")
    ],
    concurrency: Annotated[
        str | None, option("Requests in flight, a point of the table for each number; 1,8,32.")
    ] = None,
    rate: Annotated[float | None, option("Instead: requests a second, arriving at random.")] = None,
    requests: Annotated[
        int | None, option("Of each point; 4 for each in flight, at least 8, or 30 s of arrivals.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt, drawn at random.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 128,
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals; another one asks anew.")] = 0,
    model_name: Annotated[str | None, option("Of those at the URL.", "--model")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="For the URL.", envvar="WHALEPOD_API_KEY", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp32, fp8 or int8.")] = "auto",
    tp: ServeTp = 1,
    pp: ServePp = 1,
    dp: ServeDp = 1,
    ep: ServeEp = 1,
    cache_gib: CacheOption = None,
    speculate: SpeculateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measures a server under load, beside the planner's prediction where it has one."""
    from whalepod.serve.client import server_url
    from whalepod.serve.measure import parse_load

    load = parse_load(
        concurrency,
        rate,
        requests=requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        shared_prefix=shared_prefix,
        seed=seed,
    )
    told = make_console(stderr=True)
    if "://" in target:
        url = server_url(target)
        if (tp, pp, dp, ep, dtype, cache_gib, speculate) != (1, 1, 1, 1, "auto", None, False):
            raise UserError("layout, --dtype, --cache-gib and --speculate are for a folder, not for a URL")
        from whalepod.report.bench_serve import bench_url, bench_view

        with text_progress() as progress:
            found = bench_url(url, load, model_name, api_key, progress)
    else:
        if model_name is not None:
            raise UserError("--model is for a server's URL: a folder has one model")
        from whalepod.report.bench_serve import bench_folder, bench_view

        # Nobody is to be refused: a queue that is too long shows in the times.
        config = _engine(context, target, max_waiting=max(load.concurrency, default=1024))
        with text_progress() as progress:
            found = bench_folder(config, load, progress, told.print)
    if found is None:  # a rank that follows
        return
    if as_json:
        print_json(found)
    else:
        console = make_console()
        console.print(bench_view(found, console.width))


def _engine(context: typer.Context, path: str, **more: Any) -> Any:
    """The options that all three share, as an EngineConfig."""
    from whalepod.serve.start import EngineConfig, serving_layout

    asked = context.params
    layout = serving_layout(*(asked[name] for name in ("tp", "pp", "dp", "ep")))
    same = {name: asked[name] for name in ("dtype", "cache_gib", "speculate")}
    return EngineConfig(path, layout, **same, **more)


def _run_batch(
    engine: Any,
    config: Any,
    lines: Any,
    out: Path | None,
    max_new_tokens: int,
    sampling: Any,
    as_json: bool,
) -> None:
    from whalepod.serve import batch
    from whalepod.serve.predict import predict_written, predicted_line

    with ExitStack() as stack:
        progress = stack.enter_context(text_progress())
        try:
            file = sys.stdout if out is None else stack.enter_context(out.open("w", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None
        result = batch.run_batch(
            engine, engine.tokenizer, config.path, lines, file, max_new_tokens, sampling, progress
        )
    predicted = predict_written(config, result.lengths)
    if as_json:
        figures = {k: v for k, v in dataclasses.asdict(result).items() if k != "lengths"}
        print_json(figures | {"predicted": predicted})
        return
    console = make_console(stderr=True)
    console.print(batch.shown(result, config.layout.num_devices))
    console.print(predicted_line(predicted, result.new_tokens_per_s))
