"""When a rewrite is accepted: by its distance from float64, beside that of the author's result."""

from __future__ import annotations

import torch


def judge(new: torch.Tensor, original: torch.Tensor, reference: torch.Tensor
          ) -> tuple[bool, float | None, float, float]:
    """(accepted, err_new, err_original, bound) by the acceptance rule."""
    eps = torch.finfo(original.dtype).eps if original.is_floating_point() else 0.0
    err_original = distance(original, reference)
    bound = max(2 * (err_original or 0.0), 8 * eps * size(reference))
    err_new = distance(new, reference)
    if err_original is None:  # the original overflows or underflows where float64 does not
        err_new = distance(new, original.double())
    if err_new is None:
        return False, None, err_original or 0.0, bound
    return err_new <= bound, err_new, err_original or 0.0, bound


def distance(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Largest absolute difference; None where one is not finite and the other is not the same."""
    a, b = a.double(), b.double()
    odd = ~(a.isfinite() & b.isfinite())
    if odd.any():
        if not torch.equal(torch.nan_to_num(a[odd], 1.5, 2.5, 3.5),
                           torch.nan_to_num(b[odd], 1.5, 2.5, 3.5)):
            return None
        a, b = a[~odd], b[~odd]
    return float((a - b).abs().max()) if a.numel() else 0.0


def size(x: torch.Tensor) -> float:
    x = x.double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0
