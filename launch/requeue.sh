# For the files of Slurm: runs a command by srun, and queues the job again where a restart mends it.
#
# A restart mends 3 (a full disk), 7 (no step ended), what is above 128 (a process was killed, jax
# ended it because another one was, or srun failed), and a stop that saved a step: at the end of the
# job's time, or by a SIGTERM to the tasks alone. It mends no mistake in the command.

TRIES=${TRIES:-5}  # starts that may end at the same step
export SLURM_EXIT_ERROR=200  # of srun itself, as where the controller is away
# Since Slurm 22.05 srun does not read what sbatch was asked for.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# SLURM_JOB_ID of the last task of an array is that of the whole array.
task=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
task=${task:-$SLURM_JOB_ID}

ask() {  # COMMAND...: of Slurm, whose controller may be away for some minutes
  local try
  for try in {1..30}; do "$@" && return; sleep 10; done
}

run() {  # LOG srun...: returns if the command ends with 0 and is done, else ends the script
  local log=$1 signals=0 seen=-1 end="" code step steps how tries before
  shift
  before=$(stat -c %s "$log")
  "$@" &
  local child=$!
  # Not to srun, which would kill the tasks.
  trap 'signals=$((signals + 1)) end=time; ask scancel --signal=TERM "$task"' USR1
  trap 'signals=$((signals + 1)) end=slurm' TERM  # scancel, scontrol requeue: Slurm tells the tasks
  while [ "$signals" != "$seen" ]; do  # a signal ends `wait` before the command has ended
    seen=$signals
    wait "$child"
    code=$?
  done
  trap - USR1 TERM
  if [ "$code$end" = 0 ]; then
    tail -c "+$((before + 1))" "$log" |
      grep -aqE "saved step [0-9]+; the same command resumes" || return 0
    end=preemption
  fi
  steps=$(grep -aoE '^step +[0-9]+/' "$log" | tr -dc '0-9\n' | sort -n | tail -1)
  step=${steps:-0}
  how="code $code${end:+ by $end} at step $step"
  echo "launch: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID ended with $how"
  [ "$end" != slurm ] || exit "$code"
  if [ -z "$end" ] && [ "$code" != 3 ] && [ "$code" != 7 ] && [ "$code" -le 128 ]; then
    echo "launch: not queued again, since the same command would end in the same way"
    exit "$code"
  fi
  how="launch: start [0-9]+ of job $SLURM_JOB_ID ended with code [0-9]+( by time)? at step $step"
  tries=$(grep -acE "^$how$" "$log")
  if [ "${tries:-$TRIES}" -ge "$TRIES" ]; then
    echo "launch: not queued again, since $tries starts have ended at step $step"
    exit "$code"
  fi
  ask scontrol requeue "$task"
  exit "$code"
}
