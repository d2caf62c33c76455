#!/bin/bash
# Tests the programs from end to end, as a user runs them: train, resume, interrupt, sample, and everything that must be
# refused with one line and exit status 1. Needs neither Python nor a GPU.
#
#   test/test_cli.sh           tests ./train_cpu, ./sample_cpu and ./bench_cpu
#   test/test_cli.sh gpu       the same for ./train_gpu and so on; any other suffix likewise
#
# One line for each test, `name ok` or `name FAIL`; last `N passed, N failed`.

root=$(cd "$(dirname "$0")/.." && pwd)
train=$root/train_${1:-cpu}
sample=$root/sample_${1:-cpu}
bench=$root/bench_${1:-cpu}
unit=$root/test_unit # decodes PNG files and lists tensors
work=$(mktemp -d) && cd "$work" || exit 1
trap '[ $BASHPID != $$ ] || { cd /; rm -rf "$work"; }' EXIT # not in a child that is killed before it becomes a program
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C
passed=0 failed=0

result() { # STATUS NAME
    if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-70s %s\n' "$2" "$([ "$1" = 0 ] && echo ok || echo FAIL)"
}

# check NAME COMMAND...: the command must succeed.
check() {
    local name=$1 status
    shift
    "$@" > said 2>&1 < /dev/null
    status=$?
    [ $status = 0 ] || { echo "    status $status: $*"; tail -n 5 said | sed 's/^/    /'; }
    result $status "$name"
}

# runs NAME COMMAND...: the same for a program; what it says stays in `out` for the checks that follow.
runs() {
    check "$@"
    mv said out
}

# refuses NAME PATTERN COMMAND...: exit status 1, and on standard error exactly one line, which matches the pattern.
refuses() {
    local name=$1 pattern=$2 status ok=1
    shift 2
    "$@" > out 2> err < /dev/null
    status=$?
    [ $status = 1 ] && [ "$(wc -l < err)" = 1 ] && grep -Eq "^error: .*($pattern)" err && ok=0
    [ $ok = 0 ] || { echo "    status $status, wanted '$pattern': $*"; head -n 5 err | sed 's/^/    /'; }
    result $ok "$name"
}

small="--image_size 8 --width 32 --heads 2 --patch 2 --batch 6 --log_every 1 --sample_steps 2 --warmup 0 --lr_schedule constant"
same() { cmp "$1" "$2"; }
differ() { cmp -s "$1" "$2"; [ $? = 1 ]; } # both are there
absent() { [ ! -e "$1" ]; }
column() { tail -n +2 "$1" | cut -d, -f"$2"; }                            # CSV COLUMN
log_is() { [ "$(column "$1/log.csv" 1)" = "$(seq 0 $(($2 - 1)))" ]; }     # FOLDER STEPS: each step once, in order
state_is() { head -c 20000 "$1/state.safetensors" | grep -aq "\"step\":\"$2\""; } # FOLDER STEP
says() { grep -Eqs -- "$1" out; }

# st FILE HEADER [COMMAND...]: a safetensors file whose data is what the command writes
st() {
    local file=$1 header=$2 length=${#2}
    shift 2
    printf "\\x$(printf %02x $((length % 256)))\\x$(printf %02x $((length / 256)))\0\0\0\0\0\0%s" "$header" > "$file"
    [ $# = 0 ] || "$@" >> "$file"
}
patch_bytes() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; } # FILE OFFSET BYTES
bytes_of() { stat -c %s "$1"; }

# ---- Training

runs "train: six steps" "$train" $small --steps 6 --out six
check "train: says what it does" says "^step 6/6 +loss [0-9.]+ .*images/s .*GFLOP/s .*left$"
check "train: prints its memory" grep -q "memory: parameters .*gradients .*Adam .*activations" out
check "train: the files are there" ls six/weights.safetensors six/state.safetensors six/log.csv six/samples_000006.png
check "train: and no others" [ "$(ls six | wc -l)" = 4 ]
check "train: header of the log" grep -qx "step,loss,mse,vb,grad_norm,lr,n,m,ms,images_per_s" <(head -n 1 six/log.csv)
check "train: a row for each step" log_is six 6
check "train: ten numbers in each row" awk -F, 'NF != 10 || (NR > 1 && /[^0-9.,e+-]/) { exit 1 }' six/log.csv
check "train: n in 0..1, m in 1..2" awk -F, 'NR > 1 && ($7 < 0 || $7 > 1 || $8 < 1 || $8 > 2) { exit 1 }' six/log.csv
runs "train: picture decodes" "$unit" png six/samples_000006.png
check "train: 40 pictures of 8x8, four times enlarged" says "^342 138 "
runs "train: its pictures drawn again" "$sample" --weights six/weights.safetensors --n 40 --steps 2 --out drawn.png
check "train: its pictures are those of the averaged weights" same drawn.png six/samples_000006.png
runs "train: same seed, same weights" "$train" $small --steps 6 --out again
check "train: same seed, same bytes" same six/weights.safetensors again/weights.safetensors
runs "train: another seed" "$train" $small --steps 6 --seed 2 --out seed2
check "train: another seed, other weights" differ six/weights.safetensors seed2/weights.safetensors
for threads in 2 3; do
    runs "train: $threads threads" env OMP_NUM_THREADS=$threads "$train" $small --steps 6 --out threads$threads
    check "train: $threads threads: same bytes" same six/weights.safetensors threads$threads/weights.safetensors
done
runs "train: recompute" "$train" $small --steps 6 --recompute 1 --out recompute
check "train: recompute: same bytes" same six/weights.safetensors recompute/weights.safetensors
runs "train: micro-batches that do not divide the batch" "$train" $small --steps 2 --micro_batch 4 --out micro
check "train: micro-batches: the same losses and norms" awk -F, 'FNR == NR { loss[FNR] = $2; norm[FNR] = $5 }
    FNR < NR && FNR > 1 { n++; bad += (loss[FNR] / $2 - 1) ^ 2 > 1e-10 || (norm[FNR] / $5 - 1) ^ 2 > 1e-10 }
    END { exit bad || n != 2 }' six/log.csv micro/log.csv
runs "train: warm-up" "$train" $small --steps 5 --warmup 4 --lr 1e-3 --out warm
check "train: warm-up: learning rates" [ "$(echo $(column warm/log.csv 6))" = "0.00025 0.0005 0.00075 0.001 0.001" ]
runs "train: linear schedule" "$train" $small --steps 5 --warmup 1 --lr 1e-3 --lr_schedule linear --out linear
check "train: linear schedule: learning rates" \
    [ "$(echo $(column linear/log.csv 6))" = "0.001 0.001 0.00075 0.0005 0.00025" ]
runs "train: cosine schedule" "$train" $small --steps 4 --lr 1e-3 --lr_schedule cosine --out cosine
check "train: cosine schedule: learning rates" \
    [ "$(echo $(column cosine/log.csv 6))" = "0.001 0.000853553 0.0005 0.000146447" ]
runs "train: logit-normal timesteps" "$train" $small --steps 2 --t_sampling logit_normal --t_mean 1 --out logit
check "train: logit-normal timesteps: another loss" \
    differ <(sed -n 3p six/log.csv | cut -d, -f2) <(sed -n 3p logit/log.csv | cut -d, -f2) # the first is of zeros
runs "train: AdamW" "$train" $small --steps 4 --optimizer adamw --out adamw
check "train: AdamW: other losses than Muon's" \
    differ <(column six/log.csv 2 | sed -n 4p) <(column adamw/log.csv 2 | sed -n 4p)
runs "train: --name=value, a flag without value" "$train" $small --steps=1 --hflip --show --out=flags
check "train: --show draws half blocks" grep -q $'\x1b\[38;2;[0-9]*;[0-9]*;[0-9]*m.*\xe2\x96\x80' out

# ---- Going on

runs "resume: three steps" "$train" $small --steps 3 --out three
cp -r three crashed
cp -r three kept
runs "resume: to six" "$train" --resume three --steps 6
check "resume: same bytes as in one go" same six/weights.safetensors three/weights.safetensors
check "resume: the log has each step once" log_is three 6
check "resume: the same log, but for the times" cmp <(cut -d, -f1-8 six/log.csv) <(cut -d, -f1-8 three/log.csv)
printf '3,9,9,0,1,1,1,1,1,1\n4,9' >> crashed/log.csv # steps after the last save, and half a line
runs "resume: after a crash" "$train" --resume crashed --steps 6
check "resume: after a crash: same bytes" same six/weights.safetensors crashed/weights.safetensors
check "resume: after a crash: log" cmp <(cut -d, -f1-8 six/log.csv) <(cut -d, -f1-8 crashed/log.csv)
runs "resume: a schedule: two steps of four" "$train" $small --steps 2 --lr 1e-3 --lr_schedule cosine --out half
runs "resume: a schedule: to four" "$train" --resume half --steps 4
check "resume: a schedule: falls to zero at the new end" \
    same <(column half/log.csv 6 | tail -n 2) <(column cosine/log.csv 6 | tail -n 2)
runs "resume: AdamW: two steps of four" env OMP_NUM_THREADS=3 "$train" $small --steps 2 --optimizer adamw --out adamw_2
LC_ALL=C sed -i 's/"optimizer":"adamw"/"other____":"adamw"/' adamw_2/state.safetensors # as long, and unknown
check "resume: a state from before --optimizer: its metadata lacks it" \
    grep -aq '"other____":"adamw"' adamw_2/state.safetensors
runs "resume: AdamW, which a state from before --optimizer means: to four" "$train" --resume adamw_2 --steps 4
check "resume: AdamW: same bytes as in one go" same adamw/weights.safetensors adamw_2/weights.safetensors
runs "bf16: three steps" "$train" $small --dtype bf16 --steps 3 --out bf16_3
runs "bf16: to six" "$train" --resume bf16_3 --steps 6
runs "bf16: six steps, with another number of threads" env OMP_NUM_THREADS=3 "$train" $small --dtype bf16 --steps 6 \
    --out bf16_6
check "bf16: resumed: same bytes as in one go" same bf16_6/weights.safetensors bf16_3/weights.safetensors
check "bf16: other bytes than in fp32" differ six/weights.safetensors bf16_3/weights.safetensors
runs "bf16: sample" "$sample" --dtype bf16 --weights bf16_3/weights.safetensors --n 1 --steps 2 --out a.png
runs "resume: a model by its name" "$train" --model S/4 --image_size 8 --width 24 --heads 3 --steps 1 --batch 2 \
    --sample_steps 2 --out named
runs "resume: a model by its name: goes on" "$train" --resume named --steps 2
metadata() { head -c 4000 "$1/weights.safetensors" | grep -aq "\"$2\":\"$3\""; } # FOLDER KEY VALUE: so its metadata
check "model: too few steps for so slow an average: told" \
    says "^EMA: after 2 steps 100 % of the average .* is still the start"
check "model: the paper's has no skip connection" metadata named skip 0
check "model: the paper's is trained by AdamW" grep -aq '"optimizer":"adamw"' named/state.safetensors
check "model: the default is Muon" grep -aq '"optimizer":"muon"' six/state.safetensors
check "model: the paper's pre and post blocks do not see t" metadata named timestep_in_pre_post 0
check "model: ours has a skip connection" metadata six skip 1

# interrupt SIGNAL FOLDER CONDITION OPTION...: starts training, sends it the signal as soon as the condition holds.
# Leaves the exit status in `status` and what the program said in `out`.
interrupt() {
    local signal=$1 folder=$2 condition=$3 pid
    shift 3
    rm out
    "$train" $small --steps 1000000 --sample_every 0 --out "$folder" "$@" > out 2> err < /dev/null &
    pid=$!
    for _ in $(seq 2400); do
        $condition && break
        sleep 0.05
    done
    kill -"$signal" $pid
    { wait $pid; } 2> /dev/null
    status=$?
}

for signal in INT TERM; do
    interrupt $signal stopped$signal "says ^step.3/"
    check "SIG$signal: status 130" [ $status = 130 ]
    check "SIG$signal: nothing on standard error" [ ! -s err ]
    check "SIG$signal: says how to go on" says "^stopped after step [0-9]+; go on with: .*-resume stopped$signal"
    steps=$(sed -n 's/^stopped after step \([0-9]*\);.*/\1/p' out)
    check "SIG$signal: the state is that of the step" state_is stopped$signal "$steps"
    check "SIG$signal: the log ends there" log_is stopped$signal "$steps"
    runs "SIG$signal: goes on" "$train" --resume stopped$signal --steps $((steps + 2))
    runs "SIG$signal: the same, uninterrupted" "$train" $small --steps $((steps + 2)) --out straight$signal
    check "SIG$signal: same bytes" same straight$signal/weights.safetensors stopped$signal/weights.safetensors
    check "SIG$signal: the log has each step once" log_is stopped$signal $((steps + 2))
done
interrupt INT painting "says ^step.1/" --sample_every 1 --sample_steps 60 --depth 3 --save_every 1000
steps=$(sed -n 's/^stopped after step \([0-9]*\);.*/\1/p' out)
check "SIGINT while pictures are drawn: status 130" [ $status = 130 ]
check "SIGINT while pictures are drawn: state is saved" state_is painting "$steps"
runs "SIGINT while pictures are drawn: goes on" "$train" --resume painting --steps $((steps + 1)) --sample_steps 2
check "SIGINT while pictures are drawn: then they are drawn" ls "painting/$(printf 'samples_%06d.png' "$steps")"
"$train" $small --steps 1 --sample_steps 1000 --depth 60 --out last > out 2> err < /dev/null & # takes minutes
for _ in $(seq 2400); do [ -e last/weights.safetensors ] && break || sleep 0.05; done
{ kill $! && wait $!; } 2> /dev/null
check "SIGTERM while the last pictures are drawn: status 130" [ $? = 130 ]
check "SIGTERM while the last pictures are drawn: says how to go on" says "^stopped after step 1; go on with"
interrupt KILL killed "test -e killed/state.safetensors" --save_every 1 --log_every 100000
steps=$(head -c 20000 killed/state.safetensors | grep -ao '"step":"[0-9]*' | grep -o '[0-9]*$')
check "SIGKILL: the log reaches the saved state" [ "$(column killed/log.csv 1 | grep -xc "$((steps - 1))")" = 1 ]
runs "SIGKILL: goes on" "$train" --resume killed --steps $((steps + 1))
check "SIGKILL: the log has each step once" log_is killed $((steps + 1))

# Options that change what is learnt, and some that must not
runs "train: pictures on the way" "$train" $small --steps 6 --sample_every 1 --out drawing
check "train: pictures on the way: same bytes" same six/weights.safetensors drawing/weights.safetensors
for clip in 0 1e9; do runs "train: --grad_clip $clip" "$train" $small --steps 6 --grad_clip $clip --out clip$clip; done
check "train: --grad_clip 0 is none" same clip0/weights.safetensors clip1e9/weights.safetensors
for option in "hflip 1" "label_drop 1" "ema_warmup 0" "grad_clip 0.1" "t_mean 2" "optimizer adamw"; do
    runs "train: --$option" "$train" $small --steps 6 --$option --out "with_${option% *}"
    check "train: --$option: other weights" differ six/weights.safetensors "with_${option% *}/weights.safetensors"
done
check "train: n and m of seed 1" [ "$(echo $(column six/log.csv 7,8))" = "1,2 0,1 0,1 1,1 1,2 1,1" ]

# ---- Kinds of models and data

runs "train: plain DiT, eps" \
    "$train" $small --fixed_point 0 --depth 2 --prediction eps --learn_sigma 1 --steps 2 --out dit
runs "train: v" "$train" $small --prediction v --zero_terminal_snr 1 --v_weight p2 --timestep_in_pre_post 1 \
    --pre_depth 2 --post_depth 0 --steps 2 --out v
runs "train: x" "$train" $small --prediction x --timestep_in_pre_post 1 --steps 2 --out x
runs "train: x, DiT" "$train" $small --prediction x --fixed_point 0 --depth 2 --steps 2 --out x_dit
runs "train: bfloat16 weights" "$train" $small --weights_dtype bf16 --steps 2 --out bf16
runs "train: bfloat16 weights are half as large" "$unit" tensors bf16/weights.safetensors
check "train: bfloat16 weights, every tensor" [ "$(grep -vc " BF16 " out)" = 0 ]
check "train: bfloat16 weights: most of their bytes are not 0" \
    [ $((2 * $(tr -d "\0" < bf16/weights.safetensors | wc -c))) -gt "$(bytes_of bf16/weights.safetensors)" ]
images='{"__metadata__":{"class_names":"[\"black\",\"white\"]"},"y":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},'
images+='"x":{"dtype":"U8","shape":[4,8,8,3],"data_offsets":[32,800]}}'
labels() { for label in "$@"; do printf "\\x$(printf %02x "$label")\0\0\0\0\0\0\0"; done; }
pixels() { labels 0 1 0 1; for c in 0 377 0 377; do head -c 192 /dev/zero | tr '\0' "\\$c"; done; }
st images.safetensors "$images" pixels
runs "train: a dataset of bytes" "$train" $small --data images.safetensors --steps 2 --out images
check "train: its class names are in the weights" grep -aq 'class_names":"\[\\"black' images/weights.safetensors
floats='{"__metadata__":{"latent_scale":"0.18215"},"x":{"dtype":"F32","shape":[6,4,8,8],"data_offsets":[0,6144]}}'
st latents.safetensors "$floats" head -c 6144 /dev/zero
runs "train: a dataset of latents, unlabelled" "$train" $small --data latents.safetensors --steps 2 --out latents
check "train: their scale is in the weights" grep -aq '"latent_scale":"0.18215"' latents/weights.safetensors

# ---- Starting from weights. Without learning and averaging they come out as they went in.

still="--lr 0 --ema 1 --ema_warmup 0 --sample_every 0 --batch 6 --sample_steps 2"
runs "init" "$train" --init six/weights.safetensors $still --steps 1 --out init
check "init: the same bytes" same six/weights.safetensors init/weights.safetensors
runs "init: of a DiT" "$train" --init dit/weights.safetensors $still --steps 1 --out init_dit
check "init: of a DiT: the same bytes" same dit/weights.safetensors init_dit/weights.safetensors
runs "init: without the skip connection" "$train" --init six/weights.safetensors --skip 0 $still --steps 1 \
    --out unskipped
check "init: without the skip connection: else the same bytes" \
    same <(sed 's/"skip":"1"/"skip":"0"/' six/weights.safetensors) unskipped/weights.safetensors
runs "init: goes on" "$train" --resume init --steps 2
check "init: goes on: the same bytes" same six/weights.safetensors init/weights.safetensors
runs "init: other labels" \
    "$train" --init six/weights.safetensors --data images.safetensors $still --steps 1 --out relabelled
check "init: other labels: says so" says "labels: 10 there, 2 here: their rows are drawn anew, that of no label is kept"
runs "init: other labels: sample" \
    "$sample" --weights relabelled/weights.safetensors --n 2 --steps 2 --labels white --out a.png
runs "init: a fixed point from a DiT" "$train" --init dit/weights.safetensors --fixed_point 1 --pre_depth 2 \
    --post_depth 0 $still --steps 1 --out born
check "init: a fixed point from a DiT: says how" says "a DiT of 2 blocks: the first 2, the last 0, and number 1 as the"
runs "init: a fixed point from a DiT: sample" "$sample" --weights born/weights.safetensors --n 1 --steps 2 --out a.png
runs "train: how SiT sees the time" "$train" $small --time_embedding sit --steps 6 --out sit
check "train: how SiT sees the time: other losses" differ <(column sit/log.csv 2) <(column six/log.csv 2)
check "train: how SiT sees the time: is in the weights" grep -aq '"time_embedding":"sit"' sit/weights.safetensors

# ---- Sampling

weights="--weights six/weights.safetensors"
runs "sample" "$sample" $weights --n 5 --steps 4 --out a.png
check "sample: says what it spent" \
    says "^5 pictures in .* s, 4 timesteps, 32 block passes per picture \(and as many for guidance\): a.png"
runs "sample: picture decodes" "$unit" png a.png
check "sample: 5 pictures in a 3x2 grid" says "^104 70 "
check "sample: signature and header" [ "$(head -c 29 a.png | od -An -tx1 | tr -d ' \n')" = \
    89504e470d0a1a0a0000000d4948445200000068000000460802000000 ]
for row in "1,0 70 104" "1,0,1,1 138 70"; do # 6 pictures
    labels=${row%% *}
    runs "sample: --labels $labels" "$sample" $weights --n 6 --labels $labels --steps 2 --out b.png
    runs "sample: --labels $labels: picture decodes" "$unit" png b.png
    check "sample: --labels $labels: a column each" says "^${row#* } "
done
runs "sample: again" "$sample" $weights --n 5 --steps 4 --out b.png
check "sample: same seed, same file" same a.png b.png
runs "sample: another seed" "$sample" $weights --n 5 --steps 4 --seed 2 --out b.png
check "sample: another seed, another file" differ a.png b.png
runs "sample: one at a time, three threads" env OMP_NUM_THREADS=3 "$sample" $weights --n 5 --steps 4 --batch 1 \
    --out b.png
check "sample: one at a time: same file" same a.png b.png
runs "sample: labels by number" "$sample" $weights --n 4 --steps 2 --labels 5,0 --out a.png
runs "sample: labels by name" "$sample" $weights --n 4 --steps 2 --labels heart,circle --out b.png
check "sample: by number and by name the same" same a.png b.png
runs "sample: no label" "$sample" $weights --n 4 --steps 2 --labels 10 --out b.png
check "sample: no label, other pictures" differ a.png b.png
runs "sample: latents" "$sample" $weights --n 3 --steps 2 --latents latent.safetensors --out a.png
runs "sample: latents are listed" "$unit" tensors latent.safetensors
check "sample: latents: names, types, shapes" [ "$(cat out)" = $'x F32 (3,3,8,8)\ny I64 (3)' ]
labels_in() { echo $(od -An -td8 -w8 -v -j $((8 + $(od -An -tu8 -N8 "$1"))) -N $((8 * $2)) "$1"); } # y comes first
check "sample: latents: labels" [ "$(labels_in latent.safetensors 3)" = "0 1 2" ]
runs "sample: latents can be trained on" "$train" $small --data latent.safetensors --steps 1 --out on_latents
runs "sample: trace" "$sample" $weights --n 3 --steps 3 --iters 2,1,4 --trace trace.csv --out a.png
check "sample: trace: header" grep -qx "step,t,iteration,residual" <(head -n 1 trace.csv)
check "sample: trace: a row for each iteration" [ "$(echo $(column trace.csv 1,2,3))" = \
    "0,999,1 0,999,2 1,500,1 2,0,1 2,0,2 2,0,3 2,0,4" ]
runs "sample: trace: two batches" "$sample" $weights --n 3 --batch 2 --steps 3 --iters 2,1,4 --trace first.csv \
    --out a.png
check "sample: trace: two batches: of the first" [ "$(column first.csv 1,2,3)" = "$(column trace.csv 1,2,3)" ]
check "sample: trace: residuals" awk -F, 'NR > 1 && !($4 > 0 && $4 < 10) { exit 1 }' trace.csv
runs "sample: tol stops early" "$sample" $weights --n 3 --steps 3 --iters 50 --tol 1 --out a.png
check "sample: tol stops early: passes" says " (9|[0-9]{2}|1[01][0-9]) block passes" # of 156
runs "sample: tol: trace" "$sample" $weights --n 3 --steps 3 --iters 30 --tol 0.02 --trace tol.csv --out a.png
check "sample: tol: each timestep ends at the first residual below it" awk -F, '
    NR > 2 { bad += $1 == step ? residual < 0.02 : residual >= 0.02 && k < 30 } { step = $1; k = $3; residual = $4 }
    END { exit bad || NR < 5 || (residual >= 0.02 && k < 30) }' tol.csv
for row in "v --eta 1" "six --cfg 2" "six --cfg_channels 1" "six --reuse 0" "six --t_shift 1" \
    "six --solver anderson --mixing 0.5" "six --solver anderson --window 1"; do
    read -r kind options <<< "$row"
    with=$(grep -o -- '--solver anderson' <<< "$options")
    runs "sample: without $options" "$sample" --weights $kind/weights.safetensors --n 2 --steps 4 $with --out a.png
    runs "sample: $options" "$sample" --weights $kind/weights.safetensors --n 2 --steps 4 $options --out b.png
    check "sample: $options: other pictures" differ a.png b.png
done
anderson="--weights six/weights.safetensors --solver anderson"
runs "sample: anderson" "$sample" $anderson --n 3 --steps 3 --iters 2,1,4 --trace mixed.csv --out a.png
check "sample: anderson: no further passes" says " 13 block passes"
check "sample: anderson: trace: the same rows" [ "$(column mixed.csv 1,2,3)" = "$(column trace.csv 1,2,3)" ]
check "sample: anderson: trace: up to the first mixture the same residuals" \
    same <(head -n 3 mixed.csv) <(head -n 3 trace.csv)
check "sample: anderson: trace: then others" differ <(tail -n +4 mixed.csv) <(tail -n +4 trace.csv)
runs "sample: anderson: without a trace" "$sample" $anderson --n 3 --steps 3 --iters 2,1,4 --out b.png
check "sample: anderson: without a trace: same file" same a.png b.png
runs "sample: anderson: 3 threads" env OMP_NUM_THREADS=3 "$sample" $anderson --n 3 --steps 3 --iters 2,1,4 --out b.png
check "sample: anderson: 3 threads: same file" same a.png b.png
runs "sample: anderson: one iteration" "$sample" $anderson --n 3 --steps 3 --iters 1 --mixing 0.5 --out a.png
runs "sample: plain: one iteration" "$sample" $weights --n 3 --steps 3 --iters 1 --out b.png
check "sample: anderson: one iteration is plain" same a.png b.png
runs "sample: anderson: tol stops early" "$sample" $anderson --n 3 --steps 3 --iters 50 --tol 1 --out a.png
check "sample: anderson: tol stops early: passes" says " (9|[0-9]{2}|1[01][0-9]) block passes"
for budget in 12 40 61 100; do
    for alloc in const inc dec; do
        runs "sample: budget $budget $alloc" \
            "$sample" $weights --n 1 --steps 4 --budget $budget --alloc $alloc --out a.png
        check "sample: budget $budget $alloc: all spent, none exceeded" says " $budget block passes"
    done
done
runs "sample: no guidance" "$sample" $weights --n 2 --steps 4 --cfg 1 --out a.png
check "sample: no guidance: spends none" says " 32 block passes per picture: a.png"
runs "sample: guidance where there is no timestep" "$sample" $weights --n 2 --steps 4 --cfg_interval 667,998 --out b.png
check "sample: guidance where there is no timestep: same file" same a.png b.png
runs "sample: guidance at one of four timesteps" "$sample" $weights --n 2 --steps 4 --cfg_interval 600,998 --out b.png
check "sample: guidance at one of four timesteps: spends its passes" \
    says " 32 block passes per picture \(and 8 for guidance\)"
check "sample: guidance at one of four timesteps: other pictures" differ a.png b.png
runs "sample: guidance at every timestep" "$sample" $weights --n 2 --steps 4 --cfg_interval 0,999 --out a.png
runs "sample: guidance at every timestep: as without the option" "$sample" $weights --n 2 --steps 4 --out b.png
check "sample: guidance at every timestep: same file" same a.png b.png
runs "sample: ddpm, learned variance, DiT" \
    "$sample" --weights dit/weights.safetensors --sampler ddpm --n 2 --steps 3 --out a.png
check "sample: DiT passes" says " 6 block passes"
runs "sample: ddim, eta 1, no reuse, v" \
    "$sample" --weights v/weights.safetensors --eta 1 --reuse 0 --n 2 --steps 3 --out a.png
runs "sample: bfloat16 weights" "$sample" --weights bf16/weights.safetensors --n 1 --steps 2 --out a.png
runs "sample: class names of the data" \
    "$sample" --weights images/weights.safetensors --labels white --n 1 --steps 2 --out a.png
runs "sample: 4 channels, unlabelled" "$sample" --weights latents/weights.safetensors --n 1 --steps 2 --out a.png
check "sample: unlabelled: nothing to guide" says " 16 block passes per picture: a.png"
check "sample: latents: says how to decode them" says "^a.png shows three channels of latents; .*latents.py decode FILE"
runs "sample: x" "$sample" --weights x/weights.safetensors --n 3 --steps 3 --budget 12 --latents x.safetensors \
    --out a.png
check "sample: x: passes" says " 12 block passes"
runs "sample: x, DiT" "$sample" --weights x_dit/weights.safetensors --n 3 --steps 3 --out a.png
runs "sample: shifted timesteps" "$sample" $weights --n 2 --steps 4 --iters 1 --t_shift 3 --trace shift.csv --out a.png
check "sample: shifted timesteps: where they are" [ "$(echo $(column shift.csv 2))" = "999 900 750 500" ]
for kind in x six; do # other pictures from the second of three timesteps on
    for order in 1 2; do
        runs "sample: $kind, order $order" "$sample" --weights $kind/weights.safetensors --n 1 --steps 3 --order $order \
            --latents order$order.safetensors --out a.png
    done
    check "sample: $kind: order 2 draws others" differ order1.safetensors order2.safetensors
done
for kind in x x_dit six v; do
    runs "sample: strip of $kind" "$sample" --weights $kind/weights.safetensors --n 5 --batch 2 --steps 3 --strip $kind.png \
        --out a.png
    runs "sample: strip of $kind: decodes" "$unit" png $kind.png
    check "sample: strip of $kind: two pictures in two rows, three columns" says "^80 106 "
done
runs "sample: strip: no more than 24 columns" "$sample" $weights --n 1 --steps 40 --iters 1 --strip a.png --out b.png
runs "sample: strip: decodes" "$unit" png a.png
check "sample: strip: 24 columns" says "^626 54 "
runs "sample: --show" "$sample" $weights --n 1 --steps 2 --show --out a.png
check "sample: --show draws half blocks" says $'\xe2\x96\x80'

# ---- Benchmark

runs "bench" "$bench" --width 32 --heads 2 --image_size 8 --patch 2 --batch 2 --rounds 1
check "bench: lines of name, value, unit" awk 'NF != 3 || $2 !~ /^[0-9.]+$/ { exit 1 }' out
for name in peak_gflops gemm_gflops train_gflops train_images_per_s train_peak_mb sample_passes_per_s; do
    check "bench: $name" awk -v name=$name 'index($1, name) == 1 && $2 > 0 { found = 1 } END { exit !found }' out
done
refuses "bench: too large, said before the work" "lower --batch" timeout 20 "$bench" --width 4096 --heads 32 \
    --batch 65536
runs "bench: without matmuls" "$bench" --width 32 --heads 2 --image_size 8 --batch 2 --rounds 1 --gemm 0 --recompute 1

# ---- Help

for option in data image_size model width heads depth patch fixed_point pre_depth post_depth timestep_in_pre_post skip \
    no_grad_iters grad_iters prediction learn_sigma zero_terminal_snr v_weight batch micro_batch steps optimizer lr warmup \
    lr_schedule t_sampling t_mean t_std weight_decay grad_clip ema ema_warmup label_drop hflip seed recompute dtype out \
    resume init time_embedding save_every sample_every log_every export sampler order t_shift sample_steps reuse cfg \
    weights_dtype show; do
    echo "  --$option "
done > train_options
for option in weights n labels seed sampler steps eta iters budget alloc reuse tol solver window mixing cfg \
    cfg_channels cfg_interval t_shift order out latents trace strip show batch zoom dtype; do
    echo "  --$option "
done > sample_options
for option in model width heads depth patch batch n m rounds image_size fixed_point pre_depth post_depth \
    timestep_in_pre_post skip learn_sigma channels classes recompute dtype seed gemm; do
    echo "  --$option "
done > bench_options
for program in train sample bench; do
    runs "help: $program" "${!program}" --help
    check "help: $program: every option" \
        cmp <(sort ${program}_options) <(grep -o '^  --[a-z_0-9]* ' out | sort)
    check "help: $program: with its default" \
        [ "$(grep -c '^  --' out)" = "$(grep -Ec '^  --[a-z_0-9]+ +.* \[.+\]$' out)" ]
done

# ---- What must be refused: options

refuses "option: unknown" "unknown option --stepz; did you mean --steps" "$train" --stepz 3
refuses "option: unknown, sample" "unknown option --bugdet; did you mean --budget" "$sample" --bugdet=3
refuses "option: of another program" "unknown option --resume" "$sample" --resume six
refuses "option: no option" "'six' is not an option" "$train" six
refuses "option: no value" "option --steps needs a value" "$train" --steps
refuses "option: another option for a value" "option --steps needs a value" "$train" --steps --batch 3
refuses "option: empty value" "option --steps: ''" "$train" --steps=
refuses "option: too small" "option --batch: '0' is not a whole number from 1 to" "$train" --batch 0
refuses "option: too large" "option --batch: '1e9' is not a whole number" "$train" --batch 1e9
refuses "option: a word for a number" "option --lr: 'fast' is not a number" "$train" --lr fast
refuses "option: NaN" "option --lr: 'nan' is not a number" "$train" --lr nan
refuses "option: half a number" "option --steps: '3x'" "$train" --steps 3x
refuses "option: a fraction" "option --steps: '1.5' is not a whole number" "$train" --steps 1.5
refuses "option: unknown word" "option --prediction: 'x0' is not one of eps\|v\|flow\|x" "$train" --prediction x0
refuses "option: range upside down" "option --grad_iters: '4,2'" "$train" --grad_iters 4,2
refuses "option: range from 0" "option --grad_iters: '0,2'" "$train" --grad_iters 0,2
refuses "option: range of three" "option --no_grad_iters: '1,2,3'" "$train" --no_grad_iters 1,2,3
refuses "option: range of timesteps that ends before it begins" "option --cfg_interval: '800,200'" \
    "$sample" --cfg_interval 800,200
refuses "option: range beyond the timesteps" "option --cfg_interval: '0,1000'" "$sample" --cfg_interval 0,1000
refuses "option: negative seed" "option --seed: '-1'" "$train" --seed -1
refuses "option: seed too large" "option --seed: '18446744073709551616'" "$train" --seed 18446744073709551616
refuses "option: model" "option --model: 'M/2'" "$train" --model M/2
refuses "option: model without patch" "option --model: 'S'" "$train" --model S
refuses "option: patch" "image_size 9 is not a multiple of patch 2" "$train" --image_size 9 --patch 2 --out no
refuses "option: heads" "width 32 is not a multiple of heads 3" "$train" --width 32 --heads 3 --out no
refuses "option: variance and flow" "learn_sigma" "$train" --learn_sigma 1 --out no
refuses "option: variance and x" "learn_sigma 1 needs prediction eps or v" \
    "$train" --prediction x --learn_sigma 1 --out no
refuses "option: zero SNR and x" "zero_terminal_snr 1 needs prediction v, not x" \
    "$train" --prediction x --zero_terminal_snr 1 --out no
refuses "option: schedule" "option --lr_schedule: 'step' is not one of constant\|linear\|cosine" \
    "$train" --lr_schedule step
refuses "option: optimiser" "option --optimizer: 'sgd' is not one of adamw\|muon" "$train" --optimizer sgd
refuses "option: kind of timesteps" "option --t_sampling: 'normal' is not one of" "$train" --t_sampling normal
refuses "option: mean of the timesteps" "option --t_mean: '30' is not a number from -20 to 20" "$train" --t_mean 30
refuses "option: deviation of the timesteps" "option --t_std: '-1' is not a number from 0" "$train" --t_std=-1
refuses "option: shift" "option --t_shift: '-1' is not a number from 0 to 100" "$sample" --t_shift=-1
refuses "option: strip of a noisy sampler" "option --strip" "$sample" --weights v/weights.safetensors --sampler ddpm \
    --strip no.png --out no.png
refuses "option: strip of noisy ddim" "option --strip" "$sample" --weights v/weights.safetensors --eta 0.5 --strip no.png \
    --out no.png
refuses "option: order" "option --order: '3' is not a whole number from 1 to 2" "$sample" --order 3 --out no.png
for option in "alloc inc" "tol 0.1" "solver anderson" "trace no.csv" "iters 2"; do
    refuses "option: $option of a DiT" "option --${option% *}: this model is a DiT, which does not iterate" \
        "$sample" --weights x_dit/weights.safetensors --$option --out no.png
done
refuses "option: shift of v" "option --t_shift: is for models that predict flow or x" "$sample" \
    --weights v/weights.safetensors --t_shift 1 --out no.png
refuses "option: shift, training v" "option --t_shift: is for models that predict flow or x" "$train" \
    --prediction v --t_shift 1 --out no
for sampler in "six/weights.safetensors" "v/weights.safetensors --sampler ddpm"; do
    refuses "option: eta of $sampler" "option --eta: is for the sampler ddim" "$sample" --weights $sampler --eta 0.5 --out no.png
done
refuses "option: order 2 of v" "option --order: 2 is for models that predict flow or x" "$sample" \
    --weights v/weights.safetensors --order 2 --out no.png
refuses "option: order 2 of v while training" "option --order" "$train" --prediction v --order 2 --out no
refuses "option: sampler of x" "option --sampler" "$sample" --weights x/weights.safetensors --sampler ddim --out no.png
refuses "option: zero SNR and eps" "zero_terminal_snr" "$train" --prediction eps --zero_terminal_snr 1 --out no
refuses "option: sampler while training" "option --sampler" "$train" --sampler ddim --out no
refuses "option: batch beyond memory" "lower --batch" "$train" --batch 1048576 --image_size 256 --width 1024 --out mem
refuses "option: pictures beyond memory" "pictures take|lower --batch" timeout 60 "$sample" $weights --n 1000000 \
    --batch 1000000 --out no.png
refuses "option: sampler" "option --sampler" "$sample" $weights --sampler ddpm --out no.png
refuses "option: budget too small" "option --budget: 11 passes are too few" \
    "$sample" $weights --steps 4 --budget 11 --out no.png
refuses "option: budget too small for DiT" "option --budget" \
    "$sample" --weights dit/weights.safetensors --steps 4 --budget 7 --out no.png
refuses "option: budget and iters" "option --budget" "$sample" $weights --budget 100 --iters 3 --out no.png
refuses "option: iters" "option --iters: 2 numbers for 4 timesteps" \
    "$sample" $weights --steps 4 --iters 3,4 --out no.png
refuses "option: solver" "option --solver: 'newton' is not one of plain\|anderson" \
    "$sample" $weights --solver newton --out no.png
refuses "option: solver while training" "unknown option --solver" "$train" --solver anderson --out no
refuses "option: window too small" "option --window: '0' is not a whole number from 1 to 8" \
    "$sample" $anderson --window 0 --out no.png
refuses "option: window too large" "option --window: '9'" "$sample" $anderson --window 9 --out no.png
refuses "option: no mixing" "option --mixing: '0' is not a number from 0.01 to 2" \
    "$sample" $anderson --mixing 0 --out no.png
refuses "option: label too large" "option --labels: '11'" "$sample" $weights --labels 0,11 --out no.png
refuses "option: label negative" "option --labels: '-1'" "$sample" $weights --labels=-1 --out no.png
refuses "option: unknown class" "option --labels: 'hart'" "$sample" $weights --labels hart --out no.png

from="--init six/weights.safetensors --out no"
refuses "init: width" "init: six/weights.safetensors has width 32, this run 64" "$train" $from --width 64
refuses "init: prediction" "has prediction flow, this run v" "$train" $from --prediction v
refuses "init: size of the pictures" "has image_size 8, this run 12" "$train" $from --image_size 12
refuses "init: channels" "has channels 3, this run 4" "$train" $from --data latents.safetensors
refuses "init: time" "has time_embedding dit, this run sit" "$train" $from --time_embedding sit
refuses "init: a DiT from a fixed point" "has fixed_point 1, this run 0" "$train" $from --fixed_point 0
refuses "init: too few blocks" "dit/weights.safetensors has 2 blocks" \
    "$train" --init dit/weights.safetensors --fixed_point 1 --pre_depth 2 --post_depth 1 --out no
refuses "init: and resume" "leave out --init or --resume" "$train" --init six/weights.safetensors --resume six --steps 9
refuses "init: no such file" "gone.safetensors" "$train" --init gone.safetensors --out no
refuses "init: a dataset" "images.safetensors: metadata '[a-z_]+' is missing" \
    "$train" --init images.safetensors --out no
refuses "init: a state" "tensor .* is missing" "$train" --init six/state.safetensors $small --out no

# ---- What must be refused: files

cp six/weights.safetensors bad.safetensors
size=$(bytes_of bad.safetensors)
refuses "weights: the default, elsewhere" "weights/.*safetensors: cannot open" "$sample"
refuses "weights: missing" "none.safetensors: cannot open" "$sample" --weights none.safetensors --out no.png
refuses "weights: a folder" "six: is not a file" "$sample" --weights six --out no.png
refuses "weights: empty" "/dev/null" "$sample" --weights /dev/null --out no.png
for length in 0 7 100 5000 $((size - 1)); do
    head -c $length six/weights.safetensors > cut.safetensors
    refuses "weights: cut to $length bytes" "cut.safetensors: " "$sample" --weights cut.safetensors --out no.png
done
refuses "weights: a picture" "a.png: " "$sample" --weights a.png --out no.png
refuses "weights: a dataset" "images.safetensors: metadata 'image_size' is missing" \
    "$sample" --weights images.safetensors --out no.png
patch_bytes bad.safetensors $((size - 4)) '\000\000\300\177'
refuses "weights: NaN" "bad.safetensors: tensor final_layer[^ ]* holds nan" \
    "$sample" --weights bad.safetensors --out no.png
change() { sed "$1" six/weights.safetensors > bad.safetensors; } # must keep the length
change 's/"width":"32"/"width":"64"/'
refuses "weights: of another width" "bad.safetensors: tensor [^ ]+ has the shape .* asks for" \
    "$sample" --weights bad.safetensors --out no.png
change 's/"pre_depth":"1"/"pre_depth":"2"/'
refuses "weights: of more blocks" "bad.safetensors: tensor blocks_pre.1[^ ]+ is missing" \
    "$sample" --weights bad.safetensors --out no.png
change 's/"heads":"2"/"heads":"0"/'
refuses "weights: settings out of range" "bad.safetensors: metadata heads: '0'" \
    "$sample" --weights bad.safetensors --out no.png
change 's/\\"circle\\", \\"ring\\"/\\"circle\\"  \\"ring\\"/'
refuses "weights: class names are no list" "class_names" "$sample" --weights bad.safetensors --out no.png
change 's/\\"circle\\", \\"ring\\"/\\"circle,   , ring\\"/'
refuses "weights: too few class names" "bad.safetensors: .*9 names for 10 classes" \
    "$sample" --weights bad.safetensors --out no.png

refuses "data: missing" "none.safetensors: cannot open" "$train" --data none.safetensors --out no
refuses "data: weights" "no tensor 'x'" "$train" --data six/weights.safetensors --out no
head -c 700 images.safetensors > cut.safetensors
refuses "data: cut" "cut.safetensors: " "$train" --data cut.safetensors --out no
wrong() { labels 0 1 3 1; head -c 768 /dev/zero; }
st label.safetensors "$images" wrong
refuses "data: label out of range" "label.safetensors: tensor y: label 3 of sample 2" \
    "$train" --data label.safetensors --out no
check "refused so far: no file was written" absent no
check "refused so far: no picture was written" absent no.png
cp latents.safetensors nan.safetensors
size=$(bytes_of nan.safetensors)
for i in 1 2 3 4 5 6; do patch_bytes nan.safetensors $((size - 1024 * i)) '\000\000\300\177'; done
refuses "data: NaN" "nan.safetensors: tensor x: sample [0-5] holds nan" env OMP_NUM_THREADS=4 \
    "$train" $small --data nan.safetensors --out nan
refuses "resume: missing" "none: cannot open this folder" "$train" --resume none
cp -r six older
LC_ALL=C sed -i 's/"order":"1"/"other":"1"/' older/state.safetensors # as long, and unknown
check "resume: a state from before --order: its metadata lacks it" grep -aq '"other":"1"' older/state.safetensors
runs "resume: a state from before --order" "$train" --resume older
refuses "resume: enough steps" "option --steps: .* step 6" "$train" --resume three --steps 5
refuses "resume: another model" "option --resume" "$train" --resume three --steps 9 --width 64
refuses "resume: a model by its name" "option --model: the run in three has its model and settings" \
    "$train" --resume three --steps 9 --model S/2
refuses "resume: another optimiser" "option --optimizer: the run in three began with the other" \
    "$train" --resume three --steps 9 --optimizer adamw
refuses "resume: other data" "latents.safetensors: other sizes" \
    "$train" --resume three --steps 9 --data latents.safetensors
for step in x -; do
    sed "s/\"step\":\"3\"/\"step\":\"$step\"/" kept/state.safetensors > bad_state
    mkdir -p bad_run && mv bad_state bad_run/state.safetensors
    refuses "resume: step '$step'" "bad_run/state.safetensors: metadata .?step" \
        "$train" --resume bad_run --steps 9
done

# ---- What must be refused: places to write, with all that was there before kept

snapshot() { (cd "$1" && cksum ./*); }
before=$(snapshot six)
refuses "out: holds a run" "six/[a-z]+.safetensors: a run is stored here.*--resume six" "$train" $small --out six
check "out: holds a run: untouched" [ "$(snapshot six)" = "$before" ]
mkdir only_weights && cp six/weights.safetensors only_weights
refuses "out: holds weights" "only_weights" "$train" $small --steps 1 --out only_weights
check "out: holds weights: untouched" same six/weights.safetensors only_weights/weights.safetensors
refuses "out: below a missing folder" "no/such: cannot make this folder" "$train" $small --out no/such
refuses "out: below a file" "a.png/run: cannot make this folder" "$train" $small --out a.png/run
refuses "out: is a file" "a.png" "$train" $small --out a.png
refuses "out: not for writing" "/proc/run: cannot make this folder" "$train" $small --out /proc/run
refuses "out: not for writing, though it is there" "/proc" "$train" $small --out /proc
refuses "picture: below a missing folder" "no/a.png: cannot write" "$sample" $weights --n 1 --steps 2 --out no/a.png
refuses "picture: a folder" "six: is not a regular file" "$sample" $weights --n 1 --steps 2 --out six
refuses "picture: a device" "/dev/full: is not a regular file" "$sample" $weights --n 1 --steps 2 --out /dev/full
refuses "latents: below a missing folder" "no/l: cannot write" \
    "$sample" $weights --n 1 --steps 2 --latents no/l --out b.png
refuses "trace: below a missing folder" "no/t: cannot write" "$sample" $weights --n 1 --steps 2 --trace no/t --out b.png

# A disk is full after $1 KB: a limit on the size of files, whose signal is ignored, looks the same to a program.
full() { (trap '' XFSZ; ulimit -f "$1"; shift; exec "$@"); }
before=$(snapshot kept)
refuses "full disk: early" "kept/state.safetensors: cannot write: File too large" \
    full 100 "$train" --resume kept --steps 5
check "full disk: early: nothing is lost" cmp <(snapshot kept | grep -v log.csv) <(grep -v log.csv <<< "$before")
refuses "full disk: state" "kept/state.safetensors: cannot write: File too large" \
    full 500 "$train" --resume kept --steps 5
runs "full disk: state: the old one is whole" "$train" --resume kept --steps 6
check "full disk: state: same bytes as if nothing had been" same six/weights.safetensors kept/weights.safetensors
cp a.png before.png
refuses "full disk: picture" "a.png: cannot write" full 1 "$sample" $weights --n 40 --steps 2 --out a.png
check "full disk: the old picture is there" same before.png a.png
refuses "full disk: latents" "l.safetensors: cannot write" full 4 \
    "$sample" $weights --n 10 --steps 2 --latents l.safetensors --out b.png
check "no temporary files are left" [ -z "$(find . -name '*.tmp' ! -path './killed/*')" ]

# ---- A loss that is no number

huge() { for _ in $(seq 1536); do printf '\377\377\177\177'; done; } # the largest float
st huge.safetensors "$floats" huge
before=$(snapshot latents)
refuses "NaN: stops at its step" "step 2: the loss is .*latents keeps the state of step 2" \
    "$train" --resume latents --steps 9 --data huge.safetensors --grad_clip 0
check "NaN: the state is kept" [ "$(snapshot latents)" = "$before" ]
refuses "NaN: at the first step" "step 0: the loss is .*nothing was saved" \
    "$train" $small --data huge.safetensors --out huge
check "NaN: no weights are written" absent huge/weights.safetensors
runs "NaN: the folder can be used again" "$train" $small --data latents.safetensors --steps 1 --out huge

# ---- Nothing is lost, nothing passes unnoticed

tiny="--width 16 --heads 2 --image_size 8 --patch 4 --batch 2 --sample_steps 2 --depth 3 --warmup 0"
odd=$'o\377dd "\\n' # any name that the system allows
cp images.safetensors "$odd.safetensors"
runs "odd path: train" "$train" $tiny --steps 2 --data "$odd.safetensors" --out "$odd"
runs "odd path: resume" "$train" --resume "$odd" --steps 3
runs "odd path: sample" "$sample" --weights "$odd/weights.safetensors" --n 1 --steps 2 --out "$odd.png"

runs "tiny: four steps" "$train" $tiny --steps 4 --sample_every 2 --save_every 2 --optimizer adamw --out tiny
check "tiny: the picture of the middle and of the end" ls tiny/samples_000002.png tiny/samples_000004.png
before=$(snapshot tiny)
runs "finished run: resume" "$train" --resume tiny
runs "finished run: resume, with its steps" "$train" --resume tiny --steps 4
check "finished run: nothing changes" [ "$(snapshot tiny)" = "$before" ]
rm tiny/weights.safetensors tiny/samples_000004.png # as if it had been killed between state and weights
runs "finished run: resume, after a kill in its last save" "$train" --resume tiny
check "finished run: what was missing is made" [ "$(snapshot tiny)" = "$before" ]
refuses "resume: fewer steps than are done" "option --steps: .* step 4" "$train" --resume tiny --steps 3
cp -r tiny copy
refuses "resume: into another folder" "option --out: .*--resume" "$train" --resume six --steps 7 --out copy
check "resume: into another folder: untouched" [ "$(snapshot copy)" = "$before" ]
printf '3,9' | cat <(head -n 4 tiny/log.csv) - > copy/log.csv # the power went: a row was cut
runs "half a row: resume" "$train" --resume copy --steps 5
check "half a row: it is gone" awk -F, 'NF != 10 { exit 1 }' copy/log.csv
touch copy/weights.safetensors.aB3dEf.tmp copy/samples_000009.png.aB3dEf.tmp copy/notes.aB3dEf.tmp
runs "leavings: resume" "$train" --resume copy --steps 6
check "leavings: its own are removed, no others" [ "$(cd copy && echo *.tmp)" = notes.aB3dEf.tmp ]

chmod 600 copy/weights.safetensors && mv copy/weights.safetensors elsewhere &&
    ln -s ../elsewhere copy/weights.safetensors
runs "permissions: resume" "$train" --resume copy --steps 7
check "permissions: kept" [ "$(stat -c %a elsewhere)" = 600 ]
check "a link to the weights: kept, and followed" \
    [ -L copy/weights.safetensors -a elsewhere -nt tiny/state.safetensors ]

parameters=$(($(bytes_of tiny/state.safetensors) / 16 - 4000)) # a little less than there are
cp -r tiny minus && patch_bytes minus/state.safetensors $(($(bytes_of tiny/state.safetensors) - 4)) '\000\000\200\277'
refuses "optimiser: a negative square" "minus/state.safetensors: tensor adam_v[^ ]* holds -1" \
    "$train" --resume minus --steps 5
cp -r tiny inf
for i in 0 1 2 3 4 5 6 7 8 9; do # large numbers somewhere among the first moments
    patch_bytes inf/state.safetensors $((($(bytes_of tiny/state.safetensors) - 4 * parameters - 30000 - 400 * i) / 4 * 4)) \
        '\377\377\177\177'
done
before=$(snapshot inf | grep -v log)
refuses "optimiser: what becomes infinite is not saved" "tensor .* became -?(inf|nan)" "$train" --resume inf \
    --steps 5 --lr 10
check "optimiser: the last good state stays" [ "$(snapshot inf | grep -v log)" = "$before" ]

refuses "model: a patch that no file may have" "option --model: .*128" "$train" --model S/128 --image_size 128 --out no
refuses "model: text after the patch" "option --model: .*2x" "$train" --model S/2x --out no
refuses "model: a patch beyond 32 bits" "option --model: .*4294967298" "$train" --model S/4294967298 --out no

mkfifo fifo
refuses "weights: a FIFO" "fifo: is not a file" timeout 20 "$sample" --weights fifo --out no.png
cp -r tiny piped && rm piped/log.csv && mkfifo piped/log.csv
refuses "log: a FIFO" "piped/log.csv: is not a regular file" timeout 20 "$train" --resume piped --steps 5
long="--n 400 --steps 1000 --iters 100" # of work
for option in out latents trace; do
    refuses "output is checked before the work: $option" "no/such: cannot write" \
        timeout 20 "$sample" $weights $long --out ok.png --$option no/such
done
cp tiny/weights.safetensors w
refuses "output over the weights" "w: is what the program reads" "$sample" --weights w --n 1 --steps 2 --out ./w
check "output over the weights: untouched" same w tiny/weights.safetensors
cp images.safetensors exported
refuses "export over the data" "exported: is what the program reads" "$train" $tiny --steps 2 \
    --data exported --export ./exported
check "export over the data: untouched" same exported images.safetensors
far=$(printf './%.0s' $(seq 2035))run
refuses "path too long" "path is too long" timeout 60 "$train" $tiny --steps 100000000 --sample_every 0 --out "$far"
to_full() { "$@" > /dev/full; }
refuses "standard output is full" "standard output: cannot write" to_full "$sample" --weights w --n 1 --steps 2 \
    --out x.png
refuses "standard output is full: help" "standard output: cannot write" to_full "$train" --help
limited() { (ulimit -f 100; exec "$@"); } # without ignoring the signal
refuses "file size limit" "cannot write" limited "$train" $tiny --width 64 --steps 1 --out limited
runs "a hundred thousand threads" env OMP_NUM_THREADS=100000 "$train" $tiny --steps 1 --out threads
small_stack() { (ulimit -S -s 64; exec "$@"); }
runs "a small stack" small_stack env -u OMP_WAIT_POLICY OMP_NUM_THREADS=2 "$train" $tiny --width 128 --steps 1 \
    --out stack
refuses "control characters are masked" "a\?{5}b\?: cannot open" "$sample" --weights $'a\302\233\342\200\256b\033'

runs "no label: latents" "$sample" --weights w --n 2 --steps 2 --labels 10,3 --out x.png --latents nolabel
runs "no label: can be trained on" "$train" $tiny --steps 1 --data nolabel --out nolabel_run
spins() { env -u OMP_WAIT_POLICY OMP_DISPLAY_ENV=verbose "$1" --help 2>&1 | grep -q "GOMP_SPINCOUNT = '1000'"; }
ldd "$train" | grep -q libgomp && check "waiting threads do not spin for long" spins "$train"

# ---- What a user meets

runs "progress: the first step at once" "$train" $tiny --steps 3 --out progress
check "progress: the first step at once: steps, speed, time left" says "^step 1/3 .* images/s .* 0:00 left"
unit_png() { "$unit" png "$1" | head -n 1; }
runs "pictures: compressed" "$sample" --weights w --n 40 --steps 2 --zoom 8 --out zoom.png
check "pictures: zoom" says "zoom.png"
check "pictures: 8 times enlarged" [ "$(unit_png zoom.png | cut -d' ' -f1,2)" = "662 266" ]
check "pictures: compressed: ten times smaller" [ $((10 * $(bytes_of zoom.png))) -lt $((662 * 266 * 3)) ]
mkdir single
runs "pictures: one each" "$sample" --weights w --n 3 --steps 2 --labels star,heart,10 --zoom 1 --out single/
check "pictures: one each: named" [ "$(cd single && echo *)" = "000000_star.png 000001_heart.png 000002.png" ]
st slash.safetensors "${images/black/..\/\/b}" pixels
runs "pictures: a class with a slash" "$train" $small --data slash.safetensors --steps 1 --out slash
mkdir slashed
runs "pictures: a class with a slash: one each" "$sample" --weights slash/weights.safetensors --n 1 --steps 2 --out slashed/
check "pictures: a class with a slash: in its folder" [ "$(cd slashed && echo *)" = "000000_..--b.png" ]
check "pictures: one each: size" [ "$(unit_png single/000000_star.png | cut -d' ' -f1,2)" = "8 8" ]
runs "pictures as tensors" "$sample" --weights w --n 2 --steps 2 --out x.png --latents x.safetensors
check "pictures as tensors: are there" "$unit" tensors x.safetensors
for program in train sample; do
    runs "help: $program: examples first" "${!program}" --help
    check "help: $program: examples first, then groups" awk '/^  \.\/'$program'_[a-z_]+ --/ && !groups { examples++ }
        /^[A-Z][a-z ,]+:$/ { groups++ } END { exit !(examples >= 2 && groups >= 2) }' out
done
refuses "advice: iters on a DiT" "option --iters: .*DiT" \
    "$sample" --weights dit/weights.safetensors --iters 3 --n 1 --steps 2 --out no.png
refuses "advice: jpg" "option --out: .*\.png" "$sample" --weights w --n 1 --steps 2 --out x.jpg
refuses "advice: no name" "option --out: needs the name" "$sample" --weights w --n 1 --steps 2 --out=
touch plain && ln -s nowhere/x.png dangling
refuses "a file as a folder, before the work" "plain/000000.png: cannot write" \
    "$sample" --weights w --n 1 --steps 1000 --trace early.csv --out plain/
check "a file as a folder, before the work: no trace yet" absent early.csv
refuses "a grid in a folder" "option --show: draws a grid" "$sample" --weights w --n 1 --steps 2 --show 1 --out single/
refuses "a link to nothing" "dangling: is a link that leads to no file" "$sample" --weights w --n 1 --steps 2 \
    --out dangling
refuses "advice: iters and alloc" "option --iters: more than 1000" \
    "$sample" --weights w --n 1 --steps 2 --iters 900 --alloc inc --out no.png
"$sample" --weights w --n 4000 --steps 1000 --trace killed.csv --out x.png > out 2>&1 < /dev/null &
seen=
for _ in $(seq 2400); do ls killed.csv.*.tmp > /dev/null 2>&1 && seen=1 && break || sleep 0.05; done
{ kill $! && wait $!; } 2> /dev/null
check "a killed sampler: leaves nothing half-written" [ "$seen$(echo killed.csv*)" = "1killed.csv*" ]
runs "export: unlabelled" "$train" $tiny --steps 2 --data latents.safetensors --export unlabelled
check "export: unlabelled: no labels in it" [ "$("$unit" tensors unlabelled | grep -c '^y ')" = 0 ]
runs "export: labelled" "$train" $tiny --steps 2 --data images.safetensors --export labelled
check "export: labelled: labels in it" [ "$("$unit" tensors labelled | grep -c '^y ')" = 1 ]
names='{"__metadata__":{"class_names":"[\"5\",\"1\"]"},"y":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},'
names+='"x":{"dtype":"U8","shape":[4,8,8,3],"data_offsets":[32,800]}}'
st numbers.safetensors "$names" pixels
runs "classes named by numbers: train" "$train" $tiny --steps 1 --data numbers.safetensors --out numbers
mkdir counted
runs "classes named by numbers" "$sample" --weights numbers/weights.safetensors --labels 1,0 --n 2 --steps 2 \
    --out counted/
check "classes named by numbers: the name counts first" [ "$(cd counted && echo *)" = "000000_1.png 000001_5.png" ]
refuses "advice: a folder as data" "tools/data.py folder single" "$train" --data single --out no
refuses "advice: patch" "image_size 10 is not a multiple of patch 4.*--patch" "$train" --image_size 10 --out no
comma='{"__metadata__":{"class_names":"[\"big, red\",\"white\"]"},"y":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},'
comma+='"x":{"dtype":"U8","shape":[4,8,8,3],"data_offsets":[32,800]}}'
st comma.safetensors "$comma" pixels
runs "class with a comma: train" "$train" $tiny --steps 1 --data comma.safetensors --out comma
refuses "advice: class with a comma" "option --labels: 'big' .*number" \
    "$sample" --weights comma/weights.safetensors --labels "big, red" --n 1 --steps 2 --out no.png
refuses "two outputs of one name" "b.png: two outputs have this name" \
    "$sample" --weights w --n 1 --steps 2 --out b.png --latents b.png
refuses "pictures too large for memory" "option --n: 1000000 pictures take" \
    "$sample" --weights w --n 1000000 --steps 2 --zoom 64 --out no.png
mkdir others && echo "time,what" > others/log.csv
refuses "another program's log" "others/log.csv: is no log of this program" "$train" $tiny --steps 1 --out others
check "another program's log: is still there" [ "$(cat others/log.csv)" = "time,what" ]
groups='{"__metadata__":{"class_names":"[\"pet-cat\",\"pet-dog\"]"},"y":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},'
groups+='"x":{"dtype":"U8","shape":[4,8,8,3],"data_offsets":[32,800]}}'
st groups.safetensors "$groups" pixels
runs "classes in groups: train" "$train" $tiny --steps 1 --data groups.safetensors --out groups
mkdir grouped
runs "classes in groups" "$sample" --weights groups/weights.safetensors --labels pet,pet-dog --n 5 --steps 2 \
    --out grouped/
check "classes in groups: each of the group in turn" [ "$(cd grouped && echo *)" = \
    "000000_pet-cat.png 000001_pet-dog.png 000002_pet-dog.png 000003_pet-dog.png 000004_pet-cat.png" ]
refuses "classes in groups: unknown" "option --labels: 'pe' .*: pet-cat, pet-dog$" \
    "$sample" --weights groups/weights.safetensors --labels pet,pe --n 1 --steps 2 --out no.png

echo "$passed passed, $failed failed"
[ $failed = 0 ]
