"""People's own images through a defense: what is written depends on the image and the settings, and on nothing else."""

import csv
import hashlib
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from processes import Launch, tiny

from lit_purify.cli import evaluate
from lit_purify.data import Digits
from lit_purify.data.folder import _read_item, read_image
from lit_purify.defense import HeterogeneousPurifier, NoPurifier, TopFraction, UniformPurifier
from lit_purify.errors import InputError
from lit_purify.evaluation import RobustnessTask
from lit_purify.evaluation.own_files import said_by
from lit_purify.evaluation.own_images import PurifyingTrainer
from lit_purify.functional.noise import EVALUATION, KeyedNoise

MASKED = ("uniform", "paper")


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


@pytest.fixture
def make(unet, classifier):
    """A task, and a trainer for it."""

    def built(defenses=MASKED, **options):
        known = {
            "none": NoPurifier,
            "uniform": lambda d, c: UniformPurifier(d, c, 200, 2),
            "paper": lambda d, c: HeterogeneousPurifier(d, c, TopFraction(0.3), 300, 150, 2),
        }
        from lit_purify.attacks import FGSM

        options = {"runs": 3, "chunk": 16, "seed": 5, **options}
        task = RobustnessTask(
            classifier, unet, {name: known[name] for name in defenses}, {"fgsm": FGSM("linf", 0.1)}, **options
        )
        off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
        return PurifyingTrainer(accelerator="cpu", inference_mode=False, **off), task.eval()

    return built


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(path):
    return list(csv.DictReader(path.open()))


def test_files_keep_their_names_and_are_what_the_defense_makes_of_them(make, images, tmp_path, capsys):
    trainer, task = make()
    trainer.purify(task, Digits(), images, tmp_path / "out")
    stems = ["a", "sub/b.c", "sub/deep/d", "e"]
    assert set(content(tmp_path / "out")) == {f"{s}{kind}.png" for s in stems for kind in ("", ".mask", ".overlay")}
    said = capsys.readouterr().out
    # The first with a mask, and the files that are not hidden.
    assert "4 images" in said
    assert "2 other files left out, such as" in said
    assert "film.mpg" in said
    assert "defense paper (of uniform, paper)" in said
    for source, stem in (("a.png", "a"), ("sub/b.c.jpg", "sub/b.c")):
        file = images / source
        key = torch.tensor([int(hashlib.sha256(file.read_bytes()).hexdigest()[:8], 16)])
        noise = KeyedNoise(5, key, torch.tensor([0]), EVALUATION)
        with torch.no_grad():
            trace = task.defenses["paper"].purifier.trace(read_image(file, 1, 8)[None], noise)
        purified = read_image(tmp_path / "out" / f"{stem}.png", 1)
        assert (purified - trace.purified[0]).abs().max() <= 0.51 / 255
        assert torch.equal(read_image(tmp_path / "out" / f"{stem}.mask.png", 1), trace.mask[0])
        # Four panels, of which the last is the purified image.
        strip = read_image(tmp_path / "out" / f"{stem}.overlay.png", 3)
        assert strip.shape == (3, 128, 4 * 128 + 3 * 4)
        assert torch.equal(strip[:1, ::16, -128::16], purified)


def test_a_file_alone_under_another_name_is_the_same(make, images, tmp_path):
    trainer, task = make()
    trainer.purify(task, Digits(), images, tmp_path / "all")
    shutil.copy(images / "sub/b.c.jpg", tmp_path / "other.jpg")
    trainer, task = make()
    # One file, and workers that read.
    trainer.purify(task, Digits(batch_size=1, num_workers=1), tmp_path / "other.jpg", tmp_path / "one")
    assert content(tmp_path / "one")["other.png"] == content(tmp_path / "all")["sub/b.c.png"]
    trainer, task = make(seed=6)
    trainer.purify(task, Digits(), tmp_path / "other.jpg", tmp_path / "seed")
    assert not torch.equal(*(read_image(tmp_path / run / "other.png", 1) for run in ("one", "seed")))


def test_a_defense_is_told_from_one_whose_name_begins_alike(make):
    trainer, task = make(("uniform",))
    settings = {f"model.init_args.defenses.uniform{n}.init_args.level": 200 for n in ("", "2")}
    trainer.settings = settings
    before = trainer._identity(task, "uniform", 3)
    trainer.settings = {**settings, "model.init_args.defenses.uniform2.init_args.level": 300}
    assert trainer._identity(task, "uniform", 3) == before
    trainer.settings = {**settings, "model.init_args.defenses.uniform.init_args.level": 300}
    assert trainer._identity(task, "uniform", 3) != before


def test_predictions_are_those_of_the_defense(make, images, tmp_path):
    # Images, runs and chunks that do not divide each other.
    trainer, task = make(runs=5)
    trainer.predict(task, Digits(), images, tmp_path / "out", defense="uniform", overlays=False)
    table = rows(tmp_path / "out/predictions.csv")
    assert [row["file"] for row in table] == ["a.png", "e.webp", "sub/b.c.jpg", "sub/deep/d.GIF"]
    assert not list((tmp_path / "out").rglob("*.mask.png")) + list((tmp_path / "out").rglob("*.overlay.png"))
    for row in table:
        file = images / row["file"]
        key = torch.full((5,), int(hashlib.sha256(file.read_bytes()).hexdigest()[:8], 16))
        noise = KeyedNoise(5, key, torch.arange(5), EVALUATION)
        with torch.no_grad():
            predicted = task.defenses["uniform"](read_image(file, 1, 8).expand(5, -1, -1, -1), noise).argmax(1).tolist()
        assert [int(row[f"run_{run}"]) for run in range(5)] == predicted
        most = max(Counter(predicted).values())
        assert int(row["class"]) == min(c for c, n in Counter(predicted).items() if n == most)
        assert float(row["share"]) == most / 5
        assert row["name"] == row["class"]


def test_names_are_left_out_where_the_data_is_not_at_hand(make, images, tmp_path, capsys):
    from lit_purify.data import ImageFolder

    trainer, task = make()
    trainer.predict(task, ImageFolder(tmp_path / "nowhere"), images, tmp_path / "out")
    assert {row["name"] for row in rows(tmp_path / "out/predictions.csv")} == {""}
    assert "classes are given by their numbers alone" in capsys.readouterr().out


def test_going_on_completes_and_changes_nothing(make, images, tmp_path, capsys):
    out = tmp_path / "out"

    def run(existing, **options):
        trainer, task = make(**options)
        trainer.predict(task, Digits(), images, out, existing=existing)

    run("refuse")
    before = content(out)
    with pytest.raises(InputError, match=r"is there already.*--existing skip"):
        run("refuse")
    (out / "a.png").unlink()
    (out / "predictions.csv").unlink()
    (out / "sub/b.c.png.partial").write_text("a killed run leaves this")
    capsys.readouterr()
    run("skip")
    assert "3 of them there already" in capsys.readouterr().out
    assert {name: data for name, data in content(out).items() if "partial" not in name} == before
    run("skip")
    for changes in ({"seed": 6}, {"runs": 4}):
        with pytest.raises(InputError, match="by other settings"):
            run("skip", **changes)
    Image.new("L", (8, 8), 7).save(images / "a.png")
    with pytest.raises(InputError, match=r"a\.png: was made from another image"):
        run("skip")
    assert {name: data for name, data in content(out).items() if "partial" not in name} == before
    run("replace", defenses=["none", "uniform"])
    assert not list(out.rglob("*.mask.png"))


def test_an_interruption_leaves_whole_files(make, images, tmp_path, monkeypatch, capsys):
    from lit_purify.training import own_images

    calls = []

    def save(image, path, said, saved=own_images._save):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        saved(image, path, said)

    monkeypatch.setattr(own_images, "_save", save)
    trainer, task = make(chunk=1)
    with pytest.raises(SystemExit):
        trainer.purify(task, Digits(), images, tmp_path / "out")
    assert "--existing skip goes on" in capsys.readouterr().out
    monkeypatch.undo()
    trainer, task = make(chunk=1)
    trainer.purify(task, Digits(), images, tmp_path / "out", existing="skip")
    trainer, task = make(chunk=1)
    trainer.purify(task, Digits(), images, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["mask", "overlay"])
def test_a_mask_of_somebody_else_stays(kind, make, images, tmp_path):
    """Beside an image that is not there yet, as an interruption leaves it."""
    trainer, task = make()
    trainer.purify(task, Digits(), images, tmp_path / "out")
    (tmp_path / "out/a.png").unlink()
    file = tmp_path / f"out/a.{kind}.png"
    Image.new("L", (8, 8)).save(file)
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=rf"a\.{kind}\.png: was made from another image"):
        trainer.purify(task, Digits(), images, tmp_path / "out", existing="skip")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["a.png", "a.mask.png"])
def test_what_was_not_made_here_is_not_replaced(name, make, images, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "out" / name)
    before = content(tmp_path / "out")
    trainer, task = make()
    with pytest.raises(InputError, match=rf"{re.escape(name)}: was not made here, so it is not replaced"):
        trainer.purify(task, Digits(), images, tmp_path / "out", existing="replace", overlays=False)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("said", ["[1]", "none"])
def test_a_mark_that_is_none_is_that_of_somebody_else(said, tmp_path):
    text = PngInfo()
    text.add_text("lit_purify", said)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    assert said_by(tmp_path / "a.png") == {}


def test_names_that_are_no_text_and_links_that_lead_back(make, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    file = os.fsdecode(os.fsencode(tmp_path / "in" / "sub") + b"/caf\xe9.png")
    Image.new("L", (8, 8), 9).save(file)
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    trainer, task = make()
    trainer.predict(task, Digits(), tmp_path / "in", tmp_path / "out")
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
    for world in (1, 2):
        launched = Launch("evaluate", [*argv, str(tmp_path / str(world))], tmp_path / f"log{world}", world)
        assert launched.wait()[0] == 1, launched.said
        # In the order of the names, whichever process had them.
        assert re.findall(r"bad(\d).jpg: cannot be read", launched.said) == ["0", "1", "2", "3"]
    one, two = (content(tmp_path / str(world)) for world in (1, 2))
    assert {name: data for name, data in one.items() if name != "config.yaml"} == {
        name: data for name, data in two.items() if name != "config.yaml"
    }


def test_what_cannot_be_read_stops_no_other(make, images, tmp_path, capsys):
    def run(output, **options):
        trainer, task = make(chunk=1)
        trainer.predict(task, Digits(), images, tmp_path / output, **options)
        return trainer.unreadable

    assert not run("good")
    data = (images / "a.png").read_bytes()
    (images / "b.png").write_bytes(data[: len(data) // 2])
    (images / "f.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(images / "sub/g.png")
    unreadable = run("out")
    assert [line[len(str(images)) + 1 :].split(";")[0] for line in unreadable] == [
        "b.png: cannot be read as an image",
        "f.png: cannot be read as an image",
        "sub/g.png: gray with more than 8 bits, which would be clipped",
    ]
    assert capsys.readouterr().out.endswith("\n".join(["Not made, 3 of 7:", *unreadable, ""]))
    assert content(tmp_path / "out") == content(tmp_path / "good")
    # Mended.
    for name in ("b.png", "f.png", "sub/g.png"):
        shutil.copy(images / "a.png", images / name)
    assert not run("out", existing="skip")
    assert len(rows(tmp_path / "out/predictions.csv")) == 7


def twice(folder):
    Image.new("L", (8, 8)).save(folder / "a.bmp")


def mask_of_another(folder):
    Image.new("L", (8, 8)).save(folder / "a.mask.png")


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (twice, {}, r"a\.bmp and .*a\.png would both be written to .*a\.png"),
        (mask_of_another, {}, r"would both be written to .*a\.mask\.png"),
        (shutil.rmtree, {}, "--input .*images: no such folder or file"),
        (None, {"output": "images"}, "--output .*images: lies in the input folder"),
        (None, {"output": "images/out"}, "lies in the input folder"),
        (None, {"output": "images/notes.txt"}, "notes.txt: is a file"),
        (None, {"input": "images/notes.txt"}, "notes.txt: cannot be read as an image"),
        (None, {"defense": "papr"}, "--defense papr: the configuration has uniform, paper"),
        (None, {"defenses": ["none"]}, "none of none purifies"),
    ],
)
def test_refused_before_anything_is_written(make, images, tmp_path, change, options, said):
    if change is not None:
        change(images)
    before = content(tmp_path)
    trainer, task = make(options.pop("defenses", MASKED))
    paths = {"input": tmp_path / options.pop("input", "images"), "output": tmp_path / options.pop("output", "out")}
    with pytest.raises(InputError, match=said):
        trainer.purify(task, Digits(), **paths, **options)
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_photo_is_not_written_over(make, images, tmp_path):
    photo = next(path for path in sorted(images.rglob("*.png")))
    before = photo.read_bytes()
    trainer, task = make()
    with pytest.raises(InputError, match="is an image of the input"):
        trainer.purify(task, Digits(), photo, photo.parent, existing="replace")
    assert photo.read_bytes() == before


@pytest.mark.parametrize(
    ("existing", "said"),
    [
        (kind, f"there already{said}")
        for kind, said in (("refuse", ";"), ("skip", ", and none"), ("replace", ", and none"))
    ],
)
def test_a_configuration_of_somebody_else_stays(existing, said, make, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("mine")
    trainer, task = make()
    with pytest.raises(InputError, match=f"config.yaml: is {said}"):
        trainer.purify(task, Digits(), images, tmp_path / "out", existing=existing)


def test_more_processes_than_images_are_refused(make, images, tmp_path, monkeypatch):
    trainer, task = make()
    monkeypatch.setattr(PurifyingTrainer, "world_size", 5)
    with pytest.raises(InputError, match="4 images are fewer than 5 processes"):
        trainer.purify(task, Digits(), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_refused(make, tmp_path):
    (tmp_path / "images").mkdir()
    trainer, task = make()
    with pytest.raises(InputError, match="no images in it"):
        trainer.purify(task, Digits(), tmp_path / "images", tmp_path / "out")


def test_the_commands(images, tmp_path, capsys, monkeypatch):
    """With the configuration and the weights that ship."""
    from pathlib import Path

    monkeypatch.chdir(Path(__file__).parent.parent)
    command = ["--input", str(images), "--output", str(tmp_path / "out"), "--model.init_args.chunk", "16"]
    evaluate(["predict", *command])
    assert len(rows(tmp_path / "out/predictions.csv")) == 4
    # The configuration beside the images repeats the run.
    evaluate(["predict", "--config", str(tmp_path / "out/config.yaml"), "--output", str(tmp_path / "again")])
    before, after = content(tmp_path / "out"), content(tmp_path / "again")
    before.pop("config.yaml"), after.pop("config.yaml")
    assert after == before
    (images / "sub/z.png").write_text("no image")
    (tmp_path / "out/config.yaml").unlink()
    with pytest.raises(SystemExit) as exit_:
        evaluate(["purify", *command, "--existing", "replace"])
    assert exit_.value.code == 1
    assert capsys.readouterr().out.endswith("z.png: cannot be read as an image; remove or replace it\n")
    assert (tmp_path / "out/config.yaml").exists()
    with pytest.raises(SystemExit):
        evaluate(["purify"])
    assert "no input and no output given: say --input FOLDER --output FOLDER" in capsys.readouterr().err
