"""How far to trust a registration, place by place: `trust_map`.

Nobody knows the error of an answer, but some things go with it. Three of them count here, each a
mean over about 15 mm:

- "consistency": how far a second run, from the fixed image to the moving one, is from undoing the
  first, in mm (Christensen and Johnson 2001). It tells most.
- "texture": what the fixed image can tell about a place. Along an edge nobody sees a shift (the
  aperture problem), in a flat region there is none to see. T, the mean of grad f grad f^T, is the
  information about a shift (Förstner 1986): tr T^-1 is the square of the error that noise makes.
- "difference": 1 - r^2 with the local correlation r, what a line from one image to the other
  leaves unexplained. The line lets two contrasts meet.

The volume change |J| does not count, as it did not go with the error, but a fold is not trusted.

The expected error in mm is exp(constant + the sum of weight x cue), the first two cues as
logarithms. The weights are a least-squares fit to the true error of registrations of the embedded
population, by studies/trust.py; results/trust.json says how well the order of the voxels agrees
with that of their errors on other subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from regkit import classical
from regkit.spatial import check_disp, check_spacing, compose, jacobian_determinant

WINDOW = 15.0  # mm: width of a box that is applied twice
HALF = 2.0  # mm: the expected error at which trust is a half
LEAST = 0.4  # mm: differences below it say nothing
FEW = 1_000_000  # voxels of an image for which the second run goes to the end
WEIGHTS = {  # with a second run, and without one
    True: {"constant": -0.43, "consistency": 1.04, "texture": 0.08, "difference": 0.28},
    False: {"constant": 0.29, "texture": 0.29, "difference": 1.11},
}
Mean = Callable[[Tensor], Tensor]


def trust_map(
    moved: Tensor,
    fixed: Tensor,
    disp: Tensor,
    inverse: Tensor | None = None,
    spacing: float | Sequence[float] = 1.0,
) -> Tensor:
    """How far each voxel of a registration may be trusted: 1 fully, 0.5 for an error of 2 mm.

    It ranks the places of one image and is no probability. The top of this module says how.

    Args:
        moved, fixed: (1, 1, *S), on the fixed grid, intensities of any scale.
        disp: (1, d, *S), voxels, of that grid: what made `moved`.
        inverse: (1, d, *S), voxels: the answer of a second run from the fixed image to the moving
            one on the same grid, see `second_run`. An inverse that is computed from `disp` tells
            nothing: it always agrees. None: without this cue.
        spacing: voxel size along each axis, mm.

    Returns:
        (1, 1, *S) float32 in [0, 1], on the device of `fixed`; 0 where the map folds.

    Raises:
        ValueError: shapes that do not fit, a wrong spacing.
    """
    found = cues(moved, fixed, disp, inverse, spacing)
    weights = WEIGHTS[inverse is not None]
    log_error = weights["constant"] + sum(weights[name] * cue for name, cue in found.items())
    trust = 1 / (1 + (torch.as_tensor(log_error).exp() / HALF).square())
    folded = jacobian_determinant(disp.to(trust))[:, None] <= 0
    return trust.masked_fill(folded, 0.0)


def second_run(
    moving: Tensor,
    fixed: Tensor,
    spacing: float | Sequence[float] = 1.0,
    similarity: str = "lncc",
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
) -> Tensor:
    """The engine's map from the fixed image to the moving one, to hold another answer against.

    At effort "fast", or "best" where that is cheap: in an image of few voxels these are wide, and
    without the last level the map is too coarse to compare with. In 2D by MIND instead of lncc:
    what looks at something else errs elsewhere. (In coarse 3D images MIND sees too little.)

    Args:
        moving, fixed, spacing, similarity, mask, moving_mask: as of `regkit.classical.greedy`, for
            the first direction.

    Returns:
        (1, d, *S), voxels: `inverse` of `trust_map`.
    """
    effort = "best" if fixed.numel() < FEW else "fast"
    if fixed.ndim == 4 and similarity == "lncc":
        similarity = "mind"
    return classical.greedy(
        fixed,
        moving,
        spacing=spacing,
        similarity=similarity,
        effort=effort,
        mask=moving_mask,
        moving_mask=mask,
    ).disp


def cues(
    moved: Tensor,
    fixed: Tensor,
    disp: Tensor,
    inverse: Tensor | None = None,
    spacing: float | Sequence[float] = 1.0,
) -> dict[str, Tensor]:
    """What `trust_map` weighs, by name; a larger value means a larger error.

    Args:
        moved, fixed, disp, inverse, spacing: as there.

    Returns:
        name -> (1, 1, *S): the logarithm of mm for "consistency", of what is typical of the image
        for "texture"; "difference" in [0, 1].
    """
    check_disp(disp)
    for name, image in (("moved", moved), ("fixed", fixed)):
        if image.shape != (1, 1, *disp.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}, expected {(1, 1, *disp.shape[2:])} as of "
                f"disp, {tuple(disp.shape)}."
            )
    if inverse is not None and inverse.shape != disp.shape:
        raise ValueError(
            f"inverse has shape {tuple(inverse.shape)}, expected that of disp, {tuple(disp.shape)}."
        )
    size = check_spacing(spacing, disp.shape[1]).tolist()
    f = fixed.detach().float()
    m, f = (x - x.mean() for x in (moved.detach().to(f), f))  # variances are differences
    mean, whole = _means(f.shape[2:], size)
    found = {"texture": _texture(f, size, mean), "difference": _difference(m, f, mean)}
    if inverse is not None:
        apart = compose(inverse.detach().to(f), disp.detach().to(f))[0].movedim(0, -1)
        length = (apart * apart.new_tensor(size)).square().sum(-1).sqrt()
        found["consistency"] = (mean(length[None, None]) + LEAST).log()
    return {name: whole(cue) for name, cue in found.items()}


def _means(shape: Sequence[int], size: Sequence[float]) -> tuple[Mean, Mean]:
    """The mean over a window, on a grid about a third of it apart; and from there to all voxels."""
    steps = [min(n, max(1, round(WINDOW / 3 / s))) for n, s in zip(shape, size, strict=True)]
    beyond = [-n % k for n, k in zip(shape, steps, strict=True)]
    boxes = [1 + 2 * round((WINDOW / (k * s) - 1) / 2) for k, s in zip(steps, size, strict=True)]
    pool = F.avg_pool2d if len(shape) == 2 else F.avg_pool3d

    def mean(x: Tensor) -> Tensor:
        x = F.pad(x, [n for k in reversed(beyond) for n in (0, k)], mode="replicate")
        x = pool(x, steps)
        boxed = [max(1, min(b, n - 1 + n % 2)) for b, n in zip(boxes, x.shape[2:], strict=True)]
        for _ in range(2):
            x = pool(x, boxed, 1, [b // 2 for b in boxed], count_include_pad=False)
        return x

    def whole(x: Tensor) -> Tensor:
        mode = "bilinear" if len(shape) == 2 else "trilinear"
        x = F.interpolate(x, [n * k for n, k in zip(x.shape[2:], steps)], mode=mode)
        for axis, n in enumerate(shape):
            x = x.narrow(axis + 2, 0, n)
        return x

    return mean, whole


def _texture(f: Tensor, size: Sequence[float], mean: Mean) -> Tensor:
    """log of sqrt(tr T^-1), in units of what is typical of the image.

    Typical is the mean of tr T, weighted by itself, so that background does not count. A thousandth
    of it is added to the diagonal: what is flatter is flat.
    """
    axes = [k for k, n in enumerate(f.shape[2:]) if n > 1]
    slopes = [torch.gradient(f, spacing=size[k], dim=k + 2)[0] for k in axes]
    rows = [torch.cat([mean(a * b) for a in slopes], 1).movedim(1, -1) for b in slopes]
    tensor = torch.stack(rows, -1)
    trace = tensor.diagonal(dim1=-2, dim2=-1).sum(-1)
    typical = trace.square().sum() / trace.sum().clamp(min=1e-30)
    tensor = tensor / typical.clamp(min=1e-30) + 1e-3 * torch.eye(len(axes)).to(f)
    variance: Tensor = torch.linalg.inv(tensor).diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * variance.log()[:, None]


def _difference(m: Tensor, f: Tensor, mean: Mean) -> Tensor:
    """1 - r^2 in each window; 1 where one of the images shows nothing."""
    mean_m, mean_f = mean(m), mean(f)
    var_m, var_f = mean(m * m) - mean_m**2, mean(f * f) - mean_f**2
    covariance = mean(m * f) - mean_m * mean_f
    floor = 1e-4 * var_m.amax() * var_f.amax() + 1e-30
    product = var_m.clamp(min=0) * var_f.clamp(min=0) + floor
    squared: Tensor = covariance.square() / product
    return (1 - squared).clamp(0, 1)
