# What the Debian guests of these tests begin with.
value() { name=$1; shift; echo "@$name=$*"; }
until_true() {
    left=900
    until eval "$1"; do
        left=$((left - 1))
        [ $left -gt 0 ] || { value TIMEOUT "$1"; dmesg | tail -n 30; exit 1; }
        sleep 0.1
    done
}
