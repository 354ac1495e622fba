"""Curves of a run: losses, learning rate and speed, smoothed, with the raw line faint behind, and zoomed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from webui.job_panel import COLOURS, curves, legend
from webui.jobs import Job
from webui.page_base import Page
from webui.readers import Point, curve, sample_points
from webui.texts import say
from webui.workspace import Refused

Pairs = list[tuple[int, float]]
KINDS = ("train", "val")
RAW = "raw "  # before a series' name: as it was logged, behind its smoothed line
PLOTS = {"mel_loss": ("training.mel_loss", KINDS), "text_loss": ("training.text_loss", KINDS),
         "lr": ("training.lr_curve", ("train",)), "tokens_per_second": ("training.speed_curve", ("train",))}
PARTS = [str(number) for number in range(1, 9)]  # languages and manifests of the validation, by number
MOST_POINTS = 500  # of one line
MOST_DRAWN = 16  # drawings that are remembered


def is_smoothed(name: str, kind: str) -> bool:
    """Validations are few and their own mean, and a learning rate has no noise: smoothed lines of them would lag."""
    return kind == "train" and name != "lr"


def smoothed(pairs: Sequence[tuple[int, float]], weight: float) -> Pairs:
    """The exponential moving average of values, without a bias towards 0 at the start. weight: from 0 (none) to 1."""
    average, total, result = 0.0, 0.0, []
    for step, value in pairs:
        average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
        result.append((step, average / total))
    return result


def within(pairs: Sequence[tuple[int, float]], zoom: Sequence[float]) -> Pairs:
    """Those of the steps from zoom[0] to zoom[1]; all for []."""
    return [pair for pair in pairs if zoom[0] <= pair[0] <= zoom[1]] if zoom else list(pairs)


def rows_of(name: str, pairs: Sequence[tuple[int, float]], weight: float, zoom: Sequence[float],
            limit: int = MOST_POINTS) -> list[tuple[int, float, str]]:
    """Rows (step, value, series) of a line; with a weight the smoothed one and, first, the raw one."""
    lines = {f"{RAW}{name}": pairs, name: smoothed(pairs, weight)} if weight else {name: pairs}
    return [(step, value, series) for series, line in lines.items()
            for step, value in sample_points(within(line, zoom), limit // len(lines))]


def with_raw(names: Sequence[str]) -> list[str]:
    return [*(f"{RAW}{name}" for name in names), *names]


def create_curve_plot(page: Page, key: str, names: Sequence[str], **options: Any) -> Any:
    """A plot of lines with these names, each with room for its raw line."""
    colours = dict(zip(names, COLOURS, strict=False))
    plot = gr.LinePlot(x="step", y="value", color="series", label=say(key, "en"), x_title=" ", y_title=" ",
                       colors_in_legend=[], color_map={**{f"{RAW}{name}": f"{colour}40" for name, colour in
                                                          colours.items()}, **colours}, **options)
    return page.labelled(plot, label=key)


def part_names(points: Sequence[Point]) -> list[str]:
    return sorted({str(point.get("manifest", "")) for point in points if point["kind"] == "val_part"})[:len(PARTS)]


def drawing(points: Sequence[Point], weight: float, zoom: Sequence[float]) -> list[Any]:
    """The value of each of PLOTS, and of the plot of parts."""
    drawn = []
    for name, (_, kinds) in PLOTS.items():
        rows = [row for kind in kinds for row in rows_of(kind, curve(points, kind, name, len(points) or 1),
                                                         weight if is_smoothed(name, kind) else 0.0, zoom)]
        drawn.append(curves(rows, with_raw(kinds)))
    rows = [row for number, part in zip(PARTS, part_names(points), strict=False) for row in rows_of(
        number, curve([point for point in points if point.get("manifest") == part], "val_part", "mel_loss",
                      len(points)), 0.0, zoom, MOST_POINTS // 2)]
    return [*drawn, curves(rows, PARTS)]


class Drawings:
    """What was drawn last: most looks find nothing new in the metrics."""

    def __init__(self) -> None:
        self.known: OrderedDict[tuple[Any, ...], list[Any]] = OrderedDict()

    def of(self, folder: Path, points: Sequence[Point], weight: float, zoom: Sequence[float]) -> list[Any]:
        ends = [(point["run"], point["step"], point["kind"]) for point in (points[0], points[-1])] if points else []
        key = (folder, len(points), *ends, weight, *zoom)
        drawn = self.known.get(key) or drawing(points, weight, zoom)
        self.known[key] = drawn
        while len(self.known) > MOST_DRAWN:
            self.known.pop(next(iter(self.known)), None)
        return drawn


def create_smoothing(page: Page, name: str) -> Any:
    return page.add(gr.Slider, "curves.smoothing", minimum=0, maximum=0.95, step=0.05, value=0, buttons=[],
                    elem_id=f"{name}-smoothing", min_width=200)


def connect_zoom(page: Page, plots: Sequence[Any], whole: Any) -> Any:
    """Returns the State of the zoom: [], or first and last step. Dragging over a plot sets it for all of them."""
    zoom = gr.State([])

    def zoom_in(selected: gr.SelectData) -> list[float]:
        first, last = selected.index
        return [float(first), float(last)] if last > first else []

    page.act([plot.select for plot in plots], zoom_in, [], [zoom])
    page.act([whole.click, *(plot.double_click for plot in plots)], lambda: [], [], [zoom])
    return zoom


def create_curves(page: Page, output_dir: Any) -> None:
    """The curves of the run in the output directory, or a sentence where there are none yet."""
    none = gr.Markdown(elem_id="training-no-curves", elem_classes=["tips"])
    with gr.Column(visible=False) as shown:
        key = gr.HTML(elem_classes=["keys"], padding=False)
        with gr.Row(elem_classes=["line"]):
            smoothing = create_smoothing(page, "training")
            whole = page.button("curves.whole", visible=False, size="sm", scale=0, min_width=160,
                                elem_id="training-whole")
        plots = []
        for names in (("mel_loss", "text_loss"), ("lr", "tokens_per_second")):
            with gr.Row():
                plots += [create_curve_plot(page, PLOTS[name][0], PLOTS[name][1], height=220, min_width=220,
                                            elem_id=f"training-{name}") for name in names]
        with gr.Column(visible=False) as parts:
            of_parts = gr.HTML(elem_classes=["keys"], padding=False)
            plots.append(create_curve_plot(page, "curves.parts", PARTS, height=220, elem_id="training-parts-plot"))
        page.prose("curves.zoom", elem_classes=["tips"])
    zoom, drawings = connect_zoom(page, plots, whole), Drawings()

    def look(jobs: Sequence[Job], language: str, typed_dir: str, weight: float, zoomed: list[float]) -> list[Any]:
        try:
            folder = page.workspace.inside(typed_dir)
        except Refused:
            folder = page.workspace.private  # where no run is
        points = page.reader(folder).points()
        names = part_names(points)
        limits = gr.update(visible=bool(zoomed))
        drawn = [{**gr.update(x_lim=zoomed or None), "value": frame}
                 for frame in drawings.of(folder, points, float(weight or 0), zoomed)]
        return ["" if points else say("curves.none", language), gr.update(visible=bool(points)),
                legend([say(f"series.{kind}", language) for kind in KINDS]), limits,
                gr.update(visible=len(names) > 1), legend(names), *drawn]

    page.watch("training", [output_dir, smoothing, zoom], [none, shown, key, whole, parts, of_parts, *plots], look)
