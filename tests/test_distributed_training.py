"""A training over processes takes the steps of a training in one."""

import copy
import multiprocessing
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import RESNET, UNET, training_on_digits, written
from processes import Launch
from safetensors.torch import load_file

from lit_purify.callbacks import Stopping
from lit_purify.cli import train
from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.training import DenoiserTask, TrainingTask, batch_norm


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three steps of 32 images an epoch, without dropout, which each process draws for itself."""
    model = {"denoiser": {"class_path": "UNet", **UNET}, "warmup": 2, "shift_pixels": 1}
    model |= {"constant": 0.5, "attention": 0.0, "shapes": 0.5}
    # Shards of unequal size.
    data = {"batch_size": 16, "val_subset": {"class_path": "First", "n": 33}}
    callbacks = {
        "EMAWeightAveraging": {"decay": 0.9, "use_buffers": False, "update_starting_at_step": 0},
        "ModelCheckpoint": {"save_top_k": -1, "filename": "{epoch}", "monitor": "val/loss", "save_last": True},
        "Export": {},
    }
    steps = {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_train_batches": 3, "gradient_clip_val": 1.0}
    settings = training_on_digits("DenoiserTask", model, data, callbacks, **steps)
    return written(tmp_path_factory.mktemp("training") / "tiny.yaml", settings)


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
    """The run of two processes with 16 images each."""
    folder = tmp_path_factory.mktemp("two")
    argv = ["fit", f"--config={config}", f"--run={folder / 'run'}"]
    launched = Launch("train", argv, folder / "log", 2)
    assert launched.wait() == [0, 0], launched.said
    return folder / "run"


def alone(config, run, *flags):
    train(["fit", f"--config={config}", f"--run={run}", "--data.batch_size=32", *flags])
    return run


def assert_equal_networks(ours, theirs):
    one, other = (load_file(run / "model.safetensors") for run in (ours, theirs))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=0, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


def checkpoint(run, epoch):
    return torch.load(run / "checkpoints" / f"epoch={epoch}.ckpt", weights_only=True)


def test_two_processes_with_half_a_batch_each_train_as_one_with_the_whole(config, two, tmp_path):
    """Gradients, their clipping, weights, average, and the validation over unequal shards."""
    whole = alone(config, tmp_path / "run")
    assert_equal_networks(two, whole)
    ours, theirs = checkpoint(two, 1), checkpoint(whole, 1)
    assert ours["global_step"] == theirs["global_step"] == 6
    for part in ("state_dict", "current_model_state"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(
                ours[part][name], value, rtol=0, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
            )
    (ours,), (theirs,) = (
        [v["current_score"] for k, v in found["callbacks"].items() if k.startswith("ModelCheckpoint")]
        for found in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_batch_normalization_sees_the_images_of_all_processes(config, tmp_path):
    """Weights and running statistics."""
    settings = yaml.safe_load(config.read_text())
    resnet = {"class_path": "ResNetClassifier", **RESNET}
    # Adam makes as much of a gradient that is all rounding as of any other: small steps.
    task = {"classifier": resnet, "shift_pixels": 1, "warmup": 2, "learning_rate": 2e-4}
    settings["model"] = {"class_path": "ClassifierTask", **task}
    settings["trainer"] |= {"max_epochs": 1, "callbacks": [{"class_path": "Export"}]}
    path = written(tmp_path / "classifier.yaml", settings)
    launched = Launch("train", ["fit", f"--config={path}", f"--run={tmp_path / 'two'}"], tmp_path / "log", 2)
    assert launched.wait() == [0, 0], launched.said
    assert_equal_networks(tmp_path / "two", alone(path, tmp_path / "run"))


def test_batch_normalization_asks_no_others_in_evaluation(monkeypatch):
    """Shards of an evaluation may have other numbers of batches."""
    asked = []
    monkeypatch.setattr(batch_norm, "all_reduce", lambda total: asked.append(1) or total)
    layer, image = torch.nn.BatchNorm2d(3), torch.rand(4, 3, 5, 5)
    copied = copy.deepcopy(layer)
    expected = copied.train()(image), copied.eval()(image)
    with batch_norm.SynchronizedBatchNorm():
        torch.testing.assert_close(layer.train()(image), expected[0])
        assert len(asked) == 2
        torch.testing.assert_close(layer.eval()(image), expected[1])
        assert len(asked) == 2


def test_one_process_writes(two):
    assert {path.name for path in (two / "checkpoints").iterdir()} == {"epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"}
    assert "Exported" in (two.parent / "log.0").read_text()
    assert "Exported" not in (two.parent / "log.1").read_text()


def test_another_number_of_processes_goes_on(config, two, tmp_path):
    goes_on = alone(config, tmp_path / "run", f"--ckpt_path={two / 'checkpoints' / 'epoch=0.ckpt'}")
    assert checkpoint(goes_on, 1)["global_step"] == 6
    assert_equal_networks(goes_on, two)


@pytest.mark.parametrize(("within", "refused"), [(True, True), (False, False)])
def test_within_an_epoch_batches_must_be_as_large_as_they_were(within, refused):
    """As many samples a step, in twice as many batches: the place in the epoch is counted in batches."""
    trainer = SimpleNamespace(training=True, world_size=1)
    task = SimpleNamespace(trainer=trainer, _batch=lambda: (16, 2))
    progress = {"epoch_loop.batch_progress": {"is_last_batch": not within}}
    with pytest.raises(InputError, match="trained with 32 samples per batch") if refused else nullcontext():
        TrainingTask.on_load_checkpoint(task, {"batch": (32, 1), "loops": {"fit_loop": progress}})


def test_each_process_and_batch_has_a_dropout_of_its_own():
    def draw(rank, step, batch):
        TrainingTask.on_train_batch_start(SimpleNamespace(seed=3, global_rank=rank, global_step=step), None, batch)
        return torch.rand(()).item()

    places = [(rank, step, batch) for rank in (0, 1) for step in (5, 6) for batch in (10, 11)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 5, 10) == draw(1, 5, 10)


@pytest.mark.parametrize("decision", [True, False])
def test_all_processes_stop_after_the_same_step(tmp_path, decision):
    """Also those that got no signal; who got one waits for the decision."""
    asked, saved = [], []

    def agree(stopped, all):
        asked.append((stopped, all))
        return decision

    trainer = SimpleNamespace(
        global_step=7,
        strategy=SimpleNamespace(reduce_boolean_decision=agree),
        default_root_dir=tmp_path,
        checkpoint_callbacks=[],
        save_checkpoint=saved.append,
        is_global_zero=False,
    )
    stopping = Stopping()
    stopping.stopped, stopping.step = not decision, 6
    with pytest.raises(KeyboardInterrupt) if decision else nullcontext():
        stopping.on_train_batch_end(trainer, None, None, None, 0)
    assert asked == [(not decision, False)]
    assert saved == [tmp_path / "checkpoints" / "last.ckpt"] * decision


@pytest.mark.parametrize(
    ("signum", "workers", "batch"),
    [(signal.SIGTERM, 1, 8), (signal.SIGINT, 1, 2)],
)
def test_a_signal_ends_a_training_after_its_step_and_the_same_command_goes_on(
    signum, workers, batch, config, tmp_path, monkeypatch, capsys
):
    """Within an epoch, with gradients of two batches a step: weights are those of a training that was left alone.

    Also when the signal goes to the whole process group, as that of ``timeout`` and Ctrl-C: the loader's workers get it
    first. There is one last checkpoint, of the last step, also where the run's folder is named as seen from here.
    """
    monkeypatch.chdir(tmp_path)
    flags = ["--trainer.limit_train_batches=6", "--trainer.accumulate_grad_batches=2", "--ckpt_path=last"]
    flags += [f"--data.num_workers={workers}"]
    through = alone(config, tmp_path / "through", *flags)
    step = DenoiserTask.training_step

    def signaled(self, batch, batch_idx, number=batch):
        if self.trainer.fit_loop.total_batch_idx == number:
            children = multiprocessing.active_children()
            assert len(children) >= workers
            for pid in (*(child.pid for child in children), os.getpid()):
                os.kill(pid, signum)
            time.sleep(0.5 * workers)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DenoiserTask, "training_step", signaled)
    with pytest.raises(SystemExit) as stopped:
        alone(config, Path("run"), *flags)
    assert stopped.value.code == INTERRUPTED
    last = Path("run") / "checkpoints" / "last.ckpt"
    assert f"stopped after step {batch // 2 + 1}: resume with ckpt_path: {last}" in capsys.readouterr().err
    monkeypatch.setattr(DenoiserTask, "training_step", step)
    resumed = alone(config, Path("run"), *flags)
    assert [path.name for path in last.parent.glob("last*")] == ["last.ckpt"]
    one, other = (load_file(run / "model.safetensors") for run in (through, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
