"""A table's column: the command lines of auto_round and lm_eval for each cell, against `run.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixprec.bench.common import CACHE, ratio
from mixprec.sweep import CONF, configuration

PEER_BATCH = 4  # lm_eval's best on two cores, as `evaluate` finds it


def column(limit: int, dtype: str) -> dict:
    """Seven cells: `auto_round` and `lm_eval` for each, against `python run.py`. One run a side.

    Both find the converted checkpoint and documents, and neither has AutoScheme's scores; after its
    first budget each reads its own. auto_round rounds to nearest, as this project does, which is
    its fastest way (`--disable_opt_rtn`); lm_eval has the batch size that measured best, and the
    same documents. Neither computes KL.
    """
    with tempfile.TemporaryDirectory() as place:
        theirs = _column_of_command_lines(Path(place) / "theirs", limit, dtype)
        ours = _column_of_this_project(Path(place) / "ours", limit, dtype)
    totals = [sum(theirs.values()), sum(ours.values())]
    print(f"  the command lines {totals[0]:.0f} s, ours {totals[1]:.0f} s", flush=True)
    return {
        "limit": limit,
        "dtype": dtype,
        "ratios": {"column, auto_round + lm_eval / ours": ratio(*([total] for total in totals))},
        "seconds": {"auto_round and lm_eval": theirs, "ours": ours},
    }


def _column_of_command_lines(place: Path, limit: int, dtype: str) -> dict[str, float]:
    """Seconds of every command."""
    import yaml

    from mixprec import data, models
    from mixprec.allocate import Request, allocate
    from mixprec.cell import cell_of
    from mixprec.evaluate.tasks import tasks_of

    cfg = configuration(f"model.limit={limit}")
    checkpoint = models.checkpoint(cfg.model, CACHE)
    tokenizer = models.load_tokenizer(checkpoint, cfg.model)
    tasks = tasks_of(cfg.eval, CACHE)
    place.mkdir(parents=True)
    (place / "five.yaml").write_text(yaml.safe_dump(tasks.specs[0]))
    (place / "documents.json").write_text(json.dumps(tasks.documents))
    texts = data.calibration_texts(cfg.calibration, tokenizer, CACHE)
    (place / "texts.json").write_text(json.dumps([{"text": text} for text in texts]))
    layers = models.quantized_layers(models.load_for_auto_round(checkpoint, cfg.model))
    ends = {}
    for name in ("head8", "tail8"):
        one = cell_of(configuration(f"baseline={name}", "budget=5"))
        allocation = allocate(layers, one.schemes, one.budget, Request(one.baseline))
        high = {
            layer: {"bits": 8, "act_bits": 8} for layer, s in allocation.items() if s == "mxfp8"
        }
        ends[name] = ["--scheme", "MXFP4", "--layer_config", json.dumps(high)]
    automatic = ["--options", "mxfp4,mxfp8", "--ignore_scale_zp_bits"]
    cells = {
        "bf16": None,
        "low": ["--scheme", "MXFP4"],
        **ends,
        **{f"ours-{bits}": ["--avg_bits", bits, *automatic] for bits in ("4.5", "5", "6")},
    }
    environment = {
        "AR_AUTO_SCHEME_CACHE": str(place / "scores"),
        "AR_WORK_SPACE": str(place / "work"),
        "HF_DATASETS_OFFLINE": "1",
    }
    seconds = {}
    for name, scheme in cells.items():
        folder = checkpoint.folder.resolve()
        if scheme is not None:
            command = ["auto_round", "--model", str(folder), *scheme, "--iters", "0"]
            command += ["--disable_opt_rtn", "--format", "fake", "--output_dir", str(place / name)]
            # Rounding to nearest looks at no text; the command wants some all the same.
            command += ["--dataset", str(place / "texts.json"), "--nsamples", "1", "--seqlen", "32"]
            seconds[f"auto_round {name}"] = _timed(command, environment)
            folder = next(path.parent for path in (place / name).rglob("config.json"))
        command = ["lm_eval", "run", "--model", "hf", "--tasks", str(place / "five.yaml")]
        command += ["--model_args", f"pretrained={folder},dtype={dtype}", "--device", "cpu"]
        command += ["--batch_size", str(PEER_BATCH), "--samples", str(place / "documents.json")]
        seconds[f"lm_eval {name}"] = _timed(command, environment)
    return seconds


def _column_of_this_project(place: Path, limit: int, dtype: str) -> dict[str, float]:
    """Seconds of the two commands, with a cache that has the checkpoint and documents alone."""
    place.mkdir(parents=True)
    for name in ("models", "documents", "datasets", "hashes.json"):
        (place / name).symlink_to((CACHE / name).resolve())
    common = [f"model.limit={limit}", f"model.dtype={dtype}", "eval.kl.sequences=0"]
    common += [f"cache={place}", f"results={place}/results", "tracking=off"]
    run = ["python", str(CONF.parent / "run.py"), "-m", *common]
    return {
        "run.py, bf16, low, head8, tail8": _timed([*run, "baseline=bf16,low,head8,tail8"]),
        "run.py, ours at three budgets": _timed([*run, "baseline=ours", "budget=4.5,5,6"]),
    }


def _timed(command: list[str], environment: dict[str, str] | None = None) -> float:
    """Seconds that `command` of this environment takes. Raises RuntimeError with its last words."""
    program = str(Path(sys.executable).parent / command[0])
    start = time.perf_counter()
    done = subprocess.run(
        [program, *command[1:]],
        capture_output=True, text=True, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    seconds = time.perf_counter() - start
    print(f"  {command[0]}: {seconds:.1f} s", flush=True)
    return seconds
