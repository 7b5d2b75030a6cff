"""Before a long run: what it consists of, what it needs, how long it takes, what stands in its way."""

from __future__ import annotations

import shutil
from pathlib import Path

from tabulate import tabulate

from mixprec import launch
from mixprec.cell import Cell, Config, Model
from mixprec.estimate import GB, Machine, Size, exported_bytes, memory, seconds, size_of
from mixprec.models import arithmetic, in_hub_cache, is_on_hub
from mixprec.store import Store

HUB_TIMEOUT = 5  # seconds

# --- what stands in the way -------------------------------------------------------------------


def problems(
    cells: list[Cell],
    sizes: dict[str, Size | None],
    machine: Machine,
    results: list[dict],
    cache: Path,
    *,
    here: bool = True,
    strict: bool = True,
) -> list[str]:
    """What would stop `cells`, a line each: hub, token, disk, memory. Loads and writes nothing.

    sizes: by model name. results: those of the same hardware. here: False if they run on other machines, whose memory is not known.
    strict: also what costs a model's own cells alone: a repository or revision that is not there.
    """
    found: list[str] = []
    space: dict[Path, float] = {}  # folder -> bytes that will be written there
    hub = _Hub()
    for name, model in _models(cells).items():
        size = sizes[name]
        own = [cell for cell in cells if cell.model.name == name]
        missing = is_on_hub(model) and in_hub_cache(model) is None
        if missing:
            found += [f"{name}: {line}" for line in hub.refusals(model, strict)]
        if size is None:
            continue
        if missing:
            _add(space, hub.cache(), size.download)
        if model.path == "packaged" and not (cache / "models").is_dir():
            _add(space, cache, 2 * size.parameters)
        if packed := max((exported_bytes(cell, size) for cell in own), default=0):
            _add(space, cache, packed)
        if here:
            found += [
                f"{name}: {line}" for line in _too_little_memory(model, own, size, machine, results)
            ]
    for folder, needed in space.items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            found.append(
                f"disk: {needed / GB:.1f} GB will be written in {folder}, {free / GB:.1f} GB are free"
            )
    return found


def _too_little_memory(
    model: Model, cells: list[Cell], size: Size, machine: Machine, results: list[dict]
) -> list[str]:
    gpus = machine.gpus if model.device_map else machine.gpus[:1]
    worst = _worst(cells, size, machine, results)
    have = {"CPU": machine.memory, "GPU": sum(gpus)}
    found = []
    for which, place in enumerate(have):
        stage = max(worst, key=lambda stage: worst[stage][which])
        need = worst[stage][which]
        if need > have[place]:
            may_help = [] if model.low_memory else ["model.low_memory=true"]
            if place == "GPU" and not model.device_map:
                may_help.append("model.device_map=auto (all GPUs)")
            if place == "CPU" and not machine.gpus and model.dtype == "auto":
                may_help.append("model.dtype=bfloat16")
            found.append(
                f"{stage} needs about {need / GB:.1f} GB of {place} memory, "
                f"{have[place] / GB:.1f} GB are there"
                + (f"; {' or '.join(may_help)} may help" if may_help else "")
            )
    return found


def _worst(
    cells: list[Cell], size: Size, machine: Machine, results: list[dict]
) -> dict[str, tuple[float, float]]:
    """Stage -> the most that any of `cells` needs, as of memory()."""
    worst: dict[str, tuple[float, float]] = {}
    for cell in cells:
        for stage, (cpu, gpu) in memory(cell, size, machine, results).items():
            before = worst.get(stage, (0, 0))
            worst[stage] = max(before[0], cpu), max(before[1], gpu)
    return worst


class _Hub:
    """The hub, asked once a model at most, and no more once it did not answer."""

    def __init__(self):
        self.down: str | None = None

    def cache(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def refusals(self, model: Model, strict: bool) -> list[str]:
        """Why `model` cannot be downloaded, a line each; see `problems`."""
        from huggingface_hub import HfApi, constants, errors, get_token

        api, found, not_there = HfApi(), [], []
        if model.gated and not get_token():
            found.append(
                f"{model.path} is gated on the hub and no token found; accept its licence there, "
                "then set HF_TOKEN or run `hf auth login`"
            )
        if constants.is_offline_mode():
            self.down = "HF_HUB_OFFLINE is set"
        try:
            if not self.down:
                api.model_info(model.path, revision=model.revision, timeout=HUB_TIMEOUT)
                if model.gated and get_token():
                    api.auth_check(model.path)
        except errors.GatedRepoError:
            if get_token():
                not_there.append(f"{model.path} is gated and the token has no access to it")
        except errors.RevisionNotFoundError:
            not_there.append(f"{model.path} has no revision {model.revision} on the hub")
        except errors.RepositoryNotFoundError:
            not_there.append(f"{model.path} is not on the hub, or the token does not show it")
        except Exception as error:  # whatever the transport raises
            self.down = f"the hub cannot be reached ({type(error).__name__})"
        if self.down:
            found.append(f"{model.path} is not in the hub's cache, and {self.down}")
        return found + not_there if strict else found


def _add(space: dict[Path, float], folder: Path, bytes_: float) -> None:
    folder = folder.expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    space[folder] = space.get(folder, 0) + bytes_


def _models(cells: list[Cell]) -> dict[str, Model]:
    return {str(cell.model.name): cell.model for cell in cells}


# --- the plan ---------------------------------------------------------------------------------


def sizes_of(cells: list[Cell]) -> dict[str, Size | None]:
    """Model name -> its size; None where the configuration is not known."""
    return {name: size_of(model) for name, model in _models(cells).items()}


def results_here(store: Store, machine: Machine) -> list[dict]:
    """The results of the same hardware: what there is to estimate from."""
    return [r for r in store.results() if r["provenance"]["hardware"] == machine.hardware]


def text(cells: list[Cell], cfg: Config, *, here: bool = True) -> str:
    """The plan of `cells` as plain text: cells, models, memory, problems, time."""
    store, sizes = Store(Path(cfg.results)), sizes_of(cells)
    machine = launch.share(Machine.this(), cfg.launch)
    results = results_here(store, machine)
    states = {cell.hash: store.state(cell) for cell in cells}
    to_run, times, found = [], {}, []
    for cell in cells:
        state, why = states[cell.hash]
        if state == "other" and not cfg.force:
            found.append(f"{cell}: another result is stored there: {why}; force=true reruns it")
        elif state != "stored" or cfg.force:
            size, dtype = sizes[str(cell.model.name)], arithmetic(cell.model, machine.device)
            times[cell.hash] = seconds(cell, size, results, to_run, dtype) if size else None
            to_run.append(cell)
    found += problems(to_run, sizes, machine, results, Path(cfg.cache), here=here)
    found = [f"problem: {line}" for line in found] or ["no problem found"]
    return "\n\n".join(
        (
            _cells_table(cells, states, times),
            _models_table(_models(cells), sizes),
            _memory_table(cells, to_run, sizes, machine, results, _whose(cfg)),
            "\n".join(found),
            _total(cells, list(times.values()), len(results))
            + ("" if cfg.launch.name == "local" else "; one after another"),
        )
    )


def _cells_table(cells: list[Cell], states: dict, times: dict[str, float | None]) -> str:
    rows = []
    for cell in cells:
        state, why = states[cell.hash]
        rows.append((cell, state, _duration(times[cell.hash]) if cell.hash in times else ""))
        if state in ("failed", "stale", "running") and why:
            rows.append((f"  {why[:90]}", "", ""))
    return _table(("cell", "state", "time"), rows)


def _models_table(models: dict[str, Model], sizes: dict[str, Size | None]) -> str:
    rows = []
    for name, model in models.items():
        size, path = sizes[name], model.path if len(model.path) <= 44 else "…" + model.path[-43:]
        if size is None:
            rows.append((name, path, "unknown", "unknown", "unknown"))
            continue
        download = f"{size.download / GB:.1f} GB" if size.download else "none"
        count = f"{size.parameters / GB:.2f} B", f"{size.quantized / GB:.2f} B"
        rows.append((name, path, *count, download))
    return _table(("model", "from", "parameters", "quantized", "download"), rows)


def _memory_table(
    cells: list[Cell],
    to_run: list[Cell],
    sizes: dict[str, Size | None],
    machine: Machine,
    results: list[dict],
    whose: str,
) -> str:
    rows = []
    settings_of = {str(cell.model.name): cell.settings["model"] for cell in cells}
    for name, size in sizes.items():
        own = [cell for cell in to_run if cell.model.name == name]
        settings = settings_of[name]
        peaks = [r["peak_memory_bytes"] for r in results if r["config"]["model"] == settings]
        for stage, (cpu, gpu) in (_worst(own, size, machine, results) if size else {}).items():
            rows.append((name, stage, _gigabytes(cpu), _gigabytes(gpu)))
        if peaks:
            most = [max(peak.get(place, 0) for peak in peaks) for place in ("cpu", "gpu")]
            rows.append((name, f"measured, {len(peaks)} cells", *map(_gigabytes, most)))
    gpus = " + ".join(map(_gigabytes, machine.gpus)) or "none"
    rows.append((whose, "", _gigabytes(machine.memory), gpus))
    return _table(("memory", "stage", "CPU, GB", "GPU, GB"), rows)


def _whose(cfg: Config) -> str:
    here = "this machine"
    return f"1/{launch.workers(cfg.launch)} of {here}" if cfg.launch.name == "joblib" else here


def _total(cells: list[Cell], times: list[float | None], results: int) -> str:
    line = f"{len(times)} of {len(cells)} cells to run"
    known = [time for time in times if time is not None]
    if known:
        line += f": about {_duration(sum(known))}, from {results} cells measured on this hardware"
    if len(known) < len(times):
        line += f"; {len(times) - len(known)} not yet measured"
    return line


def _table(headers: tuple[str, ...], rows: list[tuple]) -> str:
    return tabulate(rows, headers, "plain", disable_numparse=True)


def _gigabytes(count: float) -> str:
    return f"{count / GB:.1f}" if count else ""


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not yet measured"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
