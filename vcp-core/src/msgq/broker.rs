//! [`Broker`]: who starts processes makes the connections between them.
//!
//! The monitor makes a pair of connected sockets and gives one end to each side (an inherited descriptor, or one sent over a
//! control socket). There is no name in a file system that a third process could use. The broker never sees a message.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use msgq::handshake::{Link, LinkError};

/// Two ends for two processes.
#[derive(Debug)]
pub struct Ends {
    /// For the side that asks (it connects).
    pub client: OwnedFd,
    /// For the side that serves (it accepts).
    pub server: OwnedFd,
}

/// Makes connections, and makes them again when a side died.
#[derive(Debug, Default)]
pub struct Broker {
    made: BTreeMap<String, u64>,
}

impl Broker {
    /// A broker that has made nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The ends of a connection with this name. Asked again for the same name, after a side died, it makes new ends: the
    /// survivor goes on with its state ([`msgq::Dormant`]) on the new one.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn connect(&mut self, name: &str) -> Result<Ends, LinkError> {
        let (client, server) = Link::pair()?;
        *self.made.entry(name.to_owned()).or_default() += 1;
        Ok(Ends { client: client.into_socket(), server: server.into_socket() })
    }

    /// How often a connection was made.
    #[must_use]
    pub fn times(&self, name: &str) -> u64 {
        self.made.get(name).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use msgq::handshake::{Config, read_hello};
    use msgq::{Channel, Error, Incoming, Status};

    use super::*;

    /// Two sides joined by a broker; one dies, is joined anew, and gets again what was not answered.
    #[test]
    fn sides_are_joined_and_joined_again() {
        let config = Config { deadline: Duration::from_secs(20), ..Config::default() };
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut broker = Broker::new();
        let accept = |end: OwnedFd| {
            let link = Link::new(end).unwrap();
            let hello = read_hello(&link, deadline).unwrap();
            Channel::accept(link, hello, &config, &[]).unwrap()
        };
        let ends = broker.connect("net0-disk0").unwrap();
        let (mut client, mut server) = std::thread::scope(|scope| {
            let server = scope.spawn(|| accept(ends.server));
            (Channel::connect(Link::new(ends.client).unwrap(), &config, &[]).unwrap(), server.join().unwrap())
        });
        let token = client.ask(0, 1, 42).unwrap();
        assert!(matches!(server.receive(), Ok(Some(Incoming::Request(_)))));
        drop(server);
        assert!(client.wait(Some(deadline)).unwrap());
        assert_eq!(client.receive().unwrap_err(), Error::Gone);
        let dormant = client.into_dormant();
        let ends = broker.connect("net0-disk0").unwrap();
        let (mut client, mut server) = std::thread::scope(|scope| {
            let server = scope.spawn(|| accept(ends.server));
            let link = Link::new(ends.client).unwrap();
            (dormant.connect(link, &config).unwrap(), server.join().unwrap())
        });
        let Ok(Some(Incoming::Request(request))) = server.receive() else { panic!("nothing was sent again") };
        assert!(request.replay && request.value == 42);
        server.complete(request, Status::default()).unwrap();
        let Ok(Some(Incoming::Completion(done))) = client.receive() else { panic!("no completion") };
        assert_eq!(done.token, token);
        assert_eq!((broker.times("net0-disk0"), broker.times("other")), (2, 0));
    }
}
