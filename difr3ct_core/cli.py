"""``difr3ct``: arguments in, one call of the library, files out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .files import InputError
from .reconstruct import reconstruct
from .xrays import read_xrays


def _reconstruct(options: argparse.Namespace) -> None:
    xrays = read_xrays(options.xrays, options.views)
    result = reconstruct(
        xrays.images,
        xrays.views,
        options.weights,
        n_samples=options.samples,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        device=options.device,
        batch=options.batch,
        memory_gb=options.memory_gb,
        consistency=options.consistency,
    )
    written = result.save(options.out)
    took = result.provenance["wall_s"]
    print(f"{options.out}: {len(written)} files in {took} s: {options.samples} samples, mean.nii.gz, std.nii.gz (HU).")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the shell command; returns the exit status (2 for bad input)."""
    parser = argparse.ArgumentParser(prog="difr3ct", description="Posterior samples of chest CT from planar x-rays.")
    commands = parser.add_subparsers(dest="command", required=True)
    rec = commands.add_parser("reconstruct", help="x-rays and their views -> N CT samples, mean, standard deviation")
    rec.add_argument("xrays", nargs="+", type=Path, help="PNG (8 or 16 bit), NPZ or DICOM, in the order of the views")
    rec.add_argument("--views", type=Path, required=True, help="JSON with geometry and meaning of the pixel values")
    rec.add_argument(
        "--weights",
        type=Path,
        required=True,
        help="a trained diffusion model: its .safetensors file, or its run folder",
    )
    rec.add_argument("--samples", type=int, default=8, help="posterior samples (default 8)")
    rec.add_argument("--out", type=Path, required=True, help="folder for the NIfTI files and reconstruction.json")
    rec.add_argument("--seed", type=int, default=0)
    rec.add_argument("--steps", type=int, help="solver steps (default: the preset's)")
    rec.add_argument("--guidance", type=float, help="guidance scale (default: the preset's)")
    rec.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... or auto")
    rec.add_argument("--batch", type=int, default=32, help="samples in memory at a time (default 32)")
    rec.add_argument("--memory-gb", type=float, help="instead of --batch: a limit on the memory of sampling, in GB")
    rec.add_argument(
        "--consistency", default="none", help="move the samples until they explain the x-rays: tv, lsq, spread"
    )
    rec.set_defaults(run=_reconstruct)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"difr3ct: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
