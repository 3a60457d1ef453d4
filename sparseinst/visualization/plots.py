"""Plot the course of a training and the quality of an evaluation, as PNG files.

Figures are drawn by matplotlib's Agg without pyplot, so that they need no window and change no global state.
"""

import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

# More curves of classes look too much the same.
_MAX_NAMED_CURVES = 10
# Counts are written into the cells of matrices up to this size.
_MAX_COUNTED = 25
# Larger matrices show the most frequent classes.
_MAX_CLASSES = 80
# Longer names are cut.
_MAX_NAME = 22


def draw_curves(metrics: Sequence[Mapping[str, float]], iterations_per_epoch: float | None = None) -> bytes:
    """Plot losses, learning rates and AP over the iterations.

    Args:
        metrics: dicts with ``iteration`` and any of the scalars of metrics.json.
        iterations_per_epoch: adds an axis in epochs; None: without.

    Returns:
        A PNG file.

    Raises:
        ValueError: no dict has a loss.
    """
    curves = {}
    for entry in metrics:
        for name, value in entry.items():
            curves.setdefault(name, []).append((entry["iteration"] + 1, value))
    losses = sorted(name for name in curves if "loss" in name.rpartition("/")[2])
    if not losses:
        raise ValueError("the metrics have no losses")
    rates = [name for name in ("lr_heads", "lr_backbone") if name in curves] or [
        name for name in ("lr",) if name in curves
    ]
    scores = [name for name in curves if name.endswith(("segm/AP", "segm/AP50", "bbox/AP"))]
    figure = Figure(figsize=(10, 10), layout="constrained")
    loss_axes, ap_axes, rate_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))

    for name in losses:
        is_total = name == "total_loss"
        x, y = np.array(curves[name]).T
        loss_axes.plot(
            x, y, label=name, color="black" if is_total else None, linewidth=2 if is_total else 1.2, alpha=0.85
        )
    loss_axes.set(ylabel="loss, median of 20 iterations", yscale="log", title="Losses fall while the model learns")
    for name in sorted(scores, reverse=True):
        x, y = np.array(curves[name]).T
        task, _, figure_name = name.rpartition("/")
        label = f"{figure_name} of {'masks' if task.endswith('segm') else 'boxes'}"
        defined = ~np.isnan(y)
        label += f": {y[-1]:.1f}" + (f", best {y[defined].max():.1f}" if defined.sum() > 1 else "")
        ap_axes.plot(x, y, "o-", markersize=4, label=label)
    ap_axes.set(ylim=(0, 100), ylabel="AP, percent", title="AP of the validation images: higher is better")
    if not scores:
        ap_axes.text(0.5, 0.5, "not evaluated", transform=ap_axes.transAxes, ha="center")
    for name in rates:
        x, y = np.array(curves[name]).T
        label = name.removeprefix("lr_").replace("lr", "all parameters")
        rate_axes.plot(x, y, "--" if "backbone" in name else "-", label=label)
    rate_axes.set(ylabel="learning rate", xlabel="iteration", ylim=(0, None), title="Learning rate")
    for axes in (loss_axes, ap_axes, rate_axes):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    rate_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if iterations_per_epoch:
        epochs = loss_axes.secondary_xaxis(
            "top", functions=(lambda x: x / iterations_per_epoch, lambda x: x * iterations_per_epoch)
        )
        epochs.set_xlabel("epoch")
    return _png(figure)


def draw_speed(rows: Sequence[Mapping], machine: str) -> bytes:
    """Plot published AP against the measured time of an image, end to end with 50 objects.

    Args:
        rows: of `sparseinst.benchmarks.suites.run_suite`; those without a published AP are not shown.
        machine: where the times were measured.

    Returns:
        A PNG file: filled marks at each model's own input size, open ones at the common size.
    """
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    sizes = list(rows[0]["ms"])
    rows = [row for row in rows if row["published_ap"] is not None]
    families = sorted({row["family"] for row in rows})
    # Names of neighbors in AP stand on different sides of their marks.
    places = itertools.cycle(((6, 6, "left"), (-6, 6, "right"), (6, -13, "left")))
    for row, (x, y, side) in zip(sorted(rows, key=lambda row: -row["published_ap"]), places):
        color = f"C{families.index(row['family'])}"
        times = [row["ms"][size]["50"]["end to end"]["median_ms"] for size in sizes]
        for time, fill in zip(times, (color, "none")):
            axes.scatter(time, row["published_ap"], s=70, facecolor=fill, edgecolor=color, zorder=3)
        axes.plot(times, [row["published_ap"]] * len(times), color=color, alpha=0.3)
        name = row["config"].rpartition("/")[2].removesuffix(".yaml") + (" *" if row["split"] != "val2017" else "")
        axes.annotate(name, (times[0], row["published_ap"]), (x, y), textcoords="offset points", fontsize=8, ha=side)
    axes.set(
        xscale="log", xlabel="milliseconds for one image, end to end, 50 objects",
        ylabel="published mask AP (* test-dev)",
        title=f"Filled: own input size; open: common size\n{machine}",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3, which="both")
    return _png(figure)


def draw_ap_over_time(rows: Sequence[Mapping]) -> bytes:
    """Return `ap_over_time_figure` as a PNG file."""
    return _png(ap_over_time_figure(rows))


def ap_over_time_figure(rows: Sequence[Mapping]) -> Figure:
    """Plot mask AP over the minutes of training, the mean of the seeds with their range; a diagram for each data set.

    Args:
        rows: of `sparseinst.tools.compare_recipes.Comparison.table`.
    """
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        shown = [row for row in rows if row["data"] == name]
        for recipe in dict.fromkeys(row["recipe"] for row in shown):
            points = [(row["minutes"], np.array(row["AP"])) for row in shown if row["recipe"] == recipe]
            minutes, means = zip(*((minutes, values.mean()) for minutes, values in points))
            ends = zip(*((values.mean() - values.min(), values.max() - values.mean()) for _, values in points))
            axes.errorbar(minutes, means, yerr=list(ends), marker="o", capsize=3, label=_short(recipe))
        axes.set(title=_short(name), xlabel="minutes of training", ylabel="mask AP", xscale="log", ylim=(0, None))
        ticks = sorted({row["minutes"] for row in shown})
        # Numbers that are closer overlap.
        axes.set_xticks([tick for tick, previous in zip(ticks, [0, *ticks]) if tick > 1.15 * previous])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def draw_precision_recall(
    precision: Mapping[float, np.ndarray], class_names: Sequence[str], score: float, best: tuple[float, float]
) -> bytes:
    """Return `precision_recall_figure` as a PNG file."""
    return _png(precision_recall_figure(precision, class_names, score, best))


def precision_recall_figure(
    precision: Mapping[float, np.ndarray], class_names: Sequence[str], score: float, best: tuple[float, float]
) -> Figure:
    """Plot precision over recall: the mean of the classes for each IoU, and each class for the smallest IoU.

    Args:
        precision: IoU to COCO's precision (101, K) at recalls 0, 0.01, ..., 1; NaN for absent classes.
        class_names: of the K classes.
        score: the score with the best F1.
        best: (recall, precision) at this score.
    """
    recall = np.linspace(0, 1, 101)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    first = precision[min(precision)]
    present = [index for index in range(len(class_names)) if not np.isnan(first[0, index])]
    if len(present) > 1:
        named = len(present) <= _MAX_NAMED_CURVES
        color, alpha = (None, 0.8) if named else ("tab:gray", 0.25)
        for index in sorted(present, key=lambda index: -first[:, index].mean()):
            label = f"AP50 {100 * first[:, index].mean():.1f}: {_short(class_names[index])}" if named else None
            if not named and index == present[0]:
                label = f"each class, IoU {min(precision):g}"
            axes.plot(recall, first[:, index], linewidth=1, alpha=alpha, label=label, color=color)
    for iou, style in zip(sorted(precision), ("-", "--", ":")):
        mean = precision[iou][:, present].mean(1) if present else np.zeros(101)
        label = f"mean of {len(present)} classes, IoU {iou:g}" if len(present) > 1 else f"IoU {iou:g}"
        label = f"AP{round(100 * iou)} {100 * mean.mean():.1f}: {label}"
        axes.plot(recall, mean, style, color="black", linewidth=2.5, label=label)
    label = f"all objects, score {score:.2f}: the best F1 (IoU 0.5)"
    axes.plot(*best, "o", color="tab:red", markersize=9, label=label, zorder=5)
    axes.set(xlim=(0, 1), xlabel="recall: share of the objects that are found")
    axes.set(ylim=(0, 1.02), ylabel="precision: share of the predictions that are right")
    axes.set_title("Precision and recall of the masks: the further up and right, the better")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], score: float) -> bytes:
    """Return `confusion_figure` as a PNG file."""
    return _png(confusion_figure(matrix, class_names, score))


def confusion_figure(matrix: np.ndarray, class_names: Sequence[str], score: float) -> Figure:
    """Plot a confusion matrix; small matrices have the counts.

    Colors are shares of the objects of a class; in the last row, of the predictions of a class.

    Args:
        matrix: (K + 1, K + 1) counts, rows: objects, columns: predictions, background last.
        class_names: of the K classes.
        score: the least score of the predictions.
    """
    # Of many classes the most frequent are shown, and none that does not occur.
    counts = matrix[:-1].sum(1) + matrix[:, :-1].sum(0)
    shown = [int(index) for index in np.sort(np.argsort(-counts, kind="stable")[:_MAX_CLASSES]) if counts[index]]
    part = matrix[np.ix_([*shown, -1], [*shown, -1])]
    names = [_short(class_names[index]) for index in shown]
    side = len(part)
    is_small = side <= _MAX_COUNTED
    size = max(6.0, side * (0.45 if is_small else 0.18) + 2.5)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = part / np.maximum(part.sum(1, keepdims=True), 1)
    shares[-1] = part[-1] / np.maximum(part.sum(0), 1)
    # The root makes small shares visible.
    cells = axes.pcolormesh(
        np.ma.masked_equal(shares, 0), cmap="Blues", norm=PowerNorm(0.5, 0, 1), edgecolors="0.88", linewidth=0.5
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    font = 9 if is_small else 8
    middles = np.arange(side) + 0.5
    axes.set_xticks(middles, [*names, "(missed)"], rotation=90, fontsize=font)
    axes.set_yticks(middles, [*names, "(no object)"], fontsize=font)
    axes.axhline(side - 1, color="black", linewidth=1)
    axes.axvline(side - 1, color="black", linewidth=1)
    for (row, column), count in np.ndenumerate(part) if is_small else ():
        if count:
            color = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column + 0.5, row + 0.5, f"{count}", ha="center", va="center", fontsize=font, color=color)
    axes.set(xlabel="predicted class", ylabel="class of the object")
    axes.set_title(confusion_summary(matrix, class_names, score, len(shown)), fontsize=10 if is_small else 12)
    figure.colorbar(cells, ax=axes, shrink=0.5, aspect=30, label="share of the row; last row: share of the column")
    return figure


def confusion_summary(matrix: np.ndarray, class_names: Sequence[str], score: float, num_shown: int) -> str:
    """Return the figures of a confusion matrix and its three most frequent confusions in lines of text.

    Args:
        matrix, class_names, score: as in `confusion_figure`.
        num_shown: classes that the figure shows.
    """
    confused = matrix[:-1, :-1] * (1 - np.eye(len(class_names), dtype=np.int64))
    objects, found, missed = matrix[:-1].sum(), np.trace(matrix[:-1, :-1]), matrix[:-1, -1].sum()
    lines = [
        f"{objects} objects: {found} right, {confused.sum()} with another class, {missed} missed",
        f"{matrix[-1].sum()} predictions without an object",
        f"(mask IoU at least 0.5, score at least {score:.2f}: the best F1)",
    ]
    worst = [np.unravel_index(index, confused.shape) for index in np.argsort(-confused, axis=None, kind="stable")[:3]]
    pairs = [
        f"{_short(class_names[row])} as {_short(class_names[column])} {confused[row, column]}"
        for row, column in worst
        if confused[row, column]
    ]
    if pairs:
        lines.append(f"Most often confused: {', '.join(pairs)}")
    if num_shown < len(class_names):
        reason = "with the fewest objects" if num_shown == _MAX_CLASSES else "that do not occur"
        lines.append(f"{len(class_names) - num_shown} classes {reason} are not shown")
    return "\n".join(lines)


def _short(name: str) -> str:
    """Return a name as matplotlib shows it: $ would start a formula."""
    name = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
    return name.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
