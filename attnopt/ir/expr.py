"""Expr: one typed expression language for scores, epilogues, index arithmetic and predicates.

An `Expr` is an immutable, interned tree (equal expressions are the same object). Types are `int`,
`bool` and `float`. `//` and `%` floor, as in Python. The leaves are

    const        a number or truth value
    score        the raw score of the site at (…, q, k)
    weight       the normalised weight at (…, q, k); only in a weight epilogue
    out, value   the attention output, or row q of V, at (…, q, d); only in an output epilogue
    index(n)     an axis index: q, k, d, or a leading axis h, b, b1, b2 … counted from the right
    size(n)      the length of such an axis
    load(s, …)   an operand by slot name. Without indices it is broadcast against the score, as
                 torch broadcasts; with indices it is gathered, and an index may hold loads.
    inner(f, g)  sum over r of f[…, q, r] * g[…, k, r]: a low-rank or positional second dot
    stat(n)      a row statistic of the normaliser, over the keys that the mask keeps: max of x,
                 sum of what is divided by (of exp(x) for softmax), count, lse, mass:<group> (sum
                 of the weights of a group); in an output epilogue also total, the sum of the
                 weights after their own epilogue

The text form is an s-expression, `(add (mul score 0.125) (load bias))`; `parse` reads it back.
Booleans and case distinctions are nodes of this language; sympy is used only to prove facts about
its integer part (`attnopt.ir.facts`).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attnopt.ir.folding import fold

INT, BOOL, FLOAT = "int", "bool", "float"

_NUMERIC = ("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "floordiv", "mod", "where")
_FLOAT_OPS = (
    "div", "exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "softplus", "relu",
    "pow", "cos", "sin", "sign", "erf", "round", "float",
)
_INT_OPS = ("int", "floor")
_BOOL_OPS = ("and", "or", "xor", "not", "lt", "le", "eq", "ne", "bool", "isnan")
_LEAVES = ("const", "score", "weight", "out", "value", "index", "size", "load", "inner", "stat")
OPS = frozenset(_NUMERIC + _FLOAT_OPS + _INT_OPS + _BOOL_OPS + _LEAVES)
_ARITY = {
    **dict.fromkeys(("neg", "abs", "exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "tanh",
                     "sigmoid", "softplus", "relu", "cos", "sin", "sign", "erf", "round", "float",
                     "int", "floor", "not", "bool", "isnan"), 1),
    "where": 3,
}
_COMMUTATIVE = frozenset(("add", "mul", "minimum", "maximum", "and", "or", "xor", "eq", "ne"))


class Expr:
    """One node. Build it with the functions of this module or with Python operators."""

    __slots__ = ("op", "args", "value", "dtype", "_free", "__weakref__")
    op: str
    args: tuple[Expr, ...]
    value: Any
    dtype: str
    _free: frozenset[Expr] | None

    _interned: weakref.WeakValueDictionary[tuple[Any, ...], Expr] = weakref.WeakValueDictionary()

    def __new__(cls, op: str, args: tuple[Expr, ...] = (), value: Any = None,
                dtype: str = FLOAT) -> Expr:
        if op not in OPS:
            raise ValueError(f"op must be an Expr operation, got {op!r}")
        # repr keeps 1, 1.0 and True apart, and nan equal to itself.
        key = (op, tuple(map(id, args)), repr(value), dtype)
        found = cls._interned.get(key)
        if found is None:
            found = object.__new__(cls)
            for name, content in (("op", op), ("args", args), ("value", value), ("dtype", dtype)):
                object.__setattr__(found, name, content)
            object.__setattr__(found, "_free", None)
            found = cls._interned.setdefault(key, found)  # another thread may have been first
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Expr is immutable, cannot set {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return parse, (str(self),)

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Expr:
        return self

    # -- Python operators -------------------------------------------------------------------
    def __add__(self, other: Any) -> Expr: return call("add", self, other)
    def __radd__(self, other: Any) -> Expr: return call("add", other, self)
    def __sub__(self, other: Any) -> Expr: return call("sub", self, other)
    def __rsub__(self, other: Any) -> Expr: return call("sub", other, self)
    def __mul__(self, other: Any) -> Expr: return call("mul", self, other)
    def __rmul__(self, other: Any) -> Expr: return call("mul", other, self)
    def __truediv__(self, other: Any) -> Expr: return call("div", self, other)
    def __rtruediv__(self, other: Any) -> Expr: return call("div", other, self)
    def __floordiv__(self, other: Any) -> Expr: return call("floordiv", self, other)
    def __mod__(self, other: Any) -> Expr: return call("mod", self, other)
    def __neg__(self) -> Expr: return call("neg", self)
    def __and__(self, other: Any) -> Expr: return call("and", self, other)
    def __or__(self, other: Any) -> Expr: return call("or", self, other)
    def __xor__(self, other: Any) -> Expr: return call("xor", self, other)
    def __invert__(self) -> Expr: return call("not", self)
    def __lt__(self, other: Any) -> Expr: return call("lt", self, other)
    def __le__(self, other: Any) -> Expr: return call("le", self, other)
    def __gt__(self, other: Any) -> Expr: return call("lt", other, self)
    def __ge__(self, other: Any) -> Expr: return call("le", other, self)
    def eq(self, other: Any) -> Expr: return call("eq", self, other)
    def ne(self, other: Any) -> Expr: return call("ne", self, other)

    def __bool__(self) -> bool:
        raise TypeError(f"the truth of {self} is not known; compare with `is`, or use `where`")

    # -- queries ----------------------------------------------------------------------------
    @property
    def leaves(self) -> frozenset[Expr]:
        """All leaves under this node (loads count as leaves, and so do the leaves they index)."""
        if self._free is None:
            own = frozenset((self,)) if self.op in _LEAVES else frozenset()
            found = own.union(*(a.leaves for a in self.args))
            object.__setattr__(self, "_free", found)
            return found
        return self._free

    @property
    def slots(self) -> frozenset[str]:
        """Names of the operands that it loads."""
        loads = [leaf.value for leaf in self.leaves if leaf.op == "load"]
        pairs = [slot for leaf in self.leaves if leaf.op == "inner" for slot in leaf.value]
        return frozenset(loads + pairs)

    @property
    def indices(self) -> frozenset[str]:
        """Names of the axes whose index it reads."""
        return frozenset(leaf.value for leaf in self.leaves if leaf.op == "index")

    def has(self, op: str) -> bool:
        return any(leaf.op == op for leaf in self.leaves) or any(n.op == op for n in self.walk())

    def walk(self) -> Iterator[Expr]:
        """Every distinct node, arguments before the node that uses them."""
        seen: set[Expr] = set()
        stack: list[tuple[Expr, bool]] = [(self, False)]
        while stack:
            node, ready = stack.pop()
            if node in seen:
                continue
            if ready:
                seen.add(node)
                yield node
            else:
                stack.append((node, True))
                stack.extend((a, False) for a in reversed(node.args) if a not in seen)

    def replace(self, mapping: Mapping[Expr, Expr] | Callable[[Expr], Expr | None]) -> Expr:
        """Replace nodes bottom-up; a callable returns None for what it leaves alone."""
        pick = mapping.get if isinstance(mapping, Mapping) else mapping
        done: dict[Expr, Expr] = {}
        for node in self.walk():
            new = pick(node)
            if new is None:
                args = tuple(done[a] for a in node.args)
                new = node if args == node.args else rebuild(node, args)
            done[node] = new
        return done[self]

    # -- text -------------------------------------------------------------------------------
    def __str__(self) -> str:
        if self.op == "const":
            return repr(self.value).lower() if self.dtype == BOOL else repr(self.value)
        if self.op in ("score", "weight", "out", "value"):
            return self.op
        if self.op == "index":
            return str(self.value)
        if self.op == "size":
            return f"#{self.value}"
        if self.op == "stat":
            return f"@{self.value}"
        if self.op == "inner":
            return f"(inner {' '.join(self.value)})"
        head = self.op
        if self.op == "load":
            tag = {FLOAT: "load", INT: "load_int", BOOL: "load_bool"}[self.dtype]
            head = f"{tag} {self.value}"
        return f"({' '.join([head, *map(str, self.args)])})"

    __repr__ = __str__


def rebuild(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operation on other arguments, simplified again."""
    return Expr("load", args, node.value, node.dtype) if node.op == "load" else call(node.op, *args)


# -- leaves -------------------------------------------------------------------------------------
def const(value: bool | int | float) -> Expr:
    kind = BOOL if isinstance(value, bool) else INT if isinstance(value, int) else FLOAT
    return Expr("const", (), value, kind)


score = Expr("score")
weight = Expr("weight")
out = Expr("out")
value = Expr("value")
TRUE, FALSE = const(True), const(False)
_AXIS = re.compile(r"q|k|d|h|b\d*")


def index(axis: str) -> Expr:
    """The index along `axis`: q, k, d, h, b, b1, b2 …"""
    if not _AXIS.fullmatch(axis):
        raise ValueError(f"axis must be q, k, d, h, b, b1, b2 …, got {axis!r}")
    return Expr("index", (), axis, INT)


def size(axis: str) -> Expr:
    """The length of `axis`."""
    return Expr("size", (), index(axis).value, INT)


def load(slot: str, *indices: Any, dtype: str = FLOAT) -> Expr:
    """Operand `slot`: broadcast against the score without indices, gathered at them with."""
    if not re.fullmatch(r"[A-Za-z_]\w*", slot):
        raise ValueError(f"slot must be an identifier, got {slot!r}")
    return Expr("load", tuple(map(wrap, indices)), slot, dtype)


def inner(query_slot: str, key_slot: str) -> Expr:
    """Sum over r of query_slot[…, q, r] * key_slot[…, k, r]."""
    return Expr("inner", (), (load(query_slot).value, load(key_slot).value), FLOAT)


def stat(name: str) -> Expr:
    """A row statistic of the normaliser: max, sum, count, lse, total or mass:<group>."""
    if name not in ("max", "sum", "count", "lse", "total") and not re.fullmatch(r"mass:\w+", name):
        raise ValueError(f"stat must be max, sum, count, lse, total or mass:<group>, got {name!r}")
    return Expr("stat", (), name, INT if name == "count" else FLOAT)


def wrap(x: Any) -> Expr:
    return x if isinstance(x, Expr) else const(x)


# -- operations ---------------------------------------------------------------------------------
def where(condition: Any, yes: Any, no: Any) -> Expr:
    return call("where", condition, yes, no)


def call(op: str, *arguments: Any) -> Expr:
    """Build one operation: types are promoted, constants folded, neutral elements dropped."""
    args = tuple(map(wrap, arguments))
    if len(args) != _ARITY.get(op, 2):
        raise ValueError(f"{op} must have {_ARITY.get(op, 2)} arguments, got {len(args)}")
    if op in ("and", "or", "xor", "not"):
        args = tuple(a if a.dtype == BOOL else call("ne", a, 0) for a in args)
    elif op == "where":
        condition = args[0] if args[0].dtype == BOOL else call("ne", args[0], 0)
        args = (condition, *_promote(args[1:]))
    elif op in ("float", "int", "bool", "isnan"):
        pass
    elif op in _FLOAT_OPS:
        args = tuple(map(_to_float, args))
    else:
        args = _promote(args)
        if op not in ("eq", "ne") and args[0].dtype == BOOL:
            args = tuple(call("int", a) for a in args)
    simpler = _simplify(op, args)
    return simpler if simpler is not None else Expr(op, args, None, _dtype(op, args))


def _to_float(a: Expr) -> Expr:
    return a if a.dtype == FLOAT else call("float", a)


def _promote(args: tuple[Expr, ...]) -> tuple[Expr, ...]:
    kinds = {a.dtype for a in args}
    if len(kinds) == 1:
        return args
    return tuple(map(_to_float, args)) if FLOAT in kinds else tuple(
        a if a.dtype == INT else call("int", a) for a in args)


def _dtype(op: str, args: tuple[Expr, ...]) -> str:
    if op in _BOOL_OPS:
        return BOOL
    if op in _INT_OPS:
        return INT
    return FLOAT if op in _FLOAT_OPS else args[-1].dtype


def _is(a: Expr, *values: Any) -> bool:
    return a.op == "const" and any(a.value == v for v in values)


def _simplify(op: str, args: tuple[Expr, ...]) -> Expr | None:
    a = args[0]
    b = args[1] if len(args) > 1 else a
    if all(x.op == "const" for x in args):
        folded = fold(op, *(x.value for x in args))
        if folded is not None:
            return const(folded)
    if op in _COMMUTATIVE and a.op == "const" and b.op != "const":
        return call(op, b, a)  # constants last, so that equal forms are equal
    match op:
        case "add" | "sub" if _is(b, 0):
            return a
        case "mul" | "div" if _is(b, 1):
            return a
        case "floordiv" if _is(b, 1) and a.dtype == INT:
            return a
        case "mod" if _is(b, 1) and a.dtype == INT:
            return const(0)
        case "mul" if _is(b, 0) and a.dtype == INT:
            return b
        case "eq" | "le" if a is b and a.dtype != FLOAT:
            return TRUE
        case "ne" | "lt" if a is b and a.dtype != FLOAT:
            return FALSE
        case "neg" | "not" if a.op == op:
            return a.args[0]
        case "float" | "int" | "bool" if a.dtype == op:
            return a
        case "and" if _is(b, True) or a is b:
            return a
        case "and" if _is(b, False):
            return FALSE
        case "or" if _is(b, False) or a is b:
            return a
        case "or" if _is(b, True):
            return TRUE
        case "where" if a.op == "const":
            return args[1] if a.value else args[2]
        case "where" if args[1] is args[2]:
            return args[1]
        case "minimum" | "maximum" if a is b:
            return a
    return None


# -- parser -------------------------------------------------------------------------------------
_TOKEN = re.compile(r"\(|\)|[^\s()]+")
_LOADS = {"load": FLOAT, "load_int": INT, "load_bool": BOOL}


def parse(text: str) -> Expr:
    """Read the text form back: `parse(str(e)) is e`."""
    tokens = _TOKEN.findall(text)
    try:
        node, end = _parse(tokens, 0)
    except IndexError:
        raise ValueError(f"text must be a complete expression, got {text!r}") from None
    if end != len(tokens):
        raise ValueError(f"text must be one expression, got {text!r}")
    return node


def _parse(tokens: list[str], i: int) -> tuple[Expr, int]:
    token = tokens[i]
    if token != "(":
        return _atom(token), i + 1
    op, i = tokens[i + 1], i + 2
    if op == "inner":
        if tokens[i + 2 : i + 3] != [")"]:
            raise ValueError("inner must have two slots")
        return inner(tokens[i], tokens[i + 1]), i + 3
    slot = None
    if op in _LOADS:
        slot, i = tokens[i], i + 1
    args = []
    while tokens[i] != ")":
        arg, i = _parse(tokens, i)
        args.append(arg)
    if slot is not None:
        return load(slot, *args, dtype=_LOADS[op]), i + 1
    # Not `call`: the text is of a simplified expression, and must come back as it was.
    if op not in OPS or op in _LEAVES or len(args) != _ARITY.get(op, 2):
        raise ValueError(f"expression must apply a known operation, got ({op} …{len(args)})")
    return Expr(op, tuple(args), None, _dtype(op, tuple(args))), i + 1


def _atom(token: str) -> Expr:
    if token in ("score", "weight", "out", "value"):
        return Expr(token)
    if token in ("true", "false"):
        return const(token == "true")
    if token[0] == "#":
        return size(token[1:])
    if token[0] == "@":
        return stat(token[1:])
    if _AXIS.fullmatch(token):
        return index(token)
    try:
        return const(int(token))
    except ValueError:
        return const(float(token))
