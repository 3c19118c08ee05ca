#!/usr/bin/env bash
# Everything that only a GPU can tell, in pieces that fit a borrowed one: speed against timm; SimCLR,
# fine-tuning and evaluation of one model on UTKFace in bfloat16; cuDNN's attention and precision.
#
#     benchmarks/on_gpu.sh OUT utkface-0*.tar                   # once, or again until it says done
#     MODEL=micro MINUTES=25 FINETUNE_FLAGS=--config.epochs=100 benchmarks/on_gpu.sh OUT utkface.zip
#     SPLITS=21_60_val PREPARE_FLAGS=--splits=21_60=$PWD/t.csv benchmarks/on_gpu.sh OUT utkface.zip
#
# The same command goes on where the last one ended: finished steps are skipped, a training resumes
# from its checkpoint. Stops by itself after MINUTES (default 9) with status 3. OUT/NAME.log is what
# step NAME printed. The epochs are meant for a card that is lent for a quarter of an hour.
# Needs `pip install '.[cuda13,parity]'`, or cuda12.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
mapfile -t pictures < <(realpath "${@:2}")
cd "$(dirname "$0")/.."
model=${MODEL:-coatnet_0} size=${SIZE:-128} end=$((SECONDS + 60 * ${MINUTES:-9}))
stored=$((size * 5 / 4)) # pixels that the views are cropped from
export COATNET_JAX_HOME=${COATNET_JAX_HOME:-$out/home}
mkdir -p "$out"

once() { # NAME COMMAND…: runs it and keeps its log, unless that was done before
    local name=$1 status=0
    shift
    [ -e "$out/$name.done" ] && return
    [ $SECONDS -lt $end ] || { echo "time is up before $name: run the same command again"; exit 3; }
    echo "== $name: $*"
    "$@" 2>&1 | tee -a "$out/$name.log" || status=$?
    [ $status -eq 0 ] || exit $status
    touch "$out/$name.done"
}

train() { # STAGE PIXELS FLAGS…: for as many minutes as are left
    local stage=$1 pixels=$2 left=$(((end - SECONDS) / 60))
    shift 2
    once "$stage" coatnet-jax "$stage" --config="$stage:$model,bf16" --workdir="$out/$stage" \
        --config.max_minutes="$((left > 1 ? left : 1))" --config.model.image_size="$pixels" \
        --config.data.image_size="$stored" --config.data.cache=device \
        --config.data.splits="${SPLITS:-82_3_15}" --config.monitor.every_epochs=10 "$@"
}

# Alone on the card and compiled at once, which is most of the time. timm has no micro and no atto.
timed=$(case $model in micro | atto) echo coatnet_0 ;; *) echo "$model" ;; esac)
once speed python benchmarks/model_speed.py --models "$timed" --batch 64 --dtype bfloat16 \
    --rounds 30 --at-once
once prepare coatnet-jax prepare "${pictures[@]}" ${PREPARE_FLAGS:-}
train pretrain $((size * 3 / 4)) ${PRETRAIN_FLAGS:---config.epochs=40}
train finetune "$size" --config.init_from="$out/pretrain" --config.optim.layer_decay=1 \
    --config.augment.blur_prob=0.3 --config.augment.sharpen_prob=0.3 \
    --config.data.label_noise=widen ${FINETUNE_FLAGS:---config.epochs=60}
once evaluate coatnet-jax evaluate "$out/finetune" --no-faces
# What can wait for another day.
once speed_256 python benchmarks/model_speed.py --models "$timed" --batch 64 --dtype bfloat16 \
    --image-size 256 --cudnn --rounds 30 --at-once
once precision python benchmarks/precision.py --models "$timed"
once embed coatnet-jax embed "$out/pretrain" --no-faces
echo "done: $out"
