//! Whole machines with a guest of three instructions in ring 3, where every KVM runs it: commanded, saved and restored.

use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::command::{Command, CommandError, Reply};
use super::*;
use crate::config::VmFile;
use crate::kvm::regs::Entry;

const LIMIT: Duration = Duration::from_secs(30);
/// Where the guest counts.
const COUNTER: u64 = 0x20_0000;

fn config() -> VmConfig {
    VmFile { kernel: Some("none".into()), memory: "8M".parse().ok(), ..Default::default() }.finish().unwrap()
}

/// A board whose guest counts in rax and in memory; none where there is no KVM.
fn board() -> Option<Board> {
    let vm = Vm::new(kvm::open().ok()?, memory::create(8 << 20, false).unwrap(), false).unwrap();
    let vcpu = vm.create_vcpu(0, 1).unwrap();
    // again: inc rax; mov [COUNTER], rax; jmp again
    let code = [0x48, 0xff, 0xc0, 0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf3];
    vm.memory().write_slice(&code, GuestAddress(0x10_0000)).unwrap();
    regs::set_entry(&vcpu, vm.memory(), Entry::Ring3 { rip: 0x10_0000, boot_info: 0 }).unwrap();
    Some(Board { vm, is_ring3: true, windows: devices::windows(1).unwrap(), pci: false, vcpus: vec![vcpu] })
}

/// A machine that runs on a thread of its own.
struct Running {
    control: Control,
    memory: Arc<crate::kvm::GuestMemory>,
    thread: std::thread::JoinHandle<Result<()>>,
}

fn start(board: Board, saved: Option<Saved>) -> Running {
    let (control, commands) = Control::new().unwrap();
    let memory = board.vm.memory().clone();
    let parts = Parts {
        config: config(),
        board,
        saved,
        backends: Vec::new(),
        placement: Placement { vcps: Vec::new(), vcpus: vec![None] },
        programs: crate::vcp::Programs {
            iscsi: "none".into(),
            net: "none".into(),
            groups: Err("not in a test".into()),
            guest_bytes: 0,
        },
        control: control.clone(),
        exit: ExitSignal::new().unwrap(),
    };
    let signals = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let thread = std::thread::spawn(move || Machine::start(parts, signals, &commands)?.run(&commands));
    Running { control, memory, thread }
}

impl Running {
    fn call(&self, command: Command) -> Reply {
        self.control.call(command, LIMIT).unwrap()
    }

    fn count(&self) -> u64 {
        self.memory.read_obj(GuestAddress(COUNTER)).unwrap()
    }

    /// Waits until the guest has counted beyond `from`.
    fn counts_beyond(&self, from: u64) {
        let deadline = Instant::now() + LIMIT;
        while self.count() <= from {
            assert!(Instant::now() < deadline, "the guest stands still at {}", self.count());
            std::thread::yield_now();
        }
    }

    fn end(self) {
        self.call(Command::Kill);
        self.thread.join().unwrap().unwrap();
        assert_eq!(self.control.call(Command::Status, LIMIT).unwrap_err(), CommandError::Ended);
    }
}

#[test]
fn a_machine_pauses_goes_on_and_tells_of_itself() {
    let Some(board) = board() else { return };
    let machine = start(board, None);
    machine.counts_beyond(0);
    machine.call(Command::Pause);
    machine.call(Command::Pause);
    let count = machine.count();
    let Reply::Status(status) = machine.call(Command::Status) else { panic!("no status") };
    assert_eq!((status.state, status.vcpus.len(), status.devices.len()), (RunState::Paused, 1, 1));
    assert_eq!(machine.count(), count, "it counts while paused");
    machine.call(Command::Resume);
    machine.counts_beyond(count);
    let refused = machine.control.call(Command::Snapshot("/nonexistent/x".into()), LIMIT).unwrap_err();
    assert!(matches!(refused, CommandError::Conflict(_)), "{refused}");
    machine.end();
}

#[test]
fn a_snapshot_goes_on_where_it_was_made() {
    let Some(first) = board() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let machine = start(first, None);
    machine.counts_beyond(1000);
    machine.call(Command::Pause);
    let failed = machine.control.call(Command::Snapshot("/nonexistent/x".into()), LIMIT).unwrap_err();
    assert!(failed.to_string().contains("cannot write the snapshot /nonexistent/x"), "{failed}");
    machine.call(Command::Snapshot(path.clone()));
    let count = machine.count();
    // The one that was saved goes on too.
    machine.call(Command::Resume);
    machine.counts_beyond(count);
    machine.end();

    let mut config = config();
    let snapshot = take_over(&mut config, &path).unwrap();
    let board = Board::restore(&config, &snapshot).unwrap();
    let restored = board.vm.memory().read_obj::<u64>(GuestAddress(COUNTER)).unwrap();
    assert_eq!(restored, count);
    // Registers and memory count together, so that a guest with others' registers would jump.
    let rax = board.vcpus[0].get_regs().unwrap().rax;
    assert!(rax == count || rax == count + 1, "rax is {rax}, memory {count}");
    let machine = start(board, Some(snapshot.machine));
    machine.counts_beyond(count);
    machine.end();
}

#[test]
fn a_snapshot_of_another_machine_is_refused() {
    let Some(board) = board() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let machine = start(board, None);
    machine.call(Command::Pause);
    machine.call(Command::Snapshot(path.clone()));
    machine.end();
    let disk = crate::config::DiskSpec::parse("socket=/x").unwrap();
    let mut other = VmConfig { disks: vec![disk], ..config() };
    let error = take_over(&mut other, &path).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("0 disks and 0 nets"), "{error}");
}

#[test]
fn nobody_waits_for_ever() {
    let Some(board) = board() else { return };
    let machine = start(board, None);
    let (sender, receiver) = mpsc::channel();
    let control = machine.control.clone();
    std::thread::spawn(move || sender.send(control.call(Command::AddNet(Default::default()), LIMIT)));
    let refused = receiver.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert!(matches!(refused, CommandError::Invalid(_)), "{refused}");
    let refused = machine.control.call(Command::RemoveDisk("disk7".into()), LIMIT).unwrap_err();
    assert!(matches!(refused, CommandError::NotFound(_)), "{refused}");
    let refused = machine.control.call(Command::Shutdown, LIMIT).unwrap_err();
    assert!(matches!(refused, CommandError::Conflict(_)), "{refused}");
    machine.end();
}
