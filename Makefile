# make NAME builds ./NAME; `make help` lists the targets. Needs a C compiler; for the _gpu programs nvcc alone.

CC ?= cc
CXX ?= g++
PYTHON ?= python3

# 1 when the compiler accepts and links with the flag $(1)
try = $(shell f=$$(mktemp) && echo 'int main(void) { return 0; }' | $(CC) -Werror $(1) -x c - -o $$f 2>/dev/null && echo 1; rm -f $$f)
pick = $(if $(call try,$(1)),$(1),$(2))

WARN := -Wall -Wextra -Wshadow -Werror
ARCH := $(call pick,-march=native,$(call pick,-mcpu=native,))
OPENMP := $(call pick,-fopenmp,-Wno-unknown-pragmas)
CFLAGS ?= -O3 $(ARCH)
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
CPU = $(CC) -std=gnu11 -ffp-contract=fast -fno-math-errno -fno-trapping-math $(WARN) $(OPENMP) \
	$(if $(filter %_asan,$@),$(SANITIZE),$(CFLAGS))
TEST := -Wno-unused-function

all: train_cpu sample_cpu bench_cpu test_cpu

train_cpu sample_cpu bench_cpu train_cpu_asan sample_cpu_asan: fpdm_cpu.c
	$(CPU) -DPROGRAM=$(if $(filter train%,$@),TRAIN,$(if $(filter sample%,$@),SAMPLE,BENCH)) $< -o $@ -lm

test_cpu test_cpu_asan: test/test.c fpdm_cpu.c
	$(CPU) $(TEST) $< -o $@ -lm

test_unit test_unit_asan: test/test_unit.c test/test_files.h fpdm_cpu.c
	$(CPU) $(TEST) $< -o $@ -lm

test_gradient test_gradient_asan: test/test_unit.c test/test_files.h fpdm_cpu.c
	$(CPU) $(TEST) -DREAL=double $< -o $@ -lm

test: test_cpu test_unit test_gradient train_cpu sample_cpu
	@test/run.sh ./test_cpu ./test_unit ./test_gradient test/test_cli.sh $(if $(wildcard fpdm.cu),"$(MAKE) -s shared")

test_asan: test_cpu_asan test_unit_asan test_gradient_asan train_cpu_asan sample_cpu_asan test_unit
	@test/run.sh ./test_cpu_asan ./test_unit_asan ./test_gradient_asan "test/test_cli.sh cpu_asan"

# What fpdm_cpu.c and fpdm.cu have in common must be the same bytes.
shared:
	@bash -c 'block() { awk "/hared with fpdm.cu/, /End of the shared block/" $$1; }; \
		block fpdm_cpu.c | grep -q . && diff <(block fpdm_cpu.c) <(block fpdm.cu) && echo "the shared blocks are the same"'

help:
	@echo "train_cpu sample_cpu bench_cpu   the programs for CPUs; each has --help"
	@echo "test_cpu                         runs test cases: ./test_cpu [FILE ...]"
	@echo "test                             builds and runs all tests that need neither GPU nor Python"
	@echo "test_asan                        the same under AddressSanitizer and UndefinedBehaviorSanitizer"

clean:
	rm -f train_cpu sample_cpu bench_cpu test_cpu test_unit test_gradient *_asan

.PHONY: all help clean test test_asan shared
