#!/usr/bin/env bash
# Everything that only a GPU can tell, in pieces that fit a borrowed one: precision, speed against
# timm, then SimCLR, fine-tuning and evaluation of one model on UTKFace in bfloat16.
#
#     benchmarks/on_gpu.sh OUT utkface-0*.tar                      # once, or again until it says done
#     MODEL=coatnet_1 SIZE=160 MINUTES=25 benchmarks/on_gpu.sh OUT utkface.zip
#
# The same command goes on where the last one ended: finished steps are skipped, a training resumes
# from its checkpoint. Stops by itself after MINUTES (default 9) with status 3. OUT/NAME.log is what
# step NAME printed. Needs `pip install '.[cuda13,parity]'`, or cuda12.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
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

train() { # STAGE FLAGS…: for as many minutes as are left
    local stage=$1 left=$(((end - SECONDS) / 60))
    shift
    once "$stage" coatnet-jax "$stage" --config="$stage:$model,bf16" --workdir="$out/$stage" \
        --config.max_minutes="$((left > 1 ? left : 1))" --config.model.image_size="$size" \
        --config.data.image_size="$stored" --config.data.cache=device "$@"
}

once precision python benchmarks/precision.py --models "$model"
once speed python benchmarks/model_speed.py --models "$model" --batch 256 --dtype bfloat16
once speed_256 python benchmarks/model_speed.py --models "$model" --batch 256 --dtype bfloat16 \
    --image-size 256 --cudnn
once prepare coatnet-jax prepare "${pictures[@]}"
train pretrain ${PRETRAIN_FLAGS:-}
once embed coatnet-jax embed "$out/pretrain" --no-faces
train finetune --config.init_from="$out/pretrain" ${FINETUNE_FLAGS:-}
once evaluate coatnet-jax evaluate "$out/finetune" --no-faces
echo "done: $out"
