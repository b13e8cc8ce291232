"""The command `attnopt`: results on stdout, everything else on stderr.

Exit status: 0 fine, 1 an error, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from attnopt import __version__, environment, logs
from attnopt.bench import SUITES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` None reads the command line. Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    logs.setup()
    if options.run is None:
        parser.print_help()
        return 0
    try:
        return options.run(options)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        logs.get("cli").debug("failed", exc_info=True)
        print(f"attnopt: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnopt", description="Find, explain and replace the attention in PyTorch models.")
    parser.add_argument("--version", action="version", version=f"attnopt {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    env = commands.add_parser("env", help="versions, devices and settings, for a bug report")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_env)

    cache = commands.add_parser("cache", help="where generated kernels are kept, and how many")
    cache.add_argument("--clear", action="store_true", help="remove them")
    cache.add_argument("--json", action="store_true", help="as JSON")
    cache.set_defaults(run=_cache)

    calibrate = commands.add_parser(
        "calibrate", help="measure this machine, so that predicted times are its own")
    what = calibrate.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="what is stored, without measuring")
    what.add_argument("--reset", action="store_true", help="remove what is stored")
    what.add_argument("--device", choices=("cpu", "gpu"), action="append",
                      help="only this one; default: the CPU, and the GPU if there is one")
    calibrate.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    calibrate.add_argument("--json", action="store_true", help="as JSON")
    calibrate.set_defaults(run=_calibrate)

    bench = commands.add_parser("bench", help="measure attnopt on this machine")
    bench.add_argument("--suite", choices=list(SUITES), action="append",
                       help="one of the suites; may be given again; default: all of them")
    bench.add_argument("--json", metavar="FILE", help="also write the results to this file")
    bench.add_argument("--repeats", type=_positive, metavar="N",
                       help="rounds per measurement; default: each suite's own")
    bench.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="measure what torch.compile makes as well; default: each suite's own")
    bench.add_argument("--quick", action="store_true", default=None,
                       help="short sequences and few rounds "
                            "(suites cpu, sparse, bias, deformable, gpu, tiles)")
    bench.add_argument("--full", action="store_true", default=None,
                       help="rows that take a minute and much memory as well (suite sparse)")
    bench.add_argument("--case", action="append", metavar="PATTERN",
                       help="only rows of such a name (suites cpu, sparse, bias, "
                            "deformable, gpu); may be repeated")
    bench.add_argument("--budget", type=_positive, metavar="SECONDS",
                       help="begin no row after that time (suites gpu, tiles)")
    bench.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


def _env(options: argparse.Namespace) -> int:
    found = environment.collect()
    print(json.dumps(found, indent=1) if options.json else "\n".join(_env_lines(found)))
    return 0


def _env_lines(found: dict[str, Any]) -> list[str]:
    cpu, compiler, cache = found["cpu"], found["compiler"], found["cache"]
    pairs = {name: version or "not installed" for name, version in found["versions"].items()}
    pairs |= {
        "platform": found["platform"],
        "cpu": f"{cpu['model']} ({cpu['cores']} cores, {cpu['capability']}, "
               f"{cpu['threads']} torch threads)",
        "cuda": found["cuda"] or "torch without CUDA",
        "accelerators": ", ".join(found["accelerators"]) or "none",
        "compiler": compiler["why_not"] or f"{compiler['version']} ({compiler['command']})",
        "vectors": f"{compiler['isa']} ({compiler['lanes']} fp32 lanes)",
        "cache": f"{cache['folder']} ({_count(cache)})" + _refused(cache),
    }
    for name, value in found["settings"].items():
        pairs[name] = value or f"not set ({environment.SETTINGS[name]})"
    wide = max(map(len, pairs))
    return [f"{name:{wide}}  {value}" for name, value in pairs.items()]


def _cache(options: argparse.Namespace) -> int:
    if options.clear:
        from attnopt.kernels import cache

        files, size = cache.clear()
    found = environment.cache()
    if options.clear:
        found["removed"] = {"files": files, "bytes": size}
    print(json.dumps(found, indent=1) if options.json else "\n".join(_cache_lines(found)))
    return 0


def _cache_lines(found: dict[str, Any]) -> list[str]:
    lines = [found["folder"] + _refused(found)]
    if "removed" in found:
        lines.append(f"removed {_count(found['removed'])}")
    lines += [f"{kind:8} {_count(content)}" for kind, content in found["kinds"].items()]
    return lines if found["kinds"] else [*lines, "empty"]


def _count(content: dict[str, Any]) -> str:
    files, size = content["files"], content["bytes"]
    amount = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
    return f"{files} file{'' if files == 1 else 's'}, {amount}"


def _refused(cache: dict[str, Any]) -> str:
    why = cache["refused"]
    return f"; temporary, because the folder that is wanted is refused: {why}" if why else ""


def _calibrate(options: argparse.Namespace) -> int:
    from attnopt.bench import calibrate

    if options.reset:
        removed = calibrate.reset()
        if options.json:
            print(json.dumps({"removed": removed}, indent=1))
        else:
            print("\n".join(f"removed: {path}" for path in removed) or "nothing is stored")
        return 0
    found = calibrate.stored() if options.show else calibrate.run(
        options.device or (), quick=options.quick,
        say=lambda line: print(line, file=sys.stderr, flush=True))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        lines = [line for entry in found for line in calibrate.table(entry)]
        print("\n".join(lines) or "nothing is stored")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from attnopt import optimize
    from attnopt.bench import run, save

    results = run(optimize, options.suite or list(SUITES), repeats=options.repeats,
                  compiled=options.compile, quick=options.quick, full=options.full,
                  cases=options.case, budget=options.budget,
                  say=lambda line: print(line, flush=True))
    partial = options.quick or options.case
    path = save(results, options.json) if options.json or not partial else None
    if path is not None:
        print(f"written: {path}", file=sys.stderr)
    return 0
