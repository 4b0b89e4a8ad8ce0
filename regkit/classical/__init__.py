"""Methods that optimise one pair of images, without a network.

`fit` finds a rigid or affine map by descent, and `align` does so in physical space; `affine` gives
its answer as displacement. `shift` looks at all shifts, also large ones; `refine` improves a
displacement. `sitk` and `ants` are thin wrappers of SimpleITK and ANTs, to compare with; `ants.syn`
is deformable.
"""

from regkit.classical import ants, sitk
from regkit.classical.deformation import Deformation
from regkit.classical.greedy import greedy
from regkit.classical.linear import affine, align, fit
from regkit.classical.refine import refine
from regkit.classical.shift import shift

__all__ = ["Deformation", "affine", "align", "ants", "fit", "greedy", "refine", "shift", "sitk"]
