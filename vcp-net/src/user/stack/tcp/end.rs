//! How connections end early, and how the guest is told.

use super::{End, TcpFlows, reset};
use crate::switch::work::PortId;
use crate::user::icmp::{self, Why};
use crate::user::packet::{TCP, finished};
use crate::user::stack::shared::Shared;
use crate::user::tcp::segment::HEADER_MAX;
use crate::user::tcp::{Conn, State};

impl TcpFlows {
    /// A connection could not be made, or broke.
    pub(super) fn failed(&mut self, at: u32, error: i32, shared: &mut Shared) {
        let Some(flow) = self.flows.get(at) else { return };
        let why = Why::of_errno(error).filter(|why| *why != Why::Port);
        if flow.conn.state == State::Connecting {
            shared.counters.tcp_refused += 1;
            if let (Some(why), Some(link)) = (why, flow.link) {
                // What ICMP would have said of the guest's question.
                let (guest, remote) = (flow.key.guest, flow.key.remote);
                let mut quote = icmp::quote_udp(guest, remote, &[0; 12]);
                Self::as_question(&mut quote, &flow.conn, guest.0.is_ipv6());
                let from = shared.config.gateway_like(remote.0);
                let ends = (from, guest.0);
                let port = flow.port;
                shared.tell(link, port, ends, why, &quote);
                self.end(at, End::Well, shared);
                return;
            }
        }
        self.end(at, End::Host, shared);
    }

    /// Makes the quote of a datagram one of a connection's first segment.
    fn as_question(quote: &mut [u8], conn: &Conn, v6: bool) {
        let (protocol_at, l4_at) = if v6 { (6, 40) } else { (9, 20) };
        quote[protocol_at] = TCP;
        let seq = conn.reset().ack.wrapping_sub(1);
        quote[l4_at + 4..l4_at + 8].copy_from_slice(&seq.to_be_bytes());
        if !v6 {
            quote[10..12].fill(0);
            let sum = crate::frame::checksum::finish(crate::frame::checksum::sum(&quote[..20]));
            quote[10..12].copy_from_slice(&sum.to_be_bytes());
        }
    }

    /// Ends a connection.
    pub(super) fn end(&mut self, at: u32, how: End, shared: &mut Shared) {
        let Some(mut flow) = self.flows.remove(at) else { return };
        self.keys.remove(&flow.key);
        self.timers.remove(&(flow.timer, at));
        shared.give_flow(flow.port);
        if let Some(mut ahead) = flow.ahead.take() {
            ahead.clear(&mut self.pool);
        }
        if how == End::Host
            && let Some(link) = flow.link
        {
            let mut seg = flow.conn.reset();
            (seg.from, seg.to) = (flow.key.remote.1, flow.key.guest.1);
            let mut bytes = [0; HEADER_MAX];
            let len = seg.emit(&mut bytes);
            let ends = (flow.key.remote.0, flow.key.guest.0);
            shared.push(finished(shared.config.mac, link, ends, TCP, &bytes[..len], 16));
            shared.counters.tcp_resets.1 += 1;
        }
        if how == End::Guest {
            shared.counters.tcp_resets.0 += 1;
        }
        if let Some(socket) = flow.socket.take() {
            shared.counters.calls += 1;
            if how != End::Well {
                reset(&socket);
            }
        }
    }

    /// Ends the connections of a port.
    pub(in crate::user::stack) fn end_port(&mut self, port: PortId, shared: &mut Shared) {
        let own: Vec<u32> = self.flows.iter().filter(|(_, it)| it.port == port).map(|(at, _)| at).collect();
        for at in own {
            self.end(at, End::Guest, shared);
        }
    }

    /// Ends all of them.
    pub(in crate::user::stack) fn close(&mut self, shared: &mut Shared) {
        let all: Vec<u32> = self.flows.iter().map(|(at, _)| at).collect();
        for at in all {
            self.end(at, End::Guest, shared);
        }
    }
}
