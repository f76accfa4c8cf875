# /sbin/init of the root file system image, started by the initramfs: runs the job, leaves the file system clean.

# Ends what still runs, unmounts what the job mounted, and makes the root read-only, which writes everything out and
# marks the file system clean. Processes that were killed may hold files for a moment.
release() {
    kill -KILL -1
    while read -r device dir rest; do
        case $device in
            /dev/*) [ "$dir" = / ] || umount "$dir" || echo "VCP-INIT-FAILED: cannot unmount $dir" ;;
        esac
    done </proc/mounts
    sync
    left=50
    until error=$(mount -o remount,ro / 2>&1); do
        left=$((left - 1))
        [ $left -gt 0 ] || break
        sleep 0.1
    done
    if [ $left -gt 0 ]; then
        echo VCP-ROOT-CLEAN
    else
        echo "VCP-INIT-FAILED: cannot make / read-only: $error"
    fi
    stty sane </dev/console
}

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
# Without an initramfs nothing is mounted yet.
[ -e /proc/mounts ] || mount -t proc proc /proc
[ -e /sys/class ] || mount -t sysfs sys /sys
[ -c /dev/null ] || mount -t devtmpfs dev /dev
grep -q ' /run ' /proc/mounts || mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
ip link set lo up
read_cmdline
[ -n "$job" ] || [ ! -e /etc/vcp-job ] || job=/etc/vcp-job
run_job
