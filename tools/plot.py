#!/usr/bin/env python3
"""Draws training logs or residual traces to a PNG, or puts grids of pictures side by side.

    python3 tools/plot.py runs/emoji/log.csv --out loss.png                        # one run
    python3 tools/plot.py runs/fpdm/log.csv runs/dit/log.csv --names FPDM,DiT --out loss.png
    python3 tools/plot.py trace.csv --out residuals.png                            # of sample_* --trace trace.csv
    python3 tools/plot.py fpdm.png dit.png --names FPDM,DiT --out both.png         # of sample_* --out

The first line of a file says what it is: a log of train_* has the columns step and loss, a trace has step, t, iteration
and residual. Needs numpy, matplotlib and pillow.
"""
import argparse
import csv
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

PANELS = {  # what of a log is drawn, where the file has it
    "loss": "loss",
    "mse": "prediction part of the loss",
    "vb": "variance part of the loss, bits",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_s": "images per second",
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # told apart by everyone


def die(message):
    print(f"plot.py: {message}", file=sys.stderr)
    sys.exit(1)


def read_csv(path):
    """The columns of a CSV file with a header, as floats. A last line that its program has not finished is left out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names, *lines = [line for line in csv.reader(file) if line] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        die(f"{path}: {error}; want the log.csv of a training run, or what sample_* --trace wrote")
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append([float(value) for value in line])
            if len(line) != len(names):
                raise ValueError(f"{len(line)} values for {len(names)} columns")
        except ValueError as error:
            if number < len(lines) - 1:
                die(f"{path}: row {number + 2}: {error}; correct or remove that row")
            rows = rows[:number]
    table = dict(zip((name.strip() for name in names), np.array(rows).T))
    if not table or not ({"step", "loss"} <= table.keys() or {"step", "t", "iteration", "residual"} <= table.keys()):
        die(f"{path}: no rows with step and loss, nor with step, t, iteration and residual; give a log.csv or a trace")
    return table


def running_mean(values, window):
    """The mean of the `window` values around each, of fewer at the ends and where there are NaNs."""
    ones = np.isfinite(values).astype(float)
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.where(ones > 0, values, 0), kernel, "same")
    with np.errstate(invalid="ignore"):
        return total / np.convolve(ones, kernel, "same")


def plot_logs(tables, names, args):
    """A panel for each quantity, a colour for each run: every step light, the running mean over it."""
    panels = [name for name in PANELS if any(np.ptp(table.get(name, np.zeros(1))) > 0 for table in tables)]
    panels = args.columns.split(",") if args.columns else panels or ["loss"]
    across = 1 if len(panels) == 1 else 2
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(down, across, figsize=(6.4 * across, 3.7 * down), squeeze=False, sharex=True)
    for axis, name in zip(axes.flat, panels):
        lowest, highest = [], []
        for table, run, colour in zip(tables, names, COLOURS * len(tables)):
            if name not in table:
                continue
            step, values = table["step"], table[name]
            smooth = values if name == "lr" else running_mean(values, args.smooth or max(1, len(values) // 50))
            axis.plot(step, values, color=colour, alpha=0.2, linewidth=0.6)
            axis.plot(step, smooth, color=colour, linewidth=1.6, zorder=3, label=run)
            lowest.append(np.nanmin(smooth, initial=np.inf))
            highest.append(np.nanmax(smooth, initial=0))
        if not lowest:
            die(f"no file has a column {name}; they have {', '.join(tables[0])}")
        if name != "lr" and 0 < 10 * min(lowest) < max(highest):
            axis.set_yscale("log")
        axis.set_ylabel(PANELS.get(name, name))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis in axes.flat[max(0, len(panels) - across) : len(panels)]:
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    if len(tables) > 1:
        axes.flat[0].legend(frameon=False)
    return args.title or "Training: " + ", ".join(names)


def plot_traces(tables, names, args):
    """A row for each file: the residuals of each timestep as a line, and all of them as a heat map."""
    figure, axes = plt.subplots(len(tables), 2, figsize=(12.8, 4.6 * len(tables)), squeeze=False)
    residuals = np.concatenate([table["residual"] for table in tables])
    residuals = residuals[np.isfinite(residuals) & (residuals > 0)]
    if len(residuals) == 0:
        die("no residual above 0 to draw; look into the trace")
    span = LogNorm(residuals.min(), residuals.max() if residuals.max() > residuals.min() else 2 * residuals.max())
    for (lines, heat), table, name in zip(axes, tables, names):
        t, iteration = table["t"].astype(int), table["iteration"].astype(int)
        times = np.unique(t)[::-1]  # sampling goes from large t to small
        first, last = iteration.min(), iteration.max()
        grid = np.full((len(times), last - first + 1), np.nan)
        grid[np.searchsorted(-times, -t), iteration - first] = table["residual"]
        grid = np.ma.masked_invalid(np.where(grid > 0, grid, np.nan))
        ticks = np.arange(first, last + 1)

        shade = plt.cm.ScalarMappable(plt.Normalize(times.min(), max(times.max(), times.min() + 1)), "viridis_r")
        for row, time in zip(grid, times):
            lines.plot(ticks, row, color=shade.to_rgba(time), linewidth=1.3, marker=".", markersize=4)
        lines.set_yscale("log")
        lines.set_ylim(span.vmin / 1.3, span.vmax * 1.3)
        lines.set_xlabel("iteration")
        lines.set_ylabel("residual  ‖z$_k$ − z$_{k-1}$‖ / ‖z$_k$‖")
        lines.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines.grid(alpha=0.3, which="both")
        plt.colorbar(shade, ax=lines, label="timestep t")

        image = heat.imshow(grid, aspect="auto", norm=span, cmap="magma", interpolation="nearest",
                            extent=(first - 0.5, last + 0.5, len(times) - 0.5, -0.5))
        heat.set_facecolor("#ddd")  # iterations that a timestep did not have
        heat.xaxis.set_major_locator(MaxNLocator(integer=True))
        shown = np.unique(np.linspace(0, len(times) - 1, min(len(times), 11)).round().astype(int))
        heat.set_yticks(shown)
        heat.set_yticklabels(times[shown])
        heat.set_xlabel("iteration")
        heat.set_ylabel("timestep t, in sampling order")
        plt.colorbar(image, ax=heat, label="residual")
        if len(tables) > 1:
            lines.set_title(name)
            heat.set_title(name)
    return args.title or "How far each fixed-point iteration still moves: " + ", ".join(names)


def side_by_side(args):
    """The pictures in a row, pixel for pixel, each below its name."""
    try:
        pictures = [Image.open(path).convert("RGB") for path in args.files]
    except OSError as error:
        die(f"{error}; give PNG files only")
    names = args.names.split(",") if args.names else [Path(path).stem for path in args.files]
    if len(names) != len(pictures):
        die(f"--names gives {len(names)} names for {len(pictures)} files; give one for each")
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 15)
    gap, head = 16, 28
    height = max(picture.height for picture in pictures)
    row = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, height + head), "white")
    left = 0
    for picture, name in zip(pictures, names):
        ImageDraw.Draw(row).text((left + 2, 5), name, "black", font)
        row.paste(picture, (left, head))
        left += picture.width + gap
    save(args.out, lambda: row.save(args.out, format="PNG", optimize=True))
    print(f"{args.out}: {', '.join(names)}")


def save(path, write):
    try:
        write()
    except OSError as error:
        die(f"--out {path}: {error.strerror}; give a path in a folder that can be written")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="log.csv of training runs, traces of sample_* --trace, or PNGs")
    parser.add_argument("--out", required=True, help="the PNG to write")
    parser.add_argument("--names", help="what to call the files, commas between (default: as they are called)")
    parser.add_argument("--columns", help="which columns of a log to draw, commas between (default: those that change)")
    parser.add_argument("--smooth", type=int, help="steps in the running mean (default: a fiftieth of the run)")
    parser.add_argument("--title", help="over the picture")
    parser.error = lambda message: die(f"{message}; see --help")
    args = parser.parse_args()

    if args.files[0].endswith(".png"):
        side_by_side(args)
        return
    tables = [read_csv(path) for path in args.files]
    paths = [Path(path).resolve() for path in args.files]
    names = args.names.split(",") if args.names else [p.parent.name if p.stem == "log" else p.stem for p in paths]
    if len(names) != len(tables):
        die(f"--names gives {len(names)} names for {len(tables)} files; give one for each")
    traces = ["residual" in table for table in tables]
    if any(traces) and not all(traces):
        trace, log = args.files[traces.index(True)], args.files[traces.index(False)]
        die(f"{trace} is a trace and {log} a log; draw one kind at a time")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    plt.suptitle((plot_traces if all(traces) else plot_logs)(tables, names, args), fontweight="bold")
    plt.tight_layout()
    save(args.out, lambda: plt.savefig(args.out, dpi=120, format="png"))
    print(f"{args.out}: {'residuals' if all(traces) else 'log'} of {', '.join(names)}")


if __name__ == "__main__":
    main()
