# Common part of train.sbatch and sweep.sbatch, which source it. The batch shell gets a signal before the job's limit, and
# forwards it to the ranks, which end their update and save; then it requeues the job, which resumes in the same run folder.
#
#   LAUNCHER=srun      one Slurm task per rank (default)
#   LAUNCHER=torchrun  one task per node, which starts SLURM_GPUS_ON_NODE or PROCESSES ranks
#   MAX_REQUEUES=100   number of times that the job is requeued
set -uo pipefail

if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi # else PATH as it was when the job was submitted

# Node names need not resolve: addresses come from Slurm. The rendezvous is on the first node.
address_of() { scontrol --oneliner show node "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2; }
MASTER_ADDR=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # below the kernel's ephemeral ports
export MASTER_ADDR MASTER_PORT
# The ranks choose gloo's interface: the one that reaches MASTER_ADDR. NCCL chooses the fastest one; to set another one:
# export NCCL_SOCKET_IFNAME=ib0 (and GLOO_SOCKET_IFNAME) before sbatch.
# Signs what ranks write to the rendezvous store, which other users of the hosts may reach.
export MOE_TRAIN_SECRET=${MOE_TRAIN_SECRET:-$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since Slurm 22.05 srun does not read it from the job

# The number of an array alone means all of its elements, and is also the own number of one of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}

asked=
stop() {
    asked=yes
    echo "stop signal at $(date +%T): the ranks save"
    local try
    for try in 1 2 3; do
        timeout 15 scancel --signal=TERM "$job" && return # to every task; after a TERM to itself srun would kill them
        echo "Slurm did not signal the ranks (try $try of 3)"
        sleep 1
    done
}
trap stop USR1 TERM

# Runs moe-train on all ranks; wait returns early when a signal arrives. All ranks end together, after rank 0 has scored the
# run: a rank that remains 20 seconds after the first end hangs, alone on its host.
on_all_ranks() {
    local step code
    if [[ ${LAUNCHER:-srun} == torchrun ]]; then
        srun --wait=20 --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" bash -c '
            address=$(scontrol --oneliner show node "$SLURMD_NODENAME" | grep -o "NodeAddr=[^ ]*" | cut -d= -f2)
            exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" \
                --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
                --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="$address" -m moe_train.commands.train "$@"' torchrun "$@" &
    else
        srun --wait=20 python -m moe_train.commands.train "$@" &
    fi
    step=$!
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        code=$?
    done
    return "$code"
}

# A job that Slurm itself ends (cancelled, or preempted without a grace time) is not requeued. A busy controller is called
# again; if it does not answer, the job is assumed to run, since this shell does.
requeue() {
    local try state
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
        echo "not requeued: was requeued ${SLURM_RESTART_COUNT} times (MAX_REQUEUES)"
        return
    fi
    trap '' USR1 TERM # the ranks have ended
    for try in {1..6}; do
        state=$(timeout 10 scontrol --oneliner show job "$job" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2)
        if [[ ${state:-RUNNING} != RUNNING ]]; then
            echo "not requeued: the job is $state"
            return
        fi
        [[ -n $state ]] || echo "Slurm does not say whether the job still runs: assumed to be running"
        echo "requeueing the job"
        timeout 10 scontrol requeue "$job" && return
        echo "Slurm did not requeue it (try $try of 6)"
        sleep 2
    done
    echo "saved, but not requeued: submit it again with the same run folder"
}

# Trains in a folder and ends the script. Exit code 75: interrupted, checkpoint saved.
train_in() {
    local folder=$1 code
    shift
    on_all_ranks "$@" hydra.run.dir="$folder"
    code=$?
    if ((code != 0)) && [[ -n $asked || $code -eq 75 ]]; then
        requeue
        exit 75
    fi
    exit "$code"
}
