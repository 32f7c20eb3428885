#!/usr/bin/env python3
"""What a real chest CT looks like without learning: FBP, SIRT, CGLS and total variation from 8, 4, 2 and 1 views.

    python benchmarks/classical.py

LIDC-IDRI-0001 at 128³, parallel x-rays without noise from the same projector, peak of the PSNR = width of the HU window
(2500). The parameters were chosen on phantoms and on another scan; scores on this one were printed beside them in the
trials. Writes into benchmarks/results/projector.json:

- ``tv_psnr_8view`` ...: total variation, for 1 and 2 views within an elliptic trunk (``tv_body``); ``tv_plain_psnr_*``
  is without that prior. One frontal view alone fixes only the mean along every ray, so plain total variation, SIRT and
  CGLS all return that mean.
- ``tv_seconds``: the slowest of these, on all cores; ``fbp_psnr_*``, ``sirt_psnr_*``, ``cgls_psnr_*``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from _results import update_results

from difr3ct_core.baselines.classical import METHODS
from difr3ct_core.ct import hu_to_mu, mu_to_hu, prepare_ct, sample_ct
from difr3ct_core.drr import project
from difr3ct_core.geometry import standard_views
from difr3ct_core.metrics import psnr
from difr3ct_core.presets import VIEW_SETS, get_preset

RESULTS = Path(__file__).parent / "results" / "projector.json"
#: View set → name in the file. Of the single views the frontal one is the paper's radiograph.
NAMES = {name: {"1view_frontal": "1view"}.get(name, name) for name in VIEW_SETS}
KEYS = {"tv_body": "tv", "tv": "tv_plain"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder that data_scripts/fetch_sample_ct.py filled")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timings; the fastest counts, as it was disturbed least (default 3)"
    )
    options = parser.parse_args(arguments)
    scan = sample_ct(options.data)
    if scan is None:
        print("LIDC-IDRI-0001 is missing: run data_scripts/fetch_sample_ct.py first.", file=sys.stderr)
        return 2
    preset = get_preset("paper")
    volume, water = preset.volume, preset.xray.mu_water_per_mm
    truth = prepare_ct(scan, volume).hu[None]
    mu = hu_to_mu(truth, water)
    bounds = tuple(float(hu_to_mu(truth.new_tensor(hu), water)) for hu in (volume.hu_min, volume.hu_max))
    window = volume.hu_max - volume.hu_min

    figures, seconds = {}, []
    print(f"{'views':14s} {'method':8s} {'PSNR dB':>8s} {'s':>6s}")
    for view_set, name in NAMES.items():
        views = standard_views(view_set, preset.xray.detector_size, volume.fov_mm)
        xrays = project(mu[:, None], views, volume.spacing_mm)[:, 0]
        for method, solve in METHODS.items():
            times = []
            for _ in range(options.repeats):
                began = time.perf_counter()
                found = solve(xrays, views, volume.shape, volume.spacing_mm, bounds)
                times.append(time.perf_counter() - began)
            score = float(psnr(mu_to_hu(found, water)[:, None], truth[:, None], window))
            print(f"{view_set:14s} {method:8s} {score:8.2f} {min(times):6.2f}", flush=True)
            key = KEYS.get(method, method)
            entry = {"value": round(score, 3), "unit": "dB", "seconds": round(min(times), 3), "method": method}
            figures[f"{key}_psnr_{name}"] = entry
            if key == "tv":
                seconds.append(min(times))
    figures["tv_seconds"] = {"value": round(max(seconds), 3), "unit": "s", "views": "slowest of all sets"}
    given = sys.argv[1:] if arguments is None else arguments
    update_results(RESULTS, figures, " ".join(["python benchmarks/classical.py", *given]))
    print(f"{RESULTS}: {len(figures)} figures.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
