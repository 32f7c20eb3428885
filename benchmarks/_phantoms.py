"""The phantoms of the projector benchmark, whose x-rays are known in closed form."""

from __future__ import annotations

import numpy as np

from difr3ct_core.drr.exact import Blob, Ellipsoid


def blobs() -> list[Blob]:
    """Fifteen smooth blobs of 10 to 25 mm, all inside every view."""
    rng = np.random.default_rng(0)
    return [
        Blob(tuple(rng.uniform(-70, 70, 3)), float(rng.uniform(10, 25)), float(rng.uniform(0.005, 0.02)))
        for _ in range(15)
    ]


def solids() -> list[Ellipsoid]:
    """Sharp edges: a body, a heart and a spine, of attenuations in 1/mm."""
    return [
        Ellipsoid((3.0, -5.0, 2.0), (120.0, 85.0, 125.0), 0.0, 0.02),
        Ellipsoid((14.0, -22.0, -20.0), (36.0, 30.0, 40.0), 30.0, 0.012),
        Ellipsoid((2.0, 55.0, 0.0), (14.0, 15.0, 100.0), 0.0, 0.015),
    ]


def chest() -> list[Ellipsoid]:
    """The same with two lungs cut out: more edge and less mass, so a larger relative error for every tool."""
    lungs = [
        Ellipsoid((-55.0, -4.0, 8.0), (42.0, 58.0, 90.0), 12.0, -0.014),
        Ellipsoid((58.0, -2.0, 5.0), (38.0, 56.0, 86.0), -10.0, -0.014),
    ]
    return solids() + lungs
