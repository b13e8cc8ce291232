"""The functions of one export, and the calls of them that stand for attnopt's operators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnOptError
from attnopt.ir.spec import Spec
from attnopt.kernels.portable import compute, form_of, sample, table
from attnopt.onnx.forms import DOMAIN, Form, body, cause, distinct, name_of
from attnopt.report import Report


@dataclass
class _Body:
    form: Form
    compute: Callable[..., Tensor]
    like: list[Tensor]
    function: Any = None


class Bodies:
    """The functions that an export needs, collected while it is traced.

    Args:
        lowering: of `export_onnx`.
        keep: calls of functions; otherwise their bodies are traced in place.
    """

    def __init__(self, lowering: str, keep: bool) -> None:
        self.lowering, self.keep = lowering, keep
        self._made: dict[Any, _Body] = {}

    @property
    def forms(self) -> list[Form]:
        return [made.form for made in self._made.values()]

    def functions(self, opset: int, called: Collection[str], report: Report) -> list[Any]:
        """Those of these names as onnx_ir functions, each made once.

        report: says where in the user's model they come from.

        Raises:
            AttnOptError: torch.onnx cannot write one.
        """
        found = []
        for made in self._made.values():
            if made.form.name not in called:
                continue
            if made.function is None:
                made.function = _function(made, opset, report)
            found.append(made.function)
        return found

    def table(self) -> dict[Any, Callable[..., Any]]:
        """What stands for attnopt's operators in a trace."""
        return table(self.attention, self.sampling)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
                  spec: str, schedule: str = "") -> tuple[Tensor, Tensor]:
        """In place of `attnopt::attention`."""
        parsed = Spec.parse(spec)
        form = form_of(parsed, query.shape, key.shape)
        if self.lowering in ("attention", "dense"):
            form = "fused" if self.lowering == "attention" else "dense"
        if parsed.lse or not self.keep:
            return compute(parsed, form, query, key, value, operands)

        def run(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
            return compute(parsed, form, query, key, value, operands)[0]

        word = "attention" if form == "fused" else form
        leads = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        shape = (*leads, query.shape[-2], value.shape[-1])
        out = self._call(name_of(parsed), word, spec, run, [query, key, value, *operands], shape)
        return out, out.new_empty(0)

    def sampling(self, value: Tensor, locations: Tensor, weights: Tensor, depth: Tensor | None,
                 shapes: Sequence[int], sampling: str, schedule: str = "") -> Tensor:
        """In place of `attnopt::deformable_attention`."""
        def run(value: Tensor, locations: Tensor, weights: Tensor,
                depth: Tensor | None = None) -> Tensor:
            return sample(value, locations, weights, depth, shapes, sampling)

        given = [value, locations, weights] + ([] if depth is None else [depth])
        if not self.keep:
            return run(*given)
        shape = (*locations.shape[:3], value.shape[-1])
        return self._call("DeformableAttention", "gather", f"{sampling} {list(shapes)}", run, given,
                          shape)

    def _call(self, name: str, form: str, spec: str, run: Callable[..., Tensor],
              tensors: list[Tensor], shape: Sequence[Any]) -> Tensor:
        """A call of the function for such tensors, which is made if there is none yet."""
        shapes = tuple((t.dtype, tuple(map(str, t.shape))) for t in tensors)
        key = (name, form, spec, shapes)
        if key not in self._made:
            taken = [made.form.name for made in self._made.values()]
            self._made[key] = _Body(Form(distinct(name, taken), form, spec), run, tensors)
        made: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self._made[key].form.name}", tensors, dtype=tensors[0].dtype, shape=shape,
            version=1)
        return made


def _function(made: _Body, opset: int, report: Report) -> Any:
    form = made.form
    try:
        return body(form.name, made.compute, made.like, opset,
                    any_length=form.form in ("attention", "dense"))
    except Exception as error:
        kind = "sampling" if form.form == "gather" else "attention"
        sites = [s for s in report.sites if s.status == "rewritten"]
        own = [s for s in sites if s.spec == form.spec] or [s for s in sites if s.kind == kind]
        where = ", ".join(dict.fromkeys(filter(None, (
            " ".join(filter(None, (s.path, f"({s.source})" if s.source else ""))) for s in own))))
        raise AttnOptError(
            f"the {form.form} form of attnopt.{form.name}{f' of {where}' if where else ''} must be "
            f"made of operators that torch.onnx writes in opset {opset}, got {cause(error)}"
        ) from error
