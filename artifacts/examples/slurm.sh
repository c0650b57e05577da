#!/bin/bash
#SBATCH --job-name=moefication
#SBATCH --array=0-3
#SBATCH --time=02:00:00
# Each task of the array takes a quarter of the layers of one stage; the last one to finish commits it. A task that is killed
# or runs out of time is simply submitted again: finished layers are kept.
#
#     sbatch --export=RUN=artifacts/big,LAYERS=32,STAGE="split" artifacts/examples/slurm.sh
set -euo pipefail
: "${RUN:?name the run directory}" "${LAYERS:?how many FFN layers the model has, see moefication inspect}"
STAGE=${STAGE:-split}
MOEFICATION=${MOEFICATION:-moefication}
TASKS=${SLURM_ARRAY_TASK_COUNT:-4}
EACH=$(( (LAYERS + TASKS - 1) / TASKS ))
FIRST=$(( SLURM_ARRAY_TASK_ID * EACH ))
LAST=$(( FIRST + EACH - 1 < LAYERS - 1 ? FIRST + EACH - 1 : LAYERS - 1 ))
if [ "$FIRST" -gt "$LAST" ]; then exit 0; fi
$MOEFICATION $STAGE "$RUN" --layers "$FIRST-$LAST"
