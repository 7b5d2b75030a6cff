"""Does `baseline=ours` allocate as the `auto-round` command line does? Layer by layer.

    python experiments/fidelity/compare.py                                    MXFP4/MXFP8
    python experiments/fidelity/compare.py --budgets 3 options=w2_w4          weight-only

Runs the report's own command in a process of its own, on the same checkpoint and the same
calibration text, and reads what it prints and what it writes; then asks this project's rule. Both
score for themselves: the command gets an empty folder for its scores.
"""

import mixprec.environment  # noqa: F401, I001 - first, as in run.py

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from mixprec import data, models
from mixprec.allocate import Request, allocate
from mixprec.cell import Cell, cell_of
from mixprec.rounding import round_mx
from mixprec.schemes import SCHEMES, Layer, Scheme, realised_bits
from mixprec.store import write_json
from mixprec.sweep import configuration

ROOT = Path(__file__).resolve().parents[2]
# The report's, without which AutoScheme's scores and its solution would not be the report's.
FLAGS = ["--ignore_scale_zp_bits", "--iters", "0", "--format", "fake"]
# Of the rounding that follows the allocation, which at its defaults takes many minutes on a CPU;
# AutoScheme has its own 16 samples of 256 tokens, and no flag changes them.
ROUNDING_DATA = ["--nsamples", "1", "--seqlen", "32"]
ALLOCATED = "AutoScheme final avg_bits"  # the command's first line after the allocation is known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", default="4.5,5,6")
    parser.add_argument("--rounded", action="store_true", help="run the command to its end (MX)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache")
    parser.add_argument("overrides", nargs="*", help="as for run.py: model=… options=…")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        comparisons = [
            compare(
                cell(float(budget), args.overrides), args.cache, Path(place), rounded=args.rounded
            )
            for budget in args.budgets.split(",")
        ]
    for row in comparisons:
        print(json.dumps({k: v for k, v in row.items() if k != "differences"}))
    options = comparisons[0]["options"]
    name = f"{comparisons[0]['model']}-{options}{'-rounded' if args.rounded else ''}.json"
    write_json(
        Path(__file__).parent / name,
        {
            "versions": {
                name: version(name) for name in ("auto-round", "torch", "transformers", "datasets")
            },
            "python": platform.python_version(),
            "machine": platform.machine(),
            "comparisons": comparisons,
        },
    )
    sys.exit(any(row["differences"] for row in comparisons))


def cell(budget: float, overrides: list[str]) -> Cell:
    return cell_of(configuration("baseline=ours", f"budget={budget:g}", *overrides))


def compare(asked: Cell, cache: Path, place: Path, *, rounded: bool = False) -> dict:
    """Both allocations of one cell, counted layer by layer.

    place:   an empty folder; a second budget in the same one finds the command's scores there
    rounded: let the command round and write the model, and read the allocation from its weights too
    """
    checkpoint = models.checkpoint(asked.model, cache)
    tokenizer = models.load_tokenizer(checkpoint, asked.model)
    layers = models.quantized_layers(models.load_for_auto_round(checkpoint, asked.model))
    texts = data.calibration_texts(asked.calibration, tokenizer, cache)
    texts_file = place / "texts.json"
    place.mkdir(exist_ok=True)
    write_json(texts_file, [{"text": text} for text in texts])

    stored = any((place / "scores").glob("scheme_*.json"))
    start = time.perf_counter()
    theirs, written = command_line(checkpoint.folder, asked, texts_file, place, layers, rounded)
    seconds = time.perf_counter() - start

    notes = {}
    request = Request(
        asked.baseline, None, asked.model, asked.calibration, cache, notes.__setitem__
    )
    start = time.perf_counter()
    ours = allocate(layers, asked.schemes, asked.budget, request)
    return {
        "model": asked.model.name,
        "options": asked.options.name,
        "budget": asked.budget,
        "layers": len(layers),
        "equal": sum(ours[layer.name] == theirs[layer.name] for layer in layers),
        "equal_as_written": None
        if written is None
        else sum((ours[name] == asked.schemes[0].name) == low for name, low in written.items()),
        "realised_bits": realised_bits(layers, ours),
        "command_realised_bits": realised_bits(layers, theirs),
        "layers_in_highest": sum(name == asked.schemes[-1].name for name in ours.values()),
        "calibration_begins_with_bos": notes["calibration_begins_with_bos"],
        "scores_stored": notes["autoscheme_scores_stored"],
        "command_scores_stored": stored,
        "seconds": round(time.perf_counter() - start, 1),
        "command_seconds": round(seconds, 1),
        "differences": {
            name: {"ours": ours[name], "command": theirs[name]}
            for name in ours
            if ours[name] != theirs[name]
        },
    }


def command_line(
    folder: Path, asked: Cell, texts_file: Path, place: Path, layers: list[Layer], rounded: bool
) -> tuple[dict[str, str], dict[str, bool] | None]:
    """What `auto_round` allocates: as it prints it, and as its written weights show it.

    Unless `rounded`, the command is stopped as soon as the allocation is printed, and nothing is
    written. Raises RuntimeError with its last lines if it fails.
    """
    output = place / "model"
    command = [
        *(sys.executable, "-m", "auto_round", "--model", str(folder)),
        *("--avg_bits", f"{asked.budget:g}"),
        *("--options", ",".join(scheme.preset.lower() for scheme in asked.schemes)),
        *FLAGS,
        *("--dataset", str(texts_file), "--output_dir", str(output)),
        *ROUNDING_DATA,
    ]
    environment = {
        # The command with its own defaults, whatever is set where this runs.
        **{k: v for k, v in os.environ.items() if not k.startswith("AR_AUTO_SCHEME_")},
        "AR_AUTO_SCHEME_CACHE": str(place / "scores"),
        "AR_WORK_SPACE": str(place / "work"),
        "AR_LOG_LEVEL": "INFO",
    }
    lines, allocated = [], False
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            allocated = allocated or ALLOCATED in line
            if allocated and not rounded:
                process.terminate()
                break
    if not allocated or (rounded and process.returncode):
        raise RuntimeError(f"auto_round ended with {process.returncode}: {''.join(lines[-20:])}")
    printed = as_printed(lines, [layer.name for layer in layers])
    return printed, as_written(output, asked.schemes[0], layers) if rounded else None


def as_printed(lines: list[str], names: list[str]) -> dict[str, str]:
    """layer name -> scheme name, from the table of blocks and linears that auto-round logs.

    Its header has two lines, `mlp| |self_attn` over `down_proj|up_proj|q_proj`; a group's name
    stands over its first column only. Raises RuntimeError if a layer is not in it exactly once.
    """
    presets = {scheme.preset: scheme.name for scheme in SCHEMES.values()}
    found: dict[str, str] = {}
    columns: list[str] | None = None
    groups: list[str] = []
    for line in lines:
        text = re.sub(r"\x1b\[[\d;]*m", "", line).split(": ", 1)[-1]  # colours, date and source
        cells = [cell.strip() for cell in text.split("|")]
        if cells[0] == "block":
            groups, columns = cells[1:], None
        elif groups and columns is None:
            columns, group = [], ""
            for above, leaf in zip(groups, cells[1:], strict=True):
                group = above or group
                columns.append(f"{group}.{leaf}" if group else leaf)
        elif columns and len(cells) == len(columns) + 1 and cells[1] in presets:
            for column, preset in zip(columns, cells[1:], strict=True):
                for name in names:
                    if f".{name}".endswith(f".{cells[0]}.{column}"):
                        if name in found:
                            raise RuntimeError(f"auto_round printed {name} twice")
                        found[name] = presets[preset]
    if missing := [name for name in names if name not in found]:
        raise RuntimeError(f"auto_round printed no scheme of {len(missing)} layers: {missing[0]} …")
    return found


def as_written(output: Path, lowest: Scheme, layers: list[Layer]) -> dict[str, bool]:
    """layer name -> True if its written weights are in the lowest scheme, an MX one.

    That is so if rounding to it once more changes nothing, whichever power of two the command took
    for a group's scale: twice the largest element that it uses is an element too.
    """
    from safetensors import safe_open

    written = {}
    for file in output.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored = set(tensors.keys())
            for layer in layers:
                if f"{layer.name}.weight" in stored:
                    weight = tensors.get_tensor(f"{layer.name}.weight")
                    again = round_mx(weight, lowest.bits)
                    written[layer.name] = bool((again == weight).all())
    if len(written) != len(layers):
        raise RuntimeError(f"auto_round wrote {len(written)} of {len(layers)} layers")
    return written


if __name__ == "__main__":
    main()
