#!/bin/sh
# All stages of a conversion, their layers and data shared by the processes of one machine: one writer per layer, the same
# bytes as one process. Evaluation and writing the model are done by the first process. A run that is killed goes on when
# it is started again.
#
#     RUN=artifacts/big MODEL=... DATA=calibration.txt PROCESSES=8 artifacts/examples/torchrun.sh --fraction 0.2
#
# On several machines that share the run directory: --nnodes and --rdzv-endpoint in LAUNCH, the same command on each.
set -eu
: "${RUN:?name the run directory}" "${MODEL:?name the model}" "${DATA:?name the calibration data}"
LAUNCH=${LAUNCH:-torchrun --standalone}
exec $LAUNCH --nproc-per-node "${PROCESSES:-2}" -m moefication_cli run "$RUN" --model "$MODEL" --data "$DATA" "$@"
