"""Between Hydra and the runner: check every cell of a sweep first, run each once, sum up at the end."""

from __future__ import annotations

import difflib
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import hydra.errors
import omegaconf.errors
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixprec import arguments, launch, secrets, terminal
from mixprec.cell import Cell, Config, ConfigError, Launch, cell_of, typed
from mixprec.lock import Busy
from mixprec.store import PREEMPTED, Outcome, Preempted, Store
from mixprec.store import one_line as fault

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between two looks at cells that other processes compute
CONF = Path(__file__).resolve().parent.parent / "conf"

ConfigStore.instance().store(name="schema", node=Config)


@dataclass
class _Progress:
    """What this process has been asked for and what became of it, by cell hash."""

    cells: list[Cell] = field(default_factory=list)
    started: bool = False  # has the first of them been begun?
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    jobs: list[Cell] = field(default_factory=list)  # of each of Hydra's jobs, in its order
    cfg: Config | None = None  # of the first of them
    before: dict[str, str] = field(default_factory=dict)  # status.json, before cells were launched
    elsewhere: list[tuple[Cell, Config]] = field(default_factory=list)  # to come back to
    preempted: bool = False


_progress = _Progress()


class Sweep(Callback):
    """Hydra's callback: judges the whole sweep before its first cell runs."""

    def on_run_start(self, config: DictConfig, **_) -> None:
        _refuse_or(lambda: _announce([config]))

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        _refuse_or(lambda: _announce(_composed(config)))


def _composed(config: DictConfig) -> list[DictConfig]:
    """The configuration of every job of a sweep, as Hydra's own sweeper will compose them."""
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(
        arguments.overrides_of(config.hydra)
    )
    if any(o.key_or_group == "experiment" and o.is_sweep_override() for o in overrides):
        raise ConfigError("experiment: one at a time: it is a sweep by itself; accepted: one name")
    if any(o.key_or_group.split(".")[0] == "launch" and o.is_sweep_override() for o in overrides):
        raise ConfigError("launch: a sweep has one launcher; accepted: one value a key")
    arguments.check_size(overrides)
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [loader.load_sweep_config(config, list(job)) for job in jobs]


def _announce(configs: list[DictConfig]) -> None:
    arguments.check_hydra(configs[0].hydra)
    typed_configs = [typed(without_hydra(config)) for config in configs]
    first = typed_configs[0]
    launch.check(first.launch, configs[0].hydra.runtime.choices.launch)
    here = launch.is_here(first.launch)
    jobs = [cell_of(cfg, here=here) for cfg in typed_configs]
    cells = list({cell.hash: cell for cell in jobs}.values())
    if first.plan:
        from mixprec import plan

        print(plan.text(cells, first, here=here))
        sys.exit(0)
    launch.check_program(first.launch)
    _check_machine(cells, first, here)
    _progress.cells, _progress.jobs, _progress.cfg = cells, jobs, first
    # Other launchers run cells elsewhere: from here on a fault may be one of a cell.
    _progress.started = first.launch.name != "local"
    if first.experiment:
        try:
            Store(Path(first.results)).add_to_plan(first.experiment, cells)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(
                f"error: plan of {first.experiment} in {first.results}: {fault(error)}",
                file=sys.stderr,
            )
            sys.exit(1)
    if first.launch.name == "local":  # elsewhere a cell's process has its own lines
        terminal.start(cells, first)


def _check_machine(cells: list[Cell], cfg: Config, here: bool) -> None:
    """Exit with 2, a line a reason, if cells that are to be run cannot be run on this machine."""
    store = Store(Path(cfg.results))
    to_run = [cell for cell in cells if cfg.force or store.settled(cell) is None]
    if not to_run:
        return  # and neither torch nor the hub is asked
    from mixprec import plan

    sizes, machine = plan.sizes_of(to_run), launch.share(plan.Machine.this(), cfg.launch)
    results = plan.results_here(store, machine)
    found = plan.problems(to_run, sizes, machine, results, Path(cfg.cache), here=here, strict=False)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if found:
        sys.exit(2)


def run_one(config: DictConfig) -> None:
    """Hydra's task: one cell. Never raises for a cell that fails, so that the sweep goes on."""
    cfg = typed(without_hydra(config))
    cell = cell_of(cfg, here=False)  # the sweep was judged where it was started
    _progress.started = True
    if cfg.launch.name == "joblib":
        hydra_config = HydraConfig.get()
        logging_as = OmegaConf.to_container(hydra_config.job_logging, resolve=True)
        launch.in_child(cell, cfg, logging_as, hydra_config.verbose)
        return
    if cfg.launch.name == "slurm":
        run_far(cell, cfg)
        return
    if cell.hash in _progress.outcomes:
        return
    place = [other.hash for other in _progress.cells].index(cell.hash) + 1
    terminal.begin(cell)
    log.info("[%d/%d] %s", place, len(_progress.cells), cell, extra=terminal.SHOWN)
    outcome = run_cell(cell, cfg)
    terminal.end(outcome)
    if outcome.state == "elsewhere":
        log.info("  %s; back to it at the end", outcome.message)
        # Whoever has it may be asked by `force` too: once is enough.
        _progress.elsewhere.append((cell, replace(cfg, force=False)))
    else:
        _progress.outcomes[cell.hash] = outcome


def come_back() -> None:
    """Wait for the cells that other processes compute; run those that these left undone."""
    while _progress.elsewhere:
        waiting = []
        for cell, cfg in _progress.elsewhere:
            outcome = run_cell(cell, cfg, again=True)
            if outcome.state == "elsewhere":
                waiting.append((cell, cfg))
            else:
                _progress.outcomes[cell.hash] = outcome
                terminal.end(outcome)
        if waiting and len(waiting) == len(_progress.elsewhere):
            time.sleep(POLL)
        _progress.elsewhere = waiting


def run_cell(cell: Cell, cfg: Config, *, again: bool = False) -> Outcome:
    """Run `cell` unless it is stored, or another process computes it. again: it was asked for before."""
    store = Store(Path(cfg.results))
    settled = None if cfg.force else store.settled(cell)
    try:
        if settled is None:
            with _until_preempted(), store.claim(cell):
                settled = None if cfg.force else store.settled(cell)  # by whoever had it before
                if settled is None:
                    if again:
                        terminal.begin(cell)
                        log.info("back to %s", cell, extra=terminal.SHOWN)
                    # And with it torch: seconds that a stored sweep need not wait for.
                    from mixprec import runner

                    return runner.run(cell, cfg)
        elif not settled.failed:
            store.tidy(cell)
    except Busy as busy:
        return Outcome(cell, "elsewhere", str(busy))
    except OSError as error:  # of the lock; the runner returns its own
        settled = Outcome(cell, "failed", fault(error))
    if settled.failed:
        log.error("  %s", settled.message)
    else:
        log.info("  stored", extra=terminal.SHOWN)
    return settled


@contextmanager
def _until_preempted():
    """SIGTERM raises Preempted here, if nobody else (a launcher of jobs) has a use for it."""

    def stop(*_):
        _progress.preempted = True
        raise Preempted

    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if mine:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if mine and _progress.preempted:  # raised where it could not get out, as in a destructor
        raise Preempted


# --- cells that other processes run -----------------------------------------------------------


def left_to_run() -> dict[int, Cell]:
    """Number of Hydra's job -> its cell, for cells that are to be run, each once; notes the others."""
    cfg, left = _progress.cfg, {}
    for number, cell in enumerate(_progress.jobs):
        if cell.hash in _progress.outcomes or cell in left.values():
            continue
        if (settled := None if cfg.force else store().settled(cell)) is not None:
            _progress.outcomes[cell.hash] = settled
        else:
            left[number] = cell
            _progress.before[cell.hash] = _status(cell)
    return left


def run_far(cell: Cell, cfg: Config) -> None:
    """Run `cell` far from the terminal: what even the runner does not catch is noted in its folder."""
    try:
        while run_cell(cell, cfg).state == "elsewhere":
            time.sleep(POLL)
            cfg = replace(cfg, force=False)  # once is enough, whoever did it
    except Exception as error:
        log.error("failed: %s", fault(error))
        Store(Path(cfg.results)).fail(cell, fault(error))


def read_outcomes(left: dict[int, Cell]) -> None:
    """What became of launched cells, as their processes wrote it."""
    cfg = _progress.cfg
    for cell in left.values():
        text = _status(cell)
        status = json.loads(text or "{}")
        if text == _progress.before[cell.hash]:
            if not cfg.force and (settled := store().settled(cell)) is not None:
                _progress.outcomes[cell.hash] = settled  # another sweep had it
                continue
            state, why = "failed", "it was not begun; see the log of its process"
        elif status["state"] == "done":
            state, why = "done", ""
        else:
            state, why = "failed", status.get("error") or f"{status['state']}; its process is gone"
        _progress.outcomes[cell.hash] = Outcome(cell, state, why)


def store() -> Store:
    return Store(Path(_progress.cfg.results))


def typed_launch() -> Launch:
    return _progress.cfg.launch


def _status(cell: Cell) -> str:
    file = store().folder(cell) / "status.json"
    return file.read_text() if file.is_file() else ""


def main(task: Callable[[], None]) -> int:
    """Run Hydra's `task`; the exit code: 0, 1 if a cell failed, 2 if the configuration is wrong.

    PREEMPTED if SIGTERM came: started again, the same command goes on where this one was.
    """
    try:
        with _until_preempted():
            try:
                _refuse_or(arguments.check)
                _refuse_or(task)
                come_back()
            finally:
                live = terminal.stop()
            return _sum_up(live)
    except Preempted:
        done = sum(outcome.state == "done" for outcome in _progress.outcomes.values())
        print(f"preempted: {done} cells run; the same command goes on from here", file=sys.stderr)
        return PREEMPTED


def _sum_up(live: bool) -> int:
    """Print what became of the cells; the exit code. live: their lines were, and are gone."""
    outcomes = list(_progress.outcomes.values())
    if (live or len(outcomes) > 1) and (
        table := terminal.table(outcomes, Path(_progress.cfg.results))
    ):
        print(table)
    failed = [outcome for outcome in outcomes if outcome.failed]
    if len(outcomes) > 1 or failed:
        count = {state: sum(o.state == state for o in outcomes) for state in ("done", "stored")}
        print(f"{count['done']} cells run, {count['stored']} were stored, {len(failed)} failed")
    for outcome in failed:
        print(f"failed: {outcome.cell}: {outcome.message}", file=sys.stderr)
    return 1 if failed else 0


def configuration(*overrides: str) -> Config:
    """The typed configuration that `python run.py OVERRIDES` would have."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(without_hydra(compose("config", list(overrides))))


def without_hydra(config: DictConfig) -> DictConfig:
    """The configuration as the typed one, without Hydra's own node, interpolations resolved."""
    copy = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(copy, resolve=True))


def _refuse_or(act: Callable[[], None]) -> None:
    """Do it; if the configuration is wrong, say so in one line and exit with 2.

    Hydra raises much on what it did not expect, such as `eval=null` or YAML that cannot be read.
    """
    try:
        act()
    except Exception as error:
        wrong = isinstance(error, (ConfigError, HydraException, OmegaConfBaseException))
        if not wrong and _progress.started:
            raise  # the configuration was found good: this is a fault of the program
        log.debug("", exc_info=True)  # shown with hydra.verbose=true
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error: BaseException) -> str:
    """What is wrong with a configuration and what would be accepted, in one line."""
    text = secrets.message(_what_is_wrong(error).split("See https://hydra.cc")[0])
    return text or f"Hydra does not take this configuration ({type(error).__name__})"


def _what_is_wrong(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep; accepted: lists of values, and groups of keys"
    cause = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if isinstance(error, hydra.errors.MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        return f"{group}={name}: accepted: {', '.join(sorted(error.options))}"
    if isinstance(
        cause, (omegaconf.errors.ConfigAttributeError, omegaconf.errors.ConfigKeyError)
    ) and isinstance(cause.parent_node, DictConfig):
        keys = sorted(str(key) for key in cause.parent_node)
        guess = difflib.get_close_matches(str(cause.key), keys, n=1)
        hint = f" did you mean {guess[0]}?" if guess else ""
        return f"{cause.full_key}: unknown key;{hint} accepted: {', '.join(keys)}"
    if isinstance(cause, OmegaConfBaseException) and getattr(cause, "full_key", None):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return str(error)
