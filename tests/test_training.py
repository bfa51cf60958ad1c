"""Training as a user runs it, and what its tasks promise."""

import math
import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import QUIET, RESNET, ROOT, GaussianDenoiser, training_on_digits, written
from conftest import UNET as SMALL
from lightning.pytorch.callbacks import WeightAveraging

from lit_purify import errors
from lit_purify.attacks import PGD
from lit_purify.cli import train, training
from lit_purify.data import Digits
from lit_purify.defense import TopFraction
from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional.noise import TRAINING, KeyedNoise
from lit_purify.models import ResNetClassifier, UNet
from lit_purify.training import Averaging, ClassifierTask, DenoiserTask


@pytest.fixture
def config(tmp_path):
    """An epoch of five steps."""
    model = {"denoiser": {"class_path": "UNet", **SMALL}, "attention": 0.0, "shapes": 0.5, "warmup": 2}
    checkpoints = {"save_top_k": -1, "filename": "{epoch}", "dirpath": str(tmp_path / "checkpoints")}
    callbacks, few = {"ModelCheckpoint": checkpoints, "Export": {}}, {"max_epochs": 1, "limit_val_batches": 1}
    settings = training_on_digits("DenoiserTask", model, {"batch_size": 256}, callbacks, **few)
    return written(tmp_path / "tiny_denoiser.yaml", settings)


def test_how_much_there_was_to_do_is_said(config, tmp_path, capsys):
    command = ["fit", "--config", str(config), "--run", str(tmp_path), "--ckpt_path"]
    train([*command, "last"])
    said = capsys.readouterr()
    assert (
        f"{tmp_path / 'checkpoints' / 'last.ckpt'}: does not exist yet: the training starts from the beginning"
        in said.err
    )
    assert "nothing left" not in said.out
    train([*command, str(tmp_path / "checkpoints" / "epoch=0.ckpt")])
    said = capsys.readouterr()
    assert "from the start" not in said.err
    assert "nothing left to do" in said.out


def test_a_finished_training_keeps_its_network(tmp_path, capsys):
    """Of a checkpoint that was saved with the last validation, before its epoch had ended."""
    command = ["fit", "--config", str(ROOT / "configs/train/digits_classifier.yaml"), "--run", str(tmp_path)]
    command += ["--trainer.logger", "false", "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2"]
    train([*command, "--data.batch_size", "256"])
    network = (tmp_path / "model.safetensors").read_bytes()
    train([*command, "--data.batch_size", "256", "--ckpt_path", "last"])
    assert "nothing left to do" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == network


@pytest.mark.parametrize("batch_size", [100, 2000])
def test_a_dry_run_of_a_training_says_what_it_takes_and_writes_nothing(config, tmp_path, capsys, batch_size):
    """Ten steps an epoch, or a single one; the folder may hold a training."""
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    before = sorted(tmp_path.rglob("*"))
    command = ["fit", "--config", str(config), "--run", str(tmp_path / "run"), "--dry_run"]
    train([*command, f"--data.batch_size={batch_size}", "--trainer.logger=WandbRun"])
    steps = {100: 10, 2000: 1}[batch_size]
    said = rf"[\d.e-]+ s a step on cpu, {steps} steps: \d+ s without validation; peak memory [\d.]+ GiB. Nothing was w"
    assert re.search(said, capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_training_that_takes_days_on_a_cpu_says_so_before_it_starts(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "seconds_a_sample", lambda network: 20_000.0)
    train(["fit", "--config", str(config), "--run", str(tmp_path / "run"), "--trainer.max_steps=2"])
    said = capsys.readouterr().err
    assert re.search(r"warning: on this CPU the training takes about \d+ days: use a GPU", said)
    monkeypatch.undo()
    network = UNet(**SMALL).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert 0 < training.seconds_a_sample(network) < 60
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_average_that_lags_says_so(monkeypatch, capsys):
    monkeypatch.setattr(WeightAveraging, "on_train_end", lambda *_: None)
    errors.notice.cache_clear()
    for steps, said in ((10, True), (1000, False)):
        Averaging().on_train_end(SimpleNamespace(global_step=steps, is_global_zero=True), None)
        assert ("still lags: it reaches back 2 of 10 steps" in capsys.readouterr().err) == said


def test_gradients_are_clipped_for_a_fused_optimizer():
    """Lightning would refuse, under bf16-mixed too."""
    task = DenoiserTask(UNet(**SMALL), attention=0.0, shapes=0.5)
    weights = list(task.network.requires_grad_().parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights, fused=True)
    task.configure_gradient_clipping(optimizer, 1.0, "norm")
    assert sum(weight.grad.square().sum() for weight in weights) <= 1.001


def denoiser_task(**options):
    settings = {"constant": 0.5, "attention": 0.25, "shapes": 0.25, "max_level": 400, **options}
    classifier = ResNetClassifier(**RESNET)
    return DenoiserTask(GaussianDenoiser(size=8), classifier, TopFraction(0.3), **settings)


def test_levels_are_drawn_as_stated(images):
    task, image = denoiser_task(), images.repeat(100, 1, 1, 1)
    noise = KeyedNoise(0, torch.arange(600), torch.zeros(600, dtype=torch.long))
    levels = task.draw_levels(image, noise).dense
    distinct = torch.tensor([len(each.unique()) for each in levels])
    assert set(distinct.tolist()) == {1, 2}
    # Random shapes may cover no pixel or all of them.
    assert 0.5 <= float((distinct == 1).float().mean()) <= 0.62
    assert 1 <= int(levels.min()) <= 20
    assert 380 <= int(levels.max()) <= 400
    task = denoiser_task(constant=0.0, attention=1.0, shapes=0.0)
    attended = task.draw_levels(image, noise).dense
    mask = TopFraction(0.3)(task._classifier[0], image, noise)
    assert all(len(one[m > 0.5].unique()) == 1 for one, m in zip(attended, mask, strict=True))
    assert (attended.double().std(dim=(1, 2, 3)) > 0).double().mean() > 0.9


def test_the_classifier_is_called_for_attended_masks_alone(images):
    """And the maps are those of masks that were computed of all images."""
    task, image = denoiser_task(), images.repeat(10, 1, 1, 1)
    noise = KeyedNoise(0, torch.arange(60), torch.zeros(60, dtype=torch.long))
    seen = []
    task._classifier[0].network.conv1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    levels = task.draw_levels(image, noise).dense
    kinds = noise.uniform(1, image.new_empty(60, 3))[:, 2]
    attended = (kinds >= 0.5) & (kinds < 0.75)
    assert seen == [int(attended.sum())]
    task.constant, task.attention = 0.0, 1.0
    whole = task.draw_levels(image, noise).dense
    assert torch.equal(levels[attended], whole[attended])
    assert not torch.equal(levels[~attended], whole[~attended])


def test_the_optimal_denoiser_has_the_theoretical_error(images):
    """On Gaussian data E|eps - eps*|^2 = abar v / (abar v + 1 - abar) at every level, in any map."""
    denoiser = GaussianDenoiser(mean=0.0, variance=0.04, size=8)
    task = DenoiserTask(denoiser, constant=1.0, attention=0.0, shapes=0.0, max_level=400, val_levels=(100, 300))
    generator = torch.Generator().manual_seed(0)
    image = (0.2 * torch.randn(2000, 1, 8, 8, generator=generator)) / 2 + 0.5
    task.validation_step({"image": image, "label": torch.zeros(2000).long(), "index": torch.arange(2000)}, 0)
    for t in (100, 300):
        abar = float(denoiser.schedule.at(t))
        expected = abar * 0.04 / (abar * 0.04 + 1 - abar)
        for place in ("constant", "inside", "outside"):
            assert float(task.means[f"mse_{place}_t{t}"].compute()) == pytest.approx(expected, rel=0.03), place


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    task = DenoiserTask(
        UNet(1, 8, 8, [1]), constant=1.0, attention=0.0, shapes=0.0, learning_rate=0.01, weight_decay=0.1, warmup=10
    )
    task._trainer = SimpleNamespace(estimated_stepping_batches=110)
    made = task.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.001)
    assert rates[4] == pytest.approx(0.005)
    assert rates[9] == rates[10] == pytest.approx(0.01)
    assert rates[35] == pytest.approx(0.01 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.0)


def test_two_trainings_at_once_do_not_share_a_folder(config, tmp_path, refused):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    assert "another run is writing there" in refused(train, "fit", "--config", config, "--run", folder.path)
    folder.release()
    assert not folder.config.exists()


def test_a_second_training_does_not_overwrite_the_first(config, tmp_path, refused):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"weeks of work")
    said = refused(train, "fit", "--config", config, "--run", tmp_path / "run")
    assert "holds a training already: resume it with --ckpt_path" in said
    assert last.read_bytes() == b"weeks of work"


def test_training_noise_depends_on_sample_and_epoch_alone():
    """So two processes with half a batch each see what one sees with the whole batch."""
    task = denoiser_task()
    index = torch.arange(8)
    whole = task.keyed({"index": index}).normal(0, torch.zeros(8, 1, 4, 4))
    halves = [task.keyed({"index": half}).normal(0, torch.zeros(4, 1, 4, 4)) for half in (index[0::2], index[1::2])]
    assert torch.equal(whole[0::2], halves[0])
    assert torch.equal(whole[1::2], halves[1])


def test_training_draws_differ_between_epochs_also_an_attacks_random_start(monkeypatch):
    task, noise, starts = denoiser_task(), [], []
    image, attack = torch.full((4, 1, 4, 4), 0.5), PGD("linf", 0.1, 1, 0.05)
    for epoch in (0, 7):
        monkeypatch.setattr(type(task), "current_epoch", epoch)
        keyed = task.keyed({"index": torch.arange(4)})
        noise.append(keyed.normal(0, image))
        starts.append(attack._start(image, keyed.runs([0])))
    assert not torch.equal(*noise)
    assert not torch.equal(*starts)


def test_attacking_in_training_leaves_batch_statistics_alone(images):
    task = ClassifierTask(ResNetClassifier(**RESNET), PGD("linf", 0.1, 1, 0.05)).train()
    before = task.classifier.network.bn1.running_mean.clone()
    noise = KeyedNoise(0, torch.arange(6), torch.zeros(6, dtype=torch.long))
    task._attacked(task.attack, images, torch.arange(6), noise)
    assert torch.equal(task.classifier.network.bn1.running_mean, before)
    assert task.classifier.training


def test_training_loss_is_the_error_in_the_noise(images):
    """The step written out: the augmented image, noised at the drawn levels, and the noise that went in."""
    task = denoiser_task(shift_pixels=1, mirror=True)
    batch = {"image": images, "label": torch.zeros(6).long(), "index": torch.arange(6)}
    noise = KeyedNoise(0, torch.arange(6), torch.zeros(6, dtype=torch.long), TRAINING)
    loss = task.loss(batch, noise)
    image = task.augmented(images, noise, 3)
    eps, levels = noise.normal(0, images), task.draw_levels(image, noise)
    abar = task.denoiser.schedule.at(levels.dense)
    x = abar.sqrt() * (2 * image - 1) + (1 - abar).sqrt() * eps
    expected = (task.denoiser(x, levels) - eps).square().mean()
    assert not torch.equal(image, images)
    torch.testing.assert_close(loss, expected, check_dtype=False)


def test_classifier_learns_and_adversarial_training_is_more_robust(tmp_path):
    accuracy = {}
    off = QUIET | dict.fromkeys(("enable_checkpointing", "inference_mode", "use_distributed_sampler"), False)
    for name, attack in (("plain", None), ("adversarial", PGD("linf", 0.15, 4, 0.06))):
        torch.manual_seed(0)
        network = ResNetClassifier(**RESNET | {"width": 8})
        task = ClassifierTask(network, attack, learning_rate=5e-3, warmup=10)
        trainer = L.Trainer(max_epochs=5, accelerator="cpu", default_root_dir=tmp_path, **off)
        data = Digits(batch_size=64)
        trainer.fit(task, data)
        task.attack = PGD("linf", 0.15, 10, 0.04)
        (accuracy[name],) = trainer.validate(task, data, verbose=False)
    assert accuracy["plain"]["val/clean_accuracy"] > 0.9
    assert accuracy["adversarial"]["val/robust_accuracy"] > accuracy["plain"]["val/robust_accuracy"] + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constant": 0.9}, "add to 1"),
        ({"max_level": 1001}, "max_level = 1001"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"val_levels": (0,)}, "val_levels = 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        denoiser_task(**options)
    with pytest.raises(InputError, match="needs a classifier"):
        DenoiserTask(GaussianDenoiser())
