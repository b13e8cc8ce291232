"""Triton functions for what the language has not, or means otherwise than `attnopt.ir.evaluate`.

`//` and `%` truncate in Triton. There is no tanh, log1p, softplus, round or pow that compiles for
every device and runs in the interpreter, so they are written out here, in float32 with errors of
few ulp: near 0, tanh is its series and log1p Kahan's quotient, because 1 - 2 / (exp(2 x) + 1) and
log(1 + x) lose all digits there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: by name; a function comes after those that it calls
FUNCTIONS: dict[str, str] = {
    "floor_div": '''
@triton.jit
def floor_div(a, b):
    """The int quotient, rounded down."""
    quotient = a // b
    return tl.where((a - quotient * b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)
''',
    "floor_mod": '''
@triton.jit
def floor_mod(a, b):
    """The int remainder with the sign of b."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
''',
    "float_mod": '''
@triton.jit
def float_mod(a, b):
    """The float remainder with the sign of b."""
    rest = a % b
    return tl.where((rest != 0.0) & ((rest < 0.0) != (b < 0.0)), rest + b, rest)
''',
    "float_floor_div": '''
@triton.jit
def float_floor_div(a, b):
    """The float quotient, rounded down, as torch computes it."""
    rest = a % b
    quotient = (a - rest) / b
    quotient = tl.where((rest != 0.0) & ((b < 0.0) != (rest < 0.0)), quotient - 1.0, quotient)
    floor = tl.floor(quotient)
    floor = tl.where(quotient - floor > 0.5, floor + 1.0, floor)
    return tl.where(b == 0.0, a / b, floor)
''',
    "log1p": '''
@triton.jit
def log1p(x):
    """log(1 + x), exact near 0."""
    u = 1.0 + x
    return tl.where((u == 1.0) | (x == float("inf")), x, tl.log(u) * (x / (u - 1.0)))
''',
    "softplus": '''
@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.where(x > 40.0, x, log1p(tl.exp(tl.where(x > 40.0, 0.0, x))))
''',
    "tanh": '''
@triton.jit
def tanh(x):
    """The hyperbolic tangent: its series up to 1/4, exponentials beyond."""
    square = x * x
    series = square * (62 / 2835) - 17 / 315
    series = (series * square + 2 / 15) * square - 1 / 3
    series = x + x * (square * series)
    small = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - small) / (1.0 + small)
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -far, far))
''',
    "sign": '''
@triton.jit
def sign(x):
    """1, 0 or -1; 0 of nan, as in torch."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
''',
    "round_half_even": '''
@triton.jit
def round_half_even(x):
    """The nearest integer, even in the middle: floats above 2**23 have no fraction."""
    large = tl.where(x < 0.0, -8388608.0, 8388608.0)
    return tl.where(tl.abs(x) < 8388608.0, (x + large) - large, x)
''',
    "power": '''
@triton.jit
def power(a, b):
    """a ** b; nan for a negative base and a fractional exponent."""
    value = tl.exp2(b * tl.log2(tl.abs(a)))
    half = b * 0.5
    odd = (b == tl.floor(b)) & (half != tl.floor(half))
    value = tl.where((a < 0.0) & odd, -value, value)
    value = tl.where((a < 0.0) & (b != tl.floor(b)), float("nan"), value)
    return tl.where((b == 0.0) | (a == 1.0), 1.0, value)
''',
    "distances": '''
@triton.jit
def distances(left, left_step, left_inside, right, right_step, right_inside, D: tl.constexpr,
              M: tl.constexpr, N: tl.constexpr):
    """(M, N): the squared distance of every row on the left to every one on the right."""
    score = tl.zeros([M, N], tl.float32)
    for c in tl.range(0, D, num_stages=1):
        a = tl.load(left + c * left_step, mask=left_inside, other=0.0).to(tl.float32)
        b = tl.load(right + c * right_step, mask=right_inside, other=0.0).to(tl.float32)
        apart = a[:, None] - b[None, :]
        score += apart * apart
    return score
''',
    "distance_slopes": '''
@triton.jit
def distance_slopes(ds, left, left_step, left_inside, right, right_step, right_inside, total,
                    D: tl.constexpr, DP: tl.constexpr):
    """total (M, DP) and the gradient of the rows on the left; ds (M, N): of the scores."""
    channel = tl.arange(0, DP)[None, :]
    for c in tl.range(0, D, num_stages=1):
        a = tl.load(left + c * left_step, mask=left_inside, other=0.0).to(tl.float32)
        b = tl.load(right + c * right_step, mask=right_inside, other=0.0).to(tl.float32)
        change = tl.sum(ds * (a[:, None] - b[None, :]), 1) * 2.0
        total += tl.where(channel == c, change[:, None], 0.0)
    return total
''',
    "additive_scores": '''
@triton.jit
def additive_scores(left, left_step, left_inside, right, right_step, right_inside, weight,
                    weight_step, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(M, N): the sum over channels of weight * tanh(left + right)."""
    score = tl.zeros([M, N], tl.float32)
    for c in tl.range(0, D, num_stages=1):
        a = tl.load(left + c * left_step, mask=left_inside, other=0.0).to(tl.float32)
        b = tl.load(right + c * right_step, mask=right_inside, other=0.0).to(tl.float32)
        w = tl.load(weight + c * weight_step).to(tl.float32)
        score += w * tanh(a[:, None] + b[None, :])
    return score
''',
    "additive_slopes": '''
@triton.jit
def additive_slopes(ds, left, left_step, left_inside, right, right_step, right_inside, weight,
                    weight_step, total, D: tl.constexpr, DP: tl.constexpr):
    """total (M, DP) and the gradient of the rows on the left; ds (M, N): of the scores."""
    channel = tl.arange(0, DP)[None, :]
    for c in tl.range(0, D, num_stages=1):
        a = tl.load(left + c * left_step, mask=left_inside, other=0.0).to(tl.float32)
        b = tl.load(right + c * right_step, mask=right_inside, other=0.0).to(tl.float32)
        w = tl.load(weight + c * weight_step).to(tl.float32)
        bent = tanh(a[:, None] + b[None, :])
        change = tl.sum(ds * (1.0 - bent * bent), 1) * w
        total += tl.where(channel == c, change[:, None], 0.0)
    return total
''',
    "additive_weights": '''
@triton.jit
def additive_weights(ds, left, left_step, left_inside, right, right_step, right_inside, weight,
                     weight_step, total, D: tl.constexpr, DP: tl.constexpr):
    """total (DP,) and the gradient of the weight; ds (M, N): of the scores."""
    channel = tl.arange(0, DP)
    ds = tl.where(left_inside[:, None], ds, 0.0)
    for c in tl.range(0, D, num_stages=1):
        a = tl.load(left + c * left_step, mask=left_inside, other=0.0).to(tl.float32)
        b = tl.load(right + c * right_step, mask=right_inside, other=0.0).to(tl.float32)
        change = tl.sum(tl.sum(ds * tanh(a[:, None] + b[None, :]), 1), 0)
        total += tl.where(channel == c, change, 0.0)
    return total
''',
}


def texts(names: Iterable[str]) -> str:
    """The source of the named functions and of those that they call."""
    wanted = set(names)
    for name in reversed(FUNCTIONS):
        if name in wanted:
            wanted |= {f for f in FUNCTIONS if re.search(rf"\b{f}\(", FUNCTIONS[name])}
    return "\n".join(FUNCTIONS[name] for name in FUNCTIONS if name in wanted)
