"""The command line: a thin shell over the library. PyTorch is imported when a command needs it."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from regkit.registration import Result

NOTICE = "For research and teaching. Not a medical device."


# Paths are checked in regkit.io, which does not repeat them: hence `readable=False` below.


class _Sentences(TyperGroup):
    """Wrong input ends a command with one sentence on stderr and exit code 2, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `regkit data list | head`: typer ends quietly
            raise
        except (ValueError, OSError) as error:
            sentence = str(error)
            if isinstance(error, OSError) and error.strerror:  # of the system: it has a path in it
                sentence = f"Reading or writing failed: {error.strerror}."
            typer.echo(f"regkit: {sentence}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Sentences,
    help=f"Learned registration of medical images, in 2D and 3D. {NOTICE}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
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
Data = Annotated[
    Path | None,
    typer.Option(readable=False, help="Folder of a public set that data_scripts has prepared."),
]


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
        typer.Option(help="A name that `regkit models` lists, a weights file, rigid, affine, syn."),
    ] = "auto",
    affine: Annotated[Affine, typer.Option(help="Affine registration before the network.")] = (
        Affine.auto
    ),
    refine: Annotated[int, typer.Option(help="Steps of gradient descent afterwards.")] = 0,
    device: Device = "auto",
    moving_labels: Annotated[
        Path | None, typer.Option(readable=False, help="Label map of moving.")
    ] = None,
    fixed_labels: Annotated[
        Path | None, typer.Option(readable=False, help="Label map of fixed.")
    ] = None,
) -> None:
    """Register MOVING to FIXED: writes moved.nii.gz, disp.nii.gz, metrics.json and report.png.

    disp.nii.gz is a displacement field as ITK, ANTs and 3D Slicer read it. The outputs hold no file
    names and nothing of the inputs' description fields. For research and teaching, not a medical
    device.
    """
    from regkit import io
    from regkit.registration import register as run

    io.check_writable(out)
    with _Bar() as bar:
        result = run(
            moving,
            fixed,
            method,
            AFFINES[affine],
            refine,
            device,
            moving_labels=moving_labels,
            fixed_labels=fixed_labels,
            progress=bar,
        )
        bar("writing", 1.0)
        result.save(out)
    _tell(result)


@app.command()
def apply(
    image: Annotated[Path, typer.Argument(readable=False, help="Image on the grid of moving.")],
    disp: Annotated[
        Path, typer.Argument(readable=False, help="disp.nii.gz of regkit, ITK or ANTs.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", readable=False, help="File to write, .nii or .nii.gz.")
    ],
    labels: Annotated[
        bool, typer.Option("--labels", help="A label map: take the nearest voxel, keep integers.")
    ] = False,
) -> None:
    """Warp IMAGE with the displacement DISP onto the fixed grid."""
    from regkit import io

    if not out.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"out ends in {out.suffix!r}, expected a file name with .nii or .nii.gz.")
    if out.is_dir():
        raise ValueError("out is a folder, expected a file name with .nii or .nii.gz.")
    io.check_writable(out.parent)
    source = io.read(image, "image", labels)
    field, affine = io.read_displacement(disp, source.affine)
    if field.shape[1] != source.ndim:
        raise ValueError(
            f"image is {source.ndim}D {source.shape} and disp {field.shape[1]}D, "
            "expected the same number of axes."
        )
    io.write_image(io.pull(source.data, field, "nearest" if labels else "linear"), affine, out)


@app.command()
def demo(
    out: Out = Path("regkit_demo"),
    size: Annotated[Size, typer.Option(help="small: 2D only; full: 3D as well.")] = Size.full,
    device: Device = "auto",
) -> None:
    """Register two synthetic brains and, if they are cached or can be fetched, real ones.

    Needs no files. Each registration gets a folder of its own below OUT.
    """
    from regkit import io
    from regkit.data import samples
    from regkit.data.population import population

    io.check_writable(out)
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

    def image(subject: Any) -> nibabel.Nifti1Image:
        return nibabel.Nifti1Image(subject.image[0].numpy(), subject.affine)

    def labels(subject: Any) -> nibabel.Nifti1Image:
        kept = subject.labels[0].to(torch.int16)
        if shared is not None:
            kept = torch.where(torch.isin(kept, torch.tensor(shared)), kept, 0)
        return nibabel.Nifti1Image(kept.numpy(), subject.affine)

    known = moving.labels is not None and fixed.labels is not None
    typer.echo(f"\n{name}")
    with _Bar() as bar:
        result = run(
            image(moving),
            image(fixed),
            device=device,
            moving_labels=labels(moving) if known else None,
            fixed_labels=labels(fixed) if known else None,
            progress=bar,
        )
        result.save(out / name)
    _tell(result)
    typer.echo(f"{'report':<16}{out / name / 'report.png'}")


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="A recipe; a wrong name lists them.")],
    out: Out,
    budget: Annotated[
        str | None, typer.Option(help="smoke, cpu, gpu or paper; by default REGKIT_BUDGET.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Weights to begin with: a file, or shipped ones.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    data: Data = None,
    device: Device = "auto",
) -> None:
    """Train a model on the embedded population, or on a prepared set.

    best.safetensors goes to `register --method`.
    """
    from regkit import io, recipes
    from regkit.train import train as run

    io.check_writable(out)
    changes = {k: v for k, v in (("steps", steps), ("seed", seed)) if v is not None}
    plan = recipes.get(recipe, budget, **changes)
    trained = run(plan, out, resume, device=device, start=start, data=data)
    last = trained.history[-1]
    rigid = ("rotation_error", "translation_error", "success")
    for name in ("dice_before", "dice", *rigid, "tre_before", "tre"):
        if name in last:
            typer.echo(f"validation {name:<18}{last[name]:8.4f}")
    typer.echo(f"wrote {out / 'best.safetensors'}; curves: tensorboard --logdir {out}")


@app.command()
def evaluate(
    method: Annotated[str, typer.Argument(help="Shipped weights, or a weights file.")],
    pairs: Annotated[int, typer.Option(help="How many pairs.", min=2)] = 8,
    seed: Annotated[int, typer.Option(help="Of the population; 0 and 1 serve training.")] = 2,
    distances: Annotated[bool, typer.Option("--distances", help="HD95 as well.")] = False,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", readable=False, help="A JSON file with every number."),
    ] = None,
) -> None:
    """Measure a trained model on pairs of the embedded population that it has not seen."""
    import torch

    import regkit
    from regkit import io, models
    from regkit.data.pairs import chain
    from regkit.data.population import population
    from regkit.data.rigid import moved_heads
    from regkit.device import choose_device
    from regkit.evaluate import evaluate as run
    from regkit.evaluate import motion_errors, summary
    from regkit.record import made_now, peak_memory
    from regkit.train import SEEDS

    if out is not None:
        if out.is_dir():
            raise ValueError("out is a folder, expected the name of a JSON file.")
        io.check_writable(out.parent)
    chosen = choose_device(device)
    model = models.load(method)
    if "recipe" not in model.info:
        raise ValueError("method is a weights file without a recipe, expected one of regkit train.")
    plan = model.info["recipe"]
    model = model.to(chosen)
    errors: dict[str, float] = {}
    if motion := plan.get("motion"):
        heads = moved_heads(pairs, plan["shape"], seed, pairs, gamma=plan["gamma"], **motion)
        known = [heads.pair(i) for i in range(pairs)]
        errors = motion_errors(model, known, chosen)
        tested = [(pair.moving, pair.fixed) for pair in known]
    else:
        looks = plan["amplitude"], plan["contrast"]
        people = population(pairs, plan["shape"], seed, *looks, progress=True)
        tested = chain(people)
        if plan.get("atlas"):
            (target,) = population(1, plan["shape"], SEEDS["fixed"], *looks)
            tested = [(moving, target) for moving in people]
    rows = run(model, tested, distances=distances, ceiling=not motion, device=chosen)
    for name, value in (mean := summary(rows) | errors).items():
        typer.echo(f"{name:<20}{value:10.4f}")
    if out is not None:
        with io.staged(out.parent) as folder:
            made = {
                "command": f"regkit evaluate {Path(method).name} --pairs {pairs} --seed {seed}"
                + " --distances" * distances,
                **made_now(chosen),
                "memory_gb": round(peak_memory(), 2),
                "versions": {"regkit": regkit.__version__, "torch": torch.__version__},
                "training": model.info,
            }
            text = json.dumps({"made": made, "summary": mean, "pairs": rows}, indent=1)
            (folder / out.name).write_text(text + "\n")


@app.command()
def benchmark(
    table: Annotated[str, typer.Argument(help="list, one of the tables that it names, or all.")],
    budget: Annotated[
        str | None, typer.Option(help="smoke, cpu, gpu or paper; by default REGKIT_BUDGET.")
    ] = None,
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
) -> None:
    """Run a published table again, row by row, and say which of its orders hold.

    What is there already is not run again, and a training that was stopped goes on.
    """
    from regkit import benchmark as tables
    from regkit.tables import TABLES

    if table == "list":
        for name, one in TABLES.items():
            typer.echo(f"{name:<18}{one.title}")
            for number, line in enumerate(one.rows, 1):
                state = "" if tables.exists(line.method) else "   not yet"
                typer.echo(f"{number:>20}  {line.label}{state}")
        return
    if table == "all" and (out is not None or row):
        raise ValueError("table is 'all', expected one table with the options --out and --row.")
    for name in tables.tables_for(budget, ndim, protocol, data) if table == "all" else [table]:
        file = tables.run(
            name,
            budget,
            ndim,
            protocol,
            data,
            seed or (0,),
            steps,
            pairs,
            similarity,
            lambda2,
            row or (),
            test,
            amplitude,
            runs,
            out,
            device,
            command=_typed(),
        )
        typer.echo(tables.as_text(json.loads(file.read_text())))
        typer.echo(f"wrote {file}\n")


def _typed() -> str:
    """The command as it was typed, of paths only the last part."""
    import shlex
    import sys

    words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
    return shlex.join(["regkit", *words])  # sys.argv[0] is __main__.py after `python -m regkit`


@app.command("models")
def models_() -> None:
    """List the models with their parameters, and the shipped weights."""
    from regkit import models

    typer.echo(f"{'model':<24}{'2D':>12}{'3D':>12}   parameters")
    for name in models.names():
        counts = [models.parameter_count(models.create(name, ndim)) for ndim in (2, 3)]
        typer.echo(f"{name:<24}{counts[0]:>12,}{counts[1]:>12,}")
    typer.echo(f"\n{'shipped weights':<24}{'model':<12}{'axes':>4}   voxels in training")
    for name in models.pretrained():
        model = models.load(name)
        spacing = " x ".join(f"{size:g}" for size in model.info.get("spacing", ()))
        typer.echo(f"{name:<24}{model.name:<12}{model.ndim:>4}   {spacing} mm")


@data_app.command("list")
def data_list() -> None:
    """List the open samples: size, whether they are cached, and what they are."""
    from regkit.data import samples
    from regkit.data.cache import cache_folder

    for name, sample in samples.samples().items():
        state = "cached" if samples.cached(name) else f"{sample.bytes / 1e6:.1f} MB"
        typer.echo(f"{name:<22}{state:>10}   {sample.title}")
    typer.echo(f"\ncache folder: {cache_folder()}")


@data_app.command("get")
def data_get(
    names: Annotated[list[str], typer.Argument(help="Names that `regkit data list` shows.")],
) -> None:
    """Fetch open samples into the cache folder (REGKIT_DATA), with their terms."""
    from regkit.data import samples

    known = samples.samples()
    for name in names:
        if name in known:
            typer.echo(f"{name}: {known[name].terms}")
        typer.echo(f"in {samples.fetch(name, progress=True)}")
