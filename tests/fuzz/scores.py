"""How a random program spells its scores: the product, its scale, added terms and its mask.

Constants are made for lengths up to `LONGEST` and sliced, so that one module serves two shapes.
"""

from __future__ import annotations

from tests.fuzz.choices import Choices
from tests.fuzz.program_text import Program

LONGEST = 24


def read_as_stored(c: Choices) -> bool:
    """Whether an einsum reads q and k as they are stored, tokens before heads."""
    return (c.order == "sequence first" and c.product == "einsum" and c.score == "dot"
            and c.groups == "none" and c.call == "composed" and c.twist != "dead"
            and "activation" not in (c.bias, c.bias_too))


def tokens_before_heads(axes: str) -> str:
    *lead, heads, tokens, width = axes.split()
    return " ".join([*lead, tokens, heads, width])


def scale_of(c: Choices, root: bool = False) -> float:
    value = c.sizes()["d"] ** -0.5
    return round(value**0.5 if root else value, 6)


def write_scores(p: Program) -> None:
    c = p.choices
    p.body += _product(p)
    scale = scale_of(c)
    if c.scale == "mul" and c.product != "baddbmm":
        p.body.append(f"s = s * {scale}")
    elif c.scale == "div":
        p.body.append(f"s = s / {round(1 / scale, 4)}")
    elif c.scale == "learned":
        p.init.append(f"self.scale = nn.Parameter(torch.tensor({scale}))")
        p.body.append("s = s * self.scale")
    elif c.scale == "buffer":
        p.init.append(f"self.register_buffer('scale', torch.tensor({scale}))")
        p.body.append("s = s * self.scale")
    elif c.scale == "per head":
        p.init.append(f"self.scale = nn.Parameter(torch.randn({c.sizes()['h']}, 1, 1))")
        p.body.append("s = s * self.scale.sigmoid()")
    if c.cast == "float":
        p.body.append("s = s.float()")
    if c.cap == "tanh":
        p.body.append("s = torch.tanh(s / 3.0) * 3.0")
    for place, kind in enumerate((c.bias, c.bias_too)):
        if kind != "none":
            p.body.append(f"s = s + {bias_term(p, kind, place)}")
    if c.scale == "after":
        p.body.append(f"s = s * {scale}")
    if c.dropout == "scores":
        p.body.append("s = F.dropout(s, 0.2, self.training)")
    keep = keep_expression(p)
    if keep:
        p.body += [f"keep = {keep}", f"s = {_idiom(c)}"]


def _product(p: Program) -> list[str]:
    c = p.choices
    letters = "".join(c.leading)
    stored = c.order == "key transposed"
    right = "k" if stored else "k.transpose(-2, -1)"
    key = "k.transpose(-2, -1)" if stored else "k"
    if c.score == "cosine":
        return ["q = F.normalize(q, dim=-1)", f"k = F.normalize({key}, dim=-1)",
                "s = 6.0 * (q @ k.transpose(-2, -1))"]
    if c.score == "distance":
        return [f"k = {key}",
                "s = 2 * (q @ k.transpose(-2, -1)) - (q * q).sum(-1, keepdim=True) "
                "- (k * k).sum(-1).unsqueeze(-2)"]
    if c.score == "difference":
        return [f"k = {key}", "s = -((q.unsqueeze(-2) - k.unsqueeze(-3)) ** 2).sum(-1)"]
    if c.score == "cdist":
        half = ".float()" if c.dtype in ("bfloat16", "float16") else ""
        back = ".to(q.dtype)" if half else ""
        return [f"k = {key}", f"s = -(torch.cdist(q{half}, k{half}) ** 2){back}"]
    if c.score in ("additive", "key only"):
        p.init.append(f"self.energy = nn.Linear({c.sizes()['d']}, 1, bias=False)")
        weight = "self.energy.weight" + (".float()" if c.cast == "all" else "")
        if c.score == "key only":
            return [f"k = {key}", f"s = F.linear(k, {weight}).transpose(-2, -1)"]
        return [f"k = {key}", "s = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))",
                f"s = F.linear(s, {weight}).squeeze(-1)"]
    forms = {
        "matmul": f"q @ {right}",
        "ellipsis": f"torch.einsum('...qd,...kd->...qk', q, {key})",
        "reversed": f"({key} @ q.transpose(-2, -1)).transpose(-2, -1)",
        "sum": f"({key}.unsqueeze(-3) * q.unsqueeze(-2)).sum(-1)",
        "bmm": "torch.bmm(q.flatten(0, -3), k.flatten(0, -3).transpose(1, 2))"
               ".view(*q.shape[:-1], k.size(-2))",
    }
    if c.product == "einsum":
        read = [letters + "qd", letters + ("dk" if stored else "kd")]
        if read_as_stored(c):
            read = ["".join(tokens_before_heads(" ".join(x)).split()) for x in read]
        return [f"s = torch.einsum('{read[0]},{read[1]}->{letters}qk', q, k)"]
    if c.product == "baddbmm":
        alpha = scale_of(c) if c.scale == "mul" else 1
        return ["fq, fk = q.flatten(0, -3), k.flatten(0, -3)",
                "empty = torch.empty(fq.size(0), fq.size(1), fk.size(1), dtype=q.dtype)",
                f"s = torch.baddbmm(empty, fq, fk.transpose(1, 2), beta=0, alpha={alpha})",
                "s = s.view(*q.shape[:-1], k.size(-2))"]
    return [f"s = {forms[c.product]}"]


def _grid(c: Choices) -> tuple[str, str]:
    if c.call == "sdpa":
        return "q.size(-2)", "k.size(-2)"
    return "s.size(-2)", "s.size(-1)"


def bias_term(p: Program, kind: str, place: int) -> str:
    c, heads = p.choices, p.choices.sizes()["h"]
    rows, columns = _grid(c)
    dtype = "q.dtype" if c.call == "sdpa" else "s.dtype"
    step = f"(torch.arange({columns})[None, :] - torch.arange({rows})[:, None])"
    shape = f"{heads}, {LONGEST}, {LONGEST}" if "h" in c.leading else f"{LONGEST}, {LONGEST}"
    name = f"self.{kind}_{place}"
    if kind in ("table", "buffer", "attribute"):
        made = f"torch.randn({shape})"
        p.init.append({
            "table": f"{name} = nn.Parameter({made})",
            "buffer": f"self.register_buffer('{kind}_{place}', {made})",
            "attribute": f"{name} = {made}",
        }[kind])
        return f"{name}[..., :{rows}, :{columns}].to({dtype})"
    if kind == "alibi":
        p.init.append(f"self.register_buffer('{kind}_{place}', "
                      f"2.0 ** -torch.arange(1.0, {heads + 1}))")
        return f"({name}.view(-1, 1, 1) * {step}).to({dtype})"
    if kind == "gather":
        p.init.append(f"{name} = nn.Parameter(torch.randn({2 * LONGEST}, {heads}))")
        return f"{name}[{step} + {LONGEST}].permute(2, 0, 1).to({dtype})"
    if kind == "distance":
        return f"({step}.abs() * -0.5).to({dtype})"
    if kind == "activation":
        p.init.append(f"{name} = nn.Parameter(torch.randn({LONGEST}, {c.sizes()['d']}))")
        return f"(q @ {name}[:{columns}].to(q.dtype).t()).to({dtype})"
    if kind == "row":
        p.inputs.append((f"row_{place}", "b k" if c.source != "projected" else "b s"))
        ones = "1, " * len(c.leading)
        return f"row_{place}.view(row_{place}.size(0), {ones}row_{place}.size(1))"
    p.inputs.append((f"bias_{place}", " ".join([*c.leading, "q", "k"])))
    return f"bias_{place}"


def keep_expression(p: Program) -> str | None:
    """An expression that is True where a key is attended, or None."""
    c = p.choices
    rows, columns = _grid(c)
    at_q, at_k = f"torch.arange({rows})[:, None]", f"torch.arange({columns})[None, :]"
    ones = "1, " * len(c.leading)
    if c.mask in ("keys", "causal keys"):
        p.inputs.append(("mask", "keep b k"))
        keys = f"mask.view(mask.size(0), {ones}mask.size(1))"
        return keys if c.mask == "keys" else f"({at_k} <= {at_q}) & {keys}"
    if c.mask == "dense":
        batch = ["b", *["1"] * (len(c.leading) - 1)] if "b" in c.leading else []
        p.inputs.append(("mask", " ".join(["keep", *batch, "q", "k"])))
        return "mask"
    if c.mask == "lengths":
        p.inputs.append(("lengths", "count b"))
        return f"torch.arange({columns}) < lengths.view(lengths.size(0), {ones}1)"
    if c.mask == "segments":
        p.inputs.append(("ids", "count b k"))
        batch = f"ids.size(0), {ones[3:]}"
        return f"ids.view({batch}ids.size(1), 1) == ids.view({batch}1, ids.size(1))"
    made = f"torch.rand({LONGEST}, {LONGEST}) < 0.6"
    if c.mask == "buffer":
        p.init += [f"keep = {made}", "keep[:, 0] = True", "self.register_buffer('kept', keep)"]
    elif c.mask == "attribute":
        p.init += [f"self.kept = {made}", "self.kept[:, 0] = True"]
    elif c.mask == "empty rows":
        p.init += [f"keep = {made}", "keep[1] = False", "self.register_buffer('kept', keep)"]
    elif c.mask == "sliced causal":
        p.init.append(f"self.register_buffer('kept', torch.ones({LONGEST}, {LONGEST}, "
                      "dtype=torch.bool).tril())")
    return {
        "none": None,
        "top keys": "s >= s.topk(2, dim=-1).values[..., -1:]",
        "causal": f"{at_k} <= {at_q}",
        "window": f"({at_k} - {at_q}).abs() < 3",
        "all keep": f"torch.ones({rows}, {columns}, dtype=torch.bool)",
    }.get(c.mask, f"self.kept[:{rows}, :{columns}]")


def _idiom(c: Choices) -> str:
    least = "torch.finfo(s.dtype).min"
    far = "-1e4" if c.dtype == "float16" else "-1e9"
    return {
        "where": "torch.where(keep, s, float('-inf'))",
        "where least": f"torch.where(keep, s, {least})",
        "fill": "s.masked_fill(~keep, float('-inf'))",
        "fill least": f"s.masked_fill(torch.logical_not(keep), {least})",
        "fill far": f"s.masked_fill(keep == 0, {far})",
        "add": "s + torch.where(keep, 0.0, float('-inf')).to(s.dtype)",
        "add far": "s + (~keep).to(s.dtype) * -1e4",
        "complement": f"s + (1.0 - keep.to(s.dtype)) * {least}",
        "in place": "s.masked_fill_(~keep, float('-inf'))",
        "negated": "torch.where(~keep, float('-inf'), s)",
    }[c.idiom]
