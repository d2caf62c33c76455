#!/usr/bin/env python3
"""Draws training logs, residual traces and the README's figures to a PNG, or puts grids of pictures side by side.

    python3 tools/plot.py runs/emoji/log.csv --out loss.png                        # one run
    python3 tools/plot.py runs/fpdm/log.csv runs/dit/log.csv --names FPDM,DiT --out loss.png
    python3 tools/plot.py trace.csv --out residuals.png                            # of sample_* --trace trace.csv
    python3 tools/plot.py fpdm.png dit.png --names FPDM,DiT --out both.png         # of sample_* --out
    python3 tools/plot.py strip.png --out sampling.gif                             # of sample_* --strip strip.png
    python3 tools/plot.py fixed_point cold.csv warm.csv --out fixed_point.png      # how the iteration settles
    python3 tools/plot.py architecture --out architecture.png                      # the model as a diagram

The first line of a file says what it is: a log of train_* has the columns step and loss, a trace has step, t, iteration
and residual. The traces of fixed_point are of one picture without guidance, first without, then with reuse:

    ./sample_cpu --n 1 --cfg 1 --iters 16 --reuse 0 --trace cold.csv
    ./sample_cpu --n 1 --cfg 1 --iters 16 --reuse 1 --trace warm.csv

Needs numpy, matplotlib and pillow; fixed_point also torch and safetensors, because it samples the same picture with
tools/reference.py to see z, and checks that the residuals of that z are those of the traces.
"""
import argparse
import csv
import io
import math
import sys
from pathlib import Path

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib import font_manager
    from matplotlib.colors import LogNorm
    from matplotlib.patches import FancyBboxPatch
    from matplotlib.ticker import MaxNLocator
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    sys.exit(f"plot.py: needs the Python package {error.name}: pip install -r tools/requirements.txt")

from data import Parser, die, main_of, positive, replace_file  # of this folder

PANELS = {  # what of a log is drawn, where the file has it
    "loss": "loss",
    "mse": "prediction part of the loss",
    "vb": "variance part of the loss, bits",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_s": "images per second",
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # told apart by everyone


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
    def varies(values):
        return len(np.unique(values[np.isfinite(values)])) > 1

    panels = [name for name in PANELS if any(varies(table.get(name, np.zeros(1))) for table in tables)]
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


def read_picture(path, want):
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # a broken picture raises whatever its decoder ran into
        die(f"{path}: {error}; give {want}")


def side_by_side(args):
    """The pictures side by side, in several rows if they are wide, pixel for pixel, each below its name."""
    pictures = [read_picture(path, "PNG files only") for path in args.files]
    names = args.names.split(",") if args.names else [Path(path).stem for path in args.files]
    if len(names) != len(pictures):
        die(f"--names gives {len(names)} names for {len(pictures)} files; give one for each")
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 15)
    gap, head, room = 16, 28, 1400
    places, left, top, bottom = [], 0, 0, 0
    for picture in pictures:
        if left and left + picture.width > room:
            left, top = 0, bottom + gap
        places.append((left, top + head))
        left, bottom = left + picture.width + gap, max(bottom, top + head + picture.height)
    sheet = Image.new("RGB", (max(x + p.width for (x, _), p in zip(places, pictures)), bottom), "white")
    for picture, name, (left, top) in zip(pictures, names, places):
        ImageDraw.Draw(sheet).text((left + 2, top - head + 5), name, "black", font)
        sheet.paste(picture, (left, top))
    replace_file(args.out, lambda file: sheet.save(file, format="PNG", optimize=True))
    print(f"{args.out}: {', '.join(names)}")


def animate(args):
    """A strip as GIF: a frame for each of its columns, the pictures beside each other, x_t above the predicted x0."""
    strip = read_picture(args.files[0], "a strip of sample_* --strip")
    pixels = np.asarray(strip)
    light = [(pixels == 230).all(axis=(axis, 2)) for axis in (1, 0)]  # the gaps, of whole rows and columns
    tops, lefts = ([i for i in range(1, len(gap)) if gap[i - 1] and not gap[i]] for gap in light)
    side = int(np.argmax(light[0][2:])) or 1
    if len(args.files) > 1 or len(tops) % 2 or not lefts or strip.size != tuple(
            n * (side + 2) + 2 for n in (len(lefts), len(tops))):
        die(f"{args.files[0]}: this is not a strip; make one with sample_* --strip")
    frames = []
    for left in lefts + lefts[-1:] * 7:  # the last one stays
        frame = Image.new("RGB", (len(tops) // 2 * (side + 2) + 2, 2 * side + 6), (230, 230, 230))
        for i, top in enumerate(tops):
            picture = strip.crop((left, top, left + side, top + side))
            frame.paste(picture, (2 + i // 2 * (side + 2), 2 + i % 2 * (side + 2)))
        frames.append(frame)
    colours = frames[-1].quantize(256 - 64).getpalette()[: 3 * 192] + frames[0].quantize(64).getpalette()[: 3 * 64]
    palette = Image.new("P", (1, 1))
    palette.putpalette((colours + 768 * [0])[:768])
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    replace_file(args.out, lambda file: frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:],
                                                       duration=150, loop=0))
    print(f"{args.out}: {len(lefts)} timesteps of {len(tops) // 2} pictures")


def sample_solutions(path, table, reuse):
    """Samples the picture of a trace in PyTorch: z_0 ... z_K (K+1,T,D) of every timestep, and the picture (H,W,C)."""
    try:  # here, as all else does without them
        import reference
        import torch
        from safetensors import SafetensorError
    except ImportError as error:
        die(f"fixed_point needs torch and safetensors: {error}")

    torch.set_num_threads(1)
    try:
        cfg, model = reference.load_weights(path)
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        die(f"--weights {path}: {' '.join(str(error).split())[:200]}; give a weight file of train_*")
    if not cfg.fixed_point:
        die(f"--weights {path}: a DiT has no fixed point; give the weights of an FPDM")
    solutions = []

    def observed(x, t, y, n, m, z_0):
        acts = {}
        out, z = model(x, t, y, n, m, z_0, acts)
        solutions.append(torch.cat([acts["pre"] if z_0 is None else z_0, *(acts[f"z.{k + 1}"] for k in range(m))]))
        return out, z

    shape = (1, cfg.channels, cfg.image_size, cfg.image_size)
    noise = torch.from_numpy(reference.normal(math.prod(shape), 0, reference.X_T, 1)).view(shape)  # --seed 1
    iterations = np.bincount(table["step"].astype(int)).tolist()
    sampler = "flow" if cfg.prediction in ("flow", "x") else "ddim"
    x = reference.sample(cfg, observed, noise, torch.tensor([0]), torch.zeros(len(iterations), *shape), sampler,
                         len(iterations), iterations, reuse=reuse)
    return [z.numpy() for z in solutions], np.clip(x[0, :3].permute(1, 2, 0).numpy() / 2 + 0.5, 0, 1)


def read_solutions(path, weights, reuse):
    """A trace, z of all its iterations, and the picture that was drawn."""
    table = read_csv(path)
    if "residual" not in table:
        die(f"{path}: a log, not a trace; give what sample_* --trace wrote")
    if table["step"][0] != 0 or not np.isin(np.diff(table["step"]), (0, 1)).all() or table["step"][-1] == 0:
        die(f"{path}: want the trace of one run with two timesteps or more")
    z, picture = sample_solutions(weights, table, reuse)
    norm = lambda x: np.linalg.norm(x, axis=(1, 2))
    residuals = np.concatenate([norm(np.diff(way, axis=0)) / norm(way[1:]) for way in z])
    if not np.allclose(residuals, table["residual"], rtol=0.02, atol=1e-4):
        die(f"{path}: not of this picture; write it by sample_* --weights {weights} --n 1 --cfg 1 --reuse {reuse:d}")
    return table, z, picture


def spread_out(points, count):
    """Indices of `count` points: first the farthest from the mean, then always the farthest from those before."""
    chosen = [np.linalg.norm(points - points.mean(0), axis=1).argmax()]
    while len(chosen) < count:
        chosen.append(np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(1).argmax())
    return chosen


def plot_fixed_point(args):
    """The residuals of a few timesteps, and at one of them the way of each token's z, in two principal components."""
    if len(args.files) != 3:
        die("fixed_point takes two traces of sample_*, without and with reuse; see --help")
    (cold, cold_z, _), (warm, warm_z, picture) = (
        read_solutions(path, args.weights, reuse) for reuse, path in enumerate(args.files[1:]))
    figure = plt.figure(figsize=(9, 4.2))
    grid = figure.add_gridspec(2, 3, width_ratios=[3.4, 3.9, 1.7], height_ratios=[1, 1.15])
    lines, ways = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    image, near = figure.add_subplot(grid[0, 2]), figure.add_subplot(grid[1, 2])
    styles = {"from h, the pre blocks' output": "-", "reuse: from the timestep before": "--"}

    last = len(warm_z) - 1  # the first timestep has none before it
    for step, colour in zip(np.unique(np.linspace(1, last, 4).round()), plt.cm.viridis(np.linspace(0, 0.8, 4))):
        for table, style in zip((cold, warm), styles.values()):
            rows = table["step"] == step
            lines.plot(table["iteration"][rows], table["residual"][rows], style, color=colour, linewidth=1.5)
        lines.plot([], [], color=colour, label=f"t = {table['t'][rows][0]:.0f}")
    lines.set_yscale("log")
    lines.set_xlabel("iteration k")
    lines.set_ylabel("‖z$_k$ − z$_{k-1}$‖ / ‖z$_k$‖")
    lines.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines.grid(alpha=0.3)
    lines.set_title("How far iteration k still moves z")
    lines.legend(frameon=False, loc="lower left", fontsize=9)

    step = len(cold_z) // 2
    settled = cold_z[step][-1]
    if len(settled) < 5 or len(cold_z[step]) < 4 or len(cold_z) != len(warm_z):
        die("fixed_point: want two traces of equally many timesteps, 3 iterations at least each, and 5 tokens at least")
    _, deviations, directions = np.linalg.svd(settled - settled.mean(0), full_matrices=False)
    cold_way, warm_way = ((z[step] - settled.mean(0)) @ directions[:2].T for z in (cold_z, warm_z))  # (K+1,T,2)
    chosen = spread_out(cold_way[-1], 5)
    ways.plot(*cold_way.transpose(2, 0, 1), color="#ccc", linewidth=0.6)
    ways.plot(*cold_way[-1].T, ".", color="#999", markersize=4)
    patches = math.isqrt(len(settled))
    size = len(picture) / patches
    for token, colour in zip(chosen, COLOURS):
        for axis in (ways, near) if token == chosen[2] else (ways,):
            axis.plot(*cold_way[:, token].T, ".-", color=colour, linewidth=1.5, markersize=5, zorder=3)
            axis.plot(*warm_way[:, token].T, ".--", color=colour, linewidth=1.5, markersize=5, zorder=3)
            axis.plot(*warm_way[0, token], "s", color=colour, markersize=5, zorder=3)
            axis.plot(*cold_way[-1, token], "*", color=colour, markeredgecolor="black", markersize=13, zorder=4)
        corner = token % patches * size - 0.5, token // patches * size - 0.5
        image.add_patch(plt.Rectangle(corner, size, size, fill=False, edgecolor=colour, linewidth=2.2))
    t = cold["t"][cold["step"] == step][0]
    ways.set_title(f"The way of each token's z, t = {t:.0f}")
    ways.set_xlabel("first principal component")
    ways.set_ylabel("second principal component")
    ways.annotate("z$_0$ = h", cold_way[0].mean(0), (0.42, 0.93), textcoords="axes fraction",
                  arrowprops={"arrowstyle": "->", "color": "#444"})
    ways.set_aspect("equal", "datalim")
    image.imshow(picture, interpolation="nearest")
    image.set_title("tokens = patches", fontsize=9)
    image.axis("off")

    token, star = chosen[2], cold_way[-1, chosen[2]]
    for k, other in (1, 2), (2, 1):  # each on the side away from the other
        away = cold_way[k, token] - cold_way[other, token]
        near.annotate(f"z$_{k}$", cold_way[k, token], 9 * away / np.linalg.norm(away), textcoords="offset points",
                      ha="center", va="center", fontsize=9)
    reach = 1.7 * np.abs(np.concatenate([cold_way[1:, token], warm_way[:, token]]) - star).max()
    near.set_xlim(star[0] - reach, star[0] + reach)
    near.set_ylim(star[1] - reach, star[1] + reach)
    near.set_aspect("equal")
    near.set_xticks([])
    near.set_yticks([])
    near.set_title("green, close up", fontsize=9)
    plt.setp(near.spines.values(), visible=True, color="#aaa")

    handles = [plt.Line2D([], [], color="#444", linestyle=style) for style in styles.values()]
    handles[1].set(marker="s", markevery=[0], markersize=5)
    handles.append(plt.Line2D([], [], linestyle="", marker="*", color="#444", markersize=11))
    figure.legend(handles, [*styles, "settled"], ncol=3, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    save_small(figure, args.out)
    share = (deviations[:2]**2).sum() / (deviations**2).sum()
    print(f"{args.out}: t = {t:.0f}; two components hold {100 * share:.0f} % of the settled tokens' variance")


def box(axis, x, y, width, height, words, colour):
    """A box around the words in its middle."""
    axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor="#444",
                                  boxstyle="round,pad=0,rounding_size=0.06"))
    axis.text(x, y, words, ha="center", va="center")


def arrow(axis, *points, color="#444", linestyle="-"):
    """A line through the points, with a head at the last."""
    (x0, y0), (x, y) = points[-2:]
    distance = math.hypot(x - x0, y - y0)
    neck = x - 0.08 * (x - x0) / distance, y - 0.08 * (y - y0) / distance
    axis.plot(*np.transpose(points[:-1] + (neck,)), color=color, linestyle=linestyle, linewidth=1.2, zorder=1)
    axis.annotate("", (x, y), neck, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "color": color})


def plot_architecture(args):
    """The model from left to right, its conditions above it, one iteration in detail below. Places are in inches."""
    block, layer, given, free, graded, reused = "#cfe2f3", "#f3ecd8", "#d9eedb", "#ececec", "#fbe0c6", "#8e3a80"
    skipped = "#2a7f62"
    figure = plt.figure(figsize=(9, 5.2))
    axis = figure.add_axes([0, 0, 1, 1], xlim=(0, 9), ylim=(0, 5.2))
    axis.axis("off")
    say = lambda x, y, words, **style: axis.text(x, y, words, **{"ha": "center", "va": "center", **style})

    # c = embed(t) + embed(y)
    bus, total, row = 4.9, 4.4, 3.0  # heights of embed(y), of the sum, of the model
    say(0.65, bus, "label y")
    box(axis, 1.95, bus, 0.95, 0.36, "embed(y)", given)
    box(axis, 5.55, total, 0.95, 0.36, "embed(t)", given)
    say(6.74, total, "timestep t")
    say(4.75, total, "+", bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "#444"})
    say(4.45, total, "c = embed(t) + embed(y)", ha="right")
    say(5.3, bus + 0.12, "or all of c, with --timestep_in_pre_post 1 (ours)", fontsize=9, color=skipped)
    arrow(axis, (1.0, bus), (1.475, bus))
    arrow(axis, (2.425, bus), (8.0, bus), (8.0, row + 0.3))
    arrow(axis, (7.28, bus), (7.28, row + 0.3))
    arrow(axis, (1.95, bus - 0.18), (1.95, row + 0.3))
    arrow(axis, (4.75, bus), (4.75, total + 0.15))
    arrow(axis, (6.33, total), (6.025, total))
    arrow(axis, (5.075, total), (4.89, total))

    # the model
    say(0.25, row, "x$_t$")
    box(axis, 1.0, row, 0.8, 0.6, "patches\n→ tokens", layer)
    box(axis, 1.95, row, 0.68, 0.6, "pre\nblocks", block)
    box(axis, 7.28, row, 0.62, 0.6, "post\nblocks", block)
    box(axis, 8.0, row, 0.68, 0.6, "final\nlayer", layer)
    say(8.75, row, "out")
    arrow(axis, (0.38, row), (0.6, row))
    arrow(axis, (1.4, row), (1.61, row))
    arrow(axis, (2.29, row), (3.08, row))
    say(2.62, row + 0.12, "h")
    say(3.22, row, "z$_0$")
    say(6.3, row, "z$_{n+m}$")
    arrow(axis, (6.52, row), (6.65, row))
    say(6.75, row, "+", bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": "#444"})
    arrow(axis, (6.85, row), (6.97, row))
    arrow(axis, (7.59, row), (7.66, row))
    arrow(axis, (2.38, row), (2.38, row + 1.05), (6.75, row + 1.05), (6.75, row + 0.1), color=skipped)
    say(3.5, row + 1.15, "h again, with --skip 1 (ours)", fontsize=9, color=skipped)
    arrow(axis, (8.34, row), (8.55, row))

    # the iteration
    inject, reuse = row - 0.65, row - 1.1
    for left, words, colour in ((3.5, "n iterations\nwithout gradient", free),
                                (4.8, "m iterations\nwith gradient", graded)):
        axis.add_patch(plt.Rectangle((left, row - 0.42), 1.2, 1.36, color=colour, zorder=0))
        say(left + 0.6, row + 0.74, words, fontsize=9)
        say(left + 0.6, row, "···", fontweight="bold")
        for x in (left + 0.25, left + 0.95):
            box(axis, x, row, 0.3, 0.4, "f", block)
            arrow(axis, (x, row + 0.47), (x, row + 0.2))
            arrow(axis, (x, inject), (x, row - 0.2))
    for stem in ([(4.75, total - 0.15), (4.75, row + 0.47)], [(3.75, row + 0.47), (5.75, row + 0.47)],
                 [(2.5, row), (2.5, inject + 0.14)], [(2.83, inject), (5.75, inject)]):
        axis.plot(*np.transpose(stem), color="#444", linewidth=1.2, zorder=1)
    box(axis, 2.5, inject, 0.66, 0.28, "inject", layer)
    say(3.03, inject + 0.13, "inj")
    arrow(axis, (3.36, row), (3.6, row))
    arrow(axis, (4.6, row), (4.9, row))
    arrow(axis, (5.9, row), (6.08, row))
    arrow(axis, (6.3, row - 0.15), (6.3, reuse), (3.22, reuse), (3.22, row - 0.15), color=reused, linestyle="--")
    say(4.82, reuse - 0.15, "reuse in sampling: the next timestep starts from this one's solution", color=reused)

    # f
    f = 0.75
    box(axis, 4.5, 0.83, 8.7, 1.42, "", "#f7f9fc")
    say(0.3, 1.35, "f: one iteration, with the same weights every time", ha="left")
    say(0.75, f, "z$_{k-1}$ , inj")
    box(axis, 2.1, f, 1.2, 0.5, "linear, gelu,\nlinear", layer)
    box(axis, 4.35, f, 1.2, 0.5, "LayerNorm,\nattention", block)
    box(axis, 6.55, f, 1.2, 0.5, "LayerNorm,\nMLP", block)
    say(8.45, f, "z$_k$")
    arrow(axis, (1.25, f), (1.5, f))
    for left, middle, plus in ((2.7, 4.35, 5.4), (5.55, 6.55, 7.6)):
        arrow(axis, (left, f), (middle - 0.6, f))
        arrow(axis, (middle + 0.6, f), (plus - 0.15, f))
        arrow(axis, (left + 0.15, f), (left + 0.15, f - 0.42), (plus, f - 0.42), (plus, f - 0.15))
        say(plus, f, "+", bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "#444"})
        arrow(axis, (middle, 1.22), (middle, f + 0.25))
        say(middle + 0.06, 1.13, "c: shift, scale, gate", ha="left", fontsize=9)
    arrow(axis, (7.75, f), (8.25, f))
    save_small(figure, args.out)
    print(f"{args.out}: the architecture")


def save_small(figure, path):
    """A figure for the README: 1800 pixels across, 256 colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=200, format="png")
    few = Image.open(drawn).convert("RGB").quantize(256)
    replace_file(path, lambda file: few.save(file, format="PNG", optimize=True))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="log.csv of training runs, traces of sample_* --trace, PNGs; "
                        "or fixed_point and two traces; or architecture")
    parser.add_argument("--out", required=True, help="the PNG to write, or of a strip the GIF")
    parser.add_argument("--names", help="what to call the files, commas between (default: as they are called)")
    parser.add_argument("--columns", help="which columns of a log to draw, commas between (default: those that change)")
    parser.add_argument("--smooth", type=positive, help="steps in the running mean (default: a fiftieth of the run)")
    parser.add_argument("--weights", default="weights/shapes.safetensors", help="fixed_point: of which model")
    parser.add_argument("--title", help="over the picture")
    main_of(draw, parser.parse_args())


def draw(args):
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    first = args.files[0]
    figure = {"fixed_point": plot_fixed_point, "architecture": plot_architecture}.get(first)
    if figure or first.endswith(".png"):
        (figure or (animate if args.out.endswith(".gif") else side_by_side))(args)
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
    plt.suptitle((plot_traces if all(traces) else plot_logs)(tables, names, args), fontweight="bold")
    plt.tight_layout()
    replace_file(args.out, lambda file: plt.savefig(file, dpi=120, format="png"))
    print(f"{args.out}: {'residuals' if all(traces) else 'log'} of {', '.join(names)}")


if __name__ == "__main__":
    main()
