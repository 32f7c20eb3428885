"""What makes the autoencoder's pictures sharp: perceptual and adversarial losses (§III-B, Eq. 11-14).

L1 alone rewards the mean of all plausible textures, which is a blur. Three further terms judge the look, as in TATS
(Ge et al. 2022), whose weights the presets take:

- *perceptual* (LPIPS, Zhang et al. 2018): distance of an axial slice from its reconstruction in activations of VGG16;
- *adversarial* (Eq. 12-13): a 2D discriminator on axial slices and a 3D one on volumes, hinge losses;
- *feature matching* (Salimans et al. 2016): distance in the discriminators' own activations.

Adversarial training that begins at full weight ruins a young autoencoder. The discriminators start at step
``gan_start``, and their weight in the autoencoder's loss rises over ``gan_ramp`` steps (:func:`ramp`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from .files import InputError, read_safetensors
from .presets import VQGANPreset

#: Output channels of the 3² convolutions of VGG16 (Simonyan & Zisserman 2015, configuration D); "M" halves the picture.
VGG16_LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
#: LPIPS compares the activations after the last convolution of each of the five blocks.
VGG16_TAPS = (1, 3, 6, 9, 12)


def ramp(preset: VQGANPreset, step: int) -> float:
    """Weight of the adversarial terms at a step: 0 before ``gan_start``, then rising linearly to 1."""
    return min(max((step - preset.gan_start + 1) / max(preset.gan_ramp, 1), 0.0), 1.0)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of a slice or a volume (PatchGAN, Isola et al. 2017): 4² or 4³ convolutions.

    Args:
        dimensions: 2 for axial slices, 3 for volumes.
        channels: of the first layer; they double per stride, up to eightfold.
        strides: layers of stride 2; two more of stride 1 follow.
        channels_in: more than 1 where the picture is judged together with what it was made from.
    """

    def __init__(self, dimensions: int, channels: int, strides: int, channels_in: int = 1) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        widths = [channels * min(2**i, 8) for i in range(strides + 1)]
        layers = [nn.Sequential(conv(channels_in, widths[0], 4, stride=2, padding=2), nn.LeakyReLU(0.2))]
        for i in range(1, strides + 1):
            stride = 1 if i == strides else 2
            layers.append(
                nn.Sequential(
                    conv(widths[i - 1], widths[i], 4, stride=stride, padding=2),
                    nn.GroupNorm(min(8, widths[i]), widths[i]),  # TATS: over the batch, which here may be a single CT
                    nn.LeakyReLU(0.2),
                )
            )
        layers.append(nn.Sequential(conv(widths[-1], 1, 4, padding=2)))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "b c ..."]) -> list[Tensor]:
        """Activations of every layer; the last one holds a score per patch, high for real."""
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found


def hinge_discriminator(real: Tensor, fake: Tensor) -> Float[Tensor, ""]:
    """Loss of a discriminator: ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Float[Tensor, ""]:
    """Loss of the autoencoder: -E[D(x̂)]."""
    return -fake.mean()


def feature_matching(real: list[Tensor], fake: list[Tensor]) -> Float[Tensor, ""]:
    """Mean absolute difference of a discriminator's activations, over its layers without the scores."""
    pairs = list(zip(real[:-1], fake[:-1], strict=True))
    return torch.stack([(a.detach() - b).abs().mean() for a, b in pairs]).mean()


class Perceptual(nn.Module):
    """LPIPS (Zhang et al. 2018): distance of pictures in activations of VGG16, frozen.

    Args:
        weights: what ``data_scripts/fetch_vgg16.py`` writes: ``conv.I.weight``, ``conv.I.bias`` of the 13 convolutions,
            and ``lin.I`` (C,), LPIPS's weight of each channel of the five compared layers.

    Raises:
        InputError: missing, damaged, or of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        tensors, _ = read_safetensors(weights)
        widths = [w for w in VGG16_LAYOUT if isinstance(w, int)]
        shapes = {f"conv.{i}.weight": (w, 3 if i == 0 else widths[i - 1], 3, 3) for i, w in enumerate(widths)}
        shapes |= {f"conv.{i}.bias": (w,) for i, w in enumerate(widths)}
        shapes |= {f"lin.{i}": (widths[tap],) for i, tap in enumerate(VGG16_TAPS)}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            wrong = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
            raise InputError(
                f"{weights}: {wrong[0]} is {found.get(wrong[0], 'missing')}, expected "
                f"{shapes.get(wrong[0], 'nothing')}, as in VGG16; fetch it again with data_scripts/fetch_vgg16.py."
            )
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.float())
        # ImageNet's statistics, for grey values in [0, 1].
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def features(self, picture: Float[Tensor, "b 1 y x"]) -> list[Tensor]:
        """Activations at the five compared layers, each vector of channels scaled to unit length."""
        x = ((picture.to(self.mean.device) + 1) / 2 - self.mean) / self.std
        found, index = [], 0
        for layer in VGG16_LAYOUT:
            if layer == "M":
                x = F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x  # a thumbnail is small before the network ends
                continue
            x = F.relu(
                F.conv2d(x, getattr(self, f"conv_{index}_weight"), getattr(self, f"conv_{index}_bias"), padding=1)
            )
            if index in VGG16_TAPS:
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt())
            index += 1
        return found

    def forward(self, a: Float[Tensor, "b 1 y x"], b: Float[Tensor, "b 1 y x"]) -> Float[Tensor, ""]:
        """Mean distance of the pictures of a batch, grey values in [-1, 1]."""
        total = a.new_zeros(())
        for i, (one, other) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            weight = getattr(self, f"lin_{i}").view(1, -1, 1, 1)
            total = total + ((one - other).square() * weight).sum(1).mean()
        return total


class Critics(nn.Module):
    """Both discriminators, and the bookkeeping between the autoencoder's turn and theirs.

    :meth:`judge` is the autoencoder's side of one step, :meth:`loss` the discriminators' side of the same step.

    Args:
        preset: weights of the terms, start and ramp, size of the discriminators.
        perceptual: the frozen VGG16, or None where its weights are missing. It is no part of this module's state.
    """

    def __init__(self, preset: VQGANPreset, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        self.preset = preset
        self.slices = PatchDiscriminator(2, preset.critic_channels, preset.critic_strides)
        self.volumes = PatchDiscriminator(3, preset.critic_channels, preset.critic_strides)
        self._perceptual = [perceptual]  # in a list: not a submodule, so neither trained nor saved
        self._left: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def judge(
        self,
        real: Float[Tensor, "b 1 z y x"],
        fake: Float[Tensor, "b 1 z y x"],
        step: int,
        slices: Int[Tensor, " b"],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms that the autoencoder minimises beside L1 and commitment (Eq. 11 and 14).

        Args:
            real, fake: volumes and their reconstructions, in [-1, 1].
            step: of the training, for the ramp.
            slices: the axial slice of each volume that is looked at.

        Returns:
            the weighted sum, and each term for the log.
        """
        p, rows = self.preset, torch.arange(len(real), device=real.device)
        slices = slices.to(real.device)
        real_slice, fake_slice = real[rows, :, slices], fake[rows, :, slices]
        total, values = fake.new_zeros(()), {}
        if (perceptual := self._perceptual[0]) is not None and p.perceptual_weight > 0:
            distance = perceptual(fake_slice, real_slice)
            total = total + p.perceptual_weight * distance
            values["perceptual"] = distance.detach()
        weight = ramp(p, step)
        self._left = None
        if weight > 0 and (p.image_gan_weight > 0 or p.volume_gan_weight > 0):
            self._left = (real, fake.detach(), real_slice, fake_slice.detach())
            for name, critic, one, other, share in (
                ("image", self.slices, real_slice, fake_slice, p.image_gan_weight),
                ("volume", self.volumes, real, fake, p.volume_gan_weight),
            ):
                if share == 0:  # off, its feature matching too, as in TATS
                    continue
                with torch.no_grad():
                    on_real = critic(one)
                on_fake = critic(other)
                adversarial, matching = hinge_generator(on_fake[-1]), feature_matching(on_real, on_fake)
                total = total + weight * (share * adversarial + p.feature_weight * matching)
                values |= {f"{name}_gan": adversarial.detach(), f"{name}_features": matching.detach()}
        return total, values

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminators minimise (Eq. 12 and 13), on the volumes of the last :meth:`judge`."""
        if self._left is None:
            return torch.zeros(()), {}
        real, fake, real_slice, fake_slice = self._left
        total, values = real.new_zeros(()), {}
        for name, critic, one, other, share in (
            ("image", self.slices, real_slice, fake_slice, self.preset.image_gan_weight),
            ("volume", self.volumes, real, fake, self.preset.volume_gan_weight),
        ):
            if share > 0:
                hinge = hinge_discriminator(critic(one)[-1], critic(other)[-1])
                total, values[f"{name}_critic"] = total + hinge, hinge.detach()
        return total, values


def sharpness(volume: Float[Tensor, "b 1 z y x"], truth: Float[Tensor, "b 1 z y x"]) -> Float[Tensor, " b"]:
    """Gradient energy of a volume as a share of the truth's: 1 is as sharp, below it blurred."""

    def energy(x: Tensor) -> Tensor:
        return sum(rearrange(x.diff(dim=axis).square(), "b ... -> b (...)").sum(1) for axis in (2, 3, 4))

    return energy(volume) / energy(truth).clamp_min(1e-12)
