# What the helper VM does: a web server on its loopback, a guest without a network, and commands as the guest's stages come.
ip link set lo up
mkdir /tmp/www
echo behind >/tmp/www/word
dd if=/dev/urandom of=/tmp/www/big bs=64k count=32 2>/dev/null
value BIG $(sha256sum </tmp/www/big | cut -c1-64)
httpd -p 127.0.0.1:8080 -h /tmp/www
export VCP_SWITCHES=/tmp/switches
monitor=$$
vcp run --log info --api-socket /tmp/api --kernel /guest/vmlinuz --initrd /guest/hot --cmdline 'console=ttyS0 quiet' \
    --memory 512M --cpus 2 </dev/null >/tmp/guest.log 2>/tmp/vcp.log &
monitor=$!
await '@STAGE=start' /tmp/guest.log
value ADDED $(ctl add-net user)
await '@STAGE=added' /tmp/guest.log
ctl remove-net net0 || fail remove-net
await '@STAGE=removed' /tmp/guest.log
value VCPS $(cat /proc/[0-9]*/task/*/comm 2>/dev/null | grep -c '^vcp-data')
# A core of its own: the last of three, which the vCPUs leave to it.
ctl add-net user,queues=2,cpu=own-core || fail 'add-net again'
cpus_of() {
    for task in /proc/[0-9]*/task/*; do
        grep -qs "^$1" $task/comm && sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' $task/status
    done
}
value PLACES $(cpus_of vcp-data) and $(cpus_of vcpu)
await '@STAGE=several' /tmp/guest.log
ctl remove-net net0 || fail 'remove-net again'
await '@STAGE=none' /tmp/guest.log
ctl add-net switch=lan >/tmp/refused && fail 'a switch that is not there was joined'
value REFUSED $(grep -c 'vcp-net serve --switch lan' /tmp/refused)
vcp-net serve --switch lan,ports=2 --uplink user >/tmp/switch.log 2>&1 &
switch=$!
await '^ready:' /tmp/switch.log
ctl add-net switch=lan,packed=on || fail 'add-net switch'
await '@STAGE=switched' /tmp/guest.log
# The switch is killed, and another one takes its place: the guest goes on, with packed rings whose place nobody has noted.
kill -9 $switch
wait $switch
vcp-net serve --switch lan,ports=2 --uplink user >/tmp/switch2.log 2>&1 &
await '^ready:' /tmp/switch2.log
echo again >/tmp/www/again
await '@STAGE=end' /tmp/guest.log
wait $monitor
value RUN $?
value KILLED $(grep -c 'stood still' /tmp/vcp.log)
cat /tmp/guest.log /tmp/vcp.log
