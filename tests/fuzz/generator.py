"""Renders `Choices` as the source of one `nn.Module`, as a person might have written it.

The text is what a failure is reported with: it runs on its own.
"""

from __future__ import annotations

from tests.fuzz.choices import Choices
from tests.fuzz.program_text import Program
from tests.fuzz.scores import (
    bias_term,
    keep_expression,
    read_as_stored,
    scale_of,
    tokens_before_heads,
    write_scores,
)


def render(c: Choices) -> Program:
    """The program of the given choices."""
    p = Program(c)
    if c.call == "mha":
        return _multi_head(p)
    _operands(p)
    if c.call == "sdpa":
        _fused(p)
    else:
        write_scores(p)
        _weights(p)
        _values(p)
    _result(p)
    return p


def _multi_head(p: Program) -> Program:
    sizes = p.choices.sizes()
    p.init.append(f"self.mha = nn.MultiheadAttention({sizes['c']}, {sizes['h']}, "
                  "batch_first=True)")
    p.inputs.append(("x", "b s c"))
    if p.choices.result in ("weights", "mean"):
        p.body.append(f"return self.mha(x, x, x, average_attn_weights="
                      f"{p.choices.result == 'mean'})")
    else:
        p.body.append("return self.mha(x, x, x, need_weights=False)[0]")
    return p


# -- query, key, value ----------------------------------------------------------------------------
def _operands(p: Program) -> None:
    c, sizes = p.choices, p.choices.sizes()
    lead, width = " ".join(c.leading), sizes["c"]
    heads = f"unflatten(-1, ({sizes['h']}, {sizes['d']})).transpose(1, 2)"
    if c.source == "projected":
        p.inputs.append(("x", "b s c"))
        p.init.append(f"self.qkv = nn.Linear({width}, {3 * width})")
        if c.rank == "4":
            p.body.append(f"q, k, v = self.qkv(x).view(x.size(0), x.size(1), 3, {sizes['h']}, "
                          f"{sizes['d']}).permute(2, 0, 3, 1, 4)")
        else:
            p.body.append("q, k, v = self.qkv(x).chunk(3, dim=-1)")
    elif c.source == "cross":
        p.inputs += [("x", "b q c"), ("y", "b k c")]
        for name, source in (("query", "x"), ("key", "y"), ("value", "y")):
            p.init.append(f"self.{name} = nn.Linear({width}, {width}, bias=False)")
            split = f".{heads}" if c.rank == "4" else ""
            p.body.append(f"{name[0]} = self.{name}({source}){split}")
    elif c.source == "one tensor":
        p.inputs.append(("x", "b s d"))
        p.body.append("q = k = v = x")
    else:
        _direct(p, lead)
    if c.cast == "all":
        p.body += ["kind = q.dtype", "q, k, v = q.float(), k.float(), v.float()"]
    if c.groups in ("repeat_kv", "repeat_interleave", "expand") and not _native_groups(c):
        for name in "kv":
            p.body.append(f"{name} = {_REPEATS[c.groups].format(name)}")
    if c.scale in ("query", "both"):
        p.body.append(f"q = q * {scale_of(c, c.scale == 'both')}")
    if c.scale in ("key", "both"):
        p.body.append(f"k = k * {scale_of(c, c.scale == 'both')}")


_REPEATS = {
    "repeat_kv": "{0}[:, :, None].expand(-1, -1, 2, -1, -1)"
                 ".reshape({0}.size(0), 2 * {0}.size(1), {0}.size(2), {0}.size(3))",
    "repeat_interleave": "torch.repeat_interleave({0}, repeats=2, dim=1)",
    "expand": "{0}.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)",
}


def _native_groups(c: Choices) -> bool:
    return c.call == "sdpa" and c.groups == "expand"


def _direct(p: Program, lead: str) -> None:
    c = p.choices
    grouped = {"none": lead, "one": "b 1"}.get(c.groups, "b g")
    axes = {"q": f"{lead} q d", "k": f"{grouped} k d", "v": f"{grouped} k e"}
    if c.order == "sequence first":
        axes = {name: tokens_before_heads(text) for name, text in axes.items()}
    if c.order == "key transposed":
        axes["k"] = f"{grouped} d k"
    p.inputs += [(name, text.strip()) for name, text in axes.items()]
    if c.order == "sequence first":
        names = "v" if read_as_stored(c) else "qkv"
        p.body += [f"{name} = {name}.transpose(-2, -3)" for name in names]


# -- weights, values, result ----------------------------------------------------------------------
def _weights(p: Program) -> None:
    c, heads = p.choices, p.choices.sizes()["h"]
    stable = ["w = (s - s.amax(-1, keepdim=True)).exp()"]
    cast = ", dtype=torch.float32" if c.cast == "softmax" else ""
    forms = {
        "softmax": [f"w = F.softmax(s, dim=-1{cast})"],
        "method": [f"w = s.softmax(-1{cast})"],
        "hand": [*stable, "w = w / w.sum(-1, keepdim=True)"],
        "after": [*stable, "total = w.sum(-1, keepdim=True)"],
        "exp": ["w = torch.exp(s)", "w = w / torch.sum(w, dim=-1, keepdim=True)"],
        "log-sum-exp": ["w = torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True))"],
        "log": ["w = F.log_softmax(s, dim=-1).exp()"],
        "sigmoid": ["w = torch.sigmoid(s - 1.0)"],
        "relu": ["w = F.relu(s) / s.size(-1)"],
        "plus one": ["w = torch.exp(s)", "w = w / (1 + w.sum(-1, keepdim=True))"],
        "sinks": ["sink = self.sinks.to(s.dtype).view(-1, 1, 1).expand(*s.shape[:-1], 1)",
                  "w = torch.cat([s, sink], dim=-1).softmax(-1)[..., :-1]"],
    }
    if c.normaliser == "sinks":
        p.init.append(f"self.sinks = nn.Parameter(torch.randn({heads}))")
    p.body += {"queries": ["w = s.softmax(-2)"], "chain": ["w = s / s.size(-1)"]}.get(
        c.twist, forms[c.normaliser])
    if c.cast in ("softmax", "float"):
        p.body.append("w = w.to(v.dtype)")
    if c.dropout == "function":
        p.body.append("w = F.dropout(w, 0.2, self.training)")
    elif c.dropout == "module":
        p.init.append("self.drop = nn.Dropout(0.2)")
        p.body.append("w = self.drop(w)")
    if c.edit in ("heads", "mix"):
        shape = f"{heads}, 1, 1" if c.edit == "heads" else f"{heads}, {heads}"
        p.init.append(f"self.gain = nn.Parameter(torch.randn({shape}))")
    p.body += {
        "none": [],
        "heads": ["w = w * self.gain.to(w.dtype)"],
        "mix": ["w = torch.einsum('gh,...hqk->...gqk', self.gain.to(w.dtype), w)"],
        "gate": ["w = w * v[..., :1].transpose(-2, -1).sigmoid()"],
        "again": ["w = w + 1e-3", "w = w / w.sum(-1, keepdim=True)"],
        "identity": ["w = 0.5 * w + 0.5 * torch.eye(w.size(-1), dtype=w.dtype)"],
    }[c.edit]


def _values(p: Program) -> None:
    c = p.choices
    letters = "".join(c.leading)
    p.body.append("o = " + {
        "matmul": "w @ v",
        "einsum": f"torch.einsum('{letters}qk,{letters}ke->{letters}qe', w, v)",
        "right": "(v.transpose(-2, -1) @ w.transpose(-2, -1)).transpose(-2, -1)",
        "bmm": "torch.bmm(w.flatten(0, -3), v.flatten(0, -3)).view(*w.shape[:-1], v.size(-1))",
        "sum": "(w.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)",
    }[c.value])
    if c.normaliser == "after":
        p.body.append("o = o / total.to(o.dtype)")


def _fused(p: Program) -> None:
    c = p.choices
    arguments = []
    keep = None if c.mask == "causal" and c.bias == c.bias_too == "none" else keep_expression(p)
    terms = [bias_term(p, kind, i) for i, kind in enumerate((c.bias, c.bias_too)) if kind != "none"]
    if keep and (terms or c.idiom in ("add", "add far", "complement")):
        terms.append(f"torch.where({keep}, 0.0, float('-inf')).to(q.dtype)")
        keep = None
    if terms or keep:
        p.body.append(f"mask_or_bias = {keep or ' + '.join(terms)}")
        arguments.append("attn_mask=mask_or_bias")
    elif c.mask == "causal":
        arguments.append("is_causal=True")
    if c.scale == "mul":
        arguments.append(f"scale={round(0.8 * scale_of(c), 6)}")
    elif c.scale in ("query", "key", "both"):
        arguments.append("scale=1.0")
    if c.dropout != "none":
        arguments.append("dropout_p=0.2 if self.training else 0.0")
    if _native_groups(c):
        arguments.append("enable_gqa=True")
    p.body.append(f"o = F.scaled_dot_product_attention({', '.join(['q, k, v', *arguments])})")


def _result(p: Program) -> None:
    c = p.choices
    if c.twist == "dead":
        p.body.append("(v @ v.transpose(-2, -1)).softmax(-1)")
    if c.cast == "all":
        p.body.append("o = o.to(kind)")
    if c.result == "merged":
        p.body.append("o = o.transpose(1, 2).flatten(2)")
        if c.source in ("projected", "cross"):
            width = c.sizes()["c"]
            p.init.append(f"self.out = nn.Linear({width}, {width})")
            p.body.append("o = self.out(o)")
    if c.twist == "mutated":
        p.body += ["w = w.mul_(2.0)", "return o, w"]
    elif c.result == "weights":
        p.body.append("return o, w")
    elif c.result == "mean":
        p.body.append("return o, w.mean(-3)")
    else:
        p.body.append("return o")
