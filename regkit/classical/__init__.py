"""Methods that optimise one pair of images, without a network.

`fit` finds a rigid or affine map by descent, and `align` does so in physical space; `affine` gives
its answer as displacement. `shift` looks at all shifts, also large ones; `refine` improves a
displacement. `sitk`, `ants`, `picsl` and `elastix` are thin wrappers of SimpleITK, ANTs, greedy and
elastix, to compare with; `ants.syn`, `picsl.greedy` and `elastix.bspline` are deformable.
"""

from regkit.classical import ants, elastix, picsl, sitk
from regkit.classical.linear import affine, align, fit
from regkit.classical.refine import refine
from regkit.classical.shift import shift

__all__ = ["affine", "align", "ants", "elastix", "fit", "picsl", "refine", "shift", "sitk"]
