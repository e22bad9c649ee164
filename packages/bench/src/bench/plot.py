"""The plots: how many times as fast flaxmill is, by workload and peer, on a scale where twice and half are even.

Also what a run reached of the machine's limits, times by length, and all runs that were published.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.comparison import Spread

COLOURS = ("#33658a", "#f0a04b", "#6a994e", "#a06cb0", "#bc4749", "#7d7d7d")
INK, FAINT, GRID = "#222222", "#777777", "#e4e4e4"
TICKS = (0.1, 0.2, 0.5, 0.8, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One comparison; where there is no `speedup`, `note` is written in its place."""

    workload: str
    peer: str
    speedup: Spread | None = None
    note: str = ""


def png(title: str, subtitle: str, bars: Sequence[Bar]) -> bytes:
    """Returns the picture, bars from top to bottom in the order given, those of one workload together."""
    peers = list(dict.fromkeys(bar.peer for bar in bars))
    colours = {peer: COLOURS[i % len(COLOURS)] for i, peer in enumerate(peers)}
    places = _places(bars)
    lines = 1 + subtitle.count("\n")
    height = 1.5 + 0.16 * lines + 0.32 * (1 + max(places, default=0))
    figure = Figure(figsize=(10, height), dpi=120 if height < 40 else 75)
    top = 1 - (0.75 + 0.16 * lines) / height
    axes = figure.add_axes((0.2, 0.55 / height, 0.77, top - 0.55 / height))
    for bar, y in zip(bars, places, strict=True):
        _draw(axes, y, bar, colours[bar.peer])
    _dress(axes, bars, places)
    handles = [Patch(color=colour, label=f"against {peer}") for peer, colour in colours.items()]
    figure.text(0.015, 1 - 0.12 / height, title, va="top", fontsize=14, weight="bold", color=INK)
    figure.text(0.015, 1 - 0.42 / height, subtitle, va="top", fontsize=8, color=FAINT)
    if handles:
        figure.legend(handles=handles, loc="upper right", ncols=1, frameon=False, fontsize=9)
    return _encoded(figure)


def _places(bars: Sequence[Bar]) -> list[float]:
    """Returns each bar's y: a step down for a peer, a larger one for the next workload."""
    places: list[float] = []
    for i, bar in enumerate(bars):
        step = 0.0 if i == 0 else 0.8 if bars[i - 1].workload == bar.workload else 1.4
        places.append((places[-1] if places else 0.0) + step)
    return places


def _draw(axes: Axes, y: float, bar: Bar, colour: str) -> None:
    """Draws a bar from 1 to the ratio, the middle half of the pairwise ratios as a whisker, and the figure."""
    if bar.speedup is None:
        axes.annotate(
            bar.note,
            (1, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=8,
            color=FAINT,
            style="italic",
        )
        return
    found = bar.speedup
    axes.barh(y, found.value - 1, left=1, height=0.68, color=colour)
    axes.plot([found.low, found.high], [y, y], color=INK, linewidth=1.3, solid_capstyle="butt")
    is_faster = found.value >= 1
    axes.annotate(
        f"{found.value:.2f}x",
        (max(found.value, found.high) if is_faster else min(found.value, found.low), y),
        (5 if is_faster else -5, 0),
        textcoords="offset points",
        ha="left" if is_faster else "right",
        va="center",
        fontsize=9,
        color=INK,
    )


def _dress(axes: Axes, bars: Sequence[Bar], places: Sequence[float]) -> None:
    found = [bar.speedup for bar in bars if bar.speedup]
    low = min((s.low for s in found), default=1.0)
    high = max((s.high for s in found), default=1.0)
    axes.set_xscale("log")
    low, high = min(0.9, low), max(1.5, high)
    room = (high / low) ** 0.12  # for the figures at the ends of the bars
    axes.set_xlim(low / room, high * room)
    axes.set_ylim(max(places, default=0) + 0.8, -0.8)
    middles = {
        w: [y for b, y in zip(bars, places, strict=True) if b.workload == w]
        for w in dict.fromkeys(bar.workload for bar in bars)
    }
    axes.set_yticks([sum(ys) / len(ys) for ys in middles.values()], list(middles))
    axes.set_xticks(_ticks(*axes.get_xlim()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(1, color=INK, linewidth=1)
    for words, ha, offset in (
        ("flaxmill is faster \u2192", "left", 6),
        ("\u2190 slower", "right", -6),
    ):
        axes.annotate(
            words,
            (1, 0),
            (offset, -28),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=ha,
            fontsize=9,
            color=FAINT,
        )
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.spines[:].set_visible(False)


def _ticks(low: float, high: float) -> list[float]:
    """Returns 1 and as many other ticks within the limits as have room beside each other."""
    room = (high / low) ** 0.055
    shown = [1.0]
    for tick in sorted(TICKS, key=lambda t: abs(math.log(t))):
        if low <= tick <= high and all(max(tick / t, t / tick) > room for t in shown):
            shown.append(tick)
    return shown


@dataclasses.dataclass(frozen=True)
class Work:
    """What a contestant made of a workload: operations a second, and how many there are to a byte that is read."""

    workload: str
    contestant: str
    precision: str
    flops_per_byte: float
    flops_per_s: float


def roofline(
    works: Sequence[Work], products: Mapping[str, float], read_bytes_per_s: float | None
) -> bytes:
    """Returns a picture of work under the machine's limits: a roof for each precision's rate of `products`."""
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    places = [work.flops_per_byte for work in works]
    left, right = min(places, default=0.5) / 2, max(places, default=100) * 2
    for (precision, rate), style in zip(products.items(), ("-", "--", ":"), strict=False):
        slope = read_bytes_per_s or rate
        bends = sorted({left, min(max(rate / slope, left), right), right})
        roof = [min(rate, slope * x) for x in bends]
        axes.plot(bends, roof, style, color=INK, linewidth=1, label=f"limit, {precision}")
    names = list(dict.fromkeys(work.contestant for work in works))
    shapes = {"float32": "o", "bfloat16": "s", "int8": "^"}
    for name, precision in dict.fromkeys((work.contestant, work.precision) for work in works):
        mine = [w for w in works if (w.contestant, w.precision) == (name, precision)]
        axes.scatter(
            [w.flops_per_byte for w in mine],
            [w.flops_per_s for w in mine],
            s=22,
            marker=shapes[precision],
            color=COLOURS[names.index(name) % len(COLOURS)],
            label=f"{name}, {precision}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations to a byte of weights and cache")
    axes.set_ylabel("operations a second")
    _plain(axes, "what was reached of the machine's limits")
    return _encoded(figure)


def latency(series: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> bytes:
    """Returns a picture of milliseconds by number of tokens: a panel a kind of work, a line a contestant."""
    columns = max(1, len(series))
    figure = Figure(figsize=(6.5 * columns, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes, (title, lines) in zip(panels, series.items(), strict=False):
        for n, (name, points) in enumerate(lines.items()):
            lengths, times_ms = zip(*sorted(points), strict=True)
            colour, style = COLOURS[n % len(COLOURS)], ("-", "--")[n // len(COLOURS) % 2]
            axes.plot(lengths, times_ms, style, color=colour, marker="o", markersize=3, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, word in ((axes.xaxis, "tokens"), (axes.yaxis, "ms")):
            axis.set_label_text(word)
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
            axis.set_minor_locator(NullLocator())
        _plain(axes, title)
    return _encoded(figure)


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def history(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a picture of the published runs from the oldest on: a panel a kind of work, a line a workload.

    A line is how many times as fast we are as the fastest of the peers in that run.
    """
    kinds: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for i, run in enumerate(runs):
        for name, row in run["rows"].items():
            if ratios := [ratio[0] for ratio in row.get("against", {}).values()]:
                kinds.setdefault(row["kind"], {}).setdefault(name, []).append((i, min(ratios)))
    rows = max(1, -(-len(kinds) // 2))
    figure = Figure(figsize=(12, 1 + 3.2 * rows), dpi=100, layout="constrained")
    figure.suptitle("flaxmill beside the fastest of its peers, by published run", fontsize=13)
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    days = [f"{run['date'][:10]}\n{run['suite']}" for run in runs]
    for axes, kind in zip(panels, kinds, strict=False):
        _draw_history(axes, kind, kinds[kind], days)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    return _encoded(figure)


def _draw_history(
    axes: Axes, kind: str, lines: Mapping[str, Sequence[tuple[int, float]]], days: Sequence[str]
) -> None:
    for n, (name, points) in enumerate(lines.items()):
        style = ("-", "--", ":", "-.")[n // len(COLOURS) % 4]
        places, ratios = zip(*points, strict=True)
        colour = COLOURS[n % len(COLOURS)]
        axes.plot(places, ratios, style, color=colour, marker="o", markersize=3, label=name)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low, high = min(0.8, low), max(1.25, high)
    axes.set_ylim(low / 1.05, high * 1.05)
    axes.set_yticks(_ticks(low, high))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.yaxis.set_minor_locator(NullLocator())
    step = -(-len(days) // 6)
    axes.set_xticks(range(0, len(days), step), days[::step])
    axes.set_xlim(-0.5, len(days) - 0.5)
    axes.axhline(1, color=INK, linewidth=1)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_title(kind, loc="left", fontsize=10, color=INK)
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _encoded(figure: Figure) -> bytes:
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()
