//! [`Dial`]: from a portal's name to a session in full feature phase, without blocking.
//!
//! Resolution (on a thread of its own unless the portal is given by number), connection to each address in turn,
//! login, and the same again where the target redirects to (RFC 7143 11.13.5, status class 1).

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::login::{LoggedIn, LoginPort, LoginStep, Purpose};
use super::net::{Connecting, Resolution, Stream};
use super::socket::Resolving;
use super::{Options, PortalError};
use crate::dial::client::Asked;
use crate::url::Portal;

/// How often a resolution on its thread is looked at.
const RESOLVE_TICK: Duration = Duration::from_millis(20);
/// Redirections followed in one attempt.
const MAX_REDIRECTS: u32 = 4;

#[derive(Debug)]
enum State {
    Resolving(Resolving),
    /// Another process was asked for a socket that connects.
    Asking(Asked),
    Connecting(Stream),
    Login(Box<LoginPort>),
    Over,
}

/// One attempt to get a session.
#[derive(Debug)]
pub struct Dial {
    options: Arc<Options>,
    purpose: Purpose,
    portal: Portal,
    addresses: VecDeque<SocketAddr>,
    last_error: Option<io::Error>,
    redirects: u32,
    state: State,
    /// For the state at hand.
    deadline: Instant,
    /// For all addresses of the portal together.
    connect_by: Instant,
    polled: Instant,
}

impl Dial {
    /// Starts an attempt.
    ///
    /// # Errors
    /// Not even that is possible.
    pub fn start(options: Arc<Options>, purpose: Purpose, now: Instant) -> Result<Self, PortalError> {
        let mut dial = Self {
            portal: options.url.portal.clone(),
            options,
            purpose,
            addresses: VecDeque::new(),
            last_error: None,
            redirects: 0,
            state: State::Over,
            deadline: now,
            connect_by: now,
            polled: now,
        };
        dial.go(now)?;
        Ok(dial)
    }

    /// Begins with `self.portal`.
    fn go(&mut self, now: Instant) -> Result<(), PortalError> {
        self.connect_by = now + self.options.timeouts.connect;
        self.deadline = self.connect_by;
        self.last_error = None;
        let resolution = self
            .options
            .network
            .resolve(&self.portal)
            .map_err(|source| PortalError::System { what: "start to resolve a name", source })?;
        match resolution {
            Resolution::Done(addresses) => {
                self.addresses = addresses.into();
                self.next_address()
            }
            Resolution::Underway(resolving) => {
                self.state = State::Resolving(resolving);
                Ok(())
            }
        }
    }

    fn next_address(&mut self) -> Result<(), PortalError> {
        while let Some(address) = self.addresses.pop_front() {
            match self.options.network.start_connect(address) {
                Ok(begun) => {
                    // One that does not answer leaves time for those behind it.
                    let rest = self.connect_by.saturating_duration_since(self.polled);
                    self.deadline = self.polled + rest / (self.addresses.len() as u32 + 1);
                    self.state = match begun {
                        Connecting::Socket(stream) => State::Connecting(stream),
                        Connecting::Asked(asked) => State::Asking(asked),
                    };
                    return Ok(());
                }
                Err(error) => self.last_error = Some(error),
            }
        }
        self.state = State::Over;
        let source = self.last_error.take().unwrap_or_else(|| io::ErrorKind::NotFound.into());
        Err(PortalError::Connect { portal: self.portal.to_string(), source })
    }

    /// Moves on; the session once it stands. After an error or the session, the attempt is over.
    ///
    /// # Errors
    /// The attempt failed.
    pub fn poll(&mut self, now: Instant) -> Result<Option<LoggedIn>, PortalError> {
        self.polled = now;
        loop {
            match &mut self.state {
                State::Resolving(resolving) => match resolving.try_take() {
                    None => return self.in_time(now),
                    Some(Ok(addresses)) => {
                        self.addresses = addresses.into();
                        self.next_address()?;
                    }
                    Some(Err(source)) => {
                        self.state = State::Over;
                        return Err(PortalError::Resolve { portal: self.portal.to_string(), source });
                    }
                },
                State::Asking(asked) => match asked.try_take() {
                    Ok(None) if now >= self.deadline && !self.addresses.is_empty() => self.next_address()?,
                    Ok(None) => return self.in_time(now),
                    Ok(Some(stream)) => self.state = State::Connecting(stream),
                    Err(error) => {
                        self.last_error = Some(error);
                        self.next_address()?;
                    }
                },
                State::Connecting(stream) => match self.options.network.connected(stream) {
                    Ok(false) if now >= self.deadline && !self.addresses.is_empty() => self.next_address()?,
                    Ok(false) => return self.in_time(now),
                    Ok(true) => {
                        let State::Connecting(stream) = std::mem::replace(&mut self.state, State::Over)
                        else {
                            return Ok(None);
                        };
                        self.deadline = now + self.options.timeouts.login;
                        let port = LoginPort::start(stream, &self.options, self.purpose, &self.portal)?;
                        self.state = State::Login(Box::new(port));
                    }
                    Err(error) => {
                        self.last_error = Some(error);
                        self.next_address()?;
                    }
                },
                State::Login(port) => match port.poll() {
                    Ok(LoginStep::Pending) => return self.in_time(now),
                    Ok(LoginStep::Done(logged_in)) => {
                        self.state = State::Over;
                        return Ok(Some(logged_in));
                    }
                    Ok(LoginStep::Redirect(portal)) => {
                        self.redirects += 1;
                        if self.redirects > MAX_REDIRECTS {
                            self.state = State::Over;
                            return Err(PortalError::Redirects {
                                portal: self.options.url.portal.to_string(),
                            });
                        }
                        tracing::info!(from = %self.portal, to = %portal, "target redirects");
                        self.portal = portal;
                        self.go(now)?;
                    }
                    Err(error) => {
                        self.state = State::Over;
                        return Err(error);
                    }
                },
                State::Over => {
                    return Err(PortalError::Connect {
                        portal: self.portal.to_string(),
                        source: io::ErrorKind::NotConnected.into(),
                    });
                }
            }
        }
    }

    fn in_time(&mut self, now: Instant) -> Result<Option<LoggedIn>, PortalError> {
        if now < self.deadline {
            return Ok(None);
        }
        let portal = self.portal.to_string();
        let timeout = self.options.timeouts.connect;
        Err(match std::mem::replace(&mut self.state, State::Over) {
            State::Login(_) => PortalError::LoginTimeout {
                portal,
                target: self.purpose.target_name(&self.options),
                timeout: self.options.timeouts.login,
            },
            State::Resolving(_) => PortalError::Resolve {
                portal,
                source: io::Error::new(io::ErrorKind::TimedOut, "the resolver is too slow"),
            },
            _ => PortalError::ConnectTimeout { portal, timeout },
        })
    }

    /// The socket to wait for.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Asking(asked) => Some(asked.as_fd()),
            State::Connecting(stream) => Some(stream.as_fd()),
            State::Login(port) => port.stream().map(AsFd::as_fd),
            State::Resolving(_) | State::Over => None,
        }
    }

    /// Whether it waits to write.
    pub fn wants_write(&self) -> bool {
        match &self.state {
            State::Connecting(_) => true,
            State::Login(port) => port.wants_write(),
            State::Resolving(_) | State::Asking(_) | State::Over => false,
        }
    }

    /// When to poll again at the latest.
    pub fn deadline(&self) -> Instant {
        match self.state {
            State::Resolving(_) => self.deadline.min(self.polled + RESOLVE_TICK),
            _ => self.deadline,
        }
    }

    /// The portal at hand.
    pub fn portal(&self) -> &Portal {
        &self.portal
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use socket2::{Domain, Socket, Type};

    use super::super::socket;
    use super::*;

    #[test]
    fn an_address_that_does_not_answer_leaves_time_for_the_next() {
        // A queue of one that is full: further connections are neither taken nor refused.
        let silent = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        silent.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        silent.listen(0).unwrap();
        let dead = silent.local_addr().unwrap().as_socket().unwrap();
        let _full: Vec<_> = (0..4).map(|_| socket::start_connect(dead).unwrap()).collect();
        let good = TcpListener::bind("127.0.0.1:0").unwrap();

        let url = format!("iscsi://{dead}/iqn.a:b/0").parse().unwrap();
        let mut options = Options::new(url);
        options.timeouts.connect = Duration::from_secs(2);
        let start = Instant::now();
        let mut dial = Dial::start(Arc::new(options), Purpose::Normal, start).unwrap();
        dial.addresses = VecDeque::from([dead, good.local_addr().unwrap()]);
        dial.next_address().unwrap();
        assert!(dial.poll(start).unwrap().is_none());
        assert!(dial.deadline() < start + Duration::from_secs(2));
        // Its time is over; the other one connects within the rest.
        let late = dial.deadline();
        assert!(dial.poll(late).unwrap().is_none());
        assert!(matches!(dial.state, State::Connecting(_) | State::Login(_)));
        good.accept().unwrap();
    }
}
