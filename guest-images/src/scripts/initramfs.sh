# /init of the initramfs: inserts the modules, then boots the root file system named by root=, or runs a job.

release() {
    sync
}

/bin/busybox mkdir -p /bin /dev /proc /run /sys /tmp
/bin/busybox --install -s /bin
# As tmpfs comes, everyone may write to it; programs that look (DPDK) refuse to load anything from there.
/bin/busybox chmod 755 /
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/ TERM=linux
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    insmod "$module" || fail "cannot insert $module"
done
[ -d /sys/kernel/config ] && mount -t configfs config /sys/kernel/config
ip link set lo up
read_cmdline

if [ -n "$root" ]; then
    # Devices are probed in parallel to this script.
    left=100
    until [ -b "$root" ]; do
        left=$((left - 1))
        [ $left -gt 0 ] || fail "no root device $root after 10 s; block devices: $(ls /sys/class/block | tr '\n' ' ')"
        sleep 0.1
    done
    mkdir -p /newroot
    mount -t "$rootfstype" -o "$rootmode${rootflags:+,$rootflags}" "$root" /newroot || fail "cannot mount $root"
    [ -x "/newroot$init" ] || fail "no $init on $root"
    mount --move /run /newroot/run || fail "no /run on $root"
    umount -l /dev/shm /dev/pts
    umount /tmp
    [ -d /sys/kernel/config ] && umount /sys/kernel/config 2>/dev/null
    for dir in dev proc sys; do
        mount --move /$dir /newroot/$dir || fail "no /$dir on $root"
    done
    exec switch_root /newroot "$init"
fi
[ -n "$job" ] || [ ! -e /job ] || job=/job
run_job
