"""Where the rows of an attention come from and go to: tokens of a map, element by element.

    q[b, h, i, d] = source[token(b, i), first + h * step + d]
    result[token(b, i), h * Dv + d] = out[b, h, i, d]

Data movement is read backwards (`attnopt.passes.analyze.movement`) at the lengths of the graph, and
is nothing but rows that move where it comes out as above. A linear layer of the model, and a
dropout that drops nothing, treat all tokens alike: where tokens come from is asked of what they are
applied to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.movement import Index, Mover, Unmoved, squeezed
from attnopt.passes.analyze.movement_views import VIEWS
from attnopt.passes.normalize import View, op_name

log = logging.getLogger("attnopt.passes")
#: elements of a tensor that is followed
_LARGEST = 1 << 24
#: operations with several results that are parts of a tensor
_PARTS = ("unbind", "split", "split_with_sizes", "chunk", "tensor_split")
#: axes of the rows of an attention
_B, _H, _I, _D = range(4)


class No(Exception):
    """Why an attention keeps its rolls and partitions."""


@dataclass(frozen=True)
class Rows:
    """Rows (b, h, i, d) of a tensor: token tokens[b, i] and channel first + h * step + d of `node`,
    or of a linear layer like `linear` that is applied to `node`."""

    node: fx.Node
    tokens: Tensor
    first: int
    step: int
    linear: fx.Node | None = None


@dataclass(frozen=True)
class Result:
    """`end` has row (b, i) of the attention as its token tokens[b, i], behind `linear`."""

    end: fx.Node
    tokens: Tensor
    linear: fx.Node | None = None


class Reader:
    """Follows the tensors of one call through the author's graph."""

    def __init__(self, view: View, call: fx.Node) -> None:
        self.view, self.call = view, call
        self.opaque = {author for node, author in view.author.items()
                       if node.meta.get("attnopt_opaque")}
        val = call.args[0].meta["val"]  # type: ignore[union-attr]
        self.shape = [n if isinstance(n, int) else 0 for n in val.shape]
        if len(self.shape) != 4 or not all(self.shape):
            raise No("lengths or leading axes that are not known")

    def pull(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
        """The one tensor that `node` is moved from, all of it, and where."""
        mover = Mover(Values({}, lambda name: None), lambda n: None)
        pieces = mover.pull(node, index)
        if len(pieces) != 1 or pieces[0].node is None or not bool(pieces[0].where.all()):
            raise No(f"{node.name} is put together from several tensors")
        source = pieces[0].node
        region = self.call.meta.get("attnopt_region")
        if any(n.meta.get("attnopt_region") != region for n in mover.passed):
            raise No("no_grad or autocast in between")
        self.unwritten(source, *mover.passed)
        found = tuple(squeezed(i) for i in pieces[0].index)
        if _is_inert(source):
            return self.pull(source.args[0], found)  # type: ignore[arg-type]
        return source, found

    def unwritten(self, *nodes: fx.Node) -> None:
        """Nothing of this memory may be written to behind the first of these nodes."""
        for node in nodes:
            root = self.view.roots.get(node, node)
            if node in self.opaque or any(at > self.view.position[root]
                                          for at in self.view.writes_to.get(root, ())):
                raise No(f"{node.name} is written in place")

    def rows(self, node: fx.Node) -> Rows:
        """Where the rows of query, key or value come from."""
        lengths = [int(n) for n in node.meta["val"].shape]
        if lengths[:3] != self.shape[:3]:
            raise No("rows, heads or windows that are not those of the query")
        index = _axes(lengths)
        source, places = self.pull(node, index)
        found = _split(source, places, lengths)
        if op_name(source) == "linear" and source.op == "call_function" and len(
                source.meta["val"].shape) >= 2:
            try:
                return self.before(source, found, lengths)
            except (No, Unmoved) as why:
                log.debug("%s stays behind its windows: %s", source.name, why)
        return found

    def before(self, linear: fx.Node, rows: Rows, lengths: Sequence[int]) -> Rows:
        """The same of the map that a linear layer is applied to, window by window."""
        given = linear.args[0]
        assert isinstance(given, fx.Node)
        if not _by_weights(linear) or linear.meta.get("attnopt_region") != self.call.meta.get(
                "attnopt_region"):
            raise No("no linear layer of the model")
        if not self.only_here(linear):
            raise No("it is used elsewhere, too")
        shape = [int(n) for n in given.meta["val"].shape]
        tokens, channels = rows.tokens.flatten(), shape[-1]
        index = (*_unravel(tokens, shape[:-1]), torch.arange(channels))
        source, places = self.pull(given, (
            *(i.view(-1, 1) for i in index[:-1]), index[-1].view(1, -1)))
        if source is given:
            raise No("its tokens are not moved")
        sizes = [int(n) for n in source.meta["val"].shape]
        if sizes[-1] != channels or not torch.equal(
                places[-1].expand(len(tokens), channels), index[-1].expand(len(tokens), -1)) \
                or any(i.shape[-1] != 1 for i in places[:-1]):
            raise No("channels are moved, too")
        moved = _ravel(places[:-1], sizes[:-1]).expand(len(tokens), 1)
        return Rows(source, moved.reshape(rows.tokens.shape), rows.first, rows.step, linear)

    def only_here(self, node: fx.Node) -> bool:
        """Does nothing but the call read what is moved from a node?"""
        return all(user is self.call or user.target is torch.ops.attnopt.literal.default
                   or (op_name(user) in VIEWS or op_name(user) in _PARTS) and self.only_here(user)
                   for user in node.users)

    def result(self, out: fx.Node) -> Result:
        """The last node that only moves the result, or applies one linear layer to it."""
        chain, linear, node = [out], None, out
        while len(node.users) == 1:
            (user,) = node.users
            name = op_name(user)
            if user.op != "call_function" or not user.args or user.args[0] is not node:
                break
            if user.all_input_nodes[1:] and name != "linear" or user.meta.get(
                    "attnopt_region") != out.meta.get("attnopt_region"):
                break
            if name == "linear" and linear is None and _by_weights(user):
                linear = user
            elif not _is_inert(user) and (name not in VIEWS or name == "getitem"):
                break
            chain.append(user)
            node = user
        reasons = []
        for end in reversed(chain[1:]):
            after = linear if linear in chain[:chain.index(end) + 1] else None
            try:
                return Result(end, self.tokens_of(out, end, after), after)
            except (No, Unmoved) as why:
                reasons.append(str(why))
        raise No(reasons[0] if reasons else "its result is not moved")

    def tokens_of(self, out: fx.Node, end: fx.Node, linear: fx.Node | None) -> Tensor:
        """The token of each row of `out` in `end`; raises where it is more than rows moved."""
        val = end.meta["val"]
        shape = [int(n) for n in val.shape]
        if math.prod(shape) > _LARGEST or not val.is_contiguous() or not shape:
            raise No("strides of its own")
        windows, heads, rows, width = (int(n) for n in out.meta["val"].shape)
        index = _axes(shape)
        if linear is not None:
            source, places = self.pull(end, index) if end is not linear else (linear, index)
            if source is not linear or not torch.equal(places[-1], index[-1]) or any(
                    i.shape[-1] != 1 for i in places[:-1]):
                raise No("the linear layer does not end here")
            given = linear.args[0]
            assert isinstance(given, fx.Node)
            shape = [*shape[:-1], int(given.meta["val"].shape[-1])]
            last = torch.arange(shape[-1]).view(*[1] * (len(shape) - 1), -1)
            source, places = self.pull(given, (*places[:-1], last)) \
                if given is not out else (out, (*places[:-1], last))
        else:
            source, places = self.pull(end, index)
        if source is not out or len(places) != 4 or shape[-1] != heads * width:
            raise No("it does not end as a map of all heads")
        b, h, i, d = places
        channel = (h * width + d).expand(*[1] * (len(shape) - 1), -1) \
            if h.numel() * d.numel() > 1 else h * width + d
        if not torch.equal(channel.flatten(), torch.arange(shape[-1])) \
                or b.shape[-1] != 1 or i.shape[-1] != 1:
            raise No("heads are moved among tokens")
        flat = (b * rows + i).expand(*shape[:-1], 1).flatten()
        if len(flat) != windows * rows:
            raise No("rows are left out")
        tokens = torch.full((windows * rows,), -1, dtype=torch.int64)
        tokens[flat] = torch.arange(len(flat))
        if bool((tokens < 0).any()):
            raise No("rows are repeated")
        return tokens.view(windows, rows)


def _is_inert(node: fx.Node) -> bool:
    """Is it a dropout that drops nothing?"""
    return node.op == "call_function" and op_name(node) == "dropout" and len(node.args) == 3 \
        and (node.args[2] is False or node.args[1] == 0)


def _by_weights(linear: fx.Node) -> bool:
    """Is it a matrix of the model, and a vector, that a linear layer applies?"""
    return not linear.kwargs and len(linear.args) > 1 and all(
        a is None or isinstance(a, fx.Node) and a.op == "placeholder" for a in linear.args[1:])


def _axes(shape: Sequence[int]) -> Index:
    """The index of every element, each along an axis of its own."""
    if math.prod(shape) > _LARGEST:
        raise No(f"{math.prod(shape)} elements")
    return tuple(torch.arange(n).view([-1 if i == d else 1 for i in range(len(shape))])
                 for d, n in enumerate(shape))


def _ravel(index: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    flat = torch.zeros((), dtype=torch.int64)
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def _unravel(flat: Tensor, shape: Sequence[int]) -> Index:
    found = []
    for n in reversed(shape):
        found.append(flat % n)
        flat = flat // n
    return tuple(reversed(found))


def _split(source: fx.Node, places: Index, lengths: Sequence[int]) -> Rows:
    """Dimensions of a source as those of tokens and, behind them, those of channels."""
    shape = [int(n) for n in source.meta["val"].shape]
    along = [{d for d in range(4) if i.dim() > d and i.shape[d] > 1} for i in places]
    cut = len(shape)
    while cut and not along[cut - 1] & {_B, _I} and (along[cut - 1] or cut == len(shape)):
        cut -= 1
    if any(a & {_H, _D} for a in along[:cut]):
        raise No("heads choose tokens")
    if shape[cut:] == [] or cut != len(shape) - 1:
        raise No("channels in several dimensions")
    windows, heads, rows, width = lengths
    channel = places[-1].expand(1, heads, 1, width)[0, :, 0]
    first = int(channel[0, 0])
    step = int(channel[1, 0]) - first if heads > 1 else width
    channels = int(source.meta["val"].shape[-1])
    if heads > 1 and step != width and (channels != heads * step or first + width > step):
        raise No("channels of heads that overlap others")
    if not torch.equal(
            channel, first + torch.arange(heads)[:, None] * step + torch.arange(width)):
        raise No("channels in another order")
    tokens = _ravel(places[:-1], shape[:-1])
    tokens = tokens.expand(windows, 1, rows, 1).reshape(windows, rows)
    if math.prod(shape[:-1]) != windows * rows:
        raise No("a map of other tokens, too")
    return Rows(source, tokens, first, step)
