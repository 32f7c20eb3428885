"""Every number of an experiment, in one place.

A preset is a frozen dataclass of frozen dataclasses. ``tiny`` (32³), ``small`` (64³) and ``paper`` (128³)
differ in numbers only: the same code runs all three. Each number carries its source in a comment: a
section or equation of the paper (Sun et al. 2024, DIFR3CT), "reconstructed" where the published text lost the number
and it was inferred from what the text and its sources say, or "our choice".

    >>> preset = get_preset("tiny")
    >>> preset == Preset.from_dict(preset.to_dict())
    True
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from .files import InputError, read_json

#: Angles in degrees per set of views, §V-B: 0 is lateral, 90 is frontal.
VIEW_SETS: dict[str, tuple[float, ...]] = {
    "8view": (0.0, 22.5, 45.0, 67.5, 90.0, 112.5, 135.0, 157.5),
    "4view": (0.0, 45.0, 90.0, 135.0),
    "2view": (0.0, 90.0),
    "1view_frontal": (90.0,),
    "1view_lateral": (0.0,),
}

#: Cohorts of real scans, which data_scripts/prepare_ct.py makes; their patients are counted, not chosen.
REAL_COHORTS = ("lidc",)


@dataclass(frozen=True)
class VolumePreset:
    """The grid and intensity window of a prepared CT (§V-A)."""

    size: int  # voxels per edge of the cube
    fov_mm: float = 320.0  # edge of the cube, §V-A
    resample_mm: float = 1.0  # intermediate isotropic grid, §V-A
    hu_min: float = -1000.0  # window of width 2500, reconstructed
    hu_max: float = 1500.0

    @property
    def spacing_mm(self) -> float:
        """Voxel edge in mm."""
        return self.fov_mm / self.size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        return (self.size, self.size, self.size)


@dataclass(frozen=True)
class XrayPreset:
    """The detector of the digitally reconstructed radiographs (§V-B)."""

    detector_size: int  # pixels per edge; as many as voxels, as in the paper
    mode: str = "parallel"  # §V-B
    mu_water_per_mm: float = 0.02  # linear attenuation of water near 70 keV, NIST: 0.0193 to 0.0206
    scale: float = 4.0  # line integrals are divided by this before the network sees them; our choice


@dataclass(frozen=True)
class CohortPreset:
    """How many phantom patients, and how finely each is drawn."""

    n_train: int
    n_val: int
    n_test: int
    draw_size: int  # the phantom is drawn on this grid and averaged down to the volume's
    cohort: str = "lung"  # phantoms: "lung" (as LIDC) or "thoracic" (after mastectomy); or one of REAL_COHORTS
    seed: int = 2024


@dataclass(frozen=True)
class VQGANPreset:
    """The 3D VQGAN (§III-B, Eq. 11-14), after TATS."""

    base_channels: int
    levels: int = 2  # stride-2 levels: factor 4, reconstructed
    latent_channels: int = 8  # reconstructed
    codebook_size: int = 4096  # reconstructed
    codebook_decay: float = 0.99  # TATS
    commitment_weight: float = 0.25  # TATS
    l1_weight: float = 4.0  # TATS
    restart_below: float = 0.05  # codes used less than this share of the mean use restart; our choice, see Codebook
    groups: int = 8  # GroupNorm; our choice
    # Eq. 11-14; 0 is off. TATS: perceptual 4, each GAN 1, feature matching 4, from step 10,000 on.
    perceptual_weight: float = 0.0
    image_gan_weight: float = 0.0
    volume_gan_weight: float = 0.0
    feature_weight: float = 0.0
    gan_start: int = 0  # step
    gan_ramp: int = 1000  # steps from no weight to full weight; our choice
    critic_channels: int = 64  # TATS
    critic_strides: int = 3  # TATS


@dataclass(frozen=True)
class FusionPreset:
    """The 2D U-Net whose features are resampled along rays (§III-A, Eq. 10)."""

    widths: tuple[int, ...]  # per level of the U-Net
    out_channels: int
    groups: int = 8


@dataclass(frozen=True)
class InitialPreset:
    """A first reconstruction as a further condition, beyond the paper (:mod:`difr3ct_core.initial`)."""

    solver: str = "none"  # the paper's model; or a method of baselines.classical with a number of iterations
    iterations: int = 20
    network: bool = False  # a network that regresses the latent (:mod:`difr3ct_core.initial_network`), numbers below
    in_voxels: bool = False  # it regresses the volume instead, as INRR3CT does, which is then encoded
    points: int = 16384  # random voxels that its training looks at, per patient and step
    widths: tuple[int, ...] = (32, 48, 64, 64)  # of its 2D U-Net, per level
    features: int = 64  # that a ray carries
    width: int = 128  # of its sine layers
    view_layers: int = 3  # before the mean over views, as in our INRR3CT
    joint_layers: int = 2  # after it
    octaves: int = 6  # Fourier features of the position
    omega: float = 50.0  # of the sines, INRR3CT
    refine_widths: tuple[int, ...] = ()  # in voxels: of a 3D U-Net that refines the volume; () is none
    refine_from: float = 0.0  # misfit of the guess (consistency.py) from which on this has a say; 0: always
    doubted: float = 0.0  # share of the patients that it also learns from with a guess that is wrong
    varied: float = 0.0  # variations of the patients (phantoms/variety.py) that it also learns from, for each of them
    second_from: float = 0.0  # misfit of the guess from which on a second network takes over; 0: there is none
    second_passes: int = 1  # how often that one's refinement and move are repeated
    move_again: bool = True  # whether its answer is moved to the x-rays; not if it learned from imperfect ones

    @property
    def solves_latents(self) -> bool:
        """Whether a solver's volume is encoded, for the denoiser or a network in latents."""
        return self.solver != "none" and not self.in_voxels


@dataclass(frozen=True)
class UNetPreset:
    """The 3D denoiser (§III-C), isotropic."""

    widths: tuple[int, ...]  # video-diffusion: 64 x (1, 2, 4, 8)
    blocks_per_level: int = 2
    attention_from_level: int = 1  # attention at this level and coarser
    heads: int = 8  # video-diffusion
    head_channels: int = 32  # video-diffusion
    groups: int = 8


@dataclass(frozen=True)
class DiffusionPreset:
    """Forward process and training target (Eq. 1-9)."""

    timesteps: int = 1000  # T, §IV
    schedule: str = "chen_linear"  # gamma(t) = 1 - t, Chen 2023 [54]; or "ddpm_linear", beta 1e-4 .. 0.02
    prediction: str = "epsilon"  # Eq. 5; or "v"
    condition_dropout: float = 0.1  # reconstructed


@dataclass(frozen=True)
class SamplingPreset:
    """How posterior samples are drawn."""

    solver: str = "dpm++2m"  # §IV-B; or "dpm++3m", "ddim", "ddpm"
    steps: int = 20  # reconstructed
    guidance: float = 1.0  # Eq. 8; 1 is the conditional model alone
    n_samples: int = 8  # our choice; the paper's uncertainty study takes 100
    # Share of the way by which the mean of several samples moves to the first guess; beyond the paper, 0 without one.
    anchor: float = 0.0
    # Misfit (consistency.py) of the first guess on patients of the training's kind, measured after it.
    # A patient whose guess misses its x-rays by more is unlike them, and its samples spread farther; 0: nobody looks.
    usual_misfit: float = 0.0


@dataclass(frozen=True)
class AnyViewPreset:
    """The any-view model, beyond the paper: one diffusion model for every number of views and every angle."""

    fan: int = 32  # equal angles over 180 degrees at which training x-rays are made, the paper's eight among them
    most: int = 8  # views at a time: 1 to this many
    paper_share: float = 0.5  # of the steps take one of the paper's sets of views, the others a random part of the fan


@dataclass(frozen=True)
class BookPreset:
    """How much the chapters draw and train, beside the models themselves: what a reader waits for. Our choice."""

    patients: int = 16  # held-out patients of the tables
    few: int = 8  # held-out patients where many samples of each are drawn
    samples: int = 12  # of each of those
    monte_carlo: int = 32  # samples of one patient
    scratch_steps: int = 20  # of a short training from scratch, where finished weights ship


@dataclass(frozen=True)
class TrainPreset:
    """One training run of one model."""

    steps: int  # optimiser steps
    batch_size: int
    lr: float
    warmup_steps: int = 0
    lr_decay: str = "cosine"  # "cosine" to zero, or "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.995  # video-diffusion
    grad_clip: float = 1.0
    checkpoint_every_s: float = 20.0
    log_every: int = 10
    validate_every: int = 0  # steps; 0: only at the end
    precision: str = "auto"  # "auto": bf16 on a GPU that has it, else fp32; or "bf16", "fp32"
    accumulate: int = 1  # micro-batches of a step in each process, where the memory is short
    checkpointing: bool = False  # compute activations twice instead of keeping them
    compile: bool = False  # torch.compile of the networks
    channels_last: bool = False  # memory layout channels_last_3d of the 3D networks
    crop: int = 0  # VQGAN only: voxels per edge of random crops, one from each volume of the batch; 0 is whole volumes


@dataclass(frozen=True)
class Preset:
    """A whole experiment: grid, data, models, training."""

    name: str
    volume: VolumePreset
    xray: XrayPreset
    cohort: CohortPreset
    vqgan: VQGANPreset
    fusion: FusionPreset
    unet: UNetPreset
    train_vqgan: TrainPreset
    train_ldm: TrainPreset
    diffusion: DiffusionPreset = field(default_factory=DiffusionPreset)
    sampling: SamplingPreset = field(default_factory=SamplingPreset)
    any_view: AnyViewPreset = field(default_factory=AnyViewPreset)
    initial: InitialPreset = field(default_factory=InitialPreset)
    # Of the initial network: one patient a step, because a sine network learns by many small steps.
    train_initial: TrainPreset = field(
        default_factory=lambda: TrainPreset(steps=6000, batch_size=1, lr=3e-4, precision="fp32")
    )
    # Of the decoder alone, on whole volumes, after the autoencoder's training; 0 steps leave it out, as the paper does.
    train_decoder: TrainPreset = field(
        default_factory=lambda: TrainPreset(steps=0, batch_size=1, lr=7e-4, warmup_steps=100, betas=(0.9, 0.99))
    )
    book: BookPreset = field(default_factory=BookPreset)

    @property
    def condition_channels(self) -> int:
        """Channels of the condition on the latent grid."""
        return self.fusion.out_channels + (self.vqgan.latent_channels if self.has_initial else 0)

    @property
    def has_initial(self) -> bool:
        """Whether the condition holds a first reconstruction, beyond the paper."""
        return self.initial.network or self.initial.solver != "none"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(channel, z, y, x) of a latent."""
        edge = self.volume.size // 2**self.vqgan.levels
        return (self.vqgan.latent_channels, edge, edge, edge)

    @property
    def cohort_folder(self) -> str:
        """Name of the cohort's folder below the data folder: PRESET-COHORT."""
        ending = f"-{self.cohort.cohort}"
        return self.name if self.name.endswith(ending) else self.name + ending

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preset:
        """From :meth:`to_dict`, possibly by way of JSON.

        Raises:
            InputError: a key is missing, unknown, or of the wrong type.
        """
        return _build(cls, values, "preset")

    def replace(self, **sections: Any) -> Preset:
        """A copy with whole sections replaced, or fields of them: ``replace(train_ldm={"steps": 10})``."""
        changed = {
            key: dataclasses.replace(getattr(self, key), **value) if isinstance(value, dict) else value
            for key, value in sections.items()
        }
        return dataclasses.replace(self, **changed)


def _build(cls: type, values: Any, where: str) -> Any:
    """Build dataclass ``cls`` from a dictionary, checking every key and type on the way."""
    if not isinstance(values, dict):
        raise InputError(
            f"{where}: found {type(values).__name__}, expected an object with the fields of {cls.__name__}."
        )
    hints = typing.get_type_hints(cls)
    names = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(names)):
        raise InputError(f"{where}: unknown fields {unknown}, expected some of {sorted(names)}.")
    arguments = {}
    for name, spec in names.items():
        if name not in values:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise InputError(f"{where}.{name}: is missing, expected a value of type {spec.type}.")
            continue
        arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``: a dataclass, a tuple, or a plain type; numbers must be finite."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        of = typing.get_args(hint)
        if isinstance(value, (list, tuple)) and (of[-1] is Ellipsis or len(of) == len(value)):
            return tuple(_convert(of[0], item, where) for item in value)
        count = "" if of[-1] is Ellipsis else f"{len(of)} "
        raise InputError(f"{where}: found {value!r}, expected a list of {count}numbers.")
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is not float and type(value) is hint:  # not isinstance: a bool is no whole number here
        return value
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    name = words.get(hint, hint.__name__)
    raise InputError(f"{where}: found {value!r}, expected {name}.")


PRESETS: dict[str, Preset] = {
    # Minutes on two CPU cores: every code path of the paper, none of its image quality.
    "tiny": Preset(
        name="tiny",
        volume=VolumePreset(size=32),
        xray=XrayPreset(detector_size=32),
        cohort=CohortPreset(n_train=384, n_val=16, n_test=16, draw_size=64),
        vqgan=VQGANPreset(base_channels=16, codebook_size=1024),
        fusion=FusionPreset(widths=(24, 48, 48), out_channels=32),
        unet=UNetPreset(widths=(48, 96), blocks_per_level=1, attention_from_level=1, heads=4, head_channels=24),
        diffusion=DiffusionPreset(prediction="v"),
        train_vqgan=TrainPreset(steps=500, batch_size=8, lr=2e-3, betas=(0.5, 0.9), warmup_steps=50),
        train_ldm=TrainPreset(steps=450, batch_size=16, lr=1e-3, warmup_steps=50),
    ),
    # An hour or two on two CPU cores: pictures that a student recognises. Finished weights ship with the project.
    "small": Preset(
        name="small",
        volume=VolumePreset(size=64),
        xray=XrayPreset(detector_size=64),
        cohort=CohortPreset(n_train=768, n_val=32, n_test=32, draw_size=64),
        vqgan=VQGANPreset(base_channels=16, codebook_size=4096),
        fusion=FusionPreset(widths=(32, 64, 96, 96), out_channels=32),
        # Six of these models and their autoencoder ship, in some 80 MB.
        unet=UNetPreset(widths=(32, 80, 96), blocks_per_level=1, attention_from_level=2, heads=4, head_channels=32),
        diffusion=DiffusionPreset(prediction="v"),
        sampling=SamplingPreset(n_samples=4, anchor=1.0),
        book=BookPreset(patients=8, few=2, samples=8, monte_carlo=100),  # as many as §V-F takes
        # A step on one crop of each of eight patients costs as much as one on a whole volume, and teaches more.
        train_vqgan=TrainPreset(
            steps=3000,
            batch_size=8,
            lr=1.5e-3,
            betas=(0.5, 0.9),
            warmup_steps=50,
            validate_every=400,
            crop=32,
            channels_last=True,
        ),
        train_decoder=TrainPreset(
            steps=8000,
            batch_size=1,
            lr=7e-4,
            warmup_steps=100,
            betas=(0.9, 0.99),
            validate_every=500,
            channels_last=True,
        ),
        initial=InitialPreset(solver="tv_body", iterations=12, network=True),
        train_ldm=TrainPreset(
            steps=900,
            batch_size=8,
            lr=1e-3,
            warmup_steps=50,
            ema_decay=0.99,
            validate_every=400,
            channels_last=True,
        ),
    ),
    # The paper's own numbers, where its text gives them (§IV, §V).
    "paper": Preset(
        name="paper",
        volume=VolumePreset(size=128),
        xray=XrayPreset(detector_size=128),
        cohort=CohortPreset(n_train=868, n_val=50, n_test=100, draw_size=128),
        vqgan=VQGANPreset(
            base_channels=64,
            perceptual_weight=4.0,
            image_gan_weight=1.0,
            volume_gan_weight=1.0,
            feature_weight=4.0,
            gan_start=10_000,
            gan_ramp=10_000,
        ),
        fusion=FusionPreset(widths=(64, 128, 256, 256), out_channels=64),
        unet=UNetPreset(widths=(64, 128, 256, 512), attention_from_level=2),
        # 500 epochs of 868 volumes at batch 1, Adam: §V-B.
        train_vqgan=TrainPreset(
            steps=434_000,
            batch_size=1,
            lr=3e-4,
            betas=(0.5, 0.9),
            lr_decay="constant",
            checkpoint_every_s=600,
            log_every=100,
        ),
        train_ldm=TrainPreset(
            steps=434_000, batch_size=1, lr=1e-4, lr_decay="constant", checkpoint_every_s=600, log_every=100
        ),
    ),
}


#: Cohorts of phantoms that a preset's name may end in: "paper-thoracic" is `paper` on women after mastectomy.
COHORTS = ("lung", "thoracic", "intact")


def get_preset(name: str) -> Preset:
    """The preset called ``name``; with the name of a real cohort behind it, such as ``paper-lidc``, on that cohort.

    Args:
        name: "tiny", "small" or "paper"; with "-lung", "-thoracic", "-intact" or "-lidc" at its end, on that cohort;
            or a JSON file of :meth:`Preset.to_dict`, for numbers of one's own.

    Raises:
        InputError: no such preset, or a file that holds none.
    """
    if name.endswith(".json"):
        return Preset.from_dict(read_json(name, "a preset"))
    size, dash, cohort = name.partition("-")
    if size not in PRESETS or (dash and cohort not in (*COHORTS, *REAL_COHORTS)):
        raise InputError(
            f"preset: found {name!r}, expected one of {', '.join(PRESETS)}, with or without one of "
            f"{', '.join(f'-{cohort}' for cohort in (*COHORTS, *REAL_COHORTS))}, or a JSON file."
        )
    return PRESETS[size].replace(name=name, cohort={"cohort": cohort}) if dash else PRESETS[size]
