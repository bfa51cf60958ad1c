"""The run of Weights & Biases that belongs to a run's folder."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import wandb
import yaml
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import write_whole
from lit_purify.recorded import SHA256

_REFUSED = re.compile(r'"level":"ERROR[^"]*","msg":"((?:filestream|file transfer|runfiles|runupserter): .*?)["\\]')
"""Uploads that a server has refused, in the log of wandb, which tells of them in no other way."""


class WandbRun(WandbLogger):
    """Logs to one W&B run for each run folder: what was interrupted goes on in it.

    No server can cost an evaluation: where it cannot be reached or refuses the key, the run is logged offline, or goes
    on so; what is not uploaded ``patience`` seconds after the end stays in the folder; and either is said, with the
    command that uploads it.

    Args:
        project: The W&B project; in a sweep it is the sweep's.
        mode: ``offline`` needs no account, ``online`` uploads while it runs, ``disabled`` does nothing.
        entity: User or team; ``None`` is the account's default.
        name: Of the run; ``None`` is the name of the run's folder.
        group: Of runs that belong together.
        tags: To find the run by.
        id: Of the W&B run; ``None`` makes one, and keeps it in ``wandb/run_id`` in the folder.
        artifacts: Also upload what a run leaves, as W&B artifacts: an evaluation's folder, a training's checkpoints and
            network.
        patience: Seconds that uploads may take after the end.
        save_dir: The run's folder.

    Attributes:
        held: Nothing is begun yet, not even where Lightning asks for it: what is refused until then leaves nothing.
    """

    held = False

    def __init__(
        self,
        project: str = "lit_purify",
        mode: Literal["offline", "online", "disabled"] = "offline",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        id: str | None = None,
        artifacts: bool = False,
        patience: float = 300.0,
        save_dir: str = ".",
    ) -> None:
        if patience <= 0:
            raise InputError(f"patience = {patience} must be positive (seconds)")
        super().__init__(
            project=project, offline=mode != "online", name=name, save_dir=save_dir, id=id, group=group, tags=[*tags]
        )
        self.mode, self.entity, self.artifacts, self.patience = mode, entity, artifacts, patience

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        """The W&B run; on other processes than rank zero, and while it is held, an object that does nothing."""
        if self.held:
            return _DummyExperiment()
        if self._experiment is None:
            Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)
            self._experiment = self._begin()
        return self._experiment

    def finalize(self, status: str) -> None:
        """Ends the W&B run, and says what is not uploaded."""
        super().finalize(status)
        # Other processes never have one.
        run, self._experiment = self._experiment, None
        if run is None:
            return
        online, reason = run.settings.mode == "online", None
        try:
            run.finish(exit_code=0 if status == "success" else 1)
            if online and (refused := _REFUSED.search(Path(run.settings.log_internal).read_text())):
                reason = f"the server has refused uploads ({refused[1]})"
        except TimeoutError:
            reason = f"the uploads were not done {self.patience:g} s after the end"
        if reason:
            print(f"W&B: {reason}; upload what is missing with: {self._sync(run)}", file=sys.stderr)
        elif run.settings.mode == "offline":
            print(f"W&B: offline run, upload it with: {self._sync(run)}")

    def log_media(self, values: Mapping[str, Any]) -> None:
        """Logs tables and what else the client asks the server about; without an answer, offline."""
        self._kept(lambda: self.experiment.log(dict(values)))

    def log_files(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        """Uploads files and folders as an artifact, where artifacts are wanted; call it on rank zero."""
        if not self.artifacts:
            return
        artifact = wandb.Artifact(f"{name}-{self.experiment.id}", type=kind)
        for path in paths:
            if path.is_dir():
                artifact.add_dir(str(path), name=path.name)
            elif path.exists():
                artifact.add_file(str(path), name=path.name)
        self._kept(lambda: self.experiment.log_artifact(artifact))

    def _kept(self, log: Callable[[], object]) -> None:
        try:
            log()
        # The client raises what its connection raises.
        except Exception as error:
            if self.experiment.settings.mode != "online":
                raise
            self.finalize("success")
            self._experiment = self._offline_after(error)
            log()

    def _begin(self) -> Any:  # noqa: ANN401
        try:
            run = self._init(self.mode)
        except (wandb.Error, TimeoutError) as error:
            if self.mode != "online":
                raise
            return self._offline_after(error)
        if self.mode == "online":
            print(f"W&B: {run.url}")
        return run

    def _offline_after(self, error: Exception) -> Any:  # noqa: ANN401
        reason = " ".join(str(error).split())
        print(f"W&B: {wandb.setup().settings.base_url}: {reason}; the run is logged offline", file=sys.stderr)
        # The one that failed may hold the id.
        wandb.teardown()
        return self._init("offline")

    def _init(self, mode: str) -> Any:  # noqa: ANN401
        known = {key: value for key, value in self._wandb_init.items() if key != "anonymous"}
        known |= {"mode": mode, "entity": self.entity, "name": known["name"] or Path(known["dir"]).name}
        if mode != "disabled":
            # In a sweep W&B gives the id, and takes no other; nor another project.
            known["id"] = known["id"] or wandb.setup().settings.run_id or self._kept_id()
        settings = wandb.Settings(finish_timeout=self.patience, finish_timeout_raises=True, silent=True)
        run = wandb.init(**known, settings=settings)
        # As Lightning does.
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    def _kept_id(self) -> str:
        path = Path(self._wandb_init["dir"]) / "wandb" / "run_id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, secrets.token_hex(4))
        return path.read_text().strip()

    def _sync(self, run: Any) -> str:  # noqa: ANN401
        """The command that uploads what is left."""
        place = Path(self._wandb_init["dir"]) / "wandb"
        if run.settings.mode == "offline":
            # An interrupted run has left several parts: with this the second does not overwrite the first.
            return f"WANDB_RESUME=allow wandb sync {place}"
        return f"{'WANDB_RESUME=allow ' * run.resumed}wandb sync --include-online {place / Path(run.dir).parent.name}"


def wandb_run(trainer: L.Trainer) -> WandbRun | None:
    """The run on rank zero, if there is one."""
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbRun)), None)


def log_settings(logger: WandbRun, folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Makes the run's settings, the hashes of the files that they name, and facts the config of the W&B run."""
    settings = yaml.safe_load(folder.config.read_text())
    identity = json.loads(folder.identity.read_text()) if folder.identity.exists() else {}
    hashes = {key: value for key, value in identity.items() if key.endswith(SHA256)}
    logger.experiment.config.update({**settings, "sha256": hashes, **facts}, allow_val_change=True)
