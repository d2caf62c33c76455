#!/usr/bin/env python3
"""Times a training step of PyTorch, eager and compiled, and of ./bench_cpu on the same work, in turn.

    make bench_cpu && python3 tools/bench_torch.py
    python3 tools/bench_torch.py --width 128 --heads 2 --batch 4 --rounds 3 --autocast
    python3 tools/bench_torch.py --device cuda --width 1152 --heads 16 --channels 4 --batch 64 --mode compiled

A step is n iterations without gradient, m with, the loss, the gradients, AdamW and the EMA, on all cores, in float32 or
with --autocast with matmuls in bf16.
The contenders take turns, A B C A B C ..., a step to warm up and a timed one each, so that whatever else the machine
does hits all of them; what counts is the median over the rounds of each round's ratio. Every contender is a process of
its own, for its peak of memory. torch.compile gets the whole model with n and m fixed, so that it unrolls the
iterations: its best case, for in training n and m change with each step. Needs torch (2.0 or newer for the compiled
one), numpy and safetensors; without ./bench_cpu, PyTorch is timed alone.

With --device cuda, or with --mode, it measures PyTorch alone, in bf16, and prints `name value unit` lines as bench_gpu
does on the same work: a training step (autocast), then sampling at --passes block passes a picture (weights in bf16),
each with its first call's time and its peak memory; for --mode attention the attention kernel alone. PyTorch gets
fused AdamW, foreach EMA and clipping; "compiled" is torch.compile in its default mode. It runs the plain equations, and
so computes in every iteration what stays constant, which ours computes once.
"""
import argparse
import atexit
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback

PAUSE = 0.3  # seconds between turns: OpenMP's threads spin for up to 0.2 s after their work, on the cores of the next


# ---- shared with scaling.py, report_gpu.py, report_memory.py, which run without numpy and pillow; others: data.py


def die(message, status=1):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(status)


def main_of(run):
    try:
        run()
    except KeyboardInterrupt:
        die("stopped", 130)


def torch_version(torch):
    return tuple(map(int, torch.__version__.split(".")[:2]))


def needs_torch_2(torch):
    if torch_version(torch) < (2, 0):
        die(f"torch {torch.__version__} is too old for this; it needs 2.0 or newer")


def positive(text):
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole(text):
    return 0 if text == "0" else positive(text)


# ---- the side of a PyTorch process: sets up, warms up, then times one step for each line on its standard input


def memory_mb(field):
    """VmRSS, what the process holds now, or VmHWM, its peak. getrusage's peak would include the parent's memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1.024e-3 for line in status if line.startswith(field + ":"))


def make_step(work, compiled):
    """A function that does one training step of the work and returns its milliseconds."""
    import torch

    import reference

    def cache_passes_gradients():
        """Whether autocast's bf16 copy of a weight that was first used without gradient is of use with gradient: in old
        versions of PyTorch it is not, and every use must make its own."""
        layer, x = torch.nn.Linear(8, 8), torch.randn(8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                layer(x)
            return layer(x).requires_grad

    class Autocast(torch.nn.Module):
        cache = work.autocast and cache_passes_gradients()

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *inputs, **named):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=self.cache):
                return self.model(*inputs, **named)

    cfg = reference.Config(image_size=work.image_size, patch=work.patch, width=work.width, heads=work.heads,
                           pre_depth=work.pre_depth, post_depth=work.post_depth)
    model, ema, schedule = reference.FPDM(cfg), reference.FPDM(cfg), reference.Schedule.training(cfg)
    fused = {"fused": True} if torch_version(torch) >= (2, 4) else {}  # before, fused AdamW was for GPUs alone
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, **fused)
    run = Autocast(model) if work.autocast else model
    run = torch.compile(run) if compiled else run
    x0, noise = torch.randn(2, work.batch, cfg.channels, cfg.image_size, cfg.image_size)
    t = torch.randint(cfg.diffusion_steps, (work.batch,))
    y = torch.randint(cfg.classes, (work.batch,))

    def step():
        start = time.perf_counter()
        loss, _ = reference.training_step(cfg, schedule, run, ema, optimizer, x0, noise, t, y, work.n, work.m)
        loss.item()
        milliseconds = (time.perf_counter() - start) * 1e3
        if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()):
            who, leave = ("compiled", "; --no_compile leaves it out") if compiled else ("eager", "")
            die(f"PyTorch {who}: a parameter has no gradient, or none that is finite{leave}")
        return milliseconds

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
    print(json.dumps({"first_ms": warm[0], "torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        step()  # ./bench_cpu too runs a step before the one that it times
        print(json.dumps({"ms": step(), "peak_mb": memory_mb("VmHWM"), "imports_mb": imports_mb}), flush=True)


# ---- PyTorch alone, in bf16, on a GPU: one figure a line


def figure(name, value, unit):
    print(f"{name} {value:.6g} {unit}", flush=True)


class Device:
    """What differs between a GPU and the CPU, which is there to try this without one."""

    def __init__(self, torch, name):
        self.torch, self.cuda = torch, name.startswith("cuda")

    def wait(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def forget_peak(self):
        if self.cuda:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peaks(self, prefix):
        """What tensors took, what PyTorch held, and what of the device was in use, by whomever (as nvidia-smi says)."""
        if not self.cuda:
            return figure(f"{prefix}_peak_mb", memory_mb("VmHWM"), "MB")
        free, total = self.torch.cuda.mem_get_info()
        figure(f"{prefix}_peak_mb", self.torch.cuda.max_memory_allocated() / 1e6, "MB")
        figure(f"{prefix}_reserved_mb", self.torch.cuda.max_memory_reserved() / 1e6, "MB")
        figure(f"{prefix}_device_mb", (total - free) / 1e6, "MB")


def time_calls(device, call, warmup, rounds):
    """Seconds of the first call, and the median over the rounds after the warm-up."""
    seconds = []
    for _ in range(max(1, warmup) + rounds):
        device.wait()
        start = time.perf_counter()
        call()
        device.wait()
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[max(1, warmup) :])


def bf16_train(torch, reference, args, cfg, device, mode):
    """The step of test/bench.c: loss, gradients, their norm, clipping, AdamW, EMA."""
    schedule = reference.Schedule.training(cfg, device=args.device)
    with torch.device(args.device):
        model = reference.FPDM(cfg)
        x0, noise = torch.randn(2, args.batch, cfg.channels, cfg.image_size, cfg.image_size)
        t = torch.randint(cfg.diffusion_steps, (args.batch,))
        y = torch.randint(cfg.classes, (args.batch,))
    params = list(model.parameters())
    ema = [p.detach().clone() for p in params]
    fused = {"fused": True} if device.cuda else {}
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0, **fused)
    run = torch.compile(model, dynamic=False) if mode == "compiled" else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        # No cache: it would hand bf16 copies of weights from the iterations without gradient to those with, and in some
        # versions of PyTorch such copies pass no gradient on. As in fpdm.cu, weight gradients so accumulate in fp32.
        with torch.autocast("cuda" if device.cuda else "cpu", torch.bfloat16, cache_enabled=False):
            loss = reference.diffusion_loss(cfg, schedule, run, x0, noise, t, y, args.n, args.m)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - 0.9999)
        return loss.item()

    device.forget_peak()
    first, seconds = time_calls(device, step, args.warmup, args.rounds)
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in params):
        die(f"{mode}: a parameter has no gradient, or none that is finite: this is not the same work")
    figure(f"{mode}_train_first_s", first, "s")
    figure(f"{mode}_train_step_ms", seconds * 1e3, "ms")
    figure(f"{mode}_train_images_per_s", args.batch / seconds, "images/s")
    device.peaks(f"{mode}_train")


def bf16_sample(torch, reference, args, cfg, device, mode):
    """The flow sampler over 20 timesteps with --passes block passes in all; weights and activations in bf16."""
    steps = 20
    iters = args.passes // steps - cfg.pre_depth - cfg.post_depth
    passes = steps * (iters + cfg.pre_depth + cfg.post_depth if cfg.fixed_point else cfg.depth)
    if iters < 1:
        die(f"option --passes: {args.passes} are too few for {steps} timesteps")
    with torch.device(args.device):
        model = reference.FPDM(cfg).to(torch.bfloat16).eval()
        noise = torch.randn(args.batch, cfg.channels, cfg.image_size, cfg.image_size)
        y = torch.randint(cfg.classes, (args.batch,))
        times = [torch.full((args.batch,), i * 52) for i in reversed(range(steps))]
    run = torch.compile(model, dynamic=False) if mode == "compiled" else model

    @torch.no_grad()
    def sample():
        x = noise
        for t in times:
            x = x + run(x.to(torch.bfloat16), t, y, 0, iters)[0].float() / steps
        return x

    device.forget_peak()
    first, seconds = time_calls(device, sample, 1, max(1, args.rounds // 2))
    figure(f"{mode}_sample_first_s", first, "s")
    figure(f"{mode}_sample_passes", passes, "passes")
    figure(f"{mode}_sample_passes_per_s", passes * args.batch / seconds, "passes/s")
    figure(f"{mode}_sample_images_per_s", args.batch / seconds, "images/s")
    device.peaks(f"{mode}_sample")


def bf16_attention(torch, reference, args, cfg, device, mode):
    """softmax(q k^T) v and its gradients for q, k, v as they lie in the output of one linear layer, as in the model."""
    tokens, D = (cfg.image_size // cfg.patch) ** 2, cfg.width
    qkv = torch.randn(args.batch, tokens, 3, cfg.heads, D // cfg.heads, device=args.device, dtype=torch.bfloat16)
    q, k, v = (part.detach().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    dout = torch.randn(args.batch, tokens, cfg.heads, D // cfg.heads, device=args.device, dtype=torch.bfloat16)
    flops, repeat = 4e-9 * args.batch * tokens * tokens * D, 20 if device.cuda else 1

    def forward():
        with torch.no_grad():
            for _ in range(repeat):
                reference.attention(q, k, v)

    out = reference.attention(q, k, v)

    def backward():
        for _ in range(repeat):
            torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2), retain_graph=True)

    figure("attention_forward_gflops", repeat * flops / time_calls(device, forward, 2, args.rounds)[1], "GFLOP/s")
    figure("attention_backward_gflops", 2 * repeat * flops / time_calls(device, backward, 2, args.rounds)[1], "GFLOP/s")


def bf16_figures(args):
    import torch

    import reference

    needs_torch_2(torch)
    if args.device == "cuda" and not torch.cuda.is_available():
        die(f"torch {torch.__version__} has no GPU to use here")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = Device(torch, args.device)
    cfg = reference.Config(image_size=args.image_size, channels=args.channels, patch=args.patch, width=args.width,
                           heads=args.heads, fixed_point=args.fixed_point, depth=args.depth, pre_depth=args.pre_depth,
                           post_depth=args.post_depth, prediction="flow")
    failed = False
    for mode in (args.mode or "attention,eager,compiled").split(","):
        if mode not in ("attention", "eager", "compiled"):
            die(f"option --mode: '{mode}' is not eager, compiled or attention")
        for name, work in (("train", bf16_train), ("sample", bf16_sample)) if mode != "attention" else (
                ("forward", bf16_attention),):
            try:
                work(torch, reference, args, cfg, device, mode)
            except Exception as error:  # whatever it is, the figures after it are still to come
                if "out of memory" in str(error):
                    figure(f"{mode}_{name}_out_of_memory", 1, "-")
                else:
                    traceback.print_exc()
                    failed = True
            torch._dynamo.reset()  # compiled code holds memory
            if device.cuda:
                torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


# ---- the side that takes turns


class Torch:
    def __init__(self, name, args):
        self.name = name
        command = [sys.executable, __file__, "--process", name, *sys.argv[1:]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        start_new_session=True)  # where Ctrl-C does not reach it
        atexit.register(self.process.kill)
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
                "post_depth": args.post_depth, "skip": 0, "gemm": 0, "rounds": 1,
                "dtype": "bf16" if args.autocast else "fp32"}
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
    option("--width", type=positive, default=384, help="D (default: 384)")
    option("--heads", type=positive, default=6, help="attention heads (default: 6)")
    option("--patch", type=positive, default=2, help="side of a patch (default: 2)")
    option("--image_size", type=positive, default=32, help="side of the images, of 3 channels (default: 32)")
    option("--channels", type=positive, help="of the images, with --device cuda or --mode (default: 4)")
    option("--fixed_point", type=int, choices=(0, 1), help="0: plain DiT, with --device cuda or --mode (default: 1)")
    option("--depth", type=positive, help="blocks of plain DiT (default: 28)")
    option("--pre_depth", type=whole, default=1, help="blocks before the fixed point (default: 1)")
    option("--post_depth", type=whole, default=1, help="blocks after it (default: 1)")
    option("--batch", type=positive, default=8, help="images in a step (default: 8)")
    option("--n", type=whole, default=5, help="iterations without gradient (default: 5)")
    option("--m", type=positive, default=6, help="iterations with gradient (default: 6)")
    option("--rounds", type=positive, default=5, help="turns of each contender (default: 5)")
    option("--warmup", type=positive, default=3, help="steps of PyTorch before the first turn (default: 3)")
    option("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each contender (default: all)")
    option("--bench", default="./bench_cpu", help="the program to compare with (default: ./bench_cpu)")
    option("--no_compile", action="store_true", help="leave torch.compile out; compiling takes a minute or two")
    option("--autocast", action="store_true", help="bf16 matmuls: torch.autocast, and ./bench_cpu --dtype bf16")
    option("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: PyTorch alone, in bf16 (default: cpu)")
    option("--mode", help="eager, compiled, attention, or several with commas: these alone, in bf16")
    option("--passes", type=positive, help="block passes a picture when sampling (default: 560)")
    option("--process", help=argparse.SUPPRESS)
    parser.error = lambda message: die(f"{message}; see --help")
    args = parser.parse_args()
    if args.width % args.heads or args.width % 4:
        die(f"--width {args.width}: not a multiple of 4 and of --heads {args.heads}")
    if args.image_size % args.patch:
        die(f"--image_size {args.image_size}: not a multiple of --patch {args.patch}")
    alone = args.device == "cuda" or args.mode
    for name, default in ("channels", 4), ("fixed_point", 1), ("depth", 28), ("passes", 560):
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not alone:
            die(f"--{name}: only with --device cuda or --mode, where PyTorch runs alone")
    for package in ("torch", "numpy", "safetensors"):
        if importlib.util.find_spec(package) is None:
            die(f"needs the Python package {package}: pip install -r tools/requirements.txt")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.process:
        return torch_process(args)
    if alone:
        return bf16_figures(args)

    contenders = [Torch("torch-eager", args)]
    version = contenders[0].about["torch"]
    if int(version.split(".")[0]) >= 2 and not args.no_compile:
        contenders.append(Torch("torch-compiled", args))
    if os.path.exists(args.bench):
        contenders.append(BenchCpu("bench_cpu", args))
    else:
        print(f"bench_torch.py: no {args.bench}, so PyTorch is timed alone; make bench_cpu builds it", file=sys.stderr)
    tokens = (args.image_size // args.patch) ** 2
    print(f"D {args.width}, {args.heads} heads, {tokens} tokens, batch {args.batch}, n {args.n}, m {args.m}, "
          f"{'bf16' if args.autocast else 'fp32'}, "
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
    main_of(main)
