"""A synthetic thorax cohort: unlimited patients from a seed, in HU, with an organ label map.

``cohort`` holds what users call, and the distribution of the patients; ``canvas`` is the drawing board, ``anatomy``
the shapes that organs share, and ``trunk``, ``chest`` and ``skeleton`` the organs in the order in which they are drawn.
"""

from .anatomy import LABELS, ORGANS
from .cohort import COHORTS, DISTRIBUTION, Phantom, Spread, make_phantom

__all__ = ["COHORTS", "DISTRIBUTION", "LABELS", "ORGANS", "Phantom", "Spread", "make_phantom"]
