"""What each model costs at 160x192x160: writes results/model_costs.json.

    python studies/model_costs.py                  # all three parts
    python studies/model_costs.py --part counts    # what no clock measures: a few minutes

Counts: parameters, multiply-adds of a pair, and the memory that a step of training keeps for its
way back, in float32 and under bfloat16, with and without `save_memory`; see `regkit.models.cost`.
null where a model has no `save_memory`. They do not depend on the machine.

Seconds: one pair in use, on one thread, each in a process of its own, in float32 and under
bfloat16, channels first and last. Whether bfloat16 is faster depends on the processor. Weights are
those of a fresh model.

Compiled: the same pair of some models, with `torch.compile` for this shape and without it. What
compiling takes is left out: it comes once for a shape. It needs a C++ compiler.

A row that is there is not made again.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Mapping
from typing import Annotated, Any

import common
import typer

from regkit import models
from regkit.models import cost
from regkit.record import Row, Rows, made_now

OUT = common.RESULTS / "model_costs.json"
SHAPE = (160, 192, 160)
# each model as it is, and other sizes of those that have sizes
OTHERS = {
    "transmorph": [{"size": "tiny"}, {"size": "small"}, {"size": "large"}],
    "utsrmorph": [{"size": "small"}, {"size": "small", "form": "ixi"}],
}
MODELS = [(name, options) for name in models.names() for options in [{}, *OTHERS.get(name, [])]]
COMPILED = ("vxm", "dense_unet_eca", "transmorph", "h_sganet", "unfolding")
SETTINGS = list(itertools.product((False, True), repeat=2))


def label(name: str, options: Mapping[str, Any]) -> str:
    """A model and its options in words: "transmorph, tiny"."""
    return ", ".join([name, *options.values()])


def counts(name: str, options: Mapping[str, Any], shape: tuple[int, ...] = SHAPE) -> Row:
    """billions: of multiply-adds. kept, kept_bf16, kept_saving, kept_saving_bf16: bytes."""
    plain = cost.count(name, len(shape), shape, **options)
    row: Row = {"parameters": plain.parameters, "multiply_adds": plain.multiply_adds}
    row["billions"] = plain.multiply_adds / 1e9
    known = cost.saves_memory(name, **options)
    for saving, bf16 in SETTINGS:
        key = "kept" + "_saving" * saving + "_bf16" * bf16
        more = {"save_memory": True} if saving else {}
        fits = known or not saving
        made = cost.count(name, len(shape), shape, bf16=bf16, **options, **more) if fits else None
        row[key] = made.kept if made else None
    return row


def seconds(name: str, options: Mapping[str, Any], shape: tuple[int, ...] = SHAPE) -> Row:
    """seconds, seconds_bf16, seconds_last, seconds_last_bf16; load: of the machine."""
    return timed(name, options, shape, "channels_last", "last")


def compiled(name: str, options: Mapping[str, Any], shape: tuple[int, ...] = SHAPE) -> Row:
    """seconds, seconds_bf16, seconds_compiled, seconds_compiled_bf16; load: of the machine."""
    return timed(name, options, shape, "compiled", "compiled")


def timed(
    name: str, options: Mapping[str, Any], shape: tuple[int, ...], argument: str, word: str
) -> Row:
    """Seconds with and without one argument of `cost.seconds`, in float32 and under bfloat16."""
    row: Row = {"load": made_now()["load"]}
    for given, bf16 in SETTINGS:
        arguments = {"bf16": bf16, argument: given, **options}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(_alone, (name, shape, arguments))
        row["seconds" + f"_{word}" * given + "_bf16" * bf16] = found
    return row


def _alone(name: str, shape: tuple[int, ...], arguments: Row) -> float:
    common.use_threads(1)
    return cost.seconds(name, len(shape), shape, **arguments)


def main(
    part: Annotated[
        str, typer.Option(help="counts, seconds, compiled, or some with blanks between.")
    ] = "counts seconds compiled",
    model: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given again.")
    ] = None,
    out: common.Out = OUT,
) -> None:
    """Fill the table of costs, row by row."""
    common.check_names("part", part.split(), ("counts", "seconds", "compiled"))
    common.check_names("model", model or [], models.names())
    common.use_threads(1)
    fields = {"made": common.made(__file__), "shape": SHAPE}
    parts = {"counts": counts, "seconds": seconds, "compiled": compiled}
    for name, measure in parts.items():
        rows = Rows(out, ("label",), fields, within=name)
        if not rows.rows:
            rows.put()  # an empty table, which the page can show
        if name not in part.split():
            continue
        for architecture, options in MODELS:
            if model and architecture not in model:
                continue
            if name == "compiled" and (options or architecture not in COMPILED):
                continue
            title = label(architecture, options)
            common.measure_once(
                rows,
                {"label": title, "model": architecture, "options": options},
                f"{name} of {title}",
                lambda a=architecture, o=options, f=measure: f(a, o),
                lambda numbers: ", ".join(f"{k} {v}" for k, v in numbers.items()),
            )


if __name__ == "__main__":
    common.start(main)
