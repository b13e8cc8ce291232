"""What a call of an optimised module costs beside the same call of the eager module.

A two-layer toy encoder is so small that almost all of a call is Python and dispatch: the worst case
for the wrapper. Ratios are time of the optimised module / time of the eager one; below 1 is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnopt.bench.encoder import encoder
from attnopt.timing import compare, format_seconds

#: name -> (layers, size, heads, batch, length)
SIZES = {"toy": (2, 32, 4, 1, 8), "small": (2, 128, 4, 2, 64)}


def measure(
    optimize: Callable[..., Any], *, repeats: int = 101, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Ratio per size and gradient mode, with its interval."""
    results = {}
    for name, sizes in SIZES.items():
        model, args = encoder(*sizes)
        optimized = optimize(model, args)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = compare(lambda: model(*args), lambda: optimized(*args), repeats,  # noqa: B023
                                names=("eager", "optimised"))
            low, high = found.interval
            key = f"{name}, grad {'on' if grad else 'off'}"
            eager, fast = found.medians
            results[key] = {"ratio": 1 / found.speedup, "interval": [1 / high, 1 / low],
                            "eager_s": eager, "optimised_s": fast}
            say(f"{key:20} eager {format_seconds(eager):8} optimised {format_seconds(fast):8} "
                f"ratio {1 / found.speedup:.3f} ({1 / high:.3f} to {1 / low:.3f})")
    return results
