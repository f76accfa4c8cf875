#!/bin/busybox sh
# Common to /init of the initramfs and /sbin/init of the root file system image. Runs as process 1; what it prints
# goes to the kernel's console. The line "VCP-JOB-EXIT=N" is read by the host.

fail() {
    printf '\nVCP-INIT-FAILED: %s\n' "$*"
    finish 125
}

# Prints the job's exit status and powers off. stty drains the console, so that the line is out before the power is.
finish() {
    dmesg -n 1
    printf '\nVCP-JOB-EXIT=%s\n' "$1"
    stty sane </dev/console
    release
    poweroff -f
    # Not reached where power-off works; the end of process 1 is a panic, which reboots (panic=-1) and so ends too.
    exit 1
}

# Sets $root, $rootfstype, $rootflags, $rootmode, $init, $job from the kernel command line.
read_cmdline() {
    root= rootfstype=ext4 rootflags= rootmode=rw init=/sbin/init job=
    for word in $(cat /proc/cmdline); do
        value=${word#*=}
        case $word in
            root=*) root=$value ;;
            rootfstype=*) rootfstype=$value ;;
            rootflags=*) rootflags=$value ;;
            ro | rw) rootmode=$word ;;
            init=*) init=$value ;;
            vcp.job=*) job=$value ;;
            vcp.job64=*)
                job=/run/vcp-job
                printf %s "$value" | base64 -d >$job || fail "vcp.job64 is not base64"
                ;;
        esac
    done
}

# Runs the job, or a shell on the console where there is none, and finishes with its exit status.
run_job() {
    if [ -n "$job" ]; then
        [ -r "$job" ] || fail "no job script at $job"
        sh "$job" </dev/null
    else
        echo "no job: a shell on the console; leave it to power off"
        setsid cttyhack sh
    fi
    finish $?
}
