"""Methods that optimise one pair of images, without a network.

`fit` finds a rigid or affine map by descent. `align` does so in physical space and refuses what is
no answer; `aligned` says what it refused, and `affine` gives the answer as displacement. `shift`
looks at all shifts, also large ones. `greedy`, the engine, finds a smooth displacement, from
nothing or from the answer of a network; `lddmm` the shortest flow of diffeomorphisms; `refine`
follows the gradient of one energy. `sitk`, `ants`, `picsl` and `elastix` are thin wrappers of
SimpleITK, ANTs, greedy and elastix, to compare with; `ants.syn`, `picsl.greedy`, `elastix.bspline`,
`sitk.demons` and `sitk.bspline` are deformable.
"""

from regkit.classical import ants, elastix, picsl, sitk
from regkit.classical.deformation import Deformation
from regkit.classical.greedy import DISSIMILARITIES, EFFORTS, disagreement, expected, greedy
from regkit.classical.lddmm import lddmm
from regkit.classical.linear import fit
from regkit.classical.refine import refine
from regkit.classical.shift import shift
from regkit.classical.space import Aligned, affine, align, aligned

__all__ = [
    "DISSIMILARITIES",
    "EFFORTS",
    "Aligned",
    "Deformation",
    "affine",
    "align",
    "aligned",
    "ants",
    "disagreement",
    "elastix",
    "expected",
    "fit",
    "greedy",
    "lddmm",
    "picsl",
    "refine",
    "shift",
    "sitk",
]
