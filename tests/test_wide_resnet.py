"""Wide ResNets in three public layouts against plain forward passes; weights of torchvision and timm."""

import math

import pytest
import torch
import torchvision
from conftest import randomized
from safetensors.torch import save_file
from test_classifier import pictures, without
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, linear, pad, relu, silu

from lit_purify.errors import InputError
from lit_purify.models import Classifier, TimmClassifier, WideResNetClassifier, load_classifier, wide_resnet
from lit_purify.models.files import save_network

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
# Names of a stem, a block's parts, what follows the blocks; "{g}" is the group and "{b}" the block, from 0.
LAYOUTS = {
    "robustbench": {
        "stem": "conv1.weight",
        "norms": ("block{G}.layer.{b}.bn1", "block{G}.layer.{b}.bn2"),
        "convs": ("block{G}.layer.{b}.conv1.weight", "block{G}.layer.{b}.conv2.weight"),
        "shortcut": "block{G}.layer.{b}.convShortcut.weight",
        "norm": "bn1",
        "head": "fc",
    },
    "deepmind": {
        "stem": "init_conv.weight",
        "norms": ("layer.{g}.block.{b}.batchnorm_0", "layer.{g}.block.{b}.batchnorm_1"),
        "convs": ("layer.{g}.block.{b}.conv_0.weight", "layer.{g}.block.{b}.conv_1.weight"),
        "shortcut": "layer.{g}.block.{b}.shortcut.weight",
        "norm": "batchnorm",
        "head": "logits",
    },
    "authors": {
        "stem": "conv0",
        "norms": ("group{g}.block{b}.bn0", "group{g}.block{b}.bn1"),
        "convs": ("group{g}.block{b}.conv0", "group{g}.block{b}.conv1"),
        "shortcut": "group{g}.block{b}.convdim",
        "norm": "bn",
        "head": "fc",
    },
}
NORMALIZED = {"robustbench": {}, "deepmind": {"mean": MEAN, "std": STD}, "authors": {"mean": MEAN, "std": STD}}


def named(name, group, block):
    return name.format(g=group, G=group + 1, b=block)


def shapes(layout, depth, width, classes=10, channels=3):
    """Name and shape of every tensor of a file (Zagoruyko & Komodakis 2016, table 1, basic blocks)."""
    names, found = LAYOUTS[layout], {}

    def norm(name, size):
        for what in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{what}"] = (size,)
        if layout != "authors":
            found[f"{name}.num_batches_tracked"] = ()

    found[names["stem"]] = (16, channels, 3, 3)
    before = 16
    for group in range(3):
        after = 16 * width * 2**group
        for block in range((depth - 4) // 6):
            for part in range(2):
                entering = before if part == 0 else after
                norm(named(names["norms"][part], group, block), entering)
                found[named(names["convs"][part], group, block)] = (after, entering, 3, 3)
            if before != after:
                found[named(names["shortcut"], group, block)] = (after, before, 1, 1)
            before = after
    norm(names["norm"], before)
    found[names["head"] + ".weight"], found[names["head"] + ".bias"] = (classes, before), (classes,)
    return found


def weights(layout, depth=10, width=2, **options):
    generator, state = torch.Generator().manual_seed(3), {}
    for name, shape in shapes(layout, depth, width, **options).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            scale = 0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            state[name] = torch.randn(shape, generator=generator) * scale
    return state


def plain_forward(layout, state, x, activation):
    """Logits and outputs of the three groups, from a file's dictionary alone."""
    names = LAYOUTS[layout]

    def active(x, name):
        mean, var, weight, bias = (state[f"{name}.{w}"] for w in ("running_mean", "running_var", "weight", "bias"))
        return activation(batch_norm(x, mean, var, weight, bias, eps=1e-5))

    x, groups = conv2d(x, state[names["stem"]], padding=1), []
    for group in range(3):
        block = 0
        while named(names["convs"][0], group, block) in state:
            stride = 2 if group > 0 and block == 0 else 1
            h = active(x, named(names["norms"][0], group, block))
            shortcut = named(names["shortcut"], group, block)
            x = conv2d(h, state[shortcut], stride=stride) if shortcut in state else x
            # TensorFlow's SAME: an even width needs one zero in all at stride 2, which goes to the end.
            h = pad(h, (0, 1, 0, 1) if layout == "deepmind" and stride == 2 else (1, 1, 1, 1))
            h = conv2d(h, state[named(names["convs"][0], group, block)], stride=stride)
            h = active(h, named(names["norms"][1], group, block))
            x = x + conv2d(h, state[named(names["convs"][1], group, block)], padding=1)
            block += 1
        groups.append(x)
    pooled = adaptive_avg_pool2d(active(x, names["norm"]), 1).flatten(1)
    return linear(pooled, state[names["head"] + ".weight"], state[names["head"] + ".bias"]), groups


def loaded(path, content, depth=10, width=2, size=16, **options):
    torch.save(content, path)
    return WideResNetClassifier(depth, width, size, checkpoint=path, **options).eval()


# The three layouts.


@pytest.mark.parametrize("activation", [relu, silu])
@pytest.mark.parametrize(("layout", "depth", "width"), [(name, 10, 2) for name in LAYOUTS] + [("deepmind", 16, 1)])
def test_logits_and_groups_are_those_of_the_layout(tmp_path, layout, depth, width, activation):
    state, image = weights(layout, depth, width), pictures()
    options = {"activation": activation.__name__, **NORMALIZED[layout]}
    classifier = loaded(tmp_path / "w.pt", {"state_dict": state}, depth, width, **options)
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        classifier, x = classifier.to(dtype), image.to(dtype)
        exact = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        expected, groups = plain_forward(layout, exact, (x - classifier.mean) / classifier.std, activation)
        assert expected.std() > 0.05
        assert torch.allclose(classifier(x), expected, rtol=0, atol=atol)
        for feature, group in zip(classifier.features(x), groups, strict=True):
            assert torch.allclose(feature, group, rtol=atol, atol=atol)
    assert classifier.mean.flatten().tolist() == pytest.approx(options.get("mean", [0.0]))
    assert classifier.title == "WideResNet, w.pt"


@pytest.mark.parametrize(("depth", "width", "parameters"), [(28, 10, 36_479_194), (70, 16, 266_796_506)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_sizes_are_read_in_every_key(monkeypatch, layout, depth, width, parameters):
    files = {name: torch.empty(shape, device="meta") for name, shape in shapes(layout, depth, width).items()}
    monkeypatch.setattr(wide_resnet, "read_state_dict", lambda path, which: files)
    with torch.device("meta"):
        classifier = WideResNetClassifier(depth, width, checkpoint="some.pt", **NORMALIZED[layout])
    learned = [v for k, v in files.items() if not k.rpartition(".")[2].startswith(("running", "num"))]
    assert sum(v.numel() for v in learned) == parameters
    assert sum(p.numel() for p in classifier.parameters()) == parameters
    counters = 0 if layout != "authors" else sum(k.endswith("tracked") for k in classifier.state_dict())
    assert len(files) + counters == len(classifier.state_dict())
    if layout == "robustbench":
        assert set(classifier.network.state_dict()) == set(files)


def test_other_channels_classes_and_odd_sizes(tmp_path):
    state, image = weights("robustbench", classes=7, channels=1), pictures(2, 1, 14)
    classifier = loaded(tmp_path / "w.pt", state, size=14, num_classes=7, channels=1)
    assert torch.allclose(classifier(image), plain_forward("robustbench", state, image, relu)[0], atol=1e-5)


def test_a_sub_block_that_no_forward_pass_calls_is_left_out(tmp_path):
    state = weights("robustbench")
    unused = {f"module.sub_{name}": value for name, value in state.items() if name.startswith("block1.")}
    content = {**unused, **{f"module.{name}": value for name, value in state.items()}}
    classifier = loaded(tmp_path / "w.pt", {"state_dict": content})
    assert torch.allclose(classifier(pictures()), plain_forward("robustbench", state, pictures(), relu)[0], atol=1e-5)


# Normalization in the file.


@pytest.mark.parametrize(("names", "shape"), [(("mu", "sigma"), (1, 3, 1, 1)), (("mean", "std"), (3, 1, 1))])
@pytest.mark.parametrize("prefix", ["", "module.", "module.0."])
def test_normalization_in_the_file(tmp_path, names, shape, prefix):
    state = weights("deepmind")
    held = {name: torch.tensor(v).reshape(shape) for name, v in zip(names, (MEAN, STD), strict=True)}
    content = {prefix + name: value for name, value in {**state, **held}.items()}
    for options in ({}, {"mean": MEAN, "std": STD}):
        classifier = loaded(tmp_path / "w.pt", content, **options)
        assert classifier.mean.flatten().tolist() == pytest.approx(MEAN)
        assert classifier.std.flatten().tolist() == pytest.approx(STD)
    for argument, value in (("mean", [0.5]), ("std", [0.2471, 0.2435]), ("mean", [0.4914, 0.4822, 0.4465 + 1e-4])):
        with pytest.raises(InputError, match=rf"w.pt: .* {argument} = \[.*leave the argument out"):
            loaded(tmp_path / "w.pt", content, **{argument: value})


@pytest.mark.parametrize("given", [{}, {"mean": [0.5]}, {"std": [0.5]}])
@pytest.mark.parametrize(("layout", "prefix"), [("deepmind", ""), ("authors", ""), ("robustbench", "1.")])
def test_a_normalization_that_nothing_tells_must_be_given(tmp_path, layout, prefix, given):
    content = {prefix + name: value for name, value in weights(layout).items()}
    with pytest.raises(InputError, match=r"w.pt: .*give mean and std, for CIFAR-10 \[0.4914"):
        loaded(tmp_path / "w.pt", content, **given)


# Refusals.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (lambda s, n: without(s, n["stem"]), {}, r"1 missing \(conv1.weight\), 0 unexpected \(none\)"),
        (lambda s, n: {**s, "extra.weight": torch.zeros(1)}, {}, r"0 missing \(none\), 1 unexpected \(extra.weight\)"),
        (lambda s, n: without(s, n["norm"] + ".running_var"), {}, r"1 missing \(bn1.running_var\)"),
        (lambda s, n: s, {"depth": 16}, r"30 missing \(block1.layer.1.bn1.weight, .*\), 0 unexpected"),
        (lambda s, n: s, {"width": 3}, r"has shape \(32, 16, 3, 3\), the network needs \(48, 16, 3, 3\)"),
        (lambda s, n: s, {"num_classes": 100}, r"fc.weight has shape \(10, 128\), the network needs \(100, 128\)"),
        (lambda s, n: {**s, "0." + n["stem"]: s[n["stem"]]}, {}, r"1 unexpected"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, layout, change, size, message):
    content = change(weights(layout), LAYOUTS[layout])
    with pytest.raises(InputError, match=message) as raised:
        loaded(tmp_path / "w.pt", content, **{"mean": MEAN, "std": STD, **size})
    assert str(raised.value).startswith(str(tmp_path / "w.pt: "))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "depth = 20 is not 6 n"),
        ({"depth": 4}, "depth = 4 is not 6 n"),
        ({"activation": "gelu"}, "activation = 'gelu': use relu or silu"),
        ({"padding": "same", "size": 30}, "size = 30: padding = 'same' needs a multiple of 4"),
        ({"mean": [0.1, 0.2]}, "mean has 2 values"),
        ({"blocks": ["layer1"]}, "no module 'layer1'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        WideResNetClassifier(**{"depth": 10, "width": 1, **arguments})


# Our own files.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_round_trip(tmp_path, layout):
    options = {"activation": "silu", "blocks": ["block1", "block3.layer.0"], "mean": MEAN, "std": STD}
    source = loaded(tmp_path / "w.pt", weights(layout), **options)
    path = tmp_path / "some.safetensors"
    save_network(source, path)
    again = load_classifier(path)
    assert again.arguments == source.arguments | {"checkpoint": None}
    assert again.arguments["padding"] == ("same" if layout == "deepmind" else "symmetric")
    assert again.blocks == options["blocks"]
    assert torch.equal(again(pictures()), source(pictures()))
    # As weights without their configuration, too: the padding shows in the names.
    assert torch.equal(
        WideResNetClassifier(10, 2, 16, checkpoint=path, **options).eval()(pictures()), again(pictures())
    )
    wrong = "symmetric" if layout == "deepmind" else "same"
    with pytest.raises(InputError, match=f"need padding = '{again.arguments['padding']}'"):
        WideResNetClassifier(10, 2, 16, checkpoint=path, padding=wrong, **options)
    if layout == "deepmind":
        with pytest.raises(InputError, match="give mean and std"):
            WideResNetClassifier(10, 2, 16, checkpoint=path)


# Weights of torchvision and timm.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_torchvision_load_there_and_in_timm(tmp_path, suffix):
    """The two write one ResNet-18 under the same names: what one reads right, the other confirms."""
    source, image = randomized(torchvision.models.resnet18(num_classes=7)), pictures(2, size=64)
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    path, mean, std = tmp_path / f"w{suffix}", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    expected = source((image - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1))
    own = torchvision.models.resnet18(num_classes=7)
    blocks = ["layer1", "layer2", "layer3", "layer4"]
    first = Classifier(own, size=64, num_classes=7, mean=mean, std=std, blocks=blocks, checkpoint=path).eval()
    second = TimmClassifier("resnet18", 7, 64, checkpoint=path).eval()
    assert torch.allclose(first(image), expected, rtol=1e-5)
    assert torch.allclose(second(image), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert [f.shape[1] for f in first.features(image)] == [64, 128, 256, 512]
    with pytest.raises(InputError, match=r"fc.\w+ has shape \(7\D.*, the network needs \(1000,"):
        TimmClassifier("resnet18", checkpoint=path)
