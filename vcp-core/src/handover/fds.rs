//! [`Fds`]: descriptors that travel beside a message, named in it by index.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

/// A descriptor's place among those of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(u32);

/// Why descriptors and message do not go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FdError {
    /// An index past the end, or used twice.
    #[error("descriptor {0} is not there")]
    Missing(u32),
    /// Descriptors that the message does not name: it was not understood in full.
    #[error("{0} descriptors are not accounted for")]
    Left(usize),
}

/// Descriptors on their way: put in by the side that sends, taken out once each by the other.
#[derive(Debug, Default)]
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// Appends one.
    ///
    /// # Panics
    /// After 2^32 of them.
    pub fn put(&mut self, fd: OwnedFd) -> FdIndex {
        let index = u32::try_from(self.0.len()).expect("fewer descriptors than a process can have");
        self.0.push(Some(fd));
        FdIndex(index)
    }

    /// Appends a duplicate of one.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn put_copy(&mut self, fd: impl AsFd) -> std::io::Result<FdIndex> {
        Ok(self.put(fd.as_fd().try_clone_to_owned()?))
    }

    /// Appends a duplicate of one, if there is one.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn put_copy_of<F: AsFd>(&mut self, fd: Option<&F>) -> std::io::Result<Option<FdIndex>> {
        fd.map(|fd| self.put_copy(fd)).transpose()
    }

    /// Takes one out.
    ///
    /// # Errors
    /// [`FdError::Missing`].
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, FdError> {
        let place = self.0.get_mut(index.0 as usize);
        place.and_then(Option::take).ok_or(FdError::Missing(index.0))
    }

    /// Takes one out, if there is one.
    ///
    /// # Errors
    /// [`FdError::Missing`].
    pub fn take_if(&mut self, index: Option<FdIndex>) -> Result<Option<OwnedFd>, FdError> {
        index.map(|index| self.take(index)).transpose()
    }

    /// All must have been taken out.
    ///
    /// # Errors
    /// [`FdError::Left`].
    pub fn finish(self) -> Result<(), FdError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            left => Err(FdError::Left(left)),
        }
    }

    /// How many were put in.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn borrowed(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().flatten().map(AsFd::as_fd)
    }
}

impl FromIterator<OwnedFd> for Fds {
    fn from_iter<I: IntoIterator<Item = OwnedFd>>(fds: I) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_taken_once_and_all_are_taken() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut fds = Fds::default();
        let (first, second) = (fds.put(reader), fds.put_copy(&writer).unwrap());
        assert_eq!(fds.len(), 2);
        fds.take(second).unwrap();
        assert_eq!(fds.take(second).unwrap_err(), FdError::Missing(1));
        assert_eq!(fds.take_if(Some(FdIndex(2))).unwrap_err(), FdError::Missing(2));
        assert_eq!(Fds::finish(fds).unwrap_err(), FdError::Left(1));
        let _ = first;
    }
}
