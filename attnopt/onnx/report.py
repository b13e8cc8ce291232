"""OnnxReport: what was written, in which forms, and how far it is from the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnopt.onnx.forms import Form
from attnopt.onnx.saving import data_of
from attnopt.program import approximations
from attnopt.report import Report


@dataclass(frozen=True)
class OnnxReport:
    """What `export_onnx` wrote.

    path:    of the file
    opset:   of the standard operators
    forms:   the functions of the domain `attnopt`
    nodes:   of the main graph; all_nodes: with every function inlined
    size:    of the file in bytes, data beside it included; sha256: of the file itself
    errors:  by "where: what was run", the largest absolute difference from the model
    bound:   that was allowed
    kept:    attention that stayed as its author wrote it, with the reason
    approximations: that the user asked for and that were used; errors are without them
    """

    path: str
    opset: int
    forms: tuple[Form, ...] = ()
    nodes: int = 0
    all_nodes: int = 0
    size: int = 0
    sha256: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    bound: float | None = None
    kept: tuple[str, ...] = ()
    approximations: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: Path, forms: Sequence[Form], report: Report, opset: int,
           kept: Sequence[str] = ()) -> OnnxReport:
        """What can be read off a file; `kept` besides what the report says."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        bodies = {(f.domain, f.name): len(f.node) for f in model.functions}
        inlined = sum(bodies.get((n.domain, n.op_type), 1) for n in model.graph.node)
        kept = (*kept, *(f"{s.path or s.node}: {s.reason}" for s in report.sites
                         if s.status != "rewritten"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(str(path), opset, tuple(forms), len(model.graph.node), inlined, _size(path),
                   digest, {}, None, kept, approximations(report))

    def at(self, path: Path) -> OnnxReport:
        """The same for the file under its own name."""
        return dataclasses.replace(self, path=str(path))

    @property
    def error(self) -> float | None:
        """The largest difference that was measured; None where nothing was."""
        return max(self.errors.values(), default=None)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps({**dataclasses.asdict(self), "error": self.error}, indent=1)

    def __str__(self) -> str:
        size = f"{self.size / 1e6:.1f} MB" if self.size >= 1e6 else f"{self.size / 1e3:.1f} kB"
        lines = [f"{self.path}: opset {self.opset}, {self.nodes} nodes ({self.all_nodes} with "
                 f"functions inlined), {size}"]
        lines += [f"  attnopt.{f.name}: {f.form}, {f.calls} call{'s' if f.calls != 1 else ''}"
                  for f in self.forms]
        lines += [f"  kept: {line}" for line in self.kept]
        lines += [f"  approximated: {line}" for line in self.approximations]
        lines += [f"  {where}: off by {error:.1e}" for where, error in self.errors.items()]
        return "\n".join(lines)


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in (path, data_of(path)) if p.is_file())


def shown(value: Any) -> str:
    """A shape for a person."""
    return "x".join(map(str, value))
