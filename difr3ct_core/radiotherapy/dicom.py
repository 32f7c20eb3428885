"""DICOM-RT of a study: RTSTRUCT, RTPLAN and RTDOSE, written and read back with pydicom.

The plan says RESEARCH, UNAPPROVED and "not for clinical use", and states no monitor units: the beam model was
commissioned for no machine. Contours are closed polygons in axial planes; holes are polygons of their own (even-odd).
"""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Bool, Float
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RTDoseStorage, RTPlanStorage, RTStructureSetStorage, generate_uid
from skimage.draw import polygon
from skimage.measure import find_contours

from ..ct_io import CTVolume
from ..files import InputError, atomic_path, require_file
from .dvh import DoseGrid
from .plan import LEAF_MM, SAD_MM, Field, TangentPlan
from .structures import Structures

_NOTE = "Research and teaching. Uncommissioned beam model. NOT FOR CLINICAL USE."
_COLOURS = ((255, 255, 0), (0, 170, 255), (0, 255, 170), (255, 60, 60), (255, 160, 0), (200, 110, 255), (255, 255, 255))
_TYPES = {"body": "EXTERNAL", "target": "PTV"}


def write_dicom_rt(
    folder: str | Path, plan: TangentPlan, structures: Structures, dose: DoseGrid, patient: str = "phantom"
) -> dict[str, Path]:
    """Write ``RTSTRUCT.dcm``, ``RTPLAN.dcm`` and ``RTDOSE.dcm``, which refer to each other.

    Args:
        folder: where; made if missing.
        plan, structures, dose: of one case; structures and dose on one grid.
        patient: patient ID, and name.

    Returns:
        "RTSTRUCT", "RTPLAN", "RTDOSE" → path.

    Raises:
        InputError: grids differ, or the folder cannot be written.
    """
    if next(iter(structures.masks.values())).shape != dose.gy.shape or not np.allclose(structures.affine, dose.affine):
        raise InputError(f"dose: its grid is not that of {structures.source}, expected one grid.")
    # From the content: the same study gives the same UIDs.
    entropy = [patient, plan.side, plan.planned_on, repr(plan.isocentre_mm.tolist()), repr(float(dose.gy.sum()))]
    kinds = ("RTSTRUCT", "RTPLAN", "RTDOSE")
    names = ("study", "frame", *kinds, *(f"{kind} series" for kind in kinds))
    uids = {name: generate_uid(entropy_srcs=[*entropy, name]) for name in names}
    made = {
        "RTSTRUCT": _structure_set(_common("RTSTRUCT", RTStructureSetStorage, uids, patient), structures, uids),
        "RTPLAN": _plan(_common("RTPLAN", RTPlanStorage, uids, patient), plan, uids),
        "RTDOSE": _dose(_common("RTDOSE", RTDoseStorage, uids, patient), dose, uids),
    }
    paths = {}
    for name, data in made.items():
        paths[name] = Path(folder) / f"{name}.dcm"
        with atomic_path(paths[name]) as temporary:
            data.save_as(temporary, enforce_file_format=True)
    return paths


def _common(modality: str, sop_class: str, uids: dict[str, str], patient: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, uids[modality]
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    now = datetime.datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    data.SOPClassUID, data.SOPInstanceUID = sop_class, uids[modality]
    data.SpecificCharacterSet = "ISO_IR 192"
    data.InstanceCreationDate, data.InstanceCreationTime = date, time
    data.StudyDate, data.StudyTime, data.AccessionNumber, data.ReferringPhysicianName = date, time, "", ""
    data.SeriesDate, data.SeriesTime, data.OperatorsName = date, time, ""
    data.Modality, data.Manufacturer, data.ManufacturerModelName = modality, "DIFR3CT", "difr3ct_core"
    data.SoftwareVersions, data.DeviceSerialNumber = "0.1", "0"
    data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = patient, patient, "", "O"
    data.StudyInstanceUID, data.SeriesInstanceUID = uids["study"], uids[f"{modality} series"]
    data.StudyID, data.SeriesNumber, data.InstanceNumber = "1", "1", "1"
    data.SeriesDescription = "Research and teaching, NOT FOR CLINICAL USE"
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = uids["frame"], ""
    return data


def _refer(sop_class: str, uid: str) -> Sequence:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    return Sequence([item])


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if value else "0"


def _structure_set(data: FileDataset, structures: Structures, uids: dict[str, str]) -> FileDataset:
    data.StructureSetLabel, data.StructureSetDescription = "DIFR3CT", _NOTE
    data.StructureSetDate, data.StructureSetTime = data.StudyDate, data.StudyTime
    data.ApprovalStatus = "UNAPPROVED"
    frame = Dataset()
    frame.FrameOfReferenceUID = uids["frame"]
    data.ReferencedFrameOfReferenceSequence = Sequence([frame])
    rois, contours, observations = [], [], []
    for number, (name, mask) in enumerate(structures.masks.items(), start=1):
        roi = Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, uids["frame"]
        roi.ROIGenerationAlgorithm = "AUTOMATIC"
        rois.append(roi)
        drawn = Dataset()
        drawn.ROIDisplayColor, drawn.ReferencedROINumber = list(_COLOURS[(number - 1) % len(_COLOURS)]), number
        loops = [_contour(points) for points in polygons(mask, structures.affine)]
        if loops:
            drawn.ContourSequence = Sequence(loops)
        contours.append(drawn)
        seen = Dataset()
        seen.ObservationNumber, seen.ReferencedROINumber = number, number
        seen.RTROIInterpretedType, seen.ROIInterpreter = _TYPES.get(name, "ORGAN"), ""
        observations.append(seen)
    data.StructureSetROISequence, data.ROIContourSequence = Sequence(rois), Sequence(contours)
    data.RTROIObservationsSequence = Sequence(observations)
    return data


def _contour(points: Float[np.ndarray, "n 3"]) -> Dataset:
    item = Dataset()
    item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
    item.ContourData = [_number(v) for v in points.ravel()]
    return item


def polygons(mask: Bool[np.ndarray, "z y x"], affine: Float[np.ndarray, "4 4"]) -> list[Float[np.ndarray, "n 3"]]:
    """Closed outlines of a mask in its axial planes, LPS mm; they run halfway between voxel centres."""
    loops = []
    for z in np.flatnonzero(mask.any((1, 2))):
        for loop in find_contours(np.pad(mask[z], 1).astype(float), 0.5):
            yx = loop[:-1] - 1
            index = np.stack([yx[:, 1], yx[:, 0], np.full(len(yx), float(z))], axis=1)
            loops.append(index * np.diag(affine)[:3] + affine[:3, 3])
    return loops


def _plan(data: FileDataset, plan: TangentPlan, uids: dict[str, str]) -> FileDataset:
    total, fractions = plan.prescription.total_gy, plan.prescription.fractions
    data.RTPlanLabel, data.RTPlanName, data.RTPlanDescription = "Tangents", f"{plan.side} breast", _NOTE
    data.RTPlanDate, data.RTPlanTime = data.StudyDate, data.StudyTime
    data.PlanIntent, data.RTPlanGeometry, data.ApprovalStatus = "RESEARCH", "PATIENT", "UNAPPROVED"
    data.ReferencedStructureSetSequence = _refer(RTStructureSetStorage, uids["RTSTRUCT"])
    goal = Dataset()
    goal.DoseReferenceNumber, goal.DoseReferenceStructureType, goal.DoseReferenceType = 1, "SITE", "TARGET"
    goal.DoseReferenceDescription, goal.TargetPrescriptionDose = f"{plan.side} breast", _number(total)
    data.DoseReferenceSequence = Sequence([goal])
    setup = Dataset()
    setup.PatientSetupNumber, setup.PatientPosition = 1, "HFS"
    data.PatientSetupSequence = Sequence([setup])
    group = Dataset()
    group.FractionGroupNumber, group.NumberOfFractionsPlanned = 1, fractions
    group.NumberOfBeams, group.NumberOfBrachyApplicationSetups = len(plan.fields), 0
    group.ReferencedBeamSequence = Sequence()
    data.BeamSequence = Sequence()
    for number, (name, field) in enumerate(zip(("medial", "lateral"), plan.fields, strict=True), start=1):
        referred = Dataset()
        referred.ReferencedBeamNumber = number
        group.ReferencedBeamSequence.append(referred)
        data.BeamSequence.append(_beam(number, name, field, plan))
    data.FractionGroupSequence = Sequence([group])
    return data


def _beam(number: int, name: str, field: Field, plan: TangentPlan) -> Dataset:
    used = [k for k, weight in enumerate(field.weights) if weight > 0]
    beam = Dataset()
    beam.Manufacturer, beam.TreatmentMachineName, beam.PrimaryDosimeterUnit = "DIFR3CT", "Generic", "MU"
    beam.SourceAxisDistance, beam.BeamNumber, beam.BeamName = _number(SAD_MM), number, name
    beam.BeamType, beam.RadiationType = ("DYNAMIC" if len(used) > 1 else "STATIC"), "PHOTON"
    beam.TreatmentDeliveryType, beam.ReferencedPatientSetupNumber = "TREATMENT", 1
    beam.NumberOfWedges = beam.NumberOfCompensators = beam.NumberOfBoli = beam.NumberOfBlocks = 0
    # Rows that no segment opens need no leaves; the jaws cover them.
    open_rows = np.flatnonzero((field.apertures[..., 1] > field.apertures[..., 0]).any(0))
    rows = np.arange(open_rows[0], open_rows[-1] + 1)
    edges = np.append(field.rows_mm[rows], field.rows_mm[rows[-1]] + LEAF_MM)
    devices = []
    for kind, pairs in (("ASYMX", 1), ("ASYMY", 1), ("MLCX", len(rows))):
        device = Dataset()
        device.RTBeamLimitingDeviceType, device.NumberOfLeafJawPairs = kind, pairs
        if kind == "MLCX":
            device.LeafPositionBoundaries = [_number(v) for v in edges]
        devices.append(device)
    beam.BeamLimitingDeviceSequence = Sequence(devices)
    shares = field.weights / field.weights.sum() if used else field.weights
    points, done = [], 0.0
    for k in used or [0]:
        leaves = field.apertures[k][rows]
        shut = leaves[:, 1] <= leaves[:, 0]
        leaves = np.where(shut[:, None], leaves[~shut].mean() if (~shut).any() else 0.0, leaves)
        jaws = {"ASYMX": [leaves[:, 0].min(), leaves[:, 1].max()], "ASYMY": [edges[0], edges[-1]]}
        for share in (done, done + shares[k]):
            point = Dataset()
            point.ControlPointIndex, point.CumulativeMetersetWeight = len(points), f"{share:.6f}"
            positions = []
            for kind, values in (*jaws.items(), ("MLCX", leaves.T.ravel())):
                item = Dataset()
                item.RTBeamLimitingDeviceType, item.LeafJawPositions = kind, [_number(v) for v in values]
                positions.append(item)
            point.BeamLimitingDevicePositionSequence = Sequence(positions)
            if not points:
                _first_control_point(point, field, plan)
            points.append(point)
        done += float(shares[k])
    points[-1].CumulativeMetersetWeight = "1"
    beam.FinalCumulativeMetersetWeight, beam.NumberOfControlPoints = "1", len(points)
    beam.ControlPointSequence = Sequence(points)
    return beam


def _first_control_point(point: Dataset, field: Field, plan: TangentPlan) -> None:
    point.NominalBeamEnergy, point.GantryAngle = "6", _number(field.gantry_deg)
    point.BeamLimitingDeviceAngle = point.PatientSupportAngle = point.TableTopEccentricAngle = "0"
    point.GantryRotationDirection = point.BeamLimitingDeviceRotationDirection = "NONE"
    point.PatientSupportRotationDirection = point.TableTopEccentricRotationDirection = "NONE"
    point.TableTopVerticalPosition = point.TableTopLongitudinalPosition = point.TableTopLateralPosition = None
    point.IsocenterPosition = [_number(v) for v in plan.isocentre_mm]


def _dose(data: FileDataset, dose: DoseGrid, uids: dict[str, str]) -> FileDataset:
    spacing, origin = np.diag(dose.affine)[:3], dose.affine[:3, 3]
    scale = max(float(dose.gy.max()), 1e-6) / (2**16 - 1)
    data.ContentDate, data.ContentTime = data.StudyDate, data.StudyTime
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.NumberOfFrames, data.Rows, data.Columns = dose.gy.shape
    # 16 bits, 1 mGy or finer: dciodvfy of dicom3tools aborts on 32.
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.ImagePositionPatient = [_number(v) for v in origin]
    data.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    data.PixelSpacing, data.SliceThickness = [_number(spacing[1]), _number(spacing[0])], _number(spacing[2])
    data.FrameIncrementPointer = pydicom.tag.Tag(0x3004, 0x000C)
    data.GridFrameOffsetVector = [_number(k * spacing[2]) for k in range(dose.gy.shape[0])]
    data.DoseUnits, data.DoseType, data.DoseSummationType = "GY", "PHYSICAL", "PLAN"
    data.DoseComment, data.TissueHeterogeneityCorrection = (
        "Research, uncommissioned beam model, NOT FOR CLINICAL USE",
        "IMAGE",
    )
    data.DoseGridScaling = f"{scale:.9e}"
    data.ReferencedRTPlanSequence = _refer(RTPlanStorage, uids["RTPLAN"])
    # By the scale as written, rounded to ten digits.
    stored = np.rint(dose.gy / float(data.DoseGridScaling)).clip(0, 2**16 - 1).astype("<u2")
    data.PixelData = stored.tobytes()
    return data


def _read(path: str | Path, modality: str) -> FileDataset:
    path = require_file(path, f"a DICOM {modality} file")
    try:
        data = pydicom.dcmread(path)
    except (InvalidDicomError, EOFError, ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as DICOM ({error}), expected {modality}.") from error
    if data.get("Modality") != modality:
        raise InputError(f"{path}: is a DICOM {data.get('Modality', 'file without modality')}, expected {modality}.")
    return data


def read_rtdose(path: str | Path) -> DoseGrid:
    """Read an RTDOSE on LPS axes.

    Raises:
        InputError: not an RTDOSE, or its axes are not LPS, its frames not evenly spaced upwards, its unit not Gy.
    """
    data = _read(path, "RTDOSE")
    if not np.allclose([float(v) for v in data.ImageOrientationPatient], [1, 0, 0, 0, 1, 0], atol=1e-4):
        raise InputError(
            f"{path}: orientation is {list(data.ImageOrientationPatient)}, expected LPS axes (1 0 0 0 1 0)."
        )
    offsets = np.array([float(v) for v in data.GridFrameOffsetVector])
    step = np.diff(offsets)
    if data.DoseUnits != "GY" or len(step) < 1 or step.min() <= 0 or np.ptp(step) > 1e-2:
        raise InputError(f"{path}: expected dose in GY on evenly spaced frames that rise; export it again.")
    affine = np.diag([float(data.PixelSpacing[1]), float(data.PixelSpacing[0]), float(step.mean()), 1.0])
    affine[:3, 3] = [float(v) for v in data.ImagePositionPatient]
    affine[2, 3] += offsets[0] if abs(offsets[0] - affine[2, 3]) > 1e-3 else 0.0
    return DoseGrid(data.pixel_array.astype(np.float64) * float(data.DoseGridScaling), affine)


def read_rtstruct(path: str | Path, ct: CTVolume, names: dict[str, str] | None = None) -> Structures:
    """Masks from an RTSTRUCT on the grid of ``ct``: polygons of the nearest plane, filled by the even-odd rule.

    Args:
        path: the file.
        ct: the CT that it belongs to, on LPS axes.
        names: ROI name in the file → structure; by default the names in the file.

    Raises:
        InputError: not an RTSTRUCT, or no contour lies within the CT.
    """
    data = _read(path, "RTSTRUCT")
    called = {int(roi.ROINumber): str(roi.ROIName) for roi in data.StructureSetROISequence}
    masks: dict[str, np.ndarray] = {}
    spacing, origin, shape = np.diag(ct.affine)[:3], ct.affine[:3, 3], tuple(ct.hu.shape)
    for drawn in data.get("ROIContourSequence", []):
        name = called[int(drawn.ReferencedROINumber)]
        if names is not None and name not in names:
            continue
        mask = masks.setdefault(name if names is None else names[name], np.zeros(shape, bool))
        for item in drawn.get("ContourSequence", []):
            points = np.array([float(v) for v in item.ContourData]).reshape(-1, 3)
            index = (points - origin) / spacing
            z = int(np.rint(index[0, 2]))
            if item.ContourGeometricType != "CLOSED_PLANAR" or not 0 <= z < shape[0]:
                continue
            filled = polygon(index[:, 1], index[:, 0], shape[1:])
            mask[z][filled] ^= True
    if not any(mask.any() for mask in masks.values()):
        raise InputError(
            f"{path}: no contour lies within {ct.name}; it belongs to another scan, or names do not match."
        )
    return Structures(masks, ct.affine, f"RTSTRUCT {Path(path).name}")
