# What the helper VM does: servers on its loopback, and a connection to the port that leads to the guest.
ip link set lo up
mkdir -p /tmp/www; dd if=/dev/urandom of=/tmp/www/file bs=64k count=64 2>/dev/null
httpd -p 127.0.0.1:8000 -h /tmp/www
nc -ll -p 7000 -e /bin/md5sum &
value FILE $(md5sum </tmp/www/file | cut -d' ' -f1)
monitor=$$
timeout 240 vcp run --log info --api-socket /tmp/api --kernel /guest/vmlinuz --initrd /guest/user \
    --cmdline 'console=ttyS0 quiet' --memory 256M --net user,hostfwd=tcp:127.0.0.1:8080-80 \
    </dev/null >/tmp/guest.log 2>/tmp/vcp.log &
monitor=$!
await '@STAGE=listening' /tmp/guest.log
# The guest's server may need a moment yet.
left=60
until [ "$(echo inwards | timeout 5 nc 127.0.0.1 8080)" = inwards ]; do
    left=$((left - 1)); [ $left -gt 0 ] || fail 'the forwarded port leads nowhere'
    sleep 0.2
done
echo through >/tmp/www/through
await '@STAGE=end' /tmp/guest.log
wait $monitor
value RUN $?
value KILLED $(grep -c 'stood still' /tmp/vcp.log)
cat /tmp/guest.log /tmp/vcp.log
