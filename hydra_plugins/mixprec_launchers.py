"""Hydra's launchers for joblib and SLURM, with what a sweep of cells needs of them.

Only cells that are to be run are launched, each once; a job that dies costs no other; what became of the
cells is read from results/. Hydra takes launchers from the package hydra_plugins alone. It imports
this file whenever it starts, so everything heavy is imported late.
"""

import mixprec.environment  # noqa: F401, I001 - first: a job of SLURM begins here

import contextlib
import io
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher


class Joblib(JoblibLauncher):
    """launch=joblib"""

    def launch(self, job_overrides, initial_job_idx):
        from mixprec import launch, sweep
        from mixprec.store import one_line

        left = sweep.left_to_run()
        if left:
            self.joblib |= {"n_jobs": launch.workers(sweep.typed_launch()), "batch_size": 1}
            try:
                returns = super().launch([job_overrides[index] for index in left], initial_job_idx)
                for cell, job in zip(left.values(), returns, strict=True):
                    if job.status is JobStatus.FAILED:  # before it came to its cell
                        sweep.store().fail(cell, one_line(job._return_value))
            except BrokenProcessPool as error:  # a worker, which is small, and not its child
                print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sweep.read_outcomes(left)
        return []


class Slurm(SlurmLauncher):
    """launch=slurm"""

    def __call__(self, *arguments, **keywords):
        from mixprec import launch

        with launch.requeued_if_preempted():
            return super().__call__(*arguments, **keywords)

    def launch(self, job_overrides, initial_job_idx):
        from mixprec import launch, sweep

        left = sweep.left_to_run()
        if left:
            jobs = self._submit([job_overrides[index] for index in left], list(left))
            array, logs = jobs[0].job_id.split("_")[0], jobs[0].paths.folder.parent
            print(f"SLURM job {array}: {len(jobs)} cells; logs: {logs}/{array}_*/*.out", flush=True)
            try:
                launch.wait(jobs, list(left.values()), sweep.store())
            except KeyboardInterrupt:
                print("The jobs go on (scancel ends them). The same command takes up what is left.")
                sys.exit(130)
        sweep.read_outcomes(left)
        return []

    def _submit(self, job_overrides, numbers):
        """As Hydra's own launcher does it, but for what is noted here."""
        import submitit

        from mixprec import launch
        from mixprec.cell import ConfigError

        parameters = {key: value for key, value in self.params.items() if value is not None}
        folder, timeouts = parameters.pop("submitit_folder"), parameters.pop("max_num_timeout")
        if not parameters.get("gpus_per_node"):
            parameters.pop("gpus_per_node", None)  # SLURM takes 0 for a request
        cpus = parameters["cpus_per_task"]
        parameters["setup"] = [*launch.job_setup(cpus), *parameters.get("setup", [])]
        parameters["srun_args"] = [f"--cpus-per-task={cpus}"]  # since 22.05 not the job's by itself
        more = parameters.pop("additional_parameters", {})
        parameters["additional_parameters"] = {"requeue": True, **more}
        known = BaseQueueConf.__dataclass_fields__
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(
            **{key if key in known else f"slurm_{key}": value for key, value in parameters.items()}
        )
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        state = Singleton.get_state()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints it too
                return executor.map_array(
                    self,
                    [list(overrides) for overrides in job_overrides],
                    ["hydra.sweep.dir"] * len(numbers),
                    numbers,
                    [f"job_id_for_{number}" for number in numbers],
                    [state] * len(numbers),
                )
        except submitit.core.utils.FailedJobError as error:
            raise ConfigError(f"launch=slurm: {' '.join(str(error).split())}") from error
