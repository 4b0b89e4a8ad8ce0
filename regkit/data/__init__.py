"""Images to learn from and to test on: the embedded population, and open samples.

`population` makes synthetic brains whose true correspondence is known; it needs no network.
`fetch` gets real images from public places, see `regkit.data.samples`.
"""

from regkit.data.pairs import RandomPairs, chain
from regkit.data.population import LABELS, Subject, population, true_displacement
from regkit.data.samples import cached, fetch

__all__ = [
    "LABELS",
    "RandomPairs",
    "Subject",
    "cached",
    "chain",
    "fetch",
    "population",
    "true_displacement",
]
