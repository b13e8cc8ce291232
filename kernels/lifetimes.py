"""Keys that live for a run of rows: the best `count` keys so far, for every row, in O(K log count).

Dynamic Mask Attention (arXiv 2508.02124) gives every key a number and lets a row see the `count`
largest of those before it. Written as top-k it costs O(Q K): a row of K numbers for every query.
But the best of a growing set only lose members: a key enters at its own place and, once pushed
out, never returns. One integer per key says it all,

    key k is kept by row q   iff   k <= q + offset  and  q < death[k]

and a heap of `count` numbers finds it; a key that no row may see has no life at all.

Equal numbers: where the last of the best and the next one are equal, top-k takes either, by an
order of its own. Both then live, and a row that has one too many is put before the same operation;
`hidden[q]` is the key that it left out. With more of them than one, or NaN, or numbers as low as
what the author fills in, the author's selection is made as a whole: an entry of `death` for every
row and key.

    key_lifetimes(tensors, lengths, text)   death (*L, 1, K) or (*L, Q, K), hidden (*L, Q, 1),
                                            or the count of blind rows (*L, 1, 1)
    Choice                                  what the text says

The op `attnopt::key_lifetimes` always gives death as (*L, Q, K), because compilers want to know
shapes; graphs that run eagerly call the function.
"""

from __future__ import annotations

import ctypes
import functools
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.errors import AttnOptError
from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.kernels.cpp.toolchain import compile_all, load

#: later than any row; sums with it fit 32 bits
FOREVER = 2**30 - 1
#: rows of a block of the dense selection on a CPU
_ROWS = 256
_SOURCE = """#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>
extern "C" int32_t attnopt_lifetimes(const double* values, const uint8_t* valid, int32_t* death,
                                     int32_t* extra, int64_t rows, int64_t keys, int64_t count,
                                     double fill) {
  int32_t doubt = 0;
#pragma omp parallel for reduction(| : doubt)
  for (int64_t row = 0; row < rows; ++row) {
    const double* v = values + row * keys;
    int32_t* dies = death + row * keys;
    std::vector<std::pair<double, int64_t>> heap;
    std::vector<int64_t> waiting;  // as good as the worst in the heap, which is full
    heap.reserve(count + 1);
    for (int64_t j = 0; j < keys; ++j) {
      dies[j] = FOREVER;
      if (!valid[row * keys + j]) {
        dies[j] = (int32_t)j;
      } else if (!(v[j] > fill)) {
        doubt = 1;
        break;
      } else {
        heap.emplace_back(v[j], j);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
        if ((int64_t)heap.size() > count) {
          std::pop_heap(heap.begin(), heap.end(), std::greater<>());
          waiting.push_back(heap.back().second);
          const double out = heap.back().first;
          heap.pop_back();
          const double worst = heap.front().first;
          if (worst > out || v[waiting.front()] < worst) {
            int64_t left = 0;
            for (int64_t k : waiting) {
              if (v[k] < worst) dies[k] = (int32_t)j;
              else waiting[left++] = k;
            }
            waiting.resize(left);
          }
        }
      }
      extra[row * keys + j] = (int32_t)waiting.size();
    }
  }
  return doubt;
}
""".replace("FOREVER", str(FOREVER))

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("key_lifetimes(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor")


@dataclass(frozen=True)
class Choice:
    """What the author chooses: `count` of the numbers of the keys that a row may see.

    slots:   names of the tensors after the first one, which holds the numbers (*L, 1, K)
    keep:    bool Expr of the keys that a row may see: `valid`, and causal if `causal`
    valid:   bool Expr of what does not vary with the row
    offset:  causal means k <= q + offset; an int Expr of lengths
    fill:    what the author puts in place of the other numbers
    rule:    "topk": the members of torch.topk; "kth": all that are at least the last of them;
             "least": at least the smallest, which is NaN where one of them is
    give:    what is asked for: "death" of the keys, the "hidden" key of a row with a tie, or
             "blind", the number of first rows that see nothing
    """

    count: int
    slots: tuple[str, ...]
    keep: str
    valid: str
    offset: str
    causal: bool
    fill: float
    rule: str
    sorted: bool
    give: str = "death"

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Choice:
        body = json.loads(text)
        return Choice(**{**body, "slots": tuple(body["slots"])})


def key_lifetimes(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """int32 rows in which each key dies, or what else the `Choice` in `text` asks for.

    tensors: the numbers (*L, 1, K), then the operands of the choice; lengths: (Q,)
    """
    if isinstance(tensors[0], fx.Proxy):  # torch.fx rebuilds a pickled graph by tracing its code
        traced: Tensor = tensors[0].tracer.create_proxy(
            "call_function", key_lifetimes, (tensors, lengths, text), {})
        return traced
    if torch.compiler.is_compiling():
        made: Tensor = torch.ops.attnopt.key_lifetimes.default(tensors, lengths, text)
        return made
    with torch.no_grad():
        return _lifetimes(Choice.parse(text), tensors[0], tensors[1:], int(lengths[0]))


def _lifetimes(choice: Choice, values: Tensor, given: Sequence[Tensor], queries: int) -> Tensor:
    operands = dict(zip(choice.slots, given, strict=True))
    keys, device = values.shape[-1], values.device
    lead = torch.broadcast_shapes(values.shape[:-2], *(t.shape[:-2] for t in given))
    shape = (*lead, queries, keys)
    env = Env(shape, operands, dtype=torch.float64, device=device)
    offset = int(evaluate(E.parse(choice.offset), env))
    valid = torch.as_tensor(evaluate(E.parse(choice.valid), env), device=device).expand(
        *lead, 1, keys)
    if choice.give == "blind":
        return _blind(valid, offset if choice.causal else None, queries)
    found = None
    if math.prod(shape):
        found = _order_statistics(values.expand(*lead, 1, keys), valid, choice)
    if found is None:
        if choice.give == "hidden":
            return torch.full((*lead, queries, 1), -1, dtype=torch.int32, device=device)
        return _as_author(choice, values, operands, shape)
    death, extra = found
    if choice.rule != "topk" and choice.give == "hidden":
        return torch.full((*lead, queries, 1), -1, dtype=torch.int32, device=device)
    if choice.rule == "topk":
        # The numbers that top-k saw in a row: those of the keys up to `last`.
        last = torch.arange(queries, device=device) + offset if choice.causal else (
            torch.full((queries,), keys - 1, device=device))
        tied = extra.squeeze(-2).index_select(-1, last.clamp(0, keys - 1)) * (last >= 0)
        if int(tied.max()) > (1 if device.type == "cpu" else 0):
            if choice.give == "hidden":
                return torch.full((*lead, queries, 1), -1, dtype=torch.int32, device=device)
            return _as_author(choice, values, operands, shape)
        if choice.give == "hidden":
            return _hidden(choice, values.expand(*lead, 1, keys), valid, tied, last)
    if choice.causal:
        return torch.where(death == FOREVER, FOREVER, death - offset).to(torch.int32)
    return torch.where(death == FOREVER, FOREVER, -1).to(torch.int32)


def _blind(valid: Tensor, offset: int | None, queries: int) -> Tensor:
    """(*L, 1, 1): how many of the first rows see no key."""
    keys = valid.shape[-1]
    places = torch.arange(keys, device=valid.device).expand(valid.shape)
    first = torch.where(valid, places, FOREVER).amin(-1, keepdim=True) if keys else (
        valid.new_full((*valid.shape[:-1], 1), FOREVER, dtype=torch.int64))
    rows = first - offset if offset is not None else torch.where(first < keys, 0, queries)
    return rows.clamp(0, queries).to(torch.int32)


def _hidden(choice: Choice, values: Tensor, valid: Tensor, tied: Tensor, last: Tensor) -> Tensor:
    """(*L, Q, 1): the key that a row with a tie leaves out, -1 for others.

    Where one key is too many, the author's own operation is asked, row by row; on a CPU it looks
    at nothing else.
    """
    keys = values.shape[-1]
    hidden = torch.full(tied.shape, -1, dtype=torch.int32)
    at, row = (tied > 0).flatten(0, -2).nonzero(as_tuple=True)
    for some in torch.arange(at.numel()).split(_ROWS):
        own, rows = at[some], row[some]
        numbers, allowed = (t.reshape(-1, keys).index_select(0, own) for t in (values, valid))
        seen = allowed & (torch.arange(keys) <= last.index_select(0, rows)[:, None])
        numbers = torch.where(seen, numbers, choice.fill).to(values.dtype)
        best = torch.topk(numbers, choice.count, -1, True, choice.sorted)
        left = seen.scatter(-1, best.indices, False) & (
            numbers == best.values.amin(-1, keepdim=True))
        hidden.view(-1, hidden.shape[-1])[own, rows] = left.int().argmax(-1).int()
    return hidden.unsqueeze(-1)


def _order_statistics(values: Tensor, valid: Tensor, choice: Choice
                      ) -> tuple[Tensor, Tensor] | None:
    """For each key the key that pushes it out, and for each prefix of the keys how many are as
    good as the last of the best, beyond `count`; None where the numbers have no order.

    Keys that are equal to the last of the best live as long as these.
    """
    numbers = values.to("cpu", torch.float64).contiguous()
    allowed = valid.to("cpu", torch.uint8).contiguous()
    keys = numbers.shape[-1]
    run = _compiled()
    if run is None:
        rows = zip(numbers.view(-1, keys).tolist(), allowed.view(-1, keys).tolist(), strict=True)
        found = [_by_heap(v, ok, choice.count, choice.fill) for v, ok in rows]
        if None in found:
            return None
        death, extra = torch.tensor(found, dtype=torch.int32).unbind(1)
    else:
        death, extra = torch.empty((2, *numbers.shape), dtype=torch.int32)
        if run(numbers.data_ptr(), allowed.data_ptr(), death.data_ptr(), extra.data_ptr(),
               numbers.numel() // keys, keys, choice.count, choice.fill):
            return None
    return death.view(values.shape).to(values.device), extra.view(values.shape).to(values.device)


@functools.cache
def _compiled() -> Any:
    """The same in C++; None where there is no compiler."""
    try:
        function = load(compile_all([_SOURCE])[0]).attnopt_lifetimes
    except AttnOptError:
        return None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_double]
    function.restype = ctypes.c_int32
    return function


def _by_heap(values: Sequence[float], valid: Sequence[int], count: int, fill: float
             ) -> tuple[list[int], list[int]] | None:
    """One row of `_SOURCE`."""
    death, extra = [FOREVER] * len(values), []
    heap: list[tuple[float, int]] = []
    waiting: list[int] = []
    for j, (v, ok) in enumerate(zip(values, valid, strict=True)):
        if not ok:
            death[j] = j
        elif not v > fill:
            return None
        else:
            heapq.heappush(heap, (v, j))
            if len(heap) > count:
                waiting.append(heapq.heappop(heap)[1])
                for k in [k for k in waiting if values[k] < heap[0][0]]:
                    death[k] = j
                    waiting.remove(k)
        extra.append(len(waiting))
    return death, extra


def _as_author(choice: Choice, values: Tensor, operands: Mapping[str, Tensor],
               shape: tuple[int, ...]) -> Tensor:
    """(*L, Q, K): FOREVER where the author's own operation chooses a key that the row sees, else
    -1."""
    # On a CPU top-k looks at each row alone; on a GPU its order may depend on how many there are.
    step = _ROWS if values.device.type == "cpu" else shape[-2]
    keep, found = E.parse(choice.keep), []
    for start in range(0, shape[-2], step):
        rows = (*shape[:-2], min(step, shape[-2] - start), shape[-1])
        env = Env(rows, operands, sizes={"q": shape[-2]}, rows=start, dtype=torch.float64,
                  device=values.device)
        seen = torch.as_tensor(evaluate(keep, env), device=values.device).expand(rows)
        numbers = torch.where(seen, values.expand(rows), choice.fill).to(values.dtype)
        best = torch.topk(numbers, choice.count, -1, True, choice.sorted)
        if choice.rule != "topk":
            least = best.values[..., -1:] if choice.rule == "kth" else best.values.amin(
                -1, keepdim=True)
            chosen = numbers >= least
        else:
            chosen = torch.zeros(rows, dtype=torch.bool, device=values.device).scatter(
                -1, best.indices, True)
        found.append(torch.where(chosen & seen, FOREVER, -1).to(torch.int32))
    return torch.cat(found, -2)


def _op(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    found = key_lifetimes(tensors, lengths, text)
    if Choice.parse(text).give != "death":
        return found.clone()
    return found.expand(*found.shape[:-2], lengths[0], found.shape[-1]).clone(
        memory_format=torch.contiguous_format)


def _fake(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    values, *given = tensors
    lead = torch.broadcast_shapes(values.shape[:-2], *(t.shape[:-2] for t in given))
    last = {"death": (lengths[0], values.shape[-1]), "hidden": (lengths[0], 1), "blind": (1, 1)}
    return values.new_empty((*lead, *last[Choice.parse(text).give]), dtype=torch.int32)


_library.impl("key_lifetimes", _op, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::key_lifetimes", _fake, lib=_library)
