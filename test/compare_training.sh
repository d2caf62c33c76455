#!/bin/bash
# Trains the same model on the same data with ./train_cpu and with PyTorch (tools/reference.py), which makes the same random
# draws, and prints the largest relative difference of the losses; more than 1e-4 is a failure.
#
#   test/compare_training.sh DATA.safetensors [STEPS [OPTION...]]       needs torch; about 2 minutes for 300 steps

cd "$(dirname "$0")/.." && make -s train_cpu || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
settings="--data $(realpath "${1:?name a dataset file}") --steps ${2:-300} --width 128 --heads 4 --depth 8 --patch 4 --fixed_point 1
    --pre_depth 1 --post_depth 1 --timestep_in_pre_post 0 --skip 1 --prediction eps --learn_sigma 1 --zero_terminal_snr 0 --v_weight 1
    --no_grad_iters 0,3 --grad_iters 1,4 --batch 32 --lr 5e-4 --warmup 20 --weight_decay 0 --grad_clip 1 --ema 0.999
    --ema_warmup 1 --label_drop 0.1 --hflip 1 --seed 7 --lr_schedule cosine --t_sampling logit_normal --t_mean -0.3 --t_std 1.2
    --optimizer adamw ${*:3}"
./train_cpu $settings --sample_every 0 --out "$work/c" > "$work/said" || exit 1
${PYTHON:-python3} tools/reference.py train $settings --dtype float32 --out "$work/torch" > "$work/said" || exit 1
paste -d, <(tail -n +2 "$work/c/log.csv" | cut -d, -f1,2) <(tail -n +2 "$work/torch/log.csv" | cut -d, -f2) | awk -F, '
    { d = ($2 - $3) / $3; if (d < 0) d = -d; if (d > worst) worst = d }
    NR == 1 || NR % 50 == 0 { print "step " $1 ": C " $2 "  PyTorch " $3 }
    END { printf "%d steps, largest relative difference of the losses %.1e\n", NR, worst
        exit !NR || !(worst < 1e-4) }'
