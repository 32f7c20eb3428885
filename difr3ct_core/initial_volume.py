"""A first guess in voxels: what a network or a solver makes of the x-rays, refined. Beyond the paper.

Three steps, of which a preset's ``initial`` chooses:

1. INRR3CT (:class:`difr3ct_core.implicit.ImplicitVolume`), asked for the value of every voxel; or, where x-rays are
   many, a classical solver, which needs no training (``initial.solver``).
2. INRR3CT's volume, moved to agree with the x-rays (:func:`difr3ct_core.baselines.classical.tv` with it as prior).
3. A 3D U-Net that sees 1 and 2, and takes away what is wrong with 2 (``initial.refine_widths``). A function of position
   knows nothing of its neighbours, and a solver nothing of patients; this knows both. It is learned post-processing
   (Jin et al. 2017, "FBPConvNet") with one step of learned iterative reconstruction (Adler and Öktem 2018) before it.

All of it is trained by least squares, so it gives the mean of the volumes that the x-rays allow: a blur, to which the
diffusion model adds what a mean cannot hold. What the autoencoder loses of that volume is known, and given back to
every sample (:func:`difr3ct_core.initial.first_guess`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .baselines.classical import METHODS, tv
from .consistency import to_mu, to_unit
from .convolution import Conv3d
from .files import InputError
from .geometry import View
from .implicit import ImplicitVolume
from .presets import FusionPreset, Preset

#: The iterative methods; filtered back-projection has no number of iterations, and is no use with few views.
SOLVERS = {name: method for name, method in METHODS.items() if name != "fbp"}
#: Of step 2, chosen on phantoms for INRR3CT at two and four views: weights in mm as in
#: :func:`difr3ct_core.consistency.correct`, with less total variation, for the network after it knows better.
TV_WEIGHT_MM, PRIOR_WEIGHT_MM, ITERATIONS = 0.0001, 0.1, 30


def initial_volume(
    xrays: Float[Tensor, "b n v u"], views: Sequence[View], preset: Preset, batch: int = 16
) -> Float[Tensor, "b 1 z y x"]:
    """The solver's reconstruction in [-1, 1], clipped to the preset's window.

    Args:
        xrays: line integrals, dimensionless.
        views: one per x-ray, parallel or cone, at any angles.
        preset: ``initial.solver`` is a name of :data:`SOLVERS`; grid and window.
        batch: patients solved together, which bounds the memory.

    Raises:
        InputError: no such solver, or x-rays that do not match the views.
    """
    p = preset.initial
    if p.solver not in SOLVERS:
        raise InputError(f"initial.solver: found {p.solver!r}, expected 'none' or one of {', '.join(SOLVERS)}.")
    parts = []
    with torch.no_grad(), torch.autocast(xrays.device.type, enabled=False):
        for chunk in xrays.float().split(batch):
            mu = SOLVERS[p.solver](chunk, views, preset.volume.shape, preset.volume.spacing_mm, iterations=p.iterations)
            parts.append(to_unit(mu, preset)[:, None])
    return torch.cat(parts)


def check_images(xrays: Tensor, views: Sequence[View]) -> None:
    """As many x-rays as views?

    Raises:
        InputError: no.
    """
    n = xrays.shape[1]
    if n != len(views) or n == 0:
        raise InputError(f"xrays: found {n} images, expected {len(views)}, one per view.")


class Refinement(nn.Module):
    """A 3D U-Net on voxels in blocks of 2³, whose answer is added to the last of its input volumes.

    In blocks of 2³ a convolution of 3³ reaches twice as far at an eighth of the cost, and no voxel is lost. It begins
    as the identity.

    Args:
        volumes: how many it sees of each patient.
        widths: channels at half the resolution, a quarter, ...
        groups: of the normalisation.
    """

    #: Of what the network adds: about the deviation of what it has to find, in the unit of [-1, 1].
    SCALE = 0.3

    def __init__(self, volumes: int, widths: Sequence[int], groups: int = 8) -> None:
        super().__init__()
        self.multiple = 2 ** len(widths)
        self.stem = Conv3d(8 * volumes + 3, widths[0])
        pairs = list(itertools.pairwise(widths))
        self.first = _Block(widths[0], widths[0], groups)
        self.down = nn.ModuleList(_Block(a, b, groups) for a, b in pairs)
        self.middle = _Block(widths[-1], widths[-1], groups)
        self.up = nn.ModuleList(_Block(b + a, a, groups) for a, b in reversed(pairs))
        self.head = nn.Sequential(nn.GroupNorm(groups, widths[0]), nn.SiLU(), Conv3d(widths[0], 8))
        nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]

    def forward(self, volumes: Float[Tensor, "b k z y x"]) -> Float[Tensor, "b 1 z y x"]:
        """Volumes in [-1, 1] -> the refined one, not clipped.

        Raises:
            InputError: an edge that does not halve often enough.
        """
        if any(edge % self.multiple for edge in volumes.shape[2:]):
            raise InputError(
                f"volume: found {tuple(volumes.shape[2:])} voxels, expected multiples of {self.multiple} on each axis; "
                "choose fewer initial.refine_widths."
            )
        blocks = rearrange(volumes, "b k (z p) (y q) (x r) -> b (k p q r) z y x", p=2, q=2, r=2)
        ends = [torch.linspace(-1, 1, n, device=volumes.device, dtype=volumes.dtype) for n in blocks.shape[2:]]
        place = torch.stack(torch.meshgrid(*ends, indexing="ij")).expand(len(volumes), -1, -1, -1, -1)
        h = self.first(self.stem(torch.cat([blocks, place], dim=1)))
        skips = [h]
        for block in self.down:
            h = block(F.avg_pool3d(h, 2))
            skips.append(h)
        h = self.middle(h)
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            h = block(torch.cat([F.interpolate(h, scale_factor=2, mode="trilinear"), skip], dim=1))
        found = rearrange(self.head(h), "b (p q r) z y x -> b 1 (z p) (y q) (x r)", p=2, q=2, r=2)
        return volumes[:, -1:] + self.SCALE * found


class _Block(nn.Module):
    """Twice (GroupNorm, SiLU, 3³ convolution), added to the input or a projection of it."""

    def __init__(self, ci: int, co: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(groups, ci), nn.SiLU(), Conv3d(ci, co))
        self.second = nn.Sequential(nn.GroupNorm(groups, co), nn.SiLU(), Conv3d(co, co))
        self.skip = nn.Identity() if ci == co else nn.Conv3d(ci, co, 1)
        nn.init.zeros_(self.second[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        return self.skip(x) + self.second(self.first(x))


class InitialVolume(nn.Module):
    """See the head of this file. One set of weights serves any number of views.

    Args:
        preset: ``initial``, grid, window and scale of the x-rays.

    Raises:
        InputError: a solver without a refinement, which would leave nothing to train.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        p = preset.initial
        if p.solver != "none" and not p.refine_widths:
            raise InputError(
                f"initial.solver: found {p.solver!r} beside in_voxels without refine_widths, expected 'none'; only a "
                "refinement is told of a solver."
            )
        self.preset = preset
        self.field, self.refinement = None, None
        if p.solver == "none":
            self.field = ImplicitVolume(
                FusionPreset(p.widths, p.features), p.width, p.view_layers, p.joint_layers, p.octaves, p.omega,
                preset.xray.scale, preset.volume.fov_mm,
            )  # fmt: skip
        if p.refine_widths:
            self.refinement = Refinement(1 if self.field is None else 2, p.refine_widths)

    def forward(self, xrays: Float[Tensor, "b n v u"], views: Sequence[View]) -> Float[Tensor, "b 1 z y x"]:
        """The volume in [-1, 1] that line integrals suggest.

        Raises:
            InputError: not as many x-rays as views.
        """
        return self.refined(self.unrefined(xrays, views))

    def refined(self, unrefined: Float[Tensor, "b k z y x"]) -> Float[Tensor, "b 1 z y x"]:
        """The volume in [-1, 1] that :meth:`unrefined` becomes."""
        if self.refinement is None:
            return unrefined
        with torch.autocast(unrefined.device.type, enabled=False):
            return torch.cat([self.refinement(some) for some in unrefined.split(4)]).clamp(-1, 1)

    def unrefined(self, xrays: Float[Tensor, "b n v u"], views: Sequence[View]) -> Float[Tensor, "b k z y x"]:
        """What the refinement sees: the solver's volume; or the network's, and that one moved to the x-rays.

        Without a refinement it is the network's volume alone.
        """
        check_images(xrays, views)
        preset, volume = self.preset, self.preset.volume
        if self.field is None:
            return initial_volume(xrays, views, preset)
        with torch.autocast(xrays.device.type, enabled=False):
            found = self.field.volume(xrays.float(), views, volume.shape, volume.spacing_mm)
            if self.refinement is None:
                return found
            batch = 8 if xrays.device.type == "cpu" else 64
            with torch.no_grad():
                mu = to_mu(found[:, 0], preset)
                parts = [
                    tv(images, views, volume.shape, volume.spacing_mm, weight_mm=TV_WEIGHT_MM, iterations=ITERATIONS,
                       prior=prior, prior_weight_mm=PRIOR_WEIGHT_MM)
                    for images, prior in zip(xrays.float().split(batch), mu.split(batch), strict=True)
                ]  # fmt: skip
            return torch.cat([found, to_unit(torch.cat(parts), preset)[:, None]], dim=1)

    def loss(
        self,
        xrays: Float[Tensor, "b n v u"],
        views: Sequence[View],
        truth: Float[Tensor, "b 1 z y x"],
        generator: torch.Generator,
        part: slice,
        batch: int,
        unrefined: Float[Tensor, "b k z y x"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean squared error: of the refinement, at every voxel, where there is one; else of the network.

        The network's is :meth:`difr3ct_core.implicit.ImplicitVolume.loss` at ``initial.points`` voxels.

        Args:
            xrays, views, truth, generator, part, batch: as there.
            unrefined: what :meth:`unrefined` returns, if it is known already.
        """
        if self.refinement is not None:
            if unrefined is None:
                with torch.no_grad():
                    unrefined = self.unrefined(xrays, views)
            return (self.refinement(unrefined) - truth).square().mean()
        assert self.field is not None
        spacing, points = self.preset.volume.spacing_mm, self.preset.initial.points
        with torch.autocast(xrays.device.type, enabled=False):
            return self.field.loss(xrays.float(), views, truth, spacing, points, generator, part, batch)
