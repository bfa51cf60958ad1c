"""People's own images through a defense: what is written depends on the image and the settings, and on nothing else."""

import csv
import hashlib
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from conftest import QUIET
from PIL import Image
from processes import Launch, tiny

from lit_purify.attacks import FGSM
from lit_purify.cli import evaluate
from lit_purify.data import Digits, ImageFolder
from lit_purify.data.folder import _read_item, read_image
from lit_purify.defense import DefendedClassifier, HeterogeneousPurifier, NoPurifier, TopFraction, UniformPurifier
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, own_images
from lit_purify.evaluation.own_images import purify_files
from lit_purify.functional.noise import EVALUATION, KeyedNoise


@pytest.fixture
def images(tmp_path):
    """Of several formats, sizes and color modes, in subfolders, among files that are no images."""
    folder = tmp_path / "images"
    rng = np.random.RandomState(0)
    for name, shape in {
        "a.png": (8, 8),
        "sub/b.c.jpg": (20, 31, 3),
        "sub/deep/d.GIF": (9, 8),
        "e.webp": (8, 8, 4),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, shape).astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    # Pillow opens files that end so, if they are its own.
    (folder / "film.mpg").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


KNOWN = {
    "none": lambda unet: NoPurifier(),
    "uniform": lambda unet: UniformPurifier(unet, 200, 2),
    "paper": lambda unet: HeterogeneousPurifier(unet, mask=TopFraction(0.3), high=300, low=150, steps=2),
}


@pytest.fixture
def run(unet, classifier, images, tmp_path):
    """Purifies the images into a folder; returns whether all could be read."""

    def call(output="out", source=None, defenses=("uniform", "paper"), data=None, **options):
        defined = {"runs": 3, "chunk": 16, "seed": 5}
        defined |= {key: options.pop(key) for key in list(options) if key in defined}
        chosen = {name: KNOWN[name](unet) for name in defenses}
        evaluator = Evaluator(classifier, chosen, {"fgsm": FGSM("linf", 0.1)}, **defined)
        trainer = L.Trainer(accelerator="cpu", inference_mode=False, enable_checkpointing=False, **QUIET)
        return purify_files(evaluator, data or Digits(), trainer, source or images, tmp_path / output, **options)

    return call


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(path):
    return list(csv.DictReader(path.open()))


def key_of(file, runs=1):
    return torch.full((runs,), int(hashlib.sha256(file.read_bytes()).hexdigest()[:8], 16))


def test_files_keep_their_names_and_are_what_the_defense_makes_of_them(run, unet, classifier, images, tmp_path, capsys):
    assert run()
    stems = ["a", "sub/b.c", "sub/deep/d", "e"]
    made = {f"{s}{kind}.png" for s in stems for kind in ("", ".mask", ".overlay")}
    assert set(content(tmp_path / "out")) == made | {"config.yaml", "identity.json"}
    said = capsys.readouterr().out
    # The first with a mask, and the files that are not hidden; what it is done with.
    assert "4 images" in said
    assert "2 other files left out, such as" in said
    assert "defense paper (of uniform, paper)" in said
    assert "images of 8x8 in 1 channels" in said
    defended = DefendedClassifier(KNOWN["paper"](unet), classifier)
    for source, stem in (("a.png", "a"), ("sub/b.c.jpg", "sub/b.c")):
        noise = KeyedNoise(5, key_of(images / source), torch.tensor([0]), EVALUATION)
        with torch.no_grad():
            trace = defended.trace(read_image(images / source, 1, 8)[None], noise)
        purified = read_image(tmp_path / "out" / f"{stem}.png", 1)
        assert (purified - trace.purified[0]).abs().max() <= 0.51 / 255
        assert torch.equal(read_image(tmp_path / "out" / f"{stem}.mask.png", 1), trace.mask[0])
        # Four panels, of which the last is the purified image.
        strip = read_image(tmp_path / "out" / f"{stem}.overlay.png", 3)
        assert strip.shape == (3, 128, 4 * 128 + 3 * 4)
        assert torch.equal(strip[:1, ::16, -128::16], purified)
    # A file alone, under another name, read by a worker, beside another defense.
    shutil.copy(images / "sub/b.c.jpg", tmp_path / "other.jpg")
    run("one", tmp_path / "other.jpg", data=Digits(batch_size=1, num_workers=1), defenses=("none", "paper"))
    assert content(tmp_path / "one")["other.png"] == content(tmp_path / "out")["sub/b.c.png"]
    run("seed", tmp_path / "other.jpg", seed=6)
    assert not torch.equal(*(read_image(tmp_path / place / "other.png", 1) for place in ("one", "seed")))


def test_predictions_are_those_of_the_defense(run, unet, classifier, images, tmp_path, capsys):
    # Images, runs and chunks that do not divide each other; the classes of data that is not at hand have no names.
    run(runs=5, defense="uniform", overlays=False, classify=True, data=ImageFolder(tmp_path / "nowhere"))
    assert "predictions have no class names" in capsys.readouterr().out
    table = rows(tmp_path / "out/predictions.csv")
    assert [row["file"] for row in table] == ["a.png", "e.webp", "sub/b.c.jpg", "sub/deep/d.GIF"]
    assert not list((tmp_path / "out").rglob("*.mask.png")) + list((tmp_path / "out").rglob("*.overlay.png"))
    for row in table:
        file = images / row["file"]
        noise = KeyedNoise(5, key_of(file, 5), torch.arange(5), EVALUATION)
        with torch.no_grad():
            defended = DefendedClassifier(KNOWN["uniform"](unet), classifier)
            predicted = defended(read_image(file, 1, 8).expand(5, -1, -1, -1), noise).argmax(1).tolist()
        assert [int(row[f"run_{k}"]) for k in range(5)] == predicted
        most = max(Counter(predicted).values())
        assert int(row["class"]) == min(c for c, n in Counter(predicted).items() if n == most)
        assert float(row["share"]) == most / 5
        assert row["name"] == ""


def test_images_are_prepared_as_the_evaluation_does_it(run, tmp_path):
    """The shorter side resized, the center cropped."""
    rng = np.random.RandomState(0)
    for k in range(10):
        (tmp_path / f"set/test/{k}").mkdir(parents=True)
        Image.fromarray(rng.randint(0, 256, (15, 20)).astype(np.uint8)).save(tmp_path / f"set/test/{k}/0.png")
    data = ImageFolder(tmp_path / "set", size=8, resize=12, channels=1)
    run("made", tmp_path / "set/test", ["none", "uniform"], data, defense="none")
    for k, row in enumerate(data.evaluated):
        prepared = read_image(tmp_path / f"made/{k}/0.png", 1)
        assert (prepared - row["image"]).abs().max() <= 0.51 / 255
        assert (prepared - read_image(tmp_path / f"set/test/{k}/0.png", 1, 8)).abs().max() > 0.1


def test_going_on_completes_and_changes_nothing(run, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(classify=True)
    before = content(out)
    (out / "a.png").unlink()
    (out / "predictions.csv").unlink()
    (out / "sub/b.c.png.partial").write_text("a killed run leaves this")
    capsys.readouterr()
    assert run(classify=True)
    assert "3 of them exist already" in capsys.readouterr().out
    assert {name: data for name, data in content(out).items() if "partial" not in name} == before
    for changes in ({"seed": 6}, {"runs": 4}, {"defense": "uniform"}, {"overlays": False}):
        with pytest.raises(InputError, match="or of other settings"):
            run(**{"classify": True, **changes})
    assert {name: data for name, data in content(out).items() if "partial" not in name} == before
    # An image that has changed since is made again, and no other.
    Image.new("L", (8, 8), 7).save(images / "a.png")
    assert run(classify=True)
    after = content(out)
    assert {name for name in before if before[name] != after[name]} >= {"a.png", "a.overlay.png"}
    assert before["e.png"] == after["e.png"]


def test_an_interruption_leaves_whole_files(run, tmp_path, monkeypatch, capsys):
    calls = []

    def save(image, path, said, saved=own_images._save):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        saved(image, path, said)

    monkeypatch.setattr(own_images, "_save", save)
    with pytest.raises(SystemExit):
        run(chunk=1)
    assert "the same command resumes" in capsys.readouterr().out
    monkeypatch.undo()
    run(chunk=1)
    run("whole", chunk=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_names_that_are_no_text_and_links_that_lead_back(run, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    file = os.fsdecode(os.fsencode(tmp_path / "in" / "sub") + b"/caf\xe9.png")
    Image.new("L", (8, 8), 9).save(file)
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    run("out", tmp_path / "in", classify=True)
    assert [row["file"] for row in rows(tmp_path / "out/predictions.csv")] == [r"sub/caf\udce9.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_photos_are_turned_upright_and_what_is_transparent_is_white(channels, tmp_path):
    dark, bright = (10, 10, 10), (200, 200, 200)
    lying = Image.new("RGB", (2, 1), dark)
    lying.putpixel((1, 0), bright)
    exif = Image.Exif()
    # The camera was turned: the first row is the right-hand side.
    exif[0x0112] = 6
    lying.save(tmp_path / "photo.png", exif=exif)
    upright = read_image(tmp_path / "photo.png", channels)
    assert upright.shape == (channels, 2, 1)
    assert (255 * upright[0, :, 0]).tolist() == pytest.approx([10, 200])
    # Labeled folders are read as torchvision reads them.
    assert _read_item([tmp_path / "photo.png"], channels, None, None, 0).shape == (channels, 1, 2)
    clear = Image.new("RGBA", (3, 1), (*dark, 0))
    clear.putpixel((1, 0), (*dark, 255))
    clear.putpixel((2, 0), (*dark, 128))
    clear.save(tmp_path / "clear.png")
    seen = 255 * read_image(tmp_path / "clear.png", channels)[0, 0]
    assert seen.tolist() == pytest.approx([255, 10, (128 * 10 + 127 * 255) / 255], abs=1)
    indexed = Image.new("P", (1, 1))
    indexed.save(tmp_path / "indexed.png", transparency=0)
    assert read_image(tmp_path / "indexed.png", channels).min() == 1


def test_processes_share_the_images_and_know_of_all_that_could_not_be_read(tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(4):
        Image.new("L", (8, 8), 60 * k).save(tmp_path / "in" / f"{k}.png")
        (tmp_path / "in" / f"bad{k}.jpg").write_bytes(b"none")
    argv = ["predict", "--config", str(tiny(tmp_path / "tiny.yaml")), "--run", str(tmp_path / "run")]
    argv += ["--input", str(tmp_path / "in"), "--output"]
    with pytest.raises(SystemExit) as exit_:
        evaluate([*argv, str(tmp_path / "1")])
    launched = Launch("evaluate", [*argv, str(tmp_path / "2")], tmp_path / "log", world=2)
    assert exit_.value.code == launched.wait()[0] == 1, launched.said
    # In the order of the names, whichever process had them, and once.
    assert re.findall(r"bad(\d).jpg: cannot be read", launched.said) == ["0", "1", "2", "3"]
    assert launched.said.count("8 images of ") == launched.said.count("Purified: ") == 1
    one, two = (content(tmp_path / place) for place in "12")
    assert {name: data for name, data in one.items() if name[-4:] != "yaml"} == {
        name: data for name, data in two.items() if name[-4:] != "yaml"
    }


def test_what_cannot_be_read_stops_no_other(run, images, tmp_path, capsys):
    assert run("good", chunk=1, classify=True)
    data = (images / "a.png").read_bytes()
    (images / "b.png").write_bytes(data[: len(data) // 2])
    (images / "f.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(images / "sub/g.png")
    long = images / f"{'z' * 240}.png"
    shutil.copy(images / "a.png", long)
    assert not run("out", chunk=1, classify=True)
    *_, first, second, third, fourth, fifth = capsys.readouterr().out.splitlines()
    assert first == "Not written, 4 of 8:"
    assert [line[len(str(images)) + 1 :].split(";")[0].split(", or")[0] for line in (second, third, fourth, fifth)] == [
        "b.png: cannot be read as an image: remove or replace it",
        "f.png: cannot be read as an image: remove or replace it",
        "sub/g.png: gray with more than 8 bits, which would be clipped: save it with 8 bits",
        f"{long.name}: its name is too long for the files written beside it: shorten it",
    ]
    long.unlink()
    assert content(tmp_path / "out") == content(tmp_path / "good")
    # Mended.
    for name in ("b.png", "f.png", "sub/g.png"):
        shutil.copy(images / "a.png", images / name)
    assert run("out", chunk=1, classify=True)
    assert len(rows(tmp_path / "out/predictions.csv")) == 7


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ("a.bmp", {}, r"a\.bmp and .*a\.png would both be written to .*a\.png"),
        ("a.mask.png", {}, r"would both be written to .*a\.mask\.png"),
        (shutil.rmtree, {}, "input .*images: no such folder or file"),
        (lambda folder: [shutil.rmtree(folder), folder.mkdir()], {}, "no images in it"),
        (None, {"output": "images"}, "output .*images: lies in the input folder"),
        (None, {"output": "images/out"}, "lies in the input folder"),
        (None, {"output": "images/notes.txt"}, "notes.txt: is a file"),
        (None, {"defense": "papr"}, "defense papr: no such defense; use one of uniform, paper"),
        (None, {"defenses": ["none"]}, "none of none purifies"),
        (None, {"outputs": 1, "classify": True}, r"returns \(1, 1\) .* but logits \(1, \d+\) are needed"),
    ],
)
def test_refused_before_anything_is_written(run, classifier, images, tmp_path, monkeypatch, change, options, said):
    if isinstance(change, str):
        Image.new("L", (8, 8)).save(images / change)
    elif change is not None:
        change(images)
    before = content(tmp_path)
    given = {"output": "out", **options}
    if count := given.pop("outputs", 0):
        monkeypatch.setattr(classifier.network, "forward", lambda x: torch.zeros(len(x), count))
    with pytest.raises(InputError, match=said):
        run(**given)
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_what_was_not_made_here_stays(run, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("mine")
    for output, source in (("out", None), ("images", images / "a.png")):
        before = content(tmp_path)
        with pytest.raises(InputError, match="holds files of another origin"):
            run(output, source)
        assert content(tmp_path) == before


def test_the_commands(images, tmp_path, capsys, monkeypatch):
    """With the configuration and the weights that ship."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    command = ["--input", str(images), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        evaluate(["predict", *command])
    assert "predict: name a configuration with the networks to use: --config FILE" in capsys.readouterr().err
    command += ["--config", "configs/eval/digits.yaml", "--chunk", "16"]
    evaluate(["predict", *command])
    assert len(rows(tmp_path / "out/predictions.csv")) == 4
    assert "ResNet, digits_classifier.safetensors, images of 8x8 in 1 channels" in capsys.readouterr().out
    # The configuration beside the images repeats the run.
    again = ["--config", str(tmp_path / "out/config.yaml"), "--output", str(tmp_path / "again")]
    evaluate(["predict", *again, "--input", str(images)])
    before, after = content(tmp_path / "out"), content(tmp_path / "again")
    assert after == before
    (images / "sub/z.png").write_text("no image")
    (tmp_path / "out/config.yaml").unlink()
    with pytest.raises(SystemExit) as exit_:
        evaluate(["predict", *command])
    assert exit_.value.code == 1
    assert capsys.readouterr().out.endswith("z.png: cannot be read as an image: remove or replace it\n")
    assert (tmp_path / "out/config.yaml").exists()
    with pytest.raises(SystemExit):
        evaluate(["purify", "--config", "configs/eval/digits.yaml"])
    assert (
        "no input, output given: name a configuration with --config, or give --input, --output"
        in capsys.readouterr().err
    )
