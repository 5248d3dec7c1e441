# For the files of Slurm: runs a command by srun, and queues the job again where a restart mends it.
#
# A restart mends 3 (a full disk), 7 (no step ended), what is above 128 (a process was killed, or jax
# ended it because another one was), and the end of the job's time. It mends no mistake in the command.

# Since Slurm 22.05 srun does not read what sbatch was asked for.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
TRIES=${TRIES:-5}  # starts in a row that may end without a step that no start before them took

furthest_step() {  # LOG: the last step of it
  local steps
  steps=$(grep -aoE '^step +[0-9]+/' "$1" | tr -dc '0-9\n' | sort -n | tail -1)
  echo "${steps:-0}"
}

run() {  # LOG srun...: returns if the command ends with 0 of its own accord, else ends the script
  local log=$1 signals=0 seen=-1 end="" code step how tries
  shift
  "$@" &
  local child=$!
  # Not to srun, which would kill the tasks.
  trap 'signals=$((signals + 1)) end=time; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  trap 'signals=$((signals + 1)) end=slurm' TERM  # scancel, scontrol requeue: Slurm tells the tasks
  while [ "$signals" != "$seen" ]; do  # a signal ends `wait` before the command has ended
    seen=$signals
    wait "$child"
    code=$?
  done
  trap - USR1 TERM
  [ "$code$end" != 0 ] || return 0
  step=$(furthest_step "$log")
  how="code $code${end:+ by $end} at step $step"
  echo "launch: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID ended with $how"
  [ "$end" != slurm ] || exit "$code"
  if [ -z "$end" ] && [ "$code" != 3 ] && [ "$code" != 7 ] && [ "$code" -le 128 ]; then
    echo "launch: not queued again, since the same command would end in the same way"
    exit "$code"
  fi
  tries=$(grep -acE "^launch: start [0-9]+ of job $SLURM_JOB_ID .* at step $step$" "$log")
  if [ "$tries" -ge "$TRIES" ]; then
    echo "launch: not queued again, since $tries starts have ended at step $step"
    exit "$code"
  fi
  scontrol requeue "$SLURM_JOB_ID"
  exit "$code"
}
