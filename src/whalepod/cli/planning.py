"""Commands that answer before anything runs: the family, plans, dry runs, accuracy, schedules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from whalepod.cli.base import JsonOption, app, make_console, option, print_files, print_json, text_progress
from whalepod.spec.errors import UserError

# What `plan` and `scale` both ask; each is the field of report.question.Question that has its name.
ModelArgument = Annotated[str, typer.Argument(help="A model's name, a checkpoint folder or a config.json.")]
GoalOption = Annotated[str, typer.Option("--for", help="train or serve.")]
PrecisionOption = Annotated[
    str | None, option("bf16, fp8 or fp4; FP8 where weights were released so and the GPU has it, else BF16.")
]
ImbalanceOption = Annotated[float | None, option("Tokens of the busiest experts' rank over the mean; 1.")]
GpusPerNodeOption = Annotated[int | None, option("GPUs in a node; the hardware's usual number.")]
PriceOption = Annotated[float | None, option("USD per GPU and hour, over the dated price that is known.")]
MemoryOption = Annotated[float | None, option("Of each GPU, over the database's.", "--memory-gib")]
BandwidthOption = Annotated[
    float | None, option("Of each GPU's memory, over the database's.", "--memory-tb-s")
]
LinkOption = Annotated[float | None, option("Of the fast link, one way.", "--scale-up-gb-s")]
NicOption = Annotated[float | None, option("Each GPU's share of the network, one way.", "--nic-gb-s")]
MtpOption = Annotated[
    bool | None,
    option("Train multi-token prediction, or speculate with it; default: train it.", "--mtp/--no-mtp"),
]
_TRAIN, _SERVE = "With --for train", "With --for serve"
SoftwareOption = Annotated[str | None, option("Stack and release, such as megatron-26.02.", panel=_TRAIN)]
BatchOption = Annotated[int | None, option("Sequences a step; 15360, small models 4608.", panel=_TRAIN)]
SequenceOption = Annotated[int | None, option("Tokens in a sequence; 4096.", panel=_TRAIN)]
TpOption = Annotated[int | None, option("Only this tensor parallelism.")]
PpOption = Annotated[int | None, option("Only so many pipeline ranks.")]
EpOption = Annotated[int | None, option("Only this expert parallelism.")]
CpOption = Annotated[int | None, option("Only this context parallelism.", panel=_TRAIN)]
MicroBatchOption = Annotated[int | None, option("Only this micro-batch.", panel=_TRAIN)]
ZeroOption = Annotated[int | None, option("Only this ZeRO stage, 1 to 3.", panel=_TRAIN)]
ScheduleOption = Annotated[str | None, option("Only this pipeline schedule.", panel=_TRAIN)]
RecomputeOption = Annotated[str | None, option("none, selective or full.", panel=_TRAIN)]
FailureOption = Annotated[
    float | None, option("From one failure to the next; 50700, as in Llama 3's training.", panel=_TRAIN)
]
RestartOption = Annotated[float | None, option("To start again after a failure; 600.", panel=_TRAIN)]
StorageOption = Annotated[
    float | None, option("What all nodes write of a checkpoint; 1 each, at most 2000.", panel=_TRAIN)
]
IslOption = Annotated[int | None, option("Tokens of a prompt; 4096.", panel=_SERVE)]
OslOption = Annotated[int | None, option("Tokens of an answer; 1024.", panel=_SERVE)]
ConcurrencyOption = Annotated[float | None, option("Requests in flight; the best if left out.", panel=_SERVE)]
EngineOption = Annotated[str | None, option("sglang, trtllm, vllm, ...; sglang.", panel=_SERVE)]
TtftOption = Annotated[float | None, option("At most, to the first token.", "--ttft-ms", panel=_SERVE)]
TpotOption = Annotated[float | None, option("At most, per output token.", "--tpot-ms", panel=_SERVE)]
ModeOption = Annotated[str | None, option("aggregated, disaggregated or any.", panel=_SERVE)]


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
    gpu_hours_per_failure: FailureOption = None,
    restart_s: RestartOption = None,
    storage_gb_s: StorageOption = None,
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
    emit: Annotated[
        Path | None, option("Write the first plan as a run.yaml, for `whalepod train` and `launch`.")
    ] = None,
    html: Annotated[Path | None, option("Write a report with pictures, in one file.")] = None,
    picture: Annotated[Path | None, option("Write a picture (PNG).")] = None,
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
    print_files(console, run=emit, report=html, picture=picture)


@app.command()
def scale(
    context: typer.Context,
    model: ModelArgument,
    gpu: Annotated[str, typer.Option(help="A GPU's name, like H800, or its profile's file.")],
    goal: GoalOption,
    counts: Annotated[
        str | None,
        option("8,16,64 or 8..2048 (doublings); from the smallest that fits to 16384 if left out."),
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
    gpu_hours_per_failure: FailureOption = None,
    restart_s: RestartOption = None,
    storage_gb_s: StorageOption = None,
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
    html: Annotated[Path | None, option("Write a report with pictures, in one file.")] = None,
    picture: Annotated[Path | None, option("Write the scaling curve (PNG).")] = None,
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
    print_files(console, report=html, picture=picture)


@app.command()
def dryrun(
    config: Annotated[Path, typer.Argument(help="A run.yaml, such as `whalepod plan --emit` writes.")],
    gpus: Annotated[str, typer.Option(help="A count and a name, like 2048xH800.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. layout.zero=1", show_default=False)
    ] = None,
    goal: GoalOption = "train",
    rank: Annotated[int | None, option("Only this rank.", panel=_TRAIN)] = None,
    roles: Annotated[str, typer.Option(help="all pipeline ranks, their ends, or the first.")] = "all",
    batch: Annotated[int, option("Sequences that a replica writes at once; 64.", panel=_SERVE)] = 64,
    context_tokens: Annotated[
        int | None, option("Of each, in the cache; 4096.", "--context", panel=_SERVE)
    ] = None,
    prefill: Annotated[int | None, option("Tokens of a prompt read in at once; 2048.", panel=_SERVE)] = None,
    imbalance: ImbalanceOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    picture: Annotated[Path | None, option("Write memory over the step (PNG).")] = None,
    trace: Annotated[Path | None, option("Write a trace for chrome://tracing or Perfetto (JSON).")] = None,
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
        if rank is not None:
            raise UserError("--rank is for training: leave it out with --for serve")
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
        if picture is not None:
            serving_views.draw_serving(served, picture)
        if trace is not None:
            serving_views.write_serving_trace(served, trace)
        if as_json:
            print_json(serving_views.serving_json(served))
            return
        console = make_console()
        console.print(serving_views.serving_view(served))
        print_files(console, picture=picture, trace=trace)
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
    print_files(console, picture=picture, trace=trace)


@app.command()
def accuracy(
    training: Annotated[Path | None, option("A CSV of published training runs, over our own.")] = None,
    serving: Annotated[Path | None, option("A CSV of published serving runs, over our own.")] = None,
    markdown: Annotated[Path | None, option("Write the tables as markdown.")] = None,
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
    print_files(console, markdown=markdown)


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


def _question(context: typer.Context) -> Any:
    """The options of a command that are fields of a Question, as one."""
    from whalepod.report.question import Question

    names = {field.name for field in dataclasses.fields(Question)}
    return Question(**{name: value for name, value in context.params.items() if name in names})
