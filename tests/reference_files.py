"""Small networks of every public dialect, and their files as they are published."""

import copy
import dataclasses
import functools
from collections.abc import Callable

import diffusers
import pytest
import torch
from reference_networks import apply, ddpm, draw, guided_diffusion, random_weight, score_sde, sinusoid
from safetensors.torch import save_file

from lit_purify.models import readers

SIZE = 16
OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
"""How older files of diffusers name the layers of attention."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A small network in the names of a dialect, and the network as it was written a second time."""

    dialect: str
    network: Callable
    shape: dict
    options: dict = dataclasses.field(default_factory=lambda: {"size": SIZE})
    steps: int = 1000
    label: Callable = lambda t: t - 1
    write: Callable = torch.save

    def state(self):
        return draw(self.network, SIZE, **self.shape)

    def file(self, folder):
        path = folder / "weights.pth"
        self.write(self.state(), path)
        return path

    def load(self, path):
        return getattr(readers, f"load_{self.dialect}")(path, **self.options)

    def build(self, state):
        return getattr(readers, f"load_{self.dialect}")(state, **self.options)

    def reference(self, x, t):
        return apply(self.network, self.state(), x, self.label(t.to(x.dtype)), **self.shape)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A small network of the package diffusers, in a folder as it is published."""

    config: dict
    old_names: bool = False
    safe: bool = True
    dialect = "diffusers"
    steps = 1000

    @functools.cached_property
    def model(self):
        model = diffusers.UNet2DModel(sample_size=SIZE, **self.config).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.load_state_dict({name: random_weight(name, p.shape) for name, p in model.named_parameters()})
        return model

    def state(self):
        def named(name):
            return functools.reduce(lambda n, pair: n.replace(*pair), OLD_NAMES.items(), name)

        state = self.model.state_dict()
        return {named(name): value for name, value in state.items()} if self.old_names else state

    def file(self, folder):
        self.model.save_config(folder)
        if self.safe:
            save_file(self.state(), folder / "diffusion_pytorch_model.safetensors")
        else:
            torch.save(self.state(), folder / "diffusion_pytorch_model.bin")
        return folder

    def load(self, path):
        return readers.load_diffusers(path)

    def build(self, state):
        return readers.diffusers_unet(state, dict(self.model.config), None)

    def reference(self, x, t):
        # The package embeds the step in float32 whatever the network's type is: in float64 the same formula does it.
        def embed(t, width, flip_sin_to_cos, downscale_freq_shift, scale=1):
            order = ("cos", "sin") if flip_sin_to_cos else ("sin", "cos")
            return sinusoid(scale * t.double(), width, order, short=1 - downscale_freq_shift)

        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if x.dtype == torch.float32:
                return self.model(x, t - 1).sample
            patch.setattr(diffusers.models.embeddings, "get_timestep_embedding", embed)
            return copy.deepcopy(self.model).double()(x, t - 1).sample


def with_averages(state, path):
    """As score_sde saves: the average is a list without names, and differs from the weights that are trained."""
    trained = {name: 1 - value for name, value in state.items()}
    buffer = {"module.sigmas": torch.linspace(50, 0.01, 1000, dtype=torch.float64)}
    step = {"step": 7, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    optimizer = {"state": {0: step}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0]}]}
    average = {"decay": 0.9999, "num_updates": 7, "shadow_params": list(state.values())}
    model = buffer | {f"module.{name}": value for name, value in trained.items()}
    torch.save({"optimizer": optimizer, "model": model, "ema": average, "step": 7}, path)


def in_a_list(state, path):
    """As the PyTorch port of DDPM saves a training."""
    optimizer = {"state": {}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    torch.save([{f"module.{name}": value for name, value in state.items()}, optimizer, 10, 1000], path)


SMALL = {"width": 32, "multipliers": (1, 2), "blocks": 2, "attention": (8,)}
WIDE = {"width": 64, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
UP_DOWN = WIDE | {"multipliers": (1, 1, 2), "attention": (8, 4), "head_width": 64}
ADDED = WIDE | {"heads": 4, "scale_shift": False, "updown": False}
THREE = SMALL | {"multipliers": (1, 2, 2), "blocks": 1}
NARROW = WIDE | {"multipliers": (0.5, 1, 1), "attention": (8, 4), "heads": 4, "heads_up": 8, "new_order": True}
ATTENTION = {"size": SIZE, "head_width": None, "heads": 4, "heads_upsample": 8, "new_attention_order": True}
IMPROVED = {"head_width": None, "heads": 4, "schedule": "cosine", "steps": 4000, "rescale_timesteps": True}
COSINE = {"size": SIZE, "heads": 4, "schedule": "cosine", "steps": 2000}


def in_time(t):
    return 999 * t / 1000


def in_thousands(t):
    return (t - 1) * 1000 / 4000


OLD = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
NEW = {
    "block_out_channels": (32, 64),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
RESNET = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "add_attention": False,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}

CASES = {
    "DDPM++": Case("score_sde", score_sde, SMALL, label=in_time, write=with_averages),
    "NCSN++": Case("score_sde", score_sde, THREE | {"fir": True, "pyramid": True}, label=in_time, write=with_averages),
    "guided": Case("guided_diffusion", guided_diffusion, UP_DOWN),
    "guided, heads": Case("guided_diffusion", guided_diffusion, ADDED, COSINE, steps=2000),
    "guided, options": Case("guided_diffusion", guided_diffusion, NARROW, ATTENTION),
    "improved": Case(
        "guided_diffusion",
        guided_diffusion,
        WIDE | {"attention": (16, 8), "heads": 4, "updown": False},
        IMPROVED | {"size": SIZE},
        steps=4000,
        label=in_thousands,
    ),
    "ddpm": Case("ddpm", ddpm, SMALL),
    "ddpm, list": Case("ddpm", ddpm, THREE, write=in_a_list),
    "diffusers, old names": Folder(OLD, old_names=True, safe=False),
    "diffusers, padding 0": Folder(OLD),
    "diffusers, heads": Folder(NEW, safe=False),
    "diffusers, resnet": Folder(RESNET, old_names=True),
    "diffusers, middle": Folder(RESNET | {"add_attention": True, "attn_norm_num_groups": 16}),
}
