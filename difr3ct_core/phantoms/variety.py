"""What real chests have and the phantoms of a cohort do not: contrast medium, a table, other bodies and densities.

A network that learns from one cohort believes that every chest is of it. Where one real scan misses its x-rays most
after a reconstruction is the blood, which a contrast medium made bright, the table, and the outline of the body.
Phantoms that differ from each other in all of that, more than patients do, teach a network to look at the x-rays first
(domain randomisation; Tobin et al. 2017, of contrasts in medical images Billot et al. 2023). They are for training
alone: test phantoms stay those of the cohort.

    >>> from difr3ct_core.phantoms import make_phantom
    >>> from difr3ct_core.presets import VolumePreset
    >>> phantom = make_phantom(seed=7, size=32)
    >>> other = varied(phantom.hu[None], phantom.labels[None], VolumePreset(size=32), seed=1)
    >>> other.shape
    torch.Size([1, 1, 32, 32, 32])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, UInt8
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..deformation import Deformation, evenly_drawn, random_map
from ..files import InputError
from ..presets import VolumePreset
from .anatomy import LABELS

_BONES = ("vertebrae", "ribs", "sternum", "scapulae", "clavicles", "humeri", "costal_cartilage")
_LUNGS = ("lung_left", "lung_right")
_VESSELS = ("aorta", "great_vessels", "lung_vessels")
_ORGANS = ("liver", "spleen", "kidneys")
#: The outline of everything; what is denser is body or table.
_OUTLINE_HU = -500.0


@dataclass(frozen=True)
class Variety:
    """How far variations may go; numbers are drawn evenly between the two given. Our choice, but for the contrast."""

    contrast: float = 0.6  # share of patients with a contrast medium
    contrast_hu: tuple[float, float] = (40.0, 350.0)  # of blood; chest CT: arterial phase 200 to 400 above unenhanced
    chamber: tuple[float, float] = (-0.5, 0.5)  # by which share the left of the heart has more of it than the right
    table: float = 0.8  # share of patients who lie on one
    lung_hu: tuple[float, float] = (-60.0, 60.0)  # added to the parenchyma
    soft_hu: tuple[float, float] = (-15.0, 15.0)  # added to each other organ, by itself
    bone: tuple[float, float] = (0.7, 1.4)  # times what exceeds soft tissue
    grain_hu: tuple[float, float] = (0.0, 15.0)  # standard deviation of white noise
    shape: Deformation = field(
        default_factory=lambda: Deformation((0.88, 1.18), 8.0, 15.0, coarse_mm=7.0, fine_mm=2.8, mirror=0.0)
    )


def varied(
    hu: Float[Tensor, "b z y x"] | Integer[Tensor, "b z y x"],
    labels: UInt8[Tensor, "b z y x"],
    volume: VolumePreset,
    seed: int = 0,
    limits: Variety | None = None,
) -> Float[Tensor, "b 1 z y x"]:
    """Variations of phantoms in HU, clipped to the window of ``volume``.

    Args:
        hu, labels: phantoms and their organs, see ``LABELS``.
        volume: grid and HU window.
        seed: patient i has numbers drawn from seed + i.
        limits: by default :class:`Variety`'s.

    Raises:
        InputError: shapes that differ from each other or from the grid.
    """
    if hu.ndim != 4 or tuple(hu.shape[1:]) != volume.shape or hu.shape != labels.shape:
        raise InputError(
            f"hu, labels: found shapes {tuple(hu.shape)} and {tuple(labels.shape)}, expected (b, z, y, x) of "
            f"{volume.shape} for both."
        )
    limits = limits or Variety()
    pairs = enumerate(zip(hu, labels, strict=True))
    return torch.stack([_one(h.float(), o, volume, seed + i, limits)[None] for i, (h, o) in pairs])


def _one(hu: Tensor, labels: Tensor, volume: VolumePreset, seed: int, limits: Variety) -> Float[Tensor, "z y x"]:
    generator = torch.Generator().manual_seed(seed)

    def draw(ends: tuple[float, float]) -> float:
        return evenly_drawn(*ends, generator)

    at = random_map(volume.size, volume.fov_mm, limits.shape, generator)
    hu = F.grid_sample(hu[None, None], at, padding_mode="border", align_corners=False)[0, 0]
    labels = F.grid_sample(labels[None, None].float(), at, "nearest", "border", align_corners=False)[0, 0].long()
    # Organ by organ.
    added = torch.tensor([draw(limits.soft_hu) for _ in LABELS])
    added[LABELS["air"]] = 0.0
    lungs = draw(limits.lung_hu)
    for name in _LUNGS:
        added[LABELS[name]] = lungs
    blood = draw(limits.contrast_hu) * (draw((0.0, 1.0)) < limits.contrast)
    for name in _VESSELS:
        added[LABELS[name]] += blood * draw((0.6, 1.1))
    for name in _ORGANS:
        added[LABELS[name]] += blood * draw((0.0, 0.35))
    change = added[labels]
    heart = (labels == LABELS["heart"]).float()
    # The wall of the heart takes up little of it: its chambers lie a centimetre inside.
    inside = ((_blurred(heart, 10.0, volume.spacing_mm) - 0.5) * 2).clamp(0, 1)
    across = torch.linspace(-1, 1, volume.size) * 3  # +x is the left; the heart is a third as wide
    change = change + heart * (0.3 + 0.7 * inside) * blood * (1 + draw(limits.chamber) * across.clamp(-1, 1))
    hard = torch.zeros(len(LABELS))
    hard[[LABELS[name] for name in _BONES]] = draw(limits.bone) - 1
    hu = hu + _blurred(change, 3.0, volume.spacing_mm) + hard[labels] * (hu - 60).clamp_min(0)
    hu = hu + draw(limits.grain_hu) * torch.randn(hu.shape, generator=generator) * (hu > -950)
    if draw((0.0, 1.0)) < limits.table:
        hu = _on_table(hu, volume, draw)
    return hu.clamp(volume.hu_min, volume.hu_max)


def _blurred(volume: Tensor, deviation_mm: float, spacing_mm: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(volume.numpy(), deviation_mm / spacing_mm, mode="constant", truncate=3.0))


def _on_table(hu: Tensor, volume: VolumePreset, draw: Callable[[tuple[float, float]], float]) -> Tensor:
    """A cushion and a bent plate of foam in a shell, behind the back."""
    d, n = volume.spacing_mm, volume.size
    axis = (torch.arange(n) - (n - 1) / 2) * d
    body = (hu > _OUTLINE_HU)[:, :, n // 4 : -(n // 4)].any(-1)  # (z, y)
    rows = torch.where(body, axis, axis.new_full((), -1e4)).amax(1)
    back = rows[rows > -1e4].median() if (rows > -1e4).any() else axis[-1]
    bend, half = draw((0.0, 1 / 500)), draw((170.0, 260.0))
    behind = axis[:, None] - back - draw((-3.0, 10.0)) + bend * axis[None, :].square()  # (y, x)
    cushion, shell, foam = draw((2.0, 30.0)), draw((2.0, 8.0)), draw((10.0, 60.0))
    fillings = (draw((-985.0, -850.0)), draw((-400.0, 100.0)), draw((-985.0, -800.0)))
    ends = (0.0, cushion, cushion + shell, cushion + shell + foam, cushion + 2 * shell + foam)
    for low, high, value in zip(ends, ends[1:], (*fillings, fillings[1]), strict=False):
        share = ((behind - low) / d + 0.5).clamp(0, 1) * ((high - behind) / d + 0.5).clamp(0, 1)
        share = share * ((half - axis.abs()) / d + 0.5).clamp(0, 1)
        free = ((-900 - hu) / 50 + 1).clamp(0, 1)  # where nothing lies yet
        hu = hu + free * share * (value - hu)
    return hu
