"""Native functions that stand for operators give what the operators give, for every listed one."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from attnopt.direct_calls import _DIRECT, with_direct_calls
from attnopt.kernels import ops

A, B = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
W, V = torch.randn(6, 6), torch.randn(6)
FLAG, INDEX = A > 0, torch.tensor([[0, 2], [1, 3]])
CONV = {1: (torch.randn(2, 3, 5), torch.randn(4, 3, 2)),
        2: (torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2)),
        3: (torch.randn(1, 3, 4, 4, 4), torch.randn(4, 3, 2, 2, 2))}

SAMPLES = {
    "addmm": [(V, W, W), (V, W, W, {"beta": 2.0, "alpha": 0.5})],
    "baddbmm": [(A, A, W.expand(2, 6, 6)), (A, A, W.expand(2, 6, 6), {"beta": 0.5})],
    "matmul": [(A, W), (A, B.mT)], "bmm": [(A, B.mT)], "mm": [(W, W)],
    "softmax": [(A, -1), (A, 1, torch.float64)],
    "layer_norm": [(A, [6]), (A, [4, 6]), (A, [6], V, V, 1e-3, False), (A, [6], None, V)],
    "group_norm": [(A, 2), (A, 2, V[:4], V[:4], 1e-3, False)],
    "batch_norm": [(A, V[:4], V[:4], V[:4].clone(), V[:4].abs(), False, 0.1, 1e-5, False),
                   (A, None, None, None, None, True, 0.1, 1e-5, False)],
    "dropout": [(A, 0.5, True), (A, 0.5, False)],
    "conv1d": [CONV[1], (*CONV[1], None, [2], [1], [1], 1)],
    "conv2d": [CONV[2], (*CONV[2], torch.randn(4), [2, 1], [1, 0])], "conv3d": [CONV[3]],
    "transpose": [(A, 1, 2)], "unsqueeze": [(A, -1)], "squeeze": [(A[:1], 0), (A, 0)],
    "permute": [(A, [2, 0, 1])], "reshape": [(A, [-1, 3]), (A.mT, [2, 24])],
    "select": [(A, 1, -1)], "t": [(W,)], "cat": [([A, B], 1), ([A, B],)],
    "stack": [([A, B], -1)], "chunk": [(A, 3, -1)], "flatten": [(A, 1), (A, 0, 1)],
    "embedding": [(W, INDEX), (W, INDEX, 2), (W, INDEX, -1, False, False)],
    "where": [(FLAG, A, B)], "masked_fill": [(A, FLAG, float("-inf")), (A, FLAG, torch.tensor(2.))],
    "clone": [(A.mT,), (A.mT, {"memory_format": torch.contiguous_format})],
    "tril": [(W,), (W, -1)], "triu": [(W, 1)], "cumsum": [(A, 1), (FLAG, -1)],
    "bitwise_and": [(FLAG, ~FLAG), (INDEX, INDEX)], "bitwise_not": [(FLAG,), (INDEX,)],
    "logical_not": [(FLAG,), (A,)], "pow": [(A, 2), (A.abs(), 0.5), (INDEX, 3)],
    "mean": [(A, [1]), (A, [0, 1], True), (A, [-1], False, {"dtype": torch.float64})],
    "index_select": [(A, 1, INDEX[0])], "gather": [(A, 1, INDEX[:, :, None])],
    "linear": [(A, W), (A, W, V)], "gelu": [(A,), (A, {"approximate": "tanh"})],
    "scaled_dot_product_attention": [(A, A, B), (A, A, B, FLAG[..., :4], 0.0, False),
                                     (A, A, B, None, 0.0, True, {"scale": 0.3})],
    "view": [(A, [2, 24]), (A, [-1])], "expand": [(V, [3, 6]), (V[None], [2, -1])],
    "contiguous": [(A.mT,)], "type_as": [(A, INDEX)], "expand_as": [(V, A)],
    "add_": [(A, 2), (A, B, {"alpha": 0.5})], "mul_": [(A, 3), (A, B)],
    "add": [(A, B), (A, 2), (A, 0.5), (A, B, {"alpha": 2}), (INDEX, 1.5), (INDEX, INDEX)],
    "sub": [(A, B), (A, 2), (A, 1, {"alpha": 3})], "mul": [(A, B), (A, 2.0), (INDEX, 0.5)],
    "div": [(A, B), (A, 3), (INDEX, 2)],
}
UNARY = "relu tanh sigmoid exp log sqrt rsqrt neg abs cos sin erf silu".split()
COMPARE = "eq ne lt le gt ge".split()
SAMPLES |= {name: [(A.abs(),), (-A,)] for name in UNARY}
SAMPLES |= {name: [(A, B), (INDEX, INDEX), (INDEX, A[0, 0, 0])] for name in COMPARE}


@pytest.mark.parametrize("overload", [o for o in _DIRECT if o.namespace == "aten"], ids=str)
def test_the_same_result(overload):
    name = overload.overloadpacket.__name__
    samples = SAMPLES[name]
    if name == "masked_fill":
        scalar = overload is torch.ops.aten.masked_fill.Scalar
        samples = [s for s in samples if isinstance(s[2], float) is scalar]
    for sample in samples:
        *args, kwargs = sample if isinstance(sample[-1], dict) else (*sample, {})
        found = []
        for function in (overload, _DIRECT[overload]):
            torch.manual_seed(0)
            given = [a.clone() if isinstance(a, torch.Tensor) and name.endswith("_") else a
                     for a in args]
            found.append(function(*given, **kwargs))
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
        if isinstance(found[0], torch.Tensor):
            assert found[0].dtype is found[1].dtype and found[0].stride() == found[1].stride()


def test_a_graph_with_direct_calls_shares_its_attributes():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(6))

        def forward(self, x):
            return torch.ops.aten.add.Tensor(x, self.table) * 2

    module = fx.symbolic_trace(Model())
    direct = with_direct_calls(module)
    assert direct.table is module.table and "torch.add(" in direct.code
    assert torch.equal(direct(A), module(A)) and "torch.ops.aten.add" in module.code


def test_the_attention_op_becomes_a_plain_function():
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    text = '{"attention":1,"logits":"(div score 2.0)"}'
    both = graph.call_function(ops.attention, (q, k, v, [], text, '["aten:dense"]'))
    graph.output(graph.call_function(torch.ops.aten.neg.default, (
        graph.call_function(operator.getitem, (both, 0)),)))
    module = fx.GraphModule({}, graph)
    direct = with_direct_calls(module)
    assert "attend" in direct.code and "torch.ops.attnopt" not in direct.code
    torch.testing.assert_close(direct(A, A, B), module(A, A, B), rtol=0, atol=0)
