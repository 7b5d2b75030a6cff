"""Differences between two cells that answered the same documents.

Two accuracies of the same documents go up and down together; the standard error of their difference
is that of the differences per document, and often much smaller than either's own. What that needs, who was right
where, is a bit a document: `correct.json` beside `result.json`, small enough to commit, made from
`samples.parquet` by `keep`.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mixprec.store import one_line, write_json


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error (None where one observation has none)."""

    value: float
    stderr: float | None

    @property
    def clear(self) -> bool:
        """Is it more than twice its standard error away from zero?"""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr


@dataclass(frozen=True)
class Answers:
    """Who was right where: per task, which documents (their hash) and a bool a document, in order."""

    documents: dict[str, str]
    correct: dict[str, np.ndarray]


def difference(one: Answers, other: Answers, ratio: float = 1.0) -> Estimate:
    """mean(one) − ratio × mean(other), the mean over tasks unweighted.

    Per task the standard error is sd(d)/√n of the documents' d = one − ratio × other, and tasks are
    independent: √(Σ se²)/T. Raises ValueError if the two did not answer the same documents.
    """
    if one.documents != other.documents:
        tasks = sorted(one.documents.keys() | other.documents.keys())
        differ = [t for t in tasks if one.documents.get(t) != other.documents.get(t)]
        raise ValueError(f"not paired: other documents of {', '.join(differ)}")
    values, errors = [], []
    for task, right in one.correct.items():
        d = right.astype(float) - ratio * other.correct[task]
        values.append(d.mean())
        errors.append(d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else None)
    return Estimate(
        float(np.mean(values)),
        None if None in errors else float(math.sqrt(sum(e * e for e in errors)) / len(errors)),
    )


def recovery(one: Answers, reference: Answers) -> Estimate:
    """mean(one) / mean(reference), its error by the delta method: that of one − ratio × reference."""
    whole = float(np.mean([right.mean() for right in reference.correct.values()]))
    if not whole:
        raise ValueError("no recovery: the reference has no right answer")
    ratio = float(np.mean([right.mean() for right in one.correct.values()])) / whole
    error = difference(one, reference, ratio).stderr
    return Estimate(ratio, None if error is None else error / whole)


def kl_difference(one: dict, other: dict) -> Estimate:
    """Difference of two results' KL in nats per token, paired by sequence of held-out text.

    Raises ValueError if either has no KL or it is of other text.
    """
    if not one["kl"] or not other["kl"]:
        raise ValueError("not paired: no KL")
    texts = [result.get("provenance", {}).get("heldout_text") for result in (one, other)]
    rows = [result["kl"].get("per_sequence", []) for result in (one, other)]
    if texts[0] != texts[1] or not rows[0] or len(rows[0]) != len(rows[1]):
        raise ValueError("not paired: KL of other text")
    d = np.subtract(*rows)
    error = float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None
    return Estimate(float(d.mean()), error)


def keep(root: Path) -> None:
    """Write `correct.json` for every stored cell below `root` whose samples are there."""
    for file in sorted(root.glob("*/*/*/*/samples.parquet")):
        try:
            result = json.loads((file.parent / "result.json").read_text(encoding="utf-8"))
            samples = pd.read_parquet(file, columns=["task", "correct"])
            kept = bits(result["hash"], samples)
            if _answers(kept, result) is None:
                raise ValueError("samples.parquet and result.json are not of one run")
        except FileNotFoundError:
            continue  # a cell that is being written: result.json comes last
        except (OSError, ValueError, KeyError) as error:
            print(f"{file.parent.relative_to(root)}: {one_line(error)}", file=sys.stderr)
            continue
        target = file.with_name("correct.json")
        if target.is_file() and "content_hash" in result:
            continue  # it was stored with the result, which has its hash
        if not target.is_file() or json.loads(target.read_text()) != kept:
            write_json(target, kept)


def bits(result_hash: str, samples: pd.DataFrame) -> dict:
    """correct.json: who was right where, a bit a document, and the hash of the cell it belongs to."""
    tasks = {
        str(task): {
            "n": len(rows),
            "correct": np.packbits(rows.correct.to_numpy(bool)).tobytes().hex(),
        }
        for task, rows in samples.groupby("task")
    }
    return {"hash": result_hash, "tasks": tasks}


def read(folder: Path, result: dict) -> Answers | None:
    """The answers kept beside `result`; None if there are none, or they are another result's."""
    try:
        text = (folder / "correct.json").read_bytes()
        stored = result.get("files", {}).get("correct.json")
        if stored not in (None, hashlib.sha256(text).hexdigest()):
            raise ValueError("it is not what was stored")
        answers = _answers(json.loads(text), result)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder}: correct.json cannot be read: {one_line(error)}", file=sys.stderr)
        return None
    if answers is None:
        print(f"{folder}: correct.json is of another result", file=sys.stderr)
    return answers


def unpacked(kept: dict) -> dict[str, np.ndarray]:
    """Task -> a bool a document, of what `bits` packed."""
    return {
        task: np.unpackbits(
            np.frombuffer(bytes.fromhex(row["correct"]), np.uint8), count=row["n"]
        ).astype(bool)
        for task, row in kept["tasks"].items()
    }


def _answers(kept: dict, result: dict) -> Answers | None:
    """What `kept` says, if it has the same documents and the same accuracies as `result`."""
    correct = unpacked(kept)
    metrics = {task: (metric["n"], metric["acc"]) for task, metric in result["metrics"].items()}
    same = kept["hash"] == result["hash"] and metrics.keys() == correct.keys()
    same = same and all(
        len(right) == metrics[task][0] and abs(right.mean() - metrics[task][1]) < 1e-9
        for task, right in correct.items()
    )
    return Answers(result["provenance"]["documents"], correct) if same else None
