use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::mem::GuestBuf;

/// A ring that is started, or `None` where this kernel has none (the other way is tested then).
fn ring() -> Option<Ring> {
    let mut ring = choose(IoMode::Auto).unwrap()?;
    ring.enable().unwrap();
    Some(ring)
}

fn shared(stream: UnixStream) -> Arc<OwnedFd> {
    stream.set_nonblocking(true).unwrap();
    Arc::new(stream.into())
}

fn eventfd() -> Arc<OwnedFd> {
    let flags = rustix::event::EventfdFlags::NONBLOCK;
    Arc::new(rustix::event::eventfd(0, flags).unwrap())
}

const LONG: Option<Duration> = Some(Duration::from_secs(10));
const SHORT: Option<Duration> = Some(Duration::from_millis(20));

fn batch(arena: &[u8], guest: &GuestBuf) -> Box<SendBatch> {
    let mut batch = Box::new(SendBatch::new());
    batch.begin(arena.to_vec());
    batch.push_private(0, arena.len());
    batch.push_guest(guest, 0, guest.len_bytes());
    batch.push_copy(b"!");
    batch
}

#[test]
fn one_call_sends_signals_and_waits_for_the_answer() {
    let Some(mut ring) = ring() else { return };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (ours, event) = (shared(ours), eventfd());
    let guest = GuestBuf::for_test_pieces(&[2, 3]);
    guest.copy_from(0, b"guest");
    let peer = std::thread::spawn(move || {
        let mut got = [0; 11];
        theirs.read_exact(&mut got).unwrap();
        theirs.write_all(b"answer").unwrap();
        (got, theirs)
    });
    let sent = ring.send(&ours, batch(b"hello", &guest));
    drop(guest);
    ring.signal(&event);
    let received = ring.recv(&ours, vec![0; 64].into());
    ring.wait(LONG).unwrap();
    assert_eq!(ring.counts().enters, 1);
    let (mut batch, result) = ring.take_send(sent).unwrap();
    assert_eq!((result.unwrap(), batch.take_arena()), (11, b"hello!".to_vec()));
    let (buffer, result) = ring.take_recv(received).unwrap();
    assert_eq!((result.unwrap(), &buffer[..6]), (6, &b"answer"[..]));
    assert_eq!(&peer.join().unwrap().0, b"helloguest!");
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
}

#[test]
fn what_the_socket_does_not_take_is_told_and_ends_the_wait() {
    let Some(mut ring) = ring() else { return };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let ours = shared(ours);
    let much = vec![7; 4 << 20];
    let sent = ring.send(&ours, batch(&much, &GuestBuf::new()));
    let received = ring.recv(&ours, vec![0; 8].into());
    // Nobody answers: only the short send can end this.
    ring.wait(LONG).unwrap();
    let (batch_back, result) = ring.take_send(sent).unwrap();
    let took = result.unwrap();
    assert!(took > 0 && took < batch_back.len_bytes());
    assert!(ring.take_recv(received).is_none());
    // Full: nothing is taken now.
    let sent = ring.send(&ours, batch_back);
    ring.submit().unwrap();
    assert_eq!(ring.take_send(sent).unwrap().1.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let writable = ring.poll(&ours, false, true);
    ring.wait(SHORT).unwrap();
    assert!(!ring.take_poll(writable));
    let mut all = vec![0; took];
    theirs.read_exact(&mut all).unwrap();
    ring.wait(LONG).unwrap();
    assert!(ring.take_poll(writable));
}

#[test]
fn a_watch_tells_of_every_event_and_ends_with_its_descriptor() {
    let Some(mut ring) = ring() else { return };
    let event = eventfd();
    ring.watch(&event);
    for _ in 0..3 {
        ring.wait(SHORT).unwrap();
        assert!(!ring.has_news());
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        assert!(ring.has_news(), "seen without a system call");
        ring.wait(LONG).unwrap();
    }
    let copy = event.try_clone().unwrap();
    drop(event);
    // The first call cancels, and hears of it.
    ring.wait(SHORT).unwrap();
    ring.wait(SHORT).unwrap();
    rustix::io::write(&copy, &1u64.to_ne_bytes()).unwrap();
    assert!(!ring.has_news());
    assert!(ring.places.iter().all(|place| place.op.is_none()));
}

#[test]
fn a_receive_that_nobody_waits_for_any_more_lets_go_of_the_socket() {
    let Some(mut ring) = ring() else { return };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let ours = shared(ours);
    ring.recv(&ours, vec![0; 8].into());
    ring.submit().unwrap();
    drop(ours);
    // Only now is it closed; the peer sees it.
    ring.wait(SHORT).unwrap();
    assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn quiescing_ends_receives_and_loses_nothing() {
    let Some(mut ring) = ring() else { return };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let ours = shared(ours);
    let event = eventfd();
    ring.watch(&event);
    let idle = ring.recv(&ours, vec![0; 8].into());
    ring.submit().unwrap();
    ring.quiesce().unwrap();
    let (_, result) = ring.take_recv(idle).unwrap();
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    let busy = ring.recv(&ours, vec![0; 8].into());
    ring.submit().unwrap();
    theirs.write_all(b"data").unwrap();
    ring.quiesce().unwrap();
    let (buffer, result) = ring.take_recv(busy).unwrap();
    match result {
        Ok(got) => assert_eq!(&buffer[..got], b"data"),
        // Cancelled before it ran: then it is still in the socket.
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
            let mut there = [0; 8];
            assert_eq!(rustix::io::read(&ours, &mut there).unwrap(), 4);
        }
    }
    rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
    assert!(ring.has_news(), "watches stay");
}

#[test]
fn nothing_but_its_five_operations_can_be_had() {
    let Some(mut ring) = ring() else { return };
    let path = c"/";
    let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build().user_data(CANCEL);
    ring.push(open);
    ring.ring.submitter().submit_and_wait(1).unwrap();
    let completion = ring.ring.completion().next().unwrap();
    assert_eq!(completion.result(), -libc::EACCES);
}

#[test]
fn more_than_the_queue_holds_is_submitted_all_the_same() {
    let Some(mut ring) = ring() else { return };
    let event = eventfd();
    let many = 3 * u64::from(ENTRIES);
    for _ in 0..many {
        ring.signal(&event);
    }
    ring.submit().unwrap();
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), many);
    assert!(!ring.has_queued() && ring.signals.is_empty());
}

#[test]
fn a_full_event_descriptor_costs_the_signal_and_no_time() {
    let Some(mut ring) = ring() else { return };
    let event = eventfd();
    rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    ring.signal(&event);
    ring.wait(SHORT).unwrap();
    assert_eq!(ring.counts().failed_signals, 1);
    // Somebody who shares it made it blocking.
    rustix::fs::fcntl_setfl(&event, rustix::fs::OFlags::empty()).unwrap();
    ring.signal(&event);
    ring.wait(SHORT).unwrap();
    assert_eq!(ring.counts().failed_signals, 2);
}
