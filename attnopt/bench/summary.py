"""The rows of a suite as a table of text and, where matplotlib is installed, as a chart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnopt.bench.side_by_side import BASELINES, OURS
from attnopt.timing import format_seconds

_COLOURS = {"eager": "#9a9a9a", "sdpa": "#3b78b5", "compile": "#d98a3d", "flex": "#5a9a5a",
            "unfold": "#8a6fb0",
            "create_block_mask": "#5a9a5a", "1 thread": "#9a9a9a"}


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row as a sentence, said as soon as it is measured."""
    ours = row["contestants"].get(OURS, {})
    ratios = []
    for other, found in row["ratios"].items():
        low, high = found["interval"]
        goal = f", must be {found['at_least']:g}x" if "at_least" in found else ""
        ratios.append(f"{found['ratio']:.2f}x {other} ({low:.2f} to {high:.2f}{goal}"
                      f"{': MISSED' if found.get('missed') else ''})")
    for limit, found in row.get("limits", {}).items():
        most = found["must_not_exceed"]
        text = format_seconds(most) if limit == "seconds" else f"{most / 1e6:.0f} MB"
        ratios.append(f"must not exceed {text}{': MISSED' if found['missed'] else ''}")
    how = " ".join(filter(None, (row["ours"].get("lowering"), row["ours"].get("tile"))))
    time = format_seconds(ours["seconds"]) if ours else ""
    share = f"; {row['roofline_share']:.0%} of the roofline" if "roofline_share" in row else ""
    files = ", ".join(f"{other} {found['file_bytes'] / 1e6:.2f} MB"
                      for other, found in row["contestants"].items() if "file_bytes" in found)
    return (f"{name}, {row['shape']} {row['dtype']}: {time} {how}; {', '.join(ratios)}{share}"
            f"{'; files: ' if files else ''}{files}")


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table: times in all columns of contestants, ours with share, peak and error."""
    further = {other: None for row in rows.values() for other in row["contestants"]}
    timed = list(dict.fromkeys((*BASELINES, *further)))
    timed = [*(name for name in timed if name != OURS), OURS]
    lines = [["case", "shape", "dtype", *timed, "roof", "peak", "error", "by"]]
    lines += [_cells(name, row, timed) for name, row in rows.items()]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(cells, wide, strict=True)).rstrip()
            for cells in lines]


def chart(rows: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> bool:
    """Bars of time of each baseline / ours as SVG; false where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        return False
    bars = [(name, other, found) for name, row in rows.items()
            for other, found in row["ratios"].items()]
    figure = Figure(figsize=(8, 1.2 + 0.22 * (len(bars) + len(rows))), layout="constrained")
    axes = figure.add_subplot()
    place, ticks, seen = 0.0, [], set()
    for name, row in rows.items():
        start = place
        for other, found in row["ratios"].items():
            low, high = found["interval"]
            middle = found["ratio"]
            axes.barh(place, middle, color=_COLOURS.get(other, "#777777"),
                      label=None if other in seen else other,
                      xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
                      error_kw={"elinewidth": 0.8, "ecolor": "#333333"})
            axes.annotate(f" {middle:.2f}x", (max(high, middle), place), va="center", fontsize=7)
            if "at_least" in found:
                axes.plot([found["at_least"]] * 2, [place - 0.4, place + 0.4], color="#c03030")
            seen.add(other)
            place += 1
        ticks.append(((start + place - 1) / 2, f"{name}\n{row['shape']} {row['dtype']}"))
        place += 1
    axes.set_yticks([where for where, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=1.3 * axes.get_xlim()[1])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter("")
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xlabel("time of the baseline / time of ours (red: what must be reached)", fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=5)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
    return True


def _cells(name: str, row: Mapping[str, Any], timed: Iterable[str]) -> list[str]:
    contestants = row["contestants"]
    times = [format_seconds(contestants[other]["seconds"]) if other in contestants else "-"
             for other in timed]
    ours = contestants.get(OURS, {})
    peak = ours.get("peak_bytes")
    return [name, row["shape"], row["dtype"], *times,
            f"{row['roofline_share']:.0%}" if "roofline_share" in row else "-",
            f"{peak / 1e6:.0f} MB" if peak is not None else "-",
            f"{ours['error']:.1e}" if "error" in ours else "-",
            row["ours"].get("lowering") or row["ours"].get("status") or "-"]
