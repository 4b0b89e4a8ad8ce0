"""The shift between two images, found by looking at all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.spatial import full_precision


@full_precision
def shift(moving: Tensor, fixed: Tensor) -> Tensor:
    """The whole shift at which the two images have the largest cross-correlation.

    The sum of moving(x + t) fixed(x) over all x, for every t at which they overlap at all, takes
    three Fourier transforms. It finds shifts that a descent does not, half an image wide, where
    little else is between the images: turns of up to about ten degrees, say. Beyond its border an
    image counts as 0, so the background should be 0 as well: of brains, as they are, of photographs
    of the retina after `regkit.data.vessels.vessel_contrast`.

    Args:
        moving: (1, 1, *M), fixed: (1, 1, *S).

    Returns:
        (1, d, d+1) = [I | t], voxels, fixed voxel -> moving voxel, where `classical.fit` may start.
    """
    d = fixed.ndim - 2
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.shape[:2] != (1, 1) or image.ndim not in (4, 5) or image.ndim != fixed.ndim:
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}, expected (1, 1, H, W) or (1, 1, D, H, W), "
                "as the other."
            )
    axes, sizes = tuple(range(-d, 0)), moving.shape[2:]
    wide = [m + s - 1 for m, s in zip(sizes, fixed.shape[2:], strict=True)]
    a, b = (torch.fft.rfftn(image[0, 0], wide, axes) for image in (moving, fixed))
    correlation = torch.fft.irfftn(a * b.conj(), wide, axes)
    best = torch.unravel_index(correlation.argmax(), correlation.shape)
    # what lies behind the end of the moving image is a shift the other way
    t = [int(k) - n if k >= m else int(k) for k, m, n in zip(best, sizes, wide, strict=True)]
    return torch.cat([torch.eye(d), torch.tensor(t)[:, None]], dim=1)[None].to(fixed)
