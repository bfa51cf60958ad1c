"""Published protocols: each configuration runs with small networks in the layouts it names, and refuses without."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_files import CASES
from test_configs import made_evaluator
from test_wide_resnet import weights
from torch import nn

import lit_purify as lp
from lit_purify.cli import evaluate
from lit_purify.cli.settings import evaluation_parser, load
from lit_purify.functional.schedule import Schedule

FOLDER = Path(__file__).parent.parent / "configs" / "eval" / "protocols"
PROTOCOLS = {path.stem: load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
LAYOUTS = {"Standard.pt": "robustbench", "svhn_wrn28_10.pt": "authors", "wresnet-70-16.pt": "deepmind"}
LAYOUTS["wrn-70-16-dropout.pt"] = "robustbench"
DIALECTS = {"checkpoint_8.pth": "DDPM++", "256x256_diffusion_uncond.pt": "guided", "svhn_ddpm.pt": "ddpm, list"}


class Small(nn.Sequential):
    """In place of a ResNet-50."""

    def __init__(self):
        super().__init__()
        for k, width in enumerate((3, 4, 4, 4)):
            self.add_module(f"layer{k + 1}", nn.Conv2d(width, 4, 3, stride=2, padding=1))
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten())
        self.add_module("fc", nn.Linear(4, 1000))


def nodes(node):
    """Every class with its arguments, at any depth."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node
        for value in node.values():
            yield from nodes(value)


def named_files(settings):
    """What reads each file of weights."""
    found = {}
    for node in nodes(settings):
        for key in ("path", "checkpoint"):
            if key in node.get("init_args", {}):
                found[Path(node["init_args"][key]).name] = node["class_path"].rpartition(".")[2]
    return found


def shrunk(settings, folder):
    """The same protocol with networks and numbers of everything made small."""
    settings = copy.deepcopy(settings)
    for node in list(nodes(settings)):
        kind, args = node["class_path"].rpartition(".")[2], node.get("init_args", {})
        for key, value in args.items():
            if key in ("size", "resize"):
                args[key] = {224: 28, 256: 32}.get(value, value)
            elif key == "steps" and not kind.startswith("load_"):
                most = 1 if "eot" in args else 2 if kind in ("Surrogate", "BPDA") else 3
                args[key] = [1] * len(value) if isinstance(value, list) else min(value, most)
            elif key in ("eot", "targets"):
                args[key] = min(value, 2 if "aggregate" in args else 1)
            elif key in ("path", "checkpoint"):
                args[key] = str(write_weights(Path(value).name, folder))
            elif value == "torchvision.models.resnet50":
                args[key] = "test_protocols.Small"
        if kind == "WideResNetClassifier":
            args["width"] = 1
        elif kind == "TimmClassifier":
            args |= {"name": "test_vit", "options": {"img_size": args["size"], "patch_size": 14}}
            del args["checkpoint"]
    return settings


def write_weights(name, folder):
    """A small network's file, in the layout of the public one of that name."""
    path = folder / name
    if path.exists():
        return path
    if name in DIALECTS:
        CASES[DIALECTS[name]].file(folder).rename(path)
    elif name in LAYOUTS:
        torch.save(weights(LAYOUTS[name], 70 if "70" in name else 28, 1), path)
    else:
        torch.save(Small().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory):
    """Protocols share their files of weights."""
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_runs_in_the_small(name, weights_folder):
    """Every attack is made, the first one runs."""
    settings = shrunk(PROTOCOLS[name], weights_folder)
    made = instantiated(settings)
    rows = made_evaluator(made).describe()
    assert [(row["defense"], row["attack"]) for row in rows] == [
        (defense, attack) for defense in settings["defenses"] for attack in settings["attacks"]
    ]
    for row in rows:
        assert (row["gradient"] in ("exact", "none")) == (row["attack"] not in settings.get("gradients", {}))
    size, first = settings["data"]["init_args"].get("size", 32), rows[0]["attack"]
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    defenses = {key: make(made.denoiser) for key, make in made.defenses.items()}
    gradients = {first: made.gradients[first]} if first in (made.gradients or {}) else None
    small = {"runs": 1, "chunk": 1, "gradients": gradients, "progress": False}
    result = lp.evaluate(
        made.classifier, defenses, {first: made.attacks[first]}, image, torch.zeros(1, dtype=torch.int64), **small
    )
    assert (result.records[0].defense, result.records[0].attack) == (rows[0]["defense"], first)


def instantiated(settings):
    """The parser changes what it is given."""
    parser = evaluation_parser()
    return parser.instantiate(parser.parse_object(copy.deepcopy(settings)))


@pytest.mark.parametrize("name", ["pei_svhn", "diffpure_imagenet"])
def test_missing_weights_are_named_before_images_are_fetched(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    line = refused(evaluate, "--config", FOLDER / f"{name}.yaml")
    file = next(iter(named_files(PROTOCOLS[name])))
    assert f"checkpoints/{file}: no such file; " in line
    assert "docs/protocols.md lists" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_file_of_weights_is_explained(name):
    found, table = named_files(PROTOCOLS[name]), Path("docs/protocols.md").read_text()
    assert len(found) == 2
    for file in found:
        assert f"`{file}`" in table, file


def release(steps, strength):
    """The levels that the code of Pei et al. walks: its indices count from 0."""
    return (np.arange(0, 999, 1000 // steps)[: int(steps * strength) + 1][::-1] + 1).tolist()


# The levels whose noise-to-signal ratio is in the range that is drawn from.
SIGMAS = [t for t, abar in enumerate(Schedule.linear().abar.tolist()) if 0.4 <= (1 / abar - 1) ** 0.5 <= 0.6]
LEE_KIM = {"cifar10": (470, 125), "svhn": (380, 80), "imagenet": (620, 200)}
COSTS = {
    **{
        f"lee_kim_{data}": ("pgd", nfe, 7, [30, 50, *range(last, 0, -last // 5)])
        for data, (nfe, last) in LEE_KIM.items()
    },
    "pei_cifar10": ("pgd", 150, 3, [200, 100]),
    "pei_imagenet": ("pgd", 300, 6, [400, 300, 200, 100]),
    "pei_cifar10_compat": ("pgd", 100, 2, release(10, 0.2)[:-1]),
    "pei_imagenet_compat": ("pgd", 200, 4, release(10, 0.4)[:-1]),
    "diffpure_cifar10": ("aa_ce", 100, 100, list(range(100, 0, -1))),
    "diffbreak_imagenet": ("apgd", 150, 150, list(range(150, 0, -1))),
    "diffhammer_cifar10": ("apgd_ce", 10, 10, list(range(100, 0, -10))),
    "diffhammer_cifar10_gdmp": ("diffhammer", 24, 24, [36, 30, 24, 18, 12, 6] * 4),
    "diffhammer_cifar10_likelihood": ("diffhammer", 5, 5, [SIGMAS[-1]] * 5),
    "freqpure_cifar10": ("pgd", 100, 1, [100]),
}


@pytest.mark.parametrize("name", COSTS)
def test_calls_and_levels_are_the_published_ones(name):
    attack, nfe_defense, nfe_attack, levels = COSTS[name]
    networks = {"denoiser": "conftest.GaussianDenoiser"}
    networks["classifier"] = {"class_path": "WideResNetClassifier", "init_args": {"depth": 10, "width": 1}}
    evaluator = made_evaluator(instantiated(PROTOCOLS[name] | networks))
    (row,) = [row for row in evaluator.describe() if row["attack"] == attack]
    assert (row["nfe_defense"], row["nfe_attack"], row["attack_levels"]) == (nfe_defense, nfe_attack, levels)
    if name.endswith("compat"):
        (defended,) = evaluator.defenses.values()
        walked = release(500, 0.2 if "cifar" in name else 0.4)
        assert [*defended.purifier.levels, defended.purifier.end] == walked


PGD_LONG, PGD_SHORT, AA = (200, 20), (20, 20), (100, 20)
PEI = {"pgd": ("8/255", *PGD_LONG), "pgd_l2": (0.5, *PGD_LONG), "bpda": ("8/255", *PGD_LONG)}
PEI |= {"aa_ce": ("8/255", *AA), "aa_dlr": ("8/255", *AA)}
STANDARD = {"aa_ce": AA, "aa_dlr": AA, "aa_ce_1": (100, 1), "aa_t": (100, 1), "square": (5000, 1)}
DIFFHAMMER = {f"apgd_{loss}": ("8/255", 50, 1) for loss in ("margin", "ce", "dlr")} | {"diffhammer": ("8/255", 50, 10)}
# Votes or runs, images, and of each attack its bound, steps and EOT.
NUMBERS = {
    "lee_kim_cifar10": (10, 512, {name: PEI[name] for name in ("pgd", "pgd_l2", "bpda")}),
    "lee_kim_svhn": (10, 512, {"pgd": ("8/255", *PGD_LONG)}),
    "lee_kim_imagenet": (10, 512, {"pgd": ("4/255", *PGD_SHORT)}),
    "pei_cifar10": (20, 512, PEI),
    "pei_cifar10_compat": (20, 512, PEI),
    "pei_svhn": (20, 512, {"pgd": ("8/255", *PGD_LONG)}),
    "pei_imagenet": (20, 512, {"pgd": ("4/255", *PGD_SHORT)}),
    "pei_imagenet_compat": (20, 512, {"pgd": ("8/255", *PGD_SHORT)}),
    "diffpure_cifar10": (10, 64, {name: ("8/255", *most) for name, most in STANDARD.items()}),
    "diffpure_imagenet": (10, 16, {name: ("4/255", *most) for name, most in STANDARD.items()}),
    "diffbreak_cifar10": (10, 256, {"apgd": ("8/255", 100, 10)}),
    "diffbreak_imagenet": (8, 256, {"apgd": ("4/255", 100, 16)}),
    "diffhammer_cifar10": (10, 512, DIFFHAMMER),
    "diffhammer_cifar10_gdmp": (10, 512, {"diffhammer": ("8/255", 50, 10)}),
    "freqpure_cifar10": (10, 512, {"pgd": ("8/255", *PGD_LONG)}),
}
NUMBERS["diffhammer_cifar10_likelihood"] = NUMBERS["diffhammer_cifar10_gdmp"]
# What steers the purifiers: each level, U, tau or the masked fraction.
STEERED = {
    "lee_kim_cifar10": {"level": [30] * 4 + [50] * 2 + [125] * 2, "sampler": "ddpm"},
    "lee_kim_svhn": {"level": [30] * 4 + [50] * 2 + [80] * 2, "sampler": "ddpm"},
    "lee_kim_imagenet": {"level": [30] * 4 + [50] * 2 + [200] * 2, "sampler": "ddpm"},
    "pei_cifar10": {"high": 200, "low": 100, "jump": 3, "tau": 0.9, "resampling": "single"},
    "pei_cifar10_compat": {"high": 201, "low": 101, "jump": 3, "tau": 0.9, "resampling": "release", "end": 1},
    "pei_svhn": {"high": 200, "low": 100, "jump": 3, "tau": 0.9, "resampling": "single"},
    "pei_imagenet": {"high": 400, "low": 200, "jump": 3, "fraction": 0.15, "resampling": "single"},
    "pei_imagenet_compat": {"high": 401, "low": 201, "jump": 3, "fraction": 0.15, "resampling": "release", "end": 1},
    "diffpure_cifar10": {"level": 100, "steps": 100, "sampler": "sde"},
    "diffpure_imagenet": {"level": 150, "steps": 150, "sampler": "sde"},
    "diffbreak_cifar10": {"level": 100, "steps": 100, "sampler": "sde"},
    "diffbreak_imagenet": {"level": 150, "steps": 150, "sampler": "sde"},
    "diffhammer_cifar10": {"level": 100, "steps": 10, "sampler": "ddpm"},
    "diffhammer_cifar10_gdmp": {"level": 36, "steps": 6, "rounds": 4, "guidance": 2e-3 * 255 / 8},
    "diffhammer_cifar10_likelihood": {"low": SIGMAS[0], "high": SIGMAS[-1], "steps": 5, "rate": 0.1},
    "freqpure_cifar10": {"level": [100], "steps": [100], "radius": 10.0, "phase": 0.3},
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_numbers_are_the_published_ones(name):
    task, data = PROTOCOLS[name], PROTOCOLS[name]["data"]["init_args"]
    runs, count, attacks = NUMBERS[name]
    assert (task["runs"], data["subset"]["init_args"]["n"]) == (runs, count)
    found = {key: each["init_args"] for key, each in task["attacks"].items()}
    found = {key: each["attack"]["init_args"] if "attack" in each else each for key, each in found.items()}
    assert {key: (each["eps"], each["steps"], each["eot"]) for key, each in found.items()} == attacks
    assert all(each["norm"] == ("l2" if each["eps"] == 0.5 else "linf") for each in found.values())
    assert all(each.get("step_size", 0.007) == 0.007 for each in found.values())
    (purifier,) = task["defenses"].values()
    given = [node["init_args"] for node in nodes(purifier)]
    for key, value in STEERED[name].items():
        assert value in [args[key] for args in given if key in args], key
