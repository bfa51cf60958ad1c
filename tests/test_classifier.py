import errno
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import randomized
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, linear, relu

from lit_purify.errors import InputError, notice
from lit_purify.models import (
    Classifier,
    MatchedSchedule,
    ResNetClassifier,
    TimmClassifier,
    UNet,
    WideResNetClassifier,
    load_classifier,
    load_denoiser,
)
from lit_purify.models import classifier as classifier_module
from lit_purify.models.files import save_network
from lit_purify.models.weights import load_into, read_state_dict


def pictures(count=3, channels=3, size=16):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def with_statistics(network):
    """Random weights, and random running statistics in batch normalizations."""
    generator = torch.Generator().manual_seed(1)
    for module in randomized(network).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return network


def resnet(depth=8, size=16, width=4, channels=3, **options):
    return with_statistics(ResNetClassifier(depth, size, 10, channels=channels, width=width, **options))


class Small(nn.Module):
    """Someone's own network, with an activation that works in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Identity()
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean(dim=(2, 3)))


def plain_resnet(state, x):
    """Logits and the outputs of the three stages, from a state_dict alone (He et al. 2016, section 4.2, option A)."""

    def normalized_convolution(x, conv, bn, stride):
        x = conv2d(x, state[conv + ".weight"], stride=stride, padding=1)
        mean, var = state[bn + ".running_mean"], state[bn + ".running_var"]
        return batch_norm(x, mean, var, state[bn + ".weight"], state[bn + ".bias"], eps=1e-5)

    x = relu(normalized_convolution(x, "conv1", "bn1", 1))
    stages = []
    for stage in (1, 2, 3):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            h = relu(normalized_convolution(x, f"{name}.conv1", f"{name}.bn1", stride))
            h = normalized_convolution(h, f"{name}.conv2", f"{name}.bn2", 1)
            shortcut = torch.zeros_like(h)
            start = (h.shape[1] - x.shape[1]) // 2
            shortcut[:, start : start + x.shape[1]] = x[:, :, ::stride, ::stride]
            x, block = relu(h + shortcut), block + 1
        stages.append(x)
    return linear(adaptive_avg_pool2d(x, 1).flatten(1), state["linear.weight"], state["linear.bias"]), stages


# The wrapper.


def test_normalization_is_inside():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    image, network = pictures(), Small()
    normalized = torch.stack([(image[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    wrapped = Classifier(network, size=16, num_classes=10, mean=mean, std=std)
    assert torch.allclose(wrapped(image), network(normalized), atol=1e-6)
    assert torch.equal(Classifier(network, size=16, num_classes=10)(image), network(image))
    gray = Classifier(network, size=16, num_classes=10, mean=[0.5], std=[0.25])
    assert torch.allclose(gray(image), network(image * 4 - 2), atol=1e-6)
    assert set(wrapped.state_dict()) == {f"network.{name}" for name in network.state_dict()}


@pytest.mark.parametrize(
    "options",
    [{"mean": [0.1, 0.2]}, {"std": [1.0] * 4}, {"mean": [127.5], "std": [127.5]}, {"mean": [-0.1]}, {"std": [0.0]}],
)
def test_impossible_normalizations_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Classifier(Small(), size=16, num_classes=10, **options)


def test_networks_come_in_evaluation_mode(tmp_path):
    unet = UNet(1, 8, 8, [1])
    save_network(unet, tmp_path / "unet.safetensors")
    made = [Classifier(Small(), size=16, num_classes=10), ResNetClassifier(8, 16, 10), WideResNetClassifier(10, 1)]
    made += [TimmClassifier("test_resnet"), unet, MatchedSchedule(unet)]
    made += [load_denoiser(tmp_path / "unet.safetensors")]
    assert not any(module.training for network in made for module in network.modules())


# Features.


def test_features_are_the_outputs_of_the_modules():
    wrapped = resnet(mean=[0.5], std=[0.25])
    image = pictures()
    _, stages = plain_resnet(wrapped.network.state_dict(), image * 4 - 2)
    features = wrapped.features(image)
    assert [tuple(f.shape) for f in features] == [(3, 4, 16, 16), (3, 8, 8, 8), (3, 16, 4, 4)]
    for feature, stage in zip(features, stages, strict=True):
        assert torch.allclose(feature, stage, atol=1e-5)


def test_features_are_not_touched_by_later_modules_in_place():
    network = Small()
    image = pictures()
    conv, act = Classifier(network, size=16, num_classes=10, blocks=["conv", "act"]).features(image)
    assert torch.equal(conv, network.conv(image))
    assert torch.equal(act, relu(network.conv(image)))
    assert conv.min() < 0


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["layer9"], "no module 'layer9': name some of conv, act"),
        (["head"], "head returns"),
        (["unused"], "not call"),
        ([], "name"),
    ],
)
def test_blocks_that_make_no_mask_are_refused(blocks, message):
    with pytest.raises(InputError, match=message):
        Classifier(Small(), size=16, num_classes=10, blocks=blocks).features(pictures())


class Last(nn.Module):
    """Modules whose outputs are (B, h, w, C), as those of Swin transformers, and one that is (B, C, h, w)."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.last, self.first = nn.Conv2d(3, width, 1), nn.Identity(), nn.Identity()

    def forward(self, x):
        h = self.conv(x)
        return self.first(self.last(h.movedim(1, -1)).movedim(-1, 1)).mean(dim=(2, 3))


def test_channels_may_be_last():
    network, image = Last(5), pictures()
    found = Classifier(network, 16, 10, blocks=["last", "first"]).features(image)
    assert all(torch.equal(feature, network.conv(image)) for feature in found)
    # Where the shape does not show it, another block does, or the argument.
    network = Last(16)
    found = Classifier(network, 16, 10, blocks=["last"], layout="channels_last").features(image)
    assert torch.equal(found[0], network.conv(image))
    with pytest.raises(InputError, match=r"the axes of last, .* set layout"):
        Classifier(network, 16, 10, blocks=["last"]).features(image)
    # So do layers that only put out channels first.
    assert torch.equal(Classifier(network, 16, 10, blocks=["conv"]).features(image)[0], network.conv(image))


def test_what_a_network_puts_out_is_checked():
    image = pictures(2)

    def check(make):
        network = Small()
        network.forward = lambda x, forward=network.forward: make(forward(x))
        wrapped = Classifier(network, size=16, num_classes=10)
        wrapped.check_output(image)
        return wrapped(image)

    assert check(lambda out: SimpleNamespace(logits=out)).shape == (2, 10)
    for make, message in (
        (lambda out: out[:, :1], r"\(2, 1\) for 2 images, but logits \(2, 10\)"),
        (lambda out: (out, out), "tuple"),
        (lambda out: out[:, :, None, None], r"\(2, 10, 1, 1\)"),
        (lambda out: out.detach(), "no gradient"),
    ):
        with pytest.raises(InputError, match=message):
            check(make)


# ResNet.


@pytest.mark.parametrize(("depth", "size", "width", "channels"), [(20, 32, 16, 3), (14, 8, 4, 1), (8, 10, 3, 3)])
def test_resnet_agrees_with_a_plain_forward_pass(depth, size, width, channels):
    wrapped = resnet(depth, size, width, channels)
    image = pictures(2, channels, size)
    expected, _ = plain_resnet(wrapped.network.state_dict(), image)
    assert torch.allclose(wrapped(image), expected, atol=1e-5)
    assert expected.std() > 0.01


def test_resnet20_has_the_public_layout():
    state = ResNetClassifier(20, 32, 10).network.state_dict()
    convs = ["conv1", *(f"layer{s}.{b}.conv{i}" for s in (1, 2, 3) for b in range(3) for i in (1, 2))]
    norms = [name.replace("conv", "bn") for name in convs]
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{name}.weight" for name in convs} | {f"{name}.{what}" for name in norms for what in statistics}
    assert set(state) == expected | {"linear.weight", "linear.bias"}
    assert sum(p.numel() for p in ResNetClassifier(20, 32, 10).parameters()) == 269_722


# timm.


def test_timm_cnn_features():
    wrapped = TimmClassifier("test_resnet", num_classes=7, size=128)
    image = pictures(2, size=128)
    features = wrapped.features(image)
    assert wrapped(image).shape == (2, 7)
    assert len(features) >= 4
    assert all(f.ndim == 4 and f.shape[0] == 2 and f.shape[2] == f.shape[3] for f in features)
    assert [f.shape[-1] for f in features] == sorted((f.shape[-1] for f in features), reverse=True)
    assert torch.allclose(features[-1], wrapped.network.forward_features(wrapped.normalize(image)), atol=1e-5)
    named = TimmClassifier("test_resnet", num_classes=7, size=64, blocks=["layer4"])
    named.load_state_dict(wrapped.state_dict())
    assert torch.allclose(named.features(image)[0], features[-1], atol=1e-5)


def test_timm_transformer_features():
    wrapped = TimmClassifier("test_vit", num_classes=7, size=32, options={"img_size": 32}).eval()
    image = pictures(2, size=32)
    network, features = wrapped.network, wrapped.features(image)
    assert wrapped(image).shape == (2, 7)
    assert len(features) == len(network.blocks)
    assert {tuple(f.shape) for f in features} == {(2, network.embed_dim, 2, 2)}
    tokens = network.forward_features(wrapped.normalize(image))[:, network.num_prefix_tokens :]
    assert torch.allclose(network.norm(features[-1].flatten(2).transpose(1, 2)), tokens, atol=1e-5)
    with pytest.raises(InputError, match=r"blocks.0 returns .* a mask needs a tensor \(B, C, h, w\)"):
        TimmClassifier("test_vit", size=160, blocks=["blocks.0"]).features(pictures(1, size=160))


def test_timm_models_bring_their_own_settings():
    wrapped = TimmClassifier("test_resnet")
    assert wrapped.size == 160
    assert wrapped.mean.flatten().tolist() == pytest.approx(wrapped.network.pretrained_cfg["mean"])
    assert wrapped.std.flatten().tolist() == pytest.approx(wrapped.network.pretrained_cfg["std"])
    own = TimmClassifier("test_resnet", size=64, mean=[0.25], std=[0.75])
    assert (own.size, own.mean.item(), own.std.item()) == (64, 0.25, 0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet_of_mine"}, "no model 'resnet_of_mine': use "),
        ({"name": "test_resnet.of_mine"}, "of_mine"),
        ({"name": "test_resnet", "options": {"colour": 3}}, "colour"),
        ({"name": "test_resnet", "pretrained": True, "checkpoint": "some.pt"}, "choose one"),
    ],
)
def test_what_timm_cannot_make_is_told(arguments, message):
    with pytest.raises(InputError, match=message):
        TimmClassifier(**arguments)


def test_pretrained_weights_are_named_or_their_absence_is_told(monkeypatch):
    create = classifier_module.timm.create_model
    monkeypatch.setattr(classifier_module.timm, "create_model", lambda name, pretrained, **rest: create(name, **rest))
    assert TimmClassifier("test_resnet", pretrained=True).origin == "weights of timm (r160_in1k)"
    assert TimmClassifier("test_resnet").origin == "not loaded from a file"

    def fails(*args, **options):
        raise FileNotFoundError("cannot find the file on the hub")

    monkeypatch.setattr(classifier_module.timm, "create_model", fails)
    with pytest.raises(InputError, match="cannot be downloaded"):
        TimmClassifier("test_resnet", pretrained=True)


# Weights of others.


def behind(prefix, state):
    return {prefix + name: value for name, value in state.items()}


class Odd:
    """Something that a training keeps beside its weights, and that runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')",)


FORMS = {
    "plain": lambda s: s,
    "compiled, in DDP": lambda s: behind("module._orig_mod.", s),
    "averaged by torch": lambda s: {"n_averaged": torch.tensor(7), **behind("module.", s)},
    "Lightning": lambda s: {"state_dict": {**behind("net.", s), "criterion.weight": torch.ones(10)}, "epoch": 1},
    "train.py": lambda s: {"state_dict": behind("classifier.network.", s), "current_model_state": {}},
    "any one key": lambda s: {"my_weights": s, "classes": ["a"], "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "nested": lambda s: {"model": {"state_dict": s}, "step": torch.tensor(3)},
    "beside other values": lambda s: {**s, "epoch": 3, "args": SimpleNamespace(lr=0.1), "odd": Odd()},
    "in a list": lambda s: [s, {"state": {}}, 3],
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_as_wrappers_save_them_load(tmp_path, form):
    source = resnet()
    torch.save(FORMS[form](source.network.state_dict()), tmp_path / "w.pt")
    loaded = ResNetClassifier(8, 16, 10, width=4, checkpoint=tmp_path / "w.pt")
    assert torch.equal(loaded(pictures()), source(pictures()))
    assert loaded.title == "ResNet, w.pt"
    assert not loaded.training


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "0a1b"])
def test_safetensors_of_any_name_load(tmp_path, name):
    source = resnet()
    save_file(behind("model.", source.network.state_dict()), tmp_path / name)
    loaded = ResNetClassifier(8, 16, 10, width=4, checkpoint=tmp_path / name)
    assert torch.equal(loaded(pictures()), source(pictures()))


AVERAGES = {
    "timm": lambda last, average: {"state_dict": last, "state_dict_ema": average},
    "torchvision": lambda last, average: {
        "model": last,
        "model_ema": {"n_averaged": torch.tensor(3), **behind("module.", average)},
    },
    "Lightning": lambda last, average: {"state_dict": behind("net.", average), "current_model_state": last},
    "one module": lambda last, average: {"state_dict": {**behind("net.", last), **behind("net_ema.", average)}},
}


@pytest.mark.parametrize("form", AVERAGES)
def test_averages_are_read_and_stated(tmp_path, form, capsys):
    notice.cache_clear()
    last, average = resnet(), randomized(resnet(), seed=5)
    held = AVERAGES[form](last.network.state_dict(), average.network.state_dict())
    torch.save(held, tmp_path / "w.pt")
    for which, source in (("average", average), ("last", last)):
        loaded = ResNetClassifier(8, 16, 10, width=4, checkpoint=tmp_path / "w.pt", which=which)
        assert torch.equal(loaded(pictures()), source(pictures()))
        assert f"holds a network and its average: the {which} weights are read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda s: {**behind("a.", s), **behind("b.", s)}, "2 such networks, behind 'a.', 'b.'"),
        (lambda s: {"student": s, "teacher": s}, r"several state_dicts \(student, teacher\)"),
        (lambda s: behind("net.", {**s, "fc.bias": torch.zeros(1)}), "names match behind 'net.', 0 missing"),
    ],
)
def test_weights_in_doubt_are_refused(tmp_path, form, message):
    torch.save(form(resnet().network.state_dict()), tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        ResNetClassifier(8, 16, 10, width=4, checkpoint=tmp_path / "w.pt")


def test_half_precision_and_absent_counters_load(tmp_path):
    source = resnet()
    state = {n: v for n, v in source.network.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pt")
    read = read_state_dict(tmp_path / "half.pt")
    assert all(torch.equal(read[name], value.half().float()) for name, value in state.items())
    assert all(value.dtype == torch.float32 for value in read.values())
    ResNetClassifier(8, 16, 10, width=4, checkpoint=tmp_path / "half.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "no such file"),
        ("empty.pt", b"", "empty"),
        ("page.pt", b"\n <!DOCTYPE html><html>Sign in</html>", "HTML page"),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("garbage.pt", bytes(range(200)), "garbage.pt"),
        ("damaged.pt", b"\x80\x02\x8a\x0a\xfc\x9c", "cannot be read as weights"),
        ("garbage.safetensors", bytes(range(200)), "not a safetensors file"),
        ("harmful.pt", pickle.dumps({"state_dict": Odd()}), "refused"),
        ("list.pt", [1, 2], "holds no state_dict"),
        ("text.pt", {"state_dict": {"a": "b"}}, "holds no state_dict"),
        ("tensor.pt", torch.zeros(3), "holds no state_dict"),
        ("module.pt", resnet(), "save the state_dict alone"),
    ],
)
def test_files_that_are_no_weights_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    for read in (read_state_dict, lambda p: ResNetClassifier(8, 16, 10, checkpoint=p)):
        with pytest.raises(InputError, match=message) as raised:
            read(path)
        assert str(raised.value).startswith(str(path))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "tensors.safetensors"])
@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.999])
def test_incomplete_downloads_are_refused(tmp_path, name, part):
    path, state = tmp_path / name, resnet().network.state_dict()
    if path.suffix == ".pt":
        torch.save(state, path, _use_new_zipfile_serialization=name == "zip.pt")
    else:
        save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(InputError, match=str(path)):
        read_state_dict(path)


def without(state, name):
    return {n: v for n, v in state.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "conv1.weight"), r"1 missing \(conv1.weight\), 0 unexpected \(none\)"),
        (lambda s: {**s, "fc.bias": torch.zeros(1)}, r"0 missing \(none\), 1 unexpected \(fc.bias\)"),
        (lambda s: {**s, "linear.bias": torch.zeros(7)}, r"linear.bias has shape \(7,\), the network needs \(10,\)"),
        (lambda s: {"x": torch.zeros(1)}, "0 names match"),
    ],
)
def test_weights_of_another_network_are_refused_as_a_whole(change, message):
    state, network = resnet().network.state_dict(), ResNetClassifier(8, 16, 10, width=4).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=message) as raised:
        load_into(network, change(state), "file.pt")
    assert str(raised.value).startswith("file.pt: ")
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# Our own files.

VIT = {"options": {"img_size": 16}, "blocks": ["patch_embed"]}


@pytest.fixture
def denoiser_file(tmp_path, unet):
    save_network(unet, tmp_path / "denoiser.safetensors")
    return tmp_path / "denoiser.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("make", "load"),
    [
        (lambda: resnet(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]), load_classifier),
        (lambda: with_statistics(TimmClassifier("test_vit", 10, 16, mean=[0.3], std=[0.6], **VIT)), load_classifier),
        (lambda: randomized(UNet(3, 16, 8, [1, 2], attention=[8])), load_denoiser),
    ],
)
def test_files_round_trip(tmp_path, make, load, dtype):
    source, path = make(), tmp_path / "new" / "some.safetensors"
    save_network(source, path, {"step": 3}, dtype)
    state, inputs = torch.random.get_rng_state(), (pictures(),)
    loaded = load(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded) is type(source)
    assert not loaded.training
    assert loaded.arguments == source.arguments
    assert loaded.origin == "some.safetensors"
    assert loaded.title.endswith(", some.safetensors")
    if load is load_classifier:
        assert loaded.blocks == source.blocks
    else:
        inputs += (torch.tensor([1, 30, 900]),)
    (source.network if load is load_classifier else source).to(dtype).float()
    assert torch.equal(loaded(*inputs), source(*inputs))
    assert [p.name for p in path.parent.iterdir()] == ["some.safetensors"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "some.safetensors"
    save_network(resnet(), path)
    before = path.read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_network(resnet(width=8), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_networks_that_no_configuration_rebuilds_are_not_saved(tmp_path):
    with pytest.raises(InputError, match="Classifier is built from other objects"):
        save_network(Classifier(Small(), size=16, num_classes=10), tmp_path / "some.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_wrong_kind_is_refused(tmp_path, denoiser_file):
    save_network(resnet(), tmp_path / "classifier.safetensors")
    with pytest.raises(InputError, match="holds a UNet, but a classifier is needed"):
        load_classifier(denoiser_file)
    with pytest.raises(InputError, match="holds a ResNetClassifier, but a denoiser is needed"):
        load_denoiser(tmp_path / "classifier.safetensors")


def rewritten(path, old, new):
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder; load_diffusers reads folders of diffusers"),
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "not a safetensors file"),
        (lambda p: torch.save({}, p), "not a safetensors file"),
        (lambda p: save_file({"a": torch.ones(1)}, p), "carries no configuration"),
        (
            lambda p: rewritten(p, b"models.unet.UNet", b"models.unet.VNet"),
            "its class lit_purify.models.unet.VNet is not installed",
        ),
        (lambda p: rewritten(p, b"multipliers", b"multiplyers"), "another version of UNet"),
        (lambda p: rewritten(p, b"stem.bias", b"stem.biaz"), r"1 missing \(stem.bias\), 1 unexpected \(stem.biaz\)"),
    ],
)
def test_damaged_files_of_ours_are_refused(denoiser_file, damage, message):
    damage(denoiser_file)
    with pytest.raises(InputError, match=message) as raised:
        load_denoiser(denoiser_file)
    assert str(raised.value).startswith(str(denoiser_file))
    assert "\n" not in str(raised.value)
