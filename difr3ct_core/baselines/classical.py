"""Reconstruction without learning: what x-rays alone say about the volume.

| method | minimises | prior |
|---|---|---|
| :func:`fbp` | inverts the x-ray transform of many views | none |
| :func:`sirt` | weighted residual, by small steps | non-negative µ, early stopping |
| :func:`cgls` | residual, by conjugate gradients | minimum norm |
| :func:`tv` | residual + total variation | non-negative, piecewise smooth µ |
| :func:`tv_body` | the same, for 1 and 2 views | and a trunk that is nearly an ellipse |

All have the form ``method(xrays, views, volume_shape, spacing_mm, bounds)``, take a batch of patients with the same
views, and run on the projector of :mod:`difr3ct_core.drr` and its exact adjoint, in parallel and cone mode.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .classical_linear import cgls, fbp, sirt
from .classical_problem import NON_NEGATIVE
from .classical_tv import body_support, tv, tv_body, tv_objective

__all__ = ["METHODS", "NON_NEGATIVE", "body_support", "cgls", "fbp", "sirt", "tv", "tv_body", "tv_objective"]

#: Name for tables → method.
METHODS: dict[str, Callable[..., Tensor]] = {"fbp": fbp, "sirt": sirt, "cgls": cgls, "tv": tv, "tv_body": tv_body}
