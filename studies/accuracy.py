"""How exact the warp and its relatives are: writes results/accuracy.json.

    python studies/accuracy.py

Two kinds of question. Where a field has a closed form, the answer is compared with it: plane waves
for the warp, a stretch and a vortex for the exponential, a slope for the inverse. The embedded
population shows what remains of that on brains, where two ways to the same place are compared.
Everything is deterministic, runs on the CPU, and takes under a minute. The page `book/accuracy.md`
shows the numbers; `book/tools/figures.py` draws them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.data import population
from regkit.record import Row, rounded, write_json
from regkit.spatial import (
    affine_to_disp,
    compose,
    identity_grid,
    integrate,
    invert,
    jacobian_determinant,
    rigid_theta,
    warp,
)

OUT = common.RESULTS / "accuracy.json"
BRAIN = (80, 96, 80)  # voxels of 2.2 mm
DOUBLE = torch.float64


def length(field: Tensor) -> Tensor:
    """Lengths of the vectors of a field (B, d, *S): (B, *S)."""
    return field.norm(dim=1)


def spread(error: Tensor) -> dict[str, float]:
    """Mean, 99.9th percentile and largest value of an error."""
    values = error.flatten().double()
    rank = max(1, math.ceil(0.999 * values.numel()))
    return {
        "mean": float(values.mean()),
        "p999": float(values.kthvalue(rank).values),
        "largest": float(values.max()),
    }


# ------------------------------------------------------------------------------------- the warp


def waves(coords: Tensor, wavelength: float) -> Tensor:
    """A wave along each axis, averaged: values in [-1, 1] at coordinates (B, d, *S)."""
    return torch.cos(2 * math.pi * coords / wavelength).mean(dim=1, keepdim=True)


def swirl(coords: Tensor, size: float, wavelength: float) -> Tensor:
    """A smooth field (B, d, *S), at most `size` along each axis; the axes depend on each other."""
    angle = 2 * math.pi / wavelength * coords
    return size * torch.sin(angle.roll(1, dims=1)) * torch.cos(angle)


def interpolation(wavelengths: Sequence[float], n: int = 48, margin: int = 8) -> list[Row]:
    """Error of a linear warp of waves of amplitude 1, in 3D, against the wave at the true place."""
    x = identity_grid((n,) * 3, dtype=DOUBLE)[None]
    disp = swirl(x, 3.0, 40.0)
    inside = (..., *[slice(margin, -margin)] * 3)  # beyond the border there is no image
    rows = []
    for wavelength in wavelengths:
        moved = warp(waves(x, wavelength), disp)
        error = (moved - waves(x + disp, wavelength)).abs()[inside]
        rows.append(
            {
                "wavelength": wavelength,
                "largest": float(error.max()),
                "rms": float(error.square().mean().sqrt()),
                "bound": 1 - math.cos(math.pi / wavelength),
            }
        )
    return rows


# --------------------------------------------------------------------------------- composition


def composition(wavelengths: Sequence[float], n: int = 96, margin: int = 12) -> list[Row]:
    """compose(first, then) against the closed form, for fields of 3 voxels, in 2D."""
    x = identity_grid((n, n), dtype=DOUBLE)[None]
    then = swirl(x, 3.0, 40.0)
    inside = (..., *[slice(margin, -margin)] * 2)
    rows = []
    for wavelength in wavelengths:
        exact = then + swirl(x + then, 3.0, wavelength)
        error = length(compose(swirl(x, 3.0, wavelength), then) - exact)[inside]
        rows.append({"wavelength": wavelength, **spread(error)})
    return rows


def turns(image: Tensor, n: int = 36) -> dict[str, Tensor]:
    """A full turn in n steps: `many` warps the image n times, `once` warps it by the composed map.

    Args:
        image: (1, 1, N, N); what lies outside the inscribed disc is lost.
    """
    angle = torch.full((1, 1), 2 * math.pi / n, dtype=image.dtype)
    theta = rigid_theta(angle, torch.zeros(1, 2, dtype=image.dtype))
    step = affine_to_disp(theta, image.shape[2:])
    many, disp = image, torch.zeros_like(step)
    for _ in range(n):
        many = warp(many, step)
        disp = compose(disp, step)
    return {"many": many, "once": warp(image, disp), "disp": disp}


def slice_to_turn() -> tuple[Tensor, Tensor]:
    """An axial brain slice (1, 1, 224, 224) of 1.1 mm in the middle, and its head."""
    subject = population(1, (160, 192))[0]
    image = F.pad(subject.image[None], (16, 16, 32, 32))
    return image, F.pad(subject.labels[None], (16, 16, 32, 32)) > 0


def full_turn(n: int = 36) -> dict[str, float]:
    """What a full turn in n steps leaves of a brain slice: mean absolute error inside the head."""
    image, head = slice_to_turn()
    result = turns(image, n)
    return {
        "steps": n,
        **{key: float((result[key] - image).abs()[head].mean()) for key in ("many", "once")},
        "voxels": float(length(result["disp"])[head[:, 0]].max()),
        "contrast": float(image[head].std()),
    }


# ----------------------------------------------------------------------------------- the inverse


def slope(x: Tensor, steepness: float, width: float = 6.0) -> Tensor:
    """A displacement (1, d, *S), each axis alone, whose derivative is `steepness` at the centre.

    Above 0 it stretches, 1 + steepness times at most; below 0 it squeezes, and folds below -1.
    """
    centre = (x.shape[-1] - 1) / 2
    return steepness * width * torch.tanh((x - centre) / width)


def both_orders(disp: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of compose(disp, inverse) and of compose(inverse, disp): voxels, 0 if exact."""
    return length(compose(disp, inverse)), length(compose(inverse, disp))


def inversion(steepness: Sequence[float], iterations: Sequence[int], n: int = 96) -> list[Row]:
    """The largest residuals of the inverse of slopes, in voxels."""
    x = identity_grid((n, n), dtype=DOUBLE)[None]
    rows = []
    for s in steepness:
        disp = slope(x, s)
        for k in iterations:
            first, second = both_orders(disp, invert(disp, iterations=k))
            rows.append(
                {
                    "steepness": s,
                    "iterations": k,
                    "residual": float(first.max()),
                    "other_order": float(second.max()),
                }
            )
    return rows


# --------------------------------------------------------------------------------- exponentials


def stretch(x: Tensor, size: float, wavelength: float = 32.0) -> tuple[Tensor, Tensor]:
    """v_i = size sin(k x_i), and its displacement: tan(k y_i/2) = tan(k x_i/2) exp(size k)."""
    k = 2 * math.pi / wavelength
    half = torch.remainder(k * x / 2 + math.pi / 2, math.pi) - math.pi / 2
    moved = torch.atan2(half.sin() * math.exp(size * k), half.cos())
    return size * torch.sin(k * x), 2 * (moved - half) / k


def vortex(x: Tensor, size: float, width: float = 10.0) -> tuple[Tensor, Tensor]:
    """A whirl in 2D with max|v| = size, and its displacement: each ring turns by its own angle."""
    a, b = (x - (x.shape[-1] - 1) / 2).unbind(1)
    angle = size / width * torch.exp(0.5 - (a**2 + b**2) / (2 * width**2))
    cos, sin = angle.cos(), angle.sin()
    disp = torch.stack([cos * a - sin * b - a, sin * a + cos * b - b], dim=1)
    return torch.stack([-angle * b, angle * a], dim=1), disp


def exponentials(sizes: Sequence[float], steps: Sequence[int], n: int = 97) -> list[Row]:
    """integrate(v) against the closed form, and exp(v) o exp(-v) against the identity: voxels."""
    x = identity_grid((n, n), dtype=DOUBLE)[None]
    rows = []
    for name, field in (("stretch", stretch), ("vortex", vortex)):
        for size in sizes:
            svf, exact = field(x, size)
            for k in steps:
                there, back = integrate(svf, k), integrate(-svf, k)
                rows.append(
                    {
                        "field": name,
                        "size": size,
                        "steps": k,
                        "error": float(length(there - exact).max()),
                        "residual": float(length(compose(there, back)).max()),
                    }
                )
    return rows


# -------------------------------------------------------------------------------------- on brains


def away_from_border(field: Tensor, margin: int) -> Tensor:
    """The values (B, *S) of voxels that are at least `margin` away from the border."""
    return field[(..., *[slice(margin, -margin)] * (field.ndim - 1))]


def brain_exponentials(svf: Tensor, sizes: Sequence[float], steps: Sequence[int]) -> list[Row]:
    """exp(v) o exp(-v) for the velocity of a subject, scaled so that max|v| is `size` voxels.

    The velocity does not vanish at the border of the image, and beyond it nothing is known: the
    spread is that of the voxels further than `size` + 2 from the border.
    """
    rows = []
    for size in sizes:
        scaled = svf * (size / length(svf).max())
        for k in steps:
            residual = length(compose(integrate(scaled, k), integrate(-scaled, k)))
            rows.append(
                {
                    "size": size,
                    "steps": k,
                    **spread(away_from_border(residual, math.ceil(size) + 2)),
                    "with_border": float(residual.max()),
                }
            )
    return rows


def brain_inverses(svf: Tensor, margin: int = 9) -> list[Row]:
    """Two ways back from the displacement of a subject, each in both orders: voxels."""
    disp = integrate(svf)
    rows = []
    for name, inverse in (("invert(disp)", invert(disp)), ("integrate(-svf)", integrate(-svf))):
        first, second = both_orders(disp, inverse)
        for order, residual in (("compose(disp, w)", first), ("compose(w, disp)", second)):
            inside = away_from_border(residual, margin)
            rows.append({"inverse": name, "order": order, **spread(inside)})
    return rows


def precision(svf: Tensor) -> list[Row]:
    """The largest difference between float32 and float64 on the displacement of a subject."""
    disp = integrate(svf.double())
    operations = {
        "integrate": (integrate, svf),
        "compose": (lambda u: compose(u, u), disp),
        "invert": (invert, disp),
        "jacobian_determinant": (jacobian_determinant, disp),
    }
    rows = []
    for n in (64, 256, 512):  # a ramp: linear interpolation is exact on it and returns the place
        x = identity_grid((n, 16), dtype=DOUBLE)[None]
        disp_2d = swirl(x, 3.0, 40.0)
        places = [warp(x[:, :1].to(t), disp_2d.to(t)).double() for t in (torch.float32, DOUBLE)]
        gap = (places[0] - places[1])[:, :, 4:-4, 4:-4].abs().max()
        rows.append({"operation": f"the place where warp looks, {n} voxels", "largest": float(gap)})
    for name, (operation, field) in operations.items():
        gap = operation(field.float()).double() - operation(field.double())
        rows.append({"operation": name, "largest": float(gap.abs().max())})
    return rows


# -------------------------------------------------------------------------------------- the file

WAVELENGTHS = (3, 5, 8, 12, 16, 24, 32, 48)
STEEPNESS = (-1.5, -1.3, -1.1, -0.9, -0.5, 0.5, 1.0, 1.5, 1.7, 1.8, 1.9, 2.0)
ITERATIONS = (1, 3, 10, 30, 100)
SIZES = (0.5, 1, 2, 4, 8)
STEPS = (1, 3, 5, 7, 9)


def measure() -> dict[str, Any]:
    """All measurements."""
    svf = population(1, BRAIN)[0].svf
    exponential = exponentials(SIZES, STEPS)
    usual = [row for row in exponential if row["steps"] == 7 and row["size"] <= 2]
    return {
        "interpolation": interpolation(WAVELENGTHS),
        "composition": composition(WAVELENGTHS),
        "turn": full_turn(),
        "inverse": inversion(STEEPNESS, ITERATIONS),
        "exponential": exponential,
        # seven steps, max|v| of two voxels at most
        "exponential_worst": max(row["residual"] for row in usual),
        "brain": {
            "largest_velocity": float(length(svf).max()),
            "exponential": brain_exponentials(svf, (2, 4, 8), STEPS[1:]),
            "inverse": brain_inverses(svf),
        },
        "precision": precision(svf),
    }


def main() -> None:
    start = time.perf_counter()
    made = common.made(__file__)
    # four digits: what differs between machines is left out
    write_json(OUT, {"made": made, **rounded(measure())})
    print(f"results/accuracy.json, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
