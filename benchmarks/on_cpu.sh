#!/usr/bin/env bash
# The small model of the package, from an archive of UTKFace: SimCLR and nine fine-tunings, each
# from the weights of the one before. Fourteen hours on two CPU cores.
#
#     benchmarks/on_cpu.sh RUNS utkface-0*.tar
#
# Stopped, the same command goes on: a training resumes from its checkpoint, a finished one is left
# as it is. RUNS/released is what lies in coatnet_jax/released_small; its card tells of the photos
# of All-Age-Faces too, where those were prepared under the name `wild` as the README says.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
runs=$1
shift

finetune() { # NAME INIT_FROM FLAGS…
    coatnet-jax finetune --config=finetune:micro,cpu --workdir="$runs/$1" \
        --config.init_from="$2" --config.data.cache=host "${@:3}"
}

rounded() { # NAME: handed on as `release` rounds it, to bfloat16
    [ -e "$runs/$1_released/MODEL_CARD.md" ] ||
        coatnet-jax release "$runs/$1" --out="$runs/$1_released"
}

views() { # SIZE STORED SIZES: of the model, of the pictures they are cut from, of the views in turn
    echo "--config.model.image_size=$1 --config.data.image_size=$2 --config.progressive=$3"
}

# What the config asked of micro when B and C were trained; it is as `lighter` since.
stronger="--config.model.drop_path=0.1 --config.mixup=0.1 --config.augment.erase_prob=0.25
    --config.augment.jitter=0.3"
longer="--config.batch_size=64 --config.optim.lr=1.2e-3 --config.data.label_noise=widen
    --config.monitor.every_epochs=2"
lighter="$longer --config.optim.layer_decay=1 --config.model.drop_path=0.0 --config.mixup=0.0
    --config.augment.erase_prob=0.1 --config.augment.jitter=0.2"

[ -e "$runs/prepared" ] || coatnet-jax prepare "$@"
mkdir -p "$runs" && touch "$runs/prepared"
coatnet-jax pretrain --config=pretrain:micro,cpu --workdir="$runs/pretrain"
finetune b "$runs/pretrain" $(views 96 120 48,64,96) $stronger --config.epochs=24
rounded b
finetune c "$runs/b_released" $(views 112 136 80,96,112) $stronger $longer --config.epochs=48 \
    --config.optim.layer_decay=0.95
finetune e "$runs/c" $(views 112 136 96,112) $lighter --config.epochs=40
finetune f "$runs/e" $(views 128 152 112,128) $lighter --config.epochs=25 \
    --config.optim.lr=1e-3 --config.monitor.every_epochs=2.5
# Nothing is left to choose: four fifths of the validation split are trained on too.
finetune k "$runs/f" $(views 160 192 144,160) $lighter --config.epochs=14 \
    --config.optim.lr=1e-3 --config.data.splits=82_3_15
rounded k
# Photos of other cameras are sharper or less sharp than UTKFace's.
sharpness="$lighter --config.model.image_size=128 --config.data.image_size=152
    --config.optim.lr=8e-4 --config.optim.warmup_epochs=0.25 --config.augment.blur_prob=0.3
    --config.augment.sharpen_prob=0.3 --config.monitor.every_epochs=1 --config.data.splits=82_3_15"
finetune l "$runs/k_released" $sharpness --config.epochs=4
finetune m "$runs/l" $sharpness --config.epochs=6
finetune n "$runs/m" $sharpness --config.epochs=10
rounded n
# The other packaged model sees every view too, and its answer is seven tenths of the label.
finetune w "$runs/n_released" $sharpness --config.epochs=5 --config.init_head=True \
    --config.distill.teachers=coatnet_jax/released --config.distill.weight=0.7
coatnet-jax evaluate "$runs/w"
coatnet-jax evaluate "$runs/w" --on wild --split all || echo "left out of the card"
coatnet-jax release "$runs/w" --out="$runs/released"
