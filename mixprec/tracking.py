"""W&B: one run a cell. Whatever goes wrong here is a warning and costs no cell."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from mixprec.cell import Cell, Config, Tracking
from mixprec.store import one_line

log = logging.getLogger(__name__)


def log_cell(cell: Cell, result: dict, allocation: dict, cfg: Config) -> None:
    """One finished cell as one run; its id is made from the cell's hash, so it is the same again."""
    if cfg.tracking.mode == "off":
        return
    try:
        with _run(
            cfg.tracking,
            cfg.results,
            id=f"cell-{cell.hash[:16]}",
            name=cell.path,
            group=cfg.experiment or "no experiment",
            job_type=cell.baseline.name,
            tags=[cell.model.name, cell.options.name if cell.options else "bf16", cell.eval_folder],
            config=result["config"],
        ) as run:
            import wandb

            run.log(scalars(result))
            run.summary.update({f"provenance/{k}": v for k, v in result["provenance"].items()})
            artifact = wandb.Artifact(f"allocation-{cell.hash[:16]}", type="allocation")
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "allocation.json"
                file.write_text(json.dumps(allocation))
                artifact.add_file(str(file))
                run.log_artifact(artifact)
    except Exception as error:
        log.warning("  W&B: %s; the result is stored all the same", one_line(error))


def log_tables(tables: dict[str, object], tracking: Tracking, results: str) -> None:
    """The rendered tables (name -> pandas.DataFrame) as one run."""
    if tracking.mode == "off":
        return
    try:
        with _run(tracking, results, name="tables", job_type="tables") as run:
            import wandb

            for name, frame in tables.items():
                run.log({f"tables/{name}": wandb.Table(dataframe=frame.astype(str))})
    except Exception as error:
        log.warning("W&B: %s", one_line(error))


def scalars(result: dict) -> dict[str, float]:
    """What is plotted of a cell: accuracy per task and in the mean, KL, bits, seconds, memory."""
    values = {f"acc/{task}": metric["acc"] for task, metric in result["metrics"].items()}
    values |= {f"stderr/{task}": m["stderr"] for task, m in result["metrics"].items()}
    values |= {"acc/mean": result["mean"]["acc"], "stderr/mean": result["mean"]["stderr"]}
    if result["kl"]:
        values |= {f"kl/{k}": v for k, v in result["kl"].items() if k != "per_sequence"}
    values |= {
        "bits/budget": result["config"]["budget"],
        "bits/realised": result["realised_bits"],
        "bits/realised_with_scales": result["realised_bits_with_scales"],
    }
    values |= {f"seconds/{stage}": s for stage, s in result["seconds"].items()}
    values |= {f"peak_memory_bytes/{k}": v for k, v in result["peak_memory_bytes"].items()}
    return {key: value for key, value in values.items() if value is not None}


def _run(tracking: Tracking, results: str, **what):
    import wandb

    # Neither host, user, code nor installed packages: only what is handed over here is recorded.
    settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=30,
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        host="-",
    )
    Path(results).mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        mode=tracking.mode,
        dir=results,
        settings=settings,
        **what,
    )
