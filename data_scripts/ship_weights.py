"""Make the small files of ``pretrained/`` from finished runs: weights in bfloat16, the log, and a model card.

    python data_scripts/ship_weights.py --run runs/small [--out pretrained]

For every finished autoencoder and diffusion model of the run (initial networks are inside the latter):
``PRESET-MODEL.safetensors`` (at most 16 MB), ``.csv`` (its log), ``.md`` (its card, with the measured quality from
``benchmarks/results/quality_PRESET.json`` if that is there; run this again afterwards). An autoencoder whose decoder
went on learning (``decoder``) goes in place of the first one. Diffusion models name the autoencoder beside them instead
of holding it once more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from difr3ct_core.files import InputError, atomic_path, read_json, read_safetensors
from difr3ct_core.stage_decoder import SQUARE_WEIGHT
from difr3ct_core.weights import export_weights

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB = 16.0
COMMANDS = {
    "vqgan": "python -m difr3ct_core.training --stage vqgan --preset {preset}{settings}",
    "decoder": "python -m difr3ct_core.training --stage decoder --preset {preset}{settings}",
    "ldm": "python -m difr3ct_core.training --stage ldm --views {views} --preset {preset}{settings}",
}


def settings_of(stage: str, preset: dict[str, Any]) -> str:
    """The ``--set`` words by which a run differs from the preset of that name."""
    from difr3ct_core.presets import get_preset

    usual = json.loads(json.dumps(get_preset(preset["name"]).to_dict()))  # tuples become lists, as in the file
    words = []
    for section, mark in (
        (f"train_{stage}", ""),
        *([("initial", "initial."), ("train_initial", "train_initial.")] if stage == "ldm" else []),
        ("cohort", "cohort."),
    ):
        changed = {k: v for k, v in preset.get(section, {}).items() if usual[section].get(k) != v}
        # A second initial network is put in afterwards (weights.join_second).
        words += [f"{mark}{k}={json.dumps(v)}" for k, v in changed.items() if not k.startswith("second_")]
    return f" --set {' '.join(words)}" if words else ""


def quality(path: Path, model: str) -> list[str]:
    """Lines of the card on what the model reaches; a sentence where it was not measured."""
    if not path.exists():
        return ["Not measured yet: `python benchmarks/quality.py`."]
    figures = read_json(path)
    mark = "vqgan" if model == "vqgan" else "any_view_" if model == "ldm-any" else model.removeprefix("ldm-")
    lines = ["| what | value |", "|---|---|"]
    for key, figure in figures.items():
        if key == "provenance" or "classical" in key or "mean_volume" in key:
            continue
        own = mark in key and (model == "ldm-any" or "any_view" not in key)
        if own or (model == "vqgan" and key == "codebook_alive"):
            spread = f" ± {figure['std']:.3f} over {figure['patients']} patients" if figure.get("std") else ""
            spread += f", mean of {figure['samples']} samples" if "samples" in figure else ""
            more = f"; {figure['psnr_4095']:.2f} with peak 4095" if "psnr_4095" in figure else ""
            lines.append(f"| `{key}` | {figure['value']:.3f} {figure['unit']}{spread}{more} |")
    return [
        *lines,
        "",
        "PSNR: peak = width of the HU window, over the whole volume. SSIM: 11³ Gaussian.",
    ]


def card(model: str, metadata: dict[str, Any], megabytes: float, measured: Path, note: str = "") -> str:
    """The model card in Markdown; ``note`` is what the metadata cannot know of how the training went."""
    preset, origin = metadata["preset"], metadata["provenance"]
    stage = "ldm" if model != "vqgan" else "decoder" if "latents_of" in metadata else "vqgan"
    training, cohort = preset[f"train_{stage}"], preset["cohort"]
    command = COMMANDS[stage].format(
        preset=preset["name"], views=model.removeprefix("ldm-"), settings=settings_of(stage, preset)
    )
    if "start" in metadata["fingerprint"] or stage == "decoder":
        command += " --weights START"
    size, initial = preset["volume"]["size"], preset.get("initial", {})
    n_train = metadata["fingerprint"].get("n_train", cohort["n_train"])
    if initial.get("in_voxels"):
        command += " --network NETWORK"
    others, copies = metadata["fingerprint"].get("others"), metadata.get("initial_others")
    seen = " No real patient was trained on."
    if stage == "ldm":
        seen = " No real patient was trained on, but for what the card of its autoencoder says."
    if copies:
        seen = (f" The refinement of its first guess also learned from {copies[0]} deformed copies of one real CT, "
                f"{100 * copies[1]:.0f} % of its volumes; the autoencoder's card tells of its own.")  # fmt: skip
    if others:
        command += " --scan CT"
        seen = f" {100 * others[1]:g} % of the volumes were deformed copies, {others[0]} in all, of one real CT."
    if "detectors" in metadata["fingerprint"]:
        command += " --detectors"
        seen += f" X-rays of simulated imperfect detectors: {metadata['fingerprint']['detectors']}."
    if second := metadata.get("second"):
        steps = (f"{h['steps']} steps of {h['batch_size']}, {h['wall_s'] / 60:.0f} min" for h in second["history"])
        others = f" and {second['others'][0]} further volumes" if second["others"] else ""
        seen += (
            " A second network, for patients whose guess misses the x-rays by more than "
            f"{initial['second_from']:g}, went on from an earlier one with {second['n_train']} phantoms{others}, on "
            f"{second['device']}: {'; '.join(steps)}. Its refinement is done {initial['second_passes']} times."
        )
    judges = "L1 and commitment only; no perceptual and no adversarial loss"
    if stage == "decoder":
        judges = f"of the decoder, L1 and {SQUARE_WEIGHT:g} times the square; encoder and codes are START's"
    elif preset["vqgan"].get("image_gan_weight") or metadata.get("perceptual"):
        judges = "L1, commitment, adversarial" + (", perceptual" if metadata.get("perceptual") else "")
    kind = "3D VQGAN" if stage != "ldm" else "Conditional latent diffusion model, for the VQGAN beside it,"
    lines = [
        f"# {preset['name']}-{model}", "",
        f"{kind} of DIFR3CT, "
        f"{size}³ voxels of {preset['volume']['fov_mm'] / size:g} mm. {megabytes:.1f} MB, stored as bfloat16.", "",
        f"- **Data**: {n_train} synthetic phantom thoraxes, cohort `{cohort['cohort']}`, "
        f"seed {cohort['seed']} (`data_scripts/make_phantoms.py`).{seen}",
        f"- **Training**: {training['steps']} steps, batch {training['batch_size']}, rate {training['lr']:g}, seed "
        f"{origin['seed']}, {origin['wall_s'] / 3600:.2f} h of wall time, on {origin['device']}, "
        f"commit {origin['commit']}, {origin['finished'][:10]}.",
        *([f"- **How it went**: {note}"] if note else []),
        f"- **Losses of the VQGAN**: {judges}.",
        *([f"- **Condition**: features along rays (Eq. 10) and, beyond the paper, the encoded volume of "
           f"`{initial['solver']}`, {initial['iterations']} iterations"
           + (", refined by an initial network (sine layers, trained first, by least squares)."
              if initial.get("network") else ".")]
          if stage == "ldm" and initial.get("solver", "none") != "none" and not initial.get("in_voxels") else []),
        *(["- **Condition**: features along rays (Eq. 10) and, beyond the paper, the encoded volume of "
           + (f"an INRR3CT{' of four of the eight x-rays' if model == 'ldm-8view' else ''}"
              f"{', moved to all x-rays, refined, moved again' if initial.get('refine_widths') else ''},")
           + " trained first, by least squares. What the autoencoder loses of that volume is added to every sample."]
          if stage == "ldm" and initial.get("in_voxels") else []),
        *(["- **All trainings behind it**: " + "; ".join(
            f"{h['kind']} {h['steps']} steps of {h['batch_size']}, {h['wall_s'] / 60:.0f} min"
            for h in metadata["history"]) + "."] if "history" in metadata else []),
        f"- **Command**: `{command}`",
        f"- **HU window**: {preset['volume']['hu_min']:g} to {preset['volume']['hu_max']:g}.", "",
        "## Quality", "", *quality(measured, model), "",
        "## Limits", "",
        "For research and teaching, not for clinical use. Trained on phantoms, but for what is said above: a real "
        "chest has texture and shapes that they lack, and the figures on LIDC-IDRI-0001 show the gap. Parallel beam "
        "without noise. Trained for minutes, not for days: more training improves it.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def ship(run: Path, out: Path, results: Path, notes: dict[str, str] | None = None) -> list[Path]:
    """Export every finished model of a run; returns the files of weights.

    Args:
        run: folder of the models.
        out: where the files go.
        results: folder of the measured figures.
        notes: model -> a sentence for its card.

    Raises:
        InputError: no finished model there, or one is larger than the limit.
    """
    found = [path for path in sorted(run.glob("*/weights.safetensors")) if not path.parent.name.startswith("initial-")]
    if any(path.parent.name == "decoder" for path in found):
        found = [path for path in found if path.parent.name != "vqgan"]
    if not found:
        raise InputError(f"{run}: holds no finished model, expected MODEL/weights.safetensors; train one first.")
    made = []
    # The autoencoder first: others name it.
    for weights in sorted(found, key=lambda path: path.parent.name not in ("vqgan", "decoder")):
        model = "vqgan" if weights.parent.name == "decoder" else weights.parent.name
        _, metadata = read_safetensors(weights)
        name = metadata["preset"]["name"]
        path = out / f"{name}-{model}.safetensors"
        shared = out / f"{name}-vqgan.safetensors"
        megabytes = export_weights(weights, path, autoencoder=shared if shared.exists() else None) / 1e6
        if megabytes > LIMIT_MB:
            path.unlink()
            raise InputError(
                f"{path}: would be {megabytes:.1f} MB, expected at most {LIMIT_MB:g}; use a smaller preset."
            )
        for target, text in (
            # The log of the first training stays beside that of the decoder.
            (out / f"{name}-{weights.parent.name}.csv", (weights.parent / "log.csv").read_text()),
            (
                path.with_suffix(".md"),
                card(model, metadata, megabytes, results / f"quality_{name}.json", (notes or {}).get(model, "")),
            ),
        ):
            with atomic_path(target) as temporary:
                temporary.write_text(text, encoding="utf-8")
        made.append(path)
        print(f"{path}: {megabytes:.1f} MB")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of finished models, such as runs/small")
    parser.add_argument("--out", type=Path, default=ROOT / "pretrained")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--note", nargs=2, action="append", default=[], metavar=("MODEL", "TEXT"), help="for its card")
    options = parser.parse_args(arguments)
    try:
        ship(options.run, options.out, options.results, dict(options.note))
    except InputError as error:
        print(f"ship_weights: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
