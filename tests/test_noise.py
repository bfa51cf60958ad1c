import pytest
import torch
from scipy import stats

from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise, _to_normal, _to_uniform, philox4x32


def noise(count, seed=3, run=0, stream=EVALUATION, start=0):
    index = torch.arange(start, start + count)
    return KeyedNoise(seed, index, torch.full_like(index, run), stream)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The known-answer vectors published with Random123."""
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_distribution():
    like = torch.zeros(500, 3, 8, 8)
    z = noise(500).normal(5, like).flatten().double()
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    u = noise(500).uniform(5, like).flatten().double()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert 0.0 <= float(u.min()) < float(u.max()) < 1.0
    # The four numbers of one counter are independent too.
    correlation = torch.corrcoef(z.reshape(-1, 4).T)
    assert (correlation - torch.eye(4)).abs().max() < 0.02


def by_hand(counter, key):
    """One block of Philox4x32-10 on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(q >> 32) ^ c[1] ^ k[0], q % 2**32, (p >> 32) ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("cached", [1, 8, 32768])
def test_every_value_by_hand(monkeypatch, cached):
    """Records of earlier commits rest on these bits, however many rows are drawn at a time."""
    monkeypatch.setattr("lit_purify.functional.noise._CACHED", cached)
    index, run, step = torch.tensor([0, 3, 2**32 - 1]), torch.tensor([0, 2**31, 7]), 2**32 - 2
    keyed, like = KeyedNoise(2**32 - 5, index, run, ATTACK), torch.zeros(3, 3, 3, 2)
    words = [
        [word for block in range(5) for word in by_hand((block, step, r, i), (2**32 - 5, ATTACK))][:18]
        for i, r in zip(index.tolist(), run.tolist(), strict=True)
    ]
    uniform = torch.tensor([[(word >> 8) * 2.0**-24 for word in row] for row in words])
    assert keyed.uniform(step, like).flatten(1).equal(uniform)
    pairs = torch.tensor(words, dtype=torch.float64).add(0.5).mul(2.0**-32).reshape(3, 9, 2)
    normal = torch.polar((-2.0 * pairs[..., 0].log()).sqrt(), 2.0 * torch.pi * pairs[..., 1])
    assert keyed.normal(step, like).flatten(1).equal(torch.view_as_real(normal).flatten(1).float())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 1, 1), (3, 32, 32)])
def test_a_row_depends_on_its_key_alone(shape):
    whole = noise(64).normal(2, torch.zeros(64, *shape))
    for rows in ([5], [63, 0, 0], list(range(7)), torch.randperm(64).tolist()):
        part = noise(64).rows(torch.tensor(rows)).normal(2, torch.zeros(len(rows), *shape))
        assert torch.equal(part, whole[rows])


def test_other_keys_give_other_noise():
    like = torch.zeros(4, 1, 8, 8)
    draws = [
        noise(4).normal(0, like),
        noise(4).normal(1, like),
        noise(4, seed=4).normal(0, like),
        noise(4, run=1).normal(0, like),
        noise(4, stream=ATTACK).normal(0, like),
        noise(4, start=4).normal(0, like),
    ]
    flat = torch.stack([d.flatten() for d in draws])
    correlation = torch.corrcoef(flat) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.25
    assert len({float(row[0]) for row in flat}) == len(draws)


def test_runs_stand_side_by_side():
    like = torch.zeros(6, 1, 4, 4)
    expanded = noise(3).runs([7, 9])
    assert torch.equal(expanded.normal(0, like)[0::2], noise(3, run=7).normal(0, like[:3]))
    assert torch.equal(expanded.normal(0, like)[1::2], noise(3, run=9).normal(0, like[:3]))


def test_extreme_words_stay_in_range():
    words, out = torch.tensor([0, 0xFFFFFFFF]), torch.empty(2, 2, dtype=torch.float64)
    _to_uniform(words, words, out)
    assert out.float().max() < 1.0
    _to_normal(words, words, out)
    assert torch.isfinite(out).all()
