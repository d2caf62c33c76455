#!/usr/bin/env python3
"""Times a training step of PyTorch, eager and compiled, and of ./bench_cpu on the same work, in turn.

    make bench_cpu && python3 tools/bench_torch.py
    python3 tools/bench_torch.py --width 128 --heads 2 --batch 4 --rounds 3

A step is n iterations without gradient, m with, the loss, the gradients, AdamW and the EMA, in float32, on all cores.
The contenders take turns, A B C A B C ..., a step to warm up and a timed one each, so that whatever else the machine
does hits all of them; what counts is the median over the rounds of each round's ratio. Every contender is a process of
its own, for its peak of memory. torch.compile gets the whole model with n and m fixed, so that it unrolls the
iterations: its best case, for in training n and m change with each step. Needs torch (2.0 or newer for the compiled
one), numpy and safetensors; without ./bench_cpu, PyTorch is timed alone.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

PAUSE = 0.3  # seconds between turns: OpenMP's threads spin for up to 0.2 s after their work, on the cores of the next


def die(message):
    print(f"bench_torch.py: {message}", file=sys.stderr)
    sys.exit(1)


# ---- the side of a PyTorch process: sets up, warms up, then times one step for each line on its standard input


def memory_mb(field):
    """VmRSS, what the process holds now, or VmHWM, its peak. getrusage's peak would include the parent's memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))


def make_step(work, compiled):
    """A function that does one training step of the work and returns its milliseconds."""
    import torch

    import reference

    cfg = reference.Config(image_size=work.image_size, patch=work.patch, width=work.width, heads=work.heads,
                           pre_depth=work.pre_depth, post_depth=work.post_depth)
    model, ema, schedule = reference.FPDM(cfg), reference.FPDM(cfg), reference.Schedule.training(cfg)
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    fused = {"fused": True} if version >= (2, 4) else {}  # before, fused AdamW was for GPUs alone
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, **fused)
    run = torch.compile(model) if compiled else model
    x0, noise = torch.randn(2, work.batch, cfg.channels, cfg.image_size, cfg.image_size)
    t = torch.randint(cfg.diffusion_steps, (work.batch,))
    y = torch.randint(cfg.classes, (work.batch,))

    def step():
        start = time.perf_counter()
        loss, _ = reference.training_step(cfg, schedule, run, ema, optimizer, x0, noise, t, y, work.n, work.m)
        loss.item()
        return (time.perf_counter() - start) * 1e3

    return step


def torch_process(args):
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tiny = {"image_size": 8, "patch": 2, "width": 16, "heads": 2, "batch": 1, "n": 1, "m": 1}
    make_step(argparse.Namespace(**{**vars(args), **tiny}), compiled=False)()  # torch loads parts when first used
    imports_mb = memory_mb("VmRSS")
    step = make_step(args, args.process == "torch-compiled")
    warm = [step() for _ in range(args.warmup)]
    try:
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # the peak counts from here, without that of the compiler
    except OSError:
        pass
    print(json.dumps({"first_ms": warm[0]}), flush=True)
    for _ in sys.stdin:
        step()  # ./bench_cpu too runs a step before the one that it times
        print(json.dumps({"ms": step(), "peak_mb": memory_mb("VmHWM"), "imports_mb": imports_mb}), flush=True)


class Torch:
    def __init__(self, name, args):
        self.name = name
        command = [sys.executable, __file__, "--process", name, *sys.argv[1:]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            die(f"{self.name}: the process ended; its own message is above")
        return json.loads(line)

    def step(self):
        print("step", file=self.process.stdin, flush=True)
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- the side of ./bench_cpu: a run with one repetition each turn


class BenchCpu:
    def __init__(self, name, args):
        self.name, self.about = name, {}
        work = {"width": args.width, "heads": args.heads, "patch": args.patch, "image_size": args.image_size,
                "batch": args.batch, "n": args.n, "m": args.m, "pre_depth": args.pre_depth,
                "post_depth": args.post_depth, "gemm": 0, "rounds": 1}
        self.command = [args.bench, *(f"--{option}={value}" for option, value in work.items())]

    def step(self):
        process = subprocess.run(self.command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            die(f"{' '.join(self.command)} ended with {process.returncode}; its own message is above")
        figures = {words[0]: words[1] for words in map(str.split, process.stdout.splitlines()) if len(words) == 3}
        if not {"train_step_ms", "train_peak_mb"} <= figures.keys():
            die(f"{self.command[0]}: printed no train_step_ms and train_peak_mb; build it again: make bench_cpu")
        return {"ms": float(figures["train_step_ms"]), "peak_mb": float(figures["train_peak_mb"]), "imports_mb": 0}

    def close(self):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--width", type=int, default=384, help="D (default: 384)")
    option("--heads", type=int, default=6, help="attention heads (default: 6)")
    option("--patch", type=int, default=2, help="side of a patch (default: 2)")
    option("--image_size", type=int, default=32, help="side of the images, of 3 channels (default: 32)")
    option("--pre_depth", type=int, default=1, help="blocks before the fixed point (default: 1)")
    option("--post_depth", type=int, default=1, help="blocks after it (default: 1)")
    option("--batch", type=int, default=8, help="images in a step (default: 8)")
    option("--n", type=int, default=5, help="iterations without gradient (default: 5)")
    option("--m", type=int, default=6, help="iterations with gradient (default: 6)")
    option("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    option("--warmup", type=int, default=3, help="steps of PyTorch before the first turn (default: 3)")
    option("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender (default: every core)")
    option("--bench", default="./bench_cpu", help="the program to compare with (default: ./bench_cpu)")
    option("--no_compile", action="store_true", help="leave torch.compile out; compiling takes a minute or two")
    option("--process", help=argparse.SUPPRESS)
    parser.error = lambda message: die(f"{message}; see --help")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.process:
        return torch_process(args)

    probe = "import torch; print(torch.__version__)"
    version = subprocess.run([sys.executable, "-c", probe], stdout=subprocess.PIPE, text=True).stdout.strip()
    if not version:
        die(f"{sys.executable} has no torch; run this with a Python that has, or pip install torch")
    contenders = [Torch("torch-eager", args)]
    if int(version.split(".")[0]) >= 2 and not args.no_compile:
        contenders.append(Torch("torch-compiled", args))
    if os.path.exists(args.bench):
        contenders.append(BenchCpu("bench_cpu", args))
    else:
        print(f"bench_torch.py: no {args.bench}, so PyTorch is timed alone; make bench_cpu builds it", file=sys.stderr)
    tokens = (args.image_size // args.patch) ** 2
    print(f"D {args.width}, {args.heads} heads, {tokens} tokens, batch {args.batch}, n {args.n}, m {args.m}, "
          f"{args.threads} threads, torch {version}")
    for contender in contenders:
        if "first_ms" in contender.about:
            print(f"{contender.name}: first step {contender.about['first_ms'] / 1e3:.1f} s")

    turns = {contender.name: [] for contender in contenders}
    for number in range(args.rounds):
        for contender in contenders:
            time.sleep(PAUSE)
            turns[contender.name].append(contender.step())
        steps = "  ".join(f"{name} {done[-1]['ms']:.1f}" for name, done in turns.items())
        print(f"round {number + 1}, ms: {steps}", flush=True)
    for contender in contenders:
        contender.close()

    print(f"\n{'':16}{'median ms':>10}{'min':>10}{'max':>10}{'peak MB':>10}{'less imports':>14}")
    for name, done in turns.items():
        ms, peak = [turn["ms"] for turn in done], done[-1]["peak_mb"]
        print(f"{name:16}{statistics.median(ms):10.1f}{min(ms):10.1f}{max(ms):10.1f}{peak:10.0f}"
              f"{peak - done[-1]['imports_mb']:14.0f}")
    last = contenders[-1].name
    for name in list(turns)[:-1]:
        ratios = [mine["ms"] / other["ms"] for mine, other in zip(turns[name], turns[last])]
        print(f"time of {name} / {last}: median {statistics.median(ratios):.3f}, "
              f"each round {' '.join(f'{ratio:.3f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
