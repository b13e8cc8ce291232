"""What the operands of a mask hold on the example inputs, for the cost model alone.

Padding, document ids and the like are known only when a call comes. The call that was captured is
the best guess of what later ones hide: its values say how many tiles a kernel is likely to skip,
and so which lowering and tile to choose. Nothing that is computed depends on them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.ir.captured import Captured
from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.grid_check import captured_sizes
from attnopt.passes.canonical import Canonical, Recipe
from attnopt.passes.canonical import Tensor as Operand
from attnopt.passes.depict import brought, static
from attnopt.passes.recognize.axes import product, resolve

if TYPE_CHECKING:
    from attnopt.passes.analyze.inline_bias import Inlined
    from attnopt.passes.analyze.provenance import Analysis

log = logging.getLogger("attnopt.passes")
#: bytes of an operand that is looked at
LARGEST = 1 << 23


class Examples(Values):
    """Values of nodes on the example inputs, at their lengths; parameters are not read."""

    def __init__(self, captured: Captured) -> None:
        kinds = {name: "buffer" if origin.kind == "input" else origin.kind
                 for name, origin in captured.origins.items()}

        def value_of(name: str) -> Tensor | None:
            value = captured.values.get(name)
            return value if isinstance(value, Tensor) else None

        super().__init__(kinds, value_of)
        self.symbols = captured_sizes({}, [
            v for n in captured.placeholders if isinstance(v := n.meta.get("val"), Tensor)])
        self._example: dict[fx.Node, Tensor] = {}
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def evaluate(self, node: fx.Node, symbols: Mapping[sympy.Symbol, int] | None = None) -> Tensor:
        """The value of a node. Raises LookupError where parameters or chance take part, or where
        it takes too much memory."""
        if node not in self._example:
            self._example[node] = super().evaluate(node, symbols or self.symbols)
        return self._example[node]

    def operand(self, operand: Operand, axes: Any) -> Tensor | None:
        """An operand as the Spec loads it, None where it cannot be brought to that."""
        if operand.recipe is None:
            if self._bytes(operand.node, self.symbols) > LARGEST:
                raise LookupError("too large to count its tiles")
            return brought(self.evaluate(operand.node), operand, axes)
        return self._by_recipe(operand.recipe)

    def _by_recipe(self, recipe: Recipe) -> Tensor | None:
        key = (recipe.op, recipe.text, *(t.node for t in recipe.inputs))
        if key not in self._made:
            lengths = [self.number(product(dim)) for dim in map(resolve, recipe.lengths)]
            found = static(recipe, *lengths) if len(lengths) == 2 else None
            if found is None:
                inputs = [brought(self.evaluate(t.node), t, ()) for t in recipe.inputs]
                with torch.no_grad():
                    found = recipe.op(inputs, lengths, recipe.text)
            self._made[key] = found
        return self._made[key]

    def number(self, length: Any) -> int:
        """A length on the example inputs."""
        return int(sympy.sympify(length).xreplace(self.symbols))


def mask_examples(captured: Captured, analysis: Analysis, canonical: Canonical,
                  inlined: Inlined | None) -> dict[str, Tensor]:
    """Operands of the masks of both forms of a site, by slot, as far as they can be had."""
    if not isinstance(analysis.examples, Examples):
        analysis.examples = Examples(captured)
    found: dict[str, Tensor] = {}
    for form in (canonical, *(() if inlined is None else (inlined.canonical,))):
        for slot in sorted(form.spec.mask.slots & form.operands.keys() - found.keys()):
            try:
                table = analysis.examples.operand(
                    form.operands[slot], form.spec.operand(slot).axes)
            except (LookupError, RuntimeError, TypeError, ValueError):  # nobody depends on it
                log.debug("no example of %s of %s", slot, form.spec.mask, exc_info=True)
                continue
            if table is not None:
                found[slot] = table
    return found
