# What the Debian guest does while disks come and go. Stages are told on the console; the helper VM's job acts on them.
# Writes other bytes each time, and reads them back past the cache.
use_disk() {
    dd if=/dev/urandom of=/tmp/bytes bs=64k count=16 2>/dev/null
    dd if=/tmp/bytes of=/dev/$1 bs=64k oflag=direct 2>/dev/null
    dd if=/dev/$1 bs=64k count=16 iflag=direct 2>/dev/null | cmp -s - /tmp/bytes
}
available() { awk '/^MemAvailable/{print $2}' /proc/meminfo; }

booted=$(dmesg | wc -l)
value CPUS $(nproc)
value SLOTS $(ls /sys/bus/pci/slots | wc -l)
value VECTORS $(grep -c 'PCI-MSI.*virtio.*-req' /proc/interrupts)
value CLOCK $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
use_disk vda; value BOOT_DISK $?
value STAGE start

until_true '[ -b /dev/vdb ]'
use_disk vdb; value HOT_DISK $?
value HOT_VECTORS $(grep -c 'PCI-MSI.*virtio.*-req' /proc/interrupts)
value STAGE added

until_true '[ ! -e /dev/vdb ]'
value STAGE removed

until_true '[ -b /dev/vdb ]'
use_disk vdb; value AGAIN_DISK $?
cp /tmp/bytes /tmp/kept
before=$(available)
value STAGE again

until_true '[ $(available) -lt $((before - 100000)) ]'
value STAGE small

# From here the guest is saved, and goes on in another machine until the power button is pressed.
head -c 24 /dev/input/event0 >/dev/null
value BUTTON $?
dd if=/dev/vdb bs=64k count=16 iflag=direct 2>/dev/null | cmp -s - /tmp/kept; value KEPT $?
use_disk vda; value LAST_DISK $?
# What the boot itself complains of (performance counters that the emulation lacks) is not meant.
dmesg | tail -n +$((booted + 1)) >/tmp/said
grep -iE 'i/o error|BUG:|call trace' /tmp/said
value ERRORS $(grep -ciE 'i/o error|BUG:|call trace' /tmp/said)
value STAGE end
