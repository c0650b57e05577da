#!/bin/bash
#SBATCH --job-name=moefication
#SBATCH --array=0-3
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# Each task of the array takes a quarter of the layers of one stage; the last one to finish commits it. Two minutes before
# its time is up a task is told to stop: it finishes its layer, exits with 75 and is queued again, and finished layers are
# kept. A task that is killed is simply submitted again.
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

$MOEFICATION $STAGE "$RUN" --layers "$FIRST-$LAST" &
CHILD=$!
trap 'kill -USR1 "$CHILD"' USR1  # the queue signals this script, not what it started
CODE=0
wait "$CHILD" || CODE=$?
while kill -0 "$CHILD" 2>/dev/null; do  # a signal ends `wait`, not the child
    CODE=0
    wait "$CHILD" || CODE=$?
done
if [ "$CODE" -eq 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:?}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$CODE"
