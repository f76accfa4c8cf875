# What the Debian guest does: computes alone, then beside two loads of its disk. Tells when a window begins and ends.
if grep -q vcp.inside /proc/cmdline; then
    ip addr add 10.77.0.2/24 dev eth0
    ip link set eth0 up
    left=100
    until ping -c 1 -W 1 10.77.0.1 >/dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || { ip addr; dmesg | tail -n 20; exit 1; }
    done
    iscsistart -i iqn.2026-11.vcp:guest -t iqn.2026-11.vcp:bench -g 1 -a 10.77.0.1 -p 3260 || exit 1
    disk=sda
else
    disk=vda
fi
left=300
until [ -b /dev/$disk ]; do
    left=$((left - 1))
    [ $left -gt 0 ] || { dmesg | tail -n 20; exit 1; }
    sleep 0.1
done
echo none >/sys/block/$disk/queue/scheduler
# Rounds of work per second, for so many seconds.
compute() {
    awk -v secs=$1 '
        function now() { getline line <"/proc/uptime"; close("/proc/uptime"); split(line, part, " "); return part[1] }
        BEGIN {
            start = now()
            do { for (i = 0; i < 2000; i++) x = (x * 1103515245 + 12345) % 2147483648; n++; at = now() } while (at < start + secs)
            printf "%.2f", n / (at - start)
        }'
}
reads() { awk '{print $1}' /sys/block/$disk/stat; }
now() { cut -d' ' -f1 /proc/uptime; }
compute 2 >/dev/null
alone=$(compute SECONDS)
# beside KIND OPTIONS: the window lies within the load, for fio takes its time to start in here.
beside() {
    kind=$1
    shift
    fio --name=load --filename=/dev/$disk --direct=1 --ioengine=libaio --rw=randread --bs=4k --norandommap --size=32M \
        --time_based --runtime=1000 --minimal "$@" >/tmp/fio 2>&1 &
    pid=$!
    base=$(reads)
    until [ $(reads) -gt $((base + 50)) ]; do
        kill -0 $pid 2>/dev/null || { cat /tmp/fio; exit 1; }
        sleep 0.2
    done
    echo "@BEGIN=$kind"
    before=$(reads); start=$(now)
    work=$(compute SECONDS)
    after=$(reads); end=$(now)
    echo "@END=$kind"
    kill -INT $pid
    wait $pid
    # The first percentiles are those of reads.
    p99=$(grep -o '99\.000000%=[0-9]*' /tmp/fio | head -n 1 | cut -d= -f2)
    iops=$(awk -v n=$((after - before)) -v s=$start -v e=$end 'BEGIN{printf "%.1f", n / (e - s)}')
    echo "@RESULT=$kind|$alone|$work|$iops|$p99"
}
beside fast --iodepth=32
beside paced --iodepth=4 --rate_iops=100
