"""lm-eval's own tasks, and which of their documents a cell is evaluated on."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixprec import data
from mixprec.cell import FIVE_TASKS, ConfigError, Eval

# The folders of lm-eval's task definitions that hold the five; reading all of them takes seconds.
_FOLDERS = ("lambada", "hellaswag", "piqa", "winogrande", "mmlu/default")


@dataclass(frozen=True)
class Tasks:
    """specs:     what lm-eval loads the tasks from
    leaves:    task -> names of lm-eval's tasks below it (mmlu: one a subject; others: itself)
    documents: lm-eval's task name -> ids of the documents to evaluate; None: all
    loaded:    what lm-eval made of `specs`; tasks hold the chosen documents alone where they can
    samples:   for `lm_eval.evaluate` with `loaded`: `documents` of the tasks that hold others too
    """

    manager: object
    specs: list[dict]
    leaves: dict[str, list[str]]
    documents: dict[str, list[int]] | None
    loaded: dict
    samples: dict[str, list[int]]

    def doc_id(self, leaf: str, doc_id: int) -> int:
        """The id of a document among all of lm-eval's task `leaf`; doc_id: what `lm_eval.evaluate` says."""
        held = self.documents is not None and leaf not in self.samples
        return self.documents[leaf][doc_id] if held else doc_id


def tasks_of(evaluation: Eval, cache: Path) -> Tasks:
    """lm-eval's definitions with the evaluation's data source, and its choice of documents."""
    return _tasks(
        tuple(evaluation.tasks), evaluation.source, evaluation.limit, evaluation.seed, cache
    )


@functools.lru_cache(maxsize=4)
def _tasks(names: tuple[str, ...], source: str, limit: int | None, seed: int, cache: Path) -> Tasks:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / folder for folder in _FOLDERS] if set(names) <= set(FIVE_TASKS) else None
    manager = lm_eval.tasks.TaskManager(include_defaults=folders is None, include_path=folders)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise ConfigError(
            f"eval.tasks={unknown[0]}: accepted: the tasks that `lm_eval --tasks list` names"
        )
    leaves = {name: _leaves(manager, name) for name in names}
    # Inside a group lm-eval merges what is given here into its own definition of the task.
    members = [
        {"task": leaf, **data.task_overrides(name, source, cache)}
        for name, below in leaves.items()
        for leaf in below
    ]
    specs = [{"group": "mixprec", "task": members}]
    loaded = manager.load(specs)
    for task in loaded["tasks"].values():  # as lm_eval.simple_evaluate does by default
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    documents = None
    if limit is not None:
        documents = {}
        for below in leaves.values():
            sizes = {leaf: len(loaded["tasks"][leaf].eval_docs) for leaf in below}
            for leaf, count in shares(limit, sizes).items():
                documents[leaf] = spread(sizes[leaf], count, seed, leaf)
    samples = {
        leaf: chosen
        for leaf, chosen in (documents or {}).items()
        if not _hold_only(loaded["tasks"][leaf], chosen)
    }
    return Tasks(manager, specs, leaves, documents, loaded, samples)


def _hold_only(task, chosen: list[int]) -> bool:
    """Leave `task` with these of its documents; False if it may need others, and then it has all.

    lm-eval decodes every document of a task, twice a cell, to pick these: seconds for thirty thousand.
    """
    documents = task.eval_docs
    if task.get_config("num_fewshot") or not hasattr(documents, "select"):
        return False
    split = task.get_config("test_split") or task.get_config("validation_split")
    task.dataset[split] = documents.select(chosen)
    task.set_config("process_docs", None)  # they are processed
    return True


def _leaves(manager, name: str) -> list[str]:
    """The tasks that lm-eval's group, tag or task `name` stands for (mmlu: its 57 subjects)."""
    if name in manager.all_subtasks:
        return [name]
    entry = manager.task_index[name]
    below = entry.tags if name in manager.all_tags else entry.cfg["task"]
    return sorted(leaf for part in below for leaf in _leaves(manager, part))


def shares(limit: int, sizes: dict[str, int]) -> dict[str, int]:
    """How many of `limit` documents each part gets: in proportion to its size, but not too few.

    The least is a fiftieth of `limit` (1 of mmlu's subjects at 50, 5 at 250), so that no subject is
    left to a single document. The sum can then exceed `limit`; where no part falls below the least
    it is `limit` (largest remainders), and where there are fewer documents, all of them.
    """
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    least = max(1, limit // 50)
    exact = {part: limit * size / total for part, size in sizes.items()}
    counts = {part: min(sizes[part], max(least, int(share))) for part, share in exact.items()}
    by_remainder = sorted(exact, key=lambda part: (int(exact[part]) - exact[part], part))
    for part in by_remainder:
        if sum(counts.values()) >= limit:
            break
        if exact[part] >= least:  # those below were raised to it already
            counts[part] += 1
    return counts


def spread(size: int, count: int, seed: int, name: str) -> list[int]:
    """`count` of `size` document ids, sorted: a random choice that depends on `seed` and `name` alone.

    A smaller count of the same task chooses a subset of a larger one.
    """
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(size)
    return sorted(order[:count].tolist())
