"""The raw scores of a tile in the text of a kernel, and what their gradient is for its own rows.

    dot        s = sum_c q_c k_c               dq_c += ds k_c
    distance   s = sum_c (q_c - k_c)^2         dq_c += 2 ds (q_c - k_c)
    additive   s = sum_c w_c tanh(q_c + k_c)   dq_c += ds w_c (1 - tanh^2), dw_c += ds tanh
    key        s = 0

Additive attention is that of Bahdanau, Cho, Bengio (2015). It and distances are sums over channels
with one row and one column of numbers each, which no matrix unit computes; |q|^2 - 2 q.k + |k|^2
would, but loses the digits of small distances. Both forms are the same with query and key swapped,
so that one function serves the tile and its transpose.
"""

from __future__ import annotations

from attnopt.kernels.triton.body import Body

#: the operand of an additive score
WEIGHT = "score_weight"
#: scores that are a sum over channels, but no product of matrices
BY_CHANNEL = ("distance", "additive")
#: (tensor, its tokens in a tile, their number) by axis
_SIDES = {"q": ("query", "rows", "BM"), "k": ("key", "columns", "BN")}


class Scores(Body):
    """A kernel that computes scores.

    `across`: its tile is transposed, keys by queries
    """

    across = False

    @property
    def shape(self) -> str:
        return "(BN, BM)" if self.across else "(BM, BN)"

    @property
    def by_channel(self) -> bool:
        return self.spec.score in BY_CHANNEL

    # -- rows of query and key --------------------------------------------------------------
    def own_rows(self, axis: str, first: str = "first") -> None:
        """The program's own rows of query or key."""
        tensor, _, count = _SIDES[axis]
        k = self.kernel
        if self.spec.score == "dot":
            k.add(f"{tensor}_here = {k.here(tensor, getattr(self.signature, tensor))}")
            k.tile(f"{tensor}_tile", tensor, (), axis, first, False, count, "D", descriptor=False)
        elif self.by_channel:
            self.matrix_of(axis)
            self.rows_of(axis)

    def matrix_of(self, axis: str) -> None:
        """The matrix of query or key whose rows `rows_of` finds."""
        tensor, k = _SIDES[axis][0], self.kernel
        axes = getattr(self.signature, tensor)
        if self.spec.score == "dot":
            self.matrix(tensor, axes)
        elif self.by_channel:
            # Never through a descriptor, hence under a name of its own.
            k.add(f"{tensor}_first = {k.here(tensor, axes, f'{tensor}_matrix')}")
        if self.spec.score == "additive" and f"op_{WEIGHT}" not in k.arguments:
            k.add(f"weight_here = {k.here(f'op_{WEIGHT}', self.signature.axes)}")

    def rows_of(self, axis: str, whole: bool = False, depth: int = 0) -> None:
        """The rows of a tile: themselves, or where their channels begin."""
        tensor, tokens, count = _SIDES[axis]
        k = self.kernel
        if self.spec.score == "dot":
            k.tile(f"{tensor}_tile", tensor, getattr(self.signature, tensor), axis, "there", whole,
                   count, "D", depth=depth)
        elif self.by_channel:
            k.add(f"{tensor}_rows = {tensor}_first + tl.cast({tokens}, tl.int64) * "
                  f"{k.stride(tensor, axis)}", depth)

    # -- scores -----------------------------------------------------------------------------
    def raw_scores(self, used: bool, depth: int = 0) -> None:
        """`score` of a tile; `used`: the logits depend on it."""
        k = self.kernel
        match self.spec.score:
            case "dot":
                left, right = ("key", "query") if self.across else ("query", "key")
                k.add(f"score = tl.dot({left}_tile, tl.trans({right}_tile), "
                      "input_precision=PRECISION)", depth)
            case "key":
                k.add([f"score = tl.full({self.shape}, 0.0, tl.float32)"] if used else [], depth)
            case form:
                name = {"distance": "distances", "additive": "additive_scores"}[form]
                k.functions.add(name)
                rows, columns = self.shape[1:-1].split(", ")
                k.add(f"score = {name}({self.sides()}, D, {rows}, {columns})", depth)

    def sides(self) -> str:
        """The arguments of a function that walks over the channels of a tile."""
        texts = []
        for axis in "kq" if self.across else "qk":
            tensor, tokens, _ = _SIDES[axis]
            texts += [f"{tensor}_rows", self.kernel.stride(tensor, "d"),
                      f"{tokens} < {self.kernel.size(axis)}"]
        if self.spec.score == "additive":
            texts += ["weight_here", self.kernel.stride(f"op_{WEIGHT}", "d")]
        return ", ".join(texts)

    # -- gradients --------------------------------------------------------------------------
    def add_slopes(self, total: str, depth: int) -> None:
        """What the gradient `dx` of the scores of a tile adds to that of the own rows."""
        k = self.kernel
        other = "query" if self.across else "key"
        match self.spec.score:
            case "dot":
                k.add(f"{total} = tl.dot(tl.cast(dx, {other}_tile.dtype), {other}_tile, {total}, "
                      "input_precision=PRECISION)", depth)
            case "distance" | "additive" as form:
                name = f"{form}_slopes"
                k.functions.add(name)
                k.add(f"{total} = {name}(dx, {self.sides()}, {total}, D, DP)", depth)

    def add_weights(self, total: str, depth: int) -> None:
        """What it adds to the gradient of the weight of an additive score."""
        self.kernel.functions.add("additive_weights")
        self.kernel.add(f"{total} = additive_weights(dx, {self.sides()}, {total}, D, DP)", depth)

