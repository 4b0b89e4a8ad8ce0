"""One person, real or synthetic: an image, its labels, and its place in space."""

from __future__ import annotations

from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from regkit.data.template import resample_velocity
from regkit.transform import Grid


@dataclass(frozen=True, eq=False)
class Subject:
    """An image with its labels, and what is known of it. What is not known is an empty tensor.

    name: such as "population-0-0007" (seed, index), or that of a file or folder.
    image: (1, *S) float32; in [0, 1] where it was made or prepared to learn from.
    labels: (1, *S), whole numbers.
    affine: (4, 4) float64, voxel -> RAS mm; of a 2D slice the third axis runs across it.
    velocity: (d, *L) float32, mm per unit time, of the embedded population, on a coarse lattice
        (`svf` resamples it); without it the true correspondence is not known.
    points: (N, d) float32, voxels, landmarks; of the two images of a pair, row k of both is one
        place.
    """

    name: str
    image: Tensor
    labels: Tensor
    affine: np.ndarray
    velocity: Tensor = field(default_factory=lambda: torch.empty(0))
    points: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def grid(self) -> Grid:
        """Its voxels, and where they lie."""
        array = self.image if self.image.numel() else self.labels
        return Grid(tuple(array.shape[1:]), self.affine)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along each array axis, mm."""
        return self.grid.spacing

    @property
    def svf(self) -> Tensor:
        """(1, d, *S), voxels per unit time: subject(x) = template(x + integrate(svf)(x))."""
        return resample_velocity(self.velocity, self.image.shape[1:])

    def nifti(self, labels: bool = False) -> nib.Nifti1Image:
        """The image, or the label map, as a nibabel image, which `regkit.register` takes.

        Raises:
            ValueError: there is none.
        """
        data = self.labels if labels else self.image
        if not data.numel():
            raise ValueError(
                f"labels is {labels}, but the scan {self.name!r} has no "
                f"{'label map' if labels else 'image'}."
            )
        return nib.Nifti1Image(data[0].numpy(), self.affine)
