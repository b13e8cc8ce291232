"""Rolls and partitions around an attention become part of its call, and near misses do not."""

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.kernels.cpp.toolchain import toolchain

pytestmark = pytest.mark.skipif(bool(toolchain().why_not()), reason=toolchain().why_not())
MAPS, SIDE, WINDOW, HEADS, DIM = 2, 14, 7, 3, 32
WIDTH = HEADS * DIM


def cut(x: Tensor, window: int = WINDOW) -> Tensor:
    b, height, width, c = x.shape
    x = x.view(b, height // window, window, width // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, c)


def joined(x: Tensor, height: int, width: int, window: int = WINDOW) -> Tensor:
    x = x.view(-1, height // window, width // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, x.shape[-1])


class Plain(nn.Module):
    """A map of queries, keys and values, as a linear layer over the map leaves it."""

    shift = back = WINDOW // 2
    key_shift = WINDOW // 2

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, WINDOW**2, WINDOW**2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * DIM**-0.5) @ k.transpose(-2, -1) + self.bias
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        q, k, v = self.heads(cut(x.roll((-self.shift, -self.shift), (1, 2))))
        if self.key_shift != self.shift:
            _, k, v = self.heads(cut(x.roll((-self.key_shift, -self.key_shift), (1, 2))))
        return joined(self.attend(q, k, v), height, width).roll((self.back, self.back), (1, 2))


class HeadsFirst(Plain):
    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, 3, DIM).permute(3, 0, 2, 1, 4)


class Grid(Plain):
    """Every other token of the map (the grid attention of MaxViT)."""

    def forward(self, x: Tensor) -> Tensor:
        b, height, width, c = x.shape
        rows, columns = height // WINDOW, width // WINDOW
        x = x.reshape(b, WINDOW, rows, WINDOW, columns, c).permute(0, 2, 4, 1, 3, 5)
        y = self.attend(*self.heads(x.reshape(-1, WINDOW**2, c)))
        y = y.view(b, rows, columns, WINDOW, WINDOW, -1).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(b, height, width, -1)


class Layers(Plain):
    """With linear layers within the windows, as in the published models."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        q, k, v = self.heads(self.qkv(cut(x.roll((-3, -3), (1, 2)))))
        y = self.drop(self.proj(self.attend(q, k, v)))
        return joined(y, height, width).roll((3, 3), (1, 2)) + x


class ThreeLayers(Layers):
    """Query, key and value by layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        w = cut(x.roll((-3, -3), (1, 2)))
        q, k, v = (f(w).view(*w.shape[:2], HEADS, DIM).transpose(1, 2) for f in self.layers)
        y = joined(self.proj(self.attend(q, k, v)), height, width)
        return y.roll((3, 3), (1, 2)).reshape(len(x), height * width, WIDTH)


# -- near misses
class OtherKeys(Plain):
    key_shift = 2


class OtherBack(Plain):
    back = 2


class Written(Plain):
    """The map is written in place once its windows are copied."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        q, k, v = self.heads(cut(x))
        x.mul_(2.0)
        return joined(self.attend(q, k, v), SIDE, SIDE) + x[..., :WIDTH]


class Flipped(Plain):
    """The result's channels are moved, too."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(cut(x))
        return joined(self.attend(q, k, v).flip(-1), SIDE, SIDE)


class Reduced(Plain):
    """Each head reads tokens of its own."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.heads(cut(x.roll((-h, -h), (1, 2))))[:, :, h] for h in range(HEADS)]
        q, k, v = torch.stack(parts, 2)
        return joined(self.attend(q, k, v), SIDE, SIDE)


def optimized(model: nn.Module, x: Tensor) -> tuple[list[str], float]:
    """Names of the operations that are left, and the error of the result relative to float64."""
    torch.manual_seed(1)
    model.eval()
    with torch.no_grad():
        opt = attnopt.optimize(model, (x,))
        found, authored = opt(x), model(x)
        exact = model.double()(x.double())
    assert all(site.status == "rewritten" for site in opt.report.sites), str(opt.report)
    error = float((found.double() - exact).abs().max())
    assert error <= max(2 * float((authored.double() - exact).abs().max()), 1e-5)
    return [str(n.target) for g in opt.graph_modules for n in g.graph.nodes], error


def given(model: nn.Module, side: int = SIDE) -> Tensor:
    return torch.randn(MAPS, side, side, WIDTH if isinstance(model, Layers) else 3 * WIDTH)


@pytest.mark.parametrize("kind", [Plain, Layers, *(pytest.param(
    c, marks=pytest.mark.slow) for c in (HeadsFirst, Grid, ThreeLayers))])
def test_folded(kind: type[Plain]) -> None:
    model = kind()
    names, _ = optimized(model, given(model))
    assert any("window_attention" in n for n in names)
    assert not any(word in n for n in names for word in ("roll", "permute", "contiguous"))


@pytest.mark.parametrize("kind", [OtherKeys, Written, *(pytest.param(
    c, marks=pytest.mark.slow) for c in (OtherBack, Flipped, Reduced))])
def test_kept(kind: type[Plain]) -> None:
    model = kind()
    names, _ = optimized(model, given(model))
    assert not any("window_attention" in n for n in names)


@pytest.mark.slow
def test_gradients_in_evaluation_mode_and_a_saved_program(tmp_path: object) -> None:
    model = Plain().eval()
    x = given(model).requires_grad_()
    with torch.no_grad():
        opt = attnopt.optimize(model, (x.detach(),))
    right = torch.autograd.grad(model(x).square().sum(), (x, model.bias))
    found = torch.autograd.grad(opt(x).square().sum(), (x, model.bias))
    for one, two in zip(found, right, strict=True):
        assert torch.allclose(one, two, atol=1e-3, rtol=1e-4)
    program = torch.export.export(opt.graph_modules[0], tuple(
        {**dict(model.named_parameters()), "x": x.detach()}.values()), strict=False)
    assert any("window_attention" in str(n.target) for n in program.graph.nodes)


@pytest.mark.slow
def test_training_is_not_folded() -> None:
    model = Plain().train()
    x = given(model)
    opt = attnopt.optimize(model, (x,))
    names = [str(n.target) for g in opt.graph_modules for n in g.graph.nodes]
    assert not any("window_attention" in n for n in names)
    assert torch.allclose(opt(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_one_after_the_other() -> None:
    """The result of one, normalised, is the map of the next."""
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Plain(), Layers()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.norm(self.first(x)))
            return y

    model = Two()
    names, _ = optimized(model, given(model))
    assert sum("window_attention" in n for n in names) == 2
