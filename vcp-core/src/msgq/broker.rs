//! [`Broker`]: who starts processes makes the connections between them; [`Seat`]: a process's place in one.
//!
//! The monitor gives each of two processes one end of a pair of sockets when it starts it: its seat. Whenever both seats
//! are taken, it makes a pair of connected sockets and sends one end to each; they set a channel up on it. When one of
//! them died and another process has its seat, both get new ends: the survivor goes on with its state
//! ([`msgq::Dormant`]) on the new one. There is no name in a file system that a third process could use, and the broker never
//! sees a message.
//!
//! On a seat there is one kind of message, [`Message::Bell`] of `msgq`'s wire format with the end as its descriptor, from
//! the monitor to the process. What a process sends is not read.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use msgq::handshake::{Link, LinkError, Message};

/// Which end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The side that asks: it connects.
    Client,
    /// The side that serves: it accepts.
    Server,
}

/// Makes connections, and makes them again when a side died.
#[derive(Debug, Default)]
pub struct Broker {
    connections: BTreeMap<String, Connection>,
}

#[derive(Debug, Default)]
struct Connection {
    client: Option<Link>,
    server: Option<Link>,
    made: u64,
}

impl Broker {
    /// A broker that has made nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A seat of the connection with this name, for a process that is about to be started: a descriptor that it inherits. Whoever
    /// had the seat before is done with it. If the other seat is taken, both are joined.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn seat(&mut self, name: &str, role: Role) -> Result<OwnedFd, LinkError> {
        let (ours, theirs) = Link::pair()?;
        let connection = self.connections.entry(name.to_owned()).or_default();
        match role {
            Role::Client => connection.client = Some(ours),
            Role::Server => connection.server = Some(ours),
        }
        connection.join()?;
        Ok(theirs.into_socket())
    }

    /// How often both seats of a connection were joined.
    #[must_use]
    pub fn times(&self, name: &str) -> u64 {
        self.connections.get(name).map_or(0, |connection| connection.made)
    }

    /// Ends a connection: who has a seat is told that no more ends come.
    pub fn end(&mut self, name: &str) {
        self.connections.remove(name);
    }
}

impl Connection {
    fn join(&mut self) -> Result<(), LinkError> {
        let (Some(client), Some(server)) = (&self.client, &self.server) else { return Ok(()) };
        let (one, two) = Link::pair()?;
        for (seat, end) in [(client, one), (server, two)] {
            // Who has died gets none, and the other one finds its own end without a peer, and takes the next. The same goes
            // for one that leaves so many ends lie that there is no room: it is not waited for.
            let _ = seat.send(&Message::Bell { event: false }, Some(end.into_socket().as_fd()));
        }
        self.made += 1;
        Ok(())
    }
}

/// A process's place in a connection that its monitor brokers.
#[derive(Debug)]
pub struct Seat(Link);

impl Seat {
    /// On the descriptor that this process was started with.
    ///
    /// # Errors
    /// It is no seat.
    pub fn new(socket: OwnedFd) -> Result<Self, LinkError> {
        Link::new(socket).map(Self)
    }

    /// The next end, if there is one: the newest, for those before it are of no use any more.
    ///
    /// # Errors
    /// [`LinkError::Gone`]: no more ends come. Anything else: what came is no end.
    pub fn try_next(&self) -> Result<Option<Link>, LinkError> {
        let mut newest = None;
        loop {
            match self.0.receive() {
                Ok(Some((Message::Bell { .. }, Some(end)))) => newest = Some(Link::new(end)?),
                Ok(Some((other, _))) => {
                    return Err(LinkError::Descriptors { kind: other.kind(), found: 0 });
                }
                Ok(None) => return Ok(newest),
                // Told again by the next call.
                Err(LinkError::Gone) if newest.is_some() => return Ok(newest),
                Err(error) => return Err(error),
            }
        }
    }

    /// The next end, waited for.
    ///
    /// # Errors
    /// As [`try_next`](Self::try_next), and [`LinkError::Late`].
    pub fn next(&self, deadline: Instant) -> Result<Link, LinkError> {
        loop {
            if let Some(end) = self.try_next()? {
                return Ok(end);
            }
            self.0.wait(false, deadline)?;
        }
    }
}

impl AsFd for Seat {
    /// Readable when there is an end, or there will be no more.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use msgq::handshake::{Config, read_hello};
    use msgq::{Channel, Error, Incoming, Status};

    use super::*;

    const NAME: &str = "net0-disk0";

    fn config() -> Config {
        Config { deadline: Duration::from_secs(20), ..Config::default() }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn accept(seat: &Seat) -> Channel {
        let link = seat.next(soon()).unwrap();
        let hello = read_hello(&link, soon()).unwrap();
        Channel::accept(link, hello, &config(), &[]).unwrap()
    }

    /// Two sides joined by a broker; one dies, another takes its seat, and gets again what was not answered.
    #[test]
    fn sides_are_joined_and_joined_again() {
        let mut broker = Broker::new();
        let client_seat = Seat::new(broker.seat(NAME, Role::Client).unwrap()).unwrap();
        assert!(client_seat.try_next().unwrap().is_none(), "the other seat is free");
        let server_seat = Seat::new(broker.seat(NAME, Role::Server).unwrap()).unwrap();
        let (mut client, mut server) = std::thread::scope(|scope| {
            let server = scope.spawn(|| accept(&server_seat));
            let link = client_seat.next(soon()).unwrap();
            (Channel::connect(link, &config(), &[]).unwrap(), server.join().unwrap())
        });
        let token = client.ask(0, 1, 42).unwrap();
        assert!(matches!(server.receive(), Ok(Some(Incoming::Request(_)))));
        drop((server, server_seat));
        assert!(client.wait(Some(soon())).unwrap());
        assert_eq!(client.receive().unwrap_err(), Error::Gone);
        let dormant = client.into_dormant();
        // One that died before it took its end, and one that lives.
        drop(broker.seat(NAME, Role::Server).unwrap());
        let server_seat = Seat::new(broker.seat(NAME, Role::Server).unwrap()).unwrap();
        let (mut client, mut server) = std::thread::scope(|scope| {
            let server = scope.spawn(|| accept(&server_seat));
            let link = client_seat.next(soon()).unwrap();
            (dormant.connect(link, &config()).unwrap(), server.join().unwrap())
        });
        let Ok(Some(Incoming::Request(request))) = server.receive() else { panic!("nothing was sent again") };
        assert!(request.replay && request.value == 42);
        server.complete(request, Status::default()).unwrap();
        let Ok(Some(Incoming::Completion(done))) = client.receive() else { panic!("no completion") };
        assert_eq!(done.token, token);
        assert_eq!((broker.times(NAME), broker.times("other")), (3, 0));
        broker.end(NAME);
        assert!(matches!(client_seat.next(soon()), Err(LinkError::Gone)));
    }

    #[test]
    fn what_is_no_end_is_refused() {
        let (monitor, process) = Link::pair().unwrap();
        let seat = Seat::new(process.into_socket()).unwrap();
        monitor.send(&Message::Start, None).unwrap();
        assert!(matches!(seat.try_next(), Err(LinkError::Descriptors { .. })));
        let file = std::fs::File::open("/dev/null").unwrap();
        monitor.send(&Message::Bell { event: false }, Some(file.as_fd())).unwrap();
        assert!(matches!(seat.try_next(), Err(LinkError::System { .. })));
        assert!(Seat::new(file.into()).is_err());
    }
}
