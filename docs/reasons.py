"""What attnopt says where it takes nothing, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from docs.markdown import first

ROOT = Path(__file__).parent.parent
_RAISED = ("Decline", "CaptureError")
#: (title, what the step does, files), a file in the first group that names it
GROUPS = (
    ("Models that cannot be captured", "torch.export reads the model, or else Dynamo graph by "
     "graph; what neither can read runs as it is.",
     ("passes/capture/*.py", "attnopt/program.py", "attnopt/runtime.py")),
    ("Deformable sampling", "A weighted sum over sampled points must follow the sampling.",
     ("passes/recognize/sampl*.py", "passes/sampl*.py", "passes/analyze/sampl*.py")),
    ("Attention that is not in the normal form", "From a normaliser back to the scores and on to "
     "the values, everything must be a contraction, a view or pointwise.",
     ("passes/recognize/*.py",)),
    ("Masks, biases and local attention", "What cannot be proven stays a dense operand, which is "
     "slower and never wrong; only a local attention that is not understood is left as it was.",
     ("passes/analyze/*.py",)),
    ("Rewrites", "A rule must be able to compute the site, and it must pay.",
     ("passes/rules/*.py", "passes/*.py", "attnopt/rules.py")),
    ("Kernels", "What a lowering cannot compute goes to the next one.",
     ("kernels/*.py", "kernels/*/*.py")),
)


def collect(patterns: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """(what a file does, its reasons) of the files that have any."""
    seen: set[str] = set()
    found = []
    for path in _files(patterns):
        tree = ast.parse(path.read_text("utf-8"))
        reasons = list(dict.fromkeys(text for text in _reasons(tree, path) if text not in seen))
        seen.update(reasons)
        if reasons:
            found.append((first(ast.get_docstring(tree)), reasons))
    return found


def _files(patterns: tuple[str, ...]) -> list[Path]:
    """The files of a group that are in none before it."""
    taken: set[Path] = set()
    for _, _, others in GROUPS:
        own = {p for pattern in others for p in ROOT.glob(pattern)} - taken
        if others == patterns:
            return sorted(own)
        taken |= own
    return []


def _reasons(tree: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) \
                and node.func.id in _RAISED and node.args:
            text = _text(node.args[0])
            if text is not None:
                yield text
        if path.is_relative_to(ROOT / "kernels") and isinstance(node, ast.FunctionDef) \
                and node.name.endswith(("reasons", "not_fused")):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            for statement in body:
                yield from _sentences(statement)


def _sentences(node: ast.AST) -> Iterator[str]:
    """The texts in a statement that are sentences, not names."""
    if isinstance(node, ast.expr):
        text = _text(node)
        if text is not None:
            if text.count(" ") > 1:
                yield text
            return
    for child in ast.iter_child_nodes(node):
        yield from _sentences(child)


def _text(node: ast.expr) -> str | None:
    """The text of a message; … for what is filled in, None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _plain(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = ["…" if isinstance(part, ast.FormattedValue) else str(part.value)
                 for part in node.values if isinstance(part, (ast.FormattedValue, ast.Constant))]
        return _plain("".join(parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        if left is not None or right is not None:
            return _plain(f"{left or '…'} {right or '…'}")
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    return None


def _plain(text: str) -> str:
    words = " ".join(text.split())
    return words.replace("<", "&lt;").replace("*", "\\*")
