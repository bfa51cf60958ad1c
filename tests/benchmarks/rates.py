"""Images a second of network calls, and their share of the peak of matrix products and of the memory bound."""

import contextlib

import torch
from measuring import target, timed
from networks import PRECISIONS, arithmetic, bandwidth, denoiser, images, made, needs, peak, without_kernels

WANTED = {("imagenet", 8, False): 0.45, ("full", 256, False): 0.35, ("full", 256, True): 0.30}
"""Shares of the peak that a network's call with so many rows is to reach, without and with its backward pass."""


def calls(network, rows, backward, times):
    """So many calls one after the other, as purifications make them."""
    x = images(rows, next(network.parameters()).device, network.size)
    t = torch.full((rows,), 150, device=x.device)

    def run():
        for _ in range(times):
            if backward:
                leaf = x.detach().requires_grad_()
                torch.autograd.grad(network(leaf, t).float().sum(), leaf)
            else:
                with torch.no_grad():
                    network(x, t)

    return run


def measure(device, now, quick):
    """Rows of the table, and those that are targets."""
    gpu = device.type == "cuda"
    peaks = {precision: peak(device, now, precision) for precision in (PRECISIONS if gpu else PRECISIONS[:1])}
    speed = bandwidth(device, now)
    for precision, (flops, name) in peaks.items():
        print(f"{precision}: {name} {flops / 1e12:.1f} TFLOP/s; copies {speed / 1e12:.2f} TB/s")
    print(f"{'':34} {'rows':>5} {'ms':>9} {'images/s':>10} {'of peak':>8} {'of memory':>9}")
    for size in ("small", "full", "imagenet") if gpu else ("small",):
        network, (flops, moved, weights) = denoiser(size, device), needs(size)
        for rows in (8,) if size == "imagenet" else ((1, 8, 64, 256, 1024) if gpu else (1, 32)):
            for road in ("eager", "accelerated") if gpu else ("eager",):
                for precision in peaks:
                    rare = road == "eager" or precision == "float32"
                    if quick and ((rare and rows != 256) or (size == "imagenet" and precision != "bf16")):
                        continue
                    for row in one(network, road, precision, rows, now, gpu):
                        need = flops * rows * (2 if row["backward"] else 1)
                        bytes_ = (moved * rows * (3 if row["backward"] else 1) + weights) * (
                            1 if precision == "bf16" else 2
                        )
                        row |= {
                            "network": size,
                            "peak_share": need / peaks[precision][0] / row["seconds"],
                            "memory_share": bytes_ / speed / row["seconds"],
                        }
                        if (road, precision) == ("accelerated", "bf16") and (size, rows, row["backward"]) in WANTED:
                            name = f"{size}, {rows} rows, bf16, forward{' + backward' if row['backward'] else ''}"
                            least = WANTED[size, rows, row["backward"]]
                            row |= target(f"{name}: share of the peak", row["peak_share"], least)
                        what = f"{size}, {road}, {precision}" + (", + backward" if row["backward"] else "")
                        print(
                            f"{what:34} {rows:5} {1e3 * row['seconds']:9.3f} {rows / row['seconds']:10.0f} "
                            f"{row['peak_share']:8.1%} {row['memory_share']:9.1%}",
                            flush=True,
                        )
                        yield row


def one(network, road, precision, rows, now, gpu):
    """Forward, and with the backward pass."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(arithmetic(precision))
        called = network
        if road == "eager":
            stack.enter_context(without_kernels())
            stack.enter_context(torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"))
        else:
            called = made(network, precision)
        for backward in (False, True):
            run = calls(called, rows, backward, 4)
            try:
                timed(run, now)
                seconds = sorted(timed(run, now) / 4 for _ in range(5 if gpu else 3))
            except torch.OutOfMemoryError:
                print(f"{road}, {precision}, {rows} rows: out of memory")
                continue
            finally:
                torch.cuda.empty_cache()
            yield {
                "road": road,
                "precision": precision,
                "rows": rows,
                "backward": backward,
                "seconds": seconds[len(seconds) // 2],
            }
