"""The commands: parse, call, print. What a command does is one Python call elsewhere.

Exit codes: 0 success, 2 bad usage or bad input (one line on stderr), 130 interrupted, 141 reader gone.
A command imports what it needs inside its function, so that `whalepod models` never waits for torch.
A mistake of the user is a UserError wherever it is found; `main` alone turns it into a line and a code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from whalepod import __version__
from whalepod.spec.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 160
"""Columns of tables that do not go to a terminal."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of a table.")]


def _option(help_: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=help_, show_default=False, rich_help_panel=panel)


# What `plan` and `scale` both ask; each is the field of report.question.Question that has its name.
ModelArgument = Annotated[str, typer.Argument(help="A model's name, a checkpoint folder or a config.json.")]
GoalOption = Annotated[str, typer.Option("--for", help="train or serve.")]
PrecisionOption = Annotated[
    str | None, _option("bf16, fp8 or fp4; FP8 where weights were released so and the GPU has it, else BF16.")
]
ImbalanceOption = Annotated[float | None, _option("Tokens of the busiest experts' rank over the mean; 1.")]
GpusPerNodeOption = Annotated[int | None, _option("GPUs in a node; the hardware's usual number.")]
PriceOption = Annotated[float | None, _option("USD per GPU and hour, over the dated price that is known.")]
MemoryOption = Annotated[float | None, _option("Of each GPU, over the database's.", "--memory-gib")]
BandwidthOption = Annotated[
    float | None, _option("Of each GPU's memory, over the database's.", "--memory-tb-s")
]
LinkOption = Annotated[float | None, _option("Of the fast link, one way.", "--scale-up-gb-s")]
NicOption = Annotated[float | None, _option("Each GPU's share of the network, one way.", "--nic-gb-s")]
MtpOption = Annotated[
    bool | None,
    _option("Train multi-token prediction, or speculate with it; default: train it.", "--mtp/--no-mtp"),
]
_LAYOUT = "Over several devices"
ServeTp = Annotated[int, _option("Ways every matrix and its heads are split; 1.", panel=_LAYOUT)]
ServePp = Annotated[int, _option("Pipeline stages; 1.", panel=_LAYOUT)]
ServeDp = Annotated[
    int, _option("Replicas of the attention, each with requests of its own; 1.", panel=_LAYOUT)
]
ServeEp = Annotated[int, _option("Devices that share the experts out, of tp x dp; 1.", panel=_LAYOUT)]
CacheOption = Annotated[
    float | None, _option("Of each device; half of what weights leave free.", "--cache-gib")
]
SpeculateOption = Annotated[
    bool, _option("Guess tokens with the model's multi-token prediction.", "--speculate")
]
_TRAIN, _SERVE = "With --for train", "With --for serve"
SoftwareOption = Annotated[str | None, _option("Stack and release, such as megatron-26.02.", panel=_TRAIN)]
BatchOption = Annotated[int | None, _option("Sequences a step; 15360, small models 4608.", panel=_TRAIN)]
SequenceOption = Annotated[int | None, _option("Tokens in a sequence; 4096.", panel=_TRAIN)]
TpOption = Annotated[int | None, _option("Only this tensor parallelism.")]
PpOption = Annotated[int | None, _option("Only so many pipeline ranks.")]
EpOption = Annotated[int | None, _option("Only this expert parallelism.")]
CpOption = Annotated[int | None, _option("Only this context parallelism.", panel=_TRAIN)]
MicroBatchOption = Annotated[int | None, _option("Only this micro-batch.", panel=_TRAIN)]
ZeroOption = Annotated[int | None, _option("Only this ZeRO stage, 1 to 3.", panel=_TRAIN)]
ScheduleOption = Annotated[str | None, _option("Only this pipeline schedule.", panel=_TRAIN)]
RecomputeOption = Annotated[str | None, _option("none, selective or full.", panel=_TRAIN)]
IslOption = Annotated[int | None, _option("Tokens of a prompt; 4096.", panel=_SERVE)]
OslOption = Annotated[int | None, _option("Tokens of an answer; 1024.", panel=_SERVE)]
ConcurrencyOption = Annotated[
    float | None, _option("Requests in flight; the best if left out.", panel=_SERVE)
]
EngineOption = Annotated[str | None, _option("sglang, trtllm, vllm, ...; sglang.", panel=_SERVE)]
TtftOption = Annotated[float | None, _option("At most, to the first token.", "--ttft-ms", panel=_SERVE)]
TpotOption = Annotated[float | None, _option("At most, per output token.", "--tpot-ms", panel=_SERVE)]
ModeOption = Annotated[str | None, _option("aggregated, disaggregated or any.", panel=_SERVE)]


class _Commands(TyperGroup):
    """Names the nearest command when there is none of the given name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UserError(f"unknown command {args[0][:100]!r}{nearest(args[0][:100], self.commands)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"whalepod {__version__}")
        raise typer.Exit


@app.callback()
def _whalepod(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plans, proves, trains and serves DeepSeek models over many GPUs."""


@app.command()
def models(
    name: Annotated[
        str | None,
        typer.Argument(help="A model's name, a checkpoint folder or a config.json.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The model family: parameters, KV cache, FLOPs, memory, licence; or one model in detail."""
    from whalepod.report import family

    if as_json:
        print_json(family.models_json(name))
        return
    console = make_console()
    if name is None:
        console.print(family.family_table(family.models_json(), console.width))
    else:
        console.print(family.model_view(name))


@app.command()
def plan(
    context: typer.Context,
    model: ModelArgument,
    gpus: Annotated[str, typer.Option(help="A count and a name, like 64xH100.")],
    goal: GoalOption,
    precision: PrecisionOption = None,
    imbalance: ImbalanceOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    price: PriceOption = None,
    memory_gib: MemoryOption = None,
    memory_tb_s: BandwidthOption = None,
    scale_up_gb_s: LinkOption = None,
    nic_gb_s: NicOption = None,
    mtp: MtpOption = None,
    software: SoftwareOption = None,
    global_batch: BatchOption = None,
    sequence_length: SequenceOption = None,
    tp: TpOption = None,
    pp: PpOption = None,
    ep: EpOption = None,
    cp: CpOption = None,
    micro_batch: MicroBatchOption = None,
    zero: ZeroOption = None,
    schedule: ScheduleOption = None,
    recompute: RecomputeOption = None,
    isl: IslOption = None,
    osl: OslOption = None,
    concurrency: ConcurrencyOption = None,
    engine: EngineOption = None,
    ttft_ms: TtftOption = None,
    tpot_ms: TpotOption = None,
    mode: ModeOption = None,
    top: Annotated[int, typer.Option(help="Plans to show.")] = 5,
    calculator: Annotated[
        bool, typer.Option("--calculator", help="What parameters x bytes x 1.15 says beside.")
    ] = False,
    emit: Annotated[Path | None, _option("Write the first plan as a run.yaml for `whalepod train`.")] = None,
    html: Annotated[Path | None, _option("Write a report with pictures, in one file.")] = None,
    picture: Annotated[Path | None, _option("Write a picture (PNG).")] = None,
    as_json: JsonOption = False,
) -> None:
    """The best layouts for a model on given GPUs: memory, speed, cost, what limits them, what would help."""
    from whalepod.report import answer

    asked = _question(context)
    found = answer.plan(asked, gpus, top, emit=emit, html=html, picture=picture)
    if as_json:
        print_json(found.doc)
        return
    console = make_console()
    console.print(found.view(console.width, calculator))
    _print_files(console, run=emit, report=html, picture=picture)


@app.command()
def dryrun(
    config: Annotated[Path, typer.Argument(help="A run.yaml, such as `whalepod plan --emit` writes.")],
    gpus: Annotated[str, typer.Option(help="A count and a name, like 2048xH800.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. layout.zero=1", show_default=False)
    ] = None,
    goal: GoalOption = "train",
    rank: Annotated[int | None, _option("Only this rank.", panel=_TRAIN)] = None,
    roles: Annotated[str, typer.Option(help="all pipeline ranks, their ends, or the first.")] = "all",
    batch: Annotated[int, _option("Sequences that a replica writes at once; 64.", panel=_SERVE)] = 64,
    context_tokens: Annotated[
        int | None, _option("Of each, in the cache; 4096.", "--context", panel=_SERVE)
    ] = None,
    prefill: Annotated[int | None, _option("Tokens of a prompt read in at once; 2048.", panel=_SERVE)] = None,
    imbalance: ImbalanceOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    picture: Annotated[Path | None, _option("Write memory over the step (PNG).")] = None,
    trace: Annotated[Path | None, _option("Write a trace for chrome://tracing or Perfetto (JSON).")] = None,
    as_json: JsonOption = False,
) -> None:
    """The real step, of training or serving, at true size on fake devices: memory, FLOPs, collectives."""
    from whalepod.report.question import check_name, check_number
    from whalepod.spec.hardware import parse_gpus
    from whalepod.spec.run import load_run

    check_name("--roles", roles, ("all", "ends", "first"))
    check_name("--for", goal, ("train", "serve"))
    if imbalance is not None:
        check_number("--imbalance", imbalance, 1.0, 256.0)
    cluster = parse_gpus(gpus, gpus_per_node)
    job = load_run(config, overrides or ())
    if goal == "serve":
        for name, value in (("--batch", batch), ("--context", context_tokens), ("--prefill", prefill)):
            if value is not None:
                check_number(name, value, 1, 1 << 20)
        for name, value in (("--rank", rank), ("--picture", picture), ("--trace", trace)):
            if value is not None:
                raise UserError(f"{name} is for training: leave it out with --for serve")
        from whalepod.dryrun import serving, serving_views

        spec = job.model_spec()
        longest = spec.max_position_embeddings
        load = serving.Load(batch, context_tokens or min(4096, longest - 1), prefill or min(2048, longest))
        with text_progress() as progress:
            served = serving.serving_dry_run(
                *(spec, job.make_layout(), cluster, load),
                roles=roles,
                imbalance=imbalance or 1.0,
                progress=progress,
            )
        if as_json:
            print_json(serving_views.serving_json(served))
        else:
            make_console().print(serving_views.serving_view(served))
        return
    from whalepod.dryrun import roles as dry
    from whalepod.dryrun import views

    with text_progress() as progress:
        found = dry.dry_run(
            job, cluster, rank=rank, roles=roles, imbalance=imbalance or 1.0, progress=progress
        )
    if picture is not None:
        views.draw_memory(found, picture)
    if trace is not None:
        views.write_trace(found, trace)
    if as_json:
        print_json(views.dryrun_json(found))
        return
    console = make_console()
    console.print(views.dryrun_view(found))
    _print_files(console, picture=picture, trace=trace)


@app.command()
def scale(
    context: typer.Context,
    model: ModelArgument,
    gpu: Annotated[str, typer.Option(help="A GPU's name, like H800, or its profile's file.")],
    goal: GoalOption,
    counts: Annotated[
        str | None,
        _option("8,16,64 or 8..2048 (doublings); from the smallest that fits to 16384 if left out."),
    ] = None,
    precision: PrecisionOption = None,
    imbalance: ImbalanceOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    price: PriceOption = None,
    memory_gib: MemoryOption = None,
    memory_tb_s: BandwidthOption = None,
    scale_up_gb_s: LinkOption = None,
    nic_gb_s: NicOption = None,
    mtp: MtpOption = None,
    software: SoftwareOption = None,
    global_batch: BatchOption = None,
    sequence_length: SequenceOption = None,
    tp: TpOption = None,
    pp: PpOption = None,
    ep: EpOption = None,
    cp: CpOption = None,
    micro_batch: MicroBatchOption = None,
    zero: ZeroOption = None,
    schedule: ScheduleOption = None,
    recompute: RecomputeOption = None,
    isl: IslOption = None,
    osl: OslOption = None,
    concurrency: ConcurrencyOption = None,
    engine: EngineOption = None,
    ttft_ms: TtftOption = None,
    tpot_ms: TpotOption = None,
    mode: ModeOption = None,
    html: Annotated[Path | None, _option("Write a report with pictures, in one file.")] = None,
    picture: Annotated[Path | None, _option("Write the scaling curve (PNG).")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the counts that this machine has, beside the prediction.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What each added GPU brings: throughput, efficiency, memory, days and cost at every count."""
    from whalepod.report import answer, scaling

    asked = _question(context)
    with text_progress() as progress:
        doc = answer.scale(asked, gpu, counts, html=html, picture=picture, measure=measure, progress=progress)
    if as_json:
        print_json(doc)
        return
    console = make_console()
    console.print(scaling.scale_view(doc, console.width))
    _print_files(console, report=html, picture=picture)


@app.command()
def accuracy(
    training: Annotated[Path | None, _option("A CSV of published training runs, over our own.")] = None,
    serving: Annotated[Path | None, _option("A CSV of published serving runs, over our own.")] = None,
    markdown: Annotated[Path | None, _option("Write the tables as markdown.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The planner beside published measurements: every row with its error, medians by group."""
    from whalepod.report import accuracy as report
    from whalepod.report.planning import check_place, write_text

    check_place(markdown, "--markdown")
    doc = report.accuracy_json(training, serving)
    if markdown is not None:
        write_text(markdown, report.accuracy_markdown(doc), "--markdown")
    if as_json:
        print_json(doc)
        return
    console = make_console()
    console.print(report.accuracy_view(doc, console.width))
    _print_files(console, markdown=markdown)


@app.command()
def calibrate(
    name: Annotated[
        str | None, _option("The profile's name; `cpu` without CUDA, else the device's with `-here`.")
    ] = None,
    out: Annotated[Path | None, _option("Write this YAML file, not the one of that name.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats: seconds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measures this machine and writes a hardware profile that `plan`, `scale` and `dryrun` take by name."""
    from whalepod.calibrate import profile, run

    profile.check_out(out)
    with text_progress() as progress:
        gpu = run.calibrate(name=name, quick=quick, progress=progress)
    path = profile.write_profile(gpu, out)
    if as_json:
        print_json({"path": str(path), "profile": profile.profile_values(gpu)})
        return
    console = make_console()
    console.print(profile.profile_table(gpu))
    console.print(f"profile: {path}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the picture; overwritten.")] = Path(
        "runs/demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """The main job on this machine: trains a small DeepSeek on 1 and on all workers, then writes text."""
    from whalepod import demo as demo_

    console = make_console(stderr=as_json)
    with text_progress() as progress:
        result = demo_.run_demo(out, console.print, progress)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    console.print()
    console.print(demo_.demo_table(result))
    console.print(f"picture: {result.picture}")
    console.print(f"\n{result.closing}", soft_wrap=True)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="The job: a run.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, over what the file says.", show_default=False),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what the run's folder holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Trains. Alone it starts local workers; under torchrun it joins. Takes up a run where it stood."""
    from whalepod.spec.run import load_run

    config = load_run(run, overrides or [])
    config.model_spec()
    from whalepod.dryrun.auto import choice_rows, choose, write_choice
    from whalepod.train.start import is_first_rank
    from whalepod.train.start import train as train_

    choice = None
    with text_progress() as progress:
        if config.is_open:
            choice = choose(config, progress=progress, restart=restart)
            config = choice.config
    if choice is not None and choice.tried and is_first_rank():
        from whalepod.report.prediction import choice_table

        make_console(stderr=True).print(choice_table(choice_rows(choice), choice.memory_gib))
    try:
        with text_progress() as progress:
            result = train_(config, restart=restart, progress=progress)
    finally:
        if choice is not None and is_first_rank():
            write_choice(choice)
    if not is_first_rank():
        return
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    held_out = "" if result.validation_loss is None else f", held-out {result.validation_loss:.4f}"
    make_console().print(
        f"step {result.steps}: loss {result.loss:.4f}{held_out}; {result.tokens_per_s:,.0f} tokens/s, "
        f"MFU {result.mfu:.1%} of {result.peak_tflops:.3g} measured TFLOP/s; "
        f"{max(result.memory_gib):.2f} GiB per worker\n{result.folder}"
    )
    from whalepod.report.prediction import prediction_table

    if (table := prediction_table(result)) is not None:
        make_console().print(table)


@app.command()
def schedule(
    name: Annotated[
        str, typer.Argument(help="gpipe, 1f1b, interleaved, interleaved_zero_bubble, zbv or dualpipev.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="A model: stages then take as long as its layers cost.", show_default=False),
    ] = None,
    pp: Annotated[int, typer.Option(help="Pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches in a step.")] = 8,
    stages_per_rank: Annotated[
        int | None,
        typer.Option(help="Stages on each rank; the schedule's own number if left out.", show_default=False),
    ] = None,
    times: Annotated[
        str, typer.Option(help="Of F, B, I and W of a micro-batch over a rank's layers, in any unit.")
    ] = "1,2,1,1",
    p2p: Annotated[float, typer.Option(help="Of a message from a rank to the next, in that unit.")] = 0.0,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence, for the costs of MODEL.")] = 4096,
    out: Annotated[Path | None, typer.Option(help="Write a picture (PNG) here.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """A pipeline schedule: what each rank does when, its bubble and the activations it holds."""
    from whalepod.report import schedule as report
    from whalepod.spec.presets import load_model_spec

    spec = None if model is None else load_model_spec(model)
    timed = report.time_schedule(
        name, pp, micro_batches, stages_per_rank, report.parse_times(times), p2p, spec, sequence_length
    )
    if out is not None:
        report.draw_schedule(timed, out)
    if as_json:
        print_json(report.schedule_json(timed))
        return
    console = make_console()
    console.print(report.schedule_table(timed, console.width))
    if out is not None:
        console.print(f"picture: {out}")


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    prompt: Annotated[str | None, _option("The text to continue.")] = None,
    batch: Annotated[
        Path | None, _option('Instead: a .jsonl file of {"prompt": ...} or {"messages": [...]}.')
    ] = None,
    out: Annotated[
        Path | None, _option("Where a batch's texts go, a line of JSON each; the terminal.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this joint probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
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
    from whalepod.serve.request import Sampling
    from whalepod.serve.start import EngineConfig, open_engine, serving_layout

    if (prompt is None) == (batch is None):
        raise UserError("give --prompt, or --batch with a file of them")
    sampling = Sampling(temperature, top_k, top_p, seed)
    config = EngineConfig(
        path, serving_layout(tp, pp, dp, ep), dtype, cache_gib=cache_gib, speculate=speculate
    )
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
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    print()
    told.print(
        f"[{result.prompt_tokens} prompt tokens at {result.prefill_tokens_per_s:,.0f}/s, "
        f"{result.new_tokens} new at {result.decode_tokens_per_s:,.0f}/s, "
        f"cache {result.cache_bytes_per_token:,} bytes per token]"
    )


@app.command()
def serve(
    path: Annotated[str, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes one that is free.", min=0, max=65535)] = 8000,
    model_name: Annotated[str | None, _option("What clients call the model; the folder's name.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Clients must send one of these.", envvar="WHALEPOD_API_KEY", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
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
    from whalepod.serve.start import EngineConfig, serving_layout

    engine = EngineConfig(
        path,
        serving_layout(tp, pp, dp, ep),
        dtype,
        cache_gib=cache_gib,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        max_waiting=max_queue,
        speculate=speculate,
    )
    options = ServerOptions(host, port, model_name, tuple(api_key or ()), drain_s)
    serve_forever(engine, options, make_console(stderr=True).print)


@app.command("bench-serve")
def bench_serve(
    target: Annotated[
        str, typer.Argument(help="A run's folder, a Hugging Face folder, or a server's URL (http://...).")
    ],
    concurrency: Annotated[
        str | None, _option("Requests in flight, a point of the table for each number; 1,8,32.")
    ] = None,
    rate: Annotated[float | None, _option("Instead: requests a second, arriving at random.")] = None,
    requests: Annotated[
        int | None, _option("Of each point; 4 for each in flight, at least 8, or 30 s of arrivals.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt, drawn at random.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 128,
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals; another one asks anew.")] = 0,
    model_name: Annotated[str | None, _option("Of those at the URL.", "--model")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="For the URL.", envvar="WHALEPOD_API_KEY", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
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
    layout = (tp, pp, dp, ep)
    told = make_console(stderr=True)
    if "://" in target:
        url = server_url(target)
        if (*layout, dtype, cache_gib, speculate) != (1, 1, 1, 1, "auto", None, False):
            raise UserError("layout, --dtype, --cache-gib and --speculate are for a folder, not for a URL")
        from whalepod.report.bench_serve import bench_url, bench_view

        with text_progress() as progress:
            found = bench_url(url, load, model_name, api_key, progress)
    else:
        if model_name is not None:
            raise UserError("--model is for a server's URL: a folder has one model")
        from whalepod.report.bench_serve import bench_folder, bench_view
        from whalepod.serve.start import EngineConfig, serving_layout

        # Nobody is to be refused: a queue that is too long shows in the times.
        waiting = max(load.concurrency, default=1024)
        config = EngineConfig(
            target,
            serving_layout(*layout),
            dtype,
            cache_gib=cache_gib,
            max_waiting=waiting,
            speculate=speculate,
        )
        with text_progress() as progress:
            found = bench_folder(config, load, progress, told.print)
    if found is None:  # a rank that follows
        return
    if as_json:
        print_json(found)
    else:
        console = make_console()
        console.print(bench_view(found, console.width))


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

    with ExitStack() as stack:
        progress = stack.enter_context(text_progress())
        try:
            file = sys.stdout if out is None else stack.enter_context(out.open("w", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None
        result = batch.run_batch(
            engine, engine.tokenizer, config.path, lines, file, max_new_tokens, sampling, progress
        )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        make_console(stderr=True).print(batch.shown(result, config.layout.num_devices))


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    dst: Annotated[Path, typer.Argument(help="The Hugging Face checkpoint folder to write.")],
    to: Annotated[
        str, typer.Option(help="bf16, fp32, fp8 (128 x 128 blocks), keep, or lora: adapters alone.")
    ] = "keep",
) -> None:
    """Writes Hugging Face safetensors from a run or from another checkpoint, tensor by tensor."""
    from whalepod.parallel.export import export

    with text_progress() as progress:
        export(src, dst, to, lambda done, total: progress("writing", done, total))
    make_console().print(str(dst))


def _question(context: typer.Context) -> Any:
    """The options of a command that are fields of a Question, as one."""
    from whalepod.report.question import Question

    names = {field.name for field in dataclasses.fields(Question)}
    return Question(**{name: value for name, value in context.params.items() if name in names})


def _print_files(console: Console, **written: Path | None) -> None:
    for name, path in written.items():
        if path is not None:
            console.print(f"{name}: {path}")


@contextmanager
def text_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for (stage, done, total) reports; silent without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None)
                bar.start()  # the stage before may have stopped it
            bar.update(tasks[stage], completed=done, total=total or None)
            if total and done >= total:
                bar.stop()  # a training bar may follow

        yield report


def print_json(value: Any) -> None:
    """The `--json` form of a command's answer, on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def make_console(stderr: bool = False) -> Console:
    """The console for tables: as wide as the terminal, and wide when piped."""
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # main() answers for it; rich would exit 1

    # Names of models and files are not markup.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return _Console(width=width, markup=False, highlight=False, stderr=stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; `argv` defaults to the process's arguments."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = typer.main.get_command(app)
    try:
        # Not command.main(): it would print usage errors in a box, and exit 1 when a pipe breaks.
        with command.make_context("whalepod", args) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except UserError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        return _fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except SystemExit as stop:  # rich's own console, when nobody reads the help
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def run() -> None:
    """The console script."""
    sys.exit(main())


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    help_ = f"; see: {context.command_path} --help" if context is not None else ""
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}{help_}"


def _fail(message: str) -> int:
    # One line, whatever the message quotes.
    print(f"whalepod: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _drop_stdout() -> None:
    """Nobody reads stdout any more: the interpreter's last flush must not complain either."""
    with suppress(OSError, ValueError):  # stdout may be something without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
