"""Accuracy while an evaluation runs: over the documents all of whose requests are answered."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from mixprec.evaluate.tasks import Tasks

REPORT_SECONDS = 0.5


class SoFar:
    """lm-eval's cache hook, which every engine calls with each answer; it caches nothing.

    A document counts by its task's own metric once its last choice is answered. Engines begin with the
    longest requests, so these documents are no random sample of all: the number moves as others come in.
    """

    def __init__(self, tasks: Tasks, report: Callable[[dict[str, tuple[int, int]]], None]):
        """report: is given task -> (documents, how many of them right), now and then."""
        self._tasks, self._report = tasks, report
        self._waiting: dict[tuple, list] | None = (
            None  # a request's texts -> documents that need it
        )
        self._counts: dict[str, tuple[int, int]] = {}
        self._reported = 0.0

    def add_partial(self, _: str, request: tuple, answer: tuple[float, bool]) -> None:
        if self._waiting is None:  # now that lm-eval has made the requests
            self._waiting = self._documents()
        complete = False
        for document, place in self._waiting.pop(tuple(request), ()):
            document["answers"][place] = answer
            if None not in document["answers"]:
                self._count(document)
                complete = True
        if complete and time.monotonic() - self._reported > REPORT_SECONDS:
            self._reported = time.monotonic()
            self._report(dict(self._counts))

    def _documents(self) -> dict[tuple, list]:
        waiting = defaultdict(list)
        for name, leaves in self._tasks.leaves.items():
            for leaf in leaves:
                task, documents = self._tasks.loaded["tasks"][leaf], {}
                for instance in task.instances:
                    document = documents.setdefault(
                        instance.doc_id,
                        {"name": name, "task": task, "doc": instance.doc, "answers": []},
                    )
                    waiting[tuple(instance.args)].append((document, len(document["answers"])))
                    document["answers"].append(None)
        return waiting

    def _count(self, document: dict) -> None:
        metrics = document["task"].process_results(document["doc"], document["answers"])
        if "acc" in metrics:
            n, correct = self._counts.get(document["name"], (0, 0))
            self._counts[document["name"]] = n + 1, correct + int(metrics["acc"])
