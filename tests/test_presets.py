"""Presets: exact JSON round trip, every wrong field named, and numbers that fit together."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from difr3ct_core.files import InputError
from difr3ct_core.presets import PRESETS, VIEW_SETS, Preset, get_preset

NAMES = sorted(PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name):
    preset = get_preset(name)
    again = Preset.from_dict(json.loads(json.dumps(preset.to_dict())))
    assert again == preset
    assert hash(again) == hash(preset)  # lists would have stayed lists
    changed = preset.replace(volume={"size": 48}, train_ldm={"steps": 7})
    assert Preset.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed != preset


def _leaves(values: dict, where: tuple = ()) -> list[tuple]:
    found = []
    for key, value in values.items():
        found += _leaves(value, (*where, key)) if isinstance(value, dict) else [(*where, key)]
    return found


LEAVES = _leaves(get_preset("tiny").to_dict())


def _with(where: tuple, change) -> dict:
    values = copy.deepcopy(get_preset("tiny").to_dict())
    section = values
    for key in where[:-1]:
        section = section[key]
    change(section, where[-1])
    return values


def _wrong_values(value) -> list:
    """Values of other types, for a field that holds ``value``."""
    if isinstance(value, str):
        return [3, None, ["a"], True]
    if isinstance(value, tuple):
        wrong = [3, None, "ab", [None], ["1", "2"], [True, False], {"0": 1}]
        if all(isinstance(v, int) for v in value):
            wrong.append([8.5, 16])
        else:
            wrong.append([0.5, 0.9, 0.99])  # two betas
        return wrong
    if isinstance(value, bool):
        return ["true", None, 1, 0.0, [True], {}]
    wrong = ["3", None, True, [3], {}]
    return [*wrong, 3.5] if isinstance(value, int) else wrong


@pytest.mark.parametrize("where", LEAVES, ids=".".join)
def test_a_field_of_a_wrong_type_is_named(where):
    value = get_preset("tiny").to_dict()
    for key in where:
        value = value[key]
    for wrong in _wrong_values(value):
        with pytest.raises(InputError) as caught:
            Preset.from_dict(_with(where, lambda section, key, wrong=wrong: section.__setitem__(key, wrong)))
        assert ".".join(("preset", *where)) in str(caught.value)
        assert "expected" in str(caught.value)


@pytest.mark.parametrize("where", LEAVES, ids=".".join)
def test_a_missing_field_has_its_default_or_is_named(where):
    values = _with(where, lambda section, key: section.pop(key))
    owner = type(get_preset("tiny"))
    for key in where[:-1]:
        owner = type(getattr(get_preset("tiny"), key))
    spec = {f.name: f for f in dataclasses.fields(owner)}[where[-1]]
    if spec.default is not dataclasses.MISSING:
        built = Preset.from_dict(values)
        for key in where:
            built = getattr(built, key)
        assert built == spec.default
    else:
        with pytest.raises(InputError, match=rf"{where[-1]}: is missing"):
            Preset.from_dict(values)


def test_unknown_fields_and_no_object():
    values = get_preset("tiny").to_dict()
    values["unet"]["with"] = [1]
    with pytest.raises(InputError, match=r"preset\.unet: unknown fields \['with'\]"):
        Preset.from_dict(values)
    for wrong in (None, [], "tiny", 3):
        with pytest.raises(InputError, match=r"preset: found .*expected an object"):
            Preset.from_dict(wrong)
    values = get_preset("tiny").to_dict() | {"volume": 32}
    with pytest.raises(InputError, match=r"preset\.volume: found int"):
        Preset.from_dict(values)


def test_numbers_that_are_no_numbers():
    for wrong in (float("nan"), float("inf")):
        values = _with(("train_ldm", "lr"), lambda section, key, wrong=wrong: section.__setitem__(key, wrong))
        with pytest.raises(InputError, match=r"preset\.train_ldm\.lr"):
            Preset.from_dict(values)


def test_whole_numbers_are_accepted_as_floats():
    values = _with(("volume", "fov_mm"), lambda section, key: section.__setitem__(key, 320))
    values["train_ldm"]["betas"] = [0, 0.999]
    preset = Preset.from_dict(values)
    assert isinstance(preset.volume.fov_mm, float)
    assert all(isinstance(beta, float) for beta in preset.train_ldm.betas)


def test_unknown_preset():
    with pytest.raises(InputError, match=r"preset: found 'huge', expected one of tiny, small, paper"):
        get_preset("huge")


def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_preset("tiny").volume.size = 3


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_fit_together(name):
    p = get_preset(name)
    assert p.name == name
    factor = 2**p.vqgan.levels
    assert p.volume.size % factor == 0
    assert p.volume.spacing_mm * p.volume.size == p.volume.fov_mm
    assert p.latent_shape == (p.vqgan.latent_channels, *[p.volume.size // factor] * 3)
    assert p.cohort.draw_size % p.volume.size == 0
    # As many pixels as voxels, and feature images on the latent grid (fusion).
    assert p.xray.detector_size == p.volume.size
    latent = p.latent_shape[1]
    assert latent % 2 ** (len(p.fusion.widths) - 1) == 0
    assert latent % 2 ** (len(p.unet.widths) - 1) == 0
    for width in (*p.fusion.widths, p.fusion.out_channels):
        assert width % p.fusion.groups == 0
    for width in p.unet.widths:
        assert width % p.unet.groups == 0
    assert p.unet.widths[0] % 2 == 0  # sine and cosine
    assert (2 * p.vqgan.base_channels) % p.vqgan.groups == 0
    assert p.volume.hu_min < 0 < p.volume.hu_max
    assert p.sampling.steps <= p.diffusion.timesteps
    assert 0 < p.diffusion.condition_dropout < 1  # at 0 guidance would silently never train
    for settings in (p.train_vqgan, p.train_ldm):
        assert 0 <= settings.warmup_steps < settings.steps
        assert settings.batch_size <= p.cohort.n_train


def test_the_papers_numbers():
    p = get_preset("paper")
    assert p.volume.shape == (128, 128, 128) and p.volume.spacing_mm == 2.5
    assert p.latent_shape == (8, 32, 32, 32)
    assert p.vqgan.codebook_size == 4096 and p.diffusion.timesteps == 1000
    assert p.train_ldm.steps == 500 * p.cohort.n_train and p.train_ldm.batch_size == 1
    assert get_preset("tiny").latent_shape[1:] == (8, 8, 8)
    assert get_preset("small").latent_shape[1:] == (16, 16, 16)


def test_view_sets():
    eight = VIEW_SETS["8view"]
    assert eight == tuple(22.5 * i for i in range(8))
    for name, angles in VIEW_SETS.items():
        assert set(angles) <= set(eight)  # the x-rays are made once, for all eight
        assert len(angles) == int(name[0])


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_models_can_be_built_from_the_preset(name):
    """On the meta device, which costs nothing: the constructors check widths and groups."""
    from difr3ct_core.diffusion import LatentDiffusion
    from difr3ct_core.vqgan import VQGAN

    with torch.device("meta"):
        assert sum(p.numel() for p in VQGAN(get_preset(name).vqgan).parameters()) > 1e5
        assert sum(p.numel() for p in LatentDiffusion(get_preset(name)).parameters()) > 1e5
