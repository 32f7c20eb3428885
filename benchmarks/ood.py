"""Does the model say when a chest is of a kind that it never saw? Two x-rays, two samples each, no truth used.

    python benchmarks/ood.py [--preset small] [--patients 26] [--samples 2]

Normal cases are unaltered phantoms of the test and the validation split, ``--patients`` of each. Every one of them is
also altered by one finding of :data:`difr3ct_core.phantoms.anomalies.ANOMALIES`, in turn, with the same noise for the
samples: the two groups are paired, and intervals are bootstrapped over patients. Scores of a case, in this order:

- ``residual``: re-projection error of samples as drawn. The detector of ``ood_auc``, chosen before any result was seen;
- ``spread``: mean standard deviation in the body, HU;
- ``spread_95``: its 95th percentile;
- ``guess``: re-projection error of the network's first guess, before anything moves it to the x-rays. Added when a
  refined guess, which agrees with any x-rays, made the residual say less; without such a guess, of the mean;
- ``peak``: largest misfit of that guess (or of the samples' mean) anywhere in the x-rays, over 3 x 3 pixels, in line
  integrals. Added after a trial on eight phantoms, where the residual did not see metal: small things drown in sums;
- ``standardised``: 99th percentile over the pixels of that misfit, less its mean and over its deviation in 48 training
  patients at the same pixel;
- ``xray_alone``: no model at all, the question what it adds: the part of the x-rays outside 150 principal components of
  512 training patients' x-rays, averaged over 7 pixels along z, over its deviation in the other training patients; 99th
  percentile. Both were added later and chosen on 24 further phantoms, among six filters and three summaries.

The body is where the samples' mean shows a trunk, for at the bedside nothing else is known. Writes into
``results/trust.json``, beside what ``trust.py`` writes, with the scores of every case:

- ``ood_auc``, and ``ood_auc_DETECTOR`` of the others: area under the ROC curve of all findings;
- ``ood_auc_FINDING``: of the residual, and of the others in ``others``;
- ``ood_flagged``: share of altered cases above the 95th percentile of the normal ones, by the residual;
- ``ood_spread_ratio_FINDING``: mean standard deviation in the changed voxels over that in the same voxels of the
  unaltered phantom;
- ``ood_real_percentile``: share of normal cases with a smaller residual than the real scan.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import update_results
from scipy import ndimage
from torch.nn.functional import avg_pool2d

from difr3ct_core.chapters import Chapter, open_chapter
from difr3ct_core.consistency import residual, to_mu
from difr3ct_core.ct import unit_to_hu
from difr3ct_core.datasets import Patients, render_xrays
from difr3ct_core.drr import project
from difr3ct_core.initial_volume import InitialVolume
from difr3ct_core.phantoms.anomalies import ANOMALIES
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.uncertainty import auroc

ROOT = Path(__file__).resolve().parents[1]
DETECTORS = ("residual", "spread", "spread_95", "guess", "peak", "standardised", "xray_alone")
BOOTSTRAP = 2000


def draw(chapter: Chapter, patients: Patients, samples: int) -> torch.Tensor:
    """Samples of the model for two views."""
    ldm, vqgan = chapter.ldm("2view"), chapter.vqgan()
    return posterior_samples(ldm, vqgan, patients.xrays, patients.views, samples, chapter.seed)


def judged(chapter: Chapter, patients: Patients, samples: int, drawn: torch.Tensor | None = None) -> torch.Tensor:
    """The volumes whose misfit warns: the network's own guess where the model has one, else the samples' mean."""
    network = chapter.ldm("2view").initial_network
    if not isinstance(network, InitialVolume):
        return (draw(chapter, patients, samples) if drawn is None else drawn).mean(1)
    volume = patients.volume
    with torch.no_grad():
        return network.field.volume(patients.xrays, patients.views, volume.shape, volume.spacing_mm)[:, 0]


def alter(patients: Patients, chapter: Chapter) -> tuple[Patients, torch.Tensor, list[str]]:
    """Every patient with one finding and the x-rays of that, the masks of changed voxels, and the findings' names."""
    names = [list(ANOMALIES)[i % len(ANOMALIES)] for i in range(len(patients))]
    spacing = patients.volume.spacing_mm
    pairs = [ANOMALIES[n](patients.hu[i], patients.labels[i], i, spacing) for i, n in enumerate(names)]
    hu, masks = (torch.stack(part) for part in zip(*pairs, strict=True))
    xrays = torch.cat([render_xrays(h.float(), patients.views, patients.volume, chapter.preset.xray)
                       for h in hu.split(8)])  # fmt: skip
    return dataclasses.replace(patients, hu=hu, xrays=xrays), masks, names


def trunk(mean: torch.Tensor) -> torch.Tensor:
    """The body in a mean of samples in HU: the largest part above -400 HU, with what each axial slice encloses."""
    parts, count = ndimage.label(mean.numpy() > -400)
    if not count:
        return torch.ones_like(mean, dtype=torch.bool)
    largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return torch.from_numpy(np.stack([ndimage.binary_fill_holes(plane) for plane in largest]))


@dataclasses.dataclass(frozen=True)
class Usual:
    """What x-rays and misfits of training patients are like; arrays of (view, v, u) but for the components."""

    centre: torch.Tensor  # mean x-rays
    components: torch.Tensor  # (150, view v u)
    rest: torch.Tensor  # deviation of what the components leave
    misfit_mean: torch.Tensor
    misfit_deviation: torch.Tensor

    @classmethod
    def of(cls, xrays: torch.Tensor, misfits: torch.Tensor) -> Usual:
        """From the x-rays of training patients, two thirds of them for the components, and misfits of some."""
        some, others = xrays.split([2 * len(xrays) // 3, len(xrays) - 2 * len(xrays) // 3])
        components = torch.linalg.svd((some - some.mean(0)).flatten(1), full_matrices=False)[2][:150]
        rest = floored(left_by(components, others - some.mean(0)).std(0))
        return cls(some.mean(0), components, rest, misfits.mean(0), floored(misfits.std(0)))

    def outside(self, xrays: torch.Tensor) -> torch.Tensor:
        """What the components leave of x-rays over its usual deviation."""
        return left_by(self.components, xrays - self.centre) / self.rest

    def unusual(self, missed: torch.Tensor) -> torch.Tensor:
        """A misfit less its mean and over its deviation."""
        return (missed - self.misfit_mean) / self.misfit_deviation


def left_by(components: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """What principal components leave of centred x-rays, averaged over 7 pixels along z."""
    flat = centred.flatten(1)
    return avg_pool2d((flat - flat @ components.T @ components).view_as(centred), (7, 1), 1, (3, 0))


def floored(deviation: torch.Tensor) -> torch.Tensor:
    """No pixel is certain: air around the body would count most."""
    return deviation + 0.3 * deviation.mean()


def misfit(chapter: Chapter, volume: torch.Tensor, images: torch.Tensor, patients: Patients) -> torch.Tensor:
    """Of a volume to the x-rays of one patient, averaged over 3 x 3 pixels, in line integrals."""
    again = project(to_mu(volume, chapter.preset)[None, None], patients.views, patients.volume.spacing_mm)[0, 0]
    return avg_pool2d(again - images, 3, 1)


def usual_of(chapter: Chapter, samples: int, count: int = 48) -> Usual:
    """From the training patients, ``count`` of them for the misfits."""
    train = chapter.patients("train", "2view")
    few = train.take(range(min(count, len(train))))
    pairs = zip(judged(chapter, few, samples), few.xrays, strict=True)
    misfits = torch.stack([misfit(chapter, volume, images, few) for volume, images in pairs])
    return Usual.of(train.xrays, misfits)


def observe(
    chapter: Chapter, patients: Patients, samples: int, usual: Usual
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The scores of every case, and its map of standard deviation in HU."""
    views = patients.views
    drawn = draw(chapter, patients, samples)
    scores: dict[str, list[float]] = {name: [] for name in DETECTORS}
    maps = []
    for volumes, guess, images in zip(drawn, judged(chapter, patients, samples, drawn), patients.xrays, strict=True):
        hu = unit_to_hu(volumes, patients.volume)
        std = hu.std(0)
        inside = std[trunk(hu.mean(0))]
        scores["residual"].append(float(residual(volumes, images, views, chapter.preset).mean()))
        scores["spread"].append(float(inside.mean()))
        scores["spread_95"].append(float(inside.quantile(0.95)))
        scores["guess"].append(float(residual(guess[None], images, views, chapter.preset)))
        missed = misfit(chapter, guess, images, patients)
        scores["peak"].append(float(missed.abs().max()))
        scores["standardised"].append(float(usual.unusual(missed).abs().flatten().quantile(0.99)))
        scores["xray_alone"].append(float(usual.outside(images[None]).abs().flatten().quantile(0.99)))
        maps.append(std)
    return {name: torch.tensor(values) for name, values in scores.items()}, torch.stack(maps)


def interval(normal: torch.Tensor, altered: torch.Tensor, own: torch.Tensor) -> list[float]:
    """95 % interval of the area when patients are drawn again; ``own``: rows of those whose altered scores count.

    A patient drawn twice brings its normal and its altered case twice, within its finding, so pairs stay together.
    """
    rng, areas = np.random.default_rng(0), []
    kinds = [np.arange(k, len(normal), len(ANOMALIES)) for k in range(len(ANOMALIES))]
    counts = np.isin(np.arange(len(normal)), own.numpy())
    for _ in range(BOOTSTRAP):
        rows = np.concatenate([rng.choice(kind, len(kind)) for kind in kinds])
        areas.append(auroc(normal[rows], altered[rows[counts[rows]]]))
    return [float(v) for v in np.quantile(areas, (0.025, 0.975))]


def detection(
    normal: dict[str, torch.Tensor], altered: dict[str, torch.Tensor], names: list[str]
) -> dict[str, dict[str, Any]]:
    """Areas under the ROC curves, of all findings and of each."""
    every, figures = torch.arange(len(names)), {}

    def entry(detector: str, own: torch.Tensor) -> dict[str, Any]:
        a, b = normal[detector], altered[detector]
        return {
            "value": auroc(a, b[own]), "unit": "of 1", "interval_95": interval(a, b, own), "detector": detector,
            "above_own_normal": float((b[own] > a[own]).double().mean()), "normal": len(a), "altered": len(own),
        }  # fmt: skip

    for detector in DETECTORS:
        lists = {"scores_normal": normal[detector].tolist(), "scores_altered": altered[detector].tolist()}
        key = "ood_auc" if detector == "residual" else f"ood_auc_{detector}"
        figures[key] = entry(detector, every) | lists | {"findings": names}
    for name in ANOMALIES:
        own = torch.tensor([i for i, other in enumerate(names) if other == name])
        others = {detector: entry(detector, own) for detector in DETECTORS[1:]}
        figures[f"ood_auc_{name}"] = entry("residual", own) | {"others": others}
    threshold = float(normal["residual"].quantile(0.95))
    above = altered["residual"] > threshold
    by_name = {n: 100 * float(above[[i for i, other in enumerate(names) if other == n]].double().mean())
               for n in ANOMALIES}  # fmt: skip
    figures["ood_flagged"] = {
        "value": 100 * float(above.double().mean()), "unit": "%", "threshold": threshold, "findings": by_name,
    }  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--patients", type=int, default=26, help="of each of the splits test and val")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trust.json")
    options = parser.parse_args()
    began = time.perf_counter()
    chapter = open_chapter("ood", options.preset, options.data)
    some = [chapter.patients(split, "2view") for split in ("test", "val")]
    first, second = (part.take(range(min(options.patients, len(part)))) for part in some)
    patients = first.joined(second)
    strange, masks, names = alter(patients, chapter)
    usual = usual_of(chapter, options.samples)
    normal, before = observe(chapter, patients, options.samples, usual)
    altered, maps = observe(chapter, strange, options.samples, usual)
    figures = detection(normal, altered, names)
    for name in ANOMALIES:
        rows = [i for i, other in enumerate(names) if other == name]
        ratios = [float(maps[i][masks[i]].mean() / before[i][masks[i]].mean()) for i in rows]
        figures[f"ood_spread_ratio_{name}"] = {
            "value": float(np.exp(np.mean(np.log(ratios)))), "unit": "x", "ratios": ratios,
        }  # fmt: skip
    if chapter.real is not None:
        real, _ = observe(chapter, chapter.real.with_views("2view"), options.samples, usual)
        below = {name: 100 * float((normal[name] < real[name]).double().mean()) for name in DETECTORS}
        figures["ood_real_percentile"] = {
            "value": below["residual"], "unit": "%", "percentiles": below, "patient": chapter.real.ids[0],
            "scores": {name: float(values[0]) for name, values in real.items()},
        }  # fmt: skip
    about = {"patients": len(patients), "samples": options.samples, "views": "2view", "paired": True,
             "seconds": time.perf_counter() - began, "weights": chapter.weights("ldm-2view").name}  # fmt: skip
    words = f"python benchmarks/ood.py --preset {options.preset} --patients {options.patients}"
    update_results(
        options.out, {key: entry | about for key, entry in figures.items()}, f"{words} --samples {options.samples}"
    )
    for key, entry in figures.items():
        low, high = entry.get("interval_95", (entry["value"],) * 2)
        print(f"{key}: {entry['value']:.3f} {entry['unit']} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
