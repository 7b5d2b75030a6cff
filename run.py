"""One cell: Hydra in, one result out. `python run.py --help` says what can be asked for."""

import mixprec.environment  # noqa: F401, I001 - first: it sets what libraries read when imported

import sys

import hydra
from omegaconf import DictConfig

from mixprec import sweep


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(cfg: DictConfig) -> None:
    sweep.run_one(cfg)


if __name__ == "__main__":
    sys.exit(sweep.main(run))
