"""A training over processes takes the steps of a training in one."""

import os
import signal

import pytest
import torch
import yaml
from processes import Launch
from safetensors.torch import load_file

from lit_purify.cli import train
from lit_purify.errors import INTERRUPTED
from lit_purify.tasks import DenoiserTask


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three steps of 32 images an epoch, without dropout, which each process draws for itself."""
    network = {"channels": 1, "size": 8, "width": 8, "multipliers": [1], "blocks": 1}
    average = {"decay": 0.9, "use_buffers": False, "update_starting_at_step": 0}
    settings = {
        "model": {
            "class_path": "DenoiserTask",
            "init_args": {
                "denoiser": {"class_path": "UNet", "init_args": network},
                "constant": 0.5,
                "attention": 0.0,
                "shapes": 0.5,
                "shift_pixels": 1,
                "warmup": 2,
            },
        },
        "data": {
            "class_path": "Digits",
            # Shards of unequal size.
            "init_args": {"batch_size": 16, "val_subset": {"class_path": "First", "init_args": {"n": 33}}},
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_train_batches": 3,
            "gradient_clip_val": 1.0,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": average},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"save_top_k": -1, "filename": "{epoch}", "monitor": "val/loss"},
                },
                {"class_path": "Export"},
            ],
        },
    }
    path = tmp_path_factory.mktemp("training") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
    """The run of two processes with 16 images each."""
    folder = tmp_path_factory.mktemp("two")
    argv = ["fit", f"--config={config}", f"--run={folder / 'run'}"]
    launched = Launch("train", argv, folder / "log", 2)
    assert launched.wait() == [0, 0], launched.said
    return folder / "run"


def alone(config, run, *flags):
    train(["fit", f"--config={config}", f"--run={run}", "--data.init_args.batch_size=32", *flags])
    return run


def assert_equal_networks(ours, theirs):
    one, other = (load_file(run / "model.safetensors") for run in (ours, theirs))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6, msg=name)


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
            torch.testing.assert_close(ours[part][name], value, rtol=0, atol=1e-6, msg=name)
    (ours,), (theirs,) = (
        [v["current_score"] for k, v in found["callbacks"].items() if k.startswith("ModelCheckpoint")]
        for found in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_batch_normalization_sees_the_images_of_all_processes(config, tmp_path):
    """Weights and running statistics."""
    settings = yaml.safe_load(config.read_text())
    resnet = {"depth": 8, "size": 8, "num_classes": 10, "channels": 1, "width": 4}
    task = {"classifier": {"class_path": "ResNetClassifier", "init_args": resnet}, "shift_pixels": 1, "warmup": 2}
    settings["model"] = {"class_path": "ClassifierTask", "init_args": task}
    settings["trainer"] |= {"max_epochs": 1, "callbacks": [{"class_path": "Export"}]}
    path = tmp_path / "classifier.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    launched = Launch("train", ["fit", f"--config={path}", f"--run={tmp_path / 'two'}"], tmp_path / "log", 2)
    assert launched.wait() == [0, 0], launched.said
    assert_equal_networks(tmp_path / "two", alone(path, tmp_path / "run"))


def test_one_process_writes(two):
    assert {path.name for path in (two / "checkpoints").iterdir()} == {"epoch=0.ckpt", "epoch=1.ckpt"}
    assert "Exported" in (two.parent / "log.0").read_text()
    assert "Exported" not in (two.parent / "log.1").read_text()


def test_another_number_of_processes_goes_on(config, two, tmp_path):
    goes_on = alone(config, tmp_path / "run", f"--ckpt_path={two / 'checkpoints' / 'epoch=0.ckpt'}")
    assert checkpoint(goes_on, 1)["global_step"] == 6
    assert_equal_networks(goes_on, two)


def test_another_number_of_samples_a_step_is_refused(config, two, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        alone(
            config,
            tmp_path / "run",
            f"--ckpt_path={two / 'checkpoints' / 'epoch=0.ckpt'}",
            "--data.init_args.batch_size=16",
        )
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "trained with 32 samples a batch" in said
    assert "set data.init_args.batch_size to 32 for 1 processes" in said


def test_a_signal_ends_a_training_after_its_step_and_the_same_command_goes_on(config, tmp_path, monkeypatch, capsys):
    """Within an epoch, with gradients of two batches a step: weights are those of a training that was left alone."""
    flags = ["--trainer.limit_train_batches=6", "--trainer.accumulate_grad_batches=2", "--ckpt_path=last"]
    through = alone(config, tmp_path / "through", *flags)
    step = DenoiserTask.training_step

    def signaled(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DenoiserTask, "training_step", signaled)
    with pytest.raises(SystemExit) as stopped:
        alone(config, tmp_path / "run", *flags)
    assert stopped.value.code == INTERRUPTED
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"stopped after step 5: go on with --ckpt_path {last}" in capsys.readouterr().err
    monkeypatch.setattr(DenoiserTask, "training_step", step)
    resumed = alone(config, tmp_path / "run", *flags)
    one, other = (load_file(run / "model.safetensors") for run in (through, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
