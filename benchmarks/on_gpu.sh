#!/usr/bin/env bash
# Everything that only a GPU can tell, in pieces that fit a borrowed one: speed against timm; SimCLR,
# fine-tuning and evaluation of one model on UTKFace in bfloat16, as run V of docs/results.md, which
# is the model of the package; what it can teach the small one there; cuDNN's attention; precision.
#
#     benchmarks/on_gpu.sh OUT utkface-0*.tar                   # once, or again until it says done
#     MODEL=micro MINUTES=25 FINETUNE_FLAGS=--config.epochs=100 benchmarks/on_gpu.sh OUT utkface.zip
#     SPLITS=21_60_val PREPARE_FLAGS=--splits=21_60=$PWD/t.csv benchmarks/on_gpu.sh OUT utkface.zip
#
# The same command goes on where the last one ended: finished steps are skipped, a training resumes
# from its checkpoint. Stops by itself after MINUTES (default 9) with status 3. OUT/NAME.log is what
# step NAME printed. The epochs are meant for a card that is lent for a quarter of an hour: coatnet_0's
# `pretrain` and `finetune` took eleven minutes of an H200 with 16 CPU cores.
# Needs `pip install '.[cuda13,parity]'`, or cuda12.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2; }
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

train() { # NAME STAGE:MODEL PIXELS FLAGS…: for as many minutes as are left
    local name=$1 stage=${2%%:*} config=$2,bf16 pixels=$3 left=$(((end - SECONDS) / 60))
    shift 3
    once "$name" coatnet-jax "$stage" --config="$config" --workdir="$out/$name" \
        --config.max_minutes="$((left > 1 ? left : 1))" --config.model.image_size="$pixels" \
        --config.data.image_size="$stored" --config.data.cache=device \
        --config.data.splits="${SPLITS:-82_3_15}" --config.log_every=50 "$@"
}

# Alone on the card and compiled at once, which is most of the time. timm has no micro and no atto.
timed=$(case $model in micro | atto) echo coatnet_0 ;; *) echo "$model" ;; esac)
once speed python benchmarks/model_speed.py --models "$timed" --batch 64 --dtype bfloat16 \
    --rounds 30 --at-once
once prepare coatnet-jax prepare "${pictures[@]}" ${PREPARE_FLAGS:-}
train pretrain "pretrain:$model" $((size / 2)) --config.batch_size=256 \
    --config.loss.temperature=0.1 --config.monitor.every_epochs=10 \
    ${PRETRAIN_FLAGS:---config.epochs=30 --config.optim.warmup_epochs=3}
views="--config.augment.blur_prob=0.3 --config.augment.sharpen_prob=0.3"
views+=" --config.data.label_noise=widen --config.optim.layer_decay=1"
train finetune "finetune:$model" "$size" --config.init_from="$out/pretrain" $views \
    --config.monitor.every_epochs=12.5 ${FINETUNE_FLAGS:-}
once evaluate coatnet-jax evaluate "$out/finetune" --no-faces
# The small packaged model goes on with it as a teacher, if both see views of one size and have not
# been trained on each other's test faces.
if [ "$size" = 128 ] && [ "${SPLITS:-82_3_15}" = 82_3_15 ]; then
    train taught finetune:micro 128 --config.init_from=coatnet_jax/released_small \
        --config.init_head=True $views --config.optim.lr=6e-4 --config.optim.warmup_epochs=1 \
        --config.monitor.every_epochs=3.75 --config.distill.weight=0.7 \
        --config.distill.teachers="$out/finetune,coatnet_jax/released_small" \
        ${TAUGHT_FLAGS:---config.epochs=30}
    once evaluate_taught coatnet-jax evaluate "$out/taught" --no-faces
fi
# What can wait for another day.
once release coatnet-jax release "$out/finetune" --out="$out/released" --max-mb=12
once speed_256 python benchmarks/model_speed.py --models "$timed" --batch 64 --dtype bfloat16 \
    --image-size 256 --cudnn --rounds 30 --at-once
once precision python benchmarks/precision.py --models "$timed"
once embed coatnet-jax embed "$out/pretrain" --no-faces
echo "done: $out"
