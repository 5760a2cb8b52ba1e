"""MLflow, where MLFLOW_TRACKING_URI says: a server, a database or a folder.

The experiment is lorakit, or what MLFLOW_EXPERIMENT_NAME says. Metrics keep the names that
transformers gives them there: loss, eval_loss.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from lorakit.training.trackers.tracker import TrackedRun, identity, keep_identity

_PARAMS = 100  # that MLflow takes at a time
_LONGEST = 500  # characters of a param


class MLflow:
    """Logs to an MLflow run that is called as output_dir is."""

    client: Any
    run_id: str

    def start(self, run: TrackedRun) -> None:
        """Begin a run with the settings as its params, or go on with the one that is resumed."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        known = identity(run, "mlflow")
        if known is not None:
            self.run_id = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lorakit")
        experiment = self.client.get_experiment_by_name(name)
        place = self.client.create_experiment(name) if experiment is None else None
        number = place if experiment is None else experiment.experiment_id
        self.run_id = self.client.create_run(number, run_name=run.output_dir.name).info.run_id
        keep_identity(run, "mlflow", self.run_id)
        params = [Param(name, str(value)[:_LONGEST]) for name, value in run.settings.items()]
        for start in range(0, len(params), _PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + _PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def end(self) -> None:
        """End the run."""
        self.client.set_terminated(self.run_id)
