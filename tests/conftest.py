"""Small networks, configurations and stub noise that tests share."""

import os
import sys
from pathlib import Path

# Two processes of tests, and those that they start, share the machine: read before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from torch import nn

# Kernels are interpreted, on CPU tensors; read when timm imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lit_purify.functional.levels import LevelMap
from lit_purify.functional.noise import EVALUATION, KeyedNoise
from lit_purify.functional.schedule import Schedule
from lit_purify.models import Denoiser, ResNetClassifier, UNet

ROOT = Path(__file__).parent.parent
WEIGHTS = {kind: str(ROOT / f"checkpoints/digits_{kind}.safetensors") for kind in ("classifier", "denoiser")}
RESNET = {"depth": 8, "size": 8, "num_classes": 10, "channels": 1, "width": 4}
UNET = {"channels": 1, "size": 8, "width": 8, "multipliers": [1], "blocks": 1}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class FixedNoise:
    """The same draw at every step, so that different samplers see the same noise."""

    def __init__(self, value):
        self.value = value

    def normal(self, step, like):
        return self.value.to(like.dtype)

    uniform = normal

    def rows(self, rows):
        return FixedNoise(self.value[rows])

    def runs(self, runs):
        return FixedNoise(self.value.repeat_interleave(len(runs), dim=0))


def keyed(count, run=0, stream=EVALUATION):
    """Noise of the samples 0, 1, ..."""
    return KeyedNoise(0, torch.arange(count), torch.full((count,), run), stream)


def pixelwise(t):
    """Levels as (B, 1, 1, 1) or (B, 1, H, W)."""
    return t.dense if isinstance(t, LevelMap) else t.reshape(len(t), 1, *t.shape[2:] or (1, 1))


class Curved(Denoiser):
    """A small smooth network."""

    def __init__(self):
        super().__init__()
        self.channels, self.size, self.schedule = 1, 8, Schedule.linear()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
        randomized(self.net)

    def forward(self, x, t):
        return self.net(x) * (1.0 + pixelwise(t) / 1000.0).to(x.dtype)


class GaussianDenoiser(Denoiser):
    """The optimal denoiser of independent pixels u ~ N(mean, v): eps = sigma (x - a mean) / (a^2 v + sigma^2)."""

    def __init__(self, mean=0.2, variance=0.3, channels=1, size=4):
        super().__init__()
        self.mean, self.variance, self.channels, self.size = mean, variance, channels, size
        self.schedule = Schedule.linear()
        self.calls = []

    def forward(self, x, t):
        t = pixelwise(t)
        self.calls.append(t)
        abar = self.schedule.at(t)
        total = abar * self.variance + 1 - abar
        return ((1 - abar).sqrt() / total).to(x.dtype) * (x - abar.sqrt().to(x.dtype) * self.mean)


def randomized(network, seed=0):
    """Random weights everywhere, also where a network starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


class Small(ResNetClassifier):
    """The same random weights in every process."""

    def __init__(self, seed=0):
        super().__init__(**RESNET)
        randomized(self, seed)


@pytest.fixture(scope="session")
def unet():
    return randomized(UNet(channels=1, size=8, width=8, multipliers=[1, 2], blocks=1, attention=[4], head_width=8))


@pytest.fixture(scope="session")
def classifier():
    return Small()


@pytest.fixture(scope="session")
def images():
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def fixed(images):
    return FixedNoise(torch.randn(images.shape, generator=torch.Generator().manual_seed(2)))


def written(path, settings):
    """Writes a configuration."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def training_on_digits(task, model, data, callbacks, **trainer):
    """A configuration; of each callback the arguments by its class."""
    named = [{"class_path": name, **arguments} for name, arguments in callbacks.items()]
    settings = {"model": {"class_path": task, **model}, "data": {"class_path": "Digits", **data}}
    return {**settings, "trainer": {**QUIET, "accelerator": "cpu", "callbacks": named, **trainer}}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that must be refused; returns its one line."""

    def call(function, *argv):
        name = {"evaluate": "eval.py", "train": "train.py"}[function.__name__]
        monkeypatch.setattr(sys, "argv", [name])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            function([str(word) for word in argv])
        assert stopped.value.code == 2
        # What the data leaves out is no error, and said once.
        lines = [line for line in capsys.readouterr().err.splitlines() if "class folders without images" not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{name}: error: ")
        return lines[0].removeprefix(f"{name}: error: ")

    return call


@pytest.fixture
def tiny(tmp_path):
    """Writes a configuration of small networks, with the defenses and the attacks given: what ``evaluate`` takes."""

    def write(defenses, attacks=None, gradients=None, samples=3):
        settings = {
            "classifier": "conftest.Small",
            "denoiser": "conftest.Curved",
            "defenses": defenses,
            "attacks": attacks or {"pgd": {"class_path": "PGD", "eps": 0.1, "steps": 2, "step_size": 0.1}},
            **({"gradients": gradients} if gradients else {}),
            "runs": 2,
            "chunk": 16,
            "gallery": 1,
            "data": {"class_path": "Digits", "subset": {"class_path": "First", "n": samples}},
            "trainer": {"logger": False, "accelerator": "cpu"},
        }
        return ["--config", str(written(tmp_path / "tiny.yaml", settings)), "--run", str(tmp_path / "run")]

    write.run = tmp_path / "run"
    return write
