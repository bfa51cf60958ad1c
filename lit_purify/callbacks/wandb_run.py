"""The run of Weights & Biases that belongs to a run's folder."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import wandb
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import write_whole
from lit_purify.private import stage_artifacts
from lit_purify.recorded import SHA256


class WandbRun(WandbLogger):
    """Logs to one W&B run for each run folder: an interrupted run goes on in it.

    A server never ends an evaluation. If it cannot be reached or refuses the key, the run is logged offline. Uploads
    that take longer than ``patience`` seconds after the end stay in the folder, and the command that uploads them is
    printed.

    Args:
        project: The W&B project; in a sweep it is the sweep's.
        mode: ``offline`` needs no account, ``online`` uploads while it runs, ``disabled`` does nothing.
        entity: User or team; ``None`` is the account's default.
        name: Of the run; ``None`` is the name of the run's folder.
        group: Of runs that belong together.
        tags: To find the run by.
        id: Of the W&B run; ``None`` makes one, and keeps it in ``wandb/run_id`` in the folder.
        patience: Seconds that uploads may take after the end.
        save_dir: The run's folder.

    Attributes:
        run: The W&B run, once it has begun; on rank zero alone.
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
            raise InputError(f"patience = {patience} must be positive (seconds)")
        if long := [tag for tag in tags if not 0 < len(tag) <= 64]:
            raise InputError(f"tags: W&B takes 1 to 64 characters, not {long[0]!r}")
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
            raise InputError(f"trainer.logger: W&B refuses these settings: {' '.join(str(error).split())}") from error
        super().__init__(
            project=project, save_dir=save_dir, entity=entity, group=group, tags=[*tags], settings=self.settings
        )
        self.run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        """The W&B run; on other ranks than zero an object that does nothing."""
        if self.run is not None:
            return self.run
        if self.settings.mode != "disabled":
            self.folder.mkdir(parents=True, exist_ok=True)
            stage_artifacts(self.folder)
            # A sweep gives the id, and takes no other.
            self.settings.run_id = self.settings.run_id or wandb.setup().settings.run_id or self._kept_id()
        try:
            self.run = super().experiment
        except (wandb.Error, TimeoutError) as error:
            if self.settings.mode != "online":
                raise
            _say(f"{wandb.setup().settings.base_url}: {error}; the run is logged offline")
            # The client that failed may hold the id.
            wandb.teardown()
            self.settings.mode = "offline"
            self.run = super().experiment
        if self.settings.mode == "online":
            print(f"W&B: {self.run.url}")
        return self.run

    def log_media(self, values: Mapping[str, Any]) -> None:
        """Logs tables and pictures. The client asks the server about each table, and fails without an answer."""
        try:
            self.experiment.log(dict(values))
        # The client raises what its connection, or the disk, raises.
        except Exception as error:
            names = ", ".join(key for key in values if "/" not in key)
            _say(f"{names} not logged ({error}); the run's folder holds the same figures")

    def finalize(self, status: str) -> None:
        """Ends the W&B run, and says how to upload the rest."""
        super().finalize(status)
        # Other ranks have none.
        run, self.run = self.run, None
        if run is None:
            return
        try:
            run.finish(exit_code=0 if status == "success" else 1)
        except TimeoutError:
            part, resume = Path(run.dir).parent, "WANDB_RESUME=allow " * run.resumed
            reason = f"the uploads were not done {self.patience:g} s after the end"
            _say(f"{reason}; upload what is missing with: {resume}wandb sync --include-online {part}")
        if self.settings.mode == "offline":
            # An interrupted run has left several parts: with the variable the second does not overwrite the first.
            print(f"W&B: offline run, upload it with: WANDB_RESUME=allow wandb sync {self.folder / 'wandb'}")

    def _kept_id(self) -> str:
        path = self.folder / "wandb" / "run_id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, secrets.token_hex(4))
        return path.read_text().strip()


def wandb_run(trainer: L.Trainer) -> WandbRun | None:
    """The run on rank zero, if there is one."""
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbRun)), None)


def log_settings(logger: WandbRun, folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Makes the run's settings, the hashes that its records depend on, and facts the config of the W&B run."""
    settings = yaml.safe_load(folder.config.read_text())
    identity = json.loads(folder.identity.read_text()) if folder.identity.exists() else {}
    hashes = {key: value for key, value in identity.items() if key.endswith(SHA256)}
    logger.experiment.config.update({**settings, "sha256": hashes, **facts}, allow_val_change=True)


def _say(text: str) -> None:
    print("W&B: " + " ".join(text.split()), file=sys.stderr)
