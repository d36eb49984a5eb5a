"""The plots of the report as plain plotly figures: dictionaries, drawn in the browser.

Colours are names of the page's own CSS variables, `var(--ink)`: the page's script fills them in, for light and dark.
A figure's `narrow` holds what is laid out differently on a phone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from edgewright import report_text as say
from edgewright.report_data import ArtifactResult, StageRecord
from edgewright.report_labels import Point, place

Figure = dict[str, Any]

SYMBOLS = {"gguf": "circle", "genai": "diamond", "onnx": "square", "openvino": "hexagon", "hf": "cross"}
RUNTIME_NAMES = {"gguf": "GGUF", "genai": "GenAI", "onnx": "ONNX", "openvino": "OpenVINO", "hf": "Hugging Face"}
SMALLEST_MARKER, LARGEST_MARKER, UNTIMED_MARKER = 11.0, 30.0, 12.0
WIDE_PLOT, NARROW_PLOT = (1010.0, 310.0), (270.0, 270.0)
"""Pixels inside the axes of the scatter, about, on a desktop and on a phone."""
MOST_POINTS = 1500
"""More points of a curve than pixels help nobody: longer curves are thinned."""

MOST_MARKERS = 40

AXIS: Figure = {
    "gridcolor": "var(--grid)",
    "linecolor": "var(--line)",
    "zeroline": False,
    "tickfont": {"color": "var(--muted)", "size": 12},
    "title": {"font": {"color": "var(--muted)", "size": 12.5}},
    "automargin": True,
    "fixedrange": True,
}
LAYOUT: Figure = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "var(--sans)", "color": "var(--ink)", "size": 13},
    "margin": {"l": 52, "r": 18, "t": 18, "b": 46},
    "hoverlabel": {
        "bgcolor": "var(--card)",
        "bordercolor": "var(--line)",
        "font": {"color": "var(--ink)", "family": "var(--sans)", "size": 13},
        "align": "left",
    },
    "showlegend": False,
    "dragmode": False,
}


def pareto(artifacts: Sequence[ArtifactResult]) -> Figure | None:
    """Size against quality, marker and colour by speed; None when fewer than two files have both numbers."""
    files = {number: each for number, each in enumerate(artifacts, 1) if each.bytes and each.bits_per_byte}
    if len(files) < 2:
        return None
    measured = list(files.values())
    beaten = {number for number, each in files.items() if any(dominates(other, each) for other in measured)}
    fastest = max((each.tokens_per_s or 0.0 for each in measured), default=0.0)
    x_range, y_range = (
        _log_range([_megabytes(each) for each in measured]),
        _padded([_quality(each) for each in measured]),
    )
    wide = _sides(files, x_range, y_range, fastest, width=WIDE_PLOT[0], height=WIDE_PLOT[1], names=True)
    narrow = _sides(files, x_range, y_range, fastest, width=NARROW_PLOT[0], height=NARROW_PLOT[1], names=False)

    def points(numbers: set[int], *, dominated: bool) -> Figure:
        chosen = {number: each for number, each in files.items() if number in numbers}
        texts = {"textposition": [wide[n] for n in chosen], "narrow_textposition": [narrow[n] for n in chosen]}
        return {**_points(chosen, fastest, dominated=dominated), **texts}

    layout = {
        **LAYOUT,
        "height": 440,
        "margin": {"l": 12, "r": 12, "t": 8, "b": 8},
        "xaxis": _axis("size (MB, logarithmic)", type="log", range=x_range, **_log_ticks(x_range)),
        "yaxis": _axis("bits per byte (lower is better)", range=y_range, tickformat=".2f", nticks=7),
    }
    front = _front_line(size_quality_front(measured))
    data = [front, points(beaten, dominated=True), points(set(files) - beaten, dominated=False)]
    return {"id": "pareto", "data": data, "layout": layout, "narrow": {"height": 400}}


def dominates(one: ArtifactResult, other: ArtifactResult) -> bool:
    """Whether `one` is at least as small, as good and as fast as `other`, and better in one of them."""
    ours, theirs = _objectives(one), _objectives(other)
    return ours != theirs and all(mine <= yours for mine, yours in zip(ours, theirs, strict=True))


def _objectives(artifact: ArtifactResult) -> tuple[float, float, float]:
    """What should be small: bytes, bits per byte, minus tokens per second (not measured = slowest)."""
    return (
        math.inf if artifact.bytes is None else artifact.bytes,
        math.inf if artifact.bits_per_byte is None else artifact.bits_per_byte,
        -(artifact.tokens_per_s or 0.0),
    )


def size_quality_front(artifacts: Sequence[ArtifactResult]) -> list[ArtifactResult]:
    """The files that are better than every smaller one, from small to large."""
    front: list[ArtifactResult] = []
    for each in sorted(artifacts, key=lambda artifact: _objectives(artifact)[:2]):
        if not front or _objectives(each)[1] < _objectives(front[-1])[1]:
            front.append(each)
    return front


def _front_line(front: Sequence[ArtifactResult]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [each.bytes / 1e6 for each in front if each.bytes],
        "y": [each.bits_per_byte for each in front],
        "line": {"shape": "hv", "color": "var(--accent)", "width": 1.5, "dash": "dot"},
        "opacity": 0.7,
        "hoverinfo": "skip",
    }


def _points(files: dict[int, ArtifactResult], fastest: float, *, dominated: bool) -> Figure:
    """Markers with names; on a narrow screen their row numbers instead."""
    marker: dict[str, object] = {
        "size": [_marker_size(each.tokens_per_s, fastest) for each in files.values()],
        "symbol": [SYMBOLS.get(each.to, "circle") for each in files.values()],
        "line": {"color": "var(--card)", "width": 1.5},
        "opacity": 0.6 if dominated else 0.95,
        "color": "var(--dominated)",
    }
    if not dominated and fastest:
        marker |= _speed_colours([each.tokens_per_s or 0.0 for each in files.values()], fastest)
    elif not dominated:
        marker["color"] = "var(--accent)"
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [_megabytes(each) for each in files.values()],
        "y": [_quality(each) for each in files.values()],
        "text": [_label(number, each) for number, each in files.items()],
        "narrow_text": [str(number) for number in files],
        "textfont": {"size": 12, "color": "var(--muted)" if dominated else "var(--ink)"},
        "hovertext": [_hover(each, dominated=dominated) for each in files.values()],
        "hoverinfo": "text",
        "cliponaxis": False,
        "marker": marker,
    }


def _label(number: int, artifact: ArtifactResult) -> str:
    return f"{number}  {_escape(artifact.name)}"


def _sides(
    files: dict[int, ArtifactResult],
    x_range: Sequence[float],
    y_range: Sequence[float],
    fastest: float,
    *,
    width: float,
    height: float,
    names: bool,
) -> dict[int, str]:
    """The side of its marker on which each file's text stands, for a plot of `width` x `height` pixels."""
    points = [
        Point(
            width * (math.log10(_megabytes(each)) - x_range[0]) / (x_range[1] - x_range[0]),
            height * (y_range[1] - _quality(each)) / (y_range[1] - y_range[0]),
            _marker_size(each.tokens_per_s, fastest) / 2,
            _label(number, each) if names else str(number),
        )
        for number, each in files.items()
    ]
    return dict(zip(files, place(points, width=width, height=height), strict=True))


def _megabytes(artifact: ArtifactResult) -> float:
    return (artifact.bytes or 0) / 1e6


def _quality(artifact: ArtifactResult) -> float:
    return artifact.bits_per_byte or 0.0


def _speed_colours(speeds: list[float], fastest: float) -> dict[str, object]:
    return {
        "color": speeds,
        "cmin": 0,
        "cmax": fastest,
        "colorscale": [[0, "var(--scale-0)"], [0.5, "var(--scale-1)"], [1, "var(--scale-2)"]],
        "showscale": True,
        "colorbar": {
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yanchor": "bottom",
            "ypad": 6,
            "xpad": 0,
            "len": 240,
            "lenmode": "pixels",
            "thickness": 8,
            "outlinewidth": 0,
            "nticks": 5,
            "tickfont": {"color": "var(--muted)", "size": 11},
            "title": {"text": "tokens per second", "side": "top", "font": {"color": "var(--muted)", "size": 12}},
        },
    }


def _marker_size(speed: float | None, fastest: float) -> float:
    """Diameter in pixels; the area grows with the speed."""
    if speed is None or not fastest:
        return UNTIMED_MARKER
    return SMALLEST_MARKER + (LARGEST_MARKER - SMALLEST_MARKER) * math.sqrt(speed / fastest)


def _hover(artifact: ArtifactResult, *, dominated: bool) -> str:
    lines = [
        f"<b>{_escape(artifact.name)}</b>  {RUNTIME_NAMES.get(artifact.to, artifact.to)} {artifact.quant or ''}",
        f"{say.size(artifact.bytes)} · {say.bits_with_interval(artifact.bits_per_byte, artifact.bits_per_byte_ci)}"
        " bits per byte",
        f"{say.rate(artifact.tokens_per_s, artifact.tokens_per_s_sd)} tokens/s",
    ]
    return "<br>".join([*lines, *(["another file is at least as small, good and fast"] if dominated else [])])


def _escape(text: str) -> str:
    """Plotly reads some HTML in its texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def training_loss(stage: StageRecord) -> Figure | None:
    """The stage's own objective, raw (faint) and smoothed; None without measurements."""
    if not stage.steps:
        return None
    smooth = smoothed(stage.loss)
    steps, raw, line = (thinned(values) for values in (stage.steps, stage.loss, smooth))
    hover = [f"step {step:,}<br>loss {value:.3f}" for step, value in zip(steps, line, strict=True)]
    return {
        "id": f"loss-{stage.name}",
        "data": [
            _curve(steps, raw, color="var(--accent)", width=1.0, opacity=0.28),
            _curve(steps, line, color="var(--accent)", width=2.2, hover=hover),
        ],
        "layout": {
            **LAYOUT,
            "height": 280,
            "xaxis": _axis("step"),
            "yaxis": _axis("training loss (nats per token)", range=_loss_range(stage.loss)),
        },
        "narrow": {"height": 250, "margin": {"l": 44, "r": 8, "t": 12, "b": 44}},
    }


def held_out(stage: StageRecord) -> Figure | None:
    """Bits per byte on held-out text while the stage trained; a line for its teacher's on the same text."""
    if not stage.evaluated_steps:
        return None
    hover = [
        f"step {step:,}<br>{value:.3f} bits per byte"
        for step, value in zip(stage.evaluated_steps, stage.bits_per_byte, strict=True)
    ]
    curve = _curve(stage.evaluated_steps, stage.bits_per_byte, color="var(--second)", width=2.2, hover=hover)
    mode = "lines+markers" if len(stage.evaluated_steps) <= MOST_MARKERS else "lines"
    levels = [] if stage.teacher_bits_per_byte is None else [stage.teacher_bits_per_byte]
    return {
        "id": f"held-out-{stage.name}",
        "data": [{**curve, "mode": mode, "marker": {"size": 7, "color": "var(--second)"}}],
        "layout": {
            **LAYOUT,
            "height": 280,
            "xaxis": _axis("step", range=[0, max(stage.evaluated_steps) * 1.02]),
            "yaxis": _axis(
                "held-out bits per byte", range=_padded([*stage.bits_per_byte, *levels]), nticks=6, tickformat=".2f"
            ),
            "shapes": [_reference_line(level) for level in levels],
            "annotations": [_reference_name(level) for level in levels],
        },
        "narrow": {"height": 250, "margin": {"l": 44, "r": 8, "t": 12, "b": 44}},
    }


def _reference_line(level: float) -> Figure:
    line = {"color": "var(--muted)", "width": 1.2, "dash": "dash"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": line}


def _reference_name(level: float) -> Figure:
    return {
        "xref": "paper",
        "x": 1,
        "xanchor": "right",
        "y": level,
        "yanchor": "bottom",
        "text": f"teacher {say.bits(level)}",
        "showarrow": False,
        "font": {"color": "var(--muted)", "size": 12},
    }


def _curve(
    x: Sequence[float],
    y: Sequence[float],
    *,
    color: str,
    width: float,
    opacity: float = 1.0,
    hover: Sequence[str] | None = None,
) -> Figure:
    shown = {"hoverinfo": "skip"} if hover is None else {"hovertext": list(hover), "hoverinfo": "text"}
    line = {"color": color, "width": width}
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "line": line, "opacity": opacity, **shown}


def _axis(title: str, **settings: object) -> Figure:
    return {**AXIS, "title": {**AXIS["title"], "text": title}, **settings}


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the curve around each value, so that the line does not lag behind.

    At the start, where curves are steep, the window shrinks on both sides; at the end only on the side that ends.
    """
    half = max(len(values) // 40, 1)
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for middle in range(len(values)):
        reach = min(half, middle)
        first, after = middle - reach, min(middle + reach + 1, len(values))
        result.append((sums[after] - sums[first]) / (after - first))
    return result


def thinned(values: Sequence[float]) -> list[float]:
    """At most `MOST_POINTS` values, evenly picked, the last one always among them."""
    every = math.ceil(len(values) / MOST_POINTS)
    return list(values[::-every])[::-1] if every > 1 else list(values)


def _loss_range(values: Sequence[float]) -> list[float]:
    """All of a curve but the spikes of its first steps, which would flatten the rest."""
    ranked = sorted(values)
    return _padded([ranked[0], ranked[int(0.97 * (len(ranked) - 1))]])


def _padded(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - margin, high + margin]


def _log_range(values: Sequence[float]) -> list[float]:
    """Exponents of ten around the values, with room for markers and names."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = 0.14 * (high - low) or 0.2
    return [low - margin, high + margin]


def _log_ticks(exponents: Sequence[float]) -> dict[str, object]:
    """Ticks at 1, 2, 5 times powers of ten; plotly's own are bare digits."""
    powers = range(math.floor(exponents[0]), math.ceil(exponents[1]))
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if exponents[0] <= math.log10(tick) <= exponents[1]]
    return {"tickvals": shown, "ticktext": [f"{tick:g}" for tick in shown]}
