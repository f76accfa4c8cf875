# /sbin/init of the root file system image, started by the initramfs: runs the job, leaves the file system clean.

# Ends what still runs and makes the root read-only, which writes the superblock and marks it clean.
release() {
    kill -KILL -1
    umount -a -r -t notmpfs,noproc,nosysfs,nodevtmpfs 2>/dev/null
    sync
    left=50
    until mount -o remount,ro / 2>/dev/null; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "VCP-INIT-FAILED: cannot make / read-only"; break; }
        sleep 0.1
    done
    echo "VCP-ROOT-CLEAN"
    stty sane </dev/console
}

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
# Without an initramfs nothing is mounted yet.
[ -e /proc/mounts ] || mount -t proc proc /proc
[ -e /sys/class ] || mount -t sysfs sys /sys
[ -b /dev/root ] || [ -c /dev/null ] || mount -t devtmpfs dev /dev
mountpoint -q /run || mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
ip link set lo up
read_cmdline
[ -n "$job" ] || [ ! -e /etc/vcp-job ] || job=/etc/vcp-job
run_job
