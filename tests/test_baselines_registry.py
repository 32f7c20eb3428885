"""The table of methods: floors, presets, tuning, the command line, and the benchmark that writes the tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_baselines import DIFFUSION_SMALL, FAST, INRR3CT_SMALL, NAF_SMALL, X2CTGAN_SMALL
from small_models import SMALL, patients

from difr3ct_core.baselines import __main__ as command
from difr3ct_core.baselines import registry
from difr3ct_core.baselines.floors import MeanVolume, NearestPatient
from difr3ct_core.baselines.inrr3ct import INRR3CT
from difr3ct_core.baselines.presets import (
    BASELINES,
    BaselinePresets,
    INRR3CTPreset,
    get_baselines,
    settings_from_dict,
    with_training,
)
from difr3ct_core.baselines.registry import METHODS, Options, get_method, training_cost
from difr3ct_core.baselines.tables import gather, shipped_tables
from difr3ct_core.baselines.x2ctgan import X2CTGAN
from difr3ct_core.chapters import Chapter
from difr3ct_core.datasets import preset_views
from difr3ct_core.files import InputError, read_npz, read_safetensors
from difr3ct_core.metrics import psnr
from difr3ct_core.presets import PRESETS, VIEW_SETS
from difr3ct_core.unet import UNet3d

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def chapter(tmp_path, monkeypatch) -> Chapter:
    """A tiny cohort of blobs for every method; the thoracic one has other patients."""
    small = BaselinePresets(
        dataclasses.replace(NAF_SMALL, training=dataclasses.replace(NAF_SMALL.training, steps=5)),
        INRR3CT_SMALL, X2CTGAN_SMALL, DIFFUSION_SMALL,
    )  # fmt: skip
    preset = SMALL.replace(sampling={"n_samples": 2, "steps": 3})
    monkeypatch.setitem(BASELINES, "tiny", small)

    def named(name):
        return preset.replace(name=name, cohort={"cohort": name.partition("-")[2] or "lung"})

    monkeypatch.setattr(command, "get_preset", named)

    def cohort(self, split, view_set=None):
        seed = {"train": 0, "val": 1, "test": 2}[split] + 10 * (self.preset.cohort.cohort == "thoracic")
        found = patients({"train": 4}.get(split, 2), seed, preset)
        return found.with_views(view_set) if view_set else found

    monkeypatch.setattr(Chapter, "patients", cohort)
    return command.open_cohort("tiny", "lung", tmp_path / "data", tmp_path / "runs" / "tiny", 0, "cpu")


def test_mean_volume_is_the_mean_and_sees_no_xray():
    train, test = patients(5), patients(2, seed=3)
    volume = MeanVolume(train).reconstruct(test.xrays)
    assert volume.shape == (2, 1, 16, 16, 16)
    for one in volume:
        torch.testing.assert_close(one, train.unit().mean(0), atol=1e-6, rtol=0)


def test_no_constant_beats_the_mean_volume_in_squared_error():
    train = patients(6)
    mean = MeanVolume(train).reconstruct(train.xrays)
    best = (mean - train.unit()).square().mean()
    for other in train.unit():
        assert best < (other - train.unit()).square().mean()


@pytest.mark.parametrize("view_set", ["2view", "1view_lateral"])
def test_nearest_patient_is_found_by_its_xrays(view_set):
    train = patients(6).with_views(view_set)
    floor = NearestPatient(train)
    order = [4, 0, 5]
    noise = torch.randn(3, *train.xrays.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = train.xrays[order] + 0.01 * noise
    assert floor.nearest(noisy).tolist() == order
    assert torch.equal(floor.reconstruct(noisy), train.unit(order))
    # A distance written out, for a patient that is not in the training set.
    new = patients(1, seed=9).with_views(view_set).xrays
    distances = [float((images - new[0]).square().sum()) for images in train.xrays]
    assert int(floor.nearest(new)) == distances.index(min(distances))
    with pytest.raises(InputError, match="the views of the training patients"):
        floor.reconstruct(patients(1).xrays)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_baselines_that_can_be_built(name):
    preset, baselines = PRESETS[name], get_baselines(name)
    four, two = preset_views(preset, "4view"), preset_views(preset, "2view")
    with torch.device("meta"):  # shapes only: the paper's are large
        INRR3CT(preset, baselines.inrr3ct, four)
        X2CTGAN(preset, baselines.x2ctgan, two)
        UNet3d(1, baselines.diffusion3d.fusion.out_channels, baselines.diffusion3d.unet)
    for settings in (baselines.naf, baselines.inrr3ct, baselines.x2ctgan, baselines.diffusion3d):
        assert settings_from_dict(type(settings), json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_budgets_in_samples_seen():
    """A step in voxels costs more than one in latents, so the others see a share of the diffusion model's patients."""
    shares = {
        "small": {"inrr3ct": 0.5, "x2ctgan": 0.125, "diffusion3d": 0.125},
        "tiny": {"inrr3ct": 0.25, "x2ctgan": 0.25, "diffusion3d": 0.125},
    }
    for name in ("small", "tiny"):
        budget = PRESETS[name].train_ldm.steps * PRESETS[name].train_ldm.batch_size
        for kind in ("inrr3ct", "x2ctgan", "diffusion3d"):
            training, share = getattr(get_baselines(name), kind).training, shares[name][kind]
            assert training.steps * training.batch_size == pytest.approx(share * budget, rel=0.01), (name, kind)


def test_numbers_of_the_papers():
    """FACTS of each method at paper scale."""
    paper = get_baselines("paper")
    naf, inr, gan = paper.naf, paper.inrr3ct, paper.x2ctgan
    assert (naf.levels, naf.features, naf.base, naf.growth, naf.log2_table) == (16, 2, 16, 2, 19)
    assert (naf.layers, naf.width, naf.training.batch_size, naf.samples, naf.training.lr) == (4, 32, 1024, 192, 1e-3)
    assert (inr.width, inr.omega, inr.unet.out_channels, inr.training.lr, inr.training.batch_size) == (
        128, 50.0, 128, 3e-5, 1,
    )  # fmt: skip
    assert inr.training.steps == 100 * PRESETS["paper"].cohort.n_train
    assert (gan.gan_weight, gan.voxel_weight, gan.projection_weight) == (0.1, 10.0, 10.0)
    assert (gan.training.lr, gan.training.betas, gan.training.batch_size) == (2e-4, (0.5, 0.99), 4)
    assert paper.diffusion3d.unet.heads < PRESETS["paper"].unet.heads


def test_changed_settings_and_bad_ones():
    changed = with_training(INRR3CT_SMALL, ["steps=7", "precision=bf16"])
    assert isinstance(changed, INRR3CTPreset)
    assert (changed.training.steps, changed.training.precision, changed.training.lr) == (7, "bf16", FAST.lr)
    with pytest.raises(InputError, match="found 'step=7', expected NAME=VALUE with a name of accumulate"):
        with_training(INRR3CT_SMALL, ["step=7"])
    with pytest.raises(InputError, match=r"INRR3CTPreset.training.steps: found 'many', expected a whole number"):
        with_training(INRR3CT_SMALL, ["steps=many"])
    with pytest.raises(InputError, match="preset: found 'huge', expected one of tiny, small, paper"):
        get_baselines("huge")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_volumes_from_the_same_call(name, chapter):
    method = get_method(name, "2view")
    test = chapter.patients("test", "2view")
    ready = method.prepare(chapter, "2view", Options())
    volumes = method.reconstruct(ready, chapter, test)
    assert volumes.shape == (2, 1, 16, 16, 16) and volumes.device.type == "cpu"
    assert float(volumes.abs().max()) <= 1 and torch.isfinite(volumes).all()
    cost = training_cost(chapter, name, "2view")
    trains = name in ("difr3ct", "difr3ct_tv", "diffusion3d", "inrr3ct", "x2ctgan")
    assert set(cost) == ({"train_minutes", "train_peak_gb", "patients_seen"} if trains else set())
    assert all(value > 0 for value in cost.values())


def test_classical_methods_are_tuned_on_validation_patients(chapter, monkeypatch):
    """The candidate chosen is the best on the validation patients, which are not the test patients."""
    seen = []
    real = registry.classical_volumes

    def watched(name, chapter, some, arguments):
        volumes = real(name, chapter, some, arguments)
        seen.append((some.ids, arguments["iterations"], float(psnr(volumes, some.unit(), 2.0).mean())))
        return volumes

    monkeypatch.setattr(registry, "classical_volumes", watched)
    chosen = METHODS["cgls"].prepare(chapter, "4view", Options())
    assert {ids for ids, *_ in seen} == {chapter.patients("val").ids}
    assert [iterations for _, iterations, _ in seen] == list(registry.CANDIDATES["cgls"][1])
    assert chosen == {"iterations": max(seen, key=lambda one: one[2])[1]}


def test_views_for_which_a_method_does_not_exist():
    with pytest.raises(InputError, match=r"found '8view', expected one of 4view, 2view, 1view_frontal, 1view_lateral"):
        get_method("inrr3ct", "8view")
    with pytest.raises(InputError, match=r"found '4view', expected one of 2view, 1view_frontal, 1view_lateral for X2"):
        get_method("x2ctgan", "4view")
    with pytest.raises(InputError, match="method: found 'gan', expected one of difr3ct, "):
        get_method("gan", "2view")
    with pytest.raises(InputError, match="views: found '3view'"):
        get_method("naf", "3view")
    assert METHODS["naf"].view_sets == tuple(VIEW_SETS)


def arguments(chapter: Chapter, *more: str) -> list[str]:
    return ["--data", str(chapter.data), "--run", str(chapter.run), "--device", "cpu", *more]


def test_command_trains_resumes_and_scores(chapter, capsys):
    given = arguments(chapter, "--method", "inrr3ct", "--views", "2view", "--set", "steps=4")
    assert command.main([*given, "--stop-after", "2"]) == 0
    folder = chapter.run / "inrr3ct-2view"
    assert (folder / "checkpoint.safetensors").exists() and not (folder / "weights.safetensors").exists()
    capsys.readouterr()
    assert command.main([*given, "--score", "test", "--patients", "1"]) == 0
    assert (folder / "weights.safetensors").exists()
    shown = capsys.readouterr().out
    assert "INRR3CT, 2view, 1 test patients" in shown
    for name in ("psnr", "psnr_4095", "ssim", "mae_hu", "dice_lungs", "sharpness", "train_minutes"):
        assert f"  {name}" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "gan"], "method: found 'gan'"),
        (["--method", "x2ctgan", "--views", "8view"], "for X2CT-GAN"),
        (["--method", "naf", "--cohort", "head"], "cohort: found 'head', expected 'lung' or 'thoracic'"),
        (["--method", "naf", "--patients", "0"], "patients: found 0"),
        (["--method", "inrr3ct", "--set", "speed=9"], "training: found 'speed=9'"),
        (["--method", "difr3ct", "--set", "steps=9"], "python -m difr3ct_core.training"),
        (["--method", "naf", "--device", "tpu9"], "device: found 'tpu9'"),
    ],
)
def test_command_refuses_in_one_sentence(given, message, chapter, capsys):
    assert command.main([*arguments(chapter), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("baselines: ") and message in error and error.count("\n") == 1


def test_tables_of_two_cohorts(chapter, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    out = chapter.run.parent / "out" / "tables.json"
    given = ["--preset", "tiny", "--data", str(chapter.data), "--runs", str(chapter.run.parent), "--device", "cpu"]
    given += ["--out", str(out), "--views", "2view"]
    assert tables.main([*given, "--cohorts", "lung", "--methods", "difr3ct", "mean_volume"]) == 0
    assert tables.main([*given, "--methods", "tv", "inrr3ct", "x2ctgan", "nearest_patient", "--trained-only"]) == 0
    content = json.loads(out.read_text())
    lung = {f"lung/{name}/2view" for name in ("difr3ct", "mean_volume", "tv", "nearest_patient")}
    assert set(content) == {*lung, "thoracic/tv/2view", "thoracic/nearest_patient/2view", "provenance"}
    assert "lung/inrr3ct/2view: not trained, left out" in capsys.readouterr().out
    entry = content["lung/difr3ct/2view"]
    for name in ("psnr", "psnr_4095", "ssim", "mae_hu", "dice_lungs", "dice_bone", "sharpness"):
        assert len(entry[name]["patients"]) == entry["n"] == 2
        mean = sum(entry[name]["patients"]) / 2
        assert entry[name]["mean"] == pytest.approx(mean, abs=1e-3)
    for name in ("train_minutes", "train_peak_gb", "sample_seconds"):
        assert entry[name]["mean"] > 0
    assert entry["value"] == entry["psnr"]["mean"] and entry["unit"] == "dB" and entry["preset"] == "tiny"
    assert "train_minutes" not in content["lung/tv/2view"]
    assert content["lung/tv/2view"]["tuned"]["weight_mm"] in registry.CANDIDATES["tv"][1]
    test = content["lung/tv/2view"]["against_difr3ct"]["psnr"]
    assert test["difference"] == pytest.approx(content["lung/tv/2view"]["value"] - entry["value"], abs=1e-3)
    assert 0 <= test["p"] <= 1
    assert "against_difr3ct" not in entry and "against_difr3ct" not in content["thoracic/tv/2view"]
    pictures = read_npz(out.with_name("tables_lung.npz"))
    assert set(pictures) == {"truth", *(f"{key.split('/')[1]}_2view" for key in lung)}
    truth = chapter.patients("test").hu[0]
    assert (pictures["truth"][0] == truth[8].numpy()).all() and (pictures["truth"][2] == truth[:, :, 8].numpy()).all()
    found, shown, measured = shipped_tables(out.parent, "tiny")
    assert set(found) == set(content) - {"provenance"} and set(shown) == set(pictures)
    assert found["lung/tv/2view"] == content["lung/tv/2view"] and measured["device"].startswith("CPU")
    assert shipped_tables(out.parent, "small") is None and shipped_tables(out.parent.parent, "tiny") is None
    assert tables.main([*given, "--methods", "magic"]) == 2


def test_methods_are_gathered_where_they_exist(chapter):
    entries, pictures = gather(chapter, ["difr3ct", "difr3ct_tv", "x2ctgan", "mean_volume"], ["8view", "2view"], 2)
    both = {f"lung/{name}/{views}" for name in ("difr3ct", "difr3ct_tv", "mean_volume") for views in ("8view", "2view")}
    assert set(entries) == both | {"lung/x2ctgan/2view"}
    assert set(pictures) == {"truth", *("_".join(key.split("/")[1:]) for key in entries)}
    assert entries["lung/mean_volume/8view"]["psnr"] == entries["lung/mean_volume/2view"]["psnr"]  # it sees no x-ray
    assert {"difference", "p"} == set(entries["lung/x2ctgan/2view"]["against_difr3ct"]["ssim"])
    with pytest.raises(InputError, match="none of x2ctgan takes 8view"):
        gather(chapter, ["x2ctgan"], ["8view"], 2)


def test_a_fine_tuned_model_costs_what_it_began_with_too(chapter):
    chapter.ldm("any")
    chapter.ldm("2view", start=chapter.run / "ldm-any")
    minutes = [
        read_safetensors(chapter.run / name / "weights.safetensors")[1]["provenance"]["wall_s"] / 60
        for name in ("vqgan", "ldm-any", "ldm-2view")
    ]
    assert training_cost(chapter, "difr3ct", "2view")["train_minutes"] == pytest.approx(sum(minutes))
