# What every worker of a TPU VM does when it starts, at every start: fetches the commit, installs it, runs the job once a turn,
# and tells the bucket how it ended (tpu_workers.py). tpu_requests.py sets above: bundle, logs, turns, supervised,
# project, secrets, environment, command.
set -uo pipefail
export HOME="${HOME:-/root}" # a startup script has none
cd "$HOME"
rm -f flowlm.pid
worker=$(curl -sf -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0)
log="$HOME/flowlm.log"
[ -n "$supervised" ] || rm -f "$log" flowlm.first # of another run on this machine
touch "$log"
# Parts of a machine's log come after those of the machine before it, and stay the same when it is restarted.
first=$(cat flowlm.first 2>/dev/null || date -u +%Y%m%dT%H%M%S | tee flowlm.first)
part=0 size=65536 sent=-1

# A bucket has no appending: the log is sent in parts, and only the last, which is not full, is sent again.
send() {
    [ "$(stat -c %s "$log")" != "$sent" ] || return 0
    while
        tail -c "+$((part * size + 1))" "$log" | head -c "$size" >flowlm.part
        gcloud storage cp --quiet flowlm.part "$logs/$worker/$first-$(printf %06d "$part").log" >/dev/null 2>&1 || return 0
        sent=$((part * size + $(stat -c %s flowlm.part)))
        [ "$sent" = $(((part + 1) * size)) ]
    do part=$((part + 1)); done
}

# What fails for a moment, as mirrors and networks do, is done again.
retry() {
    local pause code
    for pause in 10 30 60 120 300 0; do
        "$@" # not in a condition, where `set -e` means nothing
        code=$?
        [ "$code" != 0 ] || break
        echo "== $* failed with $code" >>"$log"
        sleep "$pause"
    done
    return "$code"
}

install() (
    set -e
    cd "$HOME"
    apt-get -qq -o DPkg::Lock::Timeout=600 update
    apt-get -qq -o DPkg::Lock::Timeout=600 install -y git python3.11-venv
    gcloud storage cp --quiet "$bundle" flowlm.bundle
    [ -d flowlm ] || git clone --quiet flowlm.bundle flowlm
    cd flowlm
    git fetch --quiet ../flowlm.bundle HEAD
    git checkout --quiet --detach FETCH_HEAD
    LOCKED=1 PYTHON=python3.11 bash launch/setup.sh tpu,gcp # another turn goes on with the same versions
)

# The newest version of each secret becomes a variable, and is written nowhere.
fetch() {
    local name value
    for name in "${secrets[@]}"; do
        value=$(gcloud secrets versions access latest --secret="$name" --project="$project") || return
        export "$name=$value"
    done
}

run() {
    echo "== worker $worker of $(hostname), turn $turn, $(date -u +%FT%TZ)"
    retry install
    local code=$?
    [ "$code" = 0 ] && { retry fetch; code=$?; }
    [ "$code" = 0 ] || return "$code"
    cd flowlm
    echo "$BASHPID" >../flowlm.pid # which the line below keeps: where to send a signal
    exec env "${environment[@]}" .venv/bin/python "${command[@]}"
}

asked() { gcloud storage cat "$turns" 2>/dev/null; }
report() { echo "$turn $status" | gcloud storage cp --quiet - "$logs/$worker.exit"; }

# Told to stop with its machine, this script stays until the command has saved. It begins again with the machine, in the same turn.
leaving=
trap 'leaving=yes' TERM
until turn=$(asked); do sleep 20; done
while [ -z "$leaving" ]; do
    mine=$turn
    run >>"$log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 20
        send
        [ -n "$supervised" ] && now=$(asked) && turn=$now
        [ "$turn" != "$mine" ] || continue
        # In another turn the others have ended, and nothing can be saved without them. An installation goes on, for that turn.
        if [ -e flowlm.pid ]; then kill -KILL "$(cat flowlm.pid)" 2>/dev/null; else mine=$turn; fi
    done
    wait "$child"
    status=$?
    rm -f flowlm.pid
    send
    [ "$turn" = "$mine" ] && [ -z "$leaving" ] && retry report
    [ -n "$supervised" ] || break
    while [ "$turn" = "$mine" ] && [ -z "$leaving" ]; do
        sleep 20
        now=$(asked) && turn=$now
    done
done
