"""Benchmarks against lm-eval and auto-round as their authors ship them: `make bench`.

Every measurement is a process of its own (`measure`), so that memory is its own too; the peers and
this project take turns, on the same documents. What is printed are ratios of medians, with their
spread over repeats; all raw seconds are in results/bench/*.json with the machine and the versions.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import mixprec.environment  # noqa: F401 - first, as in run.py
from mixprec import bench_signals, bench_stability
from mixprec.cell import FIVE_TASKS, Config
from mixprec.store import write_json
from mixprec.sweep import CONF, configuration

CACHE = Path(".cache")
OUTPUT = Path("results/bench")
PEER_BATCH = 4  # lm_eval's best on two cores, as `evaluate` finds it


# --- one measurement, in its own process ------------------------------------------------------


def measure(what: argparse.Namespace) -> dict:
    """Seconds of a cell and of hellaswag alone, peak memory, log-likelihoods: one engine, one model."""
    from lm_eval.models.huggingface import HFLM

    from mixprec import models, provenance
    from mixprec.evaluate.shared_prefix import SharedPrefixLM
    from mixprec.profile import profile

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    cfg = configuration(f"model.limit={what.limit}", f"eval.tasks=[{','.join(what.tasks)}]")
    checkpoint = models.checkpoint(cfg.model, CACHE)
    tokenizer = models.load_tokenizer(checkpoint, cfg.model)
    model, quantizing = _model(
        what.model, what.engine, what.dtype, checkpoint, cfg.model, tokenizer
    )
    requests = _requests(cfg)
    common = {"pretrained": model, "tokenizer": tokenizer, "add_bos_token": False}
    if what.engine == "hf":
        lm = HFLM(**common, batch_size=what.batch, softmax_dtype="float32")
    else:
        lm = SharedPrefixLM(**common)
    provenance.reset_peak_memory()
    seconds = {}
    start = time.perf_counter()
    # All at once, as lm_eval.evaluate asks.
    answered = iter(lm.loglikelihood([*chain(*requests.values())], disable_tqdm=True))
    seconds["cell"] = time.perf_counter() - start
    answers = {task: list(islice(answered, len(asked))) for task, asked in requests.items()}
    tokens = {k: getattr(lm, f"tokens_{k}", 0) for k in ("asked", "run", "padded", "rows")}
    peak = provenance.peak_memory()["cpu"]
    if "hellaswag" in requests:
        start = time.perf_counter()
        lm.loglikelihood(requests["hellaswag"], disable_tqdm=True)
        seconds["hellaswag"] = time.perf_counter() - start
    layers = models.quantized_layers(model)
    return {
        "seconds": seconds,
        "quantizing": quantizing,
        "peak_memory_bytes": peak,
        "tokens": tokens,
        "profile": profile(model, layers, tokens, seconds["cell"]) if tokens["run"] else None,
        "answers": answers,
    }


def _model(name: str, engine: str, dtype: str, checkpoint, settings, tokenizer):
    """(a reference or quantized SmolLM2 as its engine is used, seconds that quantizing took)."""
    from mixprec import models, quantize

    if name == "auto_round":
        from auto_round import AutoRound, RTNConfig

        model = models.load_for_auto_round(checkpoint, settings)
        start = time.perf_counter()
        compressor = AutoRound(
            model, tokenizer, scheme="MXFP4", alg_configs=RTNConfig(disable_opt_rtn=True),
            iters=0, device_map="cpu",
        )  # fmt: skip
        model = compressor.quantize()[0]
        model = model.float() if dtype == "float32" else model.bfloat16()
        return model.eval(), time.perf_counter() - start
    model = models.load(checkpoint, settings)
    if dtype == "bfloat16":
        model.bfloat16()
    if engine == "hf":
        return model, 0.0
    layers = models.quantized_layers(model)
    in_memory = quantize.InMemory(model)
    start = time.perf_counter()
    if name == "low":
        in_memory.apply({layer.name: "mxfp4" for layer in layers})
    return model, time.perf_counter() - start


def _requests(cfg: Config) -> dict[str, list]:
    from mixprec.evaluate.tasks import tasks_of

    tasks = tasks_of(cfg.eval, CACHE)
    loaded = tasks.loaded["tasks"]
    requests: dict[str, list] = {}
    for name, leaves in tasks.leaves.items():
        requests[name] = []
        for leaf in leaves:
            loaded[leaf].build_all_requests(samples=tasks.samples.get(leaf), rank=0, world_size=1)
            requests[name] += loaded[leaf].instances
    return requests


def in_a_process(**what) -> dict:
    """`measure` in a fresh process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        arguments = [x for key, value in what.items() for x in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "mixprec.bench", "measure", "--output", file.name]
        subprocess.run([*command, *arguments], check=True, capture_output=True)
        return json.loads(Path(file.name).read_text())


# --- the comparisons --------------------------------------------------------------------------


def evaluate(limit: int, repeats: int, dtype: str) -> dict:
    """BF16 and a quantized cell: HFLM at its best batch size, and the shared-prefix engine.

    Both sides compute in `dtype`: which one is faster depends on the machine, and what it does to
    an answer is not the engine's doing.
    """
    tasks = ",".join(FIVE_TASKS)
    tried = {}
    for batch in (1, 4, 16):
        settings = {"engine": "hf", "model": "bf16", "dtype": dtype, "batch": batch}
        tried[batch] = in_a_process(**settings, limit=4, tasks=tasks)["seconds"]["cell"]
        print(f"  HFLM, batch {batch}: {tried[batch]:.1f} s", flush=True)
    batch = min(tried, key=tried.get)
    sides = {
        "bf16, HFLM": {"engine": "hf", "model": "bf16", "dtype": dtype, "batch": batch},
        "bf16, ours": {"engine": "shared_prefix", "model": "bf16", "dtype": dtype},
        "quantized, HFLM": {"engine": "hf", "model": "auto_round", "dtype": dtype, "batch": batch},
        "quantized, ours": {"engine": "shared_prefix", "model": "low", "dtype": dtype},
    }
    runs: dict[str, list] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, settings in sides.items():
            runs[side].append(in_a_process(**settings, limit=limit, tasks=tasks))
            print(f"  {side}: {runs[side][-1]['seconds']['cell']:.1f} s", flush=True)
    useful = [r["profile"]["utilisation"] for r in runs["bf16, ours"]]
    hellaswag = {
        side: [r["seconds"]["hellaswag"] for r in of_side] for side, of_side in runs.items()
    }
    totals = {side: [r["seconds"]["cell"] for r in of_side] for side, of_side in runs.items()}
    rounding = {side: [r["quantizing"] for r in of_side] for side, of_side in runs.items()}
    memory = {side: [r["peak_memory_bytes"] for r in of_side] for side, of_side in runs.items()}
    return {
        "limit": limit,
        "dtype": dtype,
        "peer_batch_size": batch,
        "peer_seconds_by_batch_size": tried,
        "ratios": {
            "BF16 cell, HFLM / ours": ratio(totals["bf16, HFLM"], totals["bf16, ours"]),
            "quantized cell, auto-round's model under HFLM / ours": ratio(
                totals["quantized, HFLM"], totals["quantized, ours"]
            ),
            "quantized cell / BF16 cell, ours": ratio(
                totals["quantized, ours"], totals["bf16, ours"]
            ),
            "hellaswag, HFLM / ours": ratio(hellaswag["bf16, HFLM"], hellaswag["bf16, ours"]),
            "quantizing, auto-round / ours": ratio(
                rounding["quantized, HFLM"], rounding["quantized, ours"]
            ),
            "peak memory, ours / HFLM": ratio(memory["bf16, ours"], memory["bf16, HFLM"]),
            "utilisation": {
                "median": statistics.median(useful),
                "spread": [min(useful), max(useful)],
            },
        },
        "equality": compare(runs["bf16, ours"][0]["answers"], runs["bf16, HFLM"][0]["answers"]),
        "seconds": {side: [r["seconds"] for r in of_side] for side, of_side in runs.items()},
        "quantizing_seconds": rounding,
        "peak_memory_bytes": memory,
        "tokens": runs["bf16, ours"][0]["tokens"],
    }


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


def growth() -> dict:
    """Seconds against documents, choices, length and layers, each varied alone, on random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mixprec.evaluate.shared_prefix import SharedPrefixLM
    from mixprec.models import checkpoint, load_tokenizer
    from mixprec.quantize import InMemory

    cfg = configuration()
    tokenizer = load_tokenizer(checkpoint(cfg.model, CACHE), cfg.model)

    def seconds(documents: int = 40, choices: int = 4, length: int = 100, layers: int = 6) -> dict:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1024, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                num_key_value_heads=3, num_hidden_layers=layers, max_position_embeddings=8192,
            )
        ).eval().bfloat16().float()  # fmt: skip
        InMemory(model)
        lm = SharedPrefixLM(pretrained=model, tokenizer=tokenizer)
        requests = []
        for d in range(documents):
            context = torch.randint(5, 1024, (length,)).tolist()
            for c in range(choices):
                choice = torch.randint(5, 1024, (10,)).tolist()
                requests.append(((f"{d}", f"{c}"), context, choice))
        best = float("inf")
        for _ in range(2):
            lm.tokens_run = 0
            start = time.perf_counter()
            lm._loglikelihood_tokens(requests, disable_tqdm=True)
            best = min(best, time.perf_counter() - start)
        return {"seconds": best, "tokens_run": lm.tokens_run, "work": lm.tokens_run * layers}

    varied = {
        "documents": [10, 20, 40, 80],
        "choices": [2, 4, 8, 16],
        "length": [50, 100, 200, 400, 800],
        "layers": [3, 6, 12, 24],
    }
    points = {
        what: [{what: value, **seconds(**{what: value})} for value in values]
        for what, values in varied.items()
    }
    fits = {}
    for what, of_what in points.items():
        per_work = [point["seconds"] / point["work"] for point in of_what]
        fits[f"{what}: seconds per token and layer, largest / smallest"] = {
            "median": max(per_work) / min(per_work),
            "spread": [1.0, max(per_work) / min(per_work)],
        }
    _draw(points)
    return {"points": points, "ratios": fits}


def _draw(points: dict[str, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(points), figsize=(12, 3), layout="constrained")
    for axis, (what, of_what) in zip(axes, points.items(), strict=True):
        work = [point["work"] / 1000 for point in of_what]
        axis.plot(work, [point["seconds"] for point in of_what], "o-")
        for point, x in zip(of_what, work, strict=True):
            axis.annotate(
                f"{point[what]}", (x, point["seconds"]), xytext=(4, -10), textcoords="offset points"
            )
        axis.set(title=f"more {what}", xlabel="1000 tokens run × layers", ylim=0, xlim=0)
    axes[0].set_ylabel("seconds")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / "growth.svg")


def blocks(layers: int) -> dict:
    """Memory that scoring a checkpoint block by block takes, at half the depth and the whole."""
    alone = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(
        1, **alone
    ) as pool:  # each in a process of its own, with its own memory
        half, whole = pool.map(_blocks, [layers // 2, layers])
    ratios = {
        f"{what} memory, {layers} blocks / bound": whole["peak"][what] / whole["bytes"]["bound"]
        for what in ("anonymous", "resident")
    }
    ratios[f"anonymous memory, {layers} / {layers // 2} blocks"] = (
        whole["peak"]["anonymous"] / half["peak"]["anonymous"]
    )
    return {
        "points": [half, whole],  # one run each
        "ratios": {key: {"median": x, "spread": [x, x]} for key, x in ratios.items()},
    }


def _blocks(layers: int) -> dict:
    """Peak bytes above the imported libraries', scoring a random Llama of so many blocks."""
    import torch
    from transformers import LlamaConfig

    from mixprec.allocate import fisher
    from mixprec.allocate.blocks import Blocks
    from mixprec.schemes import SCHEMES, Layer

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2560, intermediate_size=6912, num_attention_heads=20,
        num_key_value_heads=20, num_hidden_layers=layers, tie_word_embeddings=False,
    )  # fmt: skip
    tokens = torch.randint(5, config.vocab_size, (2, 64), generator=torch.manual_seed(0))
    schemes = [SCHEMES["mxfp4"], SCHEMES["mxfp8"]]
    memory = _Memory()
    with tempfile.TemporaryDirectory() as place:
        shapes = _write_random(config, Path(place))
        linears = [
            Layer(name.removesuffix(".weight"), *shape)
            for name, shape in shapes.items()
            if "_proj" in name
        ]
        start = time.perf_counter()
        with memory:
            checkpoint = Blocks(Path(place), torch.float32, torch.device("cpu"))
            scores = fisher.score(checkpoint, tokens, linears, schemes)
        seconds = time.perf_counter() - start
    if not (scores > 0).all():
        raise RuntimeError("a score is not positive")
    weights = sum(math.prod(shape) for shape in shapes.values())
    block = 2 * sum(layer.weights for layer in linears) // layers
    embedding = 2 * config.vocab_size * config.hidden_size
    boundaries = 4 * (layers + 1) * tokens.numel() * config.hidden_size
    return {
        "blocks": layers,
        "weights": weights,
        "tokens": list(tokens.shape),
        "options": [scheme.name for scheme in schemes],
        "seconds": seconds,
        "before": memory.before,
        "peak": {"anonymous": memory.anonymous, "resident": memory.resident},
        "bytes": {
            "checkpoint": 2 * weights,
            "block": block,
            "embedding": embedding,
            "boundaries": boundaries,
            # Two blocks and the embedding in bfloat16, boundaries in float32, 1 GB for the rest.
            "bound": 2 * block + embedding + boundaries + 10**9,
        },
    }


def _write_random(config, folder: Path) -> dict[str, tuple[int, ...]]:
    """A checkpoint of random bfloat16 weights, a file a block; returns the weights' shapes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    random = torch.manual_seed(0)
    for file, names in files.items():
        weights = {}
        for name in names:
            weight = torch.empty(shapes[name], dtype=torch.bfloat16)
            few = len(shapes[name]) == 1  # a norm
            weights[name] = weight.fill_(1) if few else weight.normal_(0, 0.02, generator=random)
        save_file(weights, folder / file, {"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    return shapes


class _Memory:
    """Peak memory in bytes above what there was when this was made, sampled every 5 ms by a thread.

    anonymous: what the process allocated; resident: with the pages of mapped files.
    """

    def __init__(self):
        gc.collect()
        self.before = dict(zip(("anonymous", "resident"), self._now(), strict=True))
        self.anonymous = self.resident = 0

    def __enter__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            anonymous, resident = self._now()
            self.anonymous = max(self.anonymous, anonymous - self.before["anonymous"])
            self.resident = max(self.resident, resident - self.before["resident"])

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = {
            key: value.split()[0]
            for key, _, value in (x.partition(":") for x in lines)
            if value.split()
        }
        return 1024 * int(kilobytes["RssAnon"]), 1024 * int(kilobytes["VmRSS"])


def signals(repeats: int) -> dict:
    """Rules of allocation: KL, seconds and memory of scoring, each in a process of its own."""

    def in_a_process(ask: list[str], budgets) -> dict:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "mixprec.bench", "signal", "--output", file.name]
            command += ["--ask", *ask, "--budgets", *map(str, budgets)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(ask)}: {done.stderr[-2000:]}")
            return json.loads(Path(file.name).read_text())

    result = bench_signals.compare(in_a_process, repeats, ratio)
    bench_signals.draw(result, OUTPUT / "signals.svg")
    return result


def stability() -> dict:
    """`fisher` over draws and sizes of the calibration text; goes on where it was stopped."""
    kept = CACHE / "bench" / "stability.json"
    done = json.loads(kept.read_text()) if kept.is_file() else []
    lines, weights = bench_stability.measure(CACHE, done, lambda lines: write_json(kept, lines))
    found = bench_stability.summary(lines, weights)
    bench_stability.draw(lines, found, OUTPUT / "stability.svg")
    kept.unlink()
    return {"ratios": {}, "summary": found, "lines": lines}


def compare(ours: dict[str, list], theirs: dict[str, list]) -> dict:
    """Largest relative difference of a log-likelihood, and greedy answers that differ, with margins."""
    largest, differ, count = 0.0, [], 0
    for task in theirs:
        for (mine, my_greedy), (other, other_greedy) in zip(ours[task], theirs[task], strict=True):
            count += 1
            largest = max(largest, abs(mine - other) / max(abs(other), 1e-9))
            if my_greedy != other_greedy:
                differ.append({"task": task, "ours": mine, "hflm": other})
    return {"requests": count, "largest_relative_difference": largest, "greedy_differs": differ}


def ratio(numerator: list[float], denominator: list[float]) -> dict:
    """Ratio of medians, and the least and greatest ratio of two single runs."""
    return {
        "median": statistics.median(numerator) / statistics.median(denominator),
        "spread": [min(numerator) / max(denominator), max(numerator) / min(denominator)],
    }


def report(name: str, result: dict) -> None:
    from mixprec import provenance

    write_json(OUTPUT / f"{name}.json", {**result, "provenance": provenance.collect()})
    for what, value in result["ratios"].items():
        low, high = value["spread"]
        print(f"{what}: {value['median']:.2f} ({low:.2f} to {high:.2f})")
    print(f"written: {OUTPUT}/{name}.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.bench", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    evaluating = commands.add_parser("evaluate", help="HFLM against the shared-prefix engine")
    evaluating.add_argument(
        "--limit", type=int, default=20, help="documents per task (default: 20)"
    )
    evaluating.add_argument("--repeats", type=int, default=3, help="default: 3")
    evaluating.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    whole = commands.add_parser("column", help="the auto_round and lm_eval command lines")
    whole.add_argument("--limit", type=int, default=50, help="documents per task (default: 50)")
    whole.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    commands.add_parser("growth", help="seconds against documents, choices, length, layers")
    by_block = commands.add_parser("blocks", help="memory of scoring a checkpoint block by block")
    by_block.add_argument("--layers", type=int, default=26, help="of 79 M weights (default: 26)")
    rules = commands.add_parser("signals", help="rules of allocation: KL, seconds, memory")
    rules.add_argument("--repeats", type=int, default=3, help="of what is timed (default: 3)")
    commands.add_parser("stability", help="fisher over draws and sizes of the calibration text")
    rule = commands.add_parser("signal", help="one rule (used by `signals`)")
    rule.add_argument("--ask", nargs="+", required=True)
    rule.add_argument("--budgets", nargs="*", type=float, default=[])
    rule.add_argument("--output", type=Path, required=True)
    one = commands.add_parser("measure", help="one measurement (used by the others)")
    one.add_argument("--engine", choices=["hf", "shared_prefix"], required=True)
    one.add_argument("--model", choices=["bf16", "low", "auto_round"], required=True)
    one.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    one.add_argument("--batch", type=int, default=16)
    one.add_argument("--limit", type=int, required=True)
    one.add_argument("--tasks", type=lambda text: text.split(","), default=list(FIVE_TASKS))
    one.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.command == "measure":
        chosen.output.write_text(json.dumps(measure(chosen)))
    elif chosen.command == "signal":
        chosen.output.write_text(json.dumps(bench_signals.measure(chosen, CACHE)))
    elif chosen.command == "signals":
        report("signals", signals(chosen.repeats))
    elif chosen.command == "stability":
        report("stability", stability())
    elif chosen.command == "growth":
        report("growth", growth())
    elif chosen.command == "blocks":
        report("blocks", blocks(chosen.layers))
    elif chosen.command == "column":
        report(f"column_{chosen.dtype}", column(chosen.limit, chosen.dtype))
    else:
        result = evaluate(chosen.limit, chosen.repeats, chosen.dtype)
        report(f"evaluate_{chosen.dtype}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
