"""What Hydra is given, judged before Hydra acts on it: arguments, files, callbacks, launchers, sweeps."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import hydra._internal.hydra
import yaml
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mixprec.cell import ConfigError, check_folder, one_of

# Hydra's and OmegaConf's parsers take seconds for a list of so many values; conf/ has 4 KB at most.
LONGEST_ARGUMENT = 8192  # characters
LARGEST_FILE = 65_536  # bytes; of all arguments together, characters
MOST_JOBS = 10_000  # of a sweep, which is judged whole before it is begun


def check() -> None:
    """ConfigError for arguments that Hydra does not know, or that would unpickle a file."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise ConfigError(f"{message}; accepted: KEY=VALUE, and what --hydra-help lists")

    parser.error = refuse
    for argument in sys.argv[1:]:
        if len(argument) > LONGEST_ARGUMENT:
            shown = argument.partition("=")[0][:60]
            refuse(f"{shown}: {len(argument)} characters, at most {LONGEST_ARGUMENT} are read")
    if (together := sum(map(len, sys.argv[1:]))) > LARGEST_FILE:
        refuse(f"arguments of {together} characters, at most {LARGEST_FILE} are read")
    arguments = parser.parse_args()
    if arguments.experimental_rerun is not None:
        refuse("--experimental-rerun reads a pickle")
    for folder in filter(None, (arguments.config_dir, arguments.config_path)):
        for file in sorted([*Path(folder).glob("*.yaml"), *Path(folder).glob("*/*.yaml")]):
            _check_file(file)


def _check_file(file: Path) -> None:
    """ConfigError for YAML that would take minutes to read: see LARGEST_FILE."""
    accepted = f"accepted: up to {LARGEST_FILE} bytes, and as many with its aliases written out"
    if (size := file.stat().st_size) > LARGEST_FILE:
        raise ConfigError(f"{file}: {size} bytes; {accepted}")
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text in UTF-8; accepted: YAML") from error
    if b"&" not in content or b"*" not in content:
        return
    sizes: dict[int, float] = {}

    def values(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # while it is not known: an alias within its own anchor
            below = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = isinstance(node, yaml.MappingNode)
            sizes[id(node)] = 1 + sum(sum(map(values, x)) if pairs else values(x) for x in below)
        return sizes[id(node)]

    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return  # Hydra says where
    if root is not None and values(root) > LARGEST_FILE:
        raise ConfigError(f"{file}: aliases within aliases; {accepted}")


def check_hydra(hydra_config: DictConfig) -> None:
    """ConfigError for what only a model's own file may say, and for what Hydra cannot start."""
    which = "sweep" if hydra_config.mode == RunMode.MULTIRUN else "run"
    check_folder(f"hydra.{which}.dir", str(hydra_config[which].dir))
    for text in overrides_of(hydra_config):
        if text.lstrip("+~").startswith(("model.trust_remote_code", "model.reason")):
            raise ConfigError(
                f"{text}: accepted in the model's own file alone, conf/model/*.yaml, with a reason"
            )
    for group, choice in hydra_config.runtime.choices.items():
        if choice is not None and not str(choice).replace("_", "").isalnum():
            raise ConfigError(f"{group}={choice}: accepted: the name of a file in conf/{group}")
    plugins = Plugins.instance().class_name_to_class
    known = {
        "launcher": sorted(name for name, one in plugins.items() if issubclass(one, Launcher)),
        "sweeper": [f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"],
    }
    for key, accepted in known.items():
        one_of(f"hydra.{key}._target_", str(hydra_config[key].get("_target_")), accepted)
    if (size := hydra_config.sweeper.max_batch_size) is not None and size < 1:
        raise ConfigError(f"hydra.sweeper.max_batch_size={size}: accepted: null, or 1 or more")


def overrides_of(hydra_config: DictConfig) -> list[str]:
    """What an experiment's sweep and the command line set, as text; the latter wins."""
    # Not resolved: an interpolation in them is one of the cell's own configuration.
    parameters = OmegaConf.to_container(hydra_config.sweeper.get("params") or OmegaConf.create())
    task = OmegaConf.to_container(hydra_config.overrides.task)
    return [f"{key}={value}" for key, value in parameters.items()] + task


def check_size(overrides: Iterable[Override]) -> None:
    """ConfigError for a sweep of no jobs, or of more than can be judged before the first one."""
    count = math.prod(map(_values, overrides))
    if not 0 < count <= MOST_JOBS:
        raise ConfigError(f"a sweep of {count:g} jobs; accepted: 1 to {MOST_JOBS}")


def _values(override: Override) -> float:
    """How many values a sweep gives one key, without making a list of them."""
    value = override.value()
    if not isinstance(value, RangeSweep):
        return sum(1 for _ in override.sweep_iterator()) if override.is_sweep_override() else 1
    if not value.step:
        return math.inf
    return max(0, math.ceil((value.stop - value.start) / value.step))


class _Callbacks(Callbacks):
    """Hydra's own, which would call whatever a configuration names before any of it is judged."""

    def __init__(self, config: DictConfig | None = None):
        named = dict((config and config.hydra.callbacks) or {})
        targets = {key: str(one and one.get("_target_")) for key, one in named.items()}
        foreign = [key for key, one in targets.items() if not one.startswith("mixprec.")]
        if foreign or (config is not None and "mixprec.sweep.Sweep" not in targets.values()):
            key = foreign[0] if foreign else "sweep"
            raise ConfigError(
                f"hydra.callbacks.{key}._target_={targets.get(key)}: accepted: those of "
                "conf/config.yaml"
            )
        super().__init__(config)


hydra._internal.hydra.Callbacks = _Callbacks
