"""Photon dose by pyRadPlan: 6 MV, its "Generic" linac, singular-value pencil beam, on the grid of the CT.

The beam model was commissioned for no machine: fit for comparing plans, not for treating anyone.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float

from ..ct_io import CTVolume
from ..files import InputError
from .dvh import DoseGrid
from .plan import LEAF_MM, SAD_MM, Field, Prescription, TangentPlan, add_target, make_plan
from .structures import Structures

_MASK_MM = 1.0  # grid of the fluence
_ENERGY_MV = 6.0


def plan_on(
    ct: CTVolume, structures: Structures, side: str, prescription: Prescription
) -> tuple[TangentPlan, DoseGrid]:
    """Plan a CT with its contours, and its dose.

    Args:
        ct: on the planning grid.
        structures: of that CT and grid, without target.
        side, prescription: see :func:`.plan.make_plan`.

    Raises:
        NotPlannable: see there.
        InputError: grids differ, or pyRadPlan is not installed.
    """
    structures.require_grid(ct)
    structures = add_target(structures, side)
    units: list[np.ndarray] = []

    def doses(plan: TangentPlan) -> np.ndarray:
        units.append(segment_doses(plan, ct, structures))
        return units[-1]

    plan = make_plan(structures, side, prescription, doses)
    return plan, DoseGrid(_weighted(plan, units[-1]), ct.affine)


def calculate_dose(plan: TangentPlan, ct: CTVolume, structures: Structures) -> DoseGrid:
    """Total dose in Gy of a given plan on a CT, which need not be the one that it was made for."""
    structures.require_grid(ct)
    return DoseGrid(_weighted(plan, segment_doses(plan, ct, structures)), ct.affine)


def _weighted(plan: TangentPlan, units: Float[np.ndarray, "k z y x"]) -> Float[np.ndarray, "z y x"]:
    weights = np.concatenate([field.weights for field in plan.fields])
    return np.einsum("k,kzyx->zyx", weights, units).clip(min=0)


def fluence_mask(field: Field, segment: int) -> Float[np.ndarray, "n n"]:
    """Transmission (v, u) of one segment on the square grid of 1 mm, with soft ends of leaves (share of a pixel)."""
    # No larger than the opening needs: convolving it is what costs time.
    open_rows = field.rows_mm[(field.apertures[..., 1] > field.apertures[..., 0]).any(0)]
    half = int(max(np.abs(field.apertures).max(), -open_rows.min(), open_rows.max() + LEAF_MM) + 2)
    centres = np.arange(-half, half + 1, dtype=float)
    leaves = field.apertures[segment]
    row = np.floor((centres - field.rows_mm[0]) / LEAF_MM).astype(int)
    valid = (row >= 0) & (row < len(field.rows_mm))
    low, high = leaves[row.clip(0, len(leaves) - 1)].T
    share = np.minimum(centres + 0.5, high[:, None]) - np.maximum(centres - 0.5, low[:, None])
    return np.clip(share, 0, 1) * valid[:, None]


def segment_doses(plan: TangentPlan, ct: CTVolume, structures: Structures) -> Float[np.ndarray, "k z y x"]:
    """Dose per unit weight of every segment, medial field first.

    Args:
        plan: gives iso-centre and fields; its weights do not count.
        ct: on LPS axes; the dose is computed on its grid, inside the body.
        structures: with "body".

    Raises:
        InputError: pyRadPlan is not installed.
    """
    try:
        import pyRadPlan as rt
        from pyRadPlan.stf import Beam, Ray, SteeringInformation
        from pyRadPlan.stf._beamlet import FieldShapeAsMask
    except ImportError as error:
        raise InputError("dose: pyRadPlan is not installed, expected the extra rt: pip install '.[rt]'.") from error
    image = sitk.GetImageFromArray(ct.hu.numpy().astype(np.float32))
    image.SetOrigin(ct.affine[:3, 3].tolist())
    image.SetSpacing(np.diag(ct.affine)[:3].tolist())
    patient = rt.CT(cube_hu=image)
    body = structures["body"].astype(np.uint8)
    cst = rt.validate_cst(
        [{"name": "BODY", "voi_type": "EXTERNAL", "mask": sitk.GetImageFromArray(body), "ct_image": patient}],
        ct=patient,
    )
    beams = [_beam(field, plan.isocentre_mm, Beam, Ray, FieldShapeAsMask) for field in plan.fields]
    spacing = dict(zip("xyz", np.diag(ct.affine)[:3].tolist(), strict=True))
    settings = rt.PhotonPlan(machine="Generic", num_of_fractions=1)
    settings.prop_dose_calc = {
        "engine": "SVDPB", "dose_grid": {"resolution": spacing},
        "int_conv_resolution": _MASK_MM, "kernel_cutoff": 100.0,
    }  # fmt: skip
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        dij = rt.calc_dose_influence(patient, cst, SteeringInformation(beams=beams), settings)
    matrix = dij.physical_dose.flat[0]
    return np.asarray(matrix.toarray().T, dtype=np.float32).reshape(-1, *ct.hu.shape)


def _beam(field: Field, isocentre: np.ndarray, beam: type, ray: type, shape: type) -> object:
    angle = np.radians(field.gantry_deg)
    source = SAD_MM * np.array([np.sin(angle), -np.cos(angle), 0.0])
    rays = [
        ray(
            ray_pos_bev=np.zeros(3), ray_pos=np.zeros(3), target_point=-source,
            target_point_bev=np.array([0.0, SAD_MM, 0.0]),
            # Its engine reads masks with v falling along the first axis (the test with a lop-sided field fixes this).
            beamlets=[shape(energy=_ENERGY_MV, mask=fluence_mask(field, k)[::-1], resolution=_MASK_MM)],
        )
        for k in range(len(field.apertures))
    ]  # fmt: skip
    return beam(
        gantry_angle=field.gantry_deg, couch_angle=0.0, bixel_width=LEAF_MM, radiation_mode="photons",
        machine="Generic",
        sad=SAD_MM, iso_center=np.asarray(isocentre, float), rays=rays, source_point=source,
        source_point_bev=np.array([0.0, -SAD_MM, 0.0]),
    )  # fmt: skip
