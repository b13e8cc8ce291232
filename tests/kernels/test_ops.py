"""The op `attnopt::attention` and `attend`: export, save, autograd, functorch, autocast, fx."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal, KeyKeep
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import reference
from attnopt.kernels.ops import attend, attention, bind

s = E.score
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
BIAS = Operand("bias", ("h", "q", "k"), role="bias")
SINK = Operand("sink", ("h",), role="sink")
SPECS = {
    "plain": Spec(logits=s * 0.3),
    "causal": Spec(logits=s * 0.3, mask=Causal()),
    "padding": Spec(logits=s * 0.3, mask=KeyKeep("pad") & Causal(), operands=(PAD,)),
    "softcap": Spec(logits=E.call("tanh", s * 0.1) * 3.0, mask=Causal()),
    "sink": Spec(logits=s * 0.3, mask=Causal(), sinks=E.load("sink"), operands=(SINK,)),
    "relative": Spec(logits=s * 0.3 - E.call("abs", E.index("q") - E.index("k")) * 0.1,
                     mask=KeyKeep("pad"), operands=(PAD,), output=E.out * 2.0),
}


def drawn(batch: int = 2, length: int = 5) -> list[Tensor]:
    return [torch.randn(batch, 4, length, 8) for _ in range(3)]


def operands_of(name: str, batch: int = 2, length: int = 5) -> list[Tensor]:
    pad = (torch.rand(batch, 1, 1, length) < 0.7).index_fill(-1, torch.tensor(0), True)
    return {"padding": [pad], "relative": [pad], "sink": [torch.randn(4, 1, 1)]}.get(name, [])


class Layer(torch.nn.Module):
    """Projections with the op between them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.text = str(SPECS[name])
        self.project = torch.nn.Linear(32, 96)
        self.sink = torch.nn.Parameter(torch.randn(4, 1, 1)) if name == "sink" else None

    def forward(self, x: Tensor, *operands: Tensor) -> Tensor:
        query, key, value = (
            t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        given = [self.sink] if self.sink is not None else list(operands)
        out = torch.ops.attnopt.attention(query, key, value, given, self.text)[0]
        return out.transpose(1, 2).flatten(2)


def layer_input(name: str, batch: int, length: int) -> tuple[Tensor, ...]:
    more = [] if name == "sink" else operands_of(name, batch, length)
    return (torch.randn(batch, length, 32), *more)


def test_schema() -> None:
    assert str(attention._schema) == (
        "attnopt::attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str spec, "
        "str schedule=\"\") -> (Tensor out, Tensor lse)")


@pytest.mark.parametrize("schedule", ["", str(Schedule("aten:dense")),
                                      str(Schedule("aten:blocks", (2, 3)))])
@pytest.mark.parametrize("name", SPECS)
def test_op_attend_and_bind_agree(name: str, schedule: str) -> None:
    given, operands, text = drawn(), operands_of(name), str(SPECS[name])
    out, lse = attention(*given, operands, text, schedule)
    assert lse.numel() == 0
    assert torch.equal(out, attend(text, schedule, *given, *operands))
    assert torch.equal(out, bind(text, schedule)(*given, *operands))
    assert bind(text, schedule) is bind(text, schedule)
    exact = reference(SPECS[name])(*(t.double() for t in given), [
        t.double() if t.is_floating_point() else t for t in operands])
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


# -- export ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_export_keeps_the_op_and_saves_it(name: str, dynamic: bool) -> None:
    layer, example = Layer(name), layer_input(name, 3, 6)
    shapes = None
    if dynamic:
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
        shapes = ({0: batch, 1: length}, *[({0: batch, 3: length},)] * (len(example) > 1))
    program = torch.export.export(layer, example, dynamic_shapes=shapes, strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for p in (program, loaded, program.run_decompositions({})):
        targets = [n.target for n in p.graph.nodes]
        assert targets.count(torch.ops.attnopt.attention.default) == 1
    sizes = [(3, 6), (2, 9), (5, 33)] if dynamic else [(3, 6)]
    for size in sizes:
        given = layer_input(name, *size)
        torch.testing.assert_close(loaded.module()(*given), layer(*given))
    portable = program.run_decompositions()
    assert not any("attnopt" in str(n.target) for n in portable.graph.nodes)
    for size in sizes:
        given = layer_input(name, *size)
        torch.testing.assert_close(portable.module()(*given), layer(*given))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "heads last", "transposed", "one key head",
                                    "batch 0", "half", "rank 3", "rank 5"])
@pytest.mark.parametrize("name", SPECS)
def test_fake_tensors_have_the_true_shape_strides_and_dtype(
        name: str, layout: str, grad: bool) -> None:
    given, operands = drawn(), operands_of(name)
    match layout:
        case "heads last":
            given = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given]
        case "transposed":
            given = [t.mT.contiguous().mT for t in given]
        case "one key head":
            given[1:] = [t[:, :1].expand(2, 4, 5, 8) for t in given[1:]]
        case "batch 0":
            given, operands = [t[:0] for t in given], [t[:0] if t.dim() == 4 else t
                                                       for t in operands]
        case "half":
            given = [t.bfloat16() for t in given]
        case "rank 3":
            given, operands = [t[0] for t in given], [t[0] if t.dim() == 4 else t
                                                      for t in operands]
        case "rank 5":
            given = [torch.stack([t] * 3, 1) for t in given]
            operands = [t.unsqueeze(1) if t.dim() == 4 else t for t in operands]
    given = [t.detach().requires_grad_(grad) for t in given]
    real = attention(*given, operands, str(SPECS[name]))[0]
    with FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(t) for t in given),
                         [mode.from_tensor(t) for t in operands], str(SPECS[name]))[0]
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    if real.numel():
        assert fake.stride() == real.stride()


def test_meta_tensors() -> None:
    query, key, value = (torch.empty(2, 4, 5, 8, device="meta") for _ in range(3))
    for name in ("plain", "softcap", "sink"):
        operands = [t.to("meta") for t in operands_of(name)]
        out = attention(query, key, value, operands, str(SPECS[name]))[0]
        assert out.is_meta and out.shape == (2, 4, 5, 8)


@pytest.mark.parametrize("name", ["plain", "softcap", "padding"])
def test_opcheck(name: str) -> None:
    given = [t.requires_grad_() for t in drawn()]
    torch.library.opcheck(
        torch.ops.attnopt.attention.default, (*given, operands_of(name), str(SPECS[name])),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


# -- derivatives and transforms -------------------------------------------------------------------
def composed(name: str) -> Callable[..., Tensor]:
    run = reference(SPECS[name])
    return lambda query, key, value, *operands: run(query, key, value, operands)


def through_op(name: str) -> Callable[..., Tensor]:
    text = str(SPECS[name])
    return lambda query, key, value, *operands: attention(
        query, key, value, list(operands), text)[0]


@pytest.mark.parametrize("name", SPECS)
def test_gradient_of_the_gradient(name: str) -> None:
    given, operands = [t.requires_grad_() for t in drawn()], operands_of(name)

    def second(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(
            run(*given, *operands).square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for found, expected in zip(second(through_op(name)), second(composed(name)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_functorch(name: str) -> None:
    (query, key, value), operands = drawn(), operands_of(name)
    op, plain = through_op(name), composed(name)

    def both(transform: Callable[[Callable[..., Tensor]], Tensor]) -> None:
        torch.testing.assert_close(transform(op), transform(plain), rtol=1e-4, atol=1e-4)

    both(lambda f: torch.func.grad(
        lambda t: f(t, key, value, *operands).square().sum())(query))
    both(lambda f: torch.func.jvp(
        lambda t: f(query, t, value, *operands), (key,), (value,))[1])
    both(lambda f: torch.vmap(
        lambda t: f(t, key, value, *operands))(torch.stack([query, query + 1])))
    both(lambda f: torch.vmap(torch.func.grad(
        lambda t: f(t, key, value, *operands).square().sum()))(torch.stack([query, query + 1])))
    both(lambda f: torch.func.hessian(
        lambda t: f(query * t, key, value, *operands).sum())(torch.tensor(1.0)))
    if operands:
        both(lambda f: torch.vmap(lambda t: f(query, key, value, t))(torch.stack(operands * 2)))


def test_forward_mode() -> None:
    query, key, value = drawn()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, key)
        for name in ("plain", "softcap"):
            found, expected = (torch.autograd.forward_ad.unpack_dual(run(dual, key, value)).tangent
                               for run in (through_op(name), composed(name)))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["plain", "padding", "softcap", "sink"])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(name: str, grad: bool) -> None:
    given, operands = [t.requires_grad_(grad) for t in drawn()], operands_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = through_op(name)(*given, *operands)
        assert out.dtype == torch.bfloat16
        assert through_op(name)(*(t.double() for t in given), *operands).dtype == torch.float64
    torch.testing.assert_close(
        out.float(), composed(name)(*given, *operands), rtol=0.05, atol=0.05)
    if grad:
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), given))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_checkpoint(name: str, reentrant: bool) -> None:
    given = [t.requires_grad_() for t in drawn()]
    run = through_op(name)
    expected = torch.autograd.grad(run(*given).square().sum(), given)
    out = checkpoint(run, *given, use_reentrant=reentrant)
    out.square().sum().backward()
    for t, g in zip(given, expected, strict=True):
        torch.testing.assert_close(t.grad, g)


def test_inference_mode_does_not_spoil_later_training() -> None:
    spec = SPECS["padding"].with_(mask=Causal(E.const(1)))
    for text in (str(spec), str(SPECS["softcap"]), str(SPECS["plain"])):
        length = 11
        with torch.inference_mode():
            attend(text, "", *drawn(1, length))
        given = [t.requires_grad_() for t in drawn(1, length)]
        attend(text, "", *given).sum().backward()
        assert given[0].grad is not None


@pytest.mark.parametrize("name", SPECS)
def test_what_is_kept_between_calls_is_of_plain_tensors(name: str) -> None:
    length, text = 13, str(SPECS[name])
    given, operands = drawn(1, length), operands_of(name, 1, length)
    with FakeTensorMode() as mode:
        attend(text, "", *map(mode.from_tensor, (*given, *operands)))
    with torch.device("meta"):
        out = attend(text, "", *given, *operands)
    assert type(out) is Tensor and out.device.type == "cpu"
    torch.testing.assert_close(out, composed(name)(*given, *operands))


# -- graphs ---------------------------------------------------------------------------------------
def graph_of(name: str) -> fx.GraphModule:
    graph = fx.Graph()
    names = ("query", "key", "value", *(o.slot for o in SPECS[name].operands))
    nodes = [graph.placeholder(n) for n in names]
    graph.output(graph.call_function(attend, (str(SPECS[name]), "", *nodes)))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("name", SPECS)
def test_attend_is_fit_for_fx_and_pickle(name: str) -> None:
    module, given, operands = graph_of(name), drawn(), operands_of(name)
    expected = attend(str(SPECS[name]), "", *given, *operands)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(m(*given, *operands), expected)
    assert pickle.loads(pickle.dumps(attend)) is attend


@pytest.mark.parametrize("name", ["plain", "padding", "softcap"])
def test_compiled_graphs_hold_the_op(name: str) -> None:
    seen: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.append(module)
        return module.forward

    given, operands = drawn(), operands_of(name)
    run = torch.compile(graph_of(name), backend=backend, fullgraph=True)
    torch.testing.assert_close(
        run(*given, *operands), attend(str(SPECS[name]), "", *given, *operands))
    assert any("attnopt.attention" in str(n.target) for g in seen for n in g.graph.nodes)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "padding", "softcap", "sink"])
def test_aot_autograd(name: str) -> None:
    given, operands = [t.requires_grad_() for t in drawn()], operands_of(name)
    run = torch.compile(through_op(name), backend="aot_eager", fullgraph=True)
    found, expected = run(*given, *operands), composed(name)(*given, *operands)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), given),
                    torch.autograd.grad(expected.square().sum(), given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_bad_text_is_named() -> None:
    given = drawn()
    with pytest.raises(ValueError, match="spec must be"):
        attend("[]", "", *given)
    with pytest.raises(ValueError, match="operands must be 0, got 1"):
        attend(str(SPECS["plain"]), "", *given, given[0])
