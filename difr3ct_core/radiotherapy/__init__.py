"""Radiotherapy on reconstructions: contours, tangents, dose, DVH, the study, DICOM-RT. Not for clinical use.

``structures`` and ``contours`` say where organs are, ``plan`` chooses two tangents, ``dose`` computes their dose with
pyRadPlan (extra ``rt``), ``dvh`` scores it, ``study`` compares reconstruction and truth, ``dicom`` exports.
"""

from .contours import complete, contour_ct, contour_from_file, contour_with_totalsegmentator
from .dvh import DoseGrid, Goal, dose_at_volume, dvh_band, dvh_curve, goals_met, score, volume_at_dose
from .plan import PRESCRIPTIONS, Field, Prescription, TangentPlan, add_target, get_prescription, search_tangents
from .structures import (
    PHANTOM,
    TOTALSEGMENTATOR,
    NotPlannable,
    Structures,
    dice,
    resample_ct,
    resample_structures,
    structures_from_labels,
)

__all__ = [
    "PHANTOM", "PRESCRIPTIONS", "TOTALSEGMENTATOR", "DoseGrid", "Field", "Goal", "NotPlannable", "Prescription",
    "Structures", "TangentPlan", "add_target", "complete", "contour_ct", "contour_from_file",
    "contour_with_totalsegmentator", "dice", "dose_at_volume", "dvh_band", "dvh_curve", "get_prescription", "goals_met",
    "resample_ct", "resample_structures", "score", "search_tangents", "structures_from_labels", "volume_at_dose",
]  # fmt: skip
