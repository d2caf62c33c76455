#!/usr/bin/env python3
"""Trains a fixed-point model and its rivals, measures the paper's claims, and writes tables and plots.

    python3 tools/reproduce.py                                       # shapes; --scale laptop, gpu: longer, 3 seeds
    python3 tools/reproduce.py --photographs cifar10.safetensors     # the same question on photographs, too

It builds and runs train_cpu and sample_cpu (the GPU programs if nvidia-smi sees a GPU) and judges pictures with
tools/evaluate.py. Stop it whenever you like: the same command goes on where it stopped, and once all is measured it
writes the report again at once. Everything it did is in --out (runs, points.json); the report is claims.md and its
plots in --results. Every contender is trained with the same arithmetic, at the learning rate that served it best in
short trials, with the --t_sampling and sampled with the --t_shift and --order that served it best. Guidance is off in
all measurements, so that a block pass is a block pass. --scale smoke is a self-test of this program in a minute: its
models are too small and too little trained to say anything of the claims.
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
import tempfile
import time

from data import Parser, die, main_of, replace_file  # of this folder

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

# Samplers of first and of second order
FIRST = [dict(t_shift=shift) for shift in (0, 1, 2, 4)]
SECOND = [dict(t_shift=shift, order=2) for shift in (1, 2)]

# What differs between the scales. `steps`: of the fixed-point model; its rivals get as many as cost the same; `seeds`:
# of training, each with a sampling seed of its own; `samplings`: ways to draw timesteps in training, of which each
# contender takes the one with the better distance; `samplers`, `per_step`: options of sample_*, and iterations per
# timestep, that are tried at each budget; `plateau_steps`: of the models that differ from the first in one thing.
SCALES = {
    "smoke": dict(image_size=16, width=32, heads=2, patch=4, depth=8, rival_depth=6, batch=32, warmup=10, ema=0.96,
                  dtype="auto", steps=30, tune_steps=16, lrs=[4e-3, 8e-3],
                  samplings=["logit_normal", "uniform"], samplers=FIRST[:2] + SECOND[:1], seeds=1, pictures=100,
                  real=600,
                  budgets=[6, 12, 24], per_step=[1, 2], solver_iters=[2, 4], unroll_iters=[1, 4], tols=[0.1],
                  trace_iters=6, plateau_steps=16),
    "hour": dict(image_size=24, width=128, heads=4, patch=4, depth=8, rival_depth=6, batch=32, warmup=100, ema=0.995,
                 dtype="bf16", steps=2000, tune_steps=500, lrs=[2e-3, 4e-3, 8e-3],
                 samplings=["logit_normal", "uniform"], samplers=FIRST + SECOND, seeds=1, pictures=1000, real=10000,
                 budgets=[6, 12, 24, 48, 96], per_step=[1, 2, 4], solver_iters=[2], unroll_iters=[1, 4],
                 tols=[0.1], trace_iters=16, plateau_steps=700),
}
SCALES["laptop"] = {**SCALES["hour"], "steps": 9000, "seeds": 3, "pictures": 1500,
                    "budgets": [6, 12, 24, 48, 96, 192], "solver_iters": [2, 8], "tols": [0.1, 0.02],
                    "unroll_iters": [1, 2, 4, 8], "plateau_steps": 3000}
SCALES["gpu"] = dict(image_size=32, width=384, heads=6, patch=2, depth=12, rival_depth=9, batch=256, warmup=500,
                     ema=0.999, dtype="auto", steps=10000, tune_steps=500, lrs=[5e-4, 1e-3, 2e-3],
                     samplings=["logit_normal", "uniform"], samplers=FIRST + SECOND, seeds=3, pictures=10000,
                     real=50000,
                     budgets=[6, 9, 18, 36, 72, 144, 288], per_step=[1, 2, 4, 10], solver_iters=[2, 4, 8],
                     unroll_iters=[1, 2, 4, 8, 16], tols=[0.1, 0.05, 0.02], trace_iters=16, plateau_steps=4000)
# What differs on photographs, at the scales of a CPU; here the learning rates are given.
PHOTOGRAPHS = dict(image_size=32, width=160, heads=5, steps=6500, warmup=200, ema=0.999, hflip=1,
                   samplings=["logit_normal"],
                   lrs={"fpdm": 2.5e-3, "fpdm_skip": 2.5e-3, "fpdm_few": 2.5e-3, "dit3": 4e-3, "dit": 4e-3})
# Contenders that take the learning rate, or the way to draw timesteps, that was best for another of their kind.
SAME_RATE = {"fpdm_few": "fpdm_skip", "fpdm_blind": "fpdm", "unroll": "fpdm", "dit3": "dit"}
SAME_SAMPLING = {"fpdm_few": "fpdm_skip", "fpdm_blind": "fpdm", "unroll": "fpdm", "one_step": "fpdm", "fpdm_x": "fpdm"}
METRICS = ["fd", "precision", "recall", "recognised"]


def contenders(scale):
    """name -> (words for the reader, options of train_*). n and m of the fixed point: half of depth - 2 iterations at
    most without gradient, one more with it; the rivals of the training method get as many iterations on average."""
    whole, rival = scale["depth"] - 2, scale["rival_depth"]
    some = whole // 2
    ours = dict(skip=0, no_grad_iters=[0, some], grad_iters=[1, some + 1])
    return {
        "fpdm": ("FPDM", ours),
        "fpdm_skip": ("FPDM with our skip connection", dict(ours, skip=1)),
        "fpdm_few": ("FPDM with skip, half the iterations",
                     dict(ours, skip=1, no_grad_iters=[0, some // 2], grad_iters=[1, some // 2 + 1])),
        "fpdm_blind": ("FPDM, pre and post do not see t", dict(ours, timestep_in_pre_post=0)),
        "fpdm_x": ("FPDM, predicts x", dict(ours, prediction="x")),
        "dit3": ("DiT, 3 blocks", dict(fixed_point=0, depth=3)),
        "dit": (f"DiT, {rival} blocks", dict(fixed_point=0, depth=rival)),
        "dit_deep": (f"DiT, {2 * rival} blocks", dict(fixed_point=0, depth=2 * rival)),
        "one_step": ("FPDM, one step", dict(ours, no_grad_iters=[0, whole], grad_iters=[1, 1])),
        "unroll": ("FPDM, full unrolling", dict(ours, no_grad_iters=[0, 0], grad_iters=[some + 1] * 2)),
    }


def plateau(scale):
    """The first contender, and models that differ from it in one thing, which may be what holds it back."""
    some = (scale["depth"] - 2) // 2
    passes = some + 3  # of a training step, on average: pre, post, and as many iterations as n and m have together
    ours, half = dict(skip=0, no_grad_iters=[0, some], grad_iters=[1, some + 1]), (some + 1) // 2
    return {
        "fpdm": ("FPDM as it is", ours),
        "skip": ("a skip connection around the loop (`--skip 1`)", dict(ours, skip=1)),
        "blind": ("pre, post and final layer do not see t", dict(ours, timestep_in_pre_post=0)),
        "fixed": ("n and m always the same", dict(ours, no_grad_iters=[half] * 2, grad_iters=[half] * 2)),
        "gradient": ("every iteration has its gradient, number random",
                     dict(ours, no_grad_iters=[0, 0], grad_iters=[1, 2 * some + 1])),
        "unrolled": ("every iteration has its gradient, number fixed",
                     dict(ours, no_grad_iters=[0, 0], grad_iters=[some + 1] * 2)),
        "pre": ("two pre blocks", dict(ours, pre_depth=2)),
        "pre_post": ("two pre and two post blocks", dict(ours, pre_depth=2, post_depth=2)),
        "once": ("the block runs once: a DiT of 3 blocks", dict(fixed_point=0, depth=3)),
        "dit": (f"a block of its own for each pass (pre, post, iterations on average): a DiT of {passes}",
                dict(fixed_point=0, depth=passes)),
    }


def flops(scale, options, iterations):
    """(forward of one picture, training step of one picture), multiply-adds count two, projections included."""
    D, T = scale["width"], (scale["image_size"] // scale["patch"])**2
    block, project, inject = T * (24 * D * D + 4 * T * D), T * 8 * D * D, T * 6 * D * D
    if "fixed_point" in options:
        return options["depth"] * block, 3 * options["depth"] * block
    n, m = (sum(options[key]) / 2 for key in ("no_grad_iters", "grad_iters"))
    outside = (options.get("pre_depth", 1) + options.get("post_depth", 1)) * block + inject
    forward = outside + iterations * (block + project)
    return forward, 3 * (outside + m * (block + project)) + n * (block + project)


class Failed(Exception):
    """A program of ours ended with an error."""


class Experiment:
    def __init__(self, args, data, out, scale, runs):
        self.data, self.out, self.scale, self.runs, self.target = data, out, scale, runs, args.target
        self.trained_seconds = self.trained_flops = 0.0  # in this session, for the time left
        os.makedirs(self.out, exist_ok=True)
        setup = {"scale": args.scale, "data": data, "target": self.target, **scale}
        setup = json.loads(json.dumps(setup))
        path = os.path.join(self.out, "setup.json")
        had = self.read(path, setup)
        if {**had, "seeds": scale["seeds"], "samplers": scale["samplers"]} != setup:  # of both more may join later
            die(f"{self.out}: holds the results of another setup: give another --out, or remove it")
        self.points_path = os.path.join(self.out, "points.json")
        self.points = self.read(self.points_path, {})
        self.write(path, setup)
        self.evaluator = None

    @staticmethod
    def read(path, otherwise):
        """The JSON object in the file; otherwise, where there is none."""
        if not os.path.exists(path):
            return otherwise
        try:
            with open(path) as file:
                found = json.load(file)
            if not isinstance(found, dict):
                raise ValueError("no object")
            return found
        except (ValueError, RecursionError) as error:
            die(f"{path}: {error}; remove it, or give another --out")

    @staticmethod
    def write(path, value):
        replace_file(path, lambda file: file.write(json.dumps(value, indent=1).encode()))

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

    def folder(self, run, seed, lr, steps):
        return os.path.join(self.out, f"{run}-{self.sampling[run]}-{seed}-{lr:g}-{steps}")

    def steps(self, run, steps):
        """As many steps as cost what `steps` cost of the first contender."""
        if self.scale.get("same_pictures"):
            return steps
        cost = {name: flops(self.scale, self.runs[name][1], 0)[1] for name in (run, next(iter(self.runs)))}
        return round(steps * cost[next(iter(self.runs))] / cost[run])

    def train(self, run, seed, lr, steps):
        """Trains, or goes on training; returns {memory, parameters, seconds, images, loss} of the whole run."""
        key = f"train {run} {self.sampling[run]} {seed} {lr:g} {steps}"
        if key in self.points:
            return self.points[key]
        folder, scale = self.folder(run, seed, lr, steps), self.scale
        options = {k: scale[k] for k in ("width", "heads", "patch", "depth", "batch", "warmup", "ema", "dtype")}
        options.update(data=self.data, seed=seed, sample_every=0, t_sampling=self.sampling[run],
                       hflip=scale.get("hflip", 0), optimizer="adamw", lr=f"{lr:g}", steps=steps, **self.runs[run][1])
        if self.data == "shapes":
            options["image_size"] = scale["image_size"]
        facts = os.path.join(folder, "facts.json")
        if not (os.path.exists(facts) and os.path.exists(os.path.join(folder, "weights.safetensors"))):
            command = ["--resume", folder]
            if not os.path.exists(os.path.join(folder, "state.safetensors")):
                shutil.rmtree(folder, ignore_errors=True)
                command = ["--out", folder]
                for name, value in options.items():
                    command += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
            begin, left = time.time(), ""
            if self.trained_flops:
                minutes = self.flops_to_train() * self.trained_seconds / self.trained_flops / 60
                left = f" (all training: {minutes:.0f} min left)"
            lines = self.call([self.program("train"), *command], show=f"{run}, seed {seed}, lr {lr:g}{left}")
            self.trained_seconds += time.time() - begin
            self.trained_flops += steps * flops(scale, self.runs[run][1], 0)[1]
            text = "\n".join(lines)
            parameters = float(re.search(r"([\d.]+) million parameters", text).group(1))
            memory = float(re.search(r"in all ([\d.]+) MB", text).group(1))
            self.write(facts, {"parameters": parameters, "memory": memory})
            os.remove(os.path.join(folder, "state.safetensors"))
        with open(os.path.join(folder, "log.csv")) as log:
            rows = [line.split(",") for line in log.read().split()[1:]]
        losses = [float(row[1]) for row in rows[-len(rows) // 4:]]
        point = {**self.read(facts, {}), "loss": statistics.fmean(losses), "images": len(rows) * scale["batch"],
                 "seconds": sum(float(row[8]) for row in rows) / 1000}
        print(f"\r{key}: loss {point['loss']:.4f}, {point['seconds']:.0f} s{'':<60}")
        self.save(key, point)
        return point

    def flops_to_train(self):
        """Training that points.json does not hold yet, for one picture of the batch."""
        scale = self.scale
        rates = scale["lrs"] if len(scale["lrs"]) > 1 and isinstance(scale["lrs"], list) else []
        first, *others = scale["samplings"]
        todo = [(run, self.steps(run, scale["tune_steps"]), f"train {run} {first} 100 {lr:g}") for run in self.runs
                for lr in rates if run not in SAME_RATE]
        todo += [(run, self.steps(run, scale["steps"]), f"train {run} {self.sampling[run]} {seed}")
                 for run in self.runs for seed in range(1, scale["seeds"] + 1)]
        todo += [(run, self.steps(run, scale["steps"]), f"train {run} {other} 1") for run in self.runs
                 for other in others if run not in SAME_SAMPLING]
        done = list(self.points)
        return sum(steps * flops(scale, self.runs[run][1], 0)[1] for run, steps, key in todo
                   if not any(other.startswith(key + " ") for other in done))

    def best_lr(self, run):
        """(the learning rate that served best in short runs, {rate: training loss at their end}): the lowest whose loss
        is within 2 % of the best, since short runs flatter high rates. Where the best is the lowest or highest of those
        tried, half or twice of it is tried too, two times at most."""
        lrs, losses = self.scale["lrs"], {}
        if isinstance(lrs, dict):
            return lrs[run], {}
        if run in SAME_RATE:
            return self.lr[SAME_RATE[run]], {}
        if len(lrs) == 1:
            return lrs[0], {}

        def trial(lr):
            try:
                losses[lr] = self.train(run, 100, lr, self.steps(run, self.scale["tune_steps"]))["loss"]
            except Failed as error:
                if "the loss is" not in str(error):
                    raise
                losses[lr] = math.inf  # it diverged

        for lr in lrs:
            trial(lr)
        for _ in range(2):
            best = min(losses, key=losses.get)
            if best in (min(losses), max(losses)):
                trial(best / 2 if best == min(losses) else 2 * best)
        return min(lr for lr, loss in losses.items() if loss <= 1.02 * min(losses.values())), losses

    def sample_command(self, run, seed, n, settings, out):
        folder = self.folder(run, seed, self.lr[run], self.steps(run, self.scale["steps"]))
        weights = os.path.join(folder, "weights.safetensors")
        command = [self.program("sample"), "--weights", weights, "--n", n, "--batch", min(n, 200),
                   "--seed", 1000 + seed, "--out", out]
        for name, value in settings.items():
            command += [f"--{name}", value]
        if self.data != "shapes":  # classes as often as the data have them; of shapes, each in turn
            import evaluate
            import torch
            _, y, names = evaluate.load_pictures(self.data)
            if y is not None:
                chosen = torch.randint(len(y), (n,), generator=torch.Generator().manual_seed(1))
                words = [names[i] if names and str(i) in names else i for i in y[chosen].tolist()]  # names count first
                command += ["--labels", ",".join(map(str, words))]
        return [str(word) for word in command]

    def best_sampling(self, run):
        """Settles how timesteps were drawn in training, and the sampler: {sampling: distance}, all by seed 1."""
        distances, samplers = {}, {}
        same = SAME_SAMPLING.get(run)
        for self.sampling[run] in [self.sampling[same]] if same else self.scale["samplings"]:
            self.train(run, 1, self.lr[run], self.steps(run, self.scale["steps"]))
            samplers[self.sampling[run]], distances[self.sampling[run]] = self.best_sampler(run)
        self.sampling[run] = min(distances, key=distances.get)
        self.sampler[run] = samplers[self.sampling[run]]
        return distances

    def best_sampler(self, run):
        """(the `samplers` entry with the lowest distance at a budget in the middle, that distance), by seed 1"""
        samplers, budgets, distances = self.scale["samplers"], self.scale["budgets"], []
        if len(samplers) == 1:
            return samplers[0], 0
        budget = next(b for b in budgets[len(budgets) // 2:] if self.settings(run, b, 1, samplers[0]))
        for sampler in samplers:
            distances.append(self.measure(run, 1, **self.settings(run, budget, 1, sampler))["fd"])
        return samplers[distances.index(min(distances))], min(distances)

    def key(self, run, seed, settings):
        return " ".join([run, self.sampling[run], str(seed), f"{self.lr[run]:g}",
                         *(f"{name}={value}" for name, value in settings.items())])

    def measure(self, run, seed, **settings):
        """Draws pictures with these settings of sample_* and judges them: METRICS, passes, seconds of sampling."""
        key = self.key(run, seed, settings)
        if key in self.points:
            return self.points[key]
        if self.evaluator is None:
            self.evaluator = self.make_evaluator()
        import evaluate
        latents, png = os.path.join(self.out, "x.safetensors"), os.path.join(self.out, "x.png")
        command = self.sample_command(run, seed, self.scale["pictures"], {"cfg": 1, **settings}, png)
        begin = time.time()
        line = [line for line in self.call(command + ["--latents", latents]) if "block passes" in line][-1]
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
        outside = options.get("pre_depth", 1) + options.get("post_depth", 1)
        return flops(self.scale, options, passes / steps - outside)[0] * steps

    def make_evaluator(self):
        import evaluate
        data = self.data
        if data == "shapes":  # pictures of another seed than any training's, written by the program itself
            data = os.path.join(self.out, "real.safetensors")
            if not os.path.exists(data):
                self.call([self.program("train"), "--export", data, "--image_size", str(self.scale["image_size"]),
                           "--steps", "1", "--batch", str(self.scale["real"]), "--seed", "777"])
        evaluator = evaluate.Evaluator(data, seed=1)
        judge = {"network": evaluator.network, "labelled": evaluator.data.labelled, "accuracy": evaluator.test_accuracy,
                 "floor": evaluator.floor(self.scale["pictures"]), "ceiling": evaluator.ceiling}
        if self.points.get("evaluator", judge).get("network", evaluator.network) != evaluator.network:
            die(f"{self.out}: its distances were measured by another network of tools/evaluate.py (that of another "
                "machine, or seed); give another --out")
        self.save("evaluator", judge)
        return evaluator

    def trace(self, seed, reuse, solver, steps):
        """Mean residual of each iteration (rows: timesteps), as sample_* --trace writes it."""
        key = " ".join(["trace", self.key("fpdm", seed, self.sampler["fpdm"]), str(reuse), solver, str(steps)])
        if key not in self.points:
            path = os.path.join(self.out, "trace.csv")
            settings = dict(cfg=1, steps=steps, iters=self.scale["trace_iters"], reuse=reuse, solver=solver,
                            **self.sampler["fpdm"], trace=path)
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
        scale, seeds = self.scale, range(1, self.scale["seeds"] + 1)
        if subprocess.run(["make", "-s", f"train_{self.target}", f"sample_{self.target}"], cwd=ROOT).returncode:
            raise Failed("make failed; its message is above")
        self.lr, self.tuning, self.sampler = {}, {}, {}
        self.sampling = dict.fromkeys(self.runs, scale["samplings"][0])
        for run in sorted(self.runs, key=SAME_RATE.__contains__):
            self.lr[run], self.tuning[run] = self.best_lr(run)
        self.measured, self.begin_measure = 0, time.time()
        self.to_measure = len(scale["samplers"]) * sum(1 if run in SAME_SAMPLING else len(scale["samplings"])
                                                     for run in self.runs)
        self.drawn = {run: self.best_sampling(run) for run in sorted(self.runs, key=SAME_SAMPLING.__contains__)}
        self.training = {run: [self.train(run, seed, self.lr[run], self.steps(run, scale["steps"])) for seed in seeds]
                         for run in self.runs}
        plan = list(self.plan())
        self.to_measure = sum(self.key(run, seed, settings) not in self.points for run, settings in plan
                              for seed in seeds if seed == 1 or self.is_best(run, settings))
        self.measured, self.begin_measure = 0, time.time()
        for run, settings in plan:
            # The first seed chooses the sampler; the report asks for what the others still lack.
            for seed in seeds if self.is_best(run, settings) else [1]:
                self.measure(run, seed, **settings)
        if "one_step" not in self.runs:
            return
        for reuse in (0, 1):
            for solver in ("plain", "anderson"):
                self.trace(1, reuse, solver, 10)
        self.paper_scale()
        print()

    def is_best(self, run, settings):
        """Whether these settings have the run's sampler, of which --order is only part where it is the second."""
        return {name: settings[name] for name in ("t_shift", "order") if name in settings} == self.sampler[run]

    def mean(self, run, settings):
        """{metric: (mean, standard deviation)} over the seeds."""
        points = [self.measure(run, seed, **settings) for seed in range(1, self.scale["seeds"] + 1)]
        return {name: (statistics.fmean(p[name] for p in points),
                       statistics.stdev(p[name] for p in points) if len(points) > 1 else 0.0)
                for name in points[0]}

    # Settings of each experiment, as lists of (run, settings of sample_*).

    def settings(self, run, budget, k, sampler=None):
        """As many timesteps as the budget allows, of k iterations each where the model iterates; None: not even two.
        sampler: another than the run's."""
        options = self.runs[run][1]
        dit = "fixed_point" in options
        per_step = options["depth"] if dit else k + options.get("pre_depth", 1) + options.get("post_depth", 1)
        steps = budget // per_step
        ours = {} if dit else dict(budget=steps * per_step, reuse=1, alloc="const")
        return dict(steps=steps, **ours, **(sampler or self.sampler[run])) if steps >= 2 else None

    def choices(self, run, budget):
        """The settings from which a contender may choose at this budget: its iterations per timestep, and with the
        fewest every sampler."""
        per_step = [1] if "fixed_point" in self.runs[run][1] else self.scale["per_step"]
        found = [self.settings(run, budget, k) for k in per_step]
        found += [self.settings(run, budget, per_step[0], s) for s in self.scale["samplers"] if s != self.sampler[run]]
        return [settings for settings in found if settings]

    def contest(self):
        """The contenders for quality, without the rivals in training."""
        return [run for run in self.runs if run not in ("one_step", "unroll")]

    def quality_plan(self):
        for budget in self.scale["budgets"]:
            for run in self.contest():
                for settings in self.choices(run, budget):
                    yield run, settings

    def technique_plan(self):
        """Reuse and allocation at two budgets, 3 iterations per timestep: of 2, inc can be the same as const."""
        budgets, k = self.scale["budgets"], 3
        for budget in budgets[-2] // 3, budgets[-2] // 2:
            steps = max(budget // (k + 2), 2)
            for reuse in (0, 1):
                for alloc in ("const", "inc", "dec"):
                    yield "fpdm", dict(steps=steps, budget=steps * (k + 2), reuse=reuse, alloc=alloc,
                                       **self.sampler["fpdm"])

    def ten(self, run="fpdm", **settings):
        return dict(steps=10, reuse=1, **self.sampler[run], **settings)

    def solver_plan(self):
        for k in self.scale["solver_iters"]:
            yield "fpdm", self.ten(iters=k)
            for window in (1, 3):
                yield "fpdm", self.ten(iters=k, solver="anderson", window=window)
        for tol in self.scale["tols"]:
            yield "fpdm", self.ten(iters=self.scale["trace_iters"], tol=tol)

    def method_plan(self):
        for k in self.scale["unroll_iters"]:
            for run in ("fpdm", "one_step", "unroll"):
                yield run, self.ten(run, iters=k)

    def plan(self):
        parts = [self.quality_plan]
        if "one_step" in self.runs:
            parts += [self.technique_plan, self.solver_plan, self.method_plan]
        for part in parts:
            yield from (item for item in part() if item[1])


# ---- the report

COLORS = {"fpdm": "#d62728", "fpdm_skip": "#2ca02c", "fpdm_few": "#bcbd22", "fpdm_blind": "#e377c2",
          "fpdm_x": "#ff7f0e", "dit3": "#17becf", "dit": "#1f77b4", "dit_deep": "#000080", "one_step": "#9467bd",
          "unroll": "#8c564b"}


def value(mean_and_deviation, digits=2):
    mean, deviation = mean_and_deviation
    return f"{mean:.{digits}f}" + f" ± {deviation:.{digits}f}" * (deviation > 0)  # of one seed there is no deviation


def broken(metrics):
    """The share of pictures with values that are no numbers, where there are any."""
    share = metrics.get("broken", [0])[0]
    return f" ({100 * share:.3g} % broken)" * (share > 0)


def distance(metrics):
    return value(metrics["fd"]) + broken(metrics)


def table(head, rows):
    lines = ["| " + " | ".join(map(str, head)) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + [""]


def apart(one, other):
    """Whether two (mean, deviation) differ by more than both deviations over the seeds."""
    return abs(one[0] - other[0]) > one[1] + other[1]


def direction(changes):
    """Which way a quantity changes, if the 95 % interval of its mean over the seeds (Student's t) leaves out zero."""
    mean, n = statistics.fmean(changes), len(changes)
    half = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, 2.57) * statistics.stdev(changes) / n**0.5 if n > 1 else 0
    if abs(mean) <= half:
        return "not told apart by these seeds"
    return ("lower" if mean < 0 else "higher") + " (one seed)" * (n == 1)


class Report:
    """Writes claims.md and its plots from what was measured on shapes, and perhaps on photographs."""

    def __init__(self, args, shapes, plateau, photographs):
        self.args, self.e, self.plateau, self.photographs = args, shapes, plateau, photographs
        self.scale, self.folder = shapes.scale, args.results
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        self.plt = plt
        self.lines = []

    def figure(self, name, draw, columns=1):
        figure, axes = self.plt.subplots(1, columns, figsize=(5.6 * columns, 4.2), squeeze=False)
        draw(*axes[0])
        figure.tight_layout()
        replace_file(os.path.join(self.folder, name), lambda file: figure.savefig(file, dpi=110), "--results")
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

    @staticmethod
    def at_budget(e, run, budget):
        """(metrics, settings) of a contender, with what seed 1 alone would choose at this budget, so that the error
        bars of the others are not those of a choice by luck."""
        best = min(e.choices(run, budget), key=lambda s: e.measure(run, 1, **s)["fd"], default=None)
        return best and (e.mean(run, best), best)

    def write(self):
        e, scale, command = self.e, self.scale, f"python3 tools/reproduce.py --scale {self.args.scale}"
        if self.args.seeds:
            command += f" --seeds {self.args.seeds}"
        if self.photographs:
            command += f" --photographs {os.path.basename(self.photographs.data)}"
        samplers = ", ".join(" ".join(f"--{name} {value}" for name, value in s.items()) for s in scale["samplers"])
        self.lines = [
            "# The paper's claims, measured", "",
            *(["**A self-test of tools/reproduce.py: models this small, trained this little, say nothing of the "
               "claims. `--scale hour` measures them.**", ""] if self.args.scale == "smoke" else [])]
        self.answer()
        self.lines += [
            f"Made by `{command}`; run it again to make it anew. Every contender was trained with the same arithmetic "
            f"({1e-12 * scale['steps'] * scale['batch'] * flops(scale, e.runs['fpdm'][1], 0)[1]:.0f} TFLOP on shapes), "
            f"with a learning rate that falls to zero, in {scale['dtype']}; {scale['seeds']} training seed"
            f"{'s, ± is the standard deviation over them' if scale['seeds'] > 1 else ''}. Sampling without guidance, "
            f"flow, {scale['pictures']:,} pictures a point. Chosen by the first seed, which is among those reported: "
            "on shapes the learning rate (short trials; rows without have that of their kind) and how timesteps are "
            "drawn in training (distance); at each budget either the sampler, with one iteration per timestep, or the "
            "iterations, with the sampler that is best at a budget in the middle. Samplers: "
            f"`{samplers}`. "
            "`distance` is the Fréchet distance of tools/evaluate.py (lower is better; not the FID of papers).", "",
            "A *pass* is one forward of a Transformer block for one picture, the paper's unit. An iteration of the "
            "fixed point also has a projection, a third of a block more arithmetic, which the unit leaves out: so the "
            "quality is shown against GFLOP too.", ""]
        self.contenders()
        self.budgets(e, "shapes")
        if self.photographs:
            self.budgets(self.photographs, "photographs")
        self.pictures()
        self.smoothing()
        self.techniques()
        self.solvers()
        self.methods()
        self.stops()
        text = "\n".join(self.lines)
        if " % broken)" in text:
            text += "\n*Broken* are pictures with values that are no numbers; they are judged as gray.\n"
        path = os.path.join(self.folder, "claims.md")
        replace_file(path, lambda file: file.write(text.encode()), "--results")
        print(f"report: {path}")

    def answer(self):
        """One plot and three sentences."""
        sides = [("shapes", self.e)] + ([("photographs", self.photographs)] if self.photographs else [])

        def draw(*axes):
            for axis, (name, e) in zip(axes, sides):
                for run in e.contest():
                    found = [(b, self.at_budget(e, run, b)) for b in e.scale["budgets"]]
                    self.curve(axis, [(b, point[0]["fd"]) for b, point in found if point], e.runs[run][0], COLORS[run],
                               "--" if "fixed_point" in e.runs[run][1] else "-")
                floor = e.points["evaluator"]["floor"]
                axis.axhline(floor["fd"], color="gray", linestyle=":", label=f"{floor['n']:,} real pictures")
                axis.set(xscale="log", yscale="log", ylabel="Fréchet distance (lower is better)", title=name,
                         xlabel="Transformer-block passes per picture")
                self.ticks(axis, e.scale["budgets"])
                axis.legend(fontsize=7)

        self.lines += ["## When should I use a fixed-point model?", ""]
        self.figure("claims.png", draw, len(sides))
        if self.photographs:
            e = self.photographs
            words = "; ".join(e.runs[run][0] for run in e.contest())
            self.lines += [f"Contenders on photographs: {words} (width {e.scale['width']}, "
                           f"{e.scale['steps'] * e.scale['batch']:,} pictures seen by the first).", ""]
        wins, loses, same, pools, seeds = [], [], [], [], self.scale["seeds"]
        for name, e in sides:
            sizes = {dit: [max(len(e.choices(run, b)) for b in e.scale["budgets"]) for run in e.contest()
                           if ("fixed_point" in e.runs[run][1]) == dit] for dit in (False, True)}
            pools.append("{} ways to draw ({} models × {} settings) against {} ({} × {}) on {}".format(
                *(count for some in sizes.values() for count in (sum(some), len(some), max(some))), name))
            for b in e.scale["budgets"]:
                found = {run: point[0]["fd"] for run in e.contest() if (point := self.at_budget(e, run, b))}
                ours, theirs = (min((fd for run, fd in found.items() if ("fixed_point" in e.runs[run][1]) == dit),
                                    default=None) for dit in (False, True))
                if ours is None or theirs is None:  # two timesteps of the smallest cost more
                    continue
                told = seeds == 1 or apart(ours, theirs)
                (same if not told else wins if ours < theirs else loses).append((name, b, ours[0], theirs[0]))

        def say(rows):
            words = [f"{name} at {', '.join(str(b) for n, b, *_ in rows if n == name)} passes a picture ("
                     + ", ".join(f"{ours:.3g} against {theirs:.3g}" for n, _, ours, theirs in rows if n == name)
                     + ")" for name in dict.fromkeys(row[0] for row in rows)]
            return " and on ".join(words)

        parameters = {run: self.e.training[run][0]["parameters"] for run in self.e.contest()}
        dits = ", ".join(f"{options['depth']} blocks {parameters[run]:.2f}" for run, (_, options) in self.e.runs.items()
                         if "fixed_point" in options)
        alone = " (one seed: whether by more than chance is not known)" * (seeds == 1)
        self.lines += [
            (f"Trained with the same arithmetic, the best fixed-point model is nearer to the data than the best DiT on "
             f"{say(wins)}{alone}." if wins else "Trained with the same arithmetic, no fixed-point model was nearer to "
             "the data than the best DiT at a budget that was measured here."), "",
            f"DiT is nearer on {say(loses)}{alone}." if loses else "DiT was nearer at no budget that was measured.", "",
            *([f"They differ by less than their deviations over the seeds on {say(same)}.", ""] if same else []),
            f"The best is that of {' and '.join(pools)}, of fewer at small budgets; the least of more is lower by "
            "chance alone.", "",
            f"A fixed-point model's size does not grow with its passes: {parameters['fpdm']:.2f} million parameters, "
            f"DiTs of {dits} (at the paper's size 85 million, DiT-XL/2 674). So size is no reason to take it where a "
            "DiT of as few blocks is nearer. And the passes of one set of weights can be given out freely between "
            "timesteps.", ""]

    def contenders(self):
        e, scale = self.e, self.scale
        self.lines += ["## Parameters, memory, time", "",
                       "The paper: 87 % fewer parameters than DiT-XL/2 and 60 % less training memory.", ""]
        rows = []
        for run, (words, options) in e.runs.items():
            points = e.training[run]
            lrs = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in sorted(e.tuning[run].items()))
            drawn = ", ".join(f"{name} {fd:.3g}" for name, fd in e.drawn[run].items())
            rows.append([words, f"{points[0]['parameters']:.2f} M", f"{points[0]['memory']:.0f} MB",
                         f"{1e-9 * flops(scale, options, 0)[1]:.2f}", f"{points[0]['images']:,}",
                         f"{e.lr[run]:g}" + f" ({lrs})" * bool(lrs), drawn,
                         value((statistics.fmean(p["loss"] for p in points),
                                statistics.stdev([p["loss"] for p in points]) if len(points) > 1 else 0), 4)])
        self.lines += table(["model", "parameters", f"training memory, batch {scale['batch']}", "GFLOP per picture",
                             "pictures seen", "learning rate (loss of the short runs)",
                             "timesteps drawn (distance at a budget in the middle)", "loss, last quarter"], rows)
        self.lines += ["Memory is what train_* allocates and prints. The learning rate is the lowest whose loss is "
                       f"within 2 % of the best of short runs ({scale['tune_steps']} steps of the first, another "
                       "seed); where the best was the lowest or highest tried, half or twice of it was tried too. The "
                       "loss of a fixed-point model is that of its random n and m, and of the timesteps drawn: it "
                       "compares rows alike in both.", ""]
        rows = [[f"{name}, batch {batch}", f"{millions:.1f} M", f"{mb / 1000:.2f} GB", f"`train_{e.target} {options}`"]
                for name, batch, millions, mb, options in e.points["paper"]]
        self.lines += ["At the paper's size, 32×32 input (the program prints it before it starts):", ""]
        self.lines += table(["model", "parameters", "memory of training", "command"], rows)
        for batch in {row[1] for row in e.points["paper"]}:
            sizes = {name: (millions, mb) for name, b, millions, mb, _ in e.points["paper"] if b == batch}
            if len(sizes) == 2:
                fewer, less = (100 * (1 - ours / theirs) for ours, theirs in zip(*sizes.values()))
                self.lines += [f"With batch {batch}: {fewer:.1f} % fewer parameters, {less:.0f} % less memory.", ""]

    def budgets(self, e, name):
        budgets, judge = e.scale["budgets"], e.points["evaluator"]
        best = {(run, b): self.at_budget(e, run, b) for run in e.contest() for b in budgets}
        self.lines += [f"## Quality against budget: {name}", "",
                       "The paper: at a small budget the fixed-point model draws better pictures than DiT of the same "
                       "passes per timestep; with much compute DiT is better.", "",
                       f"{judge['floor']['n']:,} real pictures, held out, against the four fifths that are not: "
                       f"{judge['floor']['fd']:.2f}, noise {judge['ceiling']['fd']:.0f}; the classifier is right on "
                       f"{100 * judge['accuracy']:.1f} % of real pictures that it has not seen"
                       f"{', by their turn' * (not judge.get('labelled', True))}. Where real pictures are free "
                       "of noise, precision near 0 says that a picture can be told from real ones, not that it is "
                       "bad.", ""]

        def draw(axis):
            for run in e.contest():
                points = [found for b in budgets if (found := best[run, b])]
                self.curve(axis, [(m["gflop"][0], m["fd"]) for m, _ in points], e.runs[run][0], COLORS[run],
                           "--" if "fixed_point" in e.runs[run][1] else "-")
            axis.set(xscale="log", yscale="log", ylabel="Fréchet distance", xlabel="GFLOP per picture")
            axis.legend(fontsize=7)

        self.figure(f"claims_{name}.png", draw)
        for words, cell in (("distance (timesteps, t_shift; ² with --order 2)",
                             lambda m, s: f"{value(m['fd'])} ({s['steps']}, {s['t_shift']}{'²' * ('order' in s)})"),
                            ("recognised",
                             lambda m, s: f"{100 * m['recognised'][0]:.0f} %" if "recognised" in m else "–"),
                            ("precision / recall", lambda m, s: f"{m['precision'][0]:.2f} / {m['recall'][0]:.2f}")):
            rows = [[e.runs[run][0]] + [cell(*found) + broken(found[0]) if (found := best[run, b]) else "–"
                                        for b in budgets]
                    for run in e.contest()]
            self.lines += table([f"{words} at passes", *budgets], rows)

    def pictures(self):
        """The contenders' pictures at a small budget: the same noise and the same labels."""
        self.lines += ["## The same noise and labels", ""]
        for e, name in (self.e, "shapes"), (self.photographs, "photographs"):
            if not e:
                continue
            budget, files, names = e.scale["budgets"][len(e.scale["budgets"]) // 2], [], []
            for run in ("fpdm", "fpdm_skip", "fpdm_few", "dit3", "dit", "dit_deep"):
                if run not in e.runs or not (found := self.at_budget(e, run, budget)):
                    continue
                settings = {"cfg": 1, **found[1]}
                files.append(os.path.join(e.out, f"grid-{run}.png"))
                names.append(f"{e.runs[run][0]}: {settings['steps']} steps".replace(",", ""))
                e.call(e.sample_command(run, 1, 30, settings, files[-1]))
            picture = f"claims_pictures_{name}.png"
            e.call([sys.executable, os.path.join(HERE, "plot.py"), *files, "--names", ",".join(names), "--out",
                    os.path.join(self.folder, picture)])
            self.lines += [f"{name}, {budget} passes, no guidance, the first training seed:", "",
                           f"![{picture}]({picture})", ""]

    def stops(self):
        """What holds the fixed-point model back: models that differ in one thing, after the same number of pictures."""
        e = self.plateau
        self.lines += ["## What holds it back", "",
                       f"Models that differ from the first in one thing, {e.scale['steps'] * e.scale['batch']:,} "
                       f"pictures each, learning rate {e.scale['lrs'][0]:g}, the same seed, no guidance; the distance "
                       "with `--t_shift 1` and the best number of iterations per timestep, 1 or 4.", ""]
        rows = []
        for run, (words, options) in e.runs.items():
            found = [self.at_budget(e, run, b) for b in e.scale["budgets"]]
            rows.append([words, f"{e.training[run][0]['parameters']:.2f} M",
                         f"{1e-9 * flops(e.scale, options, 0)[1]:.2f}",
                         *(f"{p[0]['fd'][0]:.1f}, {100 * p[0]['recognised'][0]:.0f} %{broken(p[0])}" if p else "–"
                           for p in found)])
        self.lines += table(["model", "parameters", "training GFLOP per picture",
                             *(f"{b} passes: distance, recognised" for b in e.scale["budgets"])], rows)

    def smoothing(self):
        self.lines += ["## Smoothing: the same budget over more timesteps", "",
                       "The paper: at a fixed budget more timesteps with fewer iterations each are better, up to a "
                       "point.", ""]
        budgets, per_step = self.scale["budgets"], self.scale["per_step"]
        parts = {"shapes": self.e, **({"photographs": self.photographs} if self.photographs else {})}
        # With --t_shift 1, which tells the model the noise that there is: with 0, fewer timesteps leave more of it.
        grids = {name: {b: [(e.mean("fpdm", s), s) for k in per_step if (s := e.settings("fpdm", b, k, FIRST[1]))]
                        for b in budgets} for name, e in parts.items()}

        def draw(axis):
            grid = grids["shapes"]
            for i, b in enumerate(budgets[-4:]):
                self.curve(axis, sorted((s["steps"], m["fd"]) for m, s in grid[b]), f"{b} passes", f"C{i}")
            axis.set(xscale="log", yscale="log", xlabel="timesteps", ylabel="Fréchet distance")
            self.ticks(axis, sorted({s["steps"] for b in budgets[-4:] for _, s in grid[b]})[::2])
            axis.legend()

        self.figure("claims_smoothing.png", draw)
        for name, grid in grids.items():
            head = [f"{name}: passes"] + [f"{k} iteration{'s' * (k > 1)} per timestep" for k in per_step]
            self.lines += table(head, [[b] + [f"{value(m['fd'])} ({s['steps']}){broken(m)}" for m, s in grid[b]] +
                                       ["–"] * (len(per_step) - len(grid[b])) for b in grid])
        self.lines += ["Distance, and in brackets the number of timesteps; `--t_shift` 1; the plot is of shapes.", ""]

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
            rows.append([s["budget"], s["steps"], s["alloc"], distance(e.mean(run, s)),
                         distance(e.mean(run, without)), value(change), direction(changes)])
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
            rows.append([solver, s["iters"] if "tol" not in s else "", f"{m['passes'][0]:.0f}", distance(m)])
        self.lines += table(["solver", "iterations per timestep", "passes", "distance"], rows)

    def methods(self):
        e = self.e
        self.lines += ["## Training: S-JFB, one step, full unrolling", "",
                       "The paper: stochastic Jacobian-free backpropagation draws better pictures than one-step "
                       "gradients, and needs less memory than unrolling. Memory and learning rates are in the first "
                       "table; each has the sampler that is best for it. All run "
                       f"{self.scale['depth'] // 2} iterations in training, on average.", ""]
        runs = ["fpdm", "one_step", "unroll"]
        iterations = self.scale["unroll_iters"]
        found = {(run, k): e.mean(run, e.ten(run, iters=k)) for run in runs for k in iterations}

        def draw(axis):
            for run in runs:
                self.curve(axis, [(k, found[run, k]["fd"]) for k in iterations], e.runs[run][0], COLORS[run])
            axis.set(xscale="log", yscale="log", xlabel="iterations per timestep when sampling (10 timesteps)",
                     ylabel="Fréchet distance")
            self.ticks(axis, iterations)
            axis.legend()

        self.figure("claims_training.png", draw)
        self.lines += table(["iterations per timestep"] + [e.runs[run][0] for run in runs],
                            [[k] + [distance(found[run, k]) for run in runs] for k in iterations])
        losses = [e.runs[run][0] + " " + ", ".join(f"{p['loss']:.4f}" for p in e.training[run]) for run in runs]
        self.lines += [f"Losses, a run each (a loss near 1 is a run that diverged): {'; '.join(losses)}.", ""]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="hour", help="[hour]; smoke: self-test")
    parser.add_argument("--seeds", type=int, help="training runs of each contender [1; laptop, gpu: 3]")
    parser.add_argument("--photographs", metavar="DATASET", help="a dataset file for the part on photographs [none]")
    parser.add_argument("--target", choices=["cpu", "gpu"], help="which programs [gpu if nvidia-smi sees one]")
    parser.add_argument("--out", help="folder for runs and measurements [reproduce_SCALE]")
    parser.add_argument("--results", help="folder for claims.md and plots [test/results; smoke: --out]")
    main_of(reproduce, parser.parse_args())


def reproduce(args):
    for package in ("torch", "safetensors", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            die(f"needs the Python package {package}: pip install -r tools/requirements.txt")
    args.out = os.path.abspath(args.out or f"reproduce_{args.scale}")
    args.results = os.path.abspath(args.results or (args.out if args.scale == "smoke" else f"{ROOT}/test/results"))
    os.makedirs(args.results, exist_ok=True)  # before the work, not after it
    tempfile.TemporaryFile(dir=args.results).close()
    if args.photographs:
        import evaluate
        image_size = evaluate.Dataset(args.photographs).shape[1]
    if not args.target:
        gpu = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
        args.target = "gpu" if gpu else "cpu"
    if args.seeds is not None and args.seeds < 1:
        die("--seeds: at least 1")
    seeds = {"seeds": args.seeds} if args.seeds else {}
    scale = {**SCALES[args.scale], **seeds}
    runs = contenders(scale)
    shapes, photographs = Experiment(args, "shapes", args.out, scale, runs), None
    if args.photographs:
        photo_scale = {**SCALES[args.scale], **(PHOTOGRAPHS if args.scale in ("hour", "laptop") else {}), **seeds}
        some = photo_scale["lrs"] if isinstance(photo_scale["lrs"], dict) else (
            "fpdm", "fpdm_skip", "fpdm_few", "dit3", "dit", "dit_deep")
        photo_scale["image_size"] = image_size
        photographs = Experiment(args, os.path.abspath(args.photographs), os.path.join(args.out, "photographs"),
                                 photo_scale, {run: runs[run] for run in some})
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        shapes.everything()
        scale = {**scale, "steps": scale["plateau_steps"], "lrs": [shapes.lr["fpdm"]], "seeds": 1,
                 "samplings": [shapes.sampling["fpdm"]], "budgets": [24], "per_step": [1, 4], "samplers": FIRST[1:2],
                 "same_pictures": True}
        single = Experiment(args, "shapes", os.path.join(args.out, "plateau"), scale, plateau(scale))
        single.make_evaluator = shapes.make_evaluator
        single.everything()
        if photographs:
            photographs.everything()
        Report(args, shapes, single, photographs).write()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        sys.exit(130)
    except Failed as error:
        die(error)


if __name__ == "__main__":
    main()
