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
CPU := $(CC) -std=gnu11 -ffp-contract=fast -fno-math-errno -fno-trapping-math $(WARN) $(OPENMP) $(CFLAGS)
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
TEST := -Wno-unused-function

all: train_cpu sample_cpu bench_cpu test_cpu

train_cpu sample_cpu bench_cpu: fpdm_cpu.c
	$(CPU) -DPROGRAM=$(if $(filter train%,$@),TRAIN,$(if $(filter sample%,$@),SAMPLE,BENCH)) $< -o $@ -lm

test_cpu: test/test.c fpdm_cpu.c
	$(CPU) $(TEST) $< -o $@ -lm

help:
	@echo "train_cpu sample_cpu bench_cpu   the programs for CPUs; each has --help"
	@echo "test_cpu                         runs test cases: ./test_cpu [FILE ...]"
	@echo "test                             builds and runs all tests that need neither GPU nor Python"

clean:
	rm -f train_cpu sample_cpu bench_cpu test_cpu

.PHONY: all help clean test
