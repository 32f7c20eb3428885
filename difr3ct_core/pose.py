"""Where the x-rays were really taken: angle and shift of each view, found through the projector. Beyond the paper.

The paper's x-rays stand exactly where they should. Real ones are some degrees and millimetres off, and nobody wrote
down which. A reconstruction µ that was made with the nominal views is wrong in detail and right in the large, so that

    argmin over pose of  ‖A(pose) µ - p‖²

is near the true pose: :func:`difr3ct_core.drr.project_rays` is differentiable in it. Then reconstruct again, with the
views that were found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .checks import number
from .drr import project_rays
from .files import InputError
from .geometry import Pose, View, check_views


def moved_view(view: View, angle_deg: float, shift_u_mm: float, shift_v_mm: float) -> View:
    """A parallel view turned about z and moved in the plane of its detector; along the rays nothing would change.

    Raises:
        InputError: cone beam, where a shift of source and detector is no offset of the detector.
    """
    if view.mode != "parallel":
        raise InputError(f"views: found {view.mode} beam, expected parallel, for which a shift is a detector's offset.")
    v, u = view.offset_mm
    return dataclasses.replace(view, angle_deg=view.angle_deg + angle_deg, offset_mm=(v + shift_v_mm, u + shift_u_mm))


def recover_views(
    mu: Float[Tensor, "z y x"],
    xrays: Float[Tensor, "n v u"],
    views: Sequence[View],
    spacing_mm: float,
    iterations: int = 60,
    rate: float = 1.0,
    coarse: int = 2,
) -> tuple[View, ...]:
    """The views from which ``mu`` looks most like its x-rays.

    Adam on angle (degrees) and in-plane shift (mm) of every view, all views at once; each has its own misfit, so none
    disturbs another. The x-rays' and the volume's grids are first made ``coarse`` times coarser, which is quicker and
    smooths the misfit.

    Args:
        mu: a reconstruction in 1/mm, centred on the origin; better a smooth one that does not fit the x-rays in
            detail, because a volume that was fitted to wrong views explains them too well.
        xrays: line integrals.
        views: nominal, parallel beam.
        spacing_mm: voxel size.
        iterations, rate: of Adam; the rate falls to zero along a half cosine.
        coarse: factor, 1 leaves the grids as they are.

    Returns:
        one view for each x-ray, on the grid of the given ones.

    Raises:
        InputError: cone beam, images that do not match the views, or grids that ``coarse`` does not divide.
    """
    views = check_views(views)
    if xrays.shape != (len(views), *views[0].detector_shape):
        expected = (len(views), *views[0].detector_shape)
        raise InputError(f"xrays: found shape {tuple(xrays.shape)}, expected {expected}, one image per view.")
    if any(edge % coarse for edge in (*mu.shape, *views[0].detector_shape)):
        raise InputError(f"coarse: found {coarse}, expected a divisor of {tuple(mu.shape)} and of the detector.")
    number("rate", rate, "degrees and mm", positive=True)
    nominal = [moved_view(view, 0.0, 0.0, 0.0) for view in views]
    small = [
        dataclasses.replace(
            view,
            detector_shape=tuple(count // coarse for count in view.detector_shape),
            pixel_mm=tuple(pixel * coarse for pixel in view.pixel_mm),
        )
        for view in nominal
    ]
    volume = F.avg_pool3d(mu.detach()[None, None].float(), coarse)
    images = F.avg_pool2d(xrays.detach()[None].float(), coarse)[0]
    axes = torch.stack([torch.stack([view.e_u, view.e_v]) for view in nominal]).to(volume)  # (view, 2, xyz)
    guess = torch.zeros(len(views), 3, device=volume.device, requires_grad=True)  # degrees, mm along u, mm along v
    adam = torch.optim.Adam([guess], lr=rate)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        adam.zero_grad()
        pose = Pose(guess[:, 0], torch.einsum("nk,nkx->nx", guess[:, 1:], axes))
        again = project_rays(volume, small, spacing_mm * coarse, pose, step_mm=spacing_mm * coarse)[0, 0]
        ((again - images).square().mean(dim=(1, 2)) / images.square().mean()).sum().backward()
        adam.step()
        fall.step()
    found = guess.detach().cpu().tolist()
    return tuple(moved_view(view, *values) for view, values in zip(nominal, found, strict=True))


def moved_together(views: Sequence[View], reference: Sequence[View]) -> tuple[View, ...]:
    """``views``, turned about z and shifted *as one* so that they lie as near to ``reference`` as such a motion allows.

    The x-rays of a patient who moved are the x-rays of views that all moved the other way. So nothing can tell this
    part of a displacement from the patient's own place, and what is left is what pose recovery can answer for.

    Args:
        views, reference: parallel beam, pairs of the same x-ray; the angle by the mean, the shift by least squares.

    Raises:
        InputError: cone beam, or not as many views as in the reference.
    """
    if len(views) != len(reference) or not views:
        raise InputError(f"views: found {len(views)}, expected {len(reference)} as in the reference, one or more.")
    turn = sum(a.angle_deg - b.angle_deg for a, b in zip(views, reference, strict=True)) / len(views)
    turned = [moved_view(view, -turn, 0.0, 0.0) for view in views]
    pairs = list(zip(turned, reference, strict=True))
    shifts = torch.tensor(
        [[a.offset_mm[1] - b.offset_mm[1], a.offset_mm[0] - b.offset_mm[0]] for a, b in pairs], dtype=torch.float64
    )
    axes = torch.stack([torch.stack([view.e_u, view.e_v]) for view in turned]).double()  # (view, uv, xyz)
    # One view sees no motion along its rays: the smallest motion of those that explain the shifts.
    motion = torch.linalg.lstsq(axes.flatten(0, 1), shifts.flatten()[:, None], driver="gelsd").solution[:, 0]
    common = (axes @ motion).tolist()
    return tuple(moved_view(view, 0.0, -u, -v) for view, (u, v) in zip(turned, common, strict=True))
