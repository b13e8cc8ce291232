"""`attnopt env`, `cache` and `calibrate`: this machine and what is stored about it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from attnopt import environment
from attnopt.commands import command, say


def add(commands: Any) -> None:
    env = command(commands, "env", _env, "versions, devices and settings, for a bug report",
                  "attnopt env\nattnopt env --json > env.json")
    env.add_argument("--json", action="store_true", help="as JSON")

    cache = command(commands, "cache", _cache,
                    "where generated kernels are kept, and how many",
                    "attnopt cache\nattnopt cache --clear")
    cache.add_argument("--clear", action="store_true", help="remove them")
    cache.add_argument("--json", action="store_true", help="as JSON")

    calibrate = command(commands, "calibrate", _calibrate,
                        "measure this machine, so that predicted times are its own",
                        "attnopt calibrate\nattnopt calibrate --device cpu\n"
                        "attnopt calibrate --show --json")
    what = calibrate.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="what is stored, without measuring")
    what.add_argument("--reset", action="store_true", help="remove what is stored")
    what.add_argument("--device", choices=("cpu", "gpu"), action="append",
                      help="only this one; default: the CPU, and the GPU if there is one")
    calibrate.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    calibrate.add_argument("--json", action="store_true", help="as JSON")


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
        say=say)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        lines = [line for entry in found for line in calibrate.table(entry)]
        print("\n".join(lines) or "nothing is stored")
    return 0
