"""`attnopt inspect`, `optimize` and `export`: the report, and programs to save."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.commands import FINE, command, say
from attnopt.commands.choices import accept, add_choices, choices_of, files, results_alone, show
from attnopt.commands.models import Named, add_model, named

if TYPE_CHECKING:
    from attnopt.packaging import Packaged
    from attnopt.report import Report

_REDACT = "pages without names, lines and texts of the model's source"


def add(commands: Any) -> None:
    inspect = command(commands, "inspect", _inspect,
                      "what attention a model has, what would become of it, and why",
                      "attnopt inspect my.models:swin\n"
                      "attnopt inspect my.models:bert --input 1x128:int64 --format json\n"
                      "attnopt inspect model.pt2 --html report.html")
    add_model(inspect)
    add_choices(inspect)
    inspect.add_argument("--format", choices=("text", "json", "html"), default="text",
                         help="of what is printed")
    inspect.add_argument("--html", metavar="FILE", help="also write a page")
    inspect.add_argument("--redact", action="store_true", help=_REDACT)
    inspect.add_argument("--json", metavar="FILE", help="also write the report as data")
    inspect.add_argument("--pictures", action="store_true", help="print the masks as well")

    optimize = command(commands, "optimize", _optimize,
                       "optimise a model, print the report, and save the program",
                       "attnopt optimize my.models:swin -o swin.pt2\n"
                       "attnopt optimize my.models:llama --dynamic ids.1=16..4096 -o llama.pt2\n"
                       "attnopt optimize my.models:swin --measure")
    add_model(optimize)
    add_choices(optimize)
    optimize.add_argument("-o", "--output", metavar="FILE.pt2",
                          help="the program, with attnopt's operators; load it with "
                               "torch.export.load where attnopt is imported")
    optimize.add_argument("--format", choices=("text", "json"), default="text",
                          help="of the report")
    optimize.add_argument("--html", metavar="FILE", help="also write the report as a page")
    optimize.add_argument("--redact", action="store_true", help=_REDACT)
    optimize.add_argument("--measure", action="store_true",
                          help="time the model and what became of it, whole and site by site")

    export = command(commands, "export", _export,
                     "save a program that needs torch alone",
                     "attnopt export my.models:swin -o swin.pt2\n"
                     "attnopt export my.models:swin --dynamic x.0=1..64 -o swin.pt2\n"
                     "attnopt export my.models:swin --aoti -o swin.aoti.pt2")
    add_model(export)
    add_choices(export, backend=False)
    export.add_argument("-o", "--output", metavar="FILE.pt2", required=True,
                        help="the program, in ATen operators alone")
    export.add_argument("--aoti", action="store_true",
                        help="compiled by AOTInductor for this kind of processor; load it with "
                             "torch._inductor.aoti_load_package")


def _inspect(options: argparse.Namespace) -> int:
    from attnopt.api import explain

    with files(options.html, options.json) as (page, data), results_alone():
        given = named(options)
        report = explain(given.model, given.args, given.kwargs,
                         dynamic_shapes=given.dynamic_shapes, **choices_of(options))
        accept(options, report)
        if page is not None:
            report.to_html(page, redact=options.redact)
        if data is not None:
            report.to_json(data)
    _written(options.html, options.json)
    if options.format == "html":
        print(_html(report, options.redact), end="")
        return FINE
    show(report, options.format)
    if options.pictures:
        print(report.pictures())
    return FINE


def _optimize(options: argparse.Namespace) -> int:
    from attnopt.api import optimize

    with files(options.html) as (page,), results_alone():
        given = named(options)
        model, report = given.model, None
        if options.measure or not options.output:
            model = optimize(model, given.args, given.kwargs, dynamic_shapes=given.dynamic_shapes,
                             **choices_of(options))
            report = model.report
            accept(options, report)
            if options.measure:
                report.measure(sites=True)
        if options.output:
            made = _write("program", given, options, model)
            report = report or made.report
        assert report is not None
        if page is not None:
            report.to_html(page, redact=options.redact)
    _written(options.output, options.html)
    show(report, options.format)
    return FINE


def _export(options: argparse.Namespace) -> int:
    with results_alone():
        given = named(options)
        made = _write("aoti" if options.aoti else "portable", given, options, given.model)
    print(f"{made.report}\n{made}")
    return FINE


def _write(kind: str, given: Named, options: argparse.Namespace, model: Any) -> Packaged:
    from attnopt.packaging import write

    return write(kind, model, given.args, options.output, kwargs=given.kwargs,
                 dynamic_shapes=given.dynamic_shapes, **choices_of(options),
                 accept=lambda report: accept(options, report))


def _html(report: Report, redact: bool) -> str:
    """The page of a report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.html")
        report.to_html(path, redact=redact)
        return path.read_text("utf-8")


def _written(*names: str | None) -> None:
    for name in filter(None, names):
        say(f"written: {name}")
