#!/bin/bash
# What `make train_gpu` says on a machine that lacks something: one line on standard error beside make's own. The
# compiler and nvidia-smi are stand-ins.
#
# One line for each test, `name ok` or `name FAIL`; last `N passed, N failed`.

cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

result() { # STATUS NAME
    if [ "$1" = 0 ]; then
        passed=$((passed + 1)) && printf '%-70s ok\n' "$2"
    else
        failed=$((failed + 1)) && printf '%-70s FAIL\n' "$2"
    fi
}
stub() { printf '#!/bin/sh\necho "%s"\n' "$2" > "$work/$1" && chmod +x "$work/$1"; }

# refuses NAME PATTERN NVCC CAPABILITY
refuses() {
    stub nvidia-smi "$4"
    PATH=$work:$PATH make -W fpdm.cu train_gpu NVCC="$3" > "$work/out" 2> "$work/err"
    [ $? = 2 ] && [ "$(grep -vc '^make' "$work/err")" = 1 ] && grep -Eq "^error: $2" "$work/err" ||
        { cat "$work/err" && false; }
    result $? "$1"
}

stub old "Cuda compilation tools, release 11.2, V11.2.152"
stub new "Cuda compilation tools, release 12.4, V12.4.131"
refuses "no nvcc" "no CUDA compiler at /nowhere/nvcc" /nowhere/nvcc ""
refuses "an old nvcc" ".*old is of CUDA 11.2; this needs 11.4" "$work/old" "9.0"
refuses "an old GPU" "this GPU has compute capability 7.5" "$work/new" "7.5"
for capability in 8.0 9.0 12.0 "NVIDIA-SMI has failed because it could not communicate with the driver"; do
    stub nvidia-smi "$capability"
    PATH=$work:$PATH make -s nvcc NVCC="$work/new"
    result $? "GPU of capability ${capability:0:12}"
done

# The program is for every GPU that is here, but for those that it cannot use.
printf '#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_75 sm_80 sm_90 || echo "tools, release 12.4, V12.4.1"\n' \
    > "$work/new"
for here in "7.5 8.0=sm_80" "9.0 8.0=sm_80 sm_90a" "9.0 9.0=sm_90a"; do
    printf '#!/bin/sh\nprintf "%%s\\n" %s\n' "${here%=*}" > "$work/nvidia-smi"
    codes=$(PATH=$work:$PATH make -n -W fpdm.cu train_gpu NVCC="$work/new" | grep -oP 'code=\K[a-z0-9_]*' | sort -u |
        xargs)
    [ "$codes" = "${here#*=}" ]
    result $? "GPUs ${here%=*}: $codes"
done

# CUDA 11 compiles for Hopper, but not with its own instructions.
for release in 11.8 12.4; do
    printf '#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_80 sm_90 || echo "tools, release %s, V%s.1"\n' \
        $release $release > "$work/new"
    stub nvidia-smi 9.0
    codes=$(PATH=$work:$PATH make -n -W fpdm.cu train_gpu NVCC="$work/new" | grep -o 'code=[a-z0-9_]*' | sort -u)
    wanted=code=sm_90$([ $release = 11.8 ] || echo a)
    [ "$codes" = "$wanted" ]
    result $? "CUDA $release on Hopper: $codes"
done

echo "$passed passed, $failed failed"
[ $failed = 0 ]
