# What the helper VM does: a target with two LUNs, a guest on one of them, and commands as the guest's stages come.
target=iqn.2026-01.test.vcp:disks
url=iscsi://127.0.0.1:3260/$target
iscsi-target serve --listen 127.0.0.1:3260 --target $target --lun mem:16M --lun mem:16M >/tmp/target.log 2>&1 &
monitor=$$
await '^ready:' /tmp/target.log
vcp run --log info --api-socket /tmp/api --kernel /guest/vmlinuz --initrd /guest/hot --cmdline 'console=ttyS0 quiet' \
    --memory 512M --cpus 1 --disk url=$url/0,queues=2 </dev/null >/tmp/guest.log 2>/tmp/vcp.log &
monitor=$!
await '@STAGE=start' /tmp/guest.log
ctl add-disk url=$url/1 >/tmp/added || fail "add-disk: $(cat /tmp/added)"
value ADDED $(cat /tmp/added)
await '@STAGE=added' /tmp/guest.log
ctl remove-disk disk1 || fail remove-disk
value REMOVED $?
await '@STAGE=removed' /tmp/guest.log
# Those that serve: one that stands by has no data thread.
value VCPS $(cat /proc/[0-9]*/task/*/comm 2>/dev/null | grep -c '^vcp-data')
ctl add-disk url=$url/1 || fail 'add-disk again'
await '@STAGE=again' /tmp/guest.log
ctl resize 300M || fail resize
await '@STAGE=small' /tmp/guest.log
ctl snapshot /tmp/snap && fail 'a running guest was saved'
ctl pause || fail pause
ctl snapshot /tmp/snap || fail snapshot
value SNAPSHOT_KIB $(du -k /tmp/snap | cut -f1)
ctl kill || fail kill
wait $monitor
value FIRST $?
vcp run --log info --api-socket /tmp/api --restore /tmp/snap --disk url=$url/0,queues=2 --disk url=$url/1 \
    </dev/null >/tmp/guest2.log 2>/tmp/vcp2.log &
monitor=$!
await '^ready:' /tmp/guest2.log
until ctl status >/tmp/status 2>&1; do kill -0 $monitor || fail 'the restored guest ended'; sleep 0.1; done
ctl shutdown || fail shutdown
await '@STAGE=end' /tmp/guest2.log
wait $monitor
value SECOND $?
cat /tmp/guest.log /tmp/guest2.log
