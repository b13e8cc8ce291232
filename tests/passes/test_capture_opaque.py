"""Compiled autograd.Functions, which no tracer can look into, captured as what they compute.

The classes here have the names and arguments of those of Deformable-DETR, mmcv and DFA3D; what
they call is as good as a compiled extension that is not there, or one that reads memory by itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import attnopt
from attnopt.errors import CaptureError
from attnopt.kernels.deformable import Sampling, reference
from attnopt.passes.capture import opaque
from attnopt.passes.capture.export import capture
from attnopt.passes.capture.opaque import register_function

GRIDS = [(4, 5), (2, 3)]


def extension(*args: Any) -> Any:
    """Reads the memory of its arguments, as compiled code does; fails on a tracer's tensors."""
    return [torch.frombuffer(bytearray(bytes(
        (a.detach().contiguous().numpy()).tobytes())), dtype=a.dtype).view(a.shape)
        if isinstance(a, Tensor) else a for a in args]


def missing(*args: Any) -> Any:
    raise RuntimeError("Not compiled with GPU support")


class MSDeformAttnFunction(Function):
    """Deformable-DETR's, on a device that its extension is not compiled for."""

    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations,
                attention_weights, im2col_step):
        return missing(value)

    @staticmethod
    def backward(ctx, grad):
        return missing(grad)


class MultiScaleDeformableAttnFunction(Function):
    """mmcv's, by an extension that runs."""

    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations,
                attention_weights, im2col_step):
        value, shapes, _, at, weights, _ = extension(
            value, value_spatial_shapes, value_level_start_index, sampling_locations,
            attention_weights, im2col_step)
        levels, points = at.shape[3:5]
        out = reference(Sampling((points,) * levels), value, at.flatten(3, 4),
                        weights.flatten(3), None, shapes.flatten().tolist())
        return out.flatten(2).to(value.dtype)

    @staticmethod
    def backward(ctx, grad):
        return missing(grad)


class MultiScale3DDeformableAttnFunction_fp32(Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, value, value_dpt_dist, value_spatial_shapes, value_level_start_index,
                sampling_locations, attention_weights, im2col_step):
        return missing(value)

    @staticmethod
    def backward(ctx, grad):
        return missing(grad)


class Sampling1D(Function):
    """Something else under a known name: levels of one axis."""

    @staticmethod
    def forward(ctx, value, value_temporal_shapes, value_level_start_index, sampling_locations,
                attention_weights, im2col_step):
        return missing(value)


Sampling1D.__name__ = "MSDeformAttnFunction"


def false_friend() -> type[Function]:
    """The name and arguments of Deformable-DETR's, but not its numbers."""

    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations,
                attention_weights, im2col_step):
        extension(value)
        return value.new_ones(*sampling_locations.shape[:2], value.shape[2] * value.shape[3])

    return type("MSDeformAttnFunction", (Function,), {"forward": staticmethod(forward)})


#: looked up once, as projects do
by_reference = MSDeformAttnFunction.apply


class Sampled(nn.Module):
    """Deformable-DETR's attention module around `apply`.

    sizes: where the levels' sizes come from: "buffer", "literal" (made in forward), "input"
    """

    def __init__(self, apply: Any, sizes: str = "literal", depths: int = 0) -> None:
        super().__init__()
        self.apply_, self.sizes, self.depths = apply, sizes, depths
        self.register_buffer("grids", torch.tensor(GRIDS))
        torch.manual_seed(0)
        self.value, self.offsets = nn.Linear(8, 8), nn.Linear(8, 2 * 2 * 3 * (2 + bool(depths)))
        self.weights = nn.Linear(8, 2 * 2 * 3)

    def forward(self, query: Tensor, memory: Tensor, extra: Tensor | None = None) -> Tensor:
        b, queries, _ = query.shape
        grids = {"buffer": self.grids, "literal": torch.as_tensor(GRIDS, dtype=torch.long),
                 "input": extra}[self.sizes]
        if self.sizes == "literal":
            assert (grids[:, 0] * grids[:, 1]).sum() == memory.shape[1]
        starts = torch.cat((grids.new_zeros((1,)), grids.prod(1).cumsum(0)[:-1]))
        value = self.value(memory).view(b, -1, 2, 4)
        rank = 2 + bool(self.depths)
        offsets = self.offsets(query).view(b, queries, 2, 2, 3, rank)
        weights = self.weights(query).view(b, queries, 2, 6).softmax(-1).view(b, queries, 2, 2, 3)
        normalizer = torch.stack((grids[..., 1], grids[..., 0]), -1)
        if not self.depths:
            locations = 0.5 + offsets / normalizer[None, None, None, :, None, :]
            return self.apply_(value, grids, starts, locations, weights, 64)
        deep = torch.cat((grids, grids.new_ones(2, 1) * self.depths), 1)
        normalizer = torch.cat((normalizer, deep[:, 2:]), 1)
        locations = 0.5 + offsets / normalizer[None, None, None, :, None, :]
        depth = extra[:, :, None].repeat(1, 1, 2, 1)
        out, _ = self.apply_(value, depth, deep, starts, locations, weights, 64)
        return out


def plain(value: Tensor, grids: Tensor, starts: Tensor, at: Tensor, weights: Tensor,
          step: int) -> Tensor:
    """The same by grid_sample."""
    b, _, h, c = value.shape
    queries, points = at.shape[1], at.shape[4]
    out: Tensor | int = 0
    for i, (rows, columns) in enumerate(grids.tolist()):
        texels = value[:, starts[i]:starts[i] + rows * columns]
        image = texels.permute(0, 2, 3, 1).reshape(b * h, c, rows, columns)
        grid = 2 * at[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
        own = weights[:, :, :, i].transpose(1, 2).reshape(b * h, 1, queries, points)
        out = out + (F.grid_sample(image, grid, align_corners=False) * own).sum(-1)
    return out.view(b, h * c, queries).transpose(1, 2)


def plain_lifting(value: Tensor, depth: Tensor, grids: Tensor, starts: Tensor, at: Tensor,
                  weights: Tensor, step: int) -> tuple[Tensor, None]:
    points = at.shape[4]
    out: Tensor | int = 0
    for i, (rows, columns, _) in enumerate(grids.tolist()):
        own = slice(int(starts[i]), int(starts[i]) + rows * columns)
        volume = torch.einsum("bshc,bshd->bhcds", value[:, own], depth[:, own]).unflatten(
            -1, (rows, columns)).flatten(0, 1)
        grid = 2 * at[:, :, :, i].transpose(1, 2).flatten(0, 1).unsqueeze(1) - 1
        part = weights[:, :, :, i].transpose(1, 2).reshape(-1, 1, at.shape[1], points)
        out = out + (F.grid_sample(volume, grid, align_corners=False).squeeze(2) * part).sum(-1)
    return out.view(len(value), -1, at.shape[1]).transpose(1, 2), None


def ops(optimized: Any) -> list[str]:
    return [n.target._schema.name.partition("::")[2] for g in optimized.graph_modules
            for n in g.graph.nodes if "deformable" in str(n.target)]


def inputs(*extra: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 7, 8, generator=generator), torch.randn(2, 26, 8, generator=generator),
            *extra)


def same(model: nn.Module, wanted: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Results and gradients of all parameters."""
    wanted.load_state_dict(model.state_dict())
    results = []
    for module in (model, wanted):
        out = module(*args)
        parameters = dict(module.named_parameters())
        found = torch.autograd.grad(out, list(parameters.values()), torch.ones(out.shape))
        results.append((out, *found))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("apply", [
    pytest.param(lambda *args: MSDeformAttnFunction.apply(*args), id="deformable_detr"),
    pytest.param(by_reference, id="by_reference"),
    pytest.param(lambda *args: MultiScaleDeformableAttnFunction.apply(*args), id="mmcv"),
])
def test_known(apply: Any) -> None:
    """The graph holds the op, whose sizes are numbers where they are literals."""
    args = inputs()
    optimized = attnopt.optimize(Sampled(apply), args)
    assert ops(optimized) == ["deformable_attention"], optimized.report
    same(optimized, Sampled(plain), args)
    (row,) = optimized.report.sites  # the softmax over points is part of it
    assert row.kind == "sampling" and row.status == "rewritten" and "Function" in row.rule


def test_lifting() -> None:
    depth = torch.rand(2, 26, 5).softmax(-1)
    args = inputs(depth)

    def apply(*args: Any) -> Any:
        return MultiScale3DDeformableAttnFunction_fp32.apply(*args)

    optimized = attnopt.optimize(Sampled(apply, depths=5), args)
    assert ops(optimized) == ["deformable_attention"], optimized.report
    same(optimized, Sampled(plain_lifting, depths=5), args)


def test_sizes_in_a_buffer() -> None:
    """Read while tracing, and guarded: other sizes are another graph."""
    args = inputs()
    model = Sampled(by_reference, "buffer")
    optimized = attnopt.optimize(model, args)
    assert ops(optimized) == ["deformable_attention"], optimized.report
    same(optimized, Sampled(plain, "buffer"), args)
    model.grids.copy_(torch.tensor([(2, 10), (3, 2)]))
    with pytest.raises(RuntimeError, match="Not compiled"):
        optimized(*args)  # the author's own, which is not there


def test_sizes_as_input() -> None:
    """The op reads them when it runs."""
    args = inputs(torch.tensor(GRIDS))
    optimized = attnopt.optimize(Sampled(by_reference, "input"), args)
    assert ops(optimized) == ["deformable_attention_of_levels"], optimized.report
    for grids in (GRIDS, [(2, 10), (3, 2)]):
        same(optimized, Sampled(plain, "input"), (*args[:2], torch.tensor(grids)))


def test_other_starts() -> None:
    """Levels in another order than their numbers."""
    value, at, weights = torch.randn(1, 26, 2, 4), torch.rand(1, 3, 2, 6, 2), torch.rand(1, 3, 2, 6)
    grids, starts = torch.tensor(GRIDS), torch.tensor([6, 0])
    out = torch.ops.attnopt.deformable_attention_of_levels(
        value, at, weights, None, grids, starts, str(Sampling((3, 3))))
    wanted = plain(value, grids, starts, at.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3)), 1)
    torch.testing.assert_close(out.flatten(2), wanted)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(*size, dtype=torch.float64, generator=generator).requires_grad_()
               for size in ((1, 26, 2, 3), (1, 3, 2, 4, 3), (1, 3, 2, 4), (1, 26, 1, 4))]
    grids, starts, text = torch.tensor(GRIDS), torch.tensor([0, 20]), str(Sampling((2, 2)))

    def run(*tensors: Tensor) -> Tensor:
        return torch.ops.attnopt.deformable_attention_of_levels(*tensors, grids, starts, text)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def other_gradient() -> type[Function]:
    """What Deformable-DETR's gives, with another gradient."""

    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations,
                attention_weights, im2col_step):
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        return MultiScaleDeformableAttnFunction.apply(
            value, value_spatial_shapes, value_level_start_index, sampling_locations,
            attention_weights, im2col_step)

    def backward(ctx, grad):
        value, at, weights = ctx.saved_tensors
        return torch.ones_like(value), None, None, torch.zeros_like(at), weights, None

    return type("MSDeformAttnFunction", (Function,), {
        "forward": staticmethod(forward), "backward": staticmethod(backward)})


@pytest.mark.parametrize("function", [Sampling1D, false_friend(), other_gradient()],
                         ids=["arguments", "numbers", "gradient"])
def test_false_friends(function: type[Function]) -> None:
    """A known name alone does not say what a Function computes."""
    with opaque.taking():
        args = opaque._example(torch.device("cpu"))
        if function is Sampling1D:
            with pytest.raises(RuntimeError, match="Not compiled"):
                function.apply(*args)
        else:
            with pytest.raises(CaptureError, match="does not compute what its name says"):
                function.apply(*args)


def test_own_function() -> None:
    """A user tells what a Function of theirs computes."""

    class Halved(Function):
        @staticmethod
        def forward(ctx, x, weight):
            return extension(x)[0] * 0.5 * weight

        @staticmethod
        def backward(ctx, grad):
            return missing(grad)

    @register_function(Halved)
    def halved(x: Tensor, weight: Tensor) -> Tensor:
        return x * 0.5 * weight

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
            return (Halved.apply(q, weight) @ k.mT).softmax(-1) @ v

    args = [torch.randn(2, 64, 16, requires_grad=True) for _ in range(3)] + [
        torch.randn(16, requires_grad=True)]
    optimized = attnopt.optimize(Model(), tuple(args))
    assert len(optimized.report.sites) == 1, optimized.report
    q, k, v, weight = args
    wanted = (halved(q, weight) @ k.mT).softmax(-1) @ v
    out = optimized(*args)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(x.sum(), args) for x in (out, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


class Scaled(Function):
    """A gradient that is not its result's."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


scaled = Scaled.apply


@pytest.mark.parametrize("apply", [scaled, lambda x: Scaled.apply(x)], ids=["before", "then"])
def test_own_gradients(apply: Any) -> None:
    """A Function that can be traced keeps its gradient, also by an `apply` looked up before."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return apply(x)

    assert capture(Model(), (torch.randn(3),)).without_grad == "autograd.Function Scaled"


def test_register_takes_functions() -> None:
    with pytest.raises(TypeError, match="must be a subclass of torch.autograd.Function, got"):
        register_function(nn.Linear)


def test_nothing_stays_patched() -> None:
    before = Function.__dict__.get("apply"), MSDeformAttnFunction.forward
    attnopt.optimize(Sampled(by_reference), inputs())
    assert (Function.__dict__.get("apply"), MSDeformAttnFunction.forward) == before
