# make NAME builds ./NAME; `make help` lists the targets. Needs a C compiler; for the _gpu programs nvcc alone.

CC ?= cc
CXX ?= g++
PYTHON ?= python3

# 1 when the compiler accepts and links with the flag $(1)
try = $(shell f=$$(mktemp) && echo 'int main(void) { return 0; }' | $(CC) -Werror $(1) -x c - -o $$f 2>/dev/null && echo 1; rm -f $$f)
pick = $(if $(call try,$(1)),$(1),$(2))

WERROR ?=
WARN := -Wall -Wextra -Wshadow $(WERROR) -Wno-pass-failed
ARCH := $(call pick,-march=native,$(call pick,-mcpu=native,))
OPENMP := $(call pick,-fopenmp,-Wno-unknown-pragmas)
CFLAGS ?= -O3 $(ARCH)
SANITIZE := -DAMX_PLAIN -O2 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
CPU = $(CC) -std=gnu11 -ffp-contract=fast -fno-math-errno -fno-trapping-math $(WARN) $(OPENMP) \
	$(if $(filter %_asan,$@),$(SANITIZE),$(CFLAGS))
TEST := -Wno-unused-function

all: train_cpu sample_cpu bench_cpu test_cpu

train_cpu sample_cpu train_cpu_asan sample_cpu_asan: fpdm_cpu.c
	$(CPU) -DPROGRAM=$(if $(filter train%,$@),TRAIN,SAMPLE) $< -o $@ -lm

bench_cpu bench_cpu_asan: test/bench.c fpdm_cpu.c
	$(CPU) $(TEST) $< -o $@ -lm

test_cpu test_cpu_asan: test/test.c fpdm_cpu.c
	$(CPU) $(TEST) $< -o $@ -lm

test_unit test_unit_asan: test/test_unit.c test/test_files.h fpdm_cpu.c
	$(CPU) $(TEST) $< -o $@ -lm

test_gradient test_gradient_asan: test/test_unit.c test/test_files.h fpdm_cpu.c
	$(CPU) $(TEST) -DREAL=double $< -o $@ -lm

# The forward pass on an OpenCL device: an example of a port
test_opencl sample_opencl: test/test.c fpdm_cpu.c test/port_example/opencl.c
	$(CPU) $(TEST) -DFORWARD='"test/port_example/opencl.c"' $(if $(filter test%,$@),$<,-DPROGRAM=SAMPLE fpdm_cpu.c) \
		-o $@ -lm -lOpenCL

port_example: test_opencl
	@./test_opencl --dtype=fp32

# The reader of files under libFuzzer
fuzz: test/fuzz.c fpdm_cpu.c
	clang -std=gnu11 -O1 -g -fsanitize=fuzzer,address,undefined $(WARN) $(TEST) -Wno-unknown-pragmas $< -o $@ -lm

# The tests of fpdm.cu need a C++ compiler.
EMU_TESTS := $(if $(shell command -v $(CXX)),test_harness test_emu test_kernels_emu)
test: test_cpu test_unit test_gradient train_cpu sample_cpu bench_cpu $(EMU_TESTS)
	@test/run.sh ./test_cpu test/test_cases.sh ./test_unit ./test_gradient test/test_cli.sh "make -s shared" test/test_make.sh \
		$(if $(EMU_TESTS),"test/test_cases.sh emu" ./test_harness "make -s kernels","skipped: fpdm.cu on the CPU: no $(CXX)")

test_asan: test_cpu_asan test_unit_asan test_gradient_asan train_cpu_asan sample_cpu_asan bench_cpu_asan test_unit
	@ASAN_OPTIONS=detect_leaks=0:exitcode=99 test/run.sh ./test_cpu_asan ./test_unit_asan ./test_gradient_asan \
		"test/test_cli.sh cpu_asan"

# What fpdm_cpu.c and fpdm.cu have in common, four blocks of each, must be the same bytes.
shared:
	@bash -c 'blocks() { awk "/^\/\/ Shared block/, /^\/\/ End of shared block/" $$1; }; \
		[ "$$(blocks fpdm_cpu.c | grep -c "^// Shared block . of 4") $$(blocks fpdm_cpu.c | grep -c "^// End of")" = "4 4" ] && \
		diff <(blocks fpdm_cpu.c) <(blocks fpdm.cu) && echo "the four shared blocks are the same"'

help:
	@echo "train_cpu sample_cpu bench_cpu   the programs for CPUs; each has --help"
	@echo "test_cpu                         runs test cases: ./test_cpu [FILE ...]"
	@echo "test                             builds and runs all tests that need neither GPU nor Python; V=1: prints all"
	@echo "test_asan                        the same under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "fuzz                             the reader of files under libFuzzer (clang): ./fuzz -max_total_time=60"
	@echo "port_example                     the forward pass in OpenCL, an example of a port, through the test cases"
	@echo "report_gpu                       checks and measures fpdm.cu on this machine's GPU: test/results/GPU.md"
	@echo "train_gpu sample_gpu bench_gpu   the programs for NVIDIA GPUs (nvcc); test_gpu, test_kernels_gpu: their tests"
	@echo "train_emu sample_emu bench_emu   the same on a CPU, through test/cuda_emu.h; test_emu, test_kernels_emu, races"
	@echo "kernels                          runs those tests and lists which kernels they launched"
	@echo "train_cpu MPI=1                  data parallel by MPI, also train_emu; train_gpu NCCL=1: by NCCL (README)"
	@echo "compiler                         what nvcc says of the kernels: test/results/compiler.md"
	@echo "hip                              compiles fpdm.cu for AMD's GPUs: test/results/hip.md; test_cdna, test_rdna"
	@echo "memory                           device memory of a training step beside PyTorch's: test/results/memory.md"
	@echo "scaling                          ranks on this machine's cores, and a model for GPUs: test/results/scaling.md"
	@echo "spills                           compiles fpdm.cu for every architecture; fails if a kernel spills registers"

clean:
	rm -f $(foreach s,cpu gpu emu opencl cdna rdna,$(foreach p,train sample bench test test_kernels test_report, \
		$p_$s $p_$s_asan)) \
		$(foreach t,test_unit test_gradient test_harness,$t $t_asan) fuzz *.tmp

# ---------------------------------------------------------------------------------------------------------------------
# Data parallel: MPI=1 for train_cpu, train_emu and train_gpu, or NCCL=1 for train_gpu, which then starts by MPI and
# adds the gradients by NCCL, and for spills, which compiles it; NCCL_HOME: where its include/ and lib/ are, unless the
# compiler finds them.

ifneq ($(MPI)$(NCCL),)
train_cpu: CC := OMPI_CC=$(CC) mpicc -DMPI
train_emu: CXX := OMPI_CXX=$(CXX) mpicxx -DMPI -DOMPI_SKIP_MPICXX
train_gpu spills: NVCC_FLAGS += -ccbin mpicxx -DMPI -DOMPI_SKIP_MPICXX
endif
ifneq ($(NCCL),)
train_gpu spills: NVCC_FLAGS += -DNCCL \
	$(if $(NCCL_HOME),-I$(NCCL_HOME)/include -L$(NCCL_HOME)/lib -Xlinker -rpath=$(NCCL_HOME)/lib) \
	-Xlinker -l:libnccl.so.2
endif
# A program that was built with MPI, or without, where the other is asked for, is built again.
has_mpi = $(if $(shell grep -as MPI_Init_thread $(1)),yes,no)
wants_mpi = $(if $(MPI)$(NCCL),yes,no)
$(foreach p,train_cpu train_emu train_gpu,$(if $(filter $(wants_mpi),$(call has_mpi,$p)),,$(eval $p: again)))
again:

.PHONY: again nvcc all help clean test test_asan port_example shared races spills compiler memory scaling kernels hip

# ---------------------------------------------------------------------------------------------------------------------
# fpdm.cu. With GPUs at hand, for those; otherwise for all that this nvcc knows of the list, and as PTX for later
# ones. 90a: Hopper with its own instructions, since CUDA 12.

NVCC ?= $(or $(shell command -v nvcc),/usr/local/cuda/bin/nvcc)
CODES = $(shell $(NVCC) --list-gpu-code)
CAPABILITY = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>&1 | grep '^[0-9.]*$$' | sort -rVu)
GPU_HERE = $(filter-out 5% 6% 7%,$(filter $(patsubst sm_%,%,$(CODES)),$(subst .,,$(CAPABILITY))))
NINETY = $(if $(filter 11,$(shell $(NVCC) --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')),90,90a)
ARCHS ?= $(or $(patsubst 90,$(NINETY),$(GPU_HERE)),$(foreach a,80 86 89 90 100 120,$(if $(filter sm_$a,$(CODES)),$(a:90=$(NINETY)))))
GENCODE = $(foreach a,$(ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
	$(if $(GPU_HERE),,-gencode arch=compute_80,code=compute_80)
HOST := -Wall,-Wextra,$(OPENMP)
NVCC_FLAGS = -x cu -std=c++17 -O3 --threads 2 $(GENCODE) $(WERROR:%=% all-warnings) -Xcompiler $(HOST)
EMU = $(CXX) -x c++ -std=c++17 -Wno-unknown-pragmas $(WARN) $(TEST) $(if $(filter %_asan,$@),$(SANITIZE),-O2 $(ARCH)) \
	$(if $(filter %_cdna,$@),-DOWN_FRAGMENTS -DWARP=64) $(if $(filter %_rdna,$@),-DOWN_FRAGMENTS -DWARP=32)

# One line for what is missing: a compiler, a newer one, a newer GPU
nvcc:
	@release=$$($(NVCC) --version 2>&1 | sed -n 's/.*release \([0-9.]*\),.*/\1/p'); set -- $$(echo "$$release" | tr . ' '); \
	if [ -z "$$release" ]; then wrong="no CUDA compiler at $(NVCC); install CUDA 11.4 or newer, or say make NVCC=..."; \
	elif [ $$(($$1 * 100 + $$2)) -lt 1104 ]; then wrong="$(NVCC) is of CUDA $$release; this needs 11.4 or newer"; \
	elif [ "$(firstword $(subst ., ,$(CAPABILITY)) 8)" -lt 8 ]; then \
		wrong="this GPU has compute capability $(CAPABILITY); the program needs 8.0 (Ampere) or newer"; \
	else exit 0; fi; echo "error: $$wrong; train_cpu needs none of this" >&2; exit 1

train_gpu sample_gpu bench_gpu test_gpu test_kernels_gpu test_harness_gpu test_report_gpu: | nvcc

train_gpu sample_gpu: fpdm.cu
	$(NVCC) $(NVCC_FLAGS) -DPROGRAM=$(if $(filter train%,$@),TRAIN,SAMPLE) $< -o $@

bench_gpu: test/bench.c fpdm.cu
	$(NVCC) $(NVCC_FLAGS),$(TEST) -diag-suppress 177 -DGPU $< -o $@

test_gpu: test/test.c fpdm.cu
	$(NVCC) $(NVCC_FLAGS),$(TEST) -diag-suppress 177 -DGPU $< -o $@

test_kernels_gpu: test/emu_kernels.cpp fpdm.cu
	$(NVCC) $(NVCC_FLAGS),$(TEST) -diag-suppress 177 $< -o $@

# The same without a GPU: each case in fp32 and bf16 through the real kernels
AMD := test/hip.h # whose layouts of fragments _cdna (waves of 64 lanes) and _rdna (32) take
test_emu test_emu_asan test_cdna test_rdna: test/test.c fpdm.cu test/cuda_emu.cpp test/cuda_emu.h $(AMD)
	$(EMU) -DGPU $< test/cuda_emu.cpp -o $@

test_kernels_emu test_kernels_emu_asan test_kernels_cdna test_kernels_rdna: test/emu_kernels.cpp fpdm.cu \
		test/cuda_emu.cpp test/cuda_emu.h $(AMD)
	$(EMU) $< test/cuda_emu.cpp -o $@

train_emu sample_emu: fpdm.cu test/cuda_emu.cpp test/cuda_emu.h
	$(EMU) -DPROGRAM=$(if $(filter train%,$@),TRAIN,SAMPLE) $< test/cuda_emu.cpp -o $@

bench_emu: test/bench.c fpdm.cu test/cuda_emu.cpp test/cuda_emu.h
	$(EMU) -DGPU $< test/cuda_emu.cpp -o $@

# The harness itself; test_harness_gpu: whether it and a GPU agree
test_harness test_harness_asan: test/test_harness.cu fpdm.cu test/cuda_emu.cpp test/cuda_emu.h
	$(EMU) $< test/cuda_emu.cpp -o $@

test_harness_gpu: test/test_harness.cu fpdm.cu
	$(NVCC) $(NVCC_FLAGS),$(TEST) -diag-suppress 177 $< -o $@

# Runs the tests of fpdm.cu; then every kernel that fpdm.cu can launch, and how often the tests did: never is a failure.
kernels: test_emu test_kernels_emu
	@rm -f kernels.tmp
	@EMU_KERNELS=kernels.tmp test/run.sh ./test_emu ./test_kernels_emu
	@[ -s kernels.tmp ]
	@awk -F ': ' '{ n[$$1] += $$2 } END { for (k in n) print k ": " n[k] " launches" (n[k] ? "" : "  FAIL") }' kernels.tmp | sort
	@! awk -F ': ' '{ n[$$1] += $$2 } END { for (k in n) if (!n[k]) print k }' kernels.tmp | grep . > /dev/null
	@rm -f kernels.tmp

# All that can be checked and measured on a machine with a GPU: test/results/GPU.md. REPORT: options of the report.
report_gpu:
	@$(PYTHON) tools/report_gpu.py $(REPORT)

CUBLAS = -DCUBLAS -lcublas
test_report_gpu: test/report_cublas.cu fpdm.cu
	$(NVCC) $(NVCC_FLAGS),$(TEST) -diag-suppress 177 $< -o $@ $(CUBLAS)

test_report_emu: test/report_cublas.cu fpdm.cu test/cuda_emu.cpp test/cuda_emu.h
	$(EMU) $< test/cuda_emu.cpp -o $@

.PHONY: report_gpu

# Blocks and warps backward and shuffled must give the same bits: a difference is a race. CASES: options of test_emu
races: test_emu test_kernels_emu
	@bash -c 'out=$$(mktemp -d); trap "rm -rf $$out" EXIT; for t in "test_emu $(CASES)" test_kernels_emu; do \
		EMU_ORDER=1 ./$$t > $$out/1 & EMU_ORDER=777 ./$$t > $$out/777 && wait $$! || exit 1; \
		cmp $$out/1 $$out/777 && echo "$$t: the same bits in both orders" || exit 1; done'

# Registers, occupancy and work for a byte of every kernel, without a GPU
compiler: fpdm.cu
	@mkdir -p test/results
	@$(PYTHON) tools/report_compiler.py $(NVCC) > $@.tmp && mv $@.tmp test/results/compiler.md

# What a training step allocates beside what PyTorch saves, without a GPU
memory: fpdm.cu
	@$(PYTHON) tools/report_memory.py > $@.tmp && mv $@.tmp test/results/memory.md

# Ranks on this machine's cores, and a model for GPUs: two minutes, in which nothing else runs
scaling:
	@$(PYTHON) tools/scaling.py > $@.tmp && mv $@.tmp test/results/scaling.md

# The kernels for AMD's GPUs, by clang alone; CLANG: another one than the newest
hip: fpdm.cu test/hip.h
	@$(PYTHON) tools/report_hip.py $(CLANG) > $@.tmp && mv $@.tmp test/results/hip.md && cat test/results/hip.md

# Every kernel on every architecture without spills
spills: fpdm.cu
	@$(NVCC) $(NVCC_FLAGS) -Xptxas -v -DPROGRAM=TRAIN $< -o /dev/null > spills.tmp 2>&1 || { cat spills.tmp; exit 1; }
	@grep -q 'bytes spill' spills.tmp || { cat spills.tmp; exit 1; }
	@grep -A2 'Compiling entry' spills.tmp | grep -B2 '[1-9][0-9]* bytes spill' && exit 1 || echo "no spills on $(ARCHS)"
	@rm -f spills.tmp
