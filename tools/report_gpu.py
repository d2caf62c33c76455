#!/usr/bin/env python3
"""Checks and measures fpdm.cu on this machine's NVIDIA GPU and writes test/results/GPU.md: numbers, versions, commands.

    make report_gpu                                        everything, within 9 minutes
    make report_gpu REPORT="--parts matmul,attention"      some parts (--help lists them): into out_report alone
    python3 tools/report_gpu.py --out /tmp/report          report.md, figures.json and log.txt into this folder
    python3 tools/report_gpu.py --target emu --parts cases,steps,matmul     tries the report itself, without a GPU

A part whose tool is missing (GPU, nvcc, compute-sanitizer, torch, cuBLAS) is skipped and says so; a part that fails or
takes longer than its limit does not stop the others. The report is written anew after every command, so an interrupted
run leaves what it had in --out; into test/results goes a whole one, or one with a --suffix. Exit status 1 if a part
failed. Needs nothing but Python; with torch, its figures too.
"""
import argparse
import csv
import glob
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from bench_torch import die  # of this folder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOSS_LIMIT = 1e-4  # of the relative difference between losses of the CUDA and the CPU program in fp32

# What is measured: the published sizes on a GPU, next to nothing elsewhere
GPU_SIZES = {
    "sizes": {"S": (384, 6), "B": (768, 12), "XL": (1152, 16)}, "tokens": 256, "square": 4096, "rounds": 9,
    "model": {"width": 1152, "heads": 16, "patch": 2, "image_size": 32, "channels": 4, "depth": 28}, "n": 5, "m": 6,
    "passes": 560, "steps": 200, "train": {"width": 64, "heads": 4, "patch": 4, "image_size": 16, "batch": 8},
    "default": {"width": 128, "image_size": 24, "batch": 32}, "cases": None,
    "sampled": ("--model", "XL/2", "--image_size", "32"),
}
TINY_SIZES = {
    "sizes": {"tiny": (64, 4)}, "tokens": 16, "square": 64, "rounds": 2,
    "model": {"width": 16, "heads": 2, "patch": 4, "image_size": 8, "channels": 4, "depth": 5}, "n": 1, "m": 2,
    "passes": 100, "steps": 12, "train": {"width": 16, "heads": 2, "patch": 4, "image_size": 8, "batch": 2},
    "default": {}, "cases": ["forward_dit_sigma", "sample_ddpm_2_steps"],
    "sampled": ("--width", 16, "--heads", 2, "--image_size", 8),
}


class Skip(Exception):
    """The part cannot be done here, for this reason."""


class Failed(Exception):
    """The part was done, and something is wrong."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading what the programs print


def parse_figures(text):
    """`name value unit` lines -> {name: value}."""
    figures = {}
    for words in map(str.split, text.splitlines()):
        if len(words) == 3 and re.fullmatch(r"\w+", words[0]):
            try:
                figures[words[0]] = float(words[1])
            except ValueError:
                pass
    return figures


def parse_cases(text):
    """Output of test_*: cases passed and failed, tensors compared, the one nearest to its limit, FAIL lines."""
    passed = failed = count = 0
    worst, case, failures = (-1.0, "nothing compared"), "?", []
    for line in text.splitlines():
        tensor = re.match(r"\s+(\S+)\s+(\S+)\s+limit (\S+)\s+(ok|FAIL)", line)
        total = re.match(r"(\d+) passed, (\d+) failed", line)
        if tensor:
            name, error, limit, verdict = tensor.groups()
            ratio = float(error) / float(limit)
            where = f"{name} of {os.path.basename(case).replace('.safetensors', '')}: {error}, limit {limit}"
            worst = max(worst, (float("inf") if ratio != ratio else ratio, where))
            failures += [where] if verdict == "FAIL" else []
            count += 1
        elif total:
            passed, failed = map(int, total.groups())
        elif ".safetensors" in line:
            case = line.split()[0].rstrip(",")
    return {"passed": passed, "failed": failed, "tensors": count, "worst": worst[1], "failures": failures}


def compare_logs(got, want, limit=LOSS_LIMIT):
    """Two log.csv texts: how many steps, the largest relative difference of a loss and its step, and what is wrong."""
    rows = [list(csv.DictReader(io.StringIO(text))) for text in (got, want)]
    result = {"steps": min(map(len, rows)), "largest": 0.0, "at": 0, "problem": ""}
    if not rows[1] or len(rows[0]) != len(rows[1]):
        result["problem"] = f"{len(rows[0])} steps against {len(rows[1])}"
    for a, b in zip(*rows):
        draws = [tuple(row[key] for key in ("step", "n", "m", "lr")) for row in (a, b)]
        if draws[0] != draws[1]:
            return {**result, "problem": f"step, n, m, lr are {draws[0]} against {draws[1]}: not the same draws"}
        x, y = float(a["loss"]), float(b["loss"])
        difference = abs(x - y) / max(abs(y), 1e-30)
        if not difference <= result["largest"]:  # a NaN too
            result.update(largest=difference, at=int(a["step"]))
        if difference != difference:
            break
    if not result["largest"] <= limit and not result["problem"]:
        result["problem"] = f"losses differ by {result['largest']:.1e} at step {result['at']}, limit {limit:.0e}"
    return result


def ratio(a, b):
    return f"{a / b:.2f}" if a and b else "-"


def number(value, digits=0):
    return "-" if value is None else f"{value:,.{digits}f}"


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Running programs


class Watch:
    """The most memory of the GPU that was in use meanwhile, by nvidia-smi, every fifth of a second."""

    def __enter__(self):
        self.peak_mb, self.process = None, None
        if shutil.which("nvidia-smi"):
            command = "nvidia-smi -i 0 --query-gpu=memory.used --format=csv,noheader,nounits -lms 200"
            self.process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                            text=True)
            self.thread = threading.Thread(target=self.read, daemon=True)
            self.thread.start()
        return self

    def read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.peak_mb = max(self.peak_mb or 0, int(line) * 1.048576)  # it counts in MiB

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.thread.join(1)


class Done:
    def __init__(self, command, status, text, seconds, limit):
        self.command, self.status, self.text, self.seconds = command, status, text, seconds
        self.ok = status == 0
        said = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
        tell = next((line for line in said if re.search(r"\berror\b", line)), said[-1])[:200]
        self.why = f"over its limit of {limit:.0f} s" if status is None else f"ended with {status}: {tell}"


class Report:
    def __init__(self, args):
        self.args, self.start = args, time.monotonic()
        self.deadline = self.start + 60 * args.minutes
        self.until = self.deadline  # of the part that runs
        self.emulated = args.target != "gpu"
        self.work = TINY_SIZES if self.emulated else GPU_SIZES
        self.parts, self.commands, self.running, self.background = [], [], [], []
        self.data = {"about": {}, "cases": {}, "checks": [], "matmul": [], "attention": [], "models": {}, "notes": []}
        self.lock = threading.Lock()
        self.gpu = self.memory_gb = None
        self.python, self.torch = None, "torch: not looked for"
        try:
            os.makedirs(args.out, exist_ok=True)
            self.log = open(os.path.join(args.out, "log.txt"), "w")
        except OSError as error:
            die(f"--out {args.out}: {error.strerror}; give a folder that can be made and written")
        self.scratch = tempfile.mkdtemp(prefix="report_gpu.")
        self.env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        self.env.update(TORCHINDUCTOR_CACHE_DIR=os.path.join(self.scratch, "inductor"), PYTHONUNBUFFERED="1",
                        OMP_WAIT_POLICY="passive")  # spinning threads would hold up the compilers beside them

    # ---- commands

    def spawn(self, command):
        output = tempfile.TemporaryFile("w+", errors="replace")
        process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, cwd=ROOT, env=self.env, start_new_session=True)
        process.output, process.began, process.command = output, time.monotonic(), shlex.join(map(str, command))
        with self.lock:
            self.running.append(process)
        return process

    def finish(self, process, limit):
        """Waits until the limit, then ends the process and its children."""
        try:
            status = process.wait(max(0.1, process.began + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = None
            self.kill(process)
        seconds = time.monotonic() - process.began
        process.output.seek(0)
        done = Done(process.command, status, process.output.read(), seconds, limit)
        with self.lock:
            self.running.remove(process)
            self.commands.append((process.command, seconds, "ok" if done.ok else done.why))
            self.log.write(f"$ {process.command}\n{done.text}\n[{'ok' if done.ok else done.why}; {seconds:.1f} s]\n\n")
            self.log.flush()
        return done

    @staticmethod
    def kill(process):
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the session that spawn made for it
        except ProcessLookupError:
            pass
        process.wait()

    def run(self, *command, limit=600):
        """Runs a command to its end, its own limit, or that of the part."""
        if self.until - time.monotonic() < 1:
            raise Failed("over the time limit of this part")
        try:
            process = self.spawn(command)
        except OSError as error:
            raise Skip(f"{command[0]}: {error.strerror}")
        done = self.finish(process, min(limit, self.until - time.monotonic()))
        self.write()
        return done

    def program(self, name):
        path = f"./{name}_{self.args.target}"
        if self.args.target == "emu" and name == "bench":
            path = "./bench_cpu"  # the emulator would take hours for it
        if not os.access(os.path.join(ROOT, path), os.X_OK):
            raise Skip(f"no {path}: it was not built")
        if not self.gpu and not self.emulated:
            raise Skip("no NVIDIA GPU here")
        return path

    # ---- parts

    def part(self, name, function, limit):
        if self.args.parts and name not in self.args.parts:
            return
        began, left = time.monotonic(), self.deadline - time.monotonic()
        self.until = began + min(limit, left)
        entry = {"name": name, "result": "interrupted", "seconds": 0.0}
        self.parts.append(entry)
        print(f"{name} ...", end=" ", flush=True)
        try:
            if left < 5:
                raise Skip(f"the {self.args.minutes:g} minutes were over; try --parts {name}")
            entry["result"] = function() or "ok"
        except Skip as reason:
            entry["result"] = f"skipped: {reason}"
        except Failed as reason:
            entry["result"] = f"FAILED: {reason}"
        except Exception as error:  # of this program, or output that it does not understand; the others go on
            entry["result"] = f"FAILED: {type(error).__name__}: {error}"
        entry["seconds"] = time.monotonic() - began
        print(f"{entry['result']} ({entry['seconds']:.0f} s)", flush=True)
        self.write()

    def machine(self):
        about, missing = self.data["about"], []
        ask = lambda *command: self.run(*command, limit=60) if shutil.which(command[0]) else None
        smi = ask("nvidia-smi", "-i", "0", "--format=csv,noheader,nounits",
                  "--query-gpu=name,memory.total,driver_version,compute_cap,power.limit,clocks.max.sm")
        fields = [word.strip() for word in smi.text.splitlines()[0].split(",")] if smi and smi.ok and smi.text else []
        if len(fields) == 6:
            self.gpu, self.memory_gb = fields[0], (float(fields[1]) if fields[1].isdigit() else 0) * 1.048576e-3
            about["GPU"] = "{}, {} MiB, driver {}, compute capability {}, {} W, at most {} MHz".format(*fields)
        else:
            missing.append("GPU (" + (smi.why if smi and not smi.ok else "no nvidia-smi") + ")")
        self.nvcc = self.env.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        self.nvcc = self.nvcc if shutil.which(self.nvcc) else None
        version = ask(self.nvcc, "--version") if self.nvcc else None
        release = re.search(r"release.*", version.text) if version else None
        about["nvcc"] = release.group() if release else "missing"
        self.sanitizer = next(filter(shutil.which, ["compute-sanitizer", *(
            [os.path.join(os.path.dirname(self.nvcc), "compute-sanitizer")] if self.nvcc else [])]), None)
        about["compute-sanitizer"] = self.sanitizer or "missing"
        probe = ("import torch; print('torch', torch.__version__, 'cuda', torch.version.cuda, 'usable',"
                 " torch.cuda.is_available()); import numpy, safetensors")
        for python in dict.fromkeys((sys.executable, shutil.which("python3") or sys.executable)):
            done = self.run(python, "-c", probe, limit=90)
            self.torch = re.sub(r".*(?=torch)", "", done.text.strip().split("\n")[-1]) if done.ok else done.why
            if done.ok:
                self.python = python if self.emulated or self.torch.endswith("True") else None
                break
        about["PyTorch"] = self.torch
        commit = ask("git", "rev-parse", "--short", "HEAD")
        with open(os.path.join(ROOT, "fpdm.cu"), "rb") as source:
            digest = hashlib.sha256(source.read()).hexdigest()[:12]
        after = f", after commit {commit.text.strip()}" if commit and commit.ok else ""
        about["fpdm.cu"] = f"sha256 {digest}{after}"
        about["host"] = f"{platform.platform()}, {os.cpu_count()} cores"
        about["when"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        missing += [name for name, here in (("nvcc", self.nvcc), ("compute-sanitizer", self.sanitizer),
                                            ("PyTorch for it", self.python)) if not here]
        return "ok" + ("; missing: " + ", ".join(missing) if missing else "")

    def batch(self):
        """Pictures in a step that DiT XL/2 in PyTorch has room for, by the GPU's memory."""
        if self.emulated:
            return 2
        if not self.gpu:
            raise Skip("no NVIDIA GPU here")
        return next((batch for gb, batch in ((70, 64), (38, 32), (20, 16), (11, 8)) if self.memory_gb >= gb), 4)

    def cublas_flags(self):
        """What to build test_report_gpu with: the toolkit's cuBLAS, or the one that pip brought, or none."""
        probe = os.path.join(self.scratch, "probe.cu")
        with open(probe, "w") as file:
            file.write("#include <cublas_v2.h>\nint main() { cublasHandle_t h; return cublasCreate(&h); }\n")
        toolkit = os.path.dirname(os.path.dirname(os.path.realpath(shutil.which(self.nvcc))))
        choices = [f"-lcublas -Xlinker -rpath={toolkit}/lib64 -Xlinker -rpath={toolkit}/lib"]
        for folder in sorted(glob.glob(os.path.join(sys.prefix, "lib/python3*/site-packages/nvidia/*/lib"))):
            for library in glob.glob(os.path.join(folder, "libcublas.so*")):
                choices.append(f"-I{folder}/../include -L{folder} -l:{os.path.basename(library)} "
                               f"-Xlinker -rpath={folder}")
        for flags in choices:
            if self.run(self.nvcc, probe, "-o", probe + ".out", *flags.split(), limit=60).ok:
                if self.run(probe + ".out", limit=30).status != 127:  # 127: it links but does not load
                    return "-DCUBLAS " + flags
        self.data["notes"].append("cuBLAS: skipped, it was not found; our matmuls stand alone")
        return ""

    def build(self):
        names = ["test_kernels", "train", "test", "report", "bench", "sample"]
        targets = ["train_cpu"] + {
            "gpu": [f"{'test_report' if n == 'report' else n}_gpu" for n in names],
            "emu": ["train_emu", "test_emu", "test_report_emu", "bench_cpu", "sample_emu"],
            "cpu": ["test_cpu", "bench_cpu", "sample_cpu"],
        }[self.args.target]
        if self.args.target == "gpu" and not self.nvcc:
            targets = ["train_cpu"]
        elif self.args.target == "gpu" and not self.gpu:
            raise Skip("no NVIDIA GPU here")
        make = ["make", "-k", f"-j{max(1, min(len(targets), os.cpu_count() or 1))}"]
        if self.nvcc and self.args.target == "gpu":
            make += [f"NVCC={self.nvcc}", f"CUBLAS={self.cublas_flags()}"]
        done = self.run(*make, *targets)
        absent = [t for t in targets if not os.access(os.path.join(ROOT, t), os.X_OK)]
        if not done.ok or absent:
            raise Failed(f"make: {done.why}" + (f"; not there: {', '.join(absent)}" if absent else ""))
        if self.args.target == "gpu" and not self.nvcc:
            raise Skip("no nvcc: the CUDA programs are what they were")

    def warm_torch(self):
        """torch.compile takes minutes and mostly a CPU core: begun now, while programs are built and checked; later
        processes find the compiled kernels in the cache. Only where this leaves enough memory to the tests."""
        if self.python and self.gpu and (not self.args.parts or "warm" in self.args.parts):
            for fixed_point in self.args.models:
                if self.memory_gb >= (40 if fixed_point else 100):
                    command = self.torch_command(fixed_point, "compiled", self.batch(), rounds=1)
                    self.background.append(self.spawn(command))

    def await_torch(self):
        """What is measured from here on needs the GPU alone."""
        for process in self.background:
            limit = time.monotonic() - process.began + max(0.0, self.until - time.monotonic())
            self.finish(process, limit)
        count, self.background = len(self.background), []
        if not count:
            raise Skip("nothing was compiled ahead")

    def cases(self):
        test = self.program("test")
        files = [f"test/cases/{name}.safetensors" for name in self.work["cases"] or []]
        wrong = []
        for dtype in ("fp32",) if self.args.target == "cpu" else ("fp32", "bf16"):
            done = self.run(test, f"--dtype={dtype}", *files)
            result = self.data["cases"][dtype] = parse_cases(done.text)
            if not done.ok or result["failed"] or not result["passed"]:
                wrong.append(f"{dtype}: {result['failed']} of {result['passed'] + result['failed']} cases; {done.why}")
        for level in ("0", "2") if " capability 9.0," in self.data["about"].get("GPU", "") else ():
            done = self.run("env", f"FPDM_WGMMA={level}", test, "--dtype=bf16", *files)  # no product by wgmma, all
            last = done.text.strip().split("\n")[-1]
            self.data["checks"].append(f"cases in bf16, FPDM_WGMMA={level}: " +
                                       (last if done.ok else "FAILED: " + done.why))
            wrong += [] if done.ok else [f"FPDM_WGMMA={level}: " + done.why]
        if not self.emulated and os.access(os.path.join(ROOT, "test_kernels_gpu"), os.X_OK):
            done = self.run("./test_kernels_gpu")
            last = done.text.strip().split("\n")[-1]
            self.data["checks"].append(f"test_kernels_gpu: {last if done.ok else 'FAILED: ' + done.why}")
            wrong += [] if done.ok else ["test_kernels_gpu: " + done.why]
        if wrong:
            raise Failed("; ".join(wrong))

    def sanitize(self):
        if self.emulated:
            raise Skip("needs a GPU")
        if not self.sanitizer:
            raise Skip("no compute-sanitizer")
        test, tools = self.program("test"), ("memcheck", "racecheck", "initcheck", "synccheck")
        case = [f"test/cases/{name}.safetensors"
                for name in ("forward_eps_acts", "train_muon_decay", "sample_ddim_reuse", "sample_flow_order2")]
        runs = [self.spawn((self.sanitizer, "--tool", tool, "--error-exitcode", "9", test, *case)) for tool in tools]
        wrong, unable = [], []
        for tool, process in zip(tools, runs):
            done = self.finish(process, self.until - process.began)
            summary = re.search(r"(ERROR|RACECHECK) SUMMARY:.*", done.text)
            said = summary.group() if summary else done.why
            if "Device not supported" in done.text:
                unable.append(tool)
                said = "skipped: Device not supported"
            elif not done.ok or not summary:
                said = said if done.status == 9 else done.why
                wrong.append(f"{tool}: {said}")
                said = "FAILED: " + said
            self.data["checks"].append(f"compute-sanitizer {tool}, {done.seconds:.0f} s: {said}")
            self.write()
        if wrong:
            raise Failed("; ".join(wrong))
        if len(unable) == len(tools):
            raise Skip("compute-sanitizer does not support this device")

    def train(self, program, folder, steps, **more):
        """The run's folder and its log"""
        options = {**self.work["train"], "steps": steps, "lr": "1e-3", "dtype": "fp32", "sample_every": 0,
                   "sample_steps": 2, "save_every": 1000000, "out": os.path.join(self.scratch, folder), **more}
        done = self.run(program, *(f"--{key}={value}" for key, value in options.items()))
        if not done.ok:
            raise Failed(f"{program}: {done.why}")
        with open(os.path.join(options["out"], "log.csv")) as log:
            return options["out"], log.read()

    def steps(self):
        """Training in fp32 against the CPU program; training in bf16 against itself, bit for bit."""
        program, weights, problems, ms = self.program("train"), [], [], []
        for optimizer in ("adamw", "muon"):
            logs = [self.train(name, f"{folder}_{optimizer}", self.work["steps"], optimizer=optimizer)[1]
                    for folder, name in (("fp32", program), ("cpu", "./train_cpu"))]
            result = compare_logs(*logs)
            said = f"{result['steps']} steps of {program} and ./train_cpu by {optimizer} in fp32: the same draws; " \
                   f"the largest relative difference of a loss is {result['largest']:.1e}, at step " \
                   f"{result['at']} (limit {LOSS_LIMIT:.0e})"
            self.data["checks"].append("FAILED: " + result["problem"] if result["problem"] else said)
            problems.append(result["problem"])
        dtype = "fp32" if self.args.target == "cpu" else "bf16"
        for folder in ("once", "again"):
            out, _ = self.train(program, folder, self.work["steps"] // 10 + 1, dtype=dtype)
            with open(os.path.join(out, "weights.safetensors"), "rb") as file:
                weights.append(file.read())
        same = weights[0] == weights[1]
        self.data["checks"].append(f"two runs in {dtype} with one seed: " + (
            "the same weights, bit for bit" if same else "FAILED: the weights differ"))
        for optimizer in ("adamw", "muon"):  # of the default run's model
            _, log = self.train(program, f"default_{optimizer}", self.work["steps"], dtype=dtype, optimizer=optimizer,
                                **self.work["default"])
            ms.append(statistics.median([float(row["ms"]) for row in csv.DictReader(io.StringIO(log))][1:]))
        self.data["checks"].append(
            f"a step of the default run's model in {dtype}: {ms[0]:.2f} ms by AdamW, {ms[1]:.2f} by Muon")
        if any(problems) or not same:
            raise Failed(next(filter(None, problems), "two runs with one seed differ"))

    def sample(self):
        """The programs themselves: the time to the first step, then sampling from the weights that it wrote."""
        train, sample, out = self.program("train"), self.program("sample"), os.path.join(self.scratch, "sampled")
        n, m, batch = self.work["n"], self.work["m"], self.batch()
        process = self.spawn((train, *self.work["sampled"], "--batch", 16 if self.gpu else 2, "--steps", 1,
                              "--no_grad_iters", f"{n},{n}", "--grad_iters", f"{m},{m}", "--sample_steps", 2,
                              "--out", out))
        log, first = os.path.join(out, "log.csv"), None
        while process.poll() is None and time.monotonic() < self.until:
            if first is None and os.path.exists(log) and "\n0," in open(log).read():
                first = time.monotonic() - process.began
            time.sleep(0.01)
        done = self.finish(process, self.until - process.began)
        if first is not None:
            self.data["checks"].append(f"first training step of `{done.command.split(' --out')[0]}`: "
                                       f"{first:.1f} s after the start of the program (wanted: 3)")
        if not done.ok:
            raise Failed(f"{train}: {done.why}")
        with Watch() as watch:
            done = self.run(sample, "--weights", f"{out}/weights.safetensors", "--n", batch, "--batch", batch,
                            "--steps", 20, "--budget", self.work["passes"], "--cfg", 1, "--out", f"{out}/samples.png")
        if not done.ok:
            raise Failed(f"{sample}: {done.why}")
        used = f"; at most {watch.peak_mb:,.0f} MB of the device in use" if watch.peak_mb else ""
        self.data["checks"].append(f"{sample}: {done.text.strip().splitlines()[-1].split(': ')[0]}{used}")

    def matmul(self):
        program, runs = self.program("test_report"), [(self.work["square"], 0, 1, 1)]
        runs += [(D, heads, self.work["tokens"], self.batch()) for D, heads in self.work["sizes"].values()]
        wrong = []
        for run in runs:
            done = self.run(program, *run, self.work["rounds"])
            for words in map(str.split, done.text.splitlines()):
                if words[:1] == ["matmul"] and len(words) == 6:
                    ours, cublas, error = (None if word == "-" else float(word) for word in words[3:])
                    self.data["matmul"].append({"form": words[1], "shape": words[2], "ours": ours, "cublas": cublas})
                    if error is not None and not error <= 1e-2:
                        wrong.append(f"{words[1]} {words[2]} differs from cuBLAS by {error}")
                elif words[:1] == ["attention"] and len(words) == 4:
                    self.data["attention"].append({"form": words[1], "shape": words[2], "ours": float(words[3])})
                elif words[:1] == ["cublas"]:
                    self.data["about"]["cuBLAS"] = words[1]
            wrong += [] if done.ok else [f"{done.command}: {done.why}"]
        if wrong:
            raise Failed("; ".join(wrong))

    # ---- whole models

    def model(self, fixed_point, batch):
        name = ("FPDM XL/2" if fixed_point else "DiT XL/2") if not self.emulated else f"tiny, fixed_point {fixed_point}"
        models = self.data["models"]
        return models.setdefault(f"{name}, batch {batch}", {"ours": {}, "eager": {}, "compiled": {}})

    def torch_command(self, fixed_point, mode, batch, rounds=None, **more):
        options = {**self.work["model"], "fixed_point": fixed_point, "batch": batch, "mode": mode, "n": self.work["n"],
                   "m": self.work["m"], "passes": self.work["passes"], "rounds": rounds or self.work["rounds"],
                   "device": "cpu" if self.emulated else "cuda", **more}
        return (self.python, "tools/bench_torch.py", *(f"--{key}={value}" for key, value in options.items()))

    def ours(self, batch):
        bench, wrong = self.program("bench"), []
        iters = self.work["passes"] // 20 - 2  # an iteration more than bench's n, with one pre and one post block
        for fixed_point in self.args.models:
            figures = self.model(fixed_point, batch)["ours"]
            for n, m, wanted in ((self.work["n"], self.work["m"], "train"), (iters - 1, 1, "sample")):
                if not fixed_point and wanted == "sample":
                    continue  # n and m mean nothing to it: one run has both
                options = {**self.work["model"], "fixed_point": fixed_point, "batch": batch, "n": n, "m": m, "gemm": 0,
                           "rounds": self.work["rounds"], "skip": 0}
                with Watch() as watch:
                    done = self.run(bench, *(f"--{key}={value}" for key, value in options.items()))
                found = parse_figures(done.text)
                figures.update({k: v for k, v in found.items()
                                if k.startswith(wanted) or k == "peak_gflops" or not fixed_point})
                if watch.peak_mb:
                    figures[f"{wanted}_device_mb"] = watch.peak_mb
                if "GPU memory" in done.text or "MB free" in done.text:
                    figures[f"{wanted}_out_of_memory"] = 1
                    self.data["notes"].append(f"`{done.command}`: {done.why}")
                elif not done.ok:
                    wrong.append(f"{done.command}: {done.why}")
        if wrong:
            raise Failed("; ".join(wrong))

    def pytorch(self, mode, batch):
        if not self.python:
            raise Skip(f"no PyTorch that can use a GPU here ({self.torch})")
        if not self.gpu and not self.emulated:
            raise Skip("no NVIDIA GPU here")
        wrong, share = [], (self.until - time.monotonic()) / len(self.args.models)
        for fixed_point in self.args.models:
            figures = self.model(fixed_point, batch)[mode]
            done = self.run(*self.torch_command(fixed_point, mode, batch), limit=share if fixed_point else 600)
            prefix = mode + "_"
            figures.update({k[len(prefix):]: v for k, v in parse_figures(done.text).items() if k.startswith(prefix)})
            wrong += [] if done.ok else [f"{'FPDM' if fixed_point else 'DiT'}: {done.why}"]
        if wrong:
            raise Failed("; ".join(wrong))

    def torch_attention(self):
        if not self.python:
            raise Skip(f"no PyTorch that can use a GPU here ({self.torch})")
        for D, heads in self.work["sizes"].values():
            side = int(self.work["tokens"] ** 0.5)
            more = {"width": D, "heads": heads, "image_size": side, "patch": 1}
            done = self.run(*self.torch_command(1, "attention", self.batch(), **more))
            if not done.ok:
                raise Failed(done.why)
            for form in ("forward", "backward"):
                shape = f"{self.batch()}x{self.work['tokens']}x{D}x{heads}"
                entry = next((e for e in self.data["attention"] if (e["form"], e["shape"]) == (form, shape)), None)
                if not entry:
                    entry = {"form": form, "shape": shape, "ours": None}
                    self.data["attention"].append(entry)
                entry["torch"] = parse_figures(done.text).get(f"attention_{form}_gflops")

    # ---- the report

    def markdown(self):
        data, lines = self.data, []
        title = self.gpu or ("No GPU: a trial of the report with " + self.args.target if self.emulated else "No GPU")
        lines += [f"# {title}", "", f"`{self.args.command}`, {time.monotonic() - self.start:.0f} s so far.", ""]
        lines += [f"- {key}: {value}" for key, value in data["about"].items()]
        lines += ["", "## Parts", ""]
        lines += table(("part", "result", "s"), [
            (p["name"], p["result"].replace("|", "\\|"), f"{p['seconds']:.0f}") for p in self.parts])
        lines += [""] + [f"- {note}" for note in data["notes"]]
        if data["cases"] or data["checks"]:
            lines += ["", "## Correctness", ""]
        for dtype, c in data["cases"].items():
            lines.append(f"- cases in {dtype}: {c['passed']} passed, {c['failed']} failed, {c['tensors']} tensors; "
                         f"nearest to its limit: {c['worst']}")
            lines += [f"  - FAIL {failure}" for failure in c["failures"][:20]]
        lines += [f"- {check}" for check in data["checks"]]
        if data["matmul"]:
            lines += ["", "## Matmul", "", "bf16, random data, TFLOP/s; MxNxK of y (M,N) = x (M,K) w (N,K)^T. gated, "
                      "gelu, dgelu: with what the model does to the result, beside cuBLAS's product alone.", ""]
            lines += table(("form", "MxNxK", "ours", "cuBLAS", "ours / cuBLAS"), [
                (e["form"], e["shape"], number(e["ours"] / 1e3, 1), number(e["cublas"] and e["cublas"] / 1e3, 1),
                 ratio(e["ours"], e["cublas"])) for e in data["matmul"]])
            shares = [e["ours"] / e["cublas"] for e in data["matmul"]
                      if e["ours"] and e["cublas"] and e["form"] in ("forward", "dx", "dw")]
            if shares:
                mean = sum(shares) / len(shares)
                lines += ["", f"Ours / cuBLAS: least {min(shares):.2f}, mean {mean:.2f}, most {max(shares):.2f} "
                              "(wanted: 0.70 with `mma.sync` alone, 1 with `wgmma`)."]
        if data["attention"]:
            lines += ["", "## Attention", "", "bf16, TFLOP/s of 4BT²D forward and twice that backward; PyTorch is "
                      "`scaled_dot_product_attention`, of its own choice of kernel.", ""]
            lines += table(("form", "BxTxDxH", "ours", "PyTorch", "ours / PyTorch"), [
                (e["form"], e["shape"], number(e["ours"] and e["ours"] / 1e3, 1),
                 number(e.get("torch") and e["torch"] / 1e3, 1), ratio(e["ours"], e.get("torch")))
                for e in data["attention"]])
        for what, rate, unit, about in (
                ("train", "train_images_per_s", "images/s",
                 f"bf16, {self.work['tokens']} tokens; n = {self.work['n']}, m = {self.work['m']}: loss, gradients, "
                 "their norm, clipping, AdamW, EMA. Compiled PyTorch has n and m fixed and unrolled: its best case."),
                ("sample", "sample_passes_per_s", "passes/s",
                 f"bf16, {self.work['passes']} block passes a picture over 20 timesteps, no guidance (ours: measured "
                 "over 4 of the 20). passes/s counts every picture's.")):
            rows = []
            for name, by in data["models"].items():
                for who in ("ours", "eager", "compiled"):
                    f = by[who]
                    if not any(key.startswith(what) for key in f):
                        continue
                    short = f.get(f"{what}_out_of_memory") and "out of memory"
                    best, peak = by["ours"].get(rate), f"{what}_peak_mb"
                    rows.append((name, who if who == "ours" else f"PyTorch {who}", short or number(f.get(rate), 1),
                                 "" if who == "ours" else ratio(best, f.get(rate)), number(f.get(peak)),
                                 "" if who == "ours" else ratio(by["ours"].get(peak), f.get(peak)),
                                 number(f.get(f"{what}_device_mb")), number(f.get(f"{what}_first_s"), 1)))
            if rows:
                lines += ["", f"## {'Training step' if what == 'train' else 'Sampling'}", "", about, ""]
                lines += table(("model", "program", unit, "ours / it", "peak MB", "ours / it", "device MB in use",
                                "first call, s"), rows)
        if data["models"]:
            lines += ["", "Peak MB: what the program allocated (ours) or `max_memory_allocated`; the device's figure "
                      "is nvidia-smi's (ours) or `mem_get_info`'s at the end, CUDA's share and PyTorch's cache too. "
                      "First calls of compiled PyTorch may find kernels that an earlier process compiled.",
                      "Wanted of FPDM XL/2 against compiled PyTorch: training 1.5 times the images/s with at most half "
                      "the peak memory; sampling twice as fast."]
        lines += ["", "## Commands", ""]
        lines += [f"- `{command}`: {seconds:.1f} s, {result}" for command, seconds, result in self.commands]
        text = "\n".join(lines) + "\n"
        return text.replace(self.scratch, "/tmp/report").replace(ROOT + "/", "").replace(sys.executable, "python3")

    def write(self, whole=False):
        with self.lock:
            text = self.markdown()
        paths = [os.path.join(self.args.out, "report.md")]
        if self.gpu and not self.emulated and whole:
            name = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") + self.args.suffix
            os.makedirs(os.path.join(ROOT, "test", "results"), exist_ok=True)
            paths.append(os.path.join(ROOT, "test", "results", name + ".md"))
        for path in paths:
            with open(path + ".tmp", "w") as file:
                file.write(text)
            os.replace(path + ".tmp", path)
        figures = os.path.join(self.args.out, "figures.json")
        with open(figures + ".tmp", "w") as file:
            json.dump({"parts": self.parts, **self.data}, file, indent=1)
        os.replace(figures + ".tmp", figures)
        return paths[-1]

    def close(self, whole):
        for process in list(self.running):
            self.finish(process, 0)
        path = self.write(whole)
        shutil.rmtree(self.scratch, ignore_errors=True)
        return path

    def all(self):
        batch, torch_limit = self.batch, 190
        self.warm_torch()
        self.part("build", self.build, 200)
        self.part("cases", self.cases, 60)
        self.part("steps", self.steps, 50)
        self.part("sanitizer", self.sanitize, 75)
        if self.background:
            self.part("warm", self.await_torch, 60)
        self.part("sample", self.sample, 50)
        self.part("matmul", self.matmul, 60)
        self.part("ours", lambda: self.ours(batch()), 70)
        self.part("eager", lambda: self.pytorch("eager", batch()), 60)
        self.part("compiled", lambda: self.pytorch("compiled", batch()), torch_limit)
        self.part("attention", self.torch_attention, 45)
        for factor in () if self.emulated else (4, 16):  # what does not fit says so
            self.part(f"ours x{factor}", lambda f=factor: self.ours(f * batch()), 90)
            self.part(f"eager x{factor}", lambda f=factor: self.pytorch("eager", f * batch()), 60)
        if not self.emulated:
            self.part("compiled x4", lambda: self.pytorch("compiled", 4 * batch()), torch_limit)


PARTS = ("build", "cases", "steps", "sanitizer", "sample", "warm", "matmul", "ours", "eager", "compiled", "attention",
         "ours x4", "eager x4", "ours x16", "eager x16", "compiled x4")


def models(text):
    """Names with commas -> values of fixed_point."""
    try:
        return [{"fpdm": 1, "dit": 0}[name] for name in text.split(",")]
    except KeyError as name:
        raise argparse.ArgumentTypeError(f"{name} is not one of fpdm, dit")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), help=f"with commas, of: {', '.join(PARTS)}")
    parser.add_argument("--models", type=models, default="fpdm,dit",
                        help="with commas, of: fpdm, dit (default: both)")
    parser.add_argument("--minutes", type=float, default=9, help="for everything (default: 9)")
    parser.add_argument("--out", default="out_report", help="folder for report, figures and log (default: out_report)")
    parser.add_argument("--suffix", default="", help="of the name in test/results, where a part of it may stand then")
    parser.add_argument("--target", default="gpu", choices=("gpu", "emu", "cpu"),
                        help="emu, cpu: a trial at tiny sizes with the programs of these names (default: gpu)")
    parser.error = lambda message: die(f"{message}; see --help")
    args = parser.parse_args()
    for name in args.parts or []:
        if name not in PARTS:
            parser.error(f"--parts: '{name}' is not one of {', '.join(PARTS)}")
    args.out = os.path.abspath(args.out)
    args.command = shlex.join(["python3", "tools/report_gpu.py", *sys.argv[1:]])
    report = Report(args)

    def stop(number, _):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    chosen, args.parts, whole = args.parts, None, False
    try:
        report.part("machine", report.machine, 120)
        args.parts = chosen
        report.all()
        whole = not chosen
    except KeyboardInterrupt:
        print("interrupted")
    path = report.close(whole or args.suffix)
    failed = [p["name"] for p in report.parts if p["result"].startswith(("FAILED", "interrupted"))]
    skipped = [p["name"] for p in report.parts if p["result"].startswith("skipped")]
    ok = len(report.parts) - len(failed) - len(skipped)
    print(f"{ok} parts done, {len(skipped)} skipped, {len(failed)} failed: {', '.join(failed) or 'none'}\n{path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
