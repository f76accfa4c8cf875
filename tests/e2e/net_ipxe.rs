//! iPXE, a driver that does the least: no offloads beyond what it must have, no interrupts, a few buffers. It is in the ROM of
//! QEMU's network cards and starts before any operating system.

use std::time::Duration;

use anyhow::ensure;
use guest_images::gate;
use serde_json::{Value, json};
use vcp_tests::proc::{Cmd, Stream};
use vcp_tests::switch::Switch;
use vcp_tests::{Result, tool};

/// How long firmware and lease may take, emulated on a busy machine.
const LEASE: Duration = Duration::from_secs(120);
const MAC: &str = "52:54:00:00:00:09";

#[test]
fn ipxe_gets_its_addresses_from_the_user_mode_stack() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64"]) {
        return Ok(());
    }
    let switch = Switch::start(["", ""], &["--uplink", "user"])?;
    let _permit = gate::shared();
    let qemu = Cmd::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-machine", "q35,graphics=off,memory-backend=mem", "-m", "256"])
        .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
        .args(["-nographic", "-nodefaults", "-serial", "stdio", "-no-reboot"])
        .arg("-chardev")
        .arg(format!("socket,id=port,path={}", switch.socket(0).display()))
        .args(["-netdev", "vhost-user,id=net,chardev=port", "-device"])
        .arg(format!("virtio-net-pci,netdev=net,mac={MAC},vectors=0,bootindex=1"))
        .spawn()?;
    // Both addresses: by DHCP, and by a router advertisement and DHCPv6.
    qemu.wait_line(Stream::Out, "net0: 10.0.2.15/255.255.255.0 gw 10.0.2.2", LEASE)?;
    qemu.wait_line(Stream::Out, "net0: fd76:6370:6e65:7400::15/64", LEASE)?;
    let told = switch.ask(&json!({"cmd": "ports"}))?;
    ensure!(has(&told, MAC), "the stack does not know its guest: {told}");
    switch.counters()?;
    Ok(())
}

/// Whether any text in `value` is `text`.
fn has(value: &Value, text: &str) -> bool {
    match value {
        Value::String(it) => it == text,
        Value::Array(all) => all.iter().any(|it| has(it, text)),
        Value::Object(all) => all.values().any(|it| has(it, text)),
        _ => false,
    }
}
