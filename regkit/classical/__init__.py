"""Methods that optimise one pair of images, without a network.

`fit` finds a rigid or affine map by descent. `align` does so in physical space and refuses what is
no answer; `aligned` says what it refused, and `affine` gives the answer as displacement. `shift`
looks at all shifts, also large ones; `refine` improves a displacement. `sitk` and `ants` are thin
wrappers of SimpleITK and ANTs, to compare with; `ants.syn` is deformable.
"""

from regkit.classical import ants, sitk
from regkit.classical.linear import fit
from regkit.classical.refine import refine
from regkit.classical.shift import shift
from regkit.classical.space import Aligned, affine, align, aligned

__all__ = ["Aligned", "affine", "align", "aligned", "ants", "fit", "refine", "shift", "sitk"]
