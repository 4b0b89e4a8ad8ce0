"""Images to learn from and to test on: the embedded population, and open samples.

`population` makes synthetic brains whose true correspondence is known; it needs no network.
`fetch` gets real images from public places, see `regkit.data.samples`; `prepared` reads public data
sets that a script of data_scripts/ has prepared.
"""

from regkit.data import prepared
from regkit.data.pairs import GivenPairs, RandomPairs, chain
from regkit.data.population import population, true_displacement
from regkit.data.rigid import (
    RigidPair,
    RigidPairs,
    centre_crop,
    heads,
    known_pair,
    moved_heads,
    noisy,
)
from regkit.data.samples import cached, fetch
from regkit.data.subject import Subject
from regkit.data.template import LABELS

__all__ = [
    "LABELS",
    "GivenPairs",
    "RandomPairs",
    "RigidPair",
    "RigidPairs",
    "Subject",
    "cached",
    "centre_crop",
    "chain",
    "fetch",
    "heads",
    "known_pair",
    "moved_heads",
    "noisy",
    "population",
    "prepared",
    "true_displacement",
]
