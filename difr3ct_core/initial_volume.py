"""A first guess in voxels: what a network makes of the x-rays, refined. Beyond the paper.

Four steps; a preset without ``initial.refine_widths`` has the first alone:

1. INRR3CT (:class:`difr3ct_core.implicit.ImplicitVolume`), asked for the value of every voxel. It takes four x-rays at
   most, evenly spread, as in the paper.
2. Its volume, moved to agree with all x-rays (:func:`difr3ct_core.baselines.classical.tv` with it as prior). The
   farther it misses them, the less it is believed (:func:`trust`): a patient unlike those of the training is left to
   the x-rays.
3. A 3D U-Net that sees 1 and 2, and takes away what is wrong with 2. A function of position knows nothing of its
   neighbours, and a solver nothing of patients; this knows both. It is learned post-processing (Jin et al. 2017,
   "FBPConvNet") with one step of learned iterative reconstruction (Adler and Öktem 2018) before it. It can be
   taught what to do with a guess that is wrong, too (``initial.doubted``, :func:`difr3ct_core.latents.doubted`): at
   eight views that helped, at two it cost 0.3 dB and gave nothing.
4. Step 2 once more, from what 3 has found: where the network errs, the x-rays say so. Not where it has learned from
   imperfect x-rays (``initial.move_again``): scatter that it took away would come back.

A patient whose guess misses the x-rays by more than ``initial.second_from`` is left to a second network of all four
steps, which learned from variations of phantoms (:mod:`difr3ct_core.phantoms.variety`). Alone, for everybody, it would
cost phantoms 0.3 dB at four and two views. At eight views its steps 3 and 4 are repeated (``initial.second_passes``,
chosen on a real CT that it never saw); the first network, which knows one kind of patient, gets worse by it.

Its networks are trained by least squares, so it gives the mean of the volumes that the x-rays allow: a blur, to which
the diffusion model adds what a mean cannot hold. What the autoencoder loses of that volume is known, and given back to
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
from .consistency import graininess, misfit, most_variation, to_mu, to_unit
from .convolution import Conv3d
from .files import InputError
from .geometry import View
from .implicit import ImplicitVolume
from .presets import FusionPreset, Preset

#: The iterative methods; filtered back-projection has no number of iterations, and is no use with few views.
SOLVERS = {name: method for name, method in METHODS.items() if name != "fbp"}
#: The most x-rays that INRR3CT is asked about, which it cannot be trained with more of (memory).
FIELD_VIEWS = 4
#: Of step 2: weights in mm as in :func:`difr3ct_core.consistency.correct`, with less total variation, for the network
#: after it knows better; for a guess that misses its x-rays, noise left out, by no more than USUAL. Phantoms of the
#: training's kind miss them by 0.012 to 0.018, those of another cohort by up to 0.025, a real chest by 0.08. Chosen on
#: phantoms of the validation split and copies of a real CT (not on LIDC-IDRI-0001), at 2, 4 and 8 views.
TV_WEIGHT_MM, PRIOR_WEIGHT_MM, ITERATIONS, USUAL = 0.0001, 0.1, 60, 0.03


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


def trust(
    missed: Float[Tensor, " b"], noise: Float[Tensor, " b"] | float = 0.0
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Weights in mm of total variation and prior, for volumes that miss their x-rays by ``missed``.

    Beyond USUAL the one rises and the other falls with the cube: at 0.08 a volume counts for next to nothing, and the
    x-rays and the total variation decide. Noise makes the x-rays count for less, so both weights rise with it
    (:func:`difr3ct_core.consistency.graininess`, :func:`difr3ct_core.consistency.most_variation`).

    Args:
        missed, noise: as :func:`difr3ct_core.consistency.misfit` returns them.
    """
    excess, noise = (missed / USUAL).clamp_min(1.0) ** 3, torch.as_tensor(noise).to(missed)
    grain = graininess(noise)
    return torch.minimum(TV_WEIGHT_MM * excess * grain, most_variation(noise)), PRIOR_WEIGHT_MM / excess * grain


def evenly(count: int, most: int) -> list[int]:
    """Numbers of ``most`` of ``count`` views, evenly spread; all of them where they are no more."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


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
        passes: of the refinement and the move after it.

    Raises:
        InputError: a solver, which nothing here asks.
    """

    def __init__(self, preset: Preset, passes: int = 1) -> None:
        super().__init__()
        p = preset.initial
        if p.solver != "none":
            raise InputError(f"initial.solver: found {p.solver!r} beside in_voxels, expected 'none'.")
        self.preset, self.passes = preset, passes
        self.field = ImplicitVolume(
            FusionPreset(p.widths, p.features), p.width, p.view_layers, p.joint_layers, p.octaves, p.omega,
            preset.xray.scale, preset.volume.fov_mm,
        )  # fmt: skip
        self.refinement = Refinement(2, p.refine_widths) if p.refine_widths else None
        alone = preset.replace(initial={"second_from": 0.0, "refine_from": 0.0})
        self.second = InitialVolume(alone, p.second_passes) if p.second_from and p.refine_widths else None

    def forward(self, xrays: Float[Tensor, "b n v u"], views: Sequence[View]) -> Float[Tensor, "b 1 z y x"]:
        """The volume in [-1, 1] that line integrals suggest.

        Raises:
            InputError: not as many x-rays as views.
        """
        return self.refined(self.unrefined(xrays, views), xrays, views)

    def refined(
        self, unrefined: Float[Tensor, "b k z y x"], xrays: Float[Tensor, "b n v u"], views: Sequence[View]
    ) -> Float[Tensor, "b 1 z y x"]:
        """The volume in [-1, 1] that :meth:`unrefined` becomes: refined and, with ``initial.move_again``, moved again.

        No gradient passes the move; what is trained is :meth:`loss`.

        With ``initial.refine_from`` a patient whose guess misses the x-rays by less keeps the moved volume, and one
        whose guess misses them by twice that has the refined one: for a refinement that learned a real chest from
        copies of it, and may take another patient for that one. With ``initial.second_from`` a patient whose guess
        misses them by more has the volume of the second network.
        """
        if self.refinement is None:
            return unrefined
        with torch.autocast(unrefined.device.type, enabled=False):
            missed, noise = misfit(unrefined[:, 0], xrays.float(), views, self.preset)
            seen = unrefined
            for _ in range(self.passes):
                found = torch.cat([self.refinement(some) for some in seen.split(4)]).clamp(-1, 1)
                volumes = self.moved(found, xrays, views, noise) if self.preset.initial.move_again else found
                seen = torch.cat([found, volumes], dim=1)
            if start := self.preset.initial.refine_from:
                share = (missed / start - 1).clamp(0, 1).view(-1, 1, 1, 1, 1)
                volumes = torch.lerp(unrefined[:, -1:], volumes, share)
            if self.second is not None and (strange := missed > self.preset.initial.second_from).any():
                volumes = volumes.index_put((strange,), self.second(xrays[strange], views))
            return volumes

    def unrefined(self, xrays: Float[Tensor, "b n v u"], views: Sequence[View]) -> Float[Tensor, "b k z y x"]:
        """What the refinement sees: the network's volume, and that one moved to the x-rays.

        Without a refinement it is the network's volume alone.
        """
        check_images(xrays, views)
        shape, spacing = self.preset.volume.shape, self.preset.volume.spacing_mm
        with torch.autocast(xrays.device.type, enabled=False):
            xrays = xrays.float()
            some = evenly(len(views), FIELD_VIEWS)
            found = self.field.volume(xrays[:, some], [views[i] for i in some], shape, spacing)
            return found if self.refinement is None else torch.cat([found, self.moved(found, xrays, views)], dim=1)

    @torch.no_grad()
    def moved(
        self,
        found: Float[Tensor, "b 1 z y x"],
        xrays: Float[Tensor, "b n v u"],
        views: Sequence[View],
        noise: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b 1 z y x"]:
        """Volumes in [-1, 1], moved to agree with their x-rays as far as :func:`trust` says.

        ``noise`` of the x-rays is by default what ``found`` does not explain of them; a volume that was moved to them
        before explains some of it.
        """
        preset, volume = self.preset, self.preset.volume
        size, moved = 8 if xrays.device.type == "cpu" else 64, []
        for rows in torch.arange(len(found)).split(size):
            some, images = found[rows, 0], xrays[rows].float()
            missed, grain = misfit(some, images, views, preset)
            weight, pull = trust(missed, grain if noise is None else noise[rows])
            mu = tv(
                images, views, volume.shape, volume.spacing_mm, weight_mm=weight, iterations=ITERATIONS,
                prior=to_mu(some, preset), prior_weight_mm=pull.view(-1, 1, 1, 1),
            )  # fmt: skip
            moved.append(to_unit(mu, preset)[:, None])
        return torch.cat(moved)

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

        The network's is :meth:`difr3ct_core.implicit.ImplicitVolume.loss` at ``initial.points`` voxels. With
        ``initial.varied`` it is the mean logarithm of each patient's: errors of variations are many times those of a
        phantom, and would be nearly all that is learned from.

        Args:
            xrays, views, truth, generator, part, batch: as there.
            unrefined: what :meth:`unrefined` returns, if it is known already.
        """
        if self.refinement is not None:
            if unrefined is None:
                with torch.no_grad():
                    unrefined = self.unrefined(xrays, views)
            return self._over_patients((self.refinement(unrefined) - truth).square().mean((1, 2, 3, 4)))
        spacing, points = self.preset.volume.spacing_mm, self.preset.initial.points
        some = evenly(len(views), FIELD_VIEWS)
        xrays, views = xrays[:, some].float(), [views[i] for i in some]
        with torch.autocast(xrays.device.type, enabled=False):
            return self._over_patients(self.field.loss(xrays, views, truth, spacing, points, generator, part, batch))

    def _over_patients(self, square: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        return square.log().mean() if self.preset.initial.varied else square.mean()
