"""What can be wrong with the input of a projector, found before any work is done."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import InputError
from ..geometry import View, voxel_centres, world_to_detector

#: Share of the field of view that may miss a detector before a warning.
TRUNCATION_WARNING = 0.01


def check_volume(name: str, volume: object, axes: str = "(b, c, z, y, x)") -> Tensor:
    """A tensor of five axes and of a type the projector computes in: float32 or float64 (half precision is widened).

    Raises:
        InputError: another type or number of axes, or an empty axis.
    """
    if not isinstance(volume, Tensor):
        raise InputError(f"{name}: found {type(volume).__name__}, expected a tensor {axes}; use torch.as_tensor.")
    if volume.ndim != 5:
        raise InputError(
            f"{name}: found {volume.ndim} axes {tuple(volume.shape)}, expected 5, {axes}; "
            "add the batch and channel axes with x[None, None]."
        )
    if not volume.is_floating_point():
        raise InputError(
            f"{name}: found {volume.dtype}, expected floating point numbers; CT numbers (HU) must be turned into "
            "attenuation first, with ct.hu_to_mu."
        )
    if 0 in volume.shape:
        raise InputError(f"{name}: found an empty axis in {tuple(volume.shape)}, expected {axes} of at least 1 each.")
    return volume if volume.dtype in (torch.float32, torch.float64) else volume.float()


def check_finite(name: str, result: Tensor, source: Tensor) -> Tensor:
    """``result``, if it is finite. One NaN on a ray spoils its sum, so the small result tells about the large source.

    Raises:
        InputError: ``source`` holds NaN or infinity.
    """
    if torch.isfinite(result.detach().sum()) or torch.isfinite(result.detach()).all():
        return result
    bad = int((~torch.isfinite(source.detach())).sum())
    if bad:
        raise InputError(
            f"{name}: {bad} of {source.numel()} values are NaN or infinite, expected finite attenuation in 1/mm; "
            "repair or mask them first."
        )
    raise InputError(f"{name}: its values overflow {source.dtype} when summed; check their unit (1/mm).")


def truncated_share(view: View, shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Share of the volume's field of view (the upright cylinder that it holds) whose rays miss the detector."""
    # A coarse grid over the same extent tells enough.
    counts = [min(n, 24) for n in shape]
    points = voxel_centres(counts, [n * s / c for n, s, c in zip(shape, spacing, counts, strict=True)], torch.float64)
    radii = torch.tensor([shape[2] * spacing[2] / 2, shape[1] * spacing[1] / 2], dtype=torch.float64)
    points = points[(points[..., :2] / radii).norm(dim=-1) <= 1]
    pixels = world_to_detector(points, view)
    count = torch.tensor(view.detector_shape, dtype=torch.float64)
    seen = ((pixels > -0.51) & (pixels < count - 0.49)).all(dim=-1)
    return 1.0 - float(seen.double().mean())


def check_geometry(views: Sequence[View], shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    """Views and volume must fit together.

    Warns:
        UserWarning: part of the volume misses a detector; with a hint if the axes look reversed.

    Raises:
        InputError: the source stands inside the volume.
    """
    radius = math.hypot(shape[1] * spacing[1], shape[2] * spacing[2]) / 2
    for view in views:
        if view.mode == "cone" and view.dso_mm <= radius:
            raise InputError(
                f"view.dso_mm: found {view.dso_mm:g} mm, but the volume's corners reach {radius:g} mm from the "
                "rotation axis; the source must stand outside, so raise dso_mm or crop the volume."
            )
    shares = [truncated_share(view, shape, spacing) for view in views]
    worst = max(range(len(views)), key=shares.__getitem__)
    if shares[worst] <= TRUNCATION_WARNING:
        return
    size = " x ".join(f"{n * s:g}" for n, s in zip(shape, spacing, strict=True))
    text = (
        f"views: {shares[worst]:.0%} of the rays through the volume ({size} mm in z, y, x) miss the detector of the "
        f"view at {views[worst].angle_deg:g} degrees; use more or larger pixels, or crop the volume."
    )
    swapped = [truncated_share(view, shape[::-1], spacing[::-1]) for view in views]
    if max(swapped) <= TRUNCATION_WARNING:
        text += f" In the order (x, y, z) all would hit: is the volume's shape {tuple(shape)} really (z, y, x)?"
    warnings.warn(text, stacklevel=4)


def check_memory(
    views: Sequence[View], shape: tuple[int, int, int], count: int, item: int, device: torch.device
) -> None:
    """Refuse work that cannot fit, instead of being killed half-way.

    Args:
        count: volumes at once (batch times channels).
        item: bytes of a number.

    Raises:
        InputError: says how much is needed and how much there is.
    """
    (nz, ny, nx), (n_v, n_u) = shape, views[0].detector_shape
    entries = 2 * len(views) * n_u * max(ny, nx)
    volume, image = count * nz * ny * nx * item, count * len(views) * n_v * n_u * item
    # Matrix and transpose with their indices, and the arrays they are built from.
    needed = volume + 2 * image + entries * (2 * (item + 4) + 96)
    free = available_bytes(device)
    if needed > free:
        raise InputError(
            f"volume: {count} of {nz} x {ny} x {nx} voxels and {len(views)} views of {n_v} x {n_u} pixels need about "
            f"{_size(needed)} of memory, found {_size(free)} on {device}; use a coarser grid, fewer "
            "views at once or a larger machine."
        )


def _size(count: float) -> str:
    """Bytes in words, two digits or more."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{count / factor:.0f} {unit}" if count >= 10 * factor else f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def available_bytes(device: torch.device) -> float:
    """Free memory of a device: what the system, and a container's limit, leave."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = [math.inf]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(float(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limits.append(
            float((group / "memory.max").read_text()) - float((group / "memory.current").read_text())
        )  # "max", without a limit, is no number
    except (OSError, ValueError):
        pass
    if len(limits) == 1 and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    return min(limits)
