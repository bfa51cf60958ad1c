"""Fine-tuning: what validation measures and shows, what survives a kill, what is exported."""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from conftest import QUIET, RESNET, ROOT, WEIGHTS, training_on_digits, written
from conftest import UNET as SMALL
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from PIL import Image
from processes import Launch
from safetensors.torch import load_file

from lit_purify.cli import train
from lit_purify.cli.settings import load
from lit_purify.data import Digits
from lit_purify.data.subset import Balanced
from lit_purify.defense import HeterogeneousPurifier, TopFraction, UniformPurifier, VariableIntensityPurifier
from lit_purify.errors import InputError
from lit_purify.functional.noise import EVALUATION, KeyedNoise
from lit_purify.models import ResNetClassifier, UNet, load_classifier, load_denoiser
from lit_purify.training import ClassifierTask, DenoiserTask, Export, Previews, checkpoints
from lit_purify.training.checkpoints import Averaging, WholeCheckpoints
from lit_purify.training.denoiser import psnr

NETWORK = {**SMALL, "dropout": 0.1}
AVERAGE = {"decay": 0.9, "use_buffers": False, "update_starting_at_step": 0}
PURIFIERS = {
    "uniform": partial(UniformPurifier, level=200, steps=1),
    "variable": partial(VariableIntensityPurifier, mask=TopFraction(0.3), high=400, low=200, steps=2),
}


class SmallDigits(Digits):
    """Four batches of 32 an epoch."""

    def split(self, name):
        return super().split(name).part(np.arange(140))


def trainer(folder, *callbacks, **options):
    settings = {"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0, **QUIET, **options}
    made = L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **settings)
    made.strategy.checkpoint_io = WholeCheckpoints()
    return made


def task(denoiser=None, **options):
    classifier = load_classifier(WEIGHTS["classifier"])
    denoiser = denoiser or load_denoiser(WEIGHTS["denoiser"])
    settings = {"val_levels": (200,), "max_level": 700, "warmup": 1, "purifiers": PURIFIERS, **options}
    return DenoiserTask(denoiser, classifier, TopFraction(0.3), **settings)


# What is measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validate")

    def validate(**options):
        made = trainer(folder, enable_checkpointing=False, precision=options.pop("precision", None))
        (values,) = made.validate(task(seed=3), Digits(**options), verbose=False)
        return values

    return {
        "whole": validate(batch_size=300),
        "split": validate(batch_size=77),
        "16 bits": validate(batch_size=300, precision="bf16-mixed"),
    }


def test_accuracy_and_psnr_of_purified_images_by_hand(measured):
    """One step of DDIM to 0 is the predicted clean image: (x - sqrt(1 - abar) eps) / sqrt(abar)."""
    classifier, denoiser = load_classifier(WEIGHTS["classifier"]), load_denoiser(WEIGHTS["denoiser"])
    split = Digits().split("val")
    image = torch.stack([split[k]["image"] for k in range(300)])
    label = torch.tensor([split[k]["label"] for k in range(300)])
    eps = KeyedNoise(3, torch.arange(300), torch.zeros(300, dtype=torch.long), EVALUATION).normal(0, image)
    a = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)[199].float()
    x = a.sqrt() * (2 * image - 1) + (1 - a).sqrt() * eps
    with torch.no_grad():
        clean = (x - (1 - a).sqrt() * denoiser(x, torch.full((300,), 200))) / a.sqrt()
        purified = ((clean + 1) / 2).clamp(0, 1)
        accuracy = float((classifier(purified).argmax(dim=1) == label).float().mean())
    pair = purified.numpy(), image.numpy()
    expected = np.mean([10 * np.log10(1 / ((p - i) ** 2).mean()) for p, i in zip(*pair, strict=True)])
    assert 0.5 < accuracy < 0.99
    assert measured["whole"]["val/purified_accuracy/uniform"] == pytest.approx(accuracy, abs=1e-6)
    assert measured["whole"]["val/psnr/uniform"] == pytest.approx(expected, abs=1e-4)
    # The noise is the same at a level and in a purifier.
    assert measured["whole"]["val/psnr_t200"] == pytest.approx(expected, abs=1e-4)


def test_measures_do_not_depend_on_the_batches(measured):
    assert set(measured["whole"]) >= {"val/loss", "val/purified_accuracy/variable", "val/psnr/variable"}
    for name, value in measured["whole"].items():
        assert measured["split"][name] == pytest.approx(value, abs=1e-4), name


def test_purification_is_measured_in_full_precision(measured):
    """As an evaluation would; the errors are those of the training's precision."""
    for name, value in measured["whole"].items():
        same = name.startswith(("val/psnr/", "val/purified"))
        assert (measured["16 bits"][name] == pytest.approx(value, abs=1e-6)) == same, name
        assert measured["16 bits"][name] == pytest.approx(value, rel=0.05), name


def test_psnr_of_equal_images():
    image = torch.rand(2, 1, 4, 4)
    assert psnr(image, image).tolist() == [100.0, 100.0]
    assert psnr(image, image + torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)).tolist() == pytest.approx([20, 40])


def test_a_part_of_the_validation_split(tmp_path):
    data = Digits(batch_size=7, val_subset=Balanced(20))
    labels = torch.cat([batch["label"] for batch in data.val_dataloader()])
    assert torch.equal(labels, torch.arange(10).repeat(2))
    with pytest.raises(InputError, match="n = 301"):
        Digits(val_subset=Balanced(301)).val_dataloader()


# How it is trained


def test_what_is_trained_is_in_training_mode_and_what_gives_masks_is_not(tmp_path):
    made, modes = task(), []
    assert not made.denoiser.training

    def look(trainer, task, *_):
        modes.append((task.denoiser.training, task._classifier[0].training))

    look = LambdaCallback(on_train_batch_start=look)
    trainer(tmp_path, look, max_steps=1, limit_val_batches=1, enable_checkpointing=False).fit(made, SmallDigits())
    assert modes == [(True, False)]


def test_the_classifier_goes_where_the_training_runs():
    """The task is moved there only after its setup."""
    made = task(UNet(**NETWORK))
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    made._trainer = SimpleNamespace(world_size=1, strategy=strategy, datamodule=Digits())
    made.setup("fit")
    assert {p.device.type for p in made._classifier[0].parameters()} == {"meta"}


def test_mixed_precision_on_a_cpu(tmp_path):
    """With less memory: the network recomputes its blocks, as test_unet.py has it."""
    made = task(UNet(**NETWORK), gradient_checkpointing=True)
    assert made.denoiser.gradient_checkpointing
    losses = []
    look = LambdaCallback(on_train_batch_end=lambda trainer, task, outputs, *_: losses.append(outputs["loss"]))
    ran = trainer(tmp_path, look, max_steps=2, precision="bf16-mixed", enable_checkpointing=False)
    ran.fit(made, SmallDigits(batch_size=32))
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert all(torch.isfinite(value) for value in ran.callback_metrics.values())


# What survives a kill


class Killed(Exception):
    pass


def lives(folder, batches, checkpoints, num_workers=0, **options):
    """Trains, is killed when it has seen so many batches since it was started, resumes from what it finds."""
    folder.mkdir()
    for life in (*batches, 10**9):
        torch.manual_seed(0)
        network = UNet(**NETWORK)
        made = DenoiserTask(network, constant=0.5, attention=0.0, shapes=0.5, warmup=2, val_levels=(50,), mirror=True)
        left = [life]

        def tick(*_, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        ran = trainer(
            folder,
            Averaging(0.9),
            ModelCheckpoint(folder, save_last=True, enable_version_counter=False, **checkpoints),
            LambdaCallback(on_train_batch_start=tick),
            limit_val_batches=1,
            **options,
        )
        last = folder / "last.ckpt"
        try:
            ran.fit(
                made, SmallDigits(batch_size=32, num_workers=num_workers), ckpt_path=last if last.exists() else None
            )
        except Killed:
            continue
        progress = ran.fit_loop.epoch_progress.current
        assert progress.ready == progress.processed == progress.completed
        return ran.global_step, network.state_dict()
    raise AssertionError


EVERY_2 = {"every_n_train_steps": 2, "save_top_k": 0}


@pytest.mark.parametrize(
    ("batches", "checkpoints", "options"),
    [
        # Killed twice before the first checkpoint, and after the last batch of an epoch, whose checkpoint is taken up.
        ((1, 5, 3, 2), EVERY_2, {"max_epochs": 3}),
        # Readers ahead must not count; an epoch's order must not be that of the first one.
        ((3, 6), EVERY_2, {"max_steps": 11, "num_workers": 2}),
        # Three batches make a step, four an epoch; after resuming, no checkpoint before the next step.
        ((5, 2), EVERY_2, {"max_epochs": 3, "accumulate_grad_batches": 3}),
        # Checkpoints at the end of epochs alone.
        ((5, 6), {"every_n_epochs": 1}, {"max_steps": 11}),
    ],
    ids=["epochs", "steps", "accumulation", "ends"],
)
def test_killed_and_resumed_is_as_never_killed(tmp_path, batches, checkpoints, options):
    """The average at the end is the same bit for bit: order, noise, levels, dropout, optimizer, schedule."""
    steps, expected = lives(tmp_path / "through", (), checkpoints, **options)
    resumed_steps, resumed = lives(tmp_path / "resumed", batches, checkpoints, **options)
    assert resumed_steps == steps
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A fine-tuning in small, with everything a real one has."""
    mask = {"class_path": "TopFraction", "fraction": 0.3}
    variable = {"class_path": "VariableIntensityPurifier", "mask": mask, "high": 300, "low": 100, "steps": 2}
    uniform = {"class_path": "UniformPurifier", "level": 200, "steps": 2}
    model = {"denoiser": {"class_path": "UNet", **NETWORK}, "classifier": WEIGHTS["classifier"], "mask": mask}
    model |= {"purifiers": {"uniform": uniform, "variable": variable}}
    model |= {"val_levels": [100], "max_level": 900, "warmup": 2}
    data = {"batch_size": 128, "val_subset": {"class_path": "RandomChoice", "n": 30, "seed": 1}}
    callbacks = {
        "EMAWeightAveraging": AVERAGE,
        "ModelCheckpoint": {**EVERY_2, "save_last": True, "enable_version_counter": False},
        "Previews": {"samples": 5},
        "Export": {},
    }
    steps = {"max_steps": 12, "check_val_every_n_epoch": None, "val_check_interval": 6}
    settings = training_on_digits("DenoiserTask", model, data, callbacks, **steps)
    return written(tmp_path_factory.mktemp("config") / "tiny.yaml", settings)


@pytest.fixture(scope="module")
def run(config):
    folder = config.parent / "run"
    train(["fit", "--config", str(config), "--run", str(folder)])
    return folder


class Half:
    """Lets a process hang in the middle of its fourth checkpoint."""

    saved = 0

    def __call__(self, rank):
        checkpoints.torch = self

    def save(self, checkpoint, stream):
        self.saved += 1
        if self.saved < 4:
            return torch.save(checkpoint, stream)
        stream.write(b"half a checkpoint")
        stream.flush()
        time.sleep(100)


def test_kill_9_while_a_checkpoint_is_written(run, config, tmp_path):
    """The process dies at step 8, leaves that of step 6, in the middle of an epoch of 8, and goes on from there."""
    argv, folder = ["fit", "--config", str(config), "--run", str(tmp_path / "run")], tmp_path / "run/checkpoints"
    # Sums of gradients round differently for another number of threads: this process has one, as that has.
    launched, partial = Launch("train", argv, tmp_path / "log", spoil=Half()), folder / "last.ckpt.partial"
    launched.until(lambda: partial.exists() and partial.read_bytes() == b"half a checkpoint")
    launched.kill()
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    train([*argv, "--ckpt_path", str(folder / "last.ckpt")])
    expected, resumed = (load_file(path / "model.safetensors") for path in (run, tmp_path / "run"))
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt"]


def test_no_space_left_for_a_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    (tmp_path / "last.ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        WholeCheckpoints().save_checkpoint({"weight": torch.zeros(10_000)}, path)
    assert torch.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


# What is shown


def test_previews_on_the_disk(run):
    """Rows are the first samples validated on; panels of 128 pixels with gaps of 4, four for each of two purifiers."""
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["step-000006.png", "step-000012.png"]
    with Image.open(run / "previews" / "step-000012.png") as file:
        # Without the white edge above and to the left.
        picture = torch.from_numpy(np.array(file)).movedim(-1, 0)[:, 4:, 4:]
    assert tuple(picture.shape) == (3, 5 * 132, 8 * 132)
    split = Digits().split("val")
    for row, position in enumerate(np.random.RandomState(1).choice(300, 30, replace=False)[:5]):
        expected = (split[int(position)]["image"] * 255 + 0.5).to(torch.uint8)
        for column in (0, 4):
            panel = picture[:, 132 * row : 132 * row + 128, 132 * column : 132 * column + 128]
            assert torch.equal(panel[:, 8::16, 8::16], expected.expand(3, -1, -1))
        # The mask of the second purifier colors 0.3 of the pixels.
        masked = picture[:, 132 * row + 8 : 132 * row + 128 : 16, 132 * 5 + 8 : 132 * 6 - 4 : 16]
        assert int((masked[0] != masked[1]).sum()) == round(0.3 * 64)
    assert (picture[:, 128:132] == 255).all()


# What is exported


def test_export_writes_the_average_of_a_checkpoint(run, tmp_path, capsys):
    last = run / "checkpoints" / "last.ckpt"
    command = ["export", "--config", str(run / "config.yaml"), "--ckpt_path", str(last), "--output"]
    train([*command, str(tmp_path / "model.safetensors")])
    assert capsys.readouterr().out == f"Exported: {tmp_path / 'model.safetensors'}\n"
    exported, at_the_end = load_file(tmp_path / "model.safetensors"), load_file(run / "model.safetensors")
    state = torch.load(last, weights_only=True)
    assert exported.keys() == at_the_end.keys()
    for name, value in exported.items():
        assert torch.equal(value, at_the_end[name]), name
        assert torch.equal(value, state["state_dict"][f"denoiser.{name}"]), name
    assert not torch.equal(exported["stem.weight"], state["current_model_state"]["denoiser.stem.weight"])
    loaded = load_denoiser(str(tmp_path / "model.safetensors"))
    assert load_denoiser(str(run / "model.safetensors")).schedule.trained == loaded.schedule.trained == 900
    assert loaded.arguments["width"] == 8
    assert torch.equal(loaded.stem.weight, exported["stem.weight"])
    train([*command, str(tmp_path / "half.safetensors"), "--half", "true"])
    half = load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert torch.equal(half["stem.weight"], exported["stem.weight"].half())


def test_export_without_a_checkpoint_converts_what_is_configured(config, tmp_path):
    path = tmp_path / "model.safetensors"
    # Nothing of the run is needed for it: no such device.
    flags = ["--trainer.accelerator=cuda", "--trainer.strategy=fsdp", f"--output={path}"]
    train(["export", "--config", str(config), f"--model.denoiser={WEIGHTS['denoiser']}", *flags])
    expected, converted = load_denoiser(WEIGHTS["denoiser"]), load_denoiser(str(path))
    assert converted.arguments == expected.arguments
    # The configured training has not taken place.
    assert converted.schedule.trained is None
    for name, value in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value), name


def test_export_of_a_classifier(tmp_path, capsys):
    model = {"classifier": {"class_path": "ResNetClassifier", **RESNET}, "warmup": 1}
    callbacks = {"ModelCheckpoint": {"every_n_train_steps": 1, "save_last": True}}
    few, run = {"max_epochs": 1, "limit_train_batches": 2}, tmp_path / "run"
    settings = training_on_digits("ClassifierTask", model, {"batch_size": 256}, callbacks, **few)
    train(["fit", "--config", str(written(tmp_path / "tiny.yaml", settings)), "--run", str(run)])
    last = run / "checkpoints" / "last.ckpt"
    # Without output, into the run's folder.
    train(["export", "--config", str(run / "config.yaml"), "--ckpt_path", str(last)])
    loaded, state = load_classifier(str(run / "model.safetensors")), torch.load(last, weights_only=True)["state_dict"]
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, state[f"classifier.network.{name}"]), name
    split = Digits().split("val")
    image = torch.stack([split[k]["image"] for k in range(len(split))])
    right = [split[k]["label"] for k in range(len(split))] == loaded(image).argmax(dim=1).numpy()
    assert f"Accuracy at the last validation: clean {100 * right.mean():.1f} %" in capsys.readouterr().out


def test_killed_between_the_last_step_and_the_export(run, config):
    """Nothing is left to train, so nothing puts the average in place; the checkpoint has it."""
    expected = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    last = run / "checkpoints" / "last.ckpt"
    train(["fit", f"--config={config}", f"--run={run}", f"--ckpt_path={last}", "--trainer.logger=false"])
    for name, value in load_file(run / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


# The recipes


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("finetune_*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_builds(path, tmp_path):
    """All but the networks, whose weights are not there: small ones stand in, with the schedule of the real one."""
    settings = load(path.read_text())
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    given = model["denoiser"]["init_args"]
    size = data.get("size") or given.get("size", 8)
    schedule = {key: given[key] for key in ("schedule", "steps") if given.get(key)}
    model["denoiser"] = {"class_path": "UNet", "init_args": {**NETWORK, "size": size, **schedule}}
    model["classifier"] = {"class_path": "ResNetClassifier", "init_args": {**RESNET, "size": size}}
    stand_in = written(tmp_path / path.name, settings)
    train(["export", "--config", str(stand_in), "--output", str(tmp_path / "model.safetensors")])
    assert load_denoiser(str(tmp_path / "model.safetensors")).size == size
    trainer = settings["trainer"]
    checkpoints, previews = trainer["callbacks"]
    assert previews["class_path"] == "Previews"
    assert checkpoints["init_args"]["every_n_train_steps"] <= trainer["max_steps"]
    assert {"uniform", "variable"} == {name.partition("-")[0] for name in model["purifiers"]}
    assert max(model["val_levels"]) <= model["max_level"]


# What is refused


def test_levels_beyond_the_training_are_refused():
    denoiser = load_denoiser(WEIGHTS["denoiser"])
    UniformPurifier(denoiser, level=700, steps=2)
    for name, make in {
        "level = 701": partial(UniformPurifier, level=701, steps=2),
        "high = 900": partial(VariableIntensityPurifier, mask=TopFraction(0.3), high=900, low=200, steps=2),
        r"high \+ jump = 701": partial(
            HeterogeneousPurifier, mask=TopFraction(0.3), high=691, low=200, steps=4, resampling="single", jump=10
        ),
    }.items():
        with pytest.raises(InputError, match=f"{name} is above 700, the strongest level that the denoiser was trained"):
            make(denoiser)
    # Training anew, to other levels.
    with pytest.raises(InputError, match="high = 400 is above 300"):
        task(denoiser, max_level=300)
    assert task(denoiser, max_level=1000).denoiser.schedule.trained == 1000


def test_a_network_that_cannot_be_saved_is_refused_before_it_is_trained(refused, tmp_path):
    bare = {"class_path": "Classifier", "network": "torch.nn.Flatten", "size": 8, "num_classes": 10, "channels": 1}
    settings = training_on_digits("ClassifierTask", {"classifier": bare}, {}, {"Export": {}}, max_epochs=1)
    path = written(tmp_path / "bare.yaml", settings)
    expected = "Classifier is built from other objects, so no file can rebuild it"
    assert refused(train, "fit", "--config", path, "--run", tmp_path / "run").startswith(expected)
    assert refused(train, "export", "--config", path, "--output", tmp_path / "m.safetensors").startswith(expected)
    assert [file.name for file in tmp_path.iterdir()] == ["bare.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt: no such checkpoint; check ckpt_path"),
        (["--ckpt_path", "damaged.ckpt"], "damaged.ckpt: not a checkpoint that train.py saved"),
        (["--ckpt_path", "other.ckpt"], "ckpt_path: the checkpoint belongs to another network than the configured one"),
        (["--output", "model.pt"], "model.pt: networks are safetensors files"),
    ],
)
def test_export_refuses(refused, run, config, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    Path("damaged.ckpt").write_bytes(whole[: len(whole) // 2])
    other = ClassifierTask(ResNetClassifier(**RESNET)).state_dict()
    torch.save({"state_dict": other, "global_step": 1}, "other.ckpt")
    assert refused(train, "export", "--config", config, *words).startswith(said)
    assert {path.name for path in tmp_path.iterdir()} == {"damaged.ckpt", "other.ckpt"}


def test_purifiers_and_previews_need_each_other(tmp_path):
    with pytest.raises(InputError, match="purifiers need a classifier"):
        DenoiserTask(UNet(**NETWORK), constant=1.0, attention=0.0, shapes=0.0, purifiers=PURIFIERS)
    with pytest.raises(InputError, match=r"the name 'a\.b' may hold only letters"):
        task(purifiers={"a.b": PURIFIERS["uniform"]})
    with pytest.raises(InputError, match=r"m\.pt: networks are safetensors files"):
        trainer(tmp_path, Export(tmp_path / "m.pt"), max_steps=1).fit(task(purifiers=None), SmallDigits())
    with pytest.raises(InputError, match="the model has no purifiers"):
        trainer(tmp_path, Previews(), max_steps=1).fit(task(purifiers=None), SmallDigits())
    with pytest.raises(InputError, match="samples = 0"):
        Previews(samples=0)
    made = task()
    made._classifier[0].num_classes = 9
    with pytest.raises(InputError, match="has 10 classes"):
        trainer(tmp_path, enable_checkpointing=False).validate(made, SmallDigits(), verbose=False)
