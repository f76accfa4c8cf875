//! System calls made inside of another process, as by somebody who has taken it over: the thread is stopped, made to carry
//! out one call with our arguments, and let go as if nothing had happened.
#![allow(unsafe_code)] // ptrace has no safe wrapper. The memory that is written is the other process's, below its stack.

use std::io;

use anyhow::{Context, ensure};
use vcp_tests::Result;

/// How a call ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// It returned this.
    Returned(i64),
    /// It failed with this error number.
    Failed(i32),
    /// The process did not live to see the end of it: it was ended by this signal.
    Killed(i32),
}

/// A stopped thread of another process.
#[derive(Debug)]
pub(crate) struct Taken {
    tid: i32,
    regs: libc::user_regs_struct,
    over: bool,
}

fn ptrace(request: u32, tid: i32, addr: u64, data: u64) -> io::Result<i64> {
    // SAFETY: what `data` points to, where it is a pointer, is valid for the request that the callers below make.
    let result = unsafe { libc::ptrace(request, tid, addr, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Taken {
    /// Stops a thread that waits in a system call.
    pub(crate) fn over(tid: i32) -> Result<Self> {
        ptrace(libc::PTRACE_SEIZE, tid, 0, 0).context("PTRACE_SEIZE")?;
        ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0).context("PTRACE_INTERRUPT")?;
        // SAFETY: plain numbers, for which zero is a value.
        let regs = unsafe { std::mem::zeroed() };
        let mut taken = Self { tid, regs, over: false };
        ensure!(taken.wait()?.is_none(), "it ended");
        ptrace(libc::PTRACE_GETREGS, tid, 0, (&raw mut taken.regs) as u64).context("PTRACE_GETREGS")?;
        // SAFETY: the request writes nothing here; it returns what it has read.
        let code = unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, tid, taken.regs.rip - 2, 0) };
        ensure!(code as u16 == 0x050f, "thread {tid} is not in a system call: {code:#x}");
        Ok(taken)
    }

    /// Waits for a stop (`None`) or the end (its signal, or 0).
    fn wait(&mut self) -> Result<Option<i32>> {
        let mut status = 0;
        // SAFETY: `status` is valid for the call.
        while unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL) } < 0 {
            let error = io::Error::last_os_error();
            ensure!(error.kind() == io::ErrorKind::Interrupted, "waitpid: {error}");
        }
        if libc::WIFSTOPPED(status) {
            return Ok(None);
        }
        self.over = true;
        Ok(Some(if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }))
    }

    /// Puts bytes (at most 2 KiB) where the thread's stack does not reach, and returns where.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<u64> {
        let at = (self.regs.rsp - 4096) & !15;
        for (n, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let (at, word) = (at + 8 * n as u64, u64::from_ne_bytes(word));
            ptrace(libc::PTRACE_POKEDATA, self.tid, at, word).context("PTRACE_POKEDATA")?;
        }
        Ok(at)
    }

    /// Makes a system call.
    pub(crate) fn call(&mut self, number: i64, args: [u64; 6]) -> Result<Call> {
        let mut regs = self.regs;
        // The instruction that it waits in, once more.
        regs.rip -= 2;
        (regs.rax, regs.orig_rax) = (number as u64, u64::MAX);
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        ptrace(libc::PTRACE_SETREGS, self.tid, 0, (&raw const regs) as u64).context("PTRACE_SETREGS")?;
        ptrace(libc::PTRACE_SINGLESTEP, self.tid, 0, 0).context("PTRACE_SINGLESTEP")?;
        if let Some(signal) = self.wait()? {
            return Ok(Call::Killed(signal));
        }
        ptrace(libc::PTRACE_GETREGS, self.tid, 0, (&raw mut regs) as u64).context("PTRACE_GETREGS")?;
        let result = regs.rax as i64;
        Ok(if (-4095..0).contains(&result) { Call::Failed(-result as i32) } else { Call::Returned(result) })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if !self.over {
            let _ = ptrace(libc::PTRACE_SETREGS, self.tid, 0, (&raw const self.regs) as u64);
            let _ = ptrace(libc::PTRACE_DETACH, self.tid, 0, 0);
        }
    }
}
