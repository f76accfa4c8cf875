//! What others use: sockets, pipes and eventfds between processes; rtrb, crossbeam and ArrayQueue between threads.

use std::hint::{black_box, spin_loop};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use crate::pair::{self, median};
use crate::{Measurement, Sample};

pub const ALL: [Measurement; 8] = [
    ("seqpacket 64 B", || packets(64)),
    ("seqpacket 4 KiB", || packets(4096)),
    ("pipe 64 B", || piped(64)),
    ("pipe 4 KiB", || piped(4096)),
    ("rtrb 32 B, threads", rtrb),
    ("rtrb round trip, threads", rtrb_trip),
    ("crossbeam-channel 32 B, threads", crossbeam),
    ("ArrayQueue 32 B, threads", array_queue),
];

type Message = [u64; 4];

fn message(n: u64) -> Message {
    [n, n ^ 1, n ^ 2, n ^ 3]
}

/// Two eventfds, both sides block in `read`.
pub fn eventfd_blocking() -> Sample {
    // SAFETY: makes a descriptor.
    let event = || unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    let (to, from) = (event(), event());
    let ring = |fd: &OwnedFd| {
        let one = 1u64;
        // SAFETY: eight bytes of an own variable.
        unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
    };
    let wait = |fd: &OwnedFd| {
        let mut count = 0u64;
        // SAFETY: as above.
        unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
    };
    const COUNT: u32 = 5_200;
    pair::run(
        || {
            let times = (0..COUNT).map(|_| {
                let started = Instant::now();
                ring(&to);
                wait(&from);
                started.elapsed().as_nanos() as u32
            });
            median(times.skip(200).collect())
        },
        || {
            for _ in 0..COUNT {
                wait(&to);
                ring(&from);
            }
        },
    )
}

fn packets(bytes: usize) -> Sample {
    let (one, two) = msgq::handshake::Link::pair().expect("sockets");
    let (one, two) = (one.into_socket(), two.into_socket());
    copied(bytes, one, two)
}

fn piped(bytes: usize) -> Sample {
    let mut ends = [0; 2];
    // SAFETY: makes two descriptors.
    let (read, write) = unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    copied(bytes, write, read)
}

/// A stream through the kernel, both sides blocking.
fn copied(bytes: usize, write: OwnedFd, read: OwnedFd) -> Sample {
    const COUNT: u64 = 200_000;
    let (mut write, mut read) = (std::fs::File::from(write), std::fs::File::from(read));
    let done = pair::shared();
    pair::run(
        || {
            let buffer = vec![7u8; bytes];
            let started = Instant::now();
            for _ in 0..COUNT {
                write.write_all(&buffer).expect("write");
            }
            pair::spin_until(&done[0], 1);
            started.elapsed().as_nanos() as f64 / COUNT as f64
        },
        || {
            let mut buffer = vec![0u8; bytes];
            for _ in 0..COUNT {
                read.read_exact(&mut buffer).expect("read");
                black_box(&buffer);
            }
            done[0].store(1, std::sync::atomic::Ordering::Release);
        },
    )
    .into()
}

const COUNT: u64 = 2_000_000;

/// Two threads on two hardware threads; `there` ends when it has taken everything.
fn threads(here: impl FnOnce(), there: impl FnOnce() + Send) -> Sample {
    let (first, second) = pair::cpus();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            pair::pin(second);
            there();
        });
        pair::pin(first);
        let started = Instant::now();
        here();
        other.join().expect("the other thread");
        (started.elapsed().as_nanos() as f64 / COUNT as f64).into()
    })
}

fn rtrb() -> Sample {
    let (mut tx, mut rx) = rtrb::RingBuffer::<Message>::new(1024);
    threads(
        move || {
            for n in 0..COUNT {
                while tx.push(message(n)).is_err() {
                    spin_loop();
                }
            }
        },
        move || {
            for _ in 0..COUNT {
                let got = loop {
                    match rx.pop() {
                        Ok(got) => break got,
                        Err(_) => spin_loop(),
                    }
                };
                black_box(got);
            }
        },
    )
}

fn rtrb_trip() -> Sample {
    let (mut to, mut to_end) = rtrb::RingBuffer::<Message>::new(1024);
    let (mut from, mut from_end) = rtrb::RingBuffer::<Message>::new(1024);
    let trips = COUNT / 8;
    let sample = threads(
        move || {
            for n in 0..trips {
                to.push(message(n)).expect("room");
                while from_end.pop().is_err() {
                    spin_loop();
                }
            }
        },
        move || {
            for _ in 0..trips {
                let got = loop {
                    match to_end.pop() {
                        Ok(got) => break got,
                        Err(_) => spin_loop(),
                    }
                };
                from.push(got).expect("room");
            }
        },
    );
    Sample { value: sample.value * 8.0, ..sample }
}

fn crossbeam() -> Sample {
    let (tx, rx) = crossbeam_channel::bounded::<Message>(1024);
    threads(
        move || (0..COUNT).for_each(|n| tx.send(message(n)).expect("receiver")),
        move || {
            for _ in 0..COUNT {
                black_box(rx.recv().expect("sender"));
            }
        },
    )
}

fn array_queue() -> Sample {
    let queue = crossbeam_queue::ArrayQueue::<Message>::new(1024);
    let queue = &queue;
    threads(
        move || {
            for n in 0..COUNT {
                while queue.push(message(n)).is_err() {
                    spin_loop();
                }
            }
        },
        move || {
            for _ in 0..COUNT {
                let got = loop {
                    match queue.pop() {
                        Some(got) => break got,
                        None => spin_loop(),
                    }
                };
                black_box(got);
            }
        },
    )
}
