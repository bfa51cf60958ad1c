"""The networks of public checkpoints, written a second time as plain functions of a state_dict in the file's own names.

Every function takes ``get(name, *shape)``, which hands out one tensor of the file. ``draw`` passes one that makes each
tensor when it is first asked for, so the same lines that compute a network also say what its file holds and in which
order; ``apply`` passes one that reads a given state_dict and insists that all of it is used. Nothing is inferred from
shapes. Of every network ``x`` is (B, 3, H, W), ``label`` (B,) says the level, ``width`` is the channels at full
resolution and ``multipliers`` those at each in ``width``, ``blocks`` are residual ones at each resolution on the way
down, ``attention`` are resolutions.
"""

import itertools
import math

import torch
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, group_norm, interpolate, linear, pad, silu


def draw(network, size, seed=0, **shape):
    """A random state_dict of a network: also where training starts at zero, and scaled to keep outputs O(1)."""
    state = {}

    def get(name, *shape):
        assert name not in state, f"{name} is used twice"
        state[name] = random_weight(name, shape)
        return state[name]

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network(get, torch.zeros(1, 3, size, size), torch.ones(1), **shape)
    return state


def random_weight(name, shape):
    """A random tensor that keeps activations O(1): a kernel, the scale of a normalization, or a bias."""
    value = torch.randn(shape)
    if len(shape) > 1:
        return value / math.sqrt(math.prod(shape) / shape[0])
    return 0.3 * value + name.endswith("weight")


def apply(network, state, x, label, **shape):
    """The network's output; every tensor of ``state`` is used, in the shape that is stated, computed as ``x.dtype``."""
    unused = dict(state)

    def get(name, *shape):
        assert unused[name].shape == shape, f"{name}: {tuple(unused[name].shape)}, not {shape}"
        return unused.pop(name).to(x.dtype)

    with torch.no_grad():
        out = network(get, x, label.to(x.dtype), **shape)
    assert not unused, f"not used: {sorted(unused)}"
    return out


def score_sde(get, x, label, *, width, multipliers, blocks, attention, fir=False, pyramid=False):
    """DDPM++, and with ``fir`` and ``pyramid`` NCSN++ for the VP process (Song et al., "Score-based", appendix H).

    ``label`` is 999 times the time in [0, 1]. ``fir`` resamples with the kernel (1, 3, 3, 1) in both directions,
    instead of means and repetition; ``pyramid`` adds the shrunken input to the features at each resolution.
    """
    numbers = itertools.count()

    def name():
        return f"all_modules.{next(numbers)}"

    def norm(x, name):
        return _norm(get, name, x, min(x.shape[1] // 4, 32), 1e-6)

    def nin(x, name, out):
        y = torch.einsum("bchw,cd->bdhw", x, get(f"{name}.W", x.shape[1], out))
        return y + get(f"{name}.b", out)[:, None, None]

    def down(x):
        return _fir(x, up=False) if fir else avg_pool2d(x, 2)

    def up(x):
        return _fir(x, up=True) if fir else _repeat(x)

    def residual(x, out, resample=None):
        own = name()
        h = silu(norm(x, f"{own}.GroupNorm_0"))
        if resample:
            h, x = resample(h), resample(x)
        h = _conv(get, f"{own}.Conv_0", h, out) + _linear(get, f"{own}.Dense_0", silu(emb), out)[:, :, None, None]
        h = _conv(get, f"{own}.Conv_1", silu(norm(h, f"{own}.GroupNorm_1")), out)
        if resample or x.shape[1] != out:
            x = _conv(get, f"{own}.Conv_2", x, out, kernel=1)
        return (x + h) / math.sqrt(2)

    def attend(x):
        own = name()
        h = norm(x, f"{own}.GroupNorm_0")
        q, k, v = (nin(h, f"{own}.NIN_{i}", x.shape[1]) for i in range(3))
        return (x + nin(_attention(q, k, v, heads=1), f"{own}.NIN_3", x.shape[1])) / math.sqrt(2)

    emb = _linear(get, name(), sinusoid(label, width, ("sin", "cos"), short=0), 4 * width)
    emb = _linear(get, name(), silu(emb), 4 * width)
    shrunken, h = x, _conv(get, name(), x, width)
    skips = [h]
    for level, multiplier in enumerate(multipliers):
        if level:
            h = residual(h, h.shape[1], down)
            if pyramid:
                own = f"{name()}.Conv2d_0"
                smooth = _filter(pad(shrunken, (2, 2, 2, 2)))
                shrunken = _conv(get, own, smooth, h.shape[1], stride=2, padding=0)
                shrunken = h = (shrunken + h) / math.sqrt(2)
            skips.append(h)
        for _ in range(blocks):
            h = residual(h, width * multiplier)
            h = attend(h) if h.shape[-1] in attention else h
            skips.append(h)
    h = residual(h, h.shape[1])
    h = attend(h)
    h = residual(h, h.shape[1])
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for _ in range(blocks + 1):
            h = residual(torch.cat((h, skips.pop()), dim=1), width * multiplier)
        h = attend(h) if h.shape[-1] in attention else h
        h = residual(h, h.shape[1], up) if level else h
    h = silu(norm(h, name()))
    return _conv(get, name(), h, x.shape[1])


def guided_diffusion(
    get,
    x,
    label,
    *,
    width,
    multipliers,
    blocks,
    attention,
    heads=None,
    head_width=None,
    scale_shift=True,
    updown=True,
    heads_up=None,
    new_order=False,
):
    """ADM (Dhariwal and Nichol, appendix), and without ``updown`` the network of "Improved Denoising Diffusion".

    ``label`` is the discrete step from 0. ``heads`` is their number, else ``head_width`` their channels, ``heads_up``
    those on the way up. With ``scale_shift`` the embedding scales and shifts the second normalization, else it is
    added before; with ``updown`` residual blocks resample, else a convolution does; with ``new_order`` queries, keys
    and values are split first, then the heads. Returns (B, 6, H, W): the noise, then channels of the learned variance.
    """

    def norm(x, name):
        return _norm(get, name, x, 32, 1e-5)

    def residual(x, name, out, resample=None):
        h = silu(norm(x, f"{name}.in_layers.0"))
        if resample:
            h, x = resample(h), resample(x)
        h = _conv(get, f"{name}.in_layers.2", h, out)
        added = _linear(get, f"{name}.emb_layers.1", silu(emb), out * (1 + scale_shift))[:, :, None, None]
        if scale_shift:
            h = norm(h, f"{name}.out_layers.0") * (1 + added[:, :out]) + added[:, out:]
        else:
            h = norm(h + added, f"{name}.out_layers.0")
        h = _conv(get, f"{name}.out_layers.3", silu(h), out)
        return h + (x if x.shape[1] == out else _conv(get, f"{name}.skip_connection", x, out, kernel=1))

    def attend(x, name):
        flat = norm(x, f"{name}.norm").flatten(2)
        count = (name.startswith("output") and heads_up) or heads or x.shape[1] // head_width
        qkv = _conv1(get, f"{name}.qkv", flat, 3 * x.shape[1])
        # One head after the other, each with its own queries, keys and values.
        parts = [each.chunk(3, dim=1) for each in qkv.chunk(count, dim=1)]
        q, k, v = qkv.chunk(3, dim=1) if new_order else (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        return x + _conv1(get, f"{name}.proj_out", _attention(q, k, v, count), x.shape[1]).reshape(x.shape)

    emb = _linear(get, "time_embed.0", sinusoid(label, width, ("cos", "sin"), short=1), 4 * width)
    emb = _linear(get, "time_embed.2", silu(emb), 4 * width)
    h = _conv(get, "input_blocks.0.0", x, int(width * multipliers[0]))
    skips = [h]
    for level, multiplier in enumerate(multipliers):
        if level:
            own = f"input_blocks.{len(skips)}.0"
            if updown:
                h = residual(h, own, h.shape[1], lambda x: avg_pool2d(x, 2))
            else:
                h = _conv(get, f"{own}.op", h, h.shape[1], stride=2)
            skips.append(h)
        for _ in range(blocks):
            own = f"input_blocks.{len(skips)}"
            h = residual(h, f"{own}.0", int(width * multiplier))
            h = attend(h, f"{own}.1") if h.shape[-1] in attention else h
            skips.append(h)
    h = residual(h, "middle_block.0", h.shape[1])
    h = attend(h, "middle_block.1")
    h = residual(h, "middle_block.2", h.shape[1])
    total = len(skips)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(blocks + 1):
            own = f"output_blocks.{total - len(skips)}"
            h = residual(torch.cat((h, skips.pop()), dim=1), f"{own}.0", int(width * multiplier))
            attended = h.shape[-1] in attention
            h = attend(h, f"{own}.1") if attended else h
            if level and i == blocks:
                own = f"{own}.{1 + attended}"
                h = (
                    residual(h, own, h.shape[1], _repeat)
                    if updown
                    else _conv(get, f"{own}.conv", _repeat(h), h.shape[1])
                )
    return _conv(get, "out.2", silu(norm(h, "out.0")), 2 * x.shape[1])


def ddpm(get, x, label, *, width, multipliers, blocks, attention):
    """Ho et al., "Denoising Diffusion Probabilistic Models", in the names of its first PyTorch port; steps from 0."""

    def norm(x, name):
        return _norm(get, name, x, 32, 1e-6)

    def residual(x, name, out):
        h = _conv(get, f"{name}.conv1", silu(norm(x, f"{name}.norm1")), out)
        h = h + _linear(get, f"{name}.temb_proj", silu(emb), out)[:, :, None, None]
        h = _conv(get, f"{name}.conv2", silu(norm(h, f"{name}.norm2")), out)
        return h + (x if x.shape[1] == out else _conv(get, f"{name}.nin_shortcut", x, out, kernel=1))

    def attend(x, name):
        h = norm(x, f"{name}.norm")
        q, k, v = (_conv(get, f"{name}.{each}", h, x.shape[1], kernel=1) for each in "qkv")
        return x + _conv(get, f"{name}.proj_out", _attention(q, k, v, heads=1), x.shape[1], kernel=1)

    emb = _linear(get, "temb.dense.0", sinusoid(label, width, ("sin", "cos"), short=0), 4 * width)
    emb = _linear(get, "temb.dense.1", silu(emb), 4 * width)
    h = _conv(get, "conv_in", x, width)
    skips = [h]
    for level, multiplier in enumerate(multipliers):
        if level:
            # Padded on the right and below only, as TensorFlow does.
            own = f"down.{level - 1}.downsample.conv"
            h = _conv(get, own, pad(h, (0, 1, 0, 1)), h.shape[1], stride=2, padding=0)
            skips.append(h)
        for i in range(blocks):
            h = residual(h, f"down.{level}.block.{i}", width * multiplier)
            h = attend(h, f"down.{level}.attn.{i}") if h.shape[-1] in attention else h
            skips.append(h)
    h = residual(h, "mid.block_1", h.shape[1])
    h = attend(h, "mid.attn_1")
    h = residual(h, "mid.block_2", h.shape[1])
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(blocks + 1):
            h = residual(torch.cat((h, skips.pop()), dim=1), f"up.{level}.block.{i}", width * multiplier)
            h = attend(h, f"up.{level}.attn.{i}") if h.shape[-1] in attention else h
        h = _conv(get, f"up.{level}.upsample.conv", _repeat(h), h.shape[1]) if level else h
    return _conv(get, "conv_out", silu(norm(h, "norm_out")), x.shape[1])


def sinusoid(label, width, order, short):
    """Sines and cosines (B, width) of ``label`` (B,), those of ``order[0]`` first.

    Frequencies fall geometrically from 1 to 1/10000, and stop ``short`` (0 or 1) steps before they reach it.
    """
    half = width // 2
    i = torch.arange(half, dtype=label.dtype)
    angle = label[:, None] * torch.exp(-math.log(10000) / (half - 1 + short) * i)
    parts = {"sin": angle.sin(), "cos": angle.cos()}
    return torch.cat([parts[each] for each in order], dim=1)


def _linear(get, name, x, out):
    return linear(x, get(f"{name}.weight", out, x.shape[1]), get(f"{name}.bias", out))


def _conv(get, name, x, out, kernel=3, stride=1, padding=None):
    padding = kernel // 2 if padding is None else padding
    weight = get(f"{name}.weight", out, x.shape[1], kernel, kernel)
    return conv2d(x, weight, get(f"{name}.bias", out), stride, padding)


def _conv1(get, name, x, out):
    """A 1x1 convolution of a sequence (B, C, N)."""
    weight = get(f"{name}.weight", out, x.shape[1], 1)
    return weight[:, :, 0] @ x + get(f"{name}.bias", out)[:, None]


def _norm(get, name, x, groups, eps):
    channels = x.shape[1]
    return group_norm(x, groups, get(f"{name}.weight", channels), get(f"{name}.bias", channels), eps)


def _attention(q, k, v, heads):
    """Softmax(q k / sqrt(d)) v over positions, channels of one head beside each other; any spatial shape."""
    b, c = q.shape[:2]
    a, k, v = (each.reshape(b, heads, c // heads, -1) for each in (q, k, v))
    weight = torch.einsum("bhcn,bhcm->bhnm", a, k).div(math.sqrt(c // heads)).softmax(dim=-1)
    return torch.einsum("bhnm,bhcm->bhcn", weight, v).reshape(q.shape)


def _repeat(x):
    return interpolate(x, scale_factor=2, mode="nearest")


def _fir(x, up):
    """Twice or half the size, smoothed by (1, 3, 3, 1) along both axes; zeros beyond the border."""
    if not up:
        return _filter(pad(x, (1, 1, 1, 1)))[:, :, ::2, ::2]
    return conv_transpose2d(x, 4 * _kernel(x), stride=2, padding=1, groups=x.shape[1])


def _filter(x):
    return conv2d(x, _kernel(x), groups=x.shape[1])


def _kernel(x):
    taps = torch.tensor([1, 3, 3, 1], dtype=x.dtype) / 8
    return torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
