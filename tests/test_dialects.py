"""Readers of public checkpoints against second writings of their networks, through files as they are published."""

import contextlib
import copy
import functools
import json
import math
import re

import diffusers
import pytest
import torch
from conftest import randomized
from reference_files import CASES, IMPROVED, OLD, SIZE
from reference_networks import apply, ddpm, draw, guided_diffusion, score_sde

from lit_purify.errors import InputError, notice
from lit_purify.functional.levels import two_level
from lit_purify.functional.schedule import Schedule
from lit_purify.models import load_denoiser, readers
from lit_purify.models.files import save_network

ONE_EACH = ["DDPM++", "guided", "improved", "ddpm", "diffusers, padding 0"]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def built(name):
    return CASES[name].build(CASES[name].state()).eval().requires_grad_(False)


def draws(case, dtype=torch.float32):
    """Noised images (4, 3, S, S) at the first, two middle and the last step."""
    x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype), torch.tensor([1, case.steps // 3, case.steps - 170, case.steps])


def assert_close(actual, expected, tolerance):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


@contextlib.contextmanager
def refused(match=""):
    """One line."""
    with pytest.raises(InputError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


@each_case
def test_a_file_gives_the_reference(case, tmp_path):
    network = case.load(case.file(tmp_path)).eval()
    assert (network.channels, network.size, network.schedule.steps) == (3, SIZE, case.steps)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        x, t = draws(case, dtype)
        with torch.no_grad():
            assert_close(network.to(dtype)(x, t), case.reference(x, t)[:, :3], tolerance)


@pytest.mark.parametrize("name", [*ONE_EACH, "NCSN++", "guided, options", "diffusers, resnet"])
def test_level_maps(name):
    """A constant map is the plain level, alone and beside an image of two levels; others matter and have gradients."""
    network, (x, t) = built(name), draws(CASES[name])
    plain = network(x, t)
    level = t.reshape(-1, 1, 1, 1).repeat(1, 1, SIZE, SIZE)
    assert_close(network(x, level), plain, 1e-6)
    mask = torch.zeros(4, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    assert_close(network(x, two_level(mask, t, t)), plain, 1e-6)
    mixed = two_level(mask, t, torch.cat((t[:1] + 400, t[1:])))
    assert_close(network(x, mixed)[1:], plain[1:], 1e-6)

    x.requires_grad_()
    out = network(x[:1], mixed.rows(slice(1)))
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient[0] != 0).all()
    for whole in (t[:1], t[:1] + 400):
        assert float((out - network(x[:1], whole)).abs().max() / out.abs().max()) > 1e-3


@pytest.mark.parametrize("name", [*ONE_EACH, "NCSN++", "guided, options"])
def test_a_converted_file_is_the_same_network(name, tmp_path):
    network, (x, t) = built(name), draws(CASES[name])
    save_network(network, tmp_path / "own.safetensors")
    again = load_denoiser(tmp_path / "own.safetensors")
    assert torch.equal(again.schedule.abar, network.schedule.abar)
    level = t.reshape(-1, 1, 1, 1).repeat(1, 1, SIZE, SIZE)
    level[:, :, : SIZE // 2] -= t[0] - 1
    level[0, :, 0] = 2
    for levels in (t, level):
        assert torch.equal(again(x, levels), network(x, levels))


CIFAR10 = {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,)}
IMAGENET = {"width": 256, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2, "attention": (32, 16, 8), "head_width": 64}
PUBLISHED = {
    "score_sde, DDPM++ deep": (readers.load_score_sde, score_sde, 32, CIFAR10 | {"blocks": 8}, 106_632_579),
    "score_sde, NCSN++ deep": (
        readers.load_score_sde,
        score_sde,
        32,
        CIFAR10 | {"blocks": 8, "fir": True, "pyramid": True},
        107_521_411,
    ),
    "guided-diffusion, 256x256": (readers.load_guided_diffusion, guided_diffusion, 256, IMAGENET, 552_814_086),
    "improved-diffusion, CIFAR-10": (
        functools.partial(readers.load_guided_diffusion, size=32, **IMPROVED),
        guided_diffusion,
        32,
        CIFAR10 | {"blocks": 3, "attention": (16, 8), "heads": 4, "updown": False},
        52_546_438,
    ),
    "ddpm, CIFAR-10": (readers.load_ddpm, ddpm, 32, CIFAR10, 35_746_307),
}


@pytest.mark.parametrize(("build", "network", "size", "shape", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_sizes_by_default(build, network, size, shape, count):
    with torch.device("meta"):
        state = draw(network, size, **shape)
        denoiser = build(state)
    assert denoiser.size == size
    assert sum(value.numel() for value in state.values()) == count
    variance = sum(state[name].numel() // 2 for name in ("out.2.weight", "out.2.bias") if name in state)
    assert sum(p.numel() for p in denoiser.parameters()) == count - variance


def test_published_size_of_diffusers():
    """google/ddpm-cifar10-32, whose configuration is older than many of today's settings."""
    down, attended = "DownBlock2D", "AttnDownBlock2D"
    config = {key: OLD[key] for key in ("attention_head_dim", "flip_sin_to_cos", "freq_shift", "norm_eps")}
    config |= {"block_out_channels": [128, 256, 256, 256], "down_block_types": [down, attended, down, down]}
    config |= {"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 2}
    config |= {"_class_name": "UNet2DModel", "downsample_padding": 0, "act_fn": "silu", "sample_size": 32}
    config |= {"in_channels": 3, "out_channels": 3}
    with torch.device("meta"):
        state = diffusers.UNet2DModel(**{k: v for k, v in config.items() if k[0] != "_"}).state_dict()
        denoiser = readers.diffusers_unet(state, config, None)
    assert sum(p.numel() for p in denoiser.parameters()) == 35_746_307


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_name_too_few_or_too_many_is_refused(name):
    case = CASES[name]
    with torch.device("meta"):
        state = {key: torch.empty(value.shape) for key, value in case.state().items()}
        for missing in list(state)[::20]:
            with refused() as caught:
                case.build({key: value for key, value in state.items() if key != missing})
        with refused() as caught:
            case.build(state | {"ghost.weight": torch.empty(3)})
        assert "ghost.weight" in str(caught.value)
        key = next(key for key in state if key.endswith("weight") and state[key].ndim == 1)
        with refused():
            case.build(state | {key: torch.empty(7)})


def abar_of(betas):
    return [math.prod(1 - beta for beta in betas[:t]) for t in range(len(betas) + 1)]


def linear_abar(steps, first=1e-4, last=2e-2):
    return abar_of([first + (last - first) * i / (steps - 1) for i in range(steps)])


def cosine_abar(steps):
    """cos^2(pi/2 (t/T + s) / (1 + s)), normalized; only the last beta comes to the limit of 0.999."""
    at = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps)]
    return [value / at[0] for value in at] + [at[-1] / at[0] * 1e-3]


def assert_schedule(denoiser, expected, tolerance=1e-9):
    abar = denoiser.schedule.abar
    assert abar.dtype == torch.float64
    assert abar.shape == (len(expected),)
    torch.testing.assert_close(abar, torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=0)


def test_schedules():
    for name in ("guided", "ddpm"):
        assert_schedule(built(name), linear_abar(1000))
    for name in ("guided, heads", "improved"):
        assert_schedule(built(name), cosine_abar(CASES[name].steps))
    times = [k / 1000 for k in range(1001)]
    assert_schedule(built("DDPM++"), [math.exp(-0.5 * 19.9 * t**2 - 0.1 * t) for t in times])


def test_schedules_that_are_asked_for():
    state = CASES["guided"].state()
    assert_schedule(readers.load_guided_diffusion(state, size=SIZE, schedule="cosine", steps=1000), cosine_abar(1000))
    # Of four times as many steps, each a quarter as large.
    linear = readers.load_guided_diffusion(state, size=SIZE, schedule="linear", steps=4000)
    assert_schedule(linear, linear_abar(4000, 1e-4 / 4, 2e-2 / 4))
    with refused("quadratic"):
        readers.load_guided_diffusion(state, size=SIZE, schedule="quadratic")


@pytest.mark.parametrize("place", ["scheduler/scheduler_config.json", "scheduler_config.json", "../scheduler", None])
@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
def test_schedule_of_diffusers(place, kind, tmp_path):
    """The weights lie beside the scheduler, in a folder beside it, or at the root of both."""
    folder = tmp_path / "unet"
    folder.mkdir()
    CASES["diffusers, heads"].file(folder)
    scheduler = diffusers.DDPMScheduler(beta_schedule=kind, beta_end=0.03, num_train_timesteps=500)
    if place == "../scheduler":
        scheduler.save_pretrained(tmp_path / "scheduler")
    elif place:
        scheduler.save_pretrained((folder / place).parent)
    network = readers.load_diffusers(folder)
    if place is None:
        assert_schedule(network, linear_abar(1000))
    else:
        assert_schedule(network, linear_abar(500, last=0.03) if kind == "linear" else cosine_abar(500))
        assert_schedule(network, [1.0, *scheduler.alphas_cumprod.tolist()], tolerance=1e-4)


OTHERS = [
    ({}, {"prediction_type": "v_prediction"}, "v_prediction"),
    ({}, {"beta_schedule": "sigmoid"}, "sigmoid"),
    # Those of score_sde and Karras et al. mean other noise by their numbers.
    ({}, {"_class_name": "ScoreSdeVpScheduler"}, "_class_name = ScoreSdeVpScheduler is not supported"),
    ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, {}, "SkipDownBlock2D"),
    ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, {}, "CrossAttnUpBlock2D"),
    ({"num_class_embeds": 10}, {}, "num_class_embeds"),
    ({"time_embedding_type": "fourier"}, {}, "fourier"),
    ({"act_fn": "gelu"}, {}, "gelu"),
    # What diffusers makes of scale_shift unless told otherwise: attention without a normalization of its own.
    ({"add_attention": True, "resnet_time_scale_shift": "scale_shift"}, {}, "attn_norm_num_groups"),
]


@pytest.mark.parametrize(("changed", "scheduler", "named"), OTHERS)
def test_settings_of_other_networks_are_refused(changed, scheduler, named):
    case = CASES["diffusers, heads"]
    with refused(named):
        readers.diffusers_unet(
            case.state(), dict(case.model.config) | changed, dict(diffusers.DDPMScheduler().config) | scheduler
        )


LOOKS_LIKE = {
    "score_sde": "score_sde",
    "guided_diffusion": "guided_diffusion",
    "ddpm": "load_ddpm",
    "diffusers": "diffusers",
}


# Each is given once, and wanted once.
DIFFERENT = list(zip(ONE_EACH, [*ONE_EACH[3:], *ONE_EACH[:3]], strict=True))


@pytest.mark.parametrize(("wanted", "given"), DIFFERENT)
def test_another_dialect_is_named(wanted, given, tmp_path):
    wanted, given = CASES[wanted], CASES[given]
    path = given.file(tmp_path)
    with refused() as caught:
        wanted.load(path)
    message = str(caught.value).replace(str(tmp_path), "").replace(f"not of load_{wanted.dialect}", "")
    expected = "give the folder" if wanted.dialect == "diffusers" else LOOKS_LIKE[given.dialect]
    assert re.search(expected, message), message


def test_a_network_of_classes_is_refused(tmp_path):
    for name in ("guided", "improved"):
        case = CASES[name]
        torch.save(case.state() | {"label_emb.weight": torch.zeros(10, 4 * 64)}, tmp_path / "weights.pt")
        with refused("class"):
            case.load(tmp_path / "weights.pt")


def test_a_folder_must_be_whole(tmp_path):
    with refused(r"config\.json"):
        readers.load_diffusers(tmp_path)
    CASES["diffusers, heads"].model.save_config(tmp_path)
    with refused("diffusion_pytorch_model"):
        readers.load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refused(r"config\.json"):
        readers.load_diffusers(tmp_path)


def test_folders_of_every_form_are_read(tmp_path, capsys):
    notice.cache_clear()
    case = CASES["diffusers, heads"]
    x, t = draws(case)
    wanted = case.build(case.state())(x, t)
    case.model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    case.model.save_pretrained(tmp_path / "training" / "unet_ema")
    randomized(copy.deepcopy(case.model)).save_pretrained(tmp_path / "training" / "unet")
    copy.deepcopy(case.model).half().save_pretrained(tmp_path / "half", variant="fp16")
    case.file(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    for folder, options, tolerance in (("shards", {}, 1e-6), ("training", {}, 1e-6), ("half", {}, 0.01)):
        assert_close(readers.load_diffusers(tmp_path / folder, **options)(x, t), wanted, tolerance)
    assert_close(readers.load_diffusers(tmp_path, size=SIZE)(x, t), wanted, 1e-6)
    with pytest.raises(InputError, match="no sample_size: give size"):
        readers.load_diffusers(tmp_path)
    assert "holds a network and its average: the average" in capsys.readouterr().err
    last = readers.load_diffusers(tmp_path / "training", which="last")(x, t)
    assert float((last - wanted).abs().max() / wanted.abs().max()) > 0.1


def test_what_the_file_does_not_say_of_attention_is_stated(capsys):
    notice.cache_clear()
    state = CASES["guided, options"].state()
    readers.load_guided_diffusion(state, SIZE, 32)
    assert "state_dict: read as: legacy attention order, heads of 32 channels;" in capsys.readouterr().err
    CASES["guided, options"].build(state)
    assert "read as: new attention order, 4 heads, 8 on the way up;" in capsys.readouterr().err


def test_score_sde_in_discrete_time():
    state = draw(score_sde, 16, width=32, multipliers=(1, 2), blocks=1, attention=(8,))
    discrete, continuous = (readers.load_score_sde(state, 16, continuous=kind) for kind in (False, True))
    x = torch.randn(2, 3, 16, 16)
    shape = {"width": 32, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
    for t in (1, 700):
        level = torch.full((2,), t)
        torch.testing.assert_close(
            discrete(x, level), apply(score_sde, state, x, (level - 1).float(), **shape), rtol=1e-4, atol=1e-4
        )
    assert torch.equal(discrete.schedule.abar, Schedule.linear().abar)
    assert not torch.equal(continuous.schedule.abar, Schedule.linear().abar)


def test_damaged_weights_are_refused():
    state = draw(score_sde, 16, width=32, multipliers=(1, 2), blocks=1, attention=(8,))
    state["all_modules.0.weight"][0, 0] = torch.nan
    with pytest.raises(InputError, match="is NaN or infinite"):
        readers.load_score_sde(state, 16)
