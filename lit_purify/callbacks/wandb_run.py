"""The Weights & Biases run of a run folder, and settings and costs of a training in it."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import lightning as L
import wandb
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from lit_purify.atomic import write_whole
from lit_purify.data.base import Batch
from lit_purify.errors import InputError
from lit_purify.evaluation.estimate import peak_memory
from lit_purify.evaluation.folder import RunFolder
from lit_purify.private import stage_artifacts
from lit_purify.recorded import SHA256, path_sha256
from lit_purify.training.export import Export


class WandbRun(WandbLogger):
    """Logs to one W&B run per run folder; an interrupted run resumes in the same W&B run.

    Server problems never stop an evaluation. If the server is unreachable or refuses the key, the run is logged
    offline. If uploads take longer than ``patience`` seconds after the end, the rest stays in the folder, and a line
    shows the command to upload it.

    Args:
        project: The W&B project; a sweep uses its own.
        mode: ``offline`` needs no account, ``online`` uploads while it runs, ``disabled`` does nothing.
        entity: User or team; ``None`` uses the account's default.
        name: Name of the W&B run; ``None`` uses the name of the run folder.
        group: Group of related runs.
        tags: Tags of the run, 1 to 64 characters each.
        id: Id of the W&B run; ``None`` makes one and stores it in ``wandb/run_id`` in the folder.
        patience: Maximum time for uploads after the end, in seconds.
        save_dir: The run folder.

    Attributes:
        run: The W&B run on rank 0, after its start.
    """

    def __init__(
        self,
        project: str = "lit_purify",
        mode: Literal["offline", "online", "disabled"] = "offline",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        id: str | None = None,
        patience: float = 300.0,
        save_dir: str = ".",
    ) -> None:
        if patience <= 0:
            raise InputError(f"patience = {patience}: use a number of seconds above 0")
        if long := [tag for tag in tags if not 0 < len(tag) <= 64]:
            raise InputError(f"tags: W&B takes 1 to 64 characters, not {long[0]!r}: rename it")
        self.folder, self.patience = Path(save_dir), patience
        try:
            self.settings = wandb.Settings(
                mode=mode,
                project=project,
                run_id=id,
                run_name=name or self.folder.resolve().name,
                finish_timeout=patience,
                finish_timeout_raises=True,
                silent=True,
            )
        except (ValueError, wandb.Error) as error:
            raise InputError(
                f"trainer.logger: W&B refuses these settings, change them: {' '.join(str(error).split())}"
            ) from error
        super().__init__(
            project=project, save_dir=save_dir, entity=entity, group=group, tags=[*tags], settings=self.settings
        )
        self.run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        """The W&B run; on other ranks than 0, a dummy object."""
        if self.run is not None:
            return self.run
        if self.settings.mode != "disabled":
            self.folder.mkdir(parents=True, exist_ok=True)
            stage_artifacts(self.folder)
            # In a sweep, the sweep sets the id.
            self.settings.run_id = self.settings.run_id or wandb.setup().settings.run_id or self._kept_id()
        try:
            self.run = super().experiment
        except (wandb.Error, TimeoutError) as error:
            if self.settings.mode != "online":
                raise
            _warn(f"{wandb.setup().settings.base_url}: {error}; the run is logged offline")
            # The failed client may still hold the id.
            wandb.teardown()
            self.settings.mode = "offline"
            self.run = super().experiment
        if self.settings.mode == "online":
            print(f"W&B: {self.run.url}")
        return self.run

    def log_media(self, values: Mapping[str, Any]) -> None:
        """Logs tables and pictures; prints a line if W&B fails, which needs the server for tables."""
        try:
            self.experiment.log(dict(values))
        # The client raises many kinds of connection and disk errors.
        except Exception as error:
            names = ", ".join(key for key in values if "/" not in key)
            _warn(f"{names} not logged ({error}); the run's folder holds the same figures")

    def finalize(self, status: str) -> None:
        """Ends the W&B run, and prints how to upload the rest."""
        super().finalize(status)
        # None on other ranks.
        run, self.run = self.run, None
        if run is None:
            return
        try:
            run.finish(exit_code=0 if status == "success" else 1)
        except TimeoutError:
            part, resume = Path(run.dir).parent, "WANDB_RESUME=allow " * run.resumed
            reason = f"the uploads were not done {self.patience:g} s after the end"
            _warn(f"{reason}; upload what is missing with: {resume}wandb sync --include-online {part}")
        if self.settings.mode == "offline":
            # An interrupted run has several parts; without the variable, the second part overwrites the first.
            print(f"W&B: offline run, upload it with: WANDB_RESUME=allow wandb sync {self.folder / 'wandb'}")

    def _kept_id(self) -> str:
        path = self.folder / "wandb" / "run_id"
        if not path.exists():
            write_whole(path, secrets.token_hex(4))
        return path.read_text().strip()


class WandbTraining(Callback):
    """Logs settings, speed, memory, and hashes of exported networks on rank 0."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the settings, and starts the clock."""
        if logger := wandb_run(trainer):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            facts = {"parameters": sum(p.numel() for p in pl_module.parameters()), "classes": list(data.classes)}
            log_settings(logger, RunFolder(Path(trainer.default_root_dir)), facts)
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: object, batch: Batch, _: int
    ) -> None:
        """Logs samples per second of all processes, and peak memory, whenever metrics are logged."""
        self.samples += len(batch["index"]) * trainer.world_size
        if trainer.global_step >= self.logged + trainer.log_every_n_steps:  # type: ignore[attr-defined]
            if logger := wandb_run(trainer):
                costs = {"images_per_second": self.samples / (perf_counter() - self.since)}
                costs["peak_memory_gib"] = peak_memory(task.device) / 2**30
                # Like Lightning, which counts steps from 0.
                logger.log_metrics({f"cost/{k}": v for k, v in costs.items()}, step=trainer.global_step - 1)
            self._restart(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restarts the clock, so that the time of validation does not count."""
        self._restart(trainer)

    def _restart(self, trainer: L.Trainer) -> None:
        self.samples, self.logged, self.since = 0, trainer.global_step, perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the hashes of the exported networks."""
        if logger := wandb_run(trainer):
            folder = RunFolder(Path(trainer.default_root_dir))
            exports = [callback for callback in trainer.callbacks if isinstance(callback, Export)]  # type: ignore[attr-defined]
            networks = [export.path or folder.path / "model.safetensors" for export in exports]
            hashes = {path.name: path_sha256(path) for path in networks if path.exists()}
            logger.experiment.config.update({"exported_sha256": hashes}, allow_val_change=True)


def wandb_run(trainer: L.Trainer) -> WandbRun | None:
    """The trainer's WandbRun on rank 0, if there is one."""
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbRun)), None)


def log_settings(logger: WandbRun, folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Logs settings, hashes of the identity and facts as the config of the W&B run."""
    settings = yaml.safe_load(folder.config.read_text())
    identity = json.loads(folder.identity.read_text()) if folder.identity.exists() else {}
    hashes = {key: value for key, value in identity.items() if key.endswith(SHA256)}
    logger.experiment.config.update({**settings, "sha256": hashes, **facts}, allow_val_change=True)


def _warn(text: str) -> None:
    print("W&B: " + " ".join(text.split()), file=sys.stderr)
