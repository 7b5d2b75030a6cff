"""Are the stored results what was stored, and do their numbers follow from each other?

`python -m mixprec.verify` reads every result below results/ and checks, of each: its content hash and those of the files
beside it; its configuration's hash and its place; accuracies, their mean and standard errors from correct.json; KL from its
sequences; bits from the allocation and the model's shapes, and that they are within the budget; what is kept of
samples.parquet, where it is there. Then that the tables in the README files are those that the results give now.
A line for each thing that differs, and exit code 1 if there is any.

`--migrate` adds the hashes to results of before there were any, if nothing else is wrong with them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from mixprec import paired, published, store, tables
from mixprec.cell import ConfigError, Model, digest, path_of
from mixprec.schemes import BF16, Layer, realised_bits

CLOSE = 1e-9  # relative: sums of the same numbers in another order


def cells(root: Path) -> Iterator[Path]:
    """The folders of all results below `root`."""
    for file in sorted(root.glob("*/*/*/*/result.json")):
        yield file.parent


def faults(folder: Path, place: str) -> list[str]:
    """What is wrong with the result in `folder`, a line each. place: of the folder below results/."""
    try:
        result = store.read(folder)
    except store.Damaged as error:
        return [str(error)]
    found = [why] if (why := store.unsealed(folder, result)) else []
    for check in (_identity, _accuracies, _kl, _bits, _samples):
        try:
            found += check(folder, place, result)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            found.append(f"{check.__name__[1:]} cannot be checked: {store.one_line(error)}")
    return found


def _identity(folder: Path, place: str, result: dict) -> Iterator[str]:
    yield from _differs("hash", result["hash"], digest(result["config"]))
    yield from _differs("its folder", place, path_of(result["config"]))
    bf16 = {**result["config"], "baseline": {"name": "bf16"}, "options": None, "budget": None}
    for key in ("target", "fused", "tuning"):
        bf16.pop(key, None)
    yield from _differs("recovery.reference", result["recovery"]["reference"], path_of(bf16))


def _accuracies(folder: Path, place: str, result: dict) -> Iterator[str]:
    from mixprec.evaluate import harness  # late: it imports torch

    kept = json.loads((folder / "correct.json").read_text(encoding="utf-8"))
    yield from _differs("correct.json: hash", kept["hash"], result["hash"])
    right = paired.unpacked(kept)
    tasks = {task: pd.DataFrame({"correct": right[task]}) for task in right}
    yield from _differs("tasks", sorted(result["metrics"]), sorted(tasks))
    for task, metric in result["metrics"].items():
        yield from _differs(f"metrics.{task}", metric, harness.summary(tasks[task]))
    yield from _differs("mean", result["mean"], harness.mean(result["metrics"]))


def _kl(folder: Path, place: str, result: dict) -> Iterator[str]:
    from mixprec.evaluate import kl

    if (found := result["kl"]) is None:
        return
    sequences = found["per_sequence"]
    yield from _differs("kl.sequences", found["sequences"], len(sequences))
    mean = sum(sequences) / len(sequences)
    yield from _differs("kl.mean", found["mean"], mean)
    yield from _differs("kl.stderr", found["stderr"], kl.stderr(sequences))


def _bits(folder: Path, place: str, result: dict) -> Iterator[str]:
    stored = json.loads((folder / "allocation.json").read_text(encoding="utf-8"))
    config, allocation, quantized = result["config"], stored["layers"], result["quantized"]
    yield from _differs("allocation.json: budget", stored["budget"], config["budget"])
    counts = dict(Counter(allocation.values()))
    yield from _differs("quantized.layers", quantized["layers"], len(allocation))
    yield from _differs("quantized.layers_by_scheme", quantized["layers_by_scheme"], counts)
    options = config["options"]["schemes"] if config["options"] else [BF16.name]
    for name in sorted(set(allocation.values()) - set(options)):
        yield f"allocation.json: {name} is not one of the options {', '.join(options)}"
    for key in ("realised_bits", "realised_bits_with_scales"):
        yield from _differs(f"allocation.json: {key}", stored[key], result[key])
    bits = [result["realised_bits"]]
    layers = _layers(config["model"]["path"], config["model"]["revision"])
    if layers is not None:  # shapes that are known
        names, weights = sorted(layer.name for layer in layers), sum(x.weights for x in layers)
        yield from _differs("allocation.json: layers", sorted(allocation), names)
        yield from _differs("quantized.weights", quantized["weights"], weights)
        bits.append(realised_bits(layers, allocation))
        yield from _differs("realised_bits", result["realised_bits"], bits[-1])
        with_scales = realised_bits(layers, allocation, count_scales=True)
        key = "realised_bits_with_scales"
        yield from _differs(key, result[key], with_scales)
    if config["budget"] is not None and max(bits) > config["budget"] * (1 + CLOSE):
        yield f"its allocation has {max(bits):.6g} bits, above its budget of {config['budget']:g}"


def _samples(folder: Path, place: str, result: dict) -> Iterator[str]:
    from mixprec.evaluate import harness

    if not (folder / "samples.parquet").is_file():
        return
    expected = result.get("files", {}).get("samples.parquet")
    if expected not in (None, store.hashes(folder)["samples.parquet"]):
        yield "samples.parquet is not what was stored: its hash in result.json differs"
    samples = pd.read_parquet(folder / "samples.parquet")
    kept = json.loads((folder / "correct.json").read_text(encoding="utf-8"))
    yield from _differs("correct.json", kept, paired.bits(result["hash"], samples))
    documents = harness.documents_hash(samples)
    yield from _differs("provenance.documents", result["provenance"]["documents"], documents)


@functools.lru_cache
def _layers(path: str, revision: str | None) -> list[Layer] | None:
    """The quantized linears of a model whose configuration is known here; else None."""
    from mixprec import estimate

    skeleton = estimate.skeleton_of(Model(path=path, revision=revision))
    return None if skeleton is None else estimate.quantized_layers(skeleton)


def _differs(what: str, stored, computed) -> Iterator[str]:
    """One line if the two are not the same, but for rounding."""
    if isinstance(stored, dict) and isinstance(computed, dict) and stored.keys() == computed.keys():
        for key in stored:
            yield from _differs(f"{what}.{key}", stored[key], computed[key])
    elif not _same(stored, computed):
        yield f"{what}: stored {_short(stored)}, computed {_short(computed)}"


def _same(stored, computed) -> bool:
    if isinstance(stored, float) and isinstance(computed, (int, float)):
        return math.isclose(stored, computed, rel_tol=CLOSE, abs_tol=1e-12)
    return stored == computed


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def stale_readmes(root: Path, experiments: Path = published.EXPERIMENTS) -> list[str]:
    """The README files whose tables are not those of `root`, a line each."""
    found = []
    for file in tables.readmes(experiments):
        text = file.read_text(encoding="utf-8")
        if tables.with_reproduced(text, root, experiments) != text:
            name = file.relative_to(experiments.parent)
            found.append(
                f"{name}: its tables are not those of {root}/; `python -m mixprec.tables --readme`"
            )
    return found


def migrate(root: Path) -> list[str]:
    """Give results without a content hash theirs, if nothing else is wrong; what was done, a line each."""
    lines = []
    for folder in cells(root):
        place = folder.relative_to(root).as_posix()
        try:
            result = store.read(folder)
        except store.Damaged:
            continue  # for `faults` to name
        if "content_hash" in result:
            continue
        wrong = [line for line in faults(folder, place) if "has no content hash" not in line]
        if wrong:
            lines += [f"{place}: not migrated: {line}" for line in wrong]
        else:
            store.write_json(folder / "result.json", store.sealed(result, store.hashes(folder)))
            lines.append(f"{place}: hashes added")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.verify", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--migrate", action="store_true",
                        help="first add hashes to results that are older than these")  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.migrate:
        print("\n".join(migrate(chosen.results)) or "nothing to migrate")
    folders = list(cells(chosen.results))
    found = []
    for folder in folders:
        place = folder.relative_to(chosen.results).as_posix()
        found += [f"{place}: {line}" for line in faults(folder, place)]
    try:
        found += stale_readmes(chosen.results)
    except ConfigError as error:
        found.append(str(error))
    for line in found:
        print(line)
    count = f"{len(folders)} results, {len(tables.readmes())} README files"
    print(f"{count}: {len(found)} differences" if found else f"{count}: all as stored")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
