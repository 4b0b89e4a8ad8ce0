"""What papers report. Every metric returns one number per image (or per label, or per landmark);
`success_auc` alone looks at many pairs at once.

Nothing here is averaged over a data set or trained through: `regkit.training.evaluation` makes
tables, and `regkit.losses` has the differentiable relatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from regkit.spatial import (
    check_disp,
    check_spacing,
    full_precision,
    jacobian_determinant,
    warp_points,
)


def _check_labels(a: Tensor, b: Tensor, labels: Sequence[int] | Tensor | None) -> list[int]:
    """The labels to compare: those asked for, else all that occur in either map, without 0."""
    if a.shape != b.shape or a.ndim not in (4, 5) or a.shape[1] != 1:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}, "
            "expected the same (B, 1, H, W) or (B, 1, D, H, W)."
        )
    if a.is_floating_point() or b.is_floating_point():
        raise ValueError(f"a is {a.dtype} and b {b.dtype}, expected integer label maps.")
    if labels is None:
        present = torch.unique(torch.cat([a.unique(), b.unique()]))
        return [int(x) for x in present if x != 0]
    for x in labels:
        if int(x) != x or abs(int(x)) >= 2**63:
            raise ValueError(f"labels holds {x}, expected whole numbers that fit into int64.")
    return [int(x) for x in labels]


def _slots(x: Tensor, rising: Tensor) -> Tensor:
    """Each label becomes its place among the labels `rising`; any other their number. int64."""
    x = x.long().contiguous()
    index = torch.searchsorted(rising, x).clamp_max_(len(rising) - 1)
    return index.masked_fill_(rising[index] != x, len(rising))


def dice(a: Tensor, b: Tensor, labels: Sequence[int] | Tensor | None = None) -> Tensor:
    """Overlap 2|A and B| / (|A| + |B|) per label, in [0, 1]; 1 is perfect (Dice 1945).

    Args:
        a, b: (B, 1, *S) integer label maps.
        labels: which labels; by default all that occur in `a` or `b`, in rising order, without 0.

    Returns:
        (B, L) float64. A label in neither image: NaN. In one of them only: 0.
    """
    chosen = _check_labels(a, b, labels)
    if not chosen:
        return torch.empty(len(a), 0, dtype=torch.float64)
    # one pass, in chunks that stay in the cache: count (label in a, label in b) pairs; what was not
    # asked for counts as "rest"
    asked = sorted(set(chosen))
    rising, rest = torch.tensor(asked, device=a.device), len(asked)
    rows = []
    for image_a, image_b in zip(a.flatten(1), b.flatten(1), strict=True):
        counts = torch.zeros((rest + 1) ** 2, dtype=torch.int64, device=a.device)
        for x, y in zip(image_a.split(2**16), image_b.split(2**16), strict=True):
            pairs = _slots(x, rising).mul_(rest + 1).add_(_slots(y, rising))
            counts += torch.bincount(pairs, minlength=len(counts))
        table = counts.reshape(rest + 1, rest + 1).double()
        rows.append(2 * table.diagonal() / (table.sum(0) + table.sum(1)))  # 0/0 is NaN
    order = [asked.index(label) for label in chosen]
    return torch.stack(rows)[:, order].cpu()


def _surfaces(slots: np.ndarray, count: int) -> list[np.ndarray]:
    """For each slot below `count`, its surface as flat indices (n,), in one pass over the image.

    The surface of a label are its voxels that touch another label across a face; beyond the image
    lies another label.
    """
    surface = np.zeros(slots.shape, bool)
    for axis in range(slots.ndim):
        at, on = slots.swapaxes(0, axis), surface.swapaxes(0, axis)
        edge = at[1:] != at[:-1]
        on[1:] |= edge
        on[:-1] |= edge
        on[[0, -1]] = True
    where = np.flatnonzero(surface)
    slot = slots.ravel()[where]
    order = np.argsort(slot, kind="stable")
    ends = np.searchsorted(slot[order], np.arange(1, count + 1))
    return np.split(where[order], ends)[:count]


def _directed95(start: np.ndarray, goal: np.ndarray, shape: Sequence[int], size: Tensor) -> float:
    """95th percentile of the distances from the voxels `start` to their nearest in `goal`."""
    apart = np.setdiff1d(start, goal, assume_unique=True)  # the others are at distance 0
    tree, points = (np.stack(np.unravel_index(x, shape), -1) * size.numpy() for x in (goal, apart))
    # a balanced tree takes longer to build than it saves
    nearest = cKDTree(tree, leafsize=32, compact_nodes=False, balanced_tree=False)
    distance = np.zeros(len(start))
    distance[: len(apart)] = nearest.query(points)[0]
    return float(np.percentile(distance, 95))


def _distance95(on_a: np.ndarray, on_b: np.ndarray, shape: Sequence[int], size: Tensor) -> float:
    """The larger of the two directions; infinity with one surface, NaN with none."""
    if len(on_a) and len(on_b):
        return max(_directed95(*x, shape, size) for x in ((on_a, on_b), (on_b, on_a)))
    return np.inf if len(on_a) or len(on_b) else np.nan


def hd95(
    a: Tensor,
    b: Tensor,
    labels: Sequence[int] | Tensor | None = None,
    spacing: float | Sequence[float] = 1.0,
) -> Tensor:
    """95th percentile Hausdorff distance per label, in [0, inf), in units of `spacing`; 0 is best.

    For each surface voxel of A the distance to the nearest surface voxel of B; the 95th percentile
    of these, the same from B to A, and the larger of the two.

    Args:
        a, b: (B, 1, *S) integer label maps.
        labels: as in `dice`.
        spacing: voxel size, one number or one per axis.

    Returns:
        (B, L) float64. A label in neither image: NaN. In one of them only: infinity.
    """
    chosen = _check_labels(a, b, labels)
    size = check_spacing(spacing, a.ndim - 2)
    result = torch.full((len(a), len(chosen)), torch.nan, dtype=torch.float64)
    if not chosen:
        return result
    asked = sorted(set(chosen))
    maps = (_slots(x.cpu(), torch.tensor(asked)).numpy()[:, 0] for x in (a, b))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for row, pair in enumerate(zip(*maps, strict=True)):
            surfaces = pool.map(_surfaces, pair, repeat(len(asked)))
            distances = pool.map(_distance95, *surfaces, repeat(pair[0].shape), repeat(size))
            for label, distance in zip(asked, distances, strict=True):
                result[row, [label == x for x in chosen]] = distance
    return result


def folding_count(disp: Tensor) -> Tensor:
    """Number of voxels whose Jacobian determinant is zero or negative: (B,), int64."""
    return (jacobian_determinant(disp) <= 0).flatten(1).sum(1)


def folding_percent(disp: Tensor) -> Tensor:
    """Percent of voxels whose Jacobian determinant is zero or negative: (B,), in [0, 100]."""
    return 100 * folding_count(disp) / disp[0, 0].numel()


def sd_log_jacobian(disp: Tensor) -> Tensor:
    """Standard deviation of log det J over the voxels: (B,), in [0, inf); small is smooth.

    The determinant is clipped to [1e-9, 1e9] first, so folded voxels count heavily, not as NaN.
    The standard deviation divides by the number of voxels.
    """
    log_det = jacobian_determinant(disp).clamp(1e-9, 1e9).log()
    return log_det.flatten(1).std(dim=1, correction=0)


@full_precision
def endpoint_error(disp: Tensor, true_disp: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean length of disp - true_disp, in voxels: (B,), in [0, inf).

    Args:
        disp, true_disp: (B, d, *S), voxels.
        mask: (B, 1, *S) optional; only voxels where it is not 0 count. None left: NaN.
    """
    check_disp(disp)
    if disp.shape != true_disp.shape:
        raise ValueError(
            f"true_disp has shape {tuple(true_disp.shape)}, expected that of disp, "
            f"{tuple(disp.shape)}."
        )
    shapes = [(batch, 1, *disp.shape[2:]) for batch in (1, len(disp))]
    if mask is not None and mask.shape not in shapes:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected (B, 1, *S) for disp {tuple(disp.shape)}."
        )
    error: Tensor = (disp - true_disp).norm(dim=1, keepdim=True)
    inside = torch.ones_like(error) if mask is None else (mask != 0).expand_as(error).to(error)
    return (error * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)


@full_precision
def tre(
    disp: Tensor,
    fixed_points: Tensor,
    moving_points: Tensor,
    spacing: float | Sequence[float] = 1.0,
) -> Tensor:
    """Target registration error: distance between mapped and true landmarks, (B, N), in [0, inf).

    Each fixed landmark p is carried to p + disp(p) and compared with its partner in the moving
    image.

    Args:
        disp: (B, d, *S), voxels.
        fixed_points: (B, N, d), voxels of the fixed grid.
        moving_points: (B, N, d), voxels of the moving grid.
        spacing: voxel size of the moving image; the result is in its units.
    """
    if fixed_points.shape != moving_points.shape:
        raise ValueError(
            f"moving_points has shape {tuple(moving_points.shape)}, expected that of fixed_points, "
            f"{tuple(fixed_points.shape)}."
        )
    miss = warp_points(fixed_points, disp) - moving_points
    distance: Tensor = (miss * check_spacing(spacing, miss.shape[-1]).to(miss)).norm(dim=-1)
    return distance


def success_auc(errors: Tensor, limit: int = 25) -> Tensor:
    """Area under the success curve of the FIRE benchmark: 0-d float64, in [0, 1]; 1 is perfect.

    The curve says, for an error from 0 to `limit`, which part of the pairs stays below it
    (Hernandez-Matas et al., Journal for Modeling in Ophthalmology 2017). The area under it is taken
    as published code takes it (Liu et al., SuperRetina, ECCV 2022): the mean of the curve at
    1, 2, ..., `limit`, where a pair counts if its error is less, not equal. Errors below 1 count
    as none.

    Args:
        errors: (P,), one per pair: the mean distance of its control points, `tre(...).mean()`. In
            pixels of FIRE's photographs, which are 2912 wide: `tre` takes the voxel size for that.
            A pair without a result counts as failed: infinity or NaN.
        limit: whole pixels.
    """
    if errors.ndim != 1 or not len(errors):
        raise ValueError(f"errors has shape {tuple(errors.shape)}, expected (P,), one per pair.")
    if (errors < 0).any():
        raise ValueError(f"errors holds {float(errors.min()):g}, expected distances of 0 or more.")
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more.")
    below = errors.double()[:, None] < torch.arange(1, limit + 1, device=errors.device)
    return below.double().mean()


@full_precision
def rotation_error(theta: Tensor, true_theta: Tensor) -> Tensor:
    """The turn that is left between two rigid maps: (B,), degrees, in [0, 180]; 0 is best.

    Args:
        theta, true_theta: (B, d, d+1), voxels, on cubic voxels. Of an affine map the nearest
            rotation counts (its polar factor).
    """
    a, b = (_rotation(x, name) for x, name in ((theta, "theta"), (true_theta, "true_theta")))
    left = a @ b.transpose(1, 2)
    d = left.shape[-1]
    # |R - I| is 2 sqrt(2) sin(angle / 2); the cosine alone loses small angles in rounding
    one = torch.eye(d, device=left.device, dtype=left.dtype)
    chord: Tensor = (left - one).flatten(1).norm(dim=1)
    angle: Tensor = torch.rad2deg(2 * torch.asin((chord / 8**0.5).clamp(max=1)))
    return angle


def _rotation(theta: Tensor, name: str) -> Tensor:
    if theta.ndim != 3 or theta.shape[1] not in (2, 3) or theta.shape[2] != theta.shape[1] + 1:
        raise ValueError(f"{name} has shape {tuple(theta.shape)}, expected (B, 2, 3) or (B, 3, 4).")
    u: Tensor
    u, _, v = torch.linalg.svd(theta[:, :, :-1].double())
    rotation: Tensor = u @ v
    return rotation


@full_precision
def translation_error(theta: Tensor, true_theta: Tensor) -> Tensor:
    """How far apart two affine maps send the centre of the image: (B,), voxels; 0 is best.

    Args:
        theta, true_theta: (B, d, d+1), voxels.
    """
    _rotation(theta, "theta"), _rotation(true_theta, "true_theta")
    distance: Tensor = (theta[:, :, -1] - true_theta[:, :, -1]).norm(dim=1)
    return distance
