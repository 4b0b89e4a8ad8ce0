"""TransMorph in our order of work and in the published one: writes results/transmorph_speed.json.

    python studies/transmorph_speed.py                          # 160x192x160, two cores
    python studies/transmorph_speed.py --shape 80 --shape 96 --shape 80

Both have the same weights, those of `transmorph` at size "base". `Official` does what the published
code does, in its order and with none of its code: a window is cut out of the normalised image
before queries, keys and values are made of it; a shifted window is rolled in from the other end;
scores are written down whole, and bias and mask (-100) are added to them; every image is copied
from channels first to channels last and back; features are kept as channels first. Tokens that fill
up a window are looked at there like others, so that the answers agree only where windows fit:
`agreement` is the largest difference, relative to the largest displacement, on such a grid.

Seconds of a forward call are the fastest of several, the two layouts in turn. A training step
(forward, a loss, backward) is timed at the smaller shape; `kept` are the bytes of all
tensors that a call leaves behind for its way back, `peak` the most that torch's allocator had given
out at once during a forward call or a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import common
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from regkit import losses, models
from regkit.attention import PatchMerging, SwinLayer, WindowAttention, relative_index
from regkit.blocks import UpBlock
from regkit.record import Row, Rows, made_now, peak_bytes, timed

CPU = torch.profiler.ProfilerActivity.CPU
OUT = common.RESULTS / "transmorph_speed.json"
SHAPE = (160, 192, 160)
STEP = (80, 96, 80)  # of the training step
FITTING = (64, 64, 64)  # windows of 2 tokens fit at all four levels, where the coarsest has one


def partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, D, H, W, C) of whole windows -> (windows, places, C)."""
    b, d, h, w, c = x.shape
    i, j, k = window
    x = x.view(b, d // i, i, h // j, j, w // k, k, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).contiguous().view(-1, i * j * k, c)


def together(windows: Tensor, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The way back."""
    (d, h, w), (i, j, k) = shape, window
    x = windows.view(-1, d // i, h // j, w // k, i, j, k, windows.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).contiguous().view(-1, d, h, w, windows.shape[-1])


def shift_mask(shape: Sequence[int], window: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """-100 where two places of a rolled window were not neighbours: (windows, N, N)."""
    part = torch.zeros(1, *shape, 1)
    count = 0
    slices = [(slice(0, -w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shifts)]
    for a in slices[0]:
        for b in slices[1]:
            for c in slices[2]:
                part[:, a, b, c] = count
                count += 1
    of = partition(part, window).squeeze(-1)
    return torch.where(of[:, None] == of[:, :, None], 0.0, -100.0)


class Official(nn.Module):
    """The published order of work with the weights of `model`: (moving, fixed) -> displacement."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def attend(self, layer: WindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
        """Windows (W, N, C) -> the same, with scores written down whole."""
        w, n, c = x.shape
        qkv = layer.qkv(x).reshape(w, n, 3, layer.heads, c // layer.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (c // layer.heads) ** -0.5) @ k.transpose(-2, -1)
        index = relative_index(layer.window, layer.window)
        bias = layer.bias[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if mask is not None:
            m = mask.shape[0]
            scores = scores.view(w // m, m, layer.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, layer.heads, n, n)
        found = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(w, n, c)
        return layer.out(found)

    def block(self, layer: SwinLayer, x: Tensor, shape: Sequence[int], mask: Tensor) -> Tensor:
        """(B, tokens, C) -> the same."""
        b, n, c = x.shape
        window = layer.attention.window
        shifts = [s // 2 if layer.attention.shift else 0 for s in window]
        held = x
        x = layer.norm1(x).view(b, *shape, c)
        x = F.pad(x, [0, 0, *(p for s, m in zip(shape[::-1], window[::-1]) for p in (0, -s % m))])
        padded = x.shape[1:-1]
        if any(shifts):
            x = torch.roll(x, shifts=[-s for s in shifts], dims=(1, 2, 3))
        windows = partition(x, window)
        windows = self.attend(layer.attention, windows, mask if any(shifts) else None)
        x = together(windows, window, padded)
        if any(shifts):
            x = torch.roll(x, shifts=shifts, dims=(1, 2, 3))
        x = x[:, : shape[0], : shape[1], : shape[2]].contiguous().view(b, n, c)
        x = held + layer.drop(x)
        return x + layer.drop(layer.mlp(layer.norm2(x)))

    def merge(self, merging: PatchMerging, x: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, tokens, C) -> (B, tokens / 8, 2 C)."""
        x = x.view(len(x), *shape, -1)
        x = F.pad(x, [0, 0, *(p for s in reversed(shape) for p in (0, s % 2))])
        parts = [x[:, i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        x = torch.cat(parts, -1).view(len(x), -1, 8 * x.shape[-1])
        return merging.linear(merging.norm(x))

    def encode(self, pair: Tensor) -> list[Tensor]:
        """As of `SwinEncoder`."""
        encoder = self.model.encoder
        x = encoder.down[0].conv(pair)
        shape = x.shape[2:]
        x = encoder.down[0].norm(x.flatten(2).transpose(1, 2))
        x = x.transpose(1, 2).view(len(x), -1, *shape).flatten(2).transpose(1, 2)
        features = []
        for k, (stage, norm) in enumerate(zip(encoder.stages, encoder.norms)):
            if k:
                x = self.merge(encoder.down[k], x, shape)
                shape = [(n + 1) // 2 for n in shape]
            window = stage[0].attention.window
            padded = [n + -n % m for n, m in zip(shape, window)]
            mask = shift_mask(padded, window, [m // 2 for m in window])
            for layer in stage:
                x = self.block(layer, x, shape, mask)
            out = norm(x).view(len(x), *shape, -1)
            features.append(out.permute(0, 4, 1, 2, 3).contiguous())
        return features

    def up(self, block: UpBlock, x: Tensor, skip: Tensor) -> Tensor:
        """As of `UpBlock`."""
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        x = torch.cat([x[:, :, *(slice(n) for n in skip.shape[2:])], skip], dim=1)
        for part in (block.first, block.second):
            x = F.leaky_relu(F.instance_norm(part.conv(x)), 0.01, inplace=True)
        return x

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        model = self.model
        pair = torch.cat([moving, fixed], dim=1)
        half = F.instance_norm(model.stem_half.conv(model.pool(pair)))
        full = F.instance_norm(model.stem_full.conv(pair))
        skips = [F.leaky_relu_(x, 0.01) for x in (full, half)]
        *features, x = self.encode(pair)
        skips += features
        for up in model.up:
            x = self.up(up, x, skips.pop())
        return model.head.conv(x)


def pair_of(size: str, **options: object) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Both layouts of one network."""
    torch.manual_seed(0)
    model = models.create("transmorph", 3, size=size, drop_path=0.0, **options)
    official = Official(model)
    return {"official": official, "regkit": lambda *pair: model.estimate(*pair)["disp"]}


@torch.no_grad()
def agreement() -> float:
    """Relative difference of both on a grid of whole windows.

    A level that is one window is not shifted by ours, as by Swin; the published order shifts it.
    The coarsest level has one layer here, without a shift.
    """
    both = pair_of("tiny", window=2, layers=(2, 2, 4, 1))
    images = torch.rand(2, 1, 1, *FITTING)
    a, b = (run(*images) for run in both.values())
    return float((a - b).abs().max() / a.abs().max())


def forward(size: str, shape: Sequence[int], repetitions: int) -> dict[str, Row]:
    """Seconds of each, in turn, and the peak of the smaller shape."""
    both = pair_of(size)
    images, small = torch.rand(2, 1, 1, *shape), torch.rand(2, 1, 1, *STEP)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    with torch.no_grad():
        for _ in range(repetitions):
            for name, run in both.items():
                seconds[name].append(timed(lambda run=run: run(*images)))
        peaks = {k: peak_bytes(lambda run=run: run(*small)) for k, run in both.items()}
    return {
        name: {
            "seconds": round(min(s), 3),
            "all_seconds": [round(x, 3) for x in s],
            "peak_megabytes_at_step": round(peaks[name] / 1e6, 1),
        }
        for name, s in seconds.items()
    }


def step(size: str, shape: Sequence[int], repetitions: int) -> dict[str, Row]:
    """Seconds of a training step of each, in turn, and its memory."""
    both = pair_of(size)
    moving, fixed = torch.rand(2, 1, 1, *shape)
    result: dict[str, Row] = {}

    def update(run: Callable[[Tensor, Tensor], Tensor]) -> None:
        losses.diffusion(run(moving, fixed)).backward()

    for name, run in both.items():
        with torch.profiler.profile(profile_memory=True, activities=[CPU]) as watched:
            disp = run(moving, fixed)
        events = watched.profiler.kineto_results.events()
        kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
        del disp
        result[name] = {
            "kept_megabytes": round(kept / 1e6, 1),
            "peak_megabytes": round(peak_bytes(lambda run=run: update(run)) / 1e6, 1),
        }
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(repetitions):
        for name, run in both.items():
            seconds[name].append(timed(lambda run=run: update(run)))
    return {k: {"seconds": round(min(seconds[k]), 3)} | result[k] for k in both}


def main(
    size: Annotated[str, typer.Option(help="Of the network.")] = "base",
    shape: Annotated[list[int], typer.Option(help="Of the forward call, once an axis.")] = SHAPE,
    repetitions: Annotated[int, typer.Option(help="Of each layout.")] = 3,
    threads: common.Threads = 2,
    out: common.Out = OUT,
) -> None:
    """Which layout takes longer, and what each keeps."""
    common.use_threads(threads)
    rows = Rows(out, ("part", "layout", "size", "shape"), {"made": common.made(__file__)})
    rows.put(agreement=agreement())
    parts = {"forward": (forward, shape), "step": (step, STEP)}
    for part, (measure, grid) in parts.items():
        name = {"part": part, "size": size, "shape": list(grid), "voxels": math.prod(grid)}
        if not all(rows.has(name | {"layout": layout}) for layout in ("official", "regkit")):
            for layout, row in measure(size, grid, repetitions).items():
                rows.add(name | {"layout": layout} | row | {"load": made_now()["load"]})
                typer.echo(name | {"layout": layout} | row, err=True)


if __name__ == "__main__":
    common.start(main)
