"""One file of x-rays → the numbers that it stores, rows turned so that row 0 is inferior.

What the numbers mean is said in the JSON of the set, and applied by :mod:`.xrays`.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Real
from PIL import Image
from pydicom.errors import InvalidDicomError

from .files import InputError, read_npz, require_file

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KINDS = "an x-ray as PNG, NPZ or DICOM"
#: Planar x-ray modalities (DICOM PS3.3, C.7.3.1.1.1).
_MODALITIES = ("DX", "CR", "RF", "RG", "XA")


def read_image(path: str | Path, grows_with_attenuation: bool) -> Real[np.ndarray, "n v u"]:
    """The stored numbers of a PNG or DICOM (one image) or NPZ (one or more), row 0 inferior.

    The kind is told by the content, not by the name.

    Args:
        path: the file.
        grows_with_attenuation: whether the numbers are meant to grow with attenuation (line integrals) or with
            intensity (transmission). A DICOM file says which of them it holds, and is inverted or refused.

    Raises:
        InputError: missing, damaged, not one of the kinds, in colour, or several frames.
    """
    path = require_file(path, _KINDS)
    with open(path, "rb") as handle:
        head = handle.read(132)
    if head.startswith(_PNG_SIGNATURE):
        return _read_png(path)[None, ::-1].copy()
    if head.startswith(b"PK"):
        return _read_stack(path)
    if head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return _read_dicom(path, grows_with_attenuation)[None, ::-1].copy()
    raise InputError(
        f"{path}: is neither PNG, NPZ nor DICOM (it begins with {head[:4]!r}), expected {_KINDS}; convert it."
    )


def _read_png(path: Path) -> Real[np.ndarray, "row column"]:
    with open(path, "rb") as handle:
        head = handle.read(26)
    if len(head) < 26:
        raise InputError(f"{path}: is a truncated PNG ({len(head)} bytes); copy it again.")
    depth, colour = struct.unpack("BB", head[24:26])
    # Pillow would cut 16-bit colour down to 8 bits and stretch fewer bits to 8 without a word.
    if depth < 8 or (depth == 16 and colour != 0):
        kind = "in colour or with transparency" if colour else f"of {depth} bits"
        raise InputError(f"{path}: is a {depth}-bit PNG {kind}, expected greyscale of 8 or 16 bits; convert it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                pixels = np.array(image.convert("RGBA") if colour in (2, 3, 4, 6) else image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError, Warning) as error:
        raise InputError(f"{path}: cannot be read as PNG ({error}); it may be truncated, copy it again.") from error
    if pixels.ndim == 3:
        if (pixels[..., 3] != 255).any():
            raise InputError(f"{path}: has transparent pixels, expected a greyscale image; convert it.")
        if (pixels[..., :1] != pixels[..., :3]).any():
            raise InputError(f"{path}: is a colour image whose channels differ, expected greyscale; convert it.")
        pixels = pixels[..., 0]
    return pixels.astype(np.uint16 if depth == 16 else np.uint8)


def _read_stack(path: Path) -> Real[np.ndarray, "n v u"]:
    arrays = read_npz(path)
    names = sorted(arrays)
    if "xrays" not in arrays and len(arrays) != 1:
        raise InputError(f"{path}: holds {names}, expected an array 'xrays' of shape (view, v, u).")
    stack = arrays["xrays"] if "xrays" in arrays else arrays[names[0]]
    stack = stack[None] if stack.ndim == 2 else stack
    if stack.ndim != 3 or stack.size == 0 or stack.dtype.kind not in "uif":
        raise InputError(f"{path}: holds {stack.dtype} of shape {stack.shape}, expected numbers of shape (view, v, u).")
    return stack


def _read_dicom(path: Path, grows_with_attenuation: bool) -> Real[np.ndarray, "row column"]:
    """Pixels after the modality's rescale.

    PixelIntensityRelationshipSign says whether numbers grow (1) or fall (-1) with intensity (DICOM PS3.3, C.8.11.3).
    Where it is absent and line integrals are meant, the image is taken to show bone in white: MONOCHROME2 grows with
    attenuation, MONOCHROME1, whose smallest number is white, falls with it and is inverted.
    """
    try:
        data = pydicom.dcmread(path)
        modality = str(data.get("Modality", ""))
        frames = int(data.get("NumberOfFrames", 1) or 1)
        photometric = str(data.get("PhotometricInterpretation", ""))
        if modality not in _MODALITIES:
            raise InputError(
                f"{path}: has modality {modality or 'none'}, expected a planar x-ray ({', '.join(_MODALITIES)}); a CT "
                "is read by read_ct."
            )
        if frames != 1:
            raise InputError(f"{path}: holds {frames} frames, expected one; export a single frame per view.")
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise InputError(f"{path}: is {photometric or 'of no stated kind'}, expected MONOCHROME1 or MONOCHROME2.")
        pixels = data.pixel_array.astype(np.int64)
        bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        sign = data.get("PixelIntensityRelationshipSign")
        grows = int(sign) == -1 if sign is not None else photometric == "MONOCHROME2"
    except InputError:
        raise
    except InvalidDicomError as error:
        raise InputError(f"{path}: is not a DICOM file, expected {_KINDS}; check the path.") from error
    except Exception as error:  # pydicom raises many kinds for a damaged or compressed file
        raise InputError(
            f"{path}: cannot be read as DICOM ({type(error).__name__}: {error}); it may be truncated, or compressed in "
            "a way that is not supported (decompress it, for example with gdcmconv --raw)."
        ) from error
    if grows_with_attenuation and not grows:
        pixels = (-1 - pixels) if signed else (2**bits - 1 - pixels)
    elif not grows_with_attenuation and sign is not None and grows:
        raise InputError(
            f"{path}: states that its numbers fall with intensity (PixelIntensityRelationshipSign -1), but the JSON "
            "says 'transmission'; say 'line_integrals' there if they are."
        )
    if slope == 1 and intercept == int(intercept):
        return pixels + int(intercept)  # stays whole, so that a count of 0 is known as one
    return pixels * slope + intercept
