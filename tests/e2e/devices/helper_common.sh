# What the helper VM's jobs of these tests begin with.
value() { name=$1; shift; echo "@$name=$*"; }
ctl() { vcp ctl -S /tmp/api "$@" 2>&1; }
fail() { echo "FAILED: $*"; cat /tmp/guest*.log /tmp/vcp*.log; again_if_kvm_failed 1 /tmp/guest.log /tmp/vcp.log; exit 1; }
# Waits for a line of a file while the monitor runs.
await() {
    left=1500
    until grep -qs "$1" $2; do
        left=$((left - 1))
        { [ $left -gt 0 ] && kill -0 $monitor 2>/dev/null; } || fail "no $1 in $2"
        sleep 0.1
    done
}
