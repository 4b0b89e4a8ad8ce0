"""Methods that optimise one pair of images, without a network.

`align` finds a rigid or affine map (SimpleITK); `refine` improves a displacement by gradient
descent.
"""

from regkit.classical.refine import refine
from regkit.classical.sitk import align

__all__ = ["align", "refine"]
