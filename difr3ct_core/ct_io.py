"""CT files in any orientation → arrays on LPS axes, and back to NIfTI.

Files are reoriented once, here. A file whose axes are only permuted or flipped is copied, never interpolated; an
oblique or sheared one (a tilted gantry) is resampled to the smallest axis-aligned grid that holds it. After that,
arrays are ``(z, y, x)`` with +x to the patient's Left, +y Posterior, +z Superior, as in DICOM and ITK. NIfTI counts
x and y the other way (RAS), which only this file needs to know.

The libraries that read and resample are imported where they are used: that takes seconds on a slow disk, and every
worker and command of this project would wait for them, whether it opens a file or not.
"""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from .files import InputError, atomic_path, require_file

if TYPE_CHECKING:
    import nibabel as nib

#: HU of air, and the least value a CT here has: scanners store -2048 and the like outside their field of view.
AIR_HU = -1024.0
#: Resample when treating the axes as aligned would move a corner by more than this share of a voxel.
_ALIGNED_TOLERANCE = 0.02
#: A turned volume fills at most about five times its voxels; a damaged affine can ask for any number.
_GROWTH = 8
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class CTWarning(UserWarning):
    """Something about a CT that a user should know, and that does not stop the work."""


def check_affine(affine: np.ndarray, name: str) -> np.ndarray:
    """Return a usable 4x4 affine as float64, or raise an :class:`InputError` that names the file."""
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{name}: the affine is {affine.tolist()}, expected 4x4 finite numbers; write the file again.")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < 1e-2 or spacing.max() > 100:
        raise InputError(
            f"{name}: voxel spacing is {spacing.round(6).tolist()} mm, expected 0.01 to 100 mm; "
            "the affine may be in other units or damaged, write it again in mm."
        )
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-2:
        raise InputError(
            f"{name}: the affine {affine[:3, :3].round(4).tolist()} cannot be inverted, "
            "expected three independent axes; write the file again with its true orientation."
        )
    return affine


def _check_aligned(affine: np.ndarray, name: str) -> np.ndarray:
    affine = check_affine(affine, name)
    if not np.array_equal(affine[:3, :3], np.diag(np.diag(affine)[:3])) or np.diag(affine).min() <= 0:
        raise InputError(
            f"{name}: the affine {affine[:3, :3].tolist()} is not on LPS axes; pass it through to_lps first."
        )
    return affine


@dataclass(frozen=True)
class CTVolume:
    """A CT on LPS axes.

    Attributes:
        hu: Hounsfield units, float32.
        affine: 4x4 float64, voxel index (x, y, z, 1) → LPS mm; diagonal and positive but for the origin.
        name: where it comes from, for messages.
    """

    hu: Float[Tensor, "z y x"]
    affine: Float[np.ndarray, "4 4"]
    name: str = "CT volume"

    def __post_init__(self) -> None:
        if self.hu.ndim != 3 or min(self.hu.shape) < 2:
            raise InputError(
                f"{self.name}: shape is {tuple(self.hu.shape)}, expected (z, y, x) of at least 2 voxels each."
            )
        object.__setattr__(self, "affine", _check_aligned(self.affine, self.name))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edges (z, y, x) in mm."""
        return tuple(float(v) for v in np.diag(self.affine)[2::-1])

    @property
    def low_mm(self) -> np.ndarray:
        """LPS mm (x, y, z) of the corner of the first voxel (its face, not its centre)."""
        return self.affine[:3, 3] - np.diag(self.affine)[:3] / 2


@dataclass(frozen=True)
class LabelVolume:
    """An organ label map on LPS axes; 0 is background. See :class:`CTVolume` for ``affine``."""

    labels: Integer[Tensor, "z y x"]
    affine: Float[np.ndarray, "4 4"]
    name: str = "label map"

    def __post_init__(self) -> None:
        object.__setattr__(self, "affine", _check_aligned(self.affine, self.name))


def to_lps(
    array: np.ndarray, affine: np.ndarray, fill: float = AIR_HU, nearest: bool = False, name: str = "volume"
) -> tuple[np.ndarray, np.ndarray]:
    """Bring an array ``(k, j, i)`` with any affine (i, j, k, 1) → LPS mm onto LPS axes.

    Permuted and flipped axes are copied exactly. Anything else is interpolated (linear, or ``nearest``) onto an
    axis-aligned grid of the same spacings about the same centre, with ``fill`` outside.

    Returns:
        the array ``(z, y, x)`` and its diagonal, positive affine.
    """
    from scipy.optimize import linear_sum_assignment

    affine = check_affine(affine, name)
    matrix, shape = affine[:3, :3], np.array(array.shape[::-1])
    spacing = np.linalg.norm(matrix, axis=0)
    # Which voxel axis runs most along each of x, y, z.
    world, source = linear_sum_assignment(-np.abs(matrix / spacing))
    source = source[np.argsort(world)]
    sign = np.sign(matrix[np.arange(3), source])
    aligned = np.zeros((3, 3))
    aligned[np.arange(3), source] = sign * spacing[source]
    centre = affine @ np.append((shape - 1) / 2, 1)
    moved = np.abs(matrix - aligned) @ ((shape - 1) / 2)
    new_spacing = spacing[source]

    if moved.max() <= _ALIGNED_TOLERANCE * spacing.min():
        out = array.transpose(2, 1, 0).transpose(source)
        out = out[tuple(slice(None, None, -1 if s < 0 else 1) for s in sign)].transpose(2, 1, 0)
        out = np.ascontiguousarray(out)
    else:
        reach = np.abs(matrix) @ (shape - 1)
        count = np.ceil(reach / new_spacing - 1e-6).astype(int) + 1
        if count.prod(dtype=float) > _GROWTH * array.size + 1e6:
            raise InputError(
                f"{name}: the affine {matrix.round(4).tolist()} is so oblique that the volume would grow from "
                f"{shape.tolist()} to {count.tolist()} voxels, expected axes nearly at right angles; check it."
            )
        import SimpleITK as sitk

        image = sitk.GetImageFromArray(array)
        image.SetOrigin(affine[:3, 3].tolist())
        image.SetSpacing(spacing.tolist())
        image.SetDirection((matrix / spacing).ravel().tolist())
        grid = sitk.ResampleImageFilter()
        grid.SetSize(count.tolist())
        grid.SetOutputSpacing(new_spacing.tolist())
        grid.SetOutputOrigin((centre[:3] - new_spacing * (count - 1) / 2).tolist())
        grid.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
        grid.SetDefaultPixelValue(fill)
        out = sitk.GetArrayFromImage(grid.Execute(image))

    result = np.diag(np.append(new_spacing, 1.0))
    result[:3, 3] = centre[:3] - new_spacing * (np.array(out.shape[::-1]) - 1) / 2
    return out, result


def read_ct(path: str | Path, series_uid: str | None = None, files: Sequence[str | Path] | None = None) -> CTVolume:
    """Read a CT from a NIfTI file, a folder with a DICOM series, or one file of such a series.

    Args:
        path: ``.nii``, ``.nii.gz``, a folder, or a DICOM file.
        series_uid: SeriesInstanceUID, when a folder holds several CT series.
        files: the slices, when they are known; the folder is not searched then.

    Returns:
        the CT on LPS axes; values below -1024 HU (outside the field of view) are set to -1024.

    Raises:
        InputError: anything that is not one plausible CT volume; the message names the file and says what to do.
    """
    path = Path(path)
    if path.is_dir() or not path.name.lower().endswith((".nii", ".nii.gz")):
        if not path.is_dir():
            require_file(path, "a CT as NIfTI (.nii, .nii.gz) or DICOM")
        from .ct_dicom import read_dicom_series

        array, affine = read_dicom_series(path, series_uid, files)
    else:
        array, affine = _read_nifti(path, "a CT as NIfTI")
        array = array.astype(np.float32, copy=False)
    check_hu(array, str(path))
    # Before any interpolation, or the padding would darken the voxels beside it.
    np.maximum(array, AIR_HU, out=array)
    array, affine = to_lps(array, affine, name=str(path))
    return CTVolume(torch.from_numpy(array), affine, str(path))


def read_labels(path: str | Path) -> LabelVolume:
    """Read an organ label map or mask from NIfTI, onto LPS axes (nearest neighbour where it is oblique).

    Raises:
        InputError: not a 3D map of whole numbers, not negative.
    """
    array, affine = _read_nifti(Path(path), "a label map as NIfTI")
    if not np.isfinite(array).all() or (array != np.rint(array)).any() or array.min() < 0 or array.max() > 32767:
        raise InputError(
            f"{path}: values run from {array.min():g} to {array.max():g}, expected whole label numbers from 0 to "
            "32767; is this the CT instead of its labels?"
        )
    array, affine = to_lps(array.astype(np.int16), affine, fill=0, nearest=True, name=str(path))
    dtype = torch.uint8 if array.max() < 256 else torch.int16
    return LabelVolume(torch.from_numpy(array).to(dtype), affine, str(path))


def check_hu(array: Float[np.ndarray, "*any"], name: str, warn: bool = True) -> None:
    """Raise on NaN, infinity and constant volumes; warn (if wanted) when the values do not look like HU."""
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise InputError(
            f"{name}: {bad} of {array.size} voxels are NaN or infinite, expected HU; replace them (air is -1000)."
        )
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise InputError(f"{name}: every voxel is {low:g}, expected a CT; the file is blank, export it again.")
    if warn and (low > -500 or high < 0 or high > 40000):
        unsigned = low >= 0 and high > 100
        hint = "they look like 0..4095 without their offset, subtract 1024" if unsigned else "check the scale"
        warnings.warn(
            f"{name}: values run from {low:g} to {high:g}, expected HU with air near -1000 and tissue near 0; {hint}.",
            CTWarning,
            stacklevel=3,
        )


def _read_nifti(path: Path, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Array ``(k, j, i)`` and affine to LPS mm, still in the file's own orientation."""
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    require_file(path, what)
    try:
        with nib.openers.ImageOpener(path, "rb") as handle:
            raw = nib.Nifti1Header.from_fileobj(handle, check=False)  # nibabel would mend bad spacings silently
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise ImageFileError(f"it is {type(image).__name__}")
        if image.get_data_dtype().kind not in "iuf":
            raise InputError(
                f"{path}: data type is {image.get_data_dtype()}, expected one number per voxel; convert it."
            )
        _check_length(path, image)
        data = image.get_fdata(caching="unchanged", dtype=np.float32)  # float64 would double the memory
        affine = np.array(image.affine, dtype=np.float64)
        pixdim = np.asarray(raw["pixdim"][1:4], dtype=np.float64)
        oriented = bool(image.header["sform_code"]) or bool(image.header["qform_code"])
        unit_mm = {"meter": 1e3, "micron": 1e-3}.get(image.header.get_xyzt_units()[0], 1.0)
    except InputError:
        raise
    except Exception as error:  # nibabel, zlib and numpy raise many types for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as NIfTI ({reason}), expected {what}; "
            "it may be truncated or of another format, copy or convert it again."
        ) from error
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3 or min(data.shape) < 2:
        raise InputError(
            f"{path}: shape is {tuple(image.shape)}, expected a 3D volume of at least 2 voxels each way; "
            "choose one time point or channel, or the whole series."
        )
    if isinstance(image, nib.Nifti1Image) and not isinstance(image, nib.Nifti2Image) and not (pixdim > 0).all():
        raise InputError(
            f"{path}: voxel spacing is {pixdim.tolist()}, expected three positive numbers of mm; "
            "write the file again with its true spacing."
        )
    if not oriented:
        warnings.warn(
            f"{path}: stores no orientation; it is read as NIfTI's default, columns running to the patient's right; "
            "left and right may be exchanged, check.",
            CTWarning,
            stacklevel=3,
        )
    affine[:3] *= unit_mm
    return data.transpose(2, 1, 0), _RAS_TO_LPS @ affine


def _check_length(path: Path, image: nib.Nifti1Image) -> None:
    """Compare what the header promises with what the file holds, before memory is asked for it.

    A compressed file is read to its end: only there does its checksum tell whether its bytes are right.
    """
    length = path.stat().st_size
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as stream:
            length = sum(map(len, iter(lambda: stream.read(1 << 20), b"")))
    promised = image.dataobj.offset + int(np.prod(image.shape, dtype=object)) * image.get_data_dtype().itemsize
    if promised > length:
        raise ValueError(f"its header promises {promised} bytes, it holds {length}")


def nifti_facts(path: str | Path) -> dict[str, Any]:
    """What the header of a NIfTI file says, for the quality report of :mod:`.preparation`.

    Raises:
        InputError: not NIfTI.
    """
    import nibabel as nib

    path = require_file(path, "a CT as NIfTI")
    try:
        image = nib.load(path)
        zooms = [round(float(value), 4) for value in image.header.get_zooms()[:3]]
        slope, intercept = image.dataobj.slope, image.dataobj.inter
        return {
            **dict(zip(("spacing_x_mm", "spacing_y_mm", "spacing_z_mm"), zooms, strict=False)),
            "slices": int(image.shape[2]) if len(image.shape) > 2 else 1,
            "compressed": path.name.lower().endswith(".gz"),
            "rescale_slope": f"{float(slope):g}",
            "rescale_intercept": f"{float(intercept):g}",
        }
    except Exception as error:  # nibabel raises many types for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as NIfTI ({reason}), expected a CT; copy it again.") from error


def write_nifti(
    path: str | Path,
    hu: Float[Tensor, "z y x"] | np.ndarray,
    affine_lps: Float[np.ndarray, "4 4"],
    dtype: str = "int16",
) -> None:
    """Write a volume as NIfTI, atomically.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        hu: array (z, y, x); HU, or labels.
        affine_lps: (x, y, z, 1) → LPS mm. The file stores it in NIfTI's RAS.
        dtype: ``int16`` (rounded to whole HU) or another type, such as ``float32`` or ``uint8``.

    Raises:
        InputError: wrong ending, not 3D, or values that are not finite or do not fit the type.
    """
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: expected a name that ends in .nii or .nii.gz.")
    array = hu.detach().cpu().numpy() if isinstance(hu, Tensor) else np.asarray(hu)
    if array.ndim != 3:
        raise InputError(f"{path}: volume to write has shape {array.shape}, expected (z, y, x).")
    affine = check_affine(affine_lps, f"{path}: affine_lps")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: volume to write holds NaN or infinite values, expected finite HU.")
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        array, limits = np.rint(array), np.iinfo(kind)
        if array.min() < limits.min or array.max() > limits.max:
            raise InputError(
                f"{path}: values run from {array.min():g} to {array.max():g}, expected what {kind} holds "
                f"({limits.min} to {limits.max}); clip them or write float32."
            )
    import nibabel as nib

    image = nib.Nifti1Image(np.ascontiguousarray(array.astype(kind).transpose(2, 1, 0)), _RAS_TO_LPS @ affine)
    # Code 1 is "scanner": without both codes readers guess the orientation.
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
