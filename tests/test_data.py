import hashlib
import io
import os
import pickle
import struct
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from conftest import QUIET
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from processes import CONTEXT
from scipy.io import savemat
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision import datasets

from lit_purify.data import (
    CIFAR10,
    SVHN,
    Balanced,
    CIFAR10Folder,
    Digits,
    First,
    ImageDataModule,
    ImageDataset,
    ImageFolder,
    ImageNet,
    IndexFile,
    RandomChoice,
    RandomDraws,
)
from lit_purify.data.folder import read_image
from lit_purify.errors import InputError, notice

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar10(root):
    """The original's files with 10 images in each of its 6 batches; returns the images and labels of each part."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    parts = {"train": ([], []), "test": ([], [])}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data, labels = random.randint(0, 256, (10, 3072), dtype=np.uint8), random.permutation(10).tolist()
        (folder / name).write_bytes(pickle.dumps({"batch_label": name, "data": data, "labels": labels}))
        images, known = parts["test" if name == "test_batch" else "train"]
        images.extend(data.reshape(10, 3, 32, 32))
        known.extend(labels)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10_CLASSES, "num_vis": 3072}))
    return parts


def write_svhn(root):
    """The original's files, 30 and 12 images, with its label 10 for the digit 0; returns images and digits."""
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    parts = {}
    for name, count in (("train", 30), ("test", 12)):
        images = random.randint(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8).reshape(-1, 1) % 10 + 1
        savemat(root / f"{name}_32x32.mat", {"X": images, "y": labels})
        parts[name] = (images.transpose(3, 2, 0, 1), labels.ravel() % 10)
    return parts


def write_folders(root, counts):
    """A folder for every key, with so many 8x8 images, each in a gray of its own; returns the folder of every gray."""
    folder_of = {}
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            gray = len(folder_of)
            folder_of[gray] = folder
            Image.new("RGB", (8, 8), (gray, gray, gray)).save(root / folder / f"{i:03d}.png")
    return folder_of


@pytest.fixture
def any_md5(monkeypatch):
    """Torchvision accepts files of the right names with any content."""
    for module in (datasets.cifar, datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def grays(split):
    """Which of the images of ``write_folders`` a split holds, in order."""
    return [round(float(sample["image"][0, 0, 0]) * 255) for sample in samples(split)]


def samples(split):
    return [split[i] for i in range(len(split))]


def as_bytes(split):
    return np.stack([(sample["image"] * 255).round().byte().numpy() for sample in samples(split)])


def positions(loader):
    return [int(i) for batch in loader for i in batch["index"]]


def on_rank(data, world_size, rank):
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    return data


class Numbers(ImageDataModule):
    """Images that hold their own number."""

    def __init__(self, count=100, **options):
        super().__init__(**options)
        self.count = count

    def split(self, name):
        return ImageDataset.whole(constant_image, [i % 10 for i in range(self.count)], [str(c) for c in range(10)])


def constant_image(item):
    return torch.full((1, 2, 2), item / 1000)


@pytest.fixture(params=["digits", "cifar10", "cifar10 in folders", "svhn", "imagenet", "folder"])
def every(request, tmp_path, any_md5):
    """Each datamodule in turn, with the shape of its images."""
    if request.param == "digits":
        return Digits(batch_size=3), (1, 8, 8)
    if request.param == "cifar10":
        write_cifar10(tmp_path)
        return CIFAR10(tmp_path, batch_size=3), (3, 32, 32)
    if request.param == "cifar10 in folders":
        write_folders(tmp_path, {f"{part}/{name}": 2 for part in ("train", "test") for name in CIFAR10_CLASSES})
        return CIFAR10Folder(tmp_path, size=32, batch_size=3), (3, 32, 32)
    if request.param == "svhn":
        write_svhn(tmp_path)
        return SVHN(tmp_path, batch_size=3), (3, 32, 32)
    write_folders(tmp_path, {"n01440764": 10, "n15075141": 10})
    if request.param == "imagenet":
        return ImageNet(tmp_path, size=16, batch_size=3, test_fraction=0.5), (3, 16, 16)
    return ImageFolder(tmp_path, channels=1, batch_size=3, test_fraction=0.5), (1, 8, 8)


# Batches and splits that every datamodule has.


def test_batches(every):
    data, shape = every
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert set(batch) == {"image", "label", "index"}
        assert batch["image"].shape[1:] == shape
        assert batch["image"].dtype == torch.float32
        assert batch["image"].min() >= 0
        assert 0.01 < batch["image"].max() <= 1
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        assert batch["label"].shape == batch["index"].shape == (len(batch["image"]),)
        assert batch["label"].min() >= 0
        assert batch["label"].max() < len(data.classes)


def test_index_does_not_depend_on_subset_or_batch_size(every):
    data, _ = every
    whole = data.split("test")
    assert positions(data.val_dataloader()) == list(range(len(data.split("val"))))
    for subset, batch_size in ((None, 4), (First(4), 3), (RandomChoice(5, seed=2), 1), (RandomChoice(5, seed=2), 5)):
        data.subset, data.batch_size = subset, batch_size
        expected = range(len(whole)) if subset is None else subset.indices(whole.labels)
        assert positions(data.test_dataloader()) == list(expected)
        assert len(data.evaluated) == len(expected)
        for batch in data.test_dataloader():
            for image, label, index in zip(*batch.values(), strict=True):
                assert torch.equal(image, whole[int(index)]["image"])
                assert label == whole.labels[index]


def test_the_same_split_is_made_every_time(every):
    """And handed to workers."""
    data, _ = every
    for name in ("train", "val", "test"):
        again = pickle.loads(pickle.dumps(data.split(name)))
        assert np.array_equal(as_bytes(data.split(name)), as_bytes(again))


def test_evaluate_on_another_split():
    data = Digits(evaluate_on="val")
    assert np.array_equal(as_bytes(data.evaluated), as_bytes(data.split("val")))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}, {"evaluate_on": "valid"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Numbers(**options)


@pytest.mark.parametrize("labels", [[], [0, 2], [-1, 0]])
def test_impossible_labels_are_refused(labels):
    with pytest.raises(InputError):
        ImageDataset.whole(constant_image, labels, ["a", "b"])


# Each dataset.


def test_digits_are_cut_from_the_stated_permutation():
    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    for name, chosen in (("train", order[:1097]), ("val", order[1097:1397]), ("test", order[1397:])):
        split = Digits().split(name)
        images = torch.stack([sample["image"] for sample in samples(split)])
        assert torch.equal(images, torch.from_numpy(digits.images[chosen] / 16).float()[:, None])
        assert split.labels.tolist() == digits.target[chosen].tolist()
    assert Digits().classes == [str(digit) for digit in range(10)]


class Own(ImageDataModule):
    """A dataset of one's own, whose argument is called as those of image folders."""

    def __init__(self, root: Path):
        super().__init__()

    def split(self, name):
        raise NotImplementedError


def test_a_file_of_a_dataset_of_ones_own_is_part_of_the_identity(tmp_path):
    (tmp_path / "a").write_text("1")
    before = Own(tmp_path / "a").identity()
    (tmp_path / "a").write_text("2")
    assert Own(tmp_path / "a").identity() != before


@pytest.mark.parametrize(("kind", "write"), [(CIFAR10, write_cifar10), (SVHN, write_svhn)])
def test_splits_of_the_original_files(kind, write, tmp_path, any_md5):
    written = write(tmp_path)
    data = kind(tmp_path)
    # Pictures beside the files, also in folders that are named like splits, change nothing.
    before = data.identity()
    write_folders(tmp_path, {"test/cat": 1, "train/cat": 1})
    assert kind(tmp_path).identity() == before
    count = len(written["train"][1])
    val = sorted(np.random.RandomState(0).permutation(count)[: count // 10])
    train = sorted(set(range(count)) - set(val))
    test = list(range(len(written["test"][1])))
    for name, part, chosen in (("train", "train", train), ("val", "train", val), ("test", "test", test)):
        images, labels = written[part]
        assert np.array_equal(as_bytes(data.split(name)), np.stack([images[i] for i in chosen]))
        assert data.split(name).labels.tolist() == [labels[i] for i in chosen]
    assert data.classes == (CIFAR10_CLASSES if kind is CIFAR10 else [str(digit) for digit in range(10)])
    assert data.name == kind.__name__


@pytest.mark.parametrize(
    ("kind", "folders", "labels"),
    [
        (CIFAR10Folder, {"val/ship": 2, "val/cat": 1}, [3, 8, 8]),
        (ImageNet, {"val/n15075141": 2, "val/n01440764": 1, "val/n01443537": 1}, [0, 1, 999, 999]),
    ],
)
def test_labels_are_positions_among_all_classes(kind, folders, labels, tmp_path):
    write_folders(tmp_path, folders)
    data = kind(tmp_path, size=8)
    assert data.split("test").labels.tolist() == labels
    (tmp_path / "val" / "goldfish").mkdir()
    with pytest.raises(InputError, match=f"'goldfish' is not a class of {kind.__name__}"):
        data.split("val")


@pytest.mark.parametrize("kind", [CIFAR10, SVHN])
def test_missing_or_damaged_files_are_named(kind, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}.*{kind.__name__}.*download: true"):
        kind(tmp_path).split("test")
    write_cifar10(tmp_path)
    write_svhn(tmp_path)
    # Torchvision's own check finds that these are not the original files.
    with pytest.raises(InputError, match="missing or damaged"):
        kind(tmp_path).split("test")


@pytest.mark.parametrize(("kind", "write"), [(CIFAR10, write_cifar10), (SVHN, write_svhn)])
def test_download_happens_before_the_splits_are_read(kind, write, tmp_path, any_md5, monkeypatch):
    fetched = []

    def download(self):
        if not fetched:
            write(tmp_path)
        fetched.append(getattr(self, "split", None))

    monkeypatch.setattr(getattr(datasets, kind.__name__), "download", download)
    kind(tmp_path).prepare_data()
    assert not fetched
    kind(tmp_path, download=True).prepare_data()
    assert set(fetched) == ({None} if kind is CIFAR10 else {"train", "test"})
    assert len(kind(tmp_path).split("test")) > 0


@pytest.mark.parametrize("kind", [CIFAR10, SVHN])
def test_failed_download_is_told(kind, tmp_path, monkeypatch):
    def download(self):
        raise OSError("no network")

    monkeypatch.setattr(getattr(datasets, kind.__name__), "download", download)
    with pytest.raises(InputError, match="no network"):
        kind(tmp_path, download=True).split("test")


# Folders of one's own.


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_give_the_splits(tmp_path, val):
    folder_of = write_folders(tmp_path, {f"{part}/{c}": 3 for part in ("train", val, "test") for c in ("cat", "dog")})
    for name in ("train", "val", "test"):
        split = ImageFolder(tmp_path).split(name)
        folders = [folder_of[g] for g in grays(split)]
        assert folders == [f"{val if name == 'val' else name}/{c}" for c in ("cat", "dog") for _ in range(3)]
        assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert split.classes == ["cat", "dog"]


def test_without_test_folder_the_test_reads_val(tmp_path):
    write_folders(tmp_path, {"train/cat": 5, "val/cat": 3})
    data = ImageFolder(tmp_path, val_fraction=0.4, test_fraction=0.4)
    assert grays(data.split("train")) == list(range(5))
    assert grays(data.split("test")) == grays(data.split("val")) == [5, 6, 7]


def test_without_val_folder_it_is_cut_from_train(tmp_path):
    write_folders(tmp_path, {"train/cat": 10, "train/dog": 10, "test/cat": 3})
    data = ImageFolder(tmp_path, val_fraction=0.2, split_seed=3)
    assert data.split("val").labels.tolist() == [0, 0, 1, 1]
    assert sorted(grays(data.split("train")) + grays(data.split("val"))) == list(range(20))
    assert grays(data.split("test")) == [20, 21, 22]


@pytest.mark.parametrize("parent", ["", "train/"])
def test_class_folders_alone_are_split_at_random_in_each_class(tmp_path, parent):
    write_folders(tmp_path, {f"{parent}cat": 12, f"{parent}dog": 8})
    data = ImageFolder(tmp_path, val_fraction=0.25, test_fraction=0.25, split_seed=3)
    splits = {name: grays(data.split(name)) for name in ("train", "val", "test")}
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == list(range(20))
    for name, counts in {"train": [6, 4], "val": [3, 2], "test": [3, 2]}.items():
        labels = data.split(name).labels.tolist()
        assert labels == [int(gray >= 12) for gray in splits[name]] == [0] * counts[0] + [1] * counts[1]
    for seed in (4, 5):
        assert splits["test"] != grays(ImageFolder(tmp_path, test_fraction=0.25, split_seed=seed).split("test"))


def test_splits_hold_every_class_where_they_can():
    labels = np.array([0] * 500 + [1] * 40 + [2] * 11)
    order = ImageFolder(Path()).order(labels)
    assert sorted(order) == list(range(551))
    for end in range(1, 552):
        assert (np.abs(np.bincount(labels[order[:end]], minlength=3) - np.bincount(labels) * end / 551) < 1.5).all()


def test_labels_agree_between_splits_with_different_classes(tmp_path):
    write_folders(
        tmp_path, dict.fromkeys(["train/cat", "train/dog", "train/emu", "val/dog", "test/dog", "test/yak"], 1)
    )
    data = ImageFolder(tmp_path)
    for name, labels in {"train": [0, 1, 2], "val": [1], "test": [1, 3]}.items():
        assert data.split(name).labels.tolist() == labels
    assert data.classes == ["cat", "dog", "emu", "yak"]


def test_nested_files_count_and_hidden_or_other_ones_do_not(tmp_path):
    folder_of = write_folders(tmp_path, {"cat": 1, "cat/a/b": 1, "dog": 1, ".cache": 1, "cat/.thumbnails": 1})
    (tmp_path / "cat" / "._000.png").write_bytes(b"not an image")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "dog" / "000.png").rename(tmp_path / "dog" / "000.PNG")
    (tmp_path / "readme.txt").write_text("not a folder")
    data = ImageFolder(tmp_path, val_fraction=0.0, test_fraction=1.0)
    assert sorted(folder_of[g] for g in grays(data.split("test"))) == ["cat", "cat/a/b", "dog"]
    assert data.classes == ["cat", "dog"]


def test_kinds_of_images(tmp_path):
    (tmp_path / "test" / "some").mkdir(parents=True)
    color, gray = (250, 120, 10), 90
    kinds = {
        "a.png": Image.new("RGB", (8, 8), color),
        "c.png": Image.new("RGBA", (8, 8), (*color, 255)),
        "d.jpg": Image.new("RGB", (8, 8), color).convert("CMYK"),
        "e.png": Image.new("L", (8, 8), gray),
        "f.png": Image.new("LA", (8, 8), (gray, 255)),
        "g.bmp": Image.new("1", (8, 8), 1),
    }
    for name, image in kinds.items():
        image.save(tmp_path / "test" / "some" / name)
    colors = as_bytes(ImageFolder(tmp_path).split("test"))
    assert colors.shape == (6, 3, 8, 8)
    expected = np.array([color] * 3 + [[gray] * 3] * 2 + [[255] * 3])
    assert np.abs(colors.mean(axis=(2, 3)) - expected).max() < 5
    grayscale = as_bytes(ImageFolder(tmp_path, channels=1).split("test"))
    assert grayscale.shape == (6, 1, 8, 8)
    luma = round(0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2])
    assert np.abs(grayscale.mean(axis=(1, 2, 3)) - np.array([luma] * 3 + [gray] * 2 + [255])).max() < 3


def test_images_are_resized_and_cropped(tmp_path):
    write_folders(tmp_path, {"test/some": 1})
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 4:] = 255
    Image.fromarray(wide).save(tmp_path / "test" / "some" / "wide.png")
    with pytest.raises(InputError, match=r"\(3, 4, 8\) and \(3, 8, 8\).*size"):
        next(iter(ImageFolder(tmp_path).test_dataloader()))
    image = next(iter(ImageFolder(tmp_path, size=4).test_dataloader()))["image"]
    assert image.shape == (2, 3, 4, 4)
    assert image[1, 0].tolist() == [[0, 0, 1, 1]] * 4
    image = next(iter(ImageFolder(tmp_path, size=2, resize=4).test_dataloader()))["image"]
    assert image[1, 0].tolist() == [[0, 1]] * 2
    with pytest.raises(InputError, match="resize = 3, size = 4"):
        ImageFolder(tmp_path, size=4, resize=3)


def ends_within_a_batch():
    """Something refers to the loader's iterator to the end, as the traceback of an error does."""
    iterator = iter(Digits(num_workers=1).test_dataloader())
    next(iterator)
    sys.kept = iterator


def test_a_process_ends_whose_loader_has_workers_at_work():
    process = CONTEXT.Process(target=ends_within_a_batch)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def test_whatever_pillow_raises_names_the_file(tmp_path):
    data = io.BytesIO()
    Image.new("L", (32, 24)).save(data, "TIFF")
    tiff = bytearray(data.getvalue())
    # One damaged byte: the kind of a number becomes that of a text.
    tiff[tiff.index(struct.pack("<HH", 273, 4)) + 2] = 2
    data = io.BytesIO()
    Image.new("RGB", (32, 24)).save(data, "AVIF")
    avif = data.getvalue()
    cut = avif.index(b"mdat") + 4
    avif = avif[:cut] + bytes(len(avif) - cut)
    for name, content in (("a.tif", bytes(tiff)), ("b.avif", avif), ("c.png", b""), ("d.png", b"GIF")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: cannot be read as an image"):
            read_image(tmp_path / name, 3)


def test_names_may_be_no_utf8(tmp_path):
    """As old zip files leave them: shown with a replacement, in reports that are UTF-8."""
    write_folders(tmp_path, {"test/some": 1, "test/other": 1})
    (tmp_path / "test/some").rename(tmp_path / os.fsdecode(b"test/caf\xe9"))
    (tmp_path / "test/other/000.png").rename(tmp_path / os.fsdecode(b"test/other/\xe9.png"))
    data = ImageFolder(tmp_path)
    assert data.split("test").classes == ["caf\ufffd", "other"]
    assert grays(data.split("test")) == [0, 1]
    assert len(data.names_sha256) == 64


# What is a split and what a class, and what is left out.


@pytest.mark.parametrize(
    ("folders", "splits", "classes"),
    [
        (["Train/cat", "Train/dog", "TEST/cat"], None, ["cat", "dog"]),
        (["training/cat", "testing/dog"], None, ["cat", "dog"]),
        (["bus", "train"], False, ["bus", "train"]),
        (["bus/2023", "train/2023", "train/2024"], False, ["bus", "train"]),
        (["bus/2023", "train/2023", "train/2024"], True, ["2023", "2024"]),
        (["valid", "invalid"], False, ["invalid", "valid"]),
        (["test", "train"], False, ["test", "train"]),
    ],
)
def test_splits_and_classes_of_like_names(tmp_path, folders, splits, classes):
    write_folders(tmp_path, dict.fromkeys(folders, 4))
    (tmp_path / "empty").mkdir()
    data = ImageFolder(tmp_path, val_fraction=0.25, test_fraction=0.25, splits=splits)
    assert [name for name in data.split("train").classes if name != "empty"] == classes
    assert data.names_sha256


def test_all_kinds_of_images_count_and_what_is_left_out_is_said(tmp_path, capsys):
    notice.cache_clear()
    write_folders(tmp_path, {"test/cat": 1, "test/dog": 1, "test/emu": 1})
    for kind in ("gif", "jfif", "avif"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"test/cat/a.{kind}", "JPEG" if kind == "jfif" else None)
    (tmp_path / "test/emu/000.png").rename(tmp_path / "test/emu/000.heic")
    (tmp_path / "test/dog/notes.txt").touch()
    assert ImageFolder(tmp_path).split("test").labels.tolist() == [0] * 4 + [1]
    said = capsys.readouterr().err
    assert "test: ignored files that are not images: 1 .txt, 1 .heic\n" in said
    assert "test: class folders without images: emu\n" in said


def training_images(root):
    ImageFolder(root).split("train")


def images_without_classes(root):
    Image.new("L", (8, 8)).save(root / "0.png")
    ImageFolder(root).split("test")


@pytest.mark.parametrize(
    ("folders", "make", "message"),
    [
        ([], lambda root: ImageFolder(root / "nowhere").split("test"), "nowhere: no such folder"),
        ([], lambda root: ImageFolder(root).split("test"), "has no images: give it one subfolder per class"),
        ([], images_without_classes, "its images are in no class folders"),
        ([], lambda root: ImageFolder(root, channels=4), "channels = 4"),
        ([], lambda root: ImageFolder(root, val_fraction=-0.1), "val_fraction = -0.1"),
        ([], lambda root: ImageFolder(root, val_fraction=0.5, test_fraction=0.6), "test_fraction = 0.6"),
        (["cat"], lambda root: ImageFolder(root, split_seed=-1).split("test"), "seed = -1"),
        (["cat"], lambda root: ImageFolder(root).split("val"), "of 3 images none are left for val"),
        (["cat"], lambda root: ImageFolder(root, val_fraction=0, test_fraction=1).split("train"), "none are left for"),
        (["val/cat"], training_images, "no folder train"),
        (["test/cat"], training_images, "no folder train"),
        # Layouts that may be read in two ways.
        (["bus", "train"], training_images, "train may be a split or, like bus, a class: set splits: true or splits: "),
        (["bus/2023", "train/2023"], training_images, "train may be a split or, like bus"),
        (["valid", "invalid"], training_images, "valid may be a split or, like invalid"),
        (["train/a", "val/a", "Validation/a"], training_images, "Validation and val may both be the val split"),
        (["train", "test"], training_images, "set splits: false if"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(tmp_path, folders, make, message):
    write_folders(tmp_path, dict.fromkeys(folders, 3))
    with pytest.raises(InputError, match=message) as raised:
        make(tmp_path)
    assert "\n" not in str(raised.value)


# Subsets.

LABELS = np.random.RandomState(5).randint(0, 7, 200)


def test_random_choice_is_numpys():
    expected = np.random.RandomState(0).choice(10_000, 512, replace=False)
    assert RandomChoice(512).indices(np.zeros(10_000, np.int64)).tolist() == expected.tolist()
    assert RandomChoice(3, seed=1).indices(LABELS).tolist() != RandomChoice(3, seed=2).indices(LABELS).tolist()
    assert First(4).indices(LABELS).tolist() == [0, 1, 2, 3]


def test_random_draws_are_a_union_in_order():
    drawn = [i for seed in range(8) for i in np.random.RandomState(seed).choice(10_000, 64, replace=False).tolist()]
    assert len(set(drawn)) < len(drawn)
    assert RandomDraws(64, 8).indices(np.zeros(10_000, np.int64)).tolist() == list(dict.fromkeys(drawn))


@pytest.mark.parametrize("n", [3, 7, 70, 73])
def test_balanced_in_every_prefix(n):
    chosen = Balanced(n, seed=1).indices(LABELS)
    assert len(set(chosen.tolist())) == len(chosen) == n
    for end in range(1, n + 1):
        counts = np.bincount(LABELS[chosen[:end]], minlength=7)
        assert counts.max() - counts.min() <= 1
    assert chosen.tolist() == Balanced(80, seed=1).indices(LABELS)[:n].tolist()
    assert chosen.tolist() != Balanced(n, seed=2).indices(LABELS).tolist()


def test_index_file_and_its_hash(tmp_path):
    path = tmp_path / "chosen.txt"
    path.write_text("7\n0\n123\n42\n")
    assert IndexFile(path).indices(LABELS).tolist() == [7, 0, 123, 42]
    data = Numbers(200, subset=IndexFile(path))
    assert positions(data.test_dataloader()) == [7, 0, 123, 42]
    assert data.subset_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    whole = "".join(f"{i}\n" for i in range(200))
    assert Numbers(200).subset_sha256 == hashlib.sha256(whole.encode()).hexdigest()


@pytest.mark.parametrize("content", [None, "", "1\n200\n", "-1\n", "1\n1\n", "1.5\n", "cat\n", "9" * 30, "\udcff"])
def test_bad_index_files_are_refused(tmp_path, content):
    path = tmp_path / "chosen.txt"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=str(path)) as raised:
        IndexFile(path).indices(LABELS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rule", [First, RandomChoice, Balanced])
def test_impossible_counts_are_refused(rule):
    for n in (0, -1, 201):
        with pytest.raises(InputError, match=f"n = {n}"):
            rule(n).indices(LABELS)
    if rule is not First:
        with pytest.raises(InputError, match="seed = -1"):
            rule(3, seed=-1).indices(LABELS)


@pytest.mark.parametrize("labels", [[0] * 20 + [1], [0, 1, 1, 2, 2, 2], [1, 1, 1, 0, 2]])
def test_balanced_names_the_largest_number_that_works(labels):
    with pytest.raises(InputError, match=r"subset: n = 100: .*: use n = 1 \.\. (\d+)$") as raised:
        Balanced(100).indices(np.array(labels))
    most = int(str(raised.value).rpartition(" ")[2])
    assert len(Balanced(most).indices(np.array(labels))) == most
    with pytest.raises(InputError, match=f"n = {most + 1}"):
        Balanced(most + 1).indices(np.array(labels))


# Loaders over several processes.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_shards_are_disjoint_and_complete(world_size):
    for make in (lambda: Numbers(23, batch_size=4), lambda: Numbers(40, subset=RandomChoice(17), batch_size=4)):
        expected = positions(make().test_dataloader())
        shards = [positions(on_rank(make(), world_size, rank).test_dataloader()) for rank in range(world_size)]
        assert sorted(i for shard in shards for i in shard) == sorted(expected)
        validated = [positions(on_rank(make(), world_size, rank).val_dataloader()) for rank in range(world_size)]
        assert sorted(i for shard in validated for i in shard) == list(range(make().count))


def test_more_processes_than_samples_are_refused_for_validation():
    with pytest.raises(InputError, match="3 samples are fewer than 4 processes"):
        on_rank(Numbers(val_subset=First(3)), 4, 0).val_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_finished_when_a_pass_begins_is_left_out(workers):
    """Lightning makes the iterator before the callbacks know what is recorded."""
    data = Numbers(23, batch_size=4, num_workers=workers)
    batches = iter(data.test_dataloader())
    data.finished = [3, 4, 22]
    left = [k for k in range(23) if k not in data.finished]
    assert [k for batch in batches for k in batch["index"].tolist()] == left
    data.finished = range(23)
    assert positions(data.test_dataloader()) == []


def test_training_shards_make_up_the_single_process_order():
    def order(world_size, rank):
        loader = on_rank(Numbers(24, batch_size=2, seed=5), world_size, rank).train_dataloader()
        loader.sampler.set_epoch(3)
        return positions(loader)

    whole = order(1, 0)
    assert sorted(whole) == list(range(24))
    for world_size in (2, 3, 4):
        assert [order(world_size, rank) for rank in range(world_size)] == [
            whole[rank::world_size] for rank in range(world_size)
        ]


def test_incomplete_training_batches_are_dropped_unless_there_is_no_other():
    assert len(positions(Numbers(23, batch_size=5).train_dataloader())) == 20
    assert len(positions(Numbers(23, batch_size=30).train_dataloader())) == 23
    # Each of two processes has 12 of the 23 samples: fewer than a batch.
    assert len(positions(on_rank(Numbers(23, batch_size=20), 2, 0).train_dataloader())) == 12


class Listener(BoringModel):
    """Writes down which samples it sees."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).extend(batch["index"].tolist())
        return self.layer.weight.sum()


def seen_in_training(global_seed, **options):
    torch.manual_seed(global_seed)
    listener = Listener()
    off = {**QUIET, "enable_checkpointing": False, "limit_val_batches": 0}
    L.Trainer(max_epochs=2, accelerator="cpu", **off).fit(listener, Numbers(20, **options))
    return listener.seen


def test_training_order_depends_on_seed_and_epoch_alone():
    seen = seen_in_training(global_seed=0, batch_size=4, seed=1)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(20))
    assert seen[0] != seen[1]
    assert seen == seen_in_training(global_seed=7, batch_size=5, seed=1)
    assert seen[0] != seen_in_training(global_seed=0, batch_size=4, seed=2)[0]


@pytest.mark.parametrize("loader", ["train_dataloader", "test_dataloader"])
def test_worker_processes_give_the_same_batches(loader):
    make = partial(Digits, batch_size=100, subset=RandomChoice(250))
    alone, helped = (list(getattr(make(num_workers=n), loader)()) for n in (0, 2))
    assert len(alone) == len(helped)
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_training_images_stay_in_memory():
    """They are read once, and the batches are those of a loader that reads each time."""
    reads = []

    class Counted(ImageDataModule):
        def split(self, name):
            images = torch.arange(10 * 12).reshape(10, 3, 2, 2) / 255.0
            return ImageDataset.whole(lambda i: (reads.append(i), images[i])[1], np.arange(10) % 2, ["a", "b"])

    data = Counted(batch_size=4)
    kept = data.train_dataloader()
    plain = DataLoader(data.split("train"), batch_sampler=kept.batch_sampler)
    for epoch in range(2):
        kept.sampler.set_epoch(epoch)
        for one, other in zip(list(kept), list(plain), strict=True):
            assert one.keys() == other.keys()
            assert all(one[name].equal(other[name]) and one[name].dtype == other[name].dtype for name in one)
    # The first image is asked for its size, and the plain loader reads eight an epoch.
    assert len(reads) <= 1 + 10 + 2 * 8
