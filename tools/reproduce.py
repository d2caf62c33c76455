#!/usr/bin/env python3
"""Trains a fixed-point model and its rivals, measures the paper's claims, and writes tables and plots.

    python3 tools/reproduce.py --scale laptop       # about two hours on 2 cores; --scale gpu: larger
    python3 tools/reproduce.py --scale laptop --data cifar10.safetensors --out reproduce_cifar --results my_results

It builds and runs train_cpu and sample_cpu (the GPU programs if nvidia-smi sees a GPU) and judges pictures with
tools/evaluate.py. Stop it whenever you like: the same command goes on where it stopped, and once all is measured it
writes the report again at once. Everything it did is in --out (runs, points.json); the report is claims.md and its
plots in --results. Guidance is off in all measurements, so that a block pass is a block pass. --scale smoke is a
self-test of this program in a minute: its models are too small and too little trained to say anything of the claims.
"""
import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

# What differs between the scales. `phases`: (step at the end, factor on the learning rate); `seeds`: of training, each
# with a sampling seed of its own; `per_step`: iterations per timestep of the fixed point that are tried at each budget.
SCALES = {
    "smoke": dict(image_size=16, width=32, heads=2, patch=4, depth=8, rival_depth=6, batch=32, warmup=20, ema=0.98,
                  phases=[(120, 1), (150, 0.2)], tune_steps=40, lrs=[8e-3, 1.6e-2], seeds=2, pictures=200, real=800,
                  budgets=[12, 24], per_step=[1, 2], solver_iters=[2, 4], unroll_iters=[1, 4], tols=[0.1],
                  trace_iters=6),
    "laptop": dict(image_size=24, width=128, heads=4, patch=4, depth=8, rival_depth=6, batch=64, warmup=100, ema=0.995,
                   phases=[(1600, 1), (2000, 0.2)], tune_steps=300, lrs=[1e-3, 2e-3, 4e-3], seeds=3, pictures=1500,
                   real=10000, budgets=[12, 18, 24, 36, 60, 120], per_step=[1, 2, 4, 10],
                   solver_iters=[2, 4, 8], unroll_iters=[1, 2, 4, 8], tols=[0.1, 0.05, 0.02], trace_iters=16),
    "gpu": dict(image_size=32, width=384, heads=6, patch=2, depth=12, rival_depth=9, batch=256, warmup=500, ema=0.999,
                phases=[(8000, 1), (10000, 0.2)], tune_steps=500, lrs=[5e-4, 1e-3, 2e-3], seeds=3, pictures=10000,
                real=50000, budgets=[18, 27, 36, 72, 144, 288], per_step=[1, 2, 4, 10], solver_iters=[2, 4, 8],
                unroll_iters=[1, 2, 4, 8, 16], tols=[0.1, 0.05, 0.02], trace_iters=16),
}
METRICS = ["fd", "precision", "recall", "recognised"]


def die(message):
    print(f"reproduce.py: {message}", file=sys.stderr)
    sys.exit(1)


def contenders(scale):
    """name -> (words for the reader, options of train_*). n and m of the fixed point: depth - 2 iterations at most
    without, half of the depth with gradient; the rivals of the training method get as many iterations on average."""
    whole = scale["depth"] - 2
    some = whole // 2
    n, m = [0, some], [1, some + 1]
    return {
        "fpdm": ("FPDM, S-JFB", dict(no_grad_iters=n, grad_iters=m)),
        "dit_cost": ("DiT, same training cost", dict(fixed_point=0, depth=scale["rival_depth"])),
        "dit_params": ("DiT, same parameters", dict(fixed_point=0, depth=3)),
        "one_step": ("FPDM, one step", dict(no_grad_iters=[0, whole], grad_iters=[1, 1])),
        "unroll": ("FPDM, full unrolling", dict(no_grad_iters=[0, 0], grad_iters=[whole, whole])),
    }


def flops(scale, options, iterations):
    """(forward of one picture, training step of one picture), multiply-adds count two, projections included."""
    D, T = scale["width"], (scale["image_size"] // scale["patch"])**2
    block, project, inject = T * (24 * D * D + 4 * T * D), T * 8 * D * D, T * 6 * D * D
    if "fixed_point" in options:
        return options["depth"] * block, 3 * options["depth"] * block
    n, m = (sum(options[key]) / 2 for key in ("no_grad_iters", "grad_iters"))
    forward = 2 * block + inject + iterations * (block + project)
    return forward, 3 * (2 * block + inject + m * (block + project)) + n * (block + project)


class Failed(Exception):
    """A program of ours ended with an error."""


class Experiment:
    def __init__(self, args):
        self.args, self.scale, self.out = args, SCALES[args.scale], args.out
        self.runs = contenders(self.scale)
        self.target = args.target
        self.trained_seconds = self.trained_flops = 0.0  # in this session, for the time left
        os.makedirs(self.out, exist_ok=True)
        setup = {"scale": args.scale, "data": args.data, "target": self.target, **self.scale}
        setup = json.loads(json.dumps(setup))
        path = os.path.join(self.out, "setup.json")
        if os.path.exists(path) and json.load(open(path)) != setup:
            die(f"{self.out}: holds the results of another setup: give another --out, or remove it")
        self.write(path, setup)
        self.points_path = os.path.join(self.out, "points.json")
        self.points = json.load(open(self.points_path)) if os.path.exists(self.points_path) else {}
        self.evaluator = None

    @staticmethod
    def write(path, value):
        with open(path + ".tmp", "w") as file:
            json.dump(value, file, indent=1)
        os.replace(path + ".tmp", path)

    def save(self, key, value):
        self.points[key] = value
        self.write(self.points_path, self.points)

    def program(self, name):
        return os.path.join(ROOT, f"{name}_{self.target}")

    def call(self, command, show=None):
        """Runs one of our programs; returns what it printed. Interrupted, it has it save its state."""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                                   env={**os.environ, "OMP_WAIT_POLICY": "passive"})
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if show and line.startswith("step"):
                    print(f"\r{show}: {line.rstrip():<80}", end="", flush=True)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        if process.wait():
            raise Failed(f"{' '.join(command)}: {lines[-1] if lines else 'said nothing'}")
        return lines

    # ---- the work: each piece is cached in points.json under its name

    def folder(self, run, seed, lr):
        return os.path.join(self.out, f"{run}-{seed}-{lr:g}")

    def train(self, run, seed, lr, phases):
        """Trains, or goes on training; returns {memory, parameters, seconds, images, loss} of the whole run."""
        key = f"train {run} {seed} {lr:g} {phases[-1][0]}"
        if key in self.points:
            return self.points[key]
        folder, scale = self.folder(run, seed, lr), self.scale
        options = {k: scale[k] for k in ("image_size", "width", "heads", "patch", "depth", "batch", "warmup", "ema")}
        options.update(data=self.args.data, seed=seed, sample_every=0, cfg=1, lr_schedule="constant",
                       timestep_in_pre_post=0, **self.runs[run][1])
        if self.args.data != "shapes":
            del options["image_size"]
        facts = os.path.join(folder, "facts.json")
        step = 0
        if os.path.exists(os.path.join(folder, "state.safetensors")):
            import safetensors
            with safetensors.safe_open(os.path.join(folder, "state.safetensors"), "pt") as state:
                step = int(state.metadata()["step"])
        for end, factor in phases:
            if step >= end:
                continue
            if step:
                command = ["--resume", folder]
            else:
                shutil.rmtree(folder, ignore_errors=True)
                command = ["--out", folder]
                for name, value in options.items():
                    command += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
            command += ["--lr", f"{lr * factor:g}", "--steps", str(end)]
            begin, left = time.time(), ""
            if self.trained_flops:
                minutes = self.flops_to_train() * self.trained_seconds / self.trained_flops / 60
                left = f" (all training: {minutes:.0f} min left)"
            lines = self.call([self.program("train"), *command], show=f"{run}, seed {seed}, lr {lr:g}{left}")
            self.trained_seconds += time.time() - begin
            self.trained_flops += (end - step) * flops(scale, self.runs[run][1], 0)[1]
            text = "\n".join(lines)
            parameters = float(re.search(r"([\d.]+) million parameters", text).group(1))
            memory = float(re.search(r"in all ([\d.]+) MB", text).group(1))
            self.write(facts, {"parameters": parameters, "memory": memory})
            step = end
        with open(os.path.join(folder, "log.csv")) as log:
            rows = [line.split(",") for line in log.read().split()[1:]]
        losses = [float(row[1]) for row in rows[-len(rows) // 4:]]
        point = {**json.load(open(facts)), "loss": statistics.fmean(losses), "images": len(rows) * scale["batch"],
                 "seconds": sum(float(row[8]) for row in rows) / 1000}
        print(f"\r{key}: loss {point['loss']:.4f}, {point['seconds']:.0f} s{'':<60}")
        self.save(key, point)
        return point

    def flops_to_train(self):
        """Training that points.json does not hold yet, for one picture of the batch."""
        todo = [(run, self.scale["tune_steps"], f"train {run} 100 {lr:g}") for run in self.runs
                for lr in self.scale["lrs"]]
        todo += [(run, self.scale["phases"][-1][0], f"train {run} {seed}") for run in self.runs
                 for seed in range(1, self.scale["seeds"] + 1)]
        done = list(self.points)
        return sum(steps * flops(self.scale, self.runs[run][1], 0)[1] for run, steps, key in todo
                   if not any(other.startswith(key + " ") for other in done))

    def best_lr(self, run):
        """The learning rate whose short run ends with the lowest training loss; further ones are tried, doubling or
        halving, for as long as the best is the first or the last."""
        losses = {}

        def attempt(lr):
            try:
                losses[lr] = self.train(run, 100, lr, [(self.scale["tune_steps"], 1)])["loss"]
            except Failed as error:
                if "the loss is" not in str(error):
                    raise
                losses[lr] = math.inf  # it diverged

        for lr in self.scale["lrs"]:
            attempt(lr)
        while True:
            best = min(losses, key=losses.get)
            if min(losses) < best < max(losses):
                return best, dict(sorted(losses.items()))
            attempt(best * 2 if best == max(losses) else best / 2)

    def sample_command(self, run, seed, n, settings, out):
        weights = os.path.join(self.folder(run, seed, self.lr[run]), "weights.safetensors")
        command = [self.program("sample"), "--weights", weights, "--n", n, "--batch", min(n, 200),
                   "--seed", 1000 + seed, "--out", out]
        for name, value in settings.items():
            command += [f"--{name}", value]
        if self.args.data != "shapes":  # classes as often as the data have them; of shapes, each in turn
            import evaluate
            import torch
            _, y, _ = evaluate.load_pictures(self.args.data)
            if y is not None:
                chosen = torch.randint(len(y), (n,), generator=torch.Generator().manual_seed(1))
                command += ["--labels", ",".join(map(str, y[chosen].tolist()))]
        return [str(word) for word in command]

    def measure(self, run, seed, **settings):
        """Draws pictures with these settings of sample_* and judges them: METRICS, passes, seconds of sampling."""
        key = f"{run} {seed} " + " ".join(f"{name}={value}" for name, value in settings.items())
        if key in self.points:
            return self.points[key]
        if self.evaluator is None:
            self.evaluator = self.make_evaluator()
        import evaluate
        latents, png = os.path.join(self.out, "x.safetensors"), os.path.join(self.out, "x.png")
        command = self.sample_command(run, seed, self.scale["pictures"], {"cfg": 1, **settings}, png)
        begin = time.time()
        line = self.call(command + ["--latents", latents])[-1]
        seconds, passes = re.search(r"in ([\d.]+) s, .* ([\d.]+) block passes", line).groups()
        x, y, _ = evaluate.load_pictures(latents)
        broken = (~x.isfinite()).flatten(1).any(1).float().mean().item()  # judged as gray where they are no numbers
        metrics = self.evaluator.metrics(x.nan_to_num(0, 1, -1) if broken else x, y)
        point = {**{k: metrics[k] for k in METRICS if metrics.get(k) is not None}, "passes": float(passes),
                 "seconds": float(seconds), "gflop": 1e-9 * self.picture_flops(run, settings, float(passes)),
                 "broken": broken}
        self.save(key, point)
        self.measured += 1
        left = (time.time() - self.begin_measure) / self.measured * (self.to_measure - self.measured)
        print(f"\r{key}: distance {point['fd']:.3f}, {time.time() - begin:.1f} s; about {max(left, 0) / 60:.0f} min "
              f"left{'':<20}", end="" if sys.stdout.isatty() else "\n", flush=True)
        return point

    def picture_flops(self, run, settings, passes):
        options, steps = self.runs[run][1], settings["steps"]
        if "fixed_point" in options:
            return flops(self.scale, options, 0)[0] * steps
        return flops(self.scale, options, passes / steps - 2)[0] * steps

    def make_evaluator(self):
        import evaluate
        data = self.args.data
        if data == "shapes":  # pictures of another seed than any training's, written by the program itself
            data = os.path.join(self.out, "real.safetensors")
            if not os.path.exists(data):
                self.call([self.program("train"), "--export", data, "--image_size", str(self.scale["image_size"]),
                           "--steps", "1", "--batch", str(self.scale["real"]), "--seed", "777"])
        evaluator = evaluate.Evaluator(data, seed=1)
        self.save("evaluator", {"accuracy": evaluator.test_accuracy, "floor": evaluator.floor,
                                "ceiling": evaluator.ceiling})
        return evaluator

    def trace(self, seed, reuse, solver, steps):
        """Mean residual of each iteration (rows: timesteps), as sample_* --trace writes it."""
        key = f"trace {seed} {reuse} {solver} {steps}"
        if key not in self.points:
            path = os.path.join(self.out, "trace.csv")
            settings = dict(cfg=1, steps=steps, iters=self.scale["trace_iters"], reuse=reuse, solver=solver, trace=path)
            self.call(self.sample_command("fpdm", seed, 100, settings, os.path.join(self.out, "x.png")))
            with open(path) as file:
                rows = [line.split(",") for line in file.read().split()[1:]]
            by_step = {}
            for step, t, _, residual in rows:
                by_step.setdefault((int(step), int(t)), []).append(float(residual))
            self.save(key, {"t": [t for _, t in by_step], "residuals": list(by_step.values())})
        return self.points[key]

    def paper_scale(self):
        """Parameters and memory of the paper's largest models: what train_* prints before it touches the memory.
        Rows of (words, parameters in millions, MB, options); none where the machine has too little memory."""
        if "paper" not in self.points:
            rows = []
            for batch in (8, 16):
                for name, fixed_point in (("FPDM XL/2", 1), ("DiT XL/2", 0)):
                    options = f"--model XL/2 --image_size 32 --batch {batch} --fixed_point {fixed_point}"
                    command = [self.program("train"), *options.split(), "--out", os.path.join(self.out, "xl")]
                    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ours:
                        text = "".join(ours.stdout.readline() for _ in range(3))
                        ours.kill()
                    found = re.search(r"([\d.]+) million parameters\n.*in all ([\d.]+) MB", text)
                    rows += [[name, batch, float(found.group(1)), float(found.group(2)), options]] if found else []
            self.save("paper", rows)

    # ---- all of it

    def everything(self):
        scale = self.scale
        subprocess.run(["make", "-s", f"train_{self.target}", f"sample_{self.target}"], cwd=ROOT, check=True)
        seeds = range(1, scale["seeds"] + 1)
        self.lr, self.tuning = {}, {}
        for run in self.runs:
            self.lr[run], self.tuning[run] = self.best_lr(run)
        self.training = {run: [self.train(run, seed, self.lr[run], scale["phases"]) for seed in seeds]
                         for run in self.runs}
        plan = list(self.plan())
        self.to_measure = sum(f"{run} {seed} " + " ".join(f"{k}={v}" for k, v in settings.items()) not in self.points
                              for run, settings in plan for seed in seeds)
        self.measured, self.begin_measure = 0, time.time()
        for run, settings in plan:
            for seed in seeds:
                self.measure(run, seed, **settings)
        for reuse in (0, 1):
            for solver in ("plain", "anderson"):
                self.trace(1, reuse, solver, 10)
        self.paper_scale()
        print()

    def mean(self, run, settings):
        """{metric: (mean, standard deviation)} over the seeds."""
        points = [self.measure(run, seed, **settings) for seed in range(1, self.scale["seeds"] + 1)]
        return {name: (statistics.fmean(p[name] for p in points),
                       statistics.stdev(p[name] for p in points) if len(points) > 1 else 0.0)
                for name in points[0]}

    # Settings of each experiment, as lists of (run, settings of sample_*).

    def dit_settings(self, run, budget):
        steps = budget // self.runs[run][1]["depth"]
        return dict(steps=steps, budget=budget) if steps >= 2 else None

    def fpdm_settings(self, budget, k):
        steps = budget // (k + 2)
        return dict(steps=steps, budget=steps * (k + 2), reuse=1, alloc="const") if steps >= 2 else None

    def quality_plan(self):
        for budget in self.scale["budgets"]:
            for run in ("dit_cost", "dit_params"):
                yield run, self.dit_settings(run, budget)
            for k in self.scale["per_step"]:
                yield "fpdm", self.fpdm_settings(budget, k)

    def technique_plan(self):
        """Reuse and allocation at three budgets: 2, 3 and 4 iterations per timestep."""
        budgets = self.scale["budgets"]
        for budget, k in ((budgets[-2] // 4, 2), (budgets[-2] // 2, 3), (budgets[-2], 4)):
            steps = max(budget // (k + 2), 2)
            for reuse in (0, 1):
                for alloc in ("const", "inc", "dec"):
                    yield "fpdm", dict(steps=steps, budget=steps * (k + 2), reuse=reuse, alloc=alloc)

    def solver_plan(self):
        for k in self.scale["solver_iters"]:
            yield "fpdm", dict(steps=10, iters=k, reuse=1)
            for window in (1, 3):
                yield "fpdm", dict(steps=10, iters=k, reuse=1, solver="anderson", window=window)
        for tol in self.scale["tols"]:
            yield "fpdm", dict(steps=10, iters=self.scale["trace_iters"], reuse=1, tol=tol)

    def method_plan(self):
        for k in self.scale["unroll_iters"]:
            for run in ("fpdm", "one_step", "unroll"):
                yield run, dict(steps=10, iters=k, reuse=1)

    def plan(self):
        for part in (self.quality_plan, self.technique_plan, self.solver_plan, self.method_plan):
            yield from (item for item in part() if item[1])


# ---- the report

COLORS = {"fpdm": "#d62728", "dit_cost": "#1f77b4", "dit_params": "#2ca02c", "one_step": "#9467bd", "unroll": "#8c564b"}


def value(mean_and_deviation, digits=2):
    mean, deviation = mean_and_deviation
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + [""]


def differs(a, b):
    """Whether two (mean, deviation) over the seeds lie apart by more than both deviations together: 'lower' says that
    the first is, 'higher', or 'the same within the error bars'."""
    if abs(a[0] - b[0]) <= a[1] + b[1]:
        return "the same within the error bars"
    return "lower" if a[0] < b[0] else "higher"


class Report:
    """Writes claims.md and its plots from the measurements of an Experiment."""

    def __init__(self, experiment):
        self.e, self.scale, self.folder = experiment, experiment.scale, experiment.args.results
        os.makedirs(self.folder, exist_ok=True)
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        self.plt = plt
        self.lines = []

    def figure(self, name, draw, columns=1):
        figure, axes = self.plt.subplots(1, columns, figsize=(5.6 * columns, 4.2), squeeze=False)
        draw(*axes[0])
        figure.tight_layout()
        figure.savefig(os.path.join(self.folder, name), dpi=110)
        self.plt.close(figure)
        self.lines += [f"![{name}]({name})", ""]

    def curve(self, axis, points, label, color, style="-"):
        """points: (x, (mean, deviation))."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axis.errorbar(xs, [y[0] for y in ys], yerr=[y[1] for y in ys], label=label, color=color, linestyle=style,
                      marker="o", markersize=3, capsize=2)

    @staticmethod
    def ticks(axis, numbers):
        axis.set_xticks(numbers)
        axis.set_xticklabels(map(str, numbers))
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)

    def quality(self, run, budget, k=None):
        settings = self.e.fpdm_settings(budget, k) if run == "fpdm" else self.e.dit_settings(run, budget)
        return (self.e.mean(run, settings), settings) if settings else None

    def at_budget(self, run, budget):
        """(metrics, settings) of a contender; the fixed point with the iterations per timestep that seed 1 alone would
        choose at this budget, so that the error bars of the others are not those of a choice by luck."""
        if run != "fpdm":
            return self.quality(run, budget)
        usable = [s for s in (self.e.fpdm_settings(budget, k) for k in self.scale["per_step"]) if s]
        best = min(usable, key=lambda s: self.e.measure("fpdm", 1, **s)["fd"])
        return self.e.mean("fpdm", best), best

    def write(self):
        e, scale = self.e, self.scale
        data = "shapes (drawn by the program, endless)" if e.args.data == "shapes" else os.path.basename(e.args.data)
        command = f"python3 tools/reproduce.py --scale {e.args.scale}"
        if e.args.data != "shapes":
            command += f" --data {os.path.basename(e.args.data)}"
        judge = e.points["evaluator"]
        images = scale["phases"][-1][0] * scale["batch"]
        self.lines = [
            "# The paper's claims, measured", "",
            *(["**A self-test of tools/reproduce.py: models this small, trained this little, say nothing of the claims. "
               "`--scale laptop` measures them.**", ""] if e.args.scale == "smoke" else []),
            f"Made by `{command}`; run it again to make it anew. {data}, {scale['seeds']} training seeds, {images:,} "
            f"pictures seen by each model, width {scale['width']}, patch {scale['patch']}; sampling without guidance, "
            f"flow, a sampling seed for each training seed, {scale['pictures']:,} pictures each. ± is the standard "
            "deviation over the seeds. `distance` is the Fréchet distance of tools/evaluate.py (lower is better; not "
            f"the FID of papers): real pictures against real ones {judge['floor']['fd']:.2f}, noise "
            f"{judge['ceiling']['fd']:.0f}; its classifier is right on {100 * judge['accuracy']:.1f} % of real "
            "pictures that it has not seen.", "",
            "A *pass* is one forward of a Transformer block for one picture, the paper's unit. An iteration of the "
            "fixed point also has a projection, a third of a block more arithmetic, which the unit leaves out: so the "
            "quality is shown against GFLOP too.", ""]
        self.contenders()
        self.budgets()
        self.pictures()
        self.smoothing()
        self.techniques()
        self.solvers()
        self.methods()
        path = os.path.join(self.folder, "claims.md")
        with open(path + ".tmp", "w") as file:
            file.write("\n".join(self.lines))
        os.replace(path + ".tmp", path)
        print(f"report: {path}")

    def contenders(self):
        e, scale = self.e, self.scale
        self.lines += ["## Parameters, memory, time", "",
                       "The paper: 87 % fewer parameters than DiT-XL/2 and 60 % less training memory.", ""]
        rows = []
        for run, (words, options) in e.runs.items():
            points = e.training[run]
            seconds = [p["seconds"] / p["images"] for p in points]
            lrs = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in e.tuning[run].items())
            rows.append([words, f"{points[0]['parameters']:.2f} M", f"{points[0]['memory']:.0f} MB",
                         f"{1e-9 * flops(scale, options, 0)[1]:.2f}", f"{1e3 * min(seconds):.2f} ms",
                         f"{e.lr[run]:g} ({lrs})",
                         value((statistics.fmean(p["loss"] for p in points),
                                statistics.stdev([p["loss"] for p in points]) if len(points) > 1 else 0), 4)])
        self.lines += table(["model", "parameters", f"training memory, batch {scale['batch']}", "GFLOP per picture",
                             "time per picture", "learning rate (loss of the short runs)", "loss, last quarter"], rows)
        self.lines += ["Time is that of the fastest seed; memory is what train_* allocates and prints. The learning "
                       f"rate is the best of short runs ({scale['tune_steps']} steps, another seed). The loss of a "
                       "fixed-point model is that of its random n and m, so it compares the rows of one kind only.", ""]
        rows = [[f"{name}, batch {batch}", f"{millions:.1f} M", f"{mb / 1000:.2f} GB", f"`train_{e.target} {options}`"]
                for name, batch, millions, mb, options in e.points["paper"]]
        self.lines += ["At the paper's size, 32×32 input (the program prints it before it starts):", ""]
        self.lines += table(["model", "parameters", "memory of training", "command"], rows)
        for batch in {row[1] for row in e.points["paper"]}:
            sizes = {name: (millions, mb) for name, b, millions, mb, _ in e.points["paper"] if b == batch}
            if len(sizes) == 2:
                fewer, less = (100 * (1 - ours / theirs) for ours, theirs in zip(*sizes.values()))
                self.lines += [f"With batch {batch}: {fewer:.1f} % fewer parameters, {less:.0f} % less memory.", ""]

    def budgets(self):
        e, budgets = self.e, self.scale["budgets"]
        names = ["fpdm", "dit_cost", "dit_params"]
        best = {(run, b): self.at_budget(run, b) for run in names for b in budgets}
        self.lines += ["## Quality against budget", "",
                       "The paper: at a small budget the fixed-point model draws better pictures than DiT of the same "
                       "passes per timestep; with much compute DiT is better.", ""]

        def draw(by_passes, by_gflop):
            for axis, unit in ((by_passes, "passes"), (by_gflop, "gflop")):
                for run in names:
                    points = [found for b in budgets if (found := best[run, b])]
                    self.curve(axis, [(m[unit][0], m["fd"]) for m, _ in points], e.runs[run][0], COLORS[run])
                axis.axhline(e.points["evaluator"]["floor"]["fd"], color="gray", linestyle=":", label="real pictures")
                axis.set(xscale="log", yscale="log", ylabel="Fréchet distance",
                         xlabel={"passes": "Transformer-block passes per picture", "gflop": "GFLOP per picture"}[unit])
                axis.legend()
            self.ticks(by_passes, budgets)

        self.figure("claims_budget.png", draw, 2)
        rows, verdicts = [], []
        for budget in budgets:
            row = [budget]
            for run in names:
                found = best[run, budget]
                row += [f"{value(found[0]['fd'])} ({found[1]['steps']} steps)" if found else "–"]
            for run in names:
                found = best[run, budget]
                row += [f"{100 * found[0]['recognised'][0]:.0f} %" if found and "recognised" in found[0] else "–"]
            for run in names:
                found = best[run, budget]
                row += [f"{found[0]['precision'][0]:.2f} / {found[0]['recall'][0]:.2f}" if found else "–"]
            rows.append(row)
            verdicts.append((budget, *(differs(best["fpdm", budget][0]["fd"], best[run, budget][0]["fd"])
                                       if best[run, budget] else "–" for run in names[1:])))
        words = [e.runs[run][0] for run in names]
        self.lines += table(["passes"] + [f"distance, {w}" for w in words] + [f"recognised, {w}" for w in words] +
                            [f"precision / recall, {w}" for w in words], rows)
        self.lines += ["The distance of FPDM is, against", ""]
        self.lines += table(["passes", *words[1:]], verdicts)

    def pictures(self):
        """The contenders' pictures at a small budget: the same noise and the same labels."""
        e, budget = self.e, self.scale["budgets"][min(2, len(self.scale["budgets"]) - 1)]
        files, names = [], []
        for run in ("fpdm", "dit_cost", "dit_params"):
            settings = {"cfg": 1, **self.at_budget(run, budget)[1]}
            files.append(os.path.join(e.out, f"grid-{run}.png"))
            names.append(f"{e.runs[run][0]}: {settings['steps']} steps".replace(",", ""))
            e.call(e.sample_command(run, 1, 30, settings, files[-1]))
        both = os.path.join(self.folder, "claims_pictures.png")
        e.call([sys.executable, os.path.join(HERE, "plot.py"), *files, "--names", ",".join(names), "--out", both])
        self.lines += [f"The same noise and labels, {budget} passes, no guidance, the first training seed:", "",
                       "![claims_pictures.png](claims_pictures.png)", ""]

    def smoothing(self):
        e = self.e
        self.lines += ["## Smoothing: the same budget over more timesteps", "",
                       "The paper: at a fixed budget more timesteps with fewer iterations each are better, up to a "
                       "point.", ""]
        budgets = self.scale["budgets"][-4:]
        grid = {b: [(s["steps"], e.mean("fpdm", s)) for k in self.scale["per_step"] if (s := e.fpdm_settings(b, k))]
                for b in self.scale["budgets"]}

        def draw(axis):
            for i, b in enumerate(budgets):
                self.curve(axis, [(steps, m["fd"]) for steps, m in sorted(grid[b], key=lambda p: p[0])], f"{b} passes",
                           f"C{i}")
            axis.set(xscale="log", yscale="log", xlabel="timesteps", ylabel="Fréchet distance")
            self.ticks(axis, sorted({steps for b in budgets for steps, _ in grid[b]})[::2])
            axis.legend()

        self.figure("claims_smoothing.png", draw)
        head = ["passes"] + [f"{k} iteration{'s' * (k > 1)} per timestep" for k in self.scale["per_step"]]
        self.lines += table(head, [[b] + [f"{value(m['fd'])} ({steps})" for steps, m in grid[b]] +
                                   ["–"] * (len(self.scale["per_step"]) - len(grid[b])) for b in grid])
        self.lines += ["Distance, and in brackets the number of timesteps.", ""]

    def techniques(self):
        e = self.e
        self.lines += ["## Reuse and allocation", "",
                       "The paper: starting from the previous timestep's solution helps, most with few iterations; of "
                       "the allocations const is a good choice, inc or dec can be better.", ""]
        rows, seeds = [], range(1, self.scale["seeds"] + 1)
        for run, s in e.technique_plan():
            if not s["reuse"]:
                continue
            without = {**s, "reuse": 0}
            changes = [e.measure(run, seed, **s)["fd"] - e.measure(run, seed, **without)["fd"] for seed in seeds]
            change = statistics.fmean(changes), statistics.stdev(changes) if len(changes) > 1 else 0.0
            rows.append([s["budget"], s["steps"], s["alloc"], value(e.mean(run, s)["fd"]),
                         value(e.mean(run, without)["fd"]), value(change), differs(change, (0, 0))])
        self.lines += table(["passes", "timesteps", "allocation", "distance with reuse", "without",
                             "change, seed by seed", "with reuse it is"], rows)

        def draw(first, second):
            for axis, solver in ((first, "plain"), (second, "anderson")):
                for reuse in (0, 1):
                    trace = e.trace(1, reuse, solver, 10)
                    for i in (0, len(trace["t"]) // 2, len(trace["t"]) - 1):
                        axis.plot(range(1, len(trace["residuals"][i]) + 1), trace["residuals"][i], f"C{i % 7}",
                                  linestyle="-" if reuse else "--",
                                  label=f"t = {trace['t'][i]}, {'reuse' if reuse else 'no reuse'}")
                axis.set(yscale="log", xlabel="iteration", ylabel="relative residual", title=f"{solver} iteration")
                axis.legend(fontsize=7)
            low = min(first.get_ylim()[0], second.get_ylim()[0])
            high = max(first.get_ylim()[1], second.get_ylim()[1])
            first.set_ylim(low, high), second.set_ylim(low, high)

        self.figure("claims_residual.png", draw, 2)
        rows = []
        for solver in ("plain", "anderson"):
            for reuse in (0, 1):
                residuals = e.trace(1, reuse, solver, 10)["residuals"]
                row = [solver, "yes" if reuse else "no"]
                for k in (1, 2, 4, 8, self.scale["trace_iters"]):
                    if k <= self.scale["trace_iters"]:
                        logs = [math.log(max(r[k - 1], 1e-9)) for r in residuals]
                        row.append(f"{math.exp(statistics.fmean(logs)):.4f}")
                rows.append(row)
        head = ["solver", "reuse"] + [f"residual after {k}" for k in (1, 2, 4, 8, self.scale["trace_iters"])
                                      if k <= self.scale["trace_iters"]]
        self.lines += table(head, rows)
        self.lines += ["Geometric mean over 10 timesteps of ‖g(z)−z‖/‖g(z)‖ (`sample_* --trace`), seed 1.", ""]

    def solvers(self):
        e = self.e
        self.lines += ["## Solvers: Anderson acceleration and early stop", "",
                       "Ten timesteps with reuse; passes as in the table. Not in the paper.", ""]
        rows = []
        for _, s in e.solver_plan():
            m = e.mean("fpdm", s)
            solver = f"Anderson, window {s['window']}" if "solver" in s else "plain"
            if "tol" in s:
                solver = f"plain, tol {s['tol']}, at most {s['iters']}"
            rows.append([solver, s["iters"] if "tol" not in s else "", f"{m['passes'][0]:.0f}", value(m["fd"])])
        self.lines += table(["solver", "iterations per timestep", "passes", "distance"], rows)

    def methods(self):
        e = self.e
        self.lines += ["## Training: S-JFB, one step, full unrolling", "",
                       "The paper: stochastic Jacobian-free backpropagation draws better pictures than one-step "
                       "gradients, and needs less memory than unrolling. Memory and time are in the first table.", ""]
        runs = ["fpdm", "one_step", "unroll"]
        iterations = self.scale["unroll_iters"]
        found = {(run, k): e.mean(run, dict(steps=10, iters=k, reuse=1))["fd"] for run in runs for k in iterations}

        def draw(axis):
            for run in runs:
                self.curve(axis, [(k, found[run, k]) for k in iterations], e.runs[run][0], COLORS[run])
            axis.set(xscale="log", yscale="log", xlabel="iterations per timestep when sampling (10 timesteps)",
                     ylabel="Fréchet distance")
            self.ticks(axis, iterations)
            axis.legend()

        self.figure("claims_training.png", draw)
        self.lines += table(["iterations per timestep"] + [e.runs[run][0] for run in runs],
                            [[k] + [value(found[run, k]) for run in runs] for k in iterations])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="[laptop]; smoke: self-test")
    parser.add_argument("--data", default="shapes", help="dataset file, or shapes [shapes]")
    parser.add_argument("--target", choices=["cpu", "gpu"], help="which programs [gpu if nvidia-smi sees one]")
    parser.add_argument("--out", help="folder for runs and measurements [reproduce_SCALE]")
    parser.add_argument("--results", help="folder for claims.md and plots [test/results; smoke: --out]")
    args = parser.parse_args()
    for package in ("torch", "numpy", "safetensors", "matplotlib", "PIL"):
        if importlib.util.find_spec(package) is None:
            die(f"needs the Python package {package}: pip install -r tools/requirements.txt")
    args.out = os.path.abspath(args.out or f"reproduce_{args.scale}")
    args.results = os.path.abspath(args.results or (args.out if args.scale == "smoke" else f"{ROOT}/test/results"))
    if args.data != "shapes":
        args.data = os.path.abspath(args.data)
        if not os.path.exists(args.data):
            die(f"{args.data}: no such dataset; tools/data.py makes them")
    if not args.target:
        gpu = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
        args.target = "gpu" if gpu else "cpu"
    sys.path.insert(0, HERE)
    experiment = Experiment(args)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        experiment.everything()
        Report(experiment).write()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        sys.exit(130)
    except Failed as error:
        die(error)


if __name__ == "__main__":
    main()
