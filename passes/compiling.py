"""Compile the generated kernels of all rewritten sites in parallel, before any of them runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import fx

from attnopt import kernels
from attnopt.errors import KernelError
from attnopt.ir.site import SiteRecord
from attnopt.kernels.sources import source_of
from attnopt.rules import Match

log = logging.getLogger("attnopt.passes")


def compile_kernels(calls: Sequence[tuple[Match, fx.Node]], training: bool) -> None:
    """Compile the kernels of matches and the calls that were emitted for them."""
    try:
        kernels.prepare([
            (match.spec, match.schedule,
             [a.meta["val"] for a in (*node.args[:3], *node.args[3])])  # type: ignore
            for match, node in calls], training)
    except KernelError as error:  # ATen computes these calls then, and the log says why
        log.warning("a kernel could not be compiled: %s", error)


def kernel_texts(calls: Sequence[tuple[SiteRecord, Match, fx.Node]]) -> dict[str, str]:
    """Texts of the generated kernels by a key that the record of each site is given."""
    texts: dict[str, str] = {}
    for record, match, node in calls:
        if record.status != "rewritten":
            continue
        try:
            text = source_of(match.spec, match.schedule,
                             [a.meta["val"] for a in (*node.args[:3], *node.args[3])])  # type: ignore
        except (KernelError, LookupError, RuntimeError, TypeError, ValueError):
            log.info("no text of the kernel of %s", record.path, exc_info=True)
            continue  # nobody depends on it
        if text:
            record.kernel = hashlib.sha256(text.encode()).hexdigest()[:12]
            texts[record.kernel] = text
    return texts


def attention_calls(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls of the op among emitted nodes."""
    return [n for n in nodes if n.target is torch.ops.attnopt.attention.default]
