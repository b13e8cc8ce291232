"""Report: what was found in a model, what became of it, and why.

It holds plain strings and numbers, so it can be pickled, copied, sent and read back without the
model. Only `measure` needs the model; the optimised module lends it through `bind`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import platform
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch.utils import _pytree as pytree

from attnopt.errors import AttnOptError, OptionError
from attnopt.files import write_whole
from attnopt.ir.graph_record import GraphRecord
from attnopt.ir.site import SiteRecord
from attnopt.report import codec, html, page, pictures, table, terminal
from attnopt.report.difference import Difference
from attnopt.report.redact import redacted
from attnopt.report.rows import counts
from attnopt.report.text import printable
from attnopt.timing import Comparison, compare

Example = tuple[tuple[Any, ...], dict[str, Any]]
#: (args, kwargs, repeats, threads) -> the sites of the same program with their times
SiteTimes = Callable[[tuple[Any, ...], dict[str, Any], int, int], list[SiteRecord]]
_MEASURED = ("measured_original", "measured_seconds", "measured_speedup", "measured_low",
             "measured_high", "roofline", "roofline_bound")


class Report:
    """What `optimize` and `explain` return of a model.

    sites:    one record per attention, sampling or linear attention that was found
    timings:  seconds per step of the pipeline
    before, after: readable texts of the graph
    notes:    sentences for the user that belong to no site
    calls:    a live mapping: "hits" counts the calls that a variant took, every other key is the
              reason for which so many calls ran the user's own forward
    versions: of attnopt, torch and Python that made the report
    measurement: what the last `measure` found, else None
    graphs:   the nodes of each captured graph before and after, with the sites they are part of
    kernels:  text of the generated kernels, by the key that sites name
    """

    def __init__(
        self,
        sites: Sequence[SiteRecord] = (),
        model_name: str = "",
        timings: Mapping[str, float] | None = None,
        before: str = "",
        after: str = "",
        notes: Sequence[str] = (),
        calls: Mapping[str, int] | None = None,
        versions: Mapping[str, str] | None = None,
        measurement: Comparison | None = None,
        graphs: Sequence[GraphRecord] = (),
        kernels: Mapping[str, str] | None = None,
    ) -> None:
        self.sites = list(sites)
        self.model_name = model_name
        self.timings = dict(timings or {})
        self.before = before
        self.after = after
        self.notes = list(notes)
        self.calls: Mapping[str, int] = {} if calls is None else calls
        self.versions = _versions() if versions is None else dict(versions)
        self.measurement = measurement
        self.graphs = list(graphs)
        self.kernels = dict(kernels or {})
        self._original: Callable[[], Callable[..., Any] | None] = _nothing
        self._optimized: Callable[[], Callable[..., Any] | None] = _nothing
        self._example: Callable[[], Example | None] = _nothing
        self._site_times: SiteTimes | None = None

    # -- reading ------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of sites by kind, then by status; kinds without a site are left out."""
        return counts(self.sites)

    def __str__(self) -> str:
        return table.render(self)

    def __repr__(self) -> str:
        by_status = [s.status for s in self.sites]
        numbers = ", ".join(f"{by_status.count(s)} {s}" for s in dict.fromkeys(by_status))
        name = printable(self.model_name or "model", 60)
        return f"<Report of {name}: {len(by_status)} sites{': ' if numbers else ''}{numbers}>"

    def __rich__(self) -> Any:
        return terminal.Rendering(self)

    def _repr_html_(self) -> str:
        return html.fragment(self)

    def pictures(self) -> str:
        """The masks of the sites: which tiles are visited at the lengths of the example, with
        density, tile density and waste; equal ones once."""
        return pictures.render(self.sites)

    @overload
    def diff(self) -> str: ...

    @overload
    def diff(self, other: Report) -> Difference: ...

    def diff(self, other: Report | None = None) -> str | Difference:
        """Without `other`: unified diff of the readable graphs before and after; "" where nothing
        changed. With a later report: which sites came, went and changed from this one to it.

        Raises:
            OptionError: other is no Report.
        """
        if other is not None:
            if not isinstance(other, Report):
                raise OptionError(f"other must be a Report, got {type(other).__name__}")
            return Difference.of(self.sites, other.sites)
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), "before", "after", lineterm="")
        return "\n".join(lines)

    # -- writing ------------------------------------------------------------------------------

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text with a schema version (see `attnopt.report.schema`), also written to `path`."""
        text = codec.encode(self._fields())
        if path is not None:
            write_whole(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            OptionError: the text is no report, or of a newer schema version.
        """
        return cls._from_fields(codec.decode(text))

    def to_html(self, path: str | os.PathLike[str], *, redact: bool = False) -> None:
        """Write one self-contained page: nothing is loaded; it can be searched and filtered.

        redact: leave out what tells of the model's source: names of modules, parameters and files,
            lines, reasons, notes and kernel texts. Shapes and numbers stay.

        Raises:
            OptionError: the path cannot be written; nothing is left behind then.
        """
        write_whole(path, page.page(redacted(self) if redact else self))

    # -- measuring ----------------------------------------------------------------------------

    def bind(
        self,
        original: Callable[..., Any],
        optimized: Callable[..., Any],
        example: Example | Callable[[], Example | None] | None = None,
        sites: SiteTimes | None = None,
    ) -> None:
        """Lend the two callables that `measure` compares, the arguments of the capture, and what
        times sites: (args, kwargs, repeats, threads) -> records with their times.

        Bound methods are held by weak reference, so that a report that was kept does not keep a
        model alive; other callables are held. `example` is (args, kwargs) or a function giving it.
        """
        self._original, self._optimized = _lend(original), _lend(optimized)
        self._site_times = sites
        if callable(example):
            self._example = example
        else:
            self._example = _nothing if example is None else (lambda: example)

    def measure(
        self,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        repeats: int = 30,
        threads: int = 1,
        sites: bool = False,
    ) -> Comparison:
        """Time the original against the optimised module, call by call in turns.

        sites: also time every rewritten site alone, its author's operations against what was put
            in for them, on the tensors that these arguments bring to it: `measured_…` and
            `roofline` of the sites. The model is captured once more for that. What layers share is
            part of the time of each, so that a model may gain more than its sites do.

        Calls are real calls: in training mode they update statistics and draw dropout. Gradient
        mode and autocast are those of the caller. Without arguments the example of the capture is
        used. CPU time with one thread, wall time with several or on an accelerator.

        Raises:
            AttnOptError: the report is not attached to a live module, or there is no example.
            OptionError: args is no tuple.
        """
        original, optimized = self._original(), self._optimized()
        if original is None or optimized is None:
            raise AttnOptError(
                "measure must be called on the report of a live optimised module, got one that was "
                "loaded, copied, or whose module is gone")
        if args is None and kwargs is None:
            example = self._example()
            if example is None:
                raise AttnOptError("args must be given to measure: the report holds no example")
            args, kwargs = example
        if args is not None and not isinstance(args, tuple):
            raise OptionError(f"args must be a tuple, got {type(args).__name__}")
        given, named = args or (), dict(kwargs or {})
        missed = self._misses()
        result = compare(
            lambda: original(*given, **named), lambda: optimized(*given, **named), repeats,
            threads=threads, device=_device(given, named))
        self.measurement = dataclasses.replace(result, fallbacks=self._misses() - missed)
        if sites:
            self._measure_sites(given, named, repeats, threads)
        return self.measurement

    def _measure_sites(self, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int,
                       threads: int) -> None:
        if self._site_times is None:
            raise AttnOptError("sites cannot be measured: the report is not one of optimize()")
        timed: dict[Any, list[SiteRecord]] = {}
        for site in self._site_times(args, kwargs, repeats, threads):
            if site.measured_seconds is not None:
                timed.setdefault(_identity(site), []).append(site)
        missing = 0
        for site in (s for s in self.sites if s.status == "rewritten"):
            found = timed.get(_identity(site))
            if not found:
                missing += 1
                continue
            other = found.pop(0)
            for name in _MEASURED:
                setattr(site, name, getattr(other, name))
        if missing:
            self.notes.append(f"{missing} rewritten sites could not be measured alone")

    def _misses(self) -> int:
        return sum(table.split_calls(self.calls)[1].values())

    # -- copies -------------------------------------------------------------------------------

    def _fields(self) -> dict[str, Any]:
        return {
            "model_name": self.model_name, "versions": self.versions, "counts": self.counts,
            "sites": self.sites, "timings": self.timings, "calls": dict(self.calls),
            "notes": self.notes, "measurement": self.measurement,
            "before": self.before, "after": self.after,
            "graphs": self.graphs, "kernels": self.kernels,
        }

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Report:
        names = ("sites", "model_name", "timings", "before", "after", "notes", "calls", "versions",
                 "measurement", "graphs", "kernels")
        return cls(**{n: fields[n] for n in names if n in fields})

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a snapshot: live counters and the module stay with the original.
        return self._fields()

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = self._from_fields(state)
        self.__dict__.update(fresh.__dict__)


def _identity(site: SiteRecord) -> tuple[str, ...]:
    """What a site of another capture of the same program has in common with it."""
    return site.path, site.source, site.kind, site.lowering, site.shapes


def _nothing() -> None:
    return None


def _lend(fn: Callable[..., Any]) -> Callable[[], Callable[..., Any] | None]:
    if hasattr(fn, "__self__") and hasattr(fn, "__func__"):
        return weakref.WeakMethod(fn)
    return lambda: fn


def _device(*trees: Any) -> str:
    """The accelerator that any tensor is on, else "cpu"."""
    for leaf in pytree.tree_leaves(trees):
        if isinstance(leaf, torch.Tensor) and leaf.device.type not in ("cpu", "meta"):
            return str(leaf.device)
    return "cpu"


def _versions() -> dict[str, str]:
    from attnopt import __version__

    return {"attnopt": __version__, "torch": torch.__version__,
            "python": platform.python_version()}
