"""NAF: one patient's attenuation as a small network, fitted to that patient's x-rays (Zha, Zhang & Li 2022).

The network is a function of position, µ(x) = µ_max · sigmoid(MLP(hash grid(x))), and its line integrals along the rays
of the x-rays are compared with these. No other patient is seen: with many views this is tomography with a learned
interpolation, with few views nothing says what lies where along a ray, and the fit has no reason to find it.

The multi-resolution hash encoding (Müller et al. 2022) is written in plain torch. A level divides the cube into cells;
the entries at a cell's eight corners are interpolated trilinearly. A level with more corners than its table has
entries shares them by the hash (i·1 xor j·2654435761 xor k·805459861) mod table size.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import ct
from ..files import InputError
from ..geometry import View, check_views, pixel_rays, views_to_json, voxel_centres
from ..presets import Preset, VolumePreset, XrayPreset
from ..training import fit
from .classical_problem import make_problem
from .presets import NAFPreset

#: Müller et al. 2022, Eq. 4.
PRIMES = (1, 2654435761, 805459861)
#: Positions that the whole volume is evaluated at, at once.
CHUNK = 2**17


class HashGrid(nn.Module):
    """Multi-resolution hash encoding of points in the unit cube.

    Args:
        levels, features, base, growth, log2_table: see :class:`NAFPreset`; level l has base·growth^l cells per edge.
    """

    corners: Tensor

    def __init__(self, levels: int, features: int, base: int, growth: int, log2_table: int) -> None:
        super().__init__()
        self.resolutions = [base * growth**level for level in range(levels)]
        self.entries = [min((cells + 1) ** 3, 2**log2_table) for cells in self.resolutions]
        self.channels = levels * features
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(count, features)) for count in self.entries)
        for table in self.tables:
            nn.init.uniform_(table, -1e-4, 1e-4)  # Müller et al. 2022, §4
        steps = torch.tensor([0, 1])
        self.register_buffer("corners", torch.cartesian_prod(steps, steps, steps), persistent=False)

    def index(self, corner: Int[Tensor, "*any 3"], level: int) -> Int[Tensor, "*any"]:
        """Row of a level's table for the corners of cells, whole numbers 0 .. cells."""
        edge, entries = self.resolutions[level] + 1, self.entries[level]
        i, j, k = corner.unbind(-1)
        if entries == edge**3:
            return i + edge * (j + edge * k)
        return ((i * PRIMES[0]) ^ (j * PRIMES[1]) ^ (k * PRIMES[2])) % entries

    def forward(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, "p channels"]:
        """Features of points in [0, 1]³, the levels one after the other."""
        found = []
        for level, (cells, table) in enumerate(zip(self.resolutions, self.tables, strict=True)):
            position = points * cells
            cell = position.floor().clamp(0, cells - 1)
            inside = (position - cell)[:, None]
            weights = torch.where(self.corners.bool(), inside, 1 - inside).prod(-1)
            rows = self.index(cell.long()[:, None] + self.corners, level)
            found.append(F.embedding_bag(rows, table, per_sample_weights=weights.to(table), mode="sum"))
        return torch.cat(found, dim=1)


class NAF(nn.Module):
    """Attenuation as a function of position.

    Args:
        settings: sizes.
        fov_mm: edge of the cube in which it is defined, centred on the origin.
        mu_max: largest attenuation that it can take, 1/mm.
    """

    def __init__(self, settings: NAFPreset, fov_mm: float, mu_max: float) -> None:
        super().__init__()
        s = settings
        self.fov_mm, self.mu_max = fov_mm, mu_max
        self.encoding = HashGrid(s.levels, s.features, s.base, s.growth, s.log2_table)
        self.skip = s.layers // 2  # before this layer the encoding joins in again
        widths = [self.encoding.channels] + [s.width] * (s.layers - 1)
        widths[self.skip] += self.encoding.channels
        self.layers = nn.ModuleList(
            nn.Linear(width, s.width if i < s.layers - 1 else 1) for i, width in enumerate(widths)
        )
        # An eighth of the range, about half of water, everywhere: half of it would be bone, from which Adam needs
        # hundreds of steps to get away. Ours.
        nn.init.constant_(self.layers[-1].bias, -2.0)

    def forward(self, points_mm: Float[Tensor, "p 3"]) -> Float[Tensor, " p"]:
        """µ in 1/mm at points (x, y, z) in mm inside the cube."""
        encoded = self.encoding((points_mm / self.fov_mm + 0.5).clamp(0, 1))
        h = encoded
        for i, layer in enumerate(self.layers):
            h = layer(torch.cat([h, encoded], dim=1) if i == self.skip else h)
            if i < len(self.layers) - 1:
                h = F.leaky_relu(h)
        return self.mu_max * torch.sigmoid(h[:, 0])

    @torch.no_grad()
    def volume(self, volume: VolumePreset) -> Float[Tensor, "z y x"]:
        """µ at the centres of a grid's voxels, on the CPU."""
        device = self.layers[0].weight.device
        points = voxel_centres(volume.shape, volume.spacing_mm).view(-1, 3)
        parts = [self(part.to(device)).cpu() for part in points.split(CHUNK)]
        return torch.cat(parts).view(volume.shape)


@dataclasses.dataclass(frozen=True)
class Rays:
    """Rays cut to the cube: position ``origin + t·direction`` for t in ``near .. near + length``, all in mm."""

    origin: Float[Tensor, "r 3"]
    direction: Float[Tensor, "r 3"]
    near: Float[Tensor, " r"]
    length: Float[Tensor, " r"]  # 0 for a ray that misses the cube


def rays_in_cube(views: Sequence[View], fov_mm: float) -> Rays:
    """The rays of all pixels of all views, in the order of an image stack (view, v, u)."""
    origins, directions = zip(*(pixel_rays(view) for view in views), strict=True)
    origin, direction = (torch.cat([part.reshape(-1, 3) for part in parts]) for parts in (origins, directions))
    # Slabs (Kay & Kajiya 1986). A ray along a face would divide by zero; off by 1e-12 it is wholly in or out.
    slope = torch.where(direction.abs() < 1e-12, torch.full_like(direction, 1e-12), direction)
    first, second = (-fov_mm / 2 - origin) / slope, (fov_mm / 2 - origin) / slope
    near = torch.minimum(first, second).amax(-1)
    if views[0].mode == "cone":
        near = near.clamp_min(0.0)  # nothing is seen from behind the source
    length = (torch.maximum(first, second).amin(-1) - near).clamp_min(0.0)
    near = torch.where(length > 0, near, torch.zeros_like(near))
    return Rays(*(part.float() for part in (origin, direction, near, length)))


def line_integrals(
    field: nn.Module, rays: Rays, rows: Int[Tensor, " b"], jitter: Float[Tensor, "b s"]
) -> Float[Tensor, " b"]:
    """Integrals of a field along some rays: a ray is cut into s equal pieces, with one sample in each.

    Args:
        field: points (p, 3) in mm -> (p,) in 1/mm.
        rays: of which ``rows`` are taken.
        jitter: place of each sample in its piece, 0 to 1; 0.5 is the midpoint rule.
    """
    b, samples = jitter.shape
    steps = (torch.arange(samples, device=jitter.device) + jitter) / samples
    length = rays.length[rows]
    along = rays.near[rows, None] + steps * length[:, None]
    points = rays.origin[rows, None] + along[..., None] * rays.direction[rows, None]
    return field(points.view(-1, 3)).view(b, samples).mean(1) * length


def fit_naf(
    xrays: Float[Tensor, "view v u"],
    views: Sequence[View],
    settings: NAFPreset,
    volume: VolumePreset,
    xray: XrayPreset,
    seed: int = 0,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
) -> NAF:
    """Fit a field to one patient's x-rays.

    Args:
        xrays: line integrals.
        views: one per x-ray, parallel or cone.
        settings: sizes and training; its batch counts rays, drawn from all x-rays together.
        volume: the cube and the largest attenuation in it.
        xray: attenuation of water.
        seed: of initial weights, rays and samples.
        device: where to fit.
        folder: for checkpoint and log; a temporary one if not given.

    Raises:
        InputError: x-rays that do not match the views, or are not finite.
    """
    problem = make_problem(xrays[None], views, volume.shape, volume.spacing_mm)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return fit_naf(xrays, views, settings, volume, xray, seed, device, temporary)
    training = settings.training
    mu_max = float(ct.hu_to_mu(torch.tensor(volume.hu_max), xray.mu_water_per_mm))
    torch.manual_seed(seed)
    model = NAF(settings, volume.fov_mm, mu_max).to(device)
    rays = rays_in_cube(check_views(views), volume.fov_mm)
    rays = Rays(*(getattr(rays, field.name).to(device) for field in dataclasses.fields(Rays)))
    measured = problem.xrays.flatten().float().to(device)

    def loss_of_step(step: int, generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(measured), (training.batch_size,), generator=generator)[part].to(device)
        jitter = torch.rand(training.batch_size, settings.samples, generator=generator)[part].to(device)
        found = line_integrals(model, rays, rows, jitter)
        return ((found - measured[rows]) / xray.scale).square().mean(), {}

    fingerprint = {
        "kind": "naf",
        "settings": dataclasses.asdict(settings),
        "views": views_to_json(views),
        "volume": dataclasses.asdict(volume),
        "xrays": float(measured.double().sum()),
        "seed": seed,
    }
    best = fit(model, loss_of_step, training, folder, fingerprint, f"fitting {len(views)}-view NAF", seed)
    assert isinstance(best, NAF)
    return best


def reconstruct_naf(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    settings: NAFPreset,
    preset: Preset,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "b 1 z y x"]:
    """One fit per patient, as volumes in [-1, 1] on the CPU. Errors as in :func:`fit_naf`."""
    if xrays.ndim != 4:
        raise InputError(f"xrays: found shape {tuple(xrays.shape)}, expected (patient, view, v, u).")
    volume, water = preset.volume, preset.xray.mu_water_per_mm
    fields = [fit_naf(images, views, settings, volume, preset.xray, seed, device) for images in xrays]
    mu = torch.stack([field.volume(volume) for field in fields])
    return ct.hu_to_unit(ct.mu_to_hu(mu, water), volume)[:, None]
