# What the helper VM does: a target, and for each way to its LUN a guest, whose windows are taken by the guest's own words.
ip link set lo up
T=iqn.2026-11.vcp:bench
taskset 2 /bench/iscsi-target serve --listen 0.0.0.0:3260 --target $T --lun mem:64M >/tmp/target 2>&1 &
for i in $(seq 300); do grep -q '^ready:' /tmp/target && break; sleep 0.1; done
grep -q '^ready:' /tmp/target || { cat /tmp/target; exit 1; }
# Hundredths of a second that all processes of these names have used.
used() { cat /proc/[0-9]*/stat 2>/dev/null | awk -v a="($1)" -v b="($2)" '$2 == a || $2 == b {s += $14 + $15} END {print s + 0}'; }
mark() { echo "$(cut -d' ' -f1 /proc/uptime) $(used vcp vcp) $(used vcp-iscsi vcp-net) $(used iscsi-target iscsi-target)"; }
# guest WAY OPTIONS
guest() {
    way=$1
    shift
    : >/tmp/results
    /bench/vcp run --log info --vcpu-cpus 0 --kernel /bench/vmlinuz --initrd /bench/initrd --memory 512M --cpus 1 \
        --cmdline "console=ttyS0 quiet vcp.$way" "$@" </dev/null 2>/tmp/errors | tr -d '\r' | tee /tmp/console |
        while read -r line; do
            case "$line" in
            *@BEGIN=*) begin=$(mark) ;;
            *@END=*) end=$(mark) ;;
            *@RESULT=*) echo "${line#*@RESULT=} $begin $end" >>/tmp/results ;;
            esac
        done
    again_if_kvm_failed 0 /tmp/console /tmp/errors
    [ $(wc -l </tmp/results) = 2 ] || { cat /tmp/console /tmp/errors; exit 1; }
    awk -v way=$way '{printf "WINDOW %s|%s|%.2f|%d|%d|%d\n", way, $1, $6 - $2, $7 - $3, $8 - $4, $9 - $5}' /tmp/results
}
by_vcp() { guest vcp --disk url=iscsi://127.0.0.1:3260/$T/0,cpu=2; }
inside() {
    # The network of the guest is there once its vcp-net has made it.
    (
        until ip link set tap0 up 2>/dev/null; do sleep 0.2; done
        ip addr add 10.77.0.1/24 dev tap0
    ) &
    guest inside --net tap=tap0,cpu=2
}
