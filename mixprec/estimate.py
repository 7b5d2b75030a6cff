"""What a cell will need and take: sizes from the configuration, memory by formula, time by measurement.

No weights are loaded. A model's size comes from its configuration on the meta device, memory from
formulas over that size, time from stored results of the same hardware, in proportion to the work.
docs/plan.md says how near these come to what is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixprec import provenance
from mixprec.allocate import drops_reference, loads_a_copy
from mixprec.allocate.backward import LOGITS_AT_ONCE, TOKENS_AT_ONCE
from mixprec.architecture import config_of
from mixprec.cell import Cell, Model
from mixprec.experts import separate
from mixprec.models import arithmetic, in_hub_cache, is_on_hub, quantized_layers

GB = 1e9
# Documents of the five tasks (mmlu: its test split), and the tokens of one that are run when every
# distinct prefix is run once: 300 documents each, SmolLM2's tokenizer. Only ratios are used, of
# tokens to be run to tokens that were, so another tokenizer does not matter much.
DOCUMENTS = {
    "lambada_openai": 5153,
    "hellaswag": 10042,
    "piqa": 1838,
    "winogrande": 1267,
    "mmlu": 14042,
}
TOKENS = {"lambada_openai": 77, "hellaswag": 164, "piqa": 44, "winogrande": 25, "mmlu": 106}

# --- sizes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """parameters: all of them, tied ones once; quantized: the weights that options are for;
    blocks: decoder blocks; download: bytes that are still to come from the hub."""

    parameters: int
    quantized: int
    blocks: int
    hidden: int
    intermediate: int
    vocabulary: int
    download: int


def size_of(model: Model) -> Size | None:
    """From the configuration alone; None if it is unknown or of no architecture of transformers'."""
    skeleton = skeleton_of(model)
    if skeleton is None:
        return None
    config, known = config_of(model.path, model.revision), skeleton.config
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    there = not is_on_hub(model) or in_hub_cache(model) is not None
    width = {"float32": 4}.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    return Size(
        parameters,
        sum(layer.weights for layer in quantized_layers(skeleton)),
        known.num_hidden_layers,
        known.hidden_size,
        known.intermediate_size,
        known.vocab_size,
        0 if there else parameters * width,
    )


def skeleton_of(model: Model) -> torch.nn.Module | None:
    """The model without weights, on the meta device; None as of size_of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = AutoConfig.for_model(**config_of(model.path, model.revision))
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16)
        separate(skeleton)
    except (TypeError, KeyError, ValueError):  # ConfigError too: experts that are no linears
        return None
    return skeleton


# --- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """memory, gpus: bytes in all, of this machine (or its container) and of each GPU."""

    memory: int
    gpus: tuple[int, ...]
    hardware: dict

    @classmethod
    def this(cls) -> Machine:
        hardware = provenance.hardware()
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        limit = Path("/sys/fs/cgroup/memory.max")
        text = limit.read_text().strip() if limit.is_file() else "max"
        memory = min(hardware["memory_bytes"], math.inf if text == "max" else int(text))
        return cls(memory, tuple(gpu.total_memory for gpu in gpus), hardware)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpus else "cpu")


def memory(
    cell: Cell, size: Size, machine: Machine, results: list[dict]
) -> dict[str, tuple[float, float]]:
    """Stage -> peak bytes (CPU, all GPUs together) that `cell` will need.

    results: those of the same hardware; what they have scored is not scored again.
    A lower limit in that only tensors are counted, with two constants fitted to SmolLM2-135M's
    measured peaks: the libraries themselves, and the bytes that one logit of AutoScheme's takes.
    """
    libraries = 0.6 * GB
    model, on_gpu = cell.model, bool(machine.gpus)
    exports = cell.exports
    width = arithmetic(model, machine.device).itemsize
    reference = width * size.parameters
    checkpoint = 2 * size.parameters  # bfloat16
    # InMemory keeps what it rounded, in bfloat16 on the CPU, until the model is dropped.
    kept = 2 * size.quantized if cell.options and not exports else 0
    if not on_gpu and width == 4 and cell.eval.engine == "shared_prefix":
        # Packed linears keep their own, rounded or not; a tied head is packed apart from embeddings.
        kept = 2 * size.quantized + 4 * size.vocabulary * size.hidden
    cpu, gpu = libraries + kept + (0 if on_gpu else reference), reference if on_gpu else 0

    def on_device(held: float, work: float) -> tuple[float, float]:
        return (held, gpu + work) if on_gpu else (held + work, 0)

    # To the device straight from the file, a shard (5 GB) at a time, or by way of the CPU.
    shard = min(checkpoint, 5 * GB)
    whole = on_gpu and model.device_map is None
    load = libraries + (checkpoint if whole else shard) + (0 if on_gpu else reference)
    need = {"load": (load, gpu)}
    apart = (libraries, 0) if model.low_memory else (cpu, gpu)
    if cell.calibration is not None and loads_a_copy(cell.baseline):
        calibration = cell.calibration
        batch = min(8, calibration.samples) * calibration.tokens  # AutoScheme's own batch size
        work = 28 * batch * size.vocabulary  # logits, their loss and gradients
        work += 16 * size.quantized / size.blocks  # one block, rounded, with gradients in float32
        work += 2 * size.blocks * calibration.samples * calibration.tokens * size.hidden
        if on_gpu:  # embeddings and head are moved there
            work += 2 * (size.parameters - size.quantized)
        held = apart[0] + checkpoint
        if _scored(cell, [result["config"] for result in results]):
            need["read scores"] = (held, apart[1])
        else:
            need["score"] = (held, apart[1] + work) if on_gpu else (held + work, 0)
    elif cell.calibration is not None:  # scored by a forward and a backward pass
        calibration = cell.calibration
        tokens = min(TOKENS_AT_ONCE, calibration.samples * calibration.tokens)
        graph = width * tokens * (16 * size.hidden + 6 * size.intermediate)  # of one block
        logits, head = 12 * LOGITS_AT_ONCE * size.vocabulary, width * size.vocabulary * size.hidden
        if drops_reference(cell.baseline, model):  # by one block at a time
            between = width * calibration.samples * calibration.tokens * size.hidden
            held = libraries + (size.blocks + 1) * between  # each block's inputs, on the CPU
            work = max(width * size.quantized / size.blocks + graph, head + logits)
            need["score"] = (held, work) if on_gpu else (held + work, 0)
        else:
            between = width * tokens * size.blocks * size.hidden
            need["score"] = on_device(cpu, between + graph + logits + head)
    if exports:
        packed = exported_bytes(cell, size)
        block = 16 * size.quantized / size.blocks
        held = apart[0] + checkpoint + packed
        need["export"] = (held, apart[1] + block) if on_gpu else (held + block, 0)
        # What is read back comes beside the reference, unless that was dropped.
        cpu, gpu = (apart[0], apart[1] + packed) if on_gpu else (apart[0] + packed, 0)
    if cell.eval.kl.sequences:
        need["kl"] = on_device(cpu, cell.eval.kl.tokens * size.vocabulary * (2 * width + 8))
    # A batch of 512 tokens (shared_prefix.py); a fifth of them go through the output head.
    copies = 8 if cell.options else 3  # of the widest activations: rounding them takes several
    work = 512 * 4 * copies * (4 * size.hidden + 2 * size.intermediate)
    need["evaluate"] = on_device(cpu, work + 0.2 * 512 * size.vocabulary * (width + 8))
    return need


def exported_bytes(cell: Cell, size: Size) -> float:
    """What the checkpoint of a weight-only cell takes at most, on disk and read back; 0 for others."""
    if not cell.exports:
        return 0
    bits = max(s.bits + (s.scale_bits and 32) / s.group_size for s in cell.schemes)
    return 2 * (size.parameters - size.quantized) + size.quantized * bits / 8


# --- time -------------------------------------------------------------------------------------


def documents(task: str, limit: int | None) -> float:
    """About how many documents of `task` a limit means; infinitely many of a task that is not known.

    tasks.shares raises mmlu's small subjects to a fiftieth of the limit: 1.36 times the limit in all.
    """
    there = DOCUMENTS.get(task, math.inf)
    if limit is None:
        return there
    return min(there, max(57, 1.36 * limit) if task == "mmlu" else limit)


def seconds(
    cell: Cell, size: Size, results: list[dict], before: list[Cell], dtype: torch.dtype
) -> float | None:
    """Seconds that `cell` will take; None if something like one of its stages was never measured.

    results: those of the same hardware. before: the cells that run first; what they load, compute or
    score is there for this one. Starting Python (5 s) is not in it.
    """
    settings, exports = cell.settings, cell.exports
    copies = loads_a_copy(cell.baseline)
    counts = {task: documents(task, cell.eval.limit) for task in cell.eval.tasks}
    if math.inf in counts.values():
        return None
    alike = [
        result
        for result in results
        if result["provenance"]["arithmetic"] == str(dtype).removeprefix("torch.")
        and result["config"]["eval"]["engine"] == cell.eval.engine
    ]
    same_kind = [result for result in alike if ("exported_bytes" in result["notes"]) == exports]
    read = [result for result in alike if result["seconds"]["load"] > _FROM_MEMORY]
    done = [result["config"] for result in results] + [other.settings for other in before]

    def time(stage: str, among: list[dict], amount: Callable = _work) -> float | None:
        """At the rate of the most similar results: same model and options, same model, any."""
        asked = amount(stage, settings, size.quantized, counts)
        found = [
            (result, work)
            for result in among
            if stage in result["seconds"]
            and (work := amount(stage, result["config"], _weights(result), _counts(result)))
        ]
        for keys in (("model", "options"), ("model",), ()):
            similar = [x for x in found if all(x[0]["config"][k] == settings[k] for k in keys)]
            if similar:  # of these, those whose work is nearest
                distances = [round(abs(math.log(asked / work)), 2) for _, work in similar]
                return asked * statistics.median(
                    result["seconds"][stage] / work
                    for (result, work), distance in zip(similar, distances, strict=True)
                    if distance == min(distances)
                )
        return None

    stages = [time("evaluate", same_kind)]
    loading = time("load", read)
    if not any(other.model == cell.model for other in before):
        stages.append(loading)
    if cell.options:
        stages.append(time("quantize", [r for r in same_kind if r["config"]["options"]]))
    if cell.eval.kl.sequences:
        stages.append(time("kl", same_kind))
        if not _any_with(done, settings, [("model",), ("eval", "kl"), ("eval", "seed")]):
            computed = [r for r in alike if r["seconds"].get("reference", 0) > _FROM_MEMORY]
            stages.append(time("reference", computed))
    if cell.calibration is not None:
        rule = cell.baseline.rule
        by_rule = [r for r in alike if r["config"]["baseline"]["rule"] == rule]
        stored = ("autoscheme_scores_stored", "scores_stored")
        again = [r for r in by_rule if any(r["notes"].get(key) for key in stored)]
        if _scored(cell, done):  # reads the scores, and the weights where the rule has its own
            known = time("allocate", again, lambda stage, config, weights, counts: weights)
            stages.append(known if known is not None else loading if copies else 0)
        else:
            stages.append(time("allocate", [r for r in by_rule if r not in again]))
        if drops_reference(cell.baseline, cell.model) and not exports:
            stages.append(loading)  # the reference, once more
    return None if None in stages else sum(stages)


_FROM_MEMORY = 0.2  # seconds; a stage below it found what it wanted in memory or in the cache


def _work(stage: str, config: dict, weights: int, counts: dict[str, float]) -> float:
    """What the time of `stage` is in proportion to: weights, times the tokens they are used on."""
    if stage in ("kl", "reference"):
        return weights * config["eval"]["kl"]["sequences"] * config["eval"]["kl"]["tokens"]
    if stage == "evaluate":
        return weights * sum(TOKENS.get(task, 100) * n for task, n in counts.items())
    if stage == "allocate":
        calibration = config["calibration"]
        tokens = calibration["samples"] * calibration["tokens"]
        return weights * tokens * len(config["options"]["schemes"])
    return weights


def _weights(result: dict) -> int:
    return result["quantized"]["weights"]


def _counts(result: dict) -> dict[str, int]:
    return {task: metric["n"] for task, metric in result["metrics"].items()}


def _scored(cell: Cell, done: list[dict]) -> bool:
    """True if a cell in `done` needed the same scores; they are taken to be in the cache still."""
    keys = [("model",), ("options",), ("calibration",), ("baseline", "rule")]
    return _any_with(done, cell.settings, keys)


def _any_with(done: list[dict], settings: dict, keys: list[tuple[str, ...]]) -> bool:
    """True if one of the cells in `done` has the same values as `settings` at all `keys`."""

    def at(config: dict, key: tuple[str, ...]):
        for part in key:
            config = config[part]
        return config

    return any(all(at(config, key) == at(settings, key) for key in keys) for config in done)
