"""Rows of tables: files and schemas, networks, masks by field, what an attacker can make of a row."""

import gzip
import json
import lzma
from dataclasses import replace

import pytest
import torch
from conftest import keyed, randomized
from test_tutorial import follow

import lit_purify as lp
from lit_purify.callbacks import wandb_report
from lit_purify.data import NSLKDD, UNSWNB15, First, Table
from lit_purify.errors import InputError
from lit_purify.functional.levels import two_level
from lit_purify.functional.losses import margin_loss
from lit_purify.functional.rows import Domain, Relation, fields, one_hot, random_fields
from lit_purify.models import Classifier, TableClassifier, TableDenoiser
from lit_purify.report.rows import by_kind, changed, changes

CSV = """sent,received,total,share,proto,kind
1,2,3,0.5,tcp,normal
4,0,4,0.25,udp,flood
2,8,10,1.0,tcp,normal
0,1,1,0.0,icmp,scan
3,3,6,0.75,tcp,flood
"""


def table(folder, text=CSV, **options):
    (folder / "rows.csv").write_text(text)
    (folder / "test.csv").write_text(text)
    stated = {"label": "kind", "normal": "normal", "categorical": {"proto": ["icmp", "tcp", "udp"]}}
    stated |= {"integer": ["sent", "received", "total"], "increasing": ["sent"], "immutable": ["proto"]}
    stated |= {"bounds": {"share": [0.0, 1.0]}, "relations": ["total = sent + received"]}
    return Table(folder / "rows.csv", test=folder / "test.csv", **(stated | options))


def test_rows_of_a_file(tmp_path):
    """Numbers by the bounds of the training rows, clipped; categories in order; labels, kinds and positions."""
    data = table(tmp_path)
    train, test = data.split("train"), data.split("test")
    domain = train.domain
    assert list(domain.names) == ["sent", "received", "total", "share", "proto=icmp", "proto=tcp", "proto=udp"]
    rows = torch.stack([test[k]["image"] for k in range(5)])
    assert rows.dtype == torch.float32
    inside = domain.values(rows)[:, 0]
    assert torch.equal(
        inside, torch.tensor([1.0, 4, 2, 0, 3], dtype=torch.float64).clamp(domain.low[0], domain.high[0])
    )
    assert rows[:, 3].tolist() == [0.5, 0.25, 1.0, 0.0, 0.75]
    assert rows[:, 4:].argmax(dim=1).tolist() == [1, 2, 1, 0, 1]
    assert [test[k]["label"] for k in range(5)] == [0, 1, 0, 1, 1]
    assert list(test.kinds) == ["normal", "flood", "normal", "scan", "flood"]
    assert len(train) + len(data.split("val")) == 5


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (("3,3,6", "3,,6"), {}, "rows.csv: row 6, column received: the value is missing"),
        (("3,3,6", "3,x,6"), {}, "rows.csv: row 6, column received: 'x' is not a whole number"),
        (("3,3,6", "3,3.5,6"), {}, "rows.csv: row 6, column received: '3.5' is not a whole number"),
        (("3,3,6", "\n3,,6"), {}, "rows.csv: row 7, column received: the value is missing"),
        ((",icmp", ",gre"), {}, "row 5, column proto: 'gre' is not among the values of the training rows"),
        (("", ""), {"drop": ["sent", "received", "total", "share", "proto"], "categorical": {}}, "no column but the"),
        (("0,1,1,0.0", "0,1,1"), {}, "rows.csv: row 5 has 5 values for 6 columns"),
        (("", ""), {"label": "class"}, "label: there is no such column 'class'"),
        (("", ""), {"immutable": ["prot"]}, "immutable: there is no such column 'prot'"),
        (("", ""), {"relations": ["total == sent"]}, "relations: 'total == sent' is not of the form"),
        (("", ""), {"relations": ["total <= sum"]}, "relations: there is no such column 'sum'"),
        (("", ""), {"relations": ["1 <= 2"]}, "relations: '1 <= 2' names no column"),
        (("", ""), {"relations": ["1 = sent"]}, "relations: '1 = sent' names no column, or none before '='"),
        (("", ""), {"bounds": {"share": [0.0]}}, "bounds: share: give two values"),
        (("", ""), {"drop": ["kind"]}, "drop: 'kind' is the label"),
        (("", ""), {"drop": ["proto"]}, "drop: 'proto' is the label, or listed"),
        (("received", "sent"), {}, "rows.csv: two columns are called 'sent'"),
        ((CSV.partition("\n")[2], "1,2,3,0.5,tcp,normal"), {}, "rows.csv: has 1 rows, too few"),
        ((CSV.partition("\n")[2], ""), {}, "rows.csv: has no rows"),
        ((CSV, ""), {}, "rows.csv: has no rows"),
    ],
)
def test_what_is_wrong_is_named(change, options, words, tmp_path):
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as refused:
        table(tmp_path, CSV.replace(*change) if change[0] else CSV, **options).split("train")
    assert "\n" not in str(refused.value)


def test_other_labels_in_the_test_file(tmp_path):
    data = table(tmp_path, normal=None)
    (tmp_path / "test.csv").write_text(CSV.replace("scan", "worm"))
    with pytest.raises(InputError, match=r"test.csv: row 5, column kind: 'worm' is not among the values of"):
        data.split("test")
    (tmp_path / "test.csv").write_text(CSV.replace("share", "portion"))
    with pytest.raises(InputError, match=r"test.csv: columns of the training rows: there is no such column 'share'"):
        data.split("test")


def test_a_misspelled_harmless_label_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"normal = 'Fine': no row has this label; there are flood, normal"):
        table(tmp_path, normal="Fine").split("train")


def test_files_that_cannot_be_read(tmp_path):
    packed = bytearray(gzip.compress(CSV.encode() * 50))
    packed[40:60] = b"\xff" * 20
    (tmp_path / "broken.csv.gz").write_bytes(bytes(packed))
    for name in ("broken.csv.gz", "missing.csv", "missing.parquet"):
        with pytest.raises(InputError, match=name) as refused:
            Table(tmp_path / name, "kind").split("train")
        assert "\n" not in str(refused.value)


def test_parquet_is_read_like_csv(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.read_csv((table(tmp_path)).train)
    frame.to_parquet(tmp_path / "rows.parquet")
    stated = {"label": "kind", "normal": "normal", "categorical": {"proto": []}, "integer": ["sent"]}
    ours, theirs = (Table(tmp_path / name, **stated).split("train") for name in ("rows.parquet", "rows.csv"))
    assert all(torch.equal(ours[k]["image"], theirs[k]["image"]) for k in range(len(theirs)))
    for column in ("received", "proto", "kind"):
        gap = frame.astype({column: object})
        gap.loc[3, column] = None
        gap.to_parquet(tmp_path / "gap.parquet")
        with pytest.raises(InputError, match=f"row 5, column {column}: the value is missing"):
            Table(tmp_path / "gap.parquet", **stated).split("train")


def test_scaling_does_not_look_at_other_rows(tmp_path):
    """The least and largest values are those of the training rows, not of validation or test rows."""
    data = table(tmp_path, CSV + "".join(f"{k},1,{k + 1},0.5,tcp,normal\n" for k in range(5, 60)), val_fraction=0.4)
    (tmp_path / "test.csv").write_text(CSV + "900,1,901,0.5,tcp,normal\n")
    train = data.split("train")
    sent = data.split("train").domain.values(torch.stack([train[k]["image"] for k in range(len(train))]))[:, 0]
    assert (float(train.domain.low[0]), float(train.domain.high[0])) == pytest.approx(
        (float(sent.min()), float(sent.max()))
    )
    assert float(data.split("test")[5]["image"][0]) == 1.0
    assert float(train.domain.high[0]) < 60


def test_a_rare_category_among_the_validation_rows(tmp_path):
    """Is one of the file's categories, wherever the split puts its row."""
    lines = CSV.splitlines()
    for k in range(1, 6):
        text = "\n".join([*lines[:k], lines[k].replace("tcp", "gre"), *lines[k + 1 :]]) + "\n"
        split = table(tmp_path, text, categorical={"proto": []}).split("val")
        assert split[0]["image"][4:].sum() == 1.0


def nslkdd(folder, rows=40):
    """Files in the original's layout."""
    for name in ("KDDTrain+_20Percent.txt.xz", "KDDTest+.txt.xz"):
        with lzma.open(folder / name, "wt") as stream:
            for k in range(rows):
                words = ["tcp" if k % 3 else "udp", "http" if k % 2 else "private", "SF"]
                counts = [k % 7, k, 2 * k, 0, 0, 0, k % 5, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, k + 1, 2]
                rates = [0.5] * 7 + [100, 50, 0.5] + [0.1] * 7
                kind = "normal" if k % 2 else "neptune" if k % 4 else "satan"
                line = [counts[0], *words, *counts[1:], *rates, kind, 21 if k % 5 else 18]
                stream.write(",".join(map(str, line)) + "\n")
    return folder


def test_nslkdd(tmp_path):
    data = NSLKDD(nslkdd(tmp_path))
    split = data.split("test")
    assert (len(split), tuple(split[0]["image"].shape), list(split.classes)) == (40, (121,), ["normal", "attack"])
    assert split.domain.onehot == [3, 70, 11]
    assert "num_outbound_cmds" not in split.domain.names
    assert float(split[0]["image"][split.domain.place["su_attempted"]]) == 0.0
    assert len(NSLKDD(tmp_path, test="KDDTest-21").split("test")) == 8
    assert len(NSLKDD(tmp_path, test="KDDTest-21").split("train")) == len(data.split("train")) == 36
    # An error names the line of the file, also where other lines are left out.
    lines = lzma.decompress((tmp_path / "KDDTest+.txt.xz").read_bytes()).decode().splitlines()
    lines[5] = lines[5].replace("SF", "XX")
    (tmp_path / "KDDTest+.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"KDDTest\+.txt: row 6, column flag: 'XX' is not among the values"):
        NSLKDD(tmp_path, test="KDDTest-21").split("test")
    with pytest.raises(InputError, match=r"NSL-KDD \(Tavallaee et al., CISDA 2009\) from unb.ca"):
        NSLKDD(tmp_path / "nowhere").split("train")


def test_unsw_nb15(tmp_path):
    """A file in the original's layout, with its mark of UTF-8 at the start."""
    words = (
        "id dur proto service state spkts dpkts sbytes dbytes rate sttl sload sloss dloss swin stcpb dtcpb dwin tcprtt "
    )
    words += "synack ackdat is_ftp_login is_sm_ips_ports attack_cat label"
    for part, state in (("training", "FIN"), ("testing", "ACC")):
        lines = [words.split()]
        for k in range(20):
            counts = [k, 2 * k, 100 * k, 7, 0.5 * k, 62, 1e3, 0, 0, 255, 1, 2, 255, 0.3, 0.1, 0.2]
            kind = ("Normal", "Fuzzers", "DoS")[k % 3]
            lines.append([k + 1, 0.1 * k, "tcp" if k % 2 else "udp", "-", state, *counts, 0, 0, kind, int(k % 3 > 0)])
        text = "\n".join(",".join(map(str, line)) for line in lines)
        (tmp_path / f"UNSW_NB15_{part}-set.csv").write_text(text, encoding="utf-8-sig")
    split = UNSWNB15(tmp_path).split("test")
    domain, row = split.domain, torch.stack([split[k]["image"] for k in range(20)])
    assert (len(split), list(split.classes), domain.onehot) == (20, ["Normal", "attack"], [2, 1, 11])
    assert [split[k]["label"] for k in range(3)] == [0, 1, 1]
    assert not {"id", "label", "attack_cat"} & set(domain.names)
    point = (row + 0.5).clamp(max=1.0)
    changed = (domain.repair(point, row, 1.0) != row).any(dim=0)
    assert [changed[domain.place[name]].item() for name in ("dur", "spkts", "rate", "swin", "proto=tcp")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(InputError, match=r"UNSW-NB15 \(Moustafa and Slay, MilCIS 2015\) from research.unsw.edu.au"):
        UNSWNB15(tmp_path / "nowhere").split("train")


def domain(**changes):
    """A number, a whole one that grows, one fixed, what follows from the first two, and a group of two categories."""
    marks = {"fixed": [2], "raised": [1], "whole": [1]}
    masks = {name: torch.tensor([k in places for k in range(6)]) for name, places in marks.items()}
    low, high = torch.zeros(6, dtype=torch.float64), torch.tensor([1.0, 10, 1, 11, 1, 1], dtype=torch.float64)
    made = Domain(
        ["a", "n", "f", "sum", "c=x", "c=y"], low, high, [2], **masks, relations=[Relation.parse("sum = a + n")]
    )
    return replace(made, **changes) if changes else made


ROW = torch.tensor([[0.5, 0.3, 0.7, 3.5 / 11, 1.0, 0.0]])


def test_repair_by_hand():
    """Rounded towards the row, only upward, what is fixed restored, what follows computed, one category."""
    d = domain()
    up = d.repair(torch.tensor([[0.25, 0.58, 0.1, 0.9, 0.2, 0.9]]), ROW, 0.5)
    assert d.values(up)[0, :4].tolist() == pytest.approx([0.25, 5, 0.7, 5.25], abs=1e-6)
    assert up[0, 4:].tolist() == [1.0, 0.0]
    far = d.repair(torch.tensor([[0.5, 0.1, 0.7, 0.9, 0.2, 0.9]]), ROW, 1.0)
    assert d.values(far)[0, :2].tolist() == pytest.approx([0.5, 3])
    assert far[0, 4:].tolist() == [0.0, 1.0]
    assert not d.violations(torch.cat([up, far]), ROW.expand(2, -1)).any()


@pytest.mark.parametrize(
    "change",
    [{0: 0.6}, {1: 0.2}, {1: 0.35}, {2: 0.6}, {3: 0.9}, {4: 0.5}, {4: 0.0}, {5: 1.0}],
    ids=["sum no longer follows", "falls", "no whole number", "fixed", "other sum", "half a category", "none", "two"],
)
def test_violations_are_seen(change):
    point = ROW.clone()
    for k, value in change.items():
        point[0, k] = value
    assert domain().violations(point, ROW).tolist() == [True]
    assert domain().violations(ROW, ROW).tolist() == [False]


def test_repaired_rows_keep_the_threat_model(tmp_path):
    """Of any point: within eps, nothing violated; and once more changes nothing that is wrong."""
    split = NSLKDD(nslkdd(tmp_path)).split("train")
    row = torch.stack([split[k]["image"] for k in range(30)])
    for eps in (0.05, 0.4, 1.0):
        point = (row + eps * (2 * torch.rand(row.shape, generator=torch.Generator().manual_seed(1)) - 1)).clamp(0, 1)
        assert split.domain.violations(point, row).all()
        repaired = split.domain.repair(point, row, eps)
        assert not split.domain.violations(repaired, row).any()
        assert float((repaired - row).abs().max()) <= eps + 1e-6
        assert (repaired != row).any(dim=1).float().mean() > 0.8


def test_gradient_of_a_repair():
    """Of what follows: to what it follows from; of what is fixed: nowhere; through rounding: as if there were none."""
    leaf = ROW.clone().requires_grad_()
    domain().repair(leaf, ROW, 0.5).backward(torch.tensor([[1.0, 1.0, 1.0, 11.0, 0.0, 0.0]]))
    assert leaf.grad[0, :4].tolist() == pytest.approx([2.0, 11.0, 0.0, 0.0])


def test_inequality_that_cannot_be_kept_is_given_up():
    d = domain(relations=[Relation.parse("a + f <= 1")])
    row = torch.tensor([[0.2, 0.3, 0.7, 0.5, 1.0, 0.0]])
    points = torch.tensor([[0.3, 0.3, 0.7, 0.5, 1.0, 0.0], [0.6, 0.3, 0.7, 0.5, 1.0, 0.0]])
    assert d.repair(points, row.expand(2, -1), 1.0)[:, 0].tolist() == pytest.approx([0.3, 0.2])
    assert d.penalty(points, row.expand(2, -1)).tolist() == pytest.approx([0.0, 0.3])
    # A row that breaks it is not bound by it.
    assert not d.violations(points[1:], torch.tensor([[0.5, 0.3, 0.7, 0.5, 1.0, 0.0]])).any()


def test_fields_and_one_hot():
    assert fields(6, [2, 2]).tolist() == [0, 1, 2, 2, 3, 3]
    with pytest.raises(InputError, match="the groups have 7 features, a row has 6"):
        fields(6, [7])
    row = torch.tensor([[0.3, 0.2, 0.9, 0.6, 0.4]], requires_grad=True)
    hard = one_hot(row, [2, 2])
    assert hard[0].tolist() == [pytest.approx(0.3), 0.0, 1.0, 1.0, 0.0]
    hard.sum().backward()
    assert row.grad[0].tolist() == [1.0] * 5
    mask = random_fields(torch.zeros(200, 6), torch.rand(200, 7), [2, 2])
    assert torch.equal(mask[:, 2::2], mask[:, 3::2])
    assert 0.3 < float(mask.mean()) < 0.7


@pytest.fixture(scope="module")
def denoiser():
    return randomized(TableDenoiser(features=7, onehot=[3], width=16, blocks=2))


def test_a_constant_map_is_the_scalar_level(denoiser):
    """Bit for bit; another level of one field changes the output; a group has the strongest level of its features."""
    x, t = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 50, 200, 900])
    scalar = denoiser(x, t)
    assert torch.equal(scalar, denoiser(x, t[:, None].expand(-1, 7)))
    assert torch.equal(scalar, denoiser(x, two_level(torch.ones(4, 7), t, 1)))
    one = torch.zeros(4, 7)
    one[:, 2] = 1
    assert not torch.allclose(scalar, denoiser(x, two_level(one, t, 1)))


def test_noise_of_independent_gaussians_is_exact(denoiser):
    """With an output of zero it is the best estimate for features u ~ N(m, s^2): closed form."""
    plain = TableDenoiser(features=7, width=16, blocks=1)
    x, abar = torch.randn(3, 7), plain.schedule.at(120)
    m, s = plain.mean, plain.log_std.exp()
    expected = (1 - abar).sqrt() * (x - abar.sqrt() * m) / (abar * s**2 + 1 - abar)
    assert torch.allclose(plain(x, torch.full((3,), 120)), expected.float(), atol=1e-5)


class Straight(torch.nn.Module):
    """Logits of a row are W x."""

    def __init__(self, weights):
        super().__init__()
        self.layer = torch.nn.Linear(weights.shape[1], len(weights), bias=False)
        self.layer.weight.data = weights

    def forward(self, row):
        return self.layer(row)


WEIGHTS = torch.tensor([[3.0, -1.0, 0.0, 0.5, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
"""The first logit is the largest."""


@pytest.mark.parametrize(("rule", "power"), [(lp.GradientTimesInput, 1.0), (lp.FirstLayer, 2.0)])
def test_mask_of_a_linear_classifier(rule, power):
    """Closed form: |w x|, to the power of the rule; groups count together and are chosen as a whole."""
    classifier = Classifier(Straight(WEIGHTS), 6, 2, 0)
    row = torch.tensor([[0.2, 0.9, 0.5, 0.8, 0.0, 1.0]])
    counts = (WEIGHTS[0] * row[0]).abs() ** power
    mask = rule(lp.TopFraction(0.5), onehot=[2])
    expected = torch.stack([*counts[:4], counts[4:].sum()])
    assert torch.allclose(mask.saliency(classifier, row).flatten(), expected)
    # Of five fields half, 2: the group and the feature with |w x| = 0.9.
    assert mask(classifier, row, keyed(1))[0].tolist() == [0, 1, 0, 0, 1, 1]
    threshold = rule(lp.MinMaxThreshold(0.9), onehot=[2])
    assert threshold(classifier, row, keyed(1))[0].tolist() == [0, 0, 0, 0, 1, 1]


def test_gradient_times_input_of_images(classifier, images):
    """As much as plain autograd says; relaxed, it has a gradient."""
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(leaf).amax(dim=1).sum(), leaf)
    rule = lp.GradientTimesInput(lp.TopFraction(0.25))
    assert torch.allclose(rule.saliency(classifier, images), (images * gradient).abs())
    mask = rule(classifier, images, keyed(len(images)))
    assert mask.shape == images.shape
    assert mask.flatten(1).sum(dim=1).tolist() == [16] * len(images)
    rule.relaxed(classifier, leaf, keyed(len(images)), 0.1).sum().backward()
    assert float(leaf.grad.abs().max()) > 0


def test_control_masks_of_rows(images):
    """As many features, at random; everything; nothing; moved within the row, not between rows."""
    row, classifier = torch.rand(3, 6), Classifier(Straight(WEIGHTS), 6, 2, 0)
    rule = lp.FirstLayer(lp.TopFraction(0.5))
    assert lp.RandomArea(rule)(classifier, row, keyed(3)).sum(dim=1).tolist() == [3] * 3
    assert lp.FullMask()(classifier, row, keyed(3)).equal(torch.ones(3, 6))
    rolled, mask = (each(classifier, row, keyed(3)) for each in (lp.ShiftedMask(rule), rule))
    assert torch.equal(rolled, mask.roll(3, dims=1))


def purifiers(denoiser):
    mask = lp.FirstLayer(lp.TopFraction(0.4), onehot=[3])
    return {
        "uniform": lp.UniformPurifier(denoiser, level=60, steps=2),
        "heterogeneous": lp.HeterogeneousPurifier(denoiser, mask, high=80, low=40, steps=3, jump=5),
        "variable": lp.VariableIntensityPurifier(denoiser, mask, high=80, low=40, steps=2),
    }


@pytest.fixture(scope="module")
def network():
    return randomized(TableClassifier(features=7, num_classes=2, hidden=[8]))


def data(folder):
    """Fifty rows, with what an attacker can do."""
    lines = ["sent,received,total,share,proto,kind"]
    for k in range(50):
        a, b = k % 7, (3 * k) % 5
        kind = "normal" if (a + b) % 2 else ("flood", "scan")[k % 3 == 0]
        lines.append(f"{a},{b},{a + b},{(k % 11) / 10},{('tcp', 'udp', 'icmp')[k % 3]},{kind}")
    return table(folder, "\n".join(lines) + "\n", subset=First(6))


def test_a_constant_mask_is_uniform_noise_on_rows(denoiser, network):
    row, noise = torch.rand(4, 7, generator=torch.Generator().manual_seed(3)), keyed(4)
    uniform = lp.UniformPurifier(denoiser, level=60, steps=2)
    variable = lp.VariableIntensityPurifier(denoiser, lp.FullMask(), high=60, low=1, steps=2)
    assert torch.allclose(uniform(row, noise), variable(row, noise, torch.ones(4, 7)), atol=1e-6)


def test_categories_after_purification(denoiser, network):
    """One category each; the gradient is that of the purifier, and results say straight_through."""
    row = torch.rand(4, 7, generator=torch.Generator().manual_seed(3))
    inner = lp.UniformPurifier(denoiser, level=60, steps=2)
    outer = lp.OneHotPurifier(denoiser, inner)
    made = outer(row, keyed(4))
    assert made[:, 4:].sum(dim=1).tolist() == [1.0] * 4
    assert torch.equal(made[:, :4], inner(row, keyed(4))[:, :4])
    view = lp.Exact().attacked(lp.DefendedClassifier(outer, network))
    assert view.gradient == "straight_through"
    found = lp.gradcheck(network, {"hard": outer}, row, torch.tensor([0, 1, 0, 1]))
    assert {f.check: f.verdict for f in found}["finite_differences"] == "not applicable"


def test_capgd_beats_pgd_and_keeps_the_domain(tmp_path, network):
    """Every row of every attack can be sent; the best of CAPGD's starts is at least as good as the row itself."""
    split = data(tmp_path).split("train")
    row = torch.stack([split[k]["image"] for k in range(30)])
    label = torch.tensor([split[k]["label"] for k in range(30)])
    losses = {}
    for attack in (lp.CAPGD(eps=0.4), lp.PGD(eps=0.4, steps=10), lp.FGSM(eps=0.4), lp.Square(eps=0.4, steps=30)):
        attack.prepare(range(30), split.domain)
        found = attack(network, row, label, keyed(30, stream=1))
        assert not split.domain.violations(found, row).any()
        assert float((found - row).abs().max()) <= 0.4 + 1e-5
        assert float((found != row).any(dim=1).float().mean()) > 0.5
        losses[type(attack).__name__] = margin_loss(network(found), label)
    clean = margin_loss(network(row), label)
    assert (losses["CAPGD"] >= clean).all()
    assert losses["CAPGD"].mean() >= max(losses[name].mean() for name in ("PGD", "FGSM", "Square")) - 1e-4
    free = lp.PGD(eps=0.4, steps=10)
    free.prepare(range(30), replace(split.domain, constrained=False))
    assert split.domain.violations(free(network, row, label, keyed(30, stream=1)), row).any()


class Rogue(lp.attacks.Attack):
    """Leaves the domain, within the norm."""

    queries = lp.attacks.Queries(0, 0)

    def perturb(self, model, image, label, noise, chunk):
        size = self.eps if self.norm == "linf" else self.eps / image.shape[1] ** 0.5
        return (image + size * (1 - 2 * (image > 0.5).float())).clamp(0, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_an_attack_returns_is_held_to_the_domain(norm, tmp_path, network):
    """Its rows are repaired; where the repair exceeds the norm, the row itself is returned."""
    split = data(tmp_path).split("train")
    row = torch.stack([split[k]["image"] for k in range(30)])
    rogue = Rogue(norm, 0.4)
    rogue.prepare(range(30), split.domain)
    label = torch.zeros(30, dtype=torch.int64)
    assert split.domain.violations(rogue.perturb(None, row, label, None, 8), row).all()
    found = rogue(network, row, label, keyed(30, stream=1))
    assert not split.domain.violations(found, row).any()
    assert (found != row).any()
    # Both addends at the edge of the ball: their sum makes the row too long.
    one = domain()
    edge = Rogue("l2", 0.5)
    edge.perturb = lambda model, image, label, noise, chunk: image + torch.tensor([[0.0, 0.5, 0, 0, 0, 0]])
    edge.prepare(range(1), one)
    assert torch.equal(edge(Straight(WEIGHTS), ROW, label[:1], keyed(1, stream=1)), ROW)


def test_a_penalty_leads_back_to_the_relation():
    """Its gradient is subtracted: a step along what remains makes the violation smaller."""
    attack = lp.CAPGD(penalty=2.0)
    attack.prepare(range(1), domain(relations=[Relation.parse("a + f <= 1")]))
    row = torch.tensor([[0.2, 0.3, 0.7, 0.5, 1.0, 0.0]])
    _, back = attack.shown(torch.tensor([[0.6, 0.3, 0.7, 0.5, 1.0, 0.0]]), row)
    assert back(torch.zeros(1, 6))[0].tolist() == [-2.0, 0.0, -2.0, 0.0, 0.0, 0.0]


def test_rates_of_detection():
    """By hand: shares right of attacks, shares wrong of harmless rows, by kind."""
    clean, robust = torch.tensor([1.0, 0.5, 1.0, 0.5]), torch.tensor([0.0, 0.5, 1.0, 0.5])
    kinds = ["normal", "normal", "flood", "scan"]
    found = by_kind({"clean": clean, "robust": robust}, torch.tensor([0, 0, 1, 1]), kinds, 2)
    assert [found["detection"][name][0] for name in ("clean", "robust")] == [0.75, 0.75]
    assert [found["false_alarms"][name][0] for name in ("clean", "robust")] == [0.25, 0.75]
    assert found["kinds"] == {"normal": [2, 0.75, 0.25], "flood": [1, 1.0, 1.0], "scan": [1, 0.5, 0.5]}


def test_changes_in_words():
    """In the units of the columns, a category by its name, with what the classifier was shown."""
    record = lp.evaluation.Record("none", "capgd", 0, 0, [0], [1], 0.0, 0.0, 0.0)
    attacked = torch.tensor([0.75, 0.3, 0.7, 3.5 / 11, 0.0, 1.0])
    view = lp.evaluation.View(record, ROW[0], attacked, ROW[0], ROW[0], None)
    assert changes(view, domain().stated()) == "a 0.5 \u2192 0.75 (purified 0.5); c x \u2192 y (purified x)"
    (first, second) = changed([view], domain().stated())
    assert (first["column"], first["changed"], second["column"]) == ("a", 1.0, "c")
    assert first["mean change"] == pytest.approx(0.25)


def test_evaluation_of_rows(tmp_path, denoiser, network):
    """Records of any batch size and of a resumed run are the same; the summary tells kinds and detection."""
    split, attacks = data(tmp_path).evaluated, {"capgd": lp.CAPGD(eps=0.3, steps=2, eot=1, select="last")}
    defenses = {"none": lp.NoPurifier(), **purifiers(denoiser)}
    whole = lp.evaluate(network, defenses, attacks, split, runs=2, chunk=16, folder=tmp_path / "run", progress=False)
    parts = lp.evaluate(network, defenses, attacks, split, runs=2, chunk=16, batch_size=2, progress=False)
    assert [replace(r, seconds=0) for r in whole.records] == [replace(r, seconds=0) for r in parts.records]
    records = tmp_path / "run/records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:9]) + '{"torn')
    again = lp.evaluate(network, defenses, attacks, split, runs=2, chunk=16, folder=tmp_path / "run", progress=False)
    assert [replace(r, seconds=0) for r in whole.records] == [replace(r, seconds=0) for r in again.records]
    result = whole.summary["results"][0]
    labels = [split[k]["label"] for k in range(6)]
    wrong = [r for r in whole.records if r.defense == "none" and r.label == 0 and r.adversarial[0] != 0]
    assert result["false_alarms"]["robust"][0] == pytest.approx(len(wrong) / labels.count(0))
    assert sum(count for count, *_ in result["kinds"].values()) == 6
    page = (tmp_path / "run/report.html").read_text()
    assert "By kind under capgd" in page
    assert "Changed columns" in page
    assert "false alarms" in str(whole)
    shown = wandb_report._pictures(whole.views, list(split.classes), whole.summary["features"])
    assert len(shown["samples"].data) == len(whole.views)
    assert {row[2] for row in shown["columns"].data} >= {"sent", "share"}
    assert "detection/none/capgd" in (figures := wandb_report._figures(whole.summary))
    assert len(figures["kinds"].data) == 4 * len(result["kinds"])
    assert all(finding.passed for finding in lp.gradcheck(network, purifiers(denoiser), split, samples=2))
    audited = lp.audit(network, purifiers(denoiser)["variable"], attacks, split, samples=2, runs=1, proposals=1)
    assert {f.check: f.verdict for f in audited}["unbounded"] == "not applicable"


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    """The blocks of docs/tables.md, in order, with the fewer steps that stand beside them."""
    monkeypatch.chdir(tmp_path)
    follow("tables.md", tmp_path, capsys)
    summary = json.loads((tmp_path / "runs/evaluation/summary.json").read_text())
    assert [result["defense"] for result in summary["results"]] == ["none", "uniform", "variable"]
    assert summary["results"][0]["detection"]
