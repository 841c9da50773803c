"""One page that opens offline: the answer, the tables, and plots by Plotly, whose script it carries.

Colours follow the engine, not its rank, in an order that people with colour blindness can tell apart.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

from anamorph.benchmarks.records import Result
from anamorph.benchmarks.report import (
    HEAD,
    START_HEAD,
    cells,
    environment_text,
    groups,
    in_turns,
    ranked,
    start_rows,
    summary,
)
from anamorph.benchmarks.summary import PHASES, Line, reference_of
from anamorph.errors import BackendUnavailable

COLOURS = {
    "text": "#CC79A7",
    "encode": "#56B4E9",
    "denoiser": "#0072B2",
    "control": "#D55E00",
    "vae": "#E69F00",
    "post": "#009E73",
    "host": "#999999",
}
ENGINES = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A5195", "#999933", "#444444", "#882255",
    "#AAAAAA", "#661100",
)  # fmt: skip
BESIDE = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
"""A legend of many entries: above a plot it would grow over what stands there."""
NAMED = {
    "text": "text",
    "encode": "encoder",
    "denoiser": "denoiser",
    "control": "ControlNet",
    "vae": "decoder",
    "post": "post-processing",
    "host": "host",
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
STYLE = """
body { font: 15px/1.5 FONT; color: #1c2430; background: #f4f6f8; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 28px; margin: 0 0 4px } h2 { font-size: 20px; margin: 40px 0 12px }
h3 { font-size: 16px; font-weight: 600; margin: 0 0 4px }
.lead { font-size: 17px; margin: 0; padding: 0; list-style: none }
.card { background: white; border: 1px solid #dde3ea; border-radius: 10px; padding: 16px 20px; margin: 16px 0;
        overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 600; color: #5a6675; vertical-align: bottom; padding: 4px 10px }
td { text-align: right; padding: 5px 10px; border-top: 1px solid #e8ecf1; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr:first-child td { font-weight: 600 } .plain tr:first-child td { font-weight: 400 }
.note { color: #5a6675; font-size: 13px; margin: 8px 0 0 } .void { color: #9a3412; margin: 4px 0 }
details summary { cursor: pointer; color: #5a6675 } .where { color: #5a6675; font-size: 13px }
""".replace("FONT", FONT)


def page(result: Result, done: Sequence[Line]) -> str:
    """The whole page; raises BackendUnavailable: Plotly is not installed."""
    script = _plotly().offline.get_plotlyjs()
    sections = [_section(title, group, done, result) for title, group in groups(done)]
    throughput = _throughput(done)
    if throughput is not None:
        note = "Logarithmic axes; a cross is the batch that failed."
        sections.append(f"<h2>Throughput by batch</h2>{_card(throughput, note)}")
    where = "".join(f"<li>{html.escape(line[2:])}</li>" for line in environment_text(result).splitlines()[2:])
    answer = "".join(f"<li>{html.escape(line[2:])}</li>" for line in summary(done).splitlines())
    name = html.escape(str(result.run["scenario"]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Anamorph: {name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><script>{script}</script></head>'
        f'<body><main><h1>{name}</h1><ul class="lead">{answer}</ul>{"".join(sections)}'
        f'<h2>Where</h2><ul class="where">{where}</ul></main></body></html>'
    )


def _section(title: str, group: Sequence[Line], done: Sequence[Line], result: Result) -> str:
    shown = ranked(group)
    parts = [f"<h2>{html.escape(title)}</h2>"]
    if shown:
        rows = [cells(one, reference_of(one, group)) for one in shown]
        wide = any(one.wide for one in shown)
        notes = "Medians with bootstrap intervals at 95 % over processes."
        if wide:
            notes += " Wide: the interval was not within the scenario's share of the median when its time was spent."
        compared = "".join(f'<p class="note">{html.escape(one)}</p>' for one in in_turns(result, shown))
        parts.append(f'<div class="card">{_table(HEAD, rows)}<p class="note">{notes}</p>{compared}</div>')
        engines = list(dict.fromkeys(one.cell.engine for one in done))
        if any(one.phases for one in shown):
            parts.append(_card(_stacked(shown), "Where the time of one call of the pipeline goes, medians."))
        else:
            parts.append(_card(_bars(shown, engines), "Seconds of one call, medians with intervals."))
        parts.append(_card(_fidelity(shown, engines), "To the upper left is better: fast and near."))
        parts.append(_card(_memory(shown), "Peak resident memory of the process, and the share that is its own."))
        parts.append(
            f'<div class="card plain"><details><summary>What a start costs, with empty caches and with filled ones'
            f"</summary>{_table(START_HEAD, start_rows(shown))}</details></div>"
        )
    parts += [
        f'<p class="void">{html.escape(f"{one.cell.arm}: no speed shown; {one.refusal}")}</p>'
        for one in group if one.refusal
    ]  # fmt: skip
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _card(figure: Any, note: str) -> str:
    # A version of the page that is read in five years still has its script: nothing is fetched.
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    title = html.escape(figure.layout.meta["title"])
    return f'<div class="card"><h3>{title}</h3>{drawn}<p class="note">{html.escape(note)}</p></div>'


def _plotly() -> Any:
    try:
        import plotly
        import plotly.graph_objects
        import plotly.offline
    except ImportError:
        raise BackendUnavailable(
            "plots need Plotly, which is not installed; run: pip install 'anamorph[bench]'"
        ) from None
    return plotly


def _figure(title: str, height: int, **axes: Any) -> Any:
    figure = _plotly().graph_objects.Figure()
    figure.update_layout(
        meta={"title": title}, height=height, template="plotly_white",
        font={"family": FONT, "size": 13, "color": "#1c2430"}, margin={"l": 10, "r": 20, "t": 40, "b": 45},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}, **axes,
    )  # fmt: skip
    return figure


def _height(count: int) -> int:
    return 120 + 34 * count


def _stacked(shown: Sequence[Line]) -> Any:
    unit, factor = _unit(max(one.median or 0 for one in shown))
    figure = _figure("Latency by phase", _height(len(shown)), barmode="stack", bargap=0.35)
    names = [one.cell.arm for one in shown]
    for phase in (phase for phase in PHASES if any(one.phases.get(phase) for one in shown)):
        figure.add_bar(
            y=names, x=[one.phases.get(phase, 0.0) * factor for one in shown], orientation="h", name=NAMED[phase],
            marker={"color": COLOURS[phase], "line": {"color": "white", "width": 1}},
            hovertemplate=f"%{{y}}: {NAMED[phase]} %{{x:.4g}} {unit}<extra></extra>",
        )  # fmt: skip
    return _rows_down(figure, unit)


def _bars(shown: Sequence[Line], engines: Sequence[str]) -> Any:
    unit, factor = _unit(max(one.median or 0 for one in shown))
    figure = _figure("Latency", _height(len(shown)), bargap=0.35)
    figure.add_bar(
        y=[one.cell.arm for one in shown], x=[(one.median or 0) * factor for one in shown], orientation="h",
        marker={"color": [_colour(one, engines) for one in shown]}, showlegend=False,
        error_x={
            "type": "data", "symmetric": False, "thickness": 1.5,
            "array": [((one.high or 0) - (one.median or 0)) * factor for one in shown],
            "arrayminus": [((one.median or 0) - (one.low or 0)) * factor for one in shown],
        },
    )  # fmt: skip
    return _rows_down(figure, unit)


def _rows_down(figure: Any, unit: str) -> Any:
    figure.update_yaxes(autorange="reversed", automargin=True, ticks="", ticksuffix="  ")
    figure.update_xaxes(title=unit, rangemode="tozero", gridcolor="#e8ecf1")
    return figure


def _fidelity(shown: Sequence[Line], engines: Sequence[str]) -> Any:
    """Time against the largest difference of a stage; eager in float32 differs from itself by nothing."""
    unit, factor = _unit(max(one.median or 0 for one in shown))
    figure = _figure("Latency against fidelity", 420)
    least, drawn = 1e-8, []
    for one in shown:
        away = max(one.stages.values(), default=None)
        if away is None:
            continue
        symbol = "circle" if one.cell.precision == "float32" else "diamond"
        drawn.append(max(away, least))
        figure.add_scatter(
            x=[(one.median or 0) * factor], y=drawn[-1:], mode="markers", name=one.cell.arm,
            marker={"color": _colour(one, engines), "size": 13, "symbol": symbol},
            hovertemplate=f"{one.cell.arm}: %{{x:.4g}} {unit}, {away:.1e}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=unit, rangemode="tozero", gridcolor="#e8ecf1")
    figure.update_layout(legend=BESIDE)
    figure.update_yaxes(
        title="largest relative difference of a stage", type="log", range=_decades(drawn)[::-1], gridcolor="#e8ecf1",
        exponentformat="power", dtick=1,
    )  # fmt: skip
    return figure


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around all values, and a little more, so that two of them at least have their mark on the axis."""
    low, high = (math.log10(one) for one in (min(values, default=1.0), max(values, default=1.0)))
    return [math.floor(low) - 0.1, math.floor(high) + 1.1]


def _memory(shown: Sequence[Line]) -> Any:
    figure = _figure("Memory", _height(len(shown)), bargap=0.35, barmode="group")
    kinds = {"rss_mib": ("peak resident", "#0072B2"), "pss_mib": ("its own share, at the end", "#56B4E9"),
             "gpu_mib": ("GPU", "#E69F00")}  # fmt: skip
    for kind, (name, colour) in kinds.items():
        if any(kind in one.memory for one in shown):
            figure.add_bar(
                y=[one.cell.arm for one in shown], x=[one.memory.get(kind, 0) / 1024 for one in shown], name=name,
                orientation="h", marker={"color": colour}, hovertemplate=f"{name} %{{x:.2f}} GiB<extra></extra>",
            )  # fmt: skip
    return _rows_down(figure, "GiB")


def _throughput(done: Sequence[Line]) -> Any | None:
    """Pictures per second by batch, where a scenario varies it."""
    if len({one.cell.batch for one in done}) < 2:
        return None
    engines = list(dict.fromkeys(one.cell.engine for one in done))
    figure = _figure("Pictures per second", 460)
    for arm in dict.fromkeys(one.cell.arm for one in done):
        group = sorted((one for one in done if one.cell.arm == arm), key=lambda one: one.cell.batch)
        shown = [one for one in group if one.per_second is not None]
        dash = "solid" if group[0].cell.precision == "float32" else "dot"
        figure.add_scatter(
            x=[one.cell.batch for one in shown], y=[one.per_second for one in shown], mode="lines+markers", name=arm,
            line={"color": _colour(group[0], engines), "width": 2.5, "dash": dash}, marker={"size": 8},
        )  # fmt: skip
        failed = next((one for one in group if (one.refusal or "").startswith("failed")), None)
        if failed is not None and shown:
            figure.add_scatter(
                x=[failed.cell.batch], y=[shown[-1].per_second], mode="markers", showlegend=False,
                marker={"symbol": "x", "size": 12, "color": _colour(failed, engines)},
                hovertemplate=f"{arm}: batch {failed.cell.batch} {html.escape(failed.refusal or '')}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(legend=BESIDE)
    batches = sorted({one.cell.batch for one in done})
    figure.update_xaxes(title="batch", type="log", tickvals=batches, ticktext=[str(batch) for batch in batches])
    figure.update_yaxes(title="pictures per second", type="log", gridcolor="#e8ecf1", dtick="D2")
    return figure


def _colour(one: Line, engines: Sequence[str]) -> str:
    return ENGINES[engines.index(one.cell.engine) % len(ENGINES)]


def _unit(largest: float) -> tuple[str, float]:
    return ("milliseconds", 1e3) if largest < 1 else ("seconds", 1.0)
