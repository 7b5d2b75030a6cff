"""Between Hydra and the runner: check every cell of a sweep first, run each once, sum up at the end."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hydra.errors
import omegaconf.errors
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixprec import arguments, secrets
from mixprec.cell import Cell, Config, ConfigError, cell_of, typed
from mixprec.store import Outcome, Store

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parent.parent / "conf"

ConfigStore.instance().store(name="schema", node=Config)


@dataclass
class _Progress:
    """What this process has been asked for and what became of it, by cell hash."""

    cells: list[Cell] = field(default_factory=list)
    started: bool = False  # has the first of them been begun?
    outcomes: dict[str, Outcome] = field(default_factory=dict)


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
    arguments.check_size(overrides)
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [loader.load_sweep_config(config, list(job)) for job in jobs]


def _announce(configs: list[DictConfig]) -> None:
    arguments.check_hydra(configs[0].hydra)
    typed_configs = [typed(without_hydra(config)) for config in configs]
    cells = list({cell.hash: cell for cell in map(cell_of, typed_configs)}.values())
    first = typed_configs[0]
    # A job that another machine will run says nothing about this one's memory.
    here = "submitit" not in str(configs[0].hydra.launcher.get("_target_"))
    if first.plan:
        from mixprec import plan

        print(plan.text(cells, first, here=here))
        sys.exit(0)
    _check_machine(cells, first, here)
    _progress.cells = cells
    # Other launchers run cells elsewhere: from here on a fault may be one of a cell.
    _progress.started = "BasicLauncher" not in str(configs[0].hydra.launcher.get("_target_"))
    if first.experiment:
        Store(Path(first.results)).add_to_plan(first.experiment, cells)


def _check_machine(cells: list[Cell], cfg: Config, here: bool) -> None:
    """Exit with 2, a line a reason, if cells that are to be run cannot be run on this machine."""
    store = Store(Path(cfg.results))
    to_run = [cell for cell in cells if cfg.force or store.settled(cell) is None]
    if not to_run:
        return  # and neither torch nor the hub is asked
    from mixprec import plan

    sizes, machine = plan.sizes_of(to_run), plan.Machine.this()
    results = plan.results_here(store, machine)
    found = plan.problems(to_run, sizes, machine, results, Path(cfg.cache), here=here, strict=False)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if found:
        sys.exit(2)


def run_one(config: DictConfig) -> None:
    """Hydra's task: one cell. Never raises for a cell that fails, so that the sweep goes on."""
    cfg = typed(without_hydra(config))
    cell = cell_of(cfg)
    _progress.started = True
    if cell.hash in _progress.outcomes:
        return
    place = [other.hash for other in _progress.cells].index(cell.hash) + 1
    log.info("[%d/%d] %s", place, len(_progress.cells), cell)
    _progress.outcomes[cell.hash] = run_cell(cell, cfg)


def run_cell(cell: Cell, cfg: Config) -> Outcome:
    """Run `cell` unless it is stored."""
    settled = None if cfg.force else Store(Path(cfg.results)).settled(cell)
    if settled is not None:
        log.log(
            logging.ERROR if settled.failed else logging.INFO, "  %s", settled.message or "stored"
        )
        return settled
    from mixprec import runner  # and with it torch: seconds that a stored sweep need not wait for

    return runner.run(cell, cfg)


def main(task: Callable[[], None]) -> int:
    """Run Hydra's `task`; the exit code: 0, 1 if a cell failed, 2 if the configuration is wrong."""
    _refuse_or(arguments.check)
    _refuse_or(task)
    outcomes = list(_progress.outcomes.values())
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
