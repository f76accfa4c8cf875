# What the Debian guest does while network devices come and go.
# Sets up the interface that has come, and fetches a word through it from the host.
use_net() {
    until_true '[ -e /sys/class/net/eth0 ]'
    ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0
    fetch
}
fetch() { until_true '[ "$(wget -q -O - http://10.0.2.2:8080/word 2>/dev/null)" = behind ]'; }
booted=$(dmesg | wc -l)
value STAGE start

use_net
value QUEUES $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)
# Longer than a VCP may stand still with work to do: one that waits for frames has none.
sleep 15
fetch
value STAGE added

until_true '[ ! -e /sys/class/net/eth0 ]'
value STAGE removed

use_net
value MULTI_QUEUES $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)
value MULTI_VECTORS $(grep -c 'PCI-MSI.*virtio.*-input\.' /proc/interrupts)
# A big file, with a connection on either CPU.
for cpu in 1 2; do taskset $cpu wget -q -O - http://10.0.2.2:8080/big | sha256sum >/tmp/sum$cpu & done
wait
value SUMS $(cat /tmp/sum1 /tmp/sum2 | cut -c1-64 | sort -u)
value STAGE several

until_true '[ ! -e /sys/class/net/eth0 ]'
value STAGE none

use_net
value MAC $(cat /sys/class/net/eth0/address)
# VIRTIO_F_RING_PACKED is bit 34.
value PACKED $(cut -c35 /sys/class/net/eth0/device/features)
value STAGE switched
# A request that the killed one had taken, and not yet answered, is waited for in silence: nobody asks after it, so nobody is
# told that it is lost. One that takes that long is made again.
until_true '[ "$(timeout 10 wget -q -O - http://10.0.2.2:8080/again 2>/dev/null)" = again ]'
dmesg | tail -n +$((booted + 1)) >/tmp/said
grep -iE 'BUG:|call trace|NETDEV WATCHDOG' /tmp/said
value ERRORS $(grep -ciE 'BUG:|call trace|NETDEV WATCHDOG' /tmp/said)
value STAGE end
