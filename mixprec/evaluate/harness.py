"""Accuracy by lm-eval: its tasks, its requests, its metrics; one row a document kept for pairing."""

from __future__ import annotations

import functools
import hashlib
import math
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from mixprec import partial, terminal
from mixprec.cell import Cell
from mixprec.evaluate import vllm
from mixprec.evaluate.so_far import SoFar
from mixprec.evaluate.tasks import tasks_of
from mixprec.partial import Partial


def accuracy(
    model: torch.nn.Module | Path, tokenizer, cell: Cell, cache: Path, kept: Partial | None = None
) -> tuple[dict[str, dict], pd.DataFrame, dict[str, int]]:
    """Plain `acc` of every task, and a row a document. model: with engine=vllm, its folder.

    kept: where log-likelihoods are kept as they are finished, so that a later call goes on after them.

    Returns (metrics, samples, tokens): metrics maps a task to acc, stderr and n; samples has the columns
    task, leaf (lm-eval's name: mmlu's subject), doc_id, doc_hash, loglikelihoods (one a choice,
    natural log), target (index of the right choice; 0 for lambada), correct; tokens says how many
    were asked for, run, run as padding, and put through the output head (empty with another engine or where it had to be used).

    Raises FloatingPointError if a log-likelihood is not finite.
    """
    import lm_eval

    tasks = tasks_of(cell.eval, cache)
    lm = language_model(model, tokenizer, cell)
    if hasattr(lm, "kept"):
        lm.kept = kept  # SharedPrefixLM: batch by batch
    else:
        plain = lm._loglikelihood_tokens
        lm._loglikelihood_tokens = lambda requests, **how: partial.by_chunks(
            lambda some: plain(some, **how), requests, kept
        )
    lm.set_cache_hook(SoFar(tasks, terminal.so_far))
    with _no_bar_for_prompts():
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=tasks.loaded,
            samples=tasks.samples or None,
            bootstrap_iters=0,  # standard errors are taken from the samples below
            log_samples=True,
        )
    rows = []
    for name, leaves in tasks.leaves.items():
        for leaf in leaves:
            for sample in results["samples"][leaf]:
                doc_id = tasks.doc_id(leaf, int(sample["doc_id"]))
                rows.append(_row(name, leaf, doc_id, sample))
    samples = pd.DataFrame(rows).sort_values(["task", "leaf", "doc_id"], ignore_index=True)
    metrics = {name: summary(samples[samples.task == name]) for name in tasks.leaves}
    counted = {key: getattr(lm, f"tokens_{key}", 0) for key in ("asked", "run", "padded", "rows")}
    return metrics, samples, counted if counted["run"] else {}


@contextmanager
def _no_bar_for_prompts():
    """lm-eval shows a bar for each of sixty tasks while it writes their prompts: milliseconds each."""
    from lm_eval.api import task

    shown, task.tqdm = task.tqdm, functools.partial(task.tqdm, disable=True)
    try:
        yield
    finally:
        task.tqdm = shown


def language_model(model: torch.nn.Module | Path, tokenizer, cell: Cell):
    """The engine around `model`, log-likelihoods accumulated in float32, BOS as configured."""
    if cell.eval.engine == "vllm":
        dtype = "bfloat16" if cell.model.dtype == "auto" else cell.model.dtype
        lm = vllm.language_model(model, cell.model, dtype)
    else:
        lm = _around(model, tokenizer, cell)
    begins_with_bos = lm.tok_encode("The")[0] == tokenizer.bos_token_id
    if begins_with_bos != cell.model.bos:
        raise RuntimeError(
            f"model.bos={cell.model.bos}, but lm-eval's text "
            f"{'begins' if begins_with_bos else 'does not begin'} with the BOS token"
        )
    return lm


def _around(model: torch.nn.Module, tokenizer, cell: Cell):
    from lm_eval.models.huggingface import HFLM

    from mixprec.evaluate.shared_prefix import SharedPrefixLM

    return {"hf": HFLM, "shared_prefix": SharedPrefixLM}[cell.eval.engine](
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=cell.eval.batch_size,
        softmax_dtype="float32",
        add_bos_token=cell.model.bos,
    )


def summary(samples: pd.DataFrame) -> dict:
    """acc, its standard error and n over documents; mmlu's subjects are pooled (micro-average)."""
    n = len(samples)
    acc = float(samples.correct.mean())
    # lm-eval's own formula (api/metrics.py, mean_stderr): sample standard deviation over sqrt(n).
    stderr = math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else None
    return {"acc": acc, "stderr": stderr, "n": n}


def mean(metrics: dict[str, dict]) -> dict:
    """The unweighted mean over tasks, and its standard error (tasks are independent samples)."""
    errors = [metric["stderr"] for metric in metrics.values()]
    known = all(error is not None for error in errors)
    return {
        "acc": sum(metric["acc"] for metric in metrics.values()) / len(metrics),
        "stderr": math.sqrt(sum(e * e for e in errors)) / len(errors) if known else None,
        "n": sum(metric["n"] for metric in metrics.values()),
    }


def documents_hash(samples: pd.DataFrame) -> dict[str, str]:
    """sha256 per task over which documents were evaluated and what was in them."""
    return {
        str(task): hashlib.sha256(
            "\n".join(
                f"{leaf}:{doc}:{digest}"
                for leaf, doc, digest in zip(rows.leaf, rows.doc_id, rows.doc_hash, strict=True)
            ).encode()
        ).hexdigest()
        for task, rows in samples.groupby("task")
    }


def _row(task: str, leaf: str, doc_id: int, sample: dict) -> dict:
    loglikelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    if not all(map(math.isfinite, loglikelihoods)):
        raise FloatingPointError(
            f"{leaf}, document {doc_id}: log-likelihoods {loglikelihoods} are not finite"
        )
    target = sample["target"]
    return {
        "task": task,
        "leaf": leaf,
        "doc_id": doc_id,
        "doc_hash": sample["doc_hash"],
        "loglikelihoods": loglikelihoods,
        "target": target if isinstance(target, int) else 0,
        "correct": bool(sample["acc"]),
    }
