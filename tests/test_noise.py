import pytest
import torch
from scipy import stats

from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise, philox4x32


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
