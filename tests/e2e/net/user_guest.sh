# What the Debian guest of a user-mode stack does. Each step has a time limit of its own and says how it ended.
failed=0
step() {
    name=$1 limit=$2; shift 2
    # Into a file: what is left of a step that was ended must not be waited for.
    timeout $limit sh -c "$*" >/tmp/step 2>&1; status=$?
    value $name $(cat /tmp/step)
    [ $status = 0 ] || { echo "FAILED: $name: status $status"; failed=$((failed + 1)); }
}
booted=$(dmesg | wc -l)
printf '%s\n' '#!/bin/busybox sh' '[ "$1" = bound ] || exit 0' 'ip addr add $ip/$mask dev $interface' \
    'ip route add default via $router' 'echo $ip $router $dns >/tmp/lease' >/tmp/lease.sh
chmod 755 /tmp/lease.sh; ip link set eth0 up
step LEASE 40 'udhcpc -i eth0 -n -q -t 30 -T 1 -x hostname:guest1 -s /tmp/lease.sh >/tmp/udhcpc 2>&1 || cat /tmp/udhcpc; cat /tmp/lease'
step PING 30 'ping -q -c 3 -i 0.2 -W 5 10.0.2.2 | grep -o "[0-9]* packets received" | cut -d" " -f1'
step BIG 30 'ping -q -c 3 -i 0.2 -W 5 -s 1400 10.0.2.2 | grep -o "[0-9]* packets received" | cut -d" " -f1'
step NAME 30 'nslookup gateway.internal 10.0.2.3 | grep -c "10.0.2.2$"'
step OWN 30 'nslookup guest1.internal 10.0.2.3 | grep -c "10.0.2.15$"'
step SUM 60 'wget -q -O - http://10.0.2.2:8000/file | md5sum | cut -d" " -f1'
dd if=/dev/urandom of=/tmp/up bs=64k count=16 2>/dev/null
value UP $(md5sum </tmp/up | cut -d' ' -f1)
# The host's side says what it got: a program that only sends while it does not read may wait for itself.
step BACK 60 'nc 10.0.2.2 7000 </tmp/up | cut -d" " -f1'
nc -ll -p 80 -e /bin/cat & server=$!
value STAGE listening
step SERVED 90 'until [ "$(timeout 5 wget -q -O - http://10.0.2.2:8000/through 2>/dev/null)" = through ]; do sleep 0.2; done'
kill $server
value RX_ERRORS $(cat /sys/class/net/eth0/statistics/rx_errors)
dmesg | tail -n +$((booted + 1)) >/tmp/said
grep -iE 'BUG:|call trace|NETDEV WATCHDOG' /tmp/said
value ERRORS $(grep -ciE 'BUG:|call trace|NETDEV WATCHDOG' /tmp/said)
value FAILED $failed
value STAGE end
