//! A channel in somebody else's event loop: epoll, level- and edge-triggered, and tokio's `AsyncFd`. What the loop has to do is
//! in [`Channel::arm`]: arm (which looks once more), sleep until bell or link is readable, disarm.

use std::time::{Duration, Instant};

use msgq::handshake::{Config, Link, features, read_hello};
use msgq::{Channel, Error, Incoming, Status};
use rustix::event::{Timespec, epoll};

const ROUNDS: u64 = 1000;

fn pair(config: &Config) -> (Channel, Channel) {
    let (one, two) = Link::pair().unwrap();
    std::thread::scope(|scope| {
        let there = scope.spawn(|| Channel::connect(one, config, &[]).unwrap());
        let hello = read_hello(&two, Instant::now() + Duration::from_secs(30)).unwrap();
        (Channel::accept(two, hello, config, &[]).unwrap(), there.join().unwrap())
    })
}

/// Answers requests from an epoll loop, edge-triggered or not, until the peer is gone.
fn serve(mut channel: Channel, flags: epoll::EventFlags) -> u64 {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let flags = flags | epoll::EventFlags::IN;
    epoll::add(&epoll, channel.bell(), epoll::EventData::new_u64(0), flags).unwrap();
    epoll::add(&epoll, channel.link(), epoll::EventData::new_u64(1), flags).unwrap();
    let mut served = 0;
    loop {
        loop {
            match channel.receive() {
                Ok(Some(Incoming::Request(request))) => {
                    channel.complete(request, Status::default()).unwrap();
                    served += 1;
                }
                Ok(Some(other)) => panic!("{other:?}"),
                Ok(None) => break,
                Err(Error::Gone) => return served,
                Err(error) => panic!("{error}"),
            }
        }
        channel.commit();
        if channel.arm().unwrap() {
            channel.disarm();
            continue;
        }
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(9) }; 4];
        let timeout = Timespec { tv_sec: 30, tv_nsec: 0 };
        let count = epoll::wait(&epoll, &mut events[..], Some(&timeout)).unwrap();
        assert_ne!(count, 0, "lost wake-up after {served} requests");
        channel.disarm();
        if events[..count].iter().any(|event| event.data.u64() == 1) {
            while channel.attend().unwrap().is_some() {}
        }
    }
}

#[test]
fn epoll_wakes_a_channel() {
    for features in [0, features::EVENT_BELL] {
        for flags in [epoll::EventFlags::empty(), epoll::EventFlags::ET] {
            let config = Config { features, deadline: Duration::from_secs(30), ..Config::default() };
            let (server, mut client) = pair(&config);
            let served = std::thread::scope(|scope| {
                let server = scope.spawn(move || serve(server, flags));
                for _ in 0..ROUNDS {
                    client.ask(0, 1, 1).unwrap();
                    while !matches!(client.receive().unwrap(), Some(Incoming::Completion(_))) {
                        assert!(client.wait(Some(Instant::now() + Duration::from_secs(30))).unwrap());
                    }
                }
                client.close(0);
                server.join().unwrap()
            });
            assert_eq!(served, ROUNDS);
        }
    }
}

/// The same with tokio: a current-thread runtime that sleeps in its own epoll.
#[test]
#[expect(
    deprecated,
    reason = "the successor is unsafe; the descriptors are owned and outlive their registration"
)]
fn tokio_wakes_a_channel() {
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    let config = Config { deadline: Duration::from_secs(30), ..Config::default() };
    let (mut server, mut client) = pair(&config);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let limit = Duration::from_secs(60);
            let serve = async {
                let bell = server.bell().try_clone_to_owned().unwrap();
                let bell = AsyncFd::with_interest(bell, Interest::READABLE).unwrap();
                let link = server.link().try_clone_to_owned().unwrap();
                let link = AsyncFd::with_interest(link, Interest::READABLE).unwrap();
                loop {
                    match server.receive() {
                        Ok(Some(Incoming::Request(request))) => {
                            server.complete(request, Status::default()).unwrap();
                            continue;
                        }
                        Ok(Some(other)) => panic!("{other:?}"),
                        Ok(None) => {}
                        Err(Error::Gone) => return,
                        Err(error) => panic!("{error}"),
                    }
                    if !server.arm().unwrap() {
                        tokio::select! {
                            guard = bell.readable() => guard.unwrap().clear_ready(),
                            guard = link.readable() => {
                                guard.unwrap().clear_ready();
                                while server.attend().unwrap().is_some() {}
                            }
                        }
                    }
                    server.disarm();
                }
            };
            runtime.block_on(async { tokio::time::timeout(limit, serve).await.expect("lost wake-up") });
        });
        for _ in 0..ROUNDS {
            client.ask(0, 1, 1).unwrap();
            while !matches!(client.receive().unwrap(), Some(Incoming::Completion(_))) {
                assert!(client.wait(Some(Instant::now() + Duration::from_secs(30))).unwrap());
            }
        }
        client.close(0);
    });
}
