"""Windows made by moving tokens: Swin in three spellings, S2-Attn, grid attention.

The report must read the partition, its shift and the map; as a mask over the map it must be what
following the tokens by brute force gives.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.ir.mask import Causal, Mask
from attnopt.passes.analyze.windows import Moved, Partition, partition_of


def sites(model: nn.Module, *given: Tensor) -> list[str]:
    report = attnopt.explain(model.eval(), given, backend="aten")
    return [site.mask for site in report.sites]


# -- Swin -----------------------------------------------------------------------------------------
def cut(x: Tensor, w: int) -> Tensor:
    b, height, width, c = x.shape
    x = x.view(b, height // w, w, width // w, w, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w, w, c)


def joined(windows: Tensor, w: int, height: int, width: int) -> Tensor:
    b = windows.shape[0] // (height * width // w // w)
    x = windows.view(b, height // w, width // w, w, w, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, height, width, -1)


def region_mask(height: int, width: int, w: int, s: int) -> Tensor:
    """As the authors write it: regions by slices, then -100 between different ones."""
    image = torch.zeros((1, height, width, 1))
    spans = (slice(0, -w), slice(-w, -s), slice(-s, None))
    count = 0
    for rows in spans:
        for columns in spans:
            image[:, rows, columns, :] = count
            count += 1
    windows = cut(image, w).view(-1, w * w)
    mask = windows.unsqueeze(1) - windows.unsqueeze(2)
    return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)


class SwinBlock(nn.Module):
    """One block with a window of `w` and a shift of `s`; `fused` as timm writes it."""

    def __init__(self, size: tuple[int, int], w: int, s: int, fused: bool = False) -> None:
        super().__init__()
        self.size, self.w, self.s, self.fused, self.heads = size, w, s, fused, 2
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(self.heads, w * w, w * w))
        self.register_buffer("mask", region_mask(*size, w, s) if s else None)

    def attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.bias.unsqueeze(0)
        if self.fused:
            if self.mask is not None:
                count = self.mask.shape[0]
                mask = self.mask.view(1, count, 1, n, n).expand(b // count, -1, self.heads, -1, -1)
                bias = bias + mask.reshape(-1, self.heads, n, n)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            weights = q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1) + bias
            if self.mask is not None:
                count = self.mask.shape[0]
                weights = weights.view(b // count, count, self.heads, n, n) \
                    + self.mask.unsqueeze(1).unsqueeze(0)
                weights = weights.view(-1, self.heads, n, n)
            x = weights.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        b, _, c = x.shape
        short, w, s = x, self.w, self.s
        x = self.norm(x).view(b, height, width, c)
        if s:
            x = torch.roll(x, shifts=(-s, -s), dims=(1, 2))
        x = self.attention(cut(x, w).view(-1, w * w, c)).view(-1, w, w, c)
        x = joined(x, w, height, width)
        if s:
            x = torch.roll(x, shifts=(s, s), dims=(1, 2))
        return short + x.reshape(b, height * width, c)


@pytest.mark.parametrize("fused", [False, True])
def test_swin_as_its_authors_and_timm_write_it(fused: bool) -> None:
    blocks = nn.Sequential(*(SwinBlock((28, 14), 7, s, fused) for s in (0, 3)))
    assert sites(blocks, torch.randn(2, 28 * 14, 16)) == [
        "partition 7x7 of 28x14", "partition 7x7 shift 3x3 of 28x14, regions (fill -100)"]


def test_the_usual_size() -> None:
    assert sites(SwinBlock((56, 56), 7, 3), torch.randn(1, 56 * 56, 16)) == [
        "partition 7x7 shift 3x3 of 56x56, regions (fill -100)"]


def test_symbolic_batch() -> None:
    model = SwinBlock((14, 14), 7, 3).eval()
    auto = torch.export.Dim.DYNAMIC
    opt = attnopt.optimize(model, (torch.randn(2, 196, 16),), backend="aten",
                           dynamic_shapes=({0: auto},))
    assert [s.mask for s in opt.report.sites] == [
        "partition 7x7 shift 3x3 of 14x14, regions (fill -100)"]
    x = torch.randn(3, 196, 16)
    with torch.no_grad():
        assert torch.allclose(opt(x), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Swin", "Swinv2"])
def test_swin_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        image_size=56, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=7)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config)
    assert sites(model, torch.randn(2, 3, 56, 56)) == [
        "partition 7x7 of 28x28", "partition 7x7 shift 3x3 of 28x28, regions (fill -100)",
        "partition 7x7 of 14x14", "partition 7x7 shift 3x3 of 14x14, regions (fill -100)"]


def test_another_mask_is_no_region_mask() -> None:
    block = SwinBlock((14, 14), 7, 3)
    mask = block.mask
    assert isinstance(mask, Tensor)
    mask[3, 5, 6] = -100.0 - mask[3, 5, 6]
    (text,) = sites(block, torch.randn(1, 196, 16))
    assert text == "partition 7x7 shift 3x3 of 14x14"


# -- S2-Attn --------------------------------------------------------------------------------------
class ShiftedGroups(nn.Module):
    """LongLoRA: half of the heads see groups that are shifted by half a group."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.qkv = in_place, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        group = n // 4
        q, k, v = self.qkv(x).view(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)

        def moved(t: Tensor) -> Tensor:
            if self.in_place:
                t = t.clone()
                t[:, 2:] = t[:, 2:].roll(-group // 2, dims=2)
            else:
                t = torch.cat([t[:, :2], t[:, 2:].roll(-(group // 2), dims=2)], 1)
            return t.transpose(1, 2).reshape(b * (n // group), group, 4, 4).transpose(1, 2)

        q, k, v = moved(q), moved(k), moved(v)
        causal = torch.full((group, group), -torch.inf).triu(1)
        out = (q @ k.transpose(-1, -2) / 2 + causal).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(b, n, 4, 4)
        return torch.cat([out[:, :, :2], out[:, :, 2:].roll(group // 2, dims=1)], 2)


@pytest.mark.parametrize("in_place", [True, False])
def test_shifted_groups(in_place: bool) -> None:
    assert sites(ShiftedGroups(in_place), torch.randn(2, 64, 16)) == [
        "by h: partition 16 of 64, partition 16 shift 8 of 64 & causal"]


def test_shifted_groups_over_the_sequence() -> None:
    """With its wrap-around: the last group is the tail, and then the head."""
    plain, shifted = (Partition((64,), (16,), (s,), (1,)) for s in (0, 8))
    mask = Moved((plain, plain, shifted, shifted)).mask(Causal())
    kept = mask.to_dense(64, 64, (1, 4))
    for h in range(4):
        token = (torch.arange(64) - (8 if h >= 2 else 0)) % 64
        wanted = (token[:, None] // 16 == token // 16) & (token <= token[:, None])
        assert torch.equal(kept[0, h], wanted)
    assert bool(kept[0, 2, 3, 60]) and not bool(kept[0, 0, 3, 60])


# -- partitions as masks --------------------------------------------------------------------------
class Boxes(nn.Module):
    """Attention in windows (or in grids of every n-th token), and what each token sees."""

    def __init__(self, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int],
                 grid: bool) -> None:
        super().__init__()
        self.size, self.window, self.shift, self.grid = size, window, shift, grid

    def cut(self, x: Tensor) -> Tensor:
        (height, width), (a, b) = self.size, self.window
        x = x.view(-1, height, width, x.shape[-1]).roll((-self.shift[0], -self.shift[1]), (1, 2))
        if self.grid:
            x = x.view(-1, a, height // a, b, width // b, x.shape[-1]).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.view(-1, height // a, a, width // b, b, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, 1, a * b, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x)
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("window,shift,grid,text", [
    ((2, 4), (0, 0), False, "partition 2x4 of 8x12"),
    ((4, 3), (1, 2), False, "partition 4x3 shift 1x2 of 8x12"),
    ((8, 3), (0, 1), False, "partition 8x3 shift 0x1 of 8x12"),
    ((2, 3), (0, 0), True, "partition 2x3 of every 4x4-th token of 8x12"),
])
def test_boxes(window: tuple[int, int], shift: tuple[int, int], grid: bool, text: str) -> None:
    model = Boxes((8, 12), window, shift, grid)
    assert sites(model, torch.randn(2, 96, 8)) == [text]
    tokens = model.cut(torch.arange(96.0).view(1, 96, 1)).view(-1, window[0] * window[1]).long()
    wanted = torch.zeros(96, 96, dtype=torch.bool)
    for own in tokens:
        wanted[own[:, None], own] = True
    found = partition_of(torch.stack([tokens // 12, tokens % 12], -1), (8, 12))
    assert found is not None and found.text == text
    mask: Mask = found.mask()
    assert torch.equal(mask.to_dense(96, 96), wanted)
    if shift != (0, 0):
        regions = found.regions(-100.0)
        assert regions is not None and regions.fill == -100.0


def test_neither_a_batch_nor_a_cross_attention_is_a_window() -> None:
    class Batch(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            q = x.view(2, 4, 12, 8)
            return (F.scaled_dot_product_attention(q, q, q),
                    F.scaled_dot_product_attention(q, y.view(2, 4, 12, 8), q))

    class Crossed(nn.Module):
        """Queries of one window, keys of the next."""

        def forward(self, x: Tensor) -> Tensor:
            q, k = (t.view(2 * 4, 1, 12, 8) for t in (x, x.roll(12, 1)))
            return F.scaled_dot_product_attention(q, k, k)

    assert sites(Batch(), torch.randn(2, 4, 96), torch.randn(2, 4, 96)) == ["", ""]
    assert sites(Crossed(), torch.randn(2, 48, 8)) == [""]
