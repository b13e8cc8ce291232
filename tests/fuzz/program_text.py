"""The source text of a random program while it is being written, and how it becomes a module."""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz.choices import Choices

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"


@dataclass
class Program:
    """Source text of `class Program(nn.Module)` and its inputs, declared as for spellings."""

    choices: Choices
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    inputs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def declared(self) -> str:
        return ", ".join(f"{name}: {axes}" for name, axes in self.inputs)

    @property
    def text(self) -> str:
        names = ", ".join(name for name, _ in self.inputs)
        lines = ["class Program(nn.Module):", "    def __init__(self):",
                 "        super().__init__()", *("        " + x for x in self.init), "",
                 f"    def forward(self, {names}):", *("        " + x for x in self.body)]
        return HEADER + "\n".join(lines) + "\n"

    def build(self, seed: int) -> nn.Module:
        """The module, with its source visible to tracebacks and reports."""
        name = f"<fuzz {seed}>"
        linecache.cache[name] = (len(self.text), None, self.text.splitlines(True), name)
        space: dict[str, object] = {"torch": torch, "F": F, "nn": nn, "__name__": "fuzz_program"}
        exec(compile(self.text, name, "exec"), space)
        torch.manual_seed(seed)
        return space["Program"]()  # type: ignore[operator]
