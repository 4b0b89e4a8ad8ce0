"""What papers report. Every metric returns one number per image (or per label, or per landmark).

Nothing here is averaged over a data set or trained through: `regkit.evaluate` makes tables, and
`regkit.losses` has the differentiable relatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
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


def _slots(x: Tensor, labels: list[int]) -> Tensor:
    """Each label replaced by its place in the rising list; other voxels by the list's length."""
    lookup = torch.tensor(labels, device=x.device)
    index = torch.searchsorted(lookup, x.long().contiguous()).clamp_max_(len(labels) - 1)
    return index.masked_fill_(lookup[index] != x, len(labels))


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
    # one pass: count (label in a, label in b) pairs; what was not asked for counts as "rest"
    asked = sorted(set(chosen))
    rest = len(asked)
    rows = []
    for pair in _slots(a, asked).mul_(rest + 1).add_(_slots(b, asked)):
        counts = torch.bincount(pair.flatten(), minlength=(rest + 1) ** 2)
        table = counts.reshape(rest + 1, rest + 1).double()
        rows.append(2 * table.diagonal() / (table.sum(0) + table.sum(1)))  # 0/0 is NaN
    order = [asked.index(label) for label in chosen]
    return torch.stack(rows)[:, order].cpu()


def _surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask that touch its outside across a face; the array's border is outside."""
    return mask & ~ndimage.binary_erosion(mask)


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
    size = check_spacing(spacing, a.ndim - 2).numpy()
    result = torch.full((len(a), len(chosen)), torch.nan, dtype=torch.float64)
    if not chosen:
        return result
    asked = sorted(set(chosen))
    # find_objects takes the labels 1, 2, ... and gives the box of each, or None: one pass for all
    maps_a, maps_b = (((_slots(x, asked) + 1) % (len(asked) + 1)).cpu().numpy() for x in (a, b))
    for row, (map_a, map_b) in enumerate(zip(maps_a[:, 0], maps_b[:, 0], strict=True)):
        boxes = [ndimage.find_objects(x, max_label=len(asked)) for x in (map_a, map_b)]
        for number, (box_a, box_b) in enumerate(zip(*boxes, strict=True), start=1):
            if box_a is None and box_b is None:
                continue
            distance = np.inf
            if box_a is not None and box_b is not None:
                # distances only matter inside the box that holds both
                box = tuple(
                    slice(min(i.start, k.start), max(i.stop, k.stop))
                    for i, k in zip(box_a, box_b, strict=True)
                )
                on_a, on_b = (_surface(x[box] == number) for x in (map_a, map_b))
                from_a = ndimage.distance_transform_edt(~on_b, sampling=size)[on_a]
                from_b = ndimage.distance_transform_edt(~on_a, sampling=size)[on_b]
                distance = max(np.percentile(from_a, 95), np.percentile(from_b, 95))
            result[row, [label == asked[number - 1] for label in chosen]] = distance
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
    error = (disp - true_disp).norm(dim=1, keepdim=True)
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
    return (miss * check_spacing(spacing, miss.shape[-1]).to(miss)).norm(dim=-1)
