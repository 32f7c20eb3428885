"""The baselines' numbers, per preset: the one place for them, as :mod:`difr3ct_core.presets` is for the method itself.

Budgets are equal in *samples seen* where a server trains: at ``paper`` each baseline sees as many epochs as its own
paper says. ``tiny`` and ``small``, which CPUs train, give each about the *time* of the diffusion model, and the tables
print how many patients (steps times batch) each one saw. Rates, batches and Adam's betas are those of each method's
paper unless a comment says otherwise. NAF trains on one patient's x-rays, so its steps count rays, not patients.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..files import InputError
from ..presets import PRESETS, FusionPreset, TrainPreset, UNetPreset, _build


@dataclass(frozen=True)
class NAFPreset:
    """Neural attenuation fields (Zha et al. 2022). ``training.batch_size`` counts rays."""

    training: TrainPreset
    levels: int = 16
    features: int = 2  # per level
    base: int = 16  # cells per edge of the coarsest level
    growth: int = 2  # cells of the next level, per cell
    log2_table: int = 19  # entries of a level's table at most
    width: int = 32
    layers: int = 4
    samples: int = 192  # per ray


@dataclass(frozen=True)
class INRR3CTPreset:
    """Implicit neural representation from several x-rays (INRR3CT)."""

    training: TrainPreset
    unet: FusionPreset  # at full resolution of the detector
    width: int = 128
    omega: float = 50.0
    view_layers: int = 3  # sine layers before the mean over views; our choice
    joint_layers: int = 2  # sine layers after it; our choice
    octaves: int = 6  # Fourier features sin, cos of 2^j·pi·x; our choice
    points: int = 16384  # voxels per patient and step: bounds the memory; our choice
    most_views: int = 4  # memory grows with the views, so the paper stops at 4


@dataclass(frozen=True)
class X2CTGANPreset:
    """X2CT-GAN (Ying et al. 2019). Widths are our choice, weights of the losses the paper's."""

    training: TrainPreset
    widths: tuple[int, ...]  # 2D features per level, from full resolution down to 4 x 4
    decoder_widths: tuple[int, ...]  # 3D features per level, likewise
    growth: int = 16  # channels that a layer of a dense block adds
    dense_layers: int = 3
    critic_channels: int = 32
    critic_strides: int = 3
    gan_weight: float = 0.1
    voxel_weight: float = 10.0
    projection_weight: float = 10.0


@dataclass(frozen=True)
class Diffusion3DPreset:
    """The paper's ablation "3D Diffusion": voxels instead of latents, fewer attention heads."""

    training: TrainPreset
    fusion: FusionPreset
    unet: UNetPreset
    sample_batch: int = 8  # volumes in memory at a time


@dataclass(frozen=True)
class BaselinePresets:
    """All baselines of one preset."""

    naf: NAFPreset
    inrr3ct: INRR3CTPreset
    x2ctgan: X2CTGANPreset
    diffusion3d: Diffusion3DPreset


def _with_budget(preset: str, share: float = 1.0, **settings: Any) -> TrainPreset:
    """A training that sees ``share`` times as many patients as the diffusion model of ``preset``."""
    budget = PRESETS[preset].train_ldm
    return TrainPreset(steps=round(share * budget.steps * budget.batch_size / settings["batch_size"]), **settings)


# Adam of each paper. NAF fits one patient in fp32: its table holds small numbers that bf16 would round away.
_NAF = {"lr": 1e-3, "lr_decay": "late_tenth", "ema_decay": 0.0, "precision": "fp32", "checkpoint_every_s": 600.0}
# Ten times the rate where there are far fewer steps than the paper's.
_SHORT_NAF = {**_NAF, "lr": 1e-2}
_INRR3CT = {"batch_size": 1, "lr": 3e-5, "lr_decay": "constant"}
# Clipping is loose, because the weights of 10 in X2CT-GAN's loss scale its gradient.
_X2CTGAN = {"batch_size": 4, "lr": 2e-4, "betas": (0.5, 0.99), "lr_decay": "late_linear", "grad_clip": 100.0}
# A sine network in fp32: its inner products are multiplied by omega, and bf16 has three digits.
_SINE = {"precision": "fp32"}

BASELINES: dict[str, BaselinePresets] = {
    # Minutes on two cores. Seven thousand steps of one patient each would take an hour, so INRR3CT sees a quarter of
    # the budget at a higher rate; X2CT-GAN likewise, and 3D Diffusion, whose step in voxels costs more, an eighth.
    "tiny": BaselinePresets(
        naf=NAFPreset(
            TrainPreset(steps=200, batch_size=512, **_SHORT_NAF), levels=4, base=8, log2_table=14, samples=64
        ),
        inrr3ct=INRR3CTPreset(
            _with_budget("tiny", 0.25, **{**_INRR3CT, **_SINE, "batch_size": 4, "lr": 3e-4, "lr_decay": "cosine"}),
            unet=FusionPreset(widths=(24, 48, 48), out_channels=32),
            width=64,
            octaves=4,
            points=2048,
        ),
        x2ctgan=X2CTGANPreset(
            _with_budget("tiny", 0.25, **_X2CTGAN),
            widths=(16, 32, 48, 64),
            decoder_widths=(8, 16, 24, 32),
            growth=8,
            dense_layers=2,
            critic_channels=16,
            critic_strides=2,
        ),
        diffusion3d=Diffusion3DPreset(
            _with_budget("tiny", 0.125, batch_size=8, lr=1e-3, warmup_steps=20),
            fusion=FusionPreset(widths=(24, 48, 48), out_channels=16),
            unet=UNetPreset(widths=(16, 32, 64), blocks_per_level=1, attention_from_level=2, heads=2, head_channels=24),
        ),
    ),
    # About the time of the diffusion model's own training for each, twenty to forty minutes of a shared core: a step in
    # voxels costs so much more than one in latents that those models see an eighth of the patients, INRR3CT a half.
    # Rates are raised where the paper's are meant for a hundred times as many steps.
    "small": BaselinePresets(
        naf=NAFPreset(TrainPreset(steps=300, batch_size=256, **_SHORT_NAF), levels=5, log2_table=17, samples=64),
        inrr3ct=INRR3CTPreset(
            _with_budget("small", 0.5, **{**_INRR3CT, **_SINE, "lr": 1e-4, "lr_decay": "cosine"}),
            unet=FusionPreset(widths=(32, 64, 96, 96), out_channels=128),
        ),
        x2ctgan=X2CTGANPreset(
            _with_budget("small", 0.125, **_X2CTGAN, channels_last=True),
            widths=(16, 24, 32, 48, 64),
            decoder_widths=(8, 16, 24, 32, 48),
            growth=8,
            dense_layers=2,
            critic_channels=16,
        ),
        # The learning rate of the latent model of this preset.
        diffusion3d=Diffusion3DPreset(
            _with_budget("small", 0.125, batch_size=4, lr=1e-3, warmup_steps=50, ema_decay=0.98, channels_last=True),
            fusion=FusionPreset(widths=(32, 64, 96, 96), out_channels=16),
            unet=UNetPreset(widths=(16, 32, 64, 128), blocks_per_level=1, attention_from_level=3, heads=2),
        ),
    ),
    "paper": BaselinePresets(
        # 3000 epochs of eight x-rays, one x-ray a step.
        naf=NAFPreset(TrainPreset(steps=24_000, batch_size=1024, log_every=100, **_NAF)),
        # 100 epochs of 868 patients.
        inrr3ct=INRR3CTPreset(
            TrainPreset(steps=86_800, checkpoint_every_s=600, log_every=100, **_INRR3CT, **_SINE),
            unet=FusionPreset(widths=(64, 128, 256, 256), out_channels=128),
            points=50_000,
        ),
        # 50 epochs at the full rate and 50 falling, of 868 patients.
        x2ctgan=X2CTGANPreset(
            TrainPreset(steps=21_700, checkpoint_every_s=600, log_every=100, **_X2CTGAN),
            widths=(32, 64, 128, 192, 256, 256),
            decoder_widths=(16, 32, 64, 128, 192, 256),
            growth=32,
            critic_channels=64,
        ),
        diffusion3d=Diffusion3DPreset(
            PRESETS["paper"].train_ldm,
            fusion=FusionPreset(widths=(64, 128, 256, 256), out_channels=64),
            unet=UNetPreset(widths=(32, 64, 128, 256, 512), attention_from_level=3, heads=4),
            sample_batch=1,
        ),
    ),
}


def get_baselines(preset: str) -> BaselinePresets:
    """The baselines' numbers for the preset of that name; a cohort behind it, as in ``small-thoracic``, changes none.

    Raises:
        InputError: no such preset.
    """
    preset = preset.partition("-")[0]
    if preset not in BASELINES:
        raise InputError(f"preset: found {preset!r}, expected one of {', '.join(BASELINES)}, which have baselines.")
    return BASELINES[preset]


def with_training(settings: Any, words: Sequence[str]) -> Any:
    """One baseline's settings with fields of its training changed by words such as ``steps=100``.

    Raises:
        InputError: no such field, or a value of the wrong type.
    """
    values = dataclasses.asdict(settings)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in values["training"]:
            known = ", ".join(sorted(values["training"]))
            raise InputError(f"training: found {word!r}, expected NAME=VALUE with a name of {known}.")
        try:
            values["training"][name] = json.loads(value)
        except json.JSONDecodeError:
            values["training"][name] = value
    return settings_from_dict(type(settings), values)


def settings_from_dict(kind: type, values: Any) -> Any:
    """A baseline's settings from a dictionary of JSON types, as stored with its weights.

    Raises:
        InputError: a key is missing, unknown, or of the wrong type.
    """
    return _build(kind, values, kind.__name__)
