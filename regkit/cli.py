"""The command line: a thin shell over the library. PyTorch is imported when a command needs it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from regkit.papers.running import Settings
    from regkit.registration import Result
    from regkit.training.held_out import Measured

NOT_FINISHED = 75  # exit code; sysexits.h: a temporary failure, the same command may be tried again
NOTICE = "For research and teaching. Not a medical device."


# typer would repeat a path that it refuses; regkit.io checks paths, too, and its sentences do not.
# Hence `readable=False` below.


class _Sentences(TyperGroup):
    """What ends a command early is one sentence on stderr, not a traceback.

    Exit code 2 for wrong input and for what the machine cannot do, 1 for a fault of regkit's own,
    130 after Ctrl-C, 143 when the system asks the process to end; in all cases what was to be
    written is removed first. REGKIT_DEBUG=1 shows the traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        with _stopped_by_signals():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # `regkit data list | head`: typer ends quietly
                raise
            except KeyboardInterrupt:
                code, sentence = 130, "stopped."
            except Exception as error:
                if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):
                    raise  # typer's own: a wrong option, the end of --help
                if os.environ.get("REGKIT_DEBUG") == "1":
                    raise
                code, sentence = _sentence(error)
            typer.echo(f"regkit: {sentence}", err=True)
            raise typer.Exit(code)


def _sentence(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and what to say of it."""
    if isinstance(error, OSError) and error.strerror:  # of the system: it has a path in it
        return 2, f"Reading or writing failed: {error.strerror}."
    text = str(error)
    is_sentence = text.endswith(".") and "\n" not in text  # as regkit's own errors are
    if isinstance(error, ValueError | OSError | ImportError) and is_sentence:
        return 2, text
    if isinstance(error, OSError):
        return 2, f"Reading or writing failed ({type(error).__name__})."
    if isinstance(error, ModuleNotFoundError):
        return 2, f"The package {error.name} is not installed, expected it for this command."
    out_of_memory = isinstance(error, MemoryError)
    if not out_of_memory and "torch" in sys.modules:
        from regkit.device import is_out_of_memory

        out_of_memory = is_out_of_memory(error)
    if out_of_memory:
        return 2, (
            "The memory is too small for this input, expected smaller images, fewer of them at "
            "once, or a larger machine."
        )
    return 1, (
        f"{type(error).__name__}: this is a fault of regkit's, please report it with what "
        "REGKIT_DEBUG=1 in the environment then shows."
    )


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """A scheduler that ends the process, or a closed terminal, lets it clean up first."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python hands signals to the main thread alone
    before = {}
    for number in numbers:
        # one that is ignored, as by nohup, stays so
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


app = typer.Typer(
    cls=_Sentences,
    help=f"Learned registration of medical images, in 2D and 3D. {NOTICE}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes longer to load than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Open samples: real images from public places.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class Affine(StrEnum):
    """What `regkit.register` takes for `affine`; "none" is its False."""

    auto = "auto"
    rigid = "rigid"
    affine = "affine"
    none = "none"


AFFINES: dict[Affine, Literal["auto", "rigid", "affine", False]] = {
    Affine.auto: "auto",
    Affine.rigid: "rigid",
    Affine.affine: "affine",
    Affine.none: False,
}


class Size(StrEnum):
    """Of the demonstration."""

    small = "small"
    full = "full"


Out = Annotated[Path, typer.Option("--out", "-o", readable=False, help="Folder for the results.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Budget = Annotated[
    str | None, typer.Option(help="smoke, cpu, gpu or paper; by default REGKIT_BUDGET.")
]
Data = Annotated[
    Path | None,
    typer.Option(readable=False, help="Folder of a public set that data_scripts has prepared."),
]


Workers = Annotated[
    int | None,
    typer.Option(help="Processes that make pairs; by default a core each, four at most, on a GPU."),
]
Minutes = Annotated[
    float | None, typer.Option(help="End after so many, with what is done saved; see exit code 75.")
]


def _not_finished(state: str, how: str = "") -> NoReturn:
    """Say that the minutes have passed, and end."""
    typer.echo(f"regkit: not finished: {state}; the same command{how} goes on.", err=True)
    raise typer.Exit(NOT_FINISHED)


def _version(asked: bool) -> None:
    if asked:
        import regkit

        typer.echo(f"regkit {regkit.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


class _Bar:
    """A progress bar that `regkit.register` can talk to."""

    def __init__(self, what: str = ""):
        from tqdm import tqdm

        self.what = what
        self.bar = tqdm(total=100, bar_format="{desc:32} {percentage:3.0f}%|{bar}| {elapsed}")

    def __call__(self, stage: str, fraction: float) -> None:
        self.bar.set_description_str(f"{self.what}{stage}", refresh=False)
        self.bar.update(100 * fraction - self.bar.n)

    def tell(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.bar.write(sentence, file=sys.stderr)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _tell(result: Result) -> None:
    """The main numbers, and every warning."""
    numbers = result.metrics
    lines = [
        f"{name:<16}{numbers[name]['before']:8.4f} -> {numbers[name]['after']:.4f}"
        for name in ("lncc", "ncc", "dice")
        if name in numbers
    ]
    if "trust" in numbers:
        lines.append(f"{'trust':<16}{numbers['trust']['mean']:8.4f} (1 is best)")
    lines.append(
        f"{'folding':<16}{numbers['folding_percent']:8.4f} % ({numbers['folding_count']} voxels)"
    )
    lines.append(f"{'time':<16}{numbers['seconds']:8.1f} s on {numbers['device']}")
    typer.echo("\n".join(lines))
    for sentence in result.warnings:
        typer.echo(f"warning: {sentence}", err=True)


@app.command()
def register(
    moving: Annotated[
        Path, typer.Argument(readable=False, help="Image to deform: NIfTI, MHA, NRRD, ...")
    ],
    fixed: Annotated[Path, typer.Argument(readable=False, help="Image to match.")],
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            help="auto; greedy, lddmm, demons, bspline, syn; rigid, affine; a name that "
            "`regkit models` lists, or a weights file."
        ),
    ] = "auto",
    affine: Annotated[Affine, typer.Option(help="Affine registration before the network.")] = (
        Affine.auto
    ),
    refine: Annotated[
        int, typer.Option(help="After another method, steps of the engine on each of its levels.")
    ] = 0,
    device: Device = "auto",
    effort: Annotated[str, typer.Option(help="Of the engine: fast, default or best.")] = "default",
    similarity: Annotated[
        str, typer.Option(help="Of the engine: auto, lncc, mse, mind or mutual_information.")
    ] = "auto",
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Let the engine move both images half-way.")
    ] = False,
    moving_mask: Annotated[
        Path | None, typer.Option(readable=False, help="Where moving counts: not 0.")
    ] = None,
    fixed_mask: Annotated[
        Path | None, typer.Option(readable=False, help="Where fixed counts: not 0.")
    ] = None,
    moving_labels: Annotated[
        Path | None, typer.Option(readable=False, help="Label map of moving.")
    ] = None,
    fixed_labels: Annotated[
        Path | None, typer.Option(readable=False, help="Label map of fixed.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Write trust.nii.gz: 0 to 1, how far to trust a voxel.")
    ] = False,
) -> None:
    """Register MOVING to FIXED: writes moved.nii.gz, disp.nii.gz, metrics.json and two reports.

    disp.nii.gz is a displacement field as ITK, ANTs and 3D Slicer read it. report.png is a page of
    pictures; report.html lets you compare the images by hand, in any browser, without a network.
    The outputs hold no file names and nothing of the inputs' description fields. For research and
    teaching, not a medical device.
    """
    from regkit.files import check_writable
    from regkit.registration import register as run

    check_writable(out)
    with _Bar() as bar:
        result = run(
            moving,
            fixed,
            method,
            AFFINES[affine],
            refine,
            device,
            effort=effort,
            similarity=similarity,
            symmetric=symmetric,
            moving_mask=moving_mask,
            fixed_mask=fixed_mask,
            moving_labels=moving_labels,
            fixed_labels=fixed_labels,
            trust=trust,
            progress=bar,
            tell=bar.tell,
        )
        bar("writing", 1.0)
        result.save(out)
        _look(result, out)
    _tell(result)


def _look(result: Result, out: Path, title: str = "Registration") -> None:
    """Write report.html beside what `Result.save` has written. No name of a file stands in it."""
    from regkit.files import staged
    from regkit.widgets import show

    with staged(out) as folder:
        show(result).save(folder / "report.html", title=title)


@app.command()
def apply(
    image: Annotated[
        Path, typer.Argument(readable=False, help="Image in the space of moving; or a series.")
    ],
    disp: Annotated[
        Path,
        typer.Argument(readable=False, help="disp.nii.gz, or a transform of ITK or ANTs."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", readable=False, help="File to write, .nii or .nii.gz.")
    ],
    labels: Annotated[
        bool, typer.Option("--labels", help="A label map: take the nearest voxel, keep integers.")
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(readable=False, help="The fixed image, for an affine transform (.mat)."),
    ] = None,
) -> None:
    """Warp IMAGE with the displacement DISP onto the fixed grid.

    IMAGE lies in the space of the moving image, on its grid or another. DISP is disp.nii.gz, a
    displacement field as ITK and ANTs write it (NIfTI, MHA, NRRD), or an affine transform.
    """
    from regkit import checks, io
    from regkit.files import check_writable

    if not out.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"out ends in {out.suffix!r}, expected a file name with .nii or .nii.gz.")
    if out.is_dir():
        raise ValueError("out is a folder, expected a file name with .nii or .nii.gz.")
    check_writable(out.parent)
    source = io.read(image, "image", labels, series=True)
    fixed = None if like is None else io.read(like, "like").grid
    transform = io.read_transform(disp, source.grid, fixed)
    if checks.coverage(transform.voxels(), source.shape) == 0:
        raise ValueError("disp leads nowhere into image, expected one that belongs to its space.")
    for sentence in (*source.notes, *io.header_notes(disp)):
        typer.echo(f"warning: {sentence}", err=True)
    moved = transform.moved(source, "nearest" if labels else "linear")
    io.write_image(moved, transform.fixed.affine, out, transform.fixed.across)


@app.command()
def demo(
    out: Out = Path("regkit_demo"),
    size: Annotated[Size, typer.Option(help="small: 2D only; full: 3D as well.")] = Size.full,
    device: Device = "auto",
) -> None:
    """Register two synthetic brains and, if they are cached or can be fetched, real ones.

    Needs no files. Each registration gets a folder of its own below OUT.
    """
    from regkit.data import samples
    from regkit.data.population import population
    from regkit.files import check_writable

    check_writable(out)
    shapes = [(160, 192)] if size is Size.small else [(160, 192), (80, 96, 80)]
    for shape in shapes:
        moving, fixed = population(2, shape, seed=2)
        _demonstrate(f"synthetic_{len(shape)}d", moving, fixed, out, device)
    try:
        sample = samples.samples()["oasis_3d"]
        if not samples.cached("oasis_3d"):
            typer.echo(f"\nReal brains: {sample.terms}")
        samples.fetch("oasis_3d", progress=True)
    except FileNotFoundError as error:
        typer.echo(f"\nNo real brains: {error}", err=True)
        return
    moving_slice, fixed_slice, shared = samples.load_oasis_slices()
    _demonstrate("real_2d", moving_slice, fixed_slice, out, device, shared)
    if size is Size.full:
        moving_brain, fixed_brain = samples.load_oasis_pair()
        _demonstrate("real_3d", moving_brain, fixed_brain, out, device)


def _demonstrate(
    name: str, moving: Any, fixed: Any, out: Path, device: str, shared: list[int] | None = None
) -> None:
    """Register two subjects or scans, with Dice if both have labels, and save."""
    import nibabel
    import torch

    from regkit.registration import register as run

    def nifti(subject: Any, values: torch.Tensor) -> Any:
        new: Any = nibabel.Nifti1Image  # which has no types
        return new(values.numpy(), subject.affine)

    def labels(subject: Any) -> Any:
        kept = subject.labels[0].to(torch.int16)
        if shared is not None:
            kept = torch.where(torch.isin(kept, torch.tensor(shared)), kept, 0)
        return nifti(subject, kept)

    with_labels = moving.labels.numel() > 0 and fixed.labels.numel() > 0
    typer.echo(f"\n{name}")
    with _Bar() as bar:
        result = run(
            nifti(moving, moving.image[0]),
            nifti(fixed, fixed.image[0]),
            device=device,
            moving_labels=labels(moving) if with_labels else None,
            fixed_labels=labels(fixed) if with_labels else None,
            progress=bar,
        )
        result.save(out / name)
        _look(result, out / name, f"Registration of {name}")
    _tell(result)
    typer.echo(f"{'report':<16}{out / name / 'report.png'}")
    typer.echo(f"{'in a browser':<16}{out / name / 'report.html'}")


@app.command()
def train(
    out: Out,
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe; a wrong name lists them.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    budget: Budget = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Weights to begin with: a file, or shipped ones.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    data: Data = None,
    device: Device = "auto",
    workers: Workers = None,
    minutes: Minutes = None,
) -> None:
    """Train a model as RECIPE says, on the embedded population or on a prepared set.

    Any prepared set will do whose images fit the model. best.safetensors goes to
    `register --method`. Exit code 75: --minutes have passed, --resume goes on.
    """
    from regkit.files import check_writable
    from regkit.training import recipes
    from regkit.training import train as run

    if (name is None) == (recipe is None):
        given = "not given" if name is None else "given twice"
        raise ValueError(f"RECIPE is {given}, expected one, such as `regkit train vxm_2d -o run`.")
    check_writable(out)
    changes = {k: v for k, v in (("steps", steps), ("seed", seed)) if v is not None}
    plan = recipes.get(name or recipe or "", budget, **changes)
    how: dict[str, Any] = {"device": device, "workers": workers, "minutes": minutes}
    trained = run(plan, out, resume, start=start, data=data, **how)
    if (done := len(trained.history)) < trained.recipe.steps:
        _not_finished(f"{done} of {trained.recipe.steps} updates are made", " with --resume")
    plan, last = trained.recipe, trained.history[-1]
    typer.echo(f"recipe {plan.name}, data {plan.data}, images of {plan.shape} voxels")
    rigid = ("rotation_error", "translation_error", "success")
    for name in ("dice_before", "dice", "lncc", *rigid, "tre_before", "tre"):
        if name in last:
            typer.echo(f"validation {name:<18}{last[name]:8.4f}")
    written = [word for word in ("best", "last") if (out / f"{word}.safetensors").is_file()]
    typer.echo(f"wrote {out / written[0]}.safetensors; curves: tensorboard --logdir {out}")


@app.command()
def evaluate(
    method: Annotated[str, typer.Argument(help="Shipped weights, or a weights file.")],
    pairs: Annotated[
        int | None, typer.Option(help="How many pairs; else 8, or all of a set.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the population; 0 and 1 serve training.")] = 2,
    distances: Annotated[
        bool | None, typer.Option(help="HD95 as well; by default with --data.")
    ] = None,
    data: Data = None,
    split: Annotated[
        str | None, typer.Option(help="Of the set in --data: test, validation or train.")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--csv", readable=False, help="A CSV file, a line a pair and structure."),
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", readable=False, help="A JSON file with every number."),
    ] = None,
) -> None:
    """Measure a trained model on pairs that it has not seen: of the population, or of --data."""
    from regkit import models
    from regkit.device import choose_device
    from regkit.training import recipes
    from regkit.training.held_out import measure, write_csv

    _check_file(out, "out", "a JSON file")
    _check_file(table, "csv", "a CSV file")
    if split is not None and data is None:
        raise ValueError("split is given and data is not, expected the folder of a prepared set.")
    chosen = choose_device(device)
    model = models.load(method)
    if "recipe" not in model.info:
        raise ValueError("method is a weights file without a recipe, expected one of regkit train.")
    plan = recipes.restored(model.info["recipe"])
    if data is None and pairs == 1 and plan.motion is None and not plan.atlas:
        raise ValueError("pairs is 1, expected 2 or more: each subject goes to the next.")
    far = data is not None if distances is None else distances
    measured = measure(
        model.to(chosen), plan, data, split or "test", pairs, seed, far, chosen, progress=True
    )
    for name, value in measured.summary.items():
        typer.echo(f"{name:<22}{value:10.4f}")
    structures = measured.per_structure() if data is not None else None
    if structures:
        _print_structures(structures)
    if table is not None:
        write_csv(measured, table)
        typer.echo(f"wrote {table}")
    if out is not None:
        made = {**_how_measured(chosen), "training": model.info}
        _write_measured(out, made, measured, structures)


def _check_file(file: Path | None, name: str, what: str) -> None:
    """Refuse, before hours of work, a file that could not be written."""
    from regkit.files import check_writable

    if file is not None:
        if file.is_dir():
            raise ValueError(f"{name} is a folder, expected the name of {what}.")
        check_writable(file.parent)


def _how_measured(device: Any) -> dict[str, Any]:
    """How, and with what, `evaluate` has measured."""
    from regkit.record import how_made, peak_memory, typed_command

    memory = round(peak_memory(), 2)
    return {**how_made(typed_command("regkit"), device), "memory_gb": memory}


def _write_measured(
    file: Path,
    made: dict[str, Any],
    measured: Measured,
    structures: dict[str, dict[str, float]] | None,
) -> None:
    """Every number as JSON."""
    from regkit.record import write_json

    results = {"made": made, "summary": measured.summary, "pairs": measured.rows}
    if structures is not None:
        results["structures"] = structures
    write_json(file, results)


def _print_structures(structures: dict[str, dict[str, float]]) -> None:
    """A line a structure."""
    forms = (".4f", ".3f")
    lines = [(name, *map(format, numbers.values(), forms)) for name, numbers in structures.items()]
    _print_columns(lines, ("structure", "Dice", "HD95"), right=(1, 2))


@app.command()
def benchmark(
    table: Annotated[str, typer.Argument(help="list, one of the tables that it names, or all.")],
    budget: Budget = None,
    ndim: Annotated[
        int | None, typer.Option(help="2 or 3; by default 3 at budgets gpu and paper, else 2.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="atlas: all to one fixed image; pairs: any two; by default the first."),
    ] = None,
    data: Data = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the training; given again, the mean over them.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates, instead of the recipe's.")] = None,
    pairs: Annotated[int | None, typer.Option(help="How many subjects to test on.")] = None,
    similarity: Annotated[
        str | None, typer.Option(help="mse (the paper's), lncc or ncc, for all models.")
    ] = None,
    lambda2: Annotated[
        float | None, typer.Option(help="Weight of smoothness, of rows that name none.")
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row: its label, method or number; repeat.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(readable=False, help="Another prepared set to test on.")
    ] = None,
    amplitude: Annotated[
        float | None, typer.Option(help="Another amplitude of the embedded population to test on.")
    ] = None,
    runs: Annotated[
        Path, typer.Option(readable=False, help="Folder of the trainings, which go on from it.")
    ] = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", readable=False, help="The JSON file; else in results/."),
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    minutes: Minutes = None,
) -> None:
    """Run a published table again, row by row, and say which of its orders hold.

    What is there is not run again, and a stopped training goes on. Exit code 75: --minutes passed.
    """
    if table == "list":
        _list_tables()
        return
    from regkit.papers.running import Settings, tables_for
    from regkit.record import typed_command

    if table == "all" and (out is not None or row):
        raise ValueError("table is 'all', expected one table with the options --out and --row.")
    settings = Settings(
        table,
        budget=budget,
        ndim=ndim,
        protocol=protocol,
        data=data,
        seeds=seed or (0,),
        steps=steps,
        pairs=pairs,
        similarity=similarity,
        lambda2=lambda2,
        rows=row or (),
        test=test,
        amplitude=amplitude,
        runs=runs,
        out=out,
        device=device,
        workers=workers,
        until=_until(minutes),
        command=typed_command("regkit"),
    )
    names = tables_for(budget, ndim, protocol, data) if table == "all" else [table]
    failed = [label for name in names for label in _run_table(replace(settings, table=name))]
    if failed:
        listed = ", ".join(map(repr, failed))
        raise ValueError(f"table has rows that were left out because of an error: {listed}.")


def _until(minutes: float | None) -> float | None:
    """When these minutes end, on `time.monotonic`."""
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes is {minutes}, expected more than 0.")
    return None if minutes is None else time.monotonic() + 60 * minutes


def _list_tables() -> None:
    """The tables with their rows, and which of these cannot run yet."""
    from regkit.papers import running
    from regkit.papers.tables import TABLES

    for name, table in TABLES.items():
        typer.echo(f"{name:<18}{table.title}")
        for number, row in enumerate(table.rows, 1):
            state = "" if running.exists(row.method) else "   not yet"
            typer.echo(f"{number:>20}  {row.label}{state}")


def _run_table(settings: Settings) -> list[str]:
    """Run a table and print it; labels of the rows that an error kept out of it."""
    from regkit.papers import comparing, running

    try:
        file = running.run(settings)
    except running.NotFinished as state:
        _not_finished(str(state))
    results = json.loads(file.read_text())
    typer.echo(comparing.as_text(results))
    typer.echo(f"wrote {file}\n")
    return running.left_out(settings.table, results, settings.rows)


@app.command("models")
def models_(
    cost: Annotated[
        bool, typer.Option("--cost", help="What each costs, as the book's table has it.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --cost: count and measure here instead.")
    ] = False,
    size: Annotated[
        str, typer.Option(help="With --measure: voxels of the images, such as 96x112.")
    ] = "160x192x160",
    model: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given again.")
    ] = None,
    save_memory: Annotated[
        bool, typer.Option("--save-memory", help="Memory with layers computed again.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Memory and seconds under bfloat16.")
    ] = False,
) -> None:
    """List the models with their parameters, and the shipped weights; or what they cost."""
    from regkit import models
    from regkit.messages import unknown
    from regkit.models.cost import laid_out

    for word in model or []:
        if word not in models.names():
            raise unknown("model", word, models.names())
    chosen = [name for name in models.names() if not model or name in model]
    if cost:
        _print_costs(chosen, size if measure else None, save_memory, bf16)
        return
    lines: list[tuple[str, ...]] = []
    for name in chosen:
        networks = (laid_out(name, ndim) for ndim in (2, 3))
        lines.append((name, *(f"{models.parameter_count(network):,}" for network in networks)))
    _print_columns(lines, ("model, parameters", "2D", "3D"), right=(1, 2))
    typer.echo()
    weights = []
    for name in models.pretrained():
        about = models.about(name)
        spacing = " x ".join(f"{side:g}" for side in about.info.get("spacing", ()))
        weights.append((name, about.name, str(about.ndim), f"{spacing} mm"))
    if weights:
        _print_columns(weights, ("shipped weights", "model", "axes", "voxels in training"))


def _print_costs(names: Sequence[str], size: str | None, save_memory: bool, bf16: bool) -> None:
    """The table of costs: the stored one, or with a size what is counted and measured here."""
    from regkit.models import cost

    if size is None:
        stored = cost.stored(save_memory=save_memory, bf16=bf16)
        found = [row for row in stored if row.label.split(",")[0] in names]
    else:
        sides = size.lower().split("x")
        if len(sides) not in (2, 3) or not all(side.isdecimal() and int(side) for side in sides):
            raise ValueError(f"size is {size!r}, expected voxels such as 160x192x160 or 96x112.")
        usable = [name for name in names if cost.saves_memory(name) or not save_memory]
        shape = [int(side) for side in sides]
        found = [cost.measured(name, shape, save_memory=save_memory, bf16=bf16) for name in usable]
    lines = [
        (
            row.label,
            f"{row.parameters:,}",
            f"{row.multiply_adds / 1e9:,.1f}",
            "-" if row.kept is None else f"{row.kept / 1e9:,.2f}",
            "-" if row.seconds is None else f"{row.seconds:,.2f}",
        )
        for row in found
    ]
    header = ("model", "parameters", "multiply-adds, G", "a step keeps, GB", "a pair, s")
    if lines:
        _print_columns(lines, header, right=(1, 2, 3, 4))


@data_app.command("list")
def data_list() -> None:
    """List the open samples: size, whether they are cached, and what they are."""
    from regkit.data import samples
    from regkit.data.cache import cache_folder

    lines = []
    for name, sample in samples.samples().items():
        state = "cached" if samples.cached(name) else f"{sample.bytes / 1e6:.1f} MB"
        lines.append((name, state, sample.title))
    _print_columns(lines, right=(1,))
    typer.echo(f"\ncache folder: {cache_folder()}")


@data_app.command("get")
def data_get(
    names: Annotated[list[str], typer.Argument(help="Names that `regkit data list` shows.")],
) -> None:
    """Fetch open samples into the cache folder (REGKIT_DATA), with their terms."""
    from regkit.data import samples

    available = samples.samples()
    for name in names:
        if name in available:
            typer.echo(f"{name}: {available[name].terms}")
        typer.echo(f"in {samples.fetch(name, progress=True)}")


def _print_columns(
    lines: Sequence[Sequence[str]], header: Sequence[str] = (), right: Sequence[int] = ()
) -> None:
    """Columns as wide as what they hold, the same in a terminal and in a file.

    right: numbers of the columns whose cells stand to the right.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=bool(header))
    for number in range(len(lines[0])):
        word = header[number] if header else ""
        table.add_column(word, justify="right" if number in right else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console(width=1000, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as printed:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))
