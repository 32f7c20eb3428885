"""Deformed copies of a CT: many chests from one, so that what trains on phantoms sees real texture as well.

Where one real scan is at hand and no collection, its copies under random maps are the cheapest further chests
(elastic augmentation; Simard et al. 2003, here in 3D). They have one patient's organs in one patient's order, and teach
what tissue looks like, not how patients differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .files import InputError
from .phantoms.canvas import rotation_xyz
from .presets import VolumePreset

AIR_HU = -1000.0


@dataclass(frozen=True)
class Deformation:
    """How far copies may differ from the scan; each is drawn evenly up to these limits, lattices from a Gaussian."""

    scale: tuple[float, float] = (0.9, 1.15)  # of each axis, the body's size over the scan's
    turn_deg: float = 8.0  # about each axis
    shift_mm: float = 12.0  # along each axis
    coarse_mm: float = 4.8  # standard deviation of the displacement of a lattice of 5³ nodes over the cube
    fine_mm: float = 1.9  # the same of 9³ nodes
    density: float = 0.04  # share by which all attenuation rises or falls
    offset_hu: float = 15.0  # of all that is denser than -900 HU
    mirror: float = 0.5  # share of copies with left and right exchanged


def deformed_copies(
    hu: Float[Tensor, "z y x"],
    volume: VolumePreset,
    count: int,
    seed: int = 0,
    limits: Deformation | None = None,
) -> Float[Tensor, "count 1 z y x"]:
    """Copies of one CT under random continuous maps, in HU, on the grid of ``volume``.

    Args:
        hu: the CT on a cube of the same field of view; its edge a multiple of the grid's (finer is better: copies are
            averaged down after the deformation, as a scanner averages).
        volume: grid and HU window.
        count: of copies.
        seed: the same seed gives the same copies.
        limits: by default :class:`Deformation`'s.

    Raises:
        InputError: not a cube of such an edge, values that are not finite, or no copies.
    """
    edge, d = hu.shape[-1], limits or Deformation()
    if hu.ndim != 3 or set(hu.shape) != {edge} or edge % volume.size:
        raise InputError(
            f"hu: found shape {tuple(hu.shape)}, expected a cube with an edge of k x {volume.size} voxels."
        )
    if not torch.isfinite(hu).all():
        raise InputError("hu: holds NaN or infinity, expected Hounsfield units; check the CT.")
    if count < 1:
        raise InputError(f"count: found {count}, expected at least 1.")
    generator = torch.Generator().manual_seed(seed)
    density = (hu.clamp(volume.hu_min, volume.hu_max) - AIR_HU)[None, None]
    copies = []
    for _ in range(count):
        at = random_map(edge, volume.fov_mm, d, generator)
        # Beyond the scan its last slice goes on: a trunk does not end in air.
        copy = (
            F.grid_sample(density, at, padding_mode="border", align_corners=False)
            * (1 + evenly_drawn(-d.density, d.density, generator))
            + AIR_HU
        )
        copy = torch.where(copy > AIR_HU + 100, copy + evenly_drawn(-d.offset_hu, d.offset_hu, generator), copy)
        copies.append(F.avg_pool3d(copy, edge // volume.size)[0].clamp(volume.hu_min, volume.hu_max))
    return torch.stack(copies)


def warped(
    volumes: Float[Tensor, "b 1 z y x"], fov_mm: float, seed: int = 0, limits: Deformation | None = None
) -> Float[Tensor, "b 1 z y x"]:
    """Every volume under a random map of its own, in whatever unit it has; none is mirrored.

    Args:
        volumes: cubes.
        fov_mm: their edge.
        seed, limits: as in :func:`deformed_copies`.
    """
    generator, d, edge = torch.Generator().manual_seed(seed), limits or Deformation(), volumes.shape[-1]
    maps = (random_map(edge, fov_mm, replace(d, mirror=0.0), generator).to(volumes) for _ in volumes)
    pairs = zip(volumes.split(1), maps, strict=True)
    return torch.cat([F.grid_sample(v, at, padding_mode="border", align_corners=False) for v, at in pairs])


def evenly_drawn(low: float, high: float, generator: torch.Generator) -> float:
    """A number between the two."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def random_map(edge: int, fov_mm: float, d: Deformation, generator: torch.Generator) -> Float[Tensor, "1 z y x 3"]:
    """Where each voxel of a copy comes from, in the coordinates of grid_sample: the cube from -1 to 1."""
    unit = 2 / fov_mm

    def draw(low: float, high: float) -> float:
        return evenly_drawn(low, high, generator)

    angles = (draw(-d.turn_deg, d.turn_deg), draw(-d.turn_deg, d.turn_deg), draw(-d.turn_deg, d.turn_deg))
    turn = torch.as_tensor(rotation_xyz(angles), dtype=torch.float32)
    # The map goes from the copy to the scan, so a larger body is a smaller factor.
    factors = torch.tensor([1 / draw(*d.scale) for _ in range(3)])
    if draw(0, 1) < d.mirror:
        factors[0] *= -1
    shift = torch.tensor([[draw(-d.shift_mm, d.shift_mm) * unit] for _ in range(3)])
    affine = torch.cat([turn * factors, shift], dim=1)
    at = F.affine_grid(affine[None], [1, 1, edge, edge, edge], align_corners=False)
    for nodes, deviation in ((5, d.coarse_mm), (9, d.fine_mm)):
        lattice = torch.randn(1, 3, nodes, nodes, nodes, generator=generator) * (deviation * unit)
        moved = F.interpolate(lattice, size=(edge,) * 3, mode="trilinear", align_corners=True)
        at = at + moved.permute(0, 2, 3, 4, 1)
    return at
