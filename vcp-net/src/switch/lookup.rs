//! Decides where a frame goes.

use super::account::Reason;
use super::snoop::Snoop;
use super::table::MacTable;
use super::work::{Fate, PortId, PortSet, Work};
use crate::frame::Mac;

/// See the module.
#[derive(Debug, Default)]
pub struct Lookup {
    /// Frames for stations that are known.
    pub known: u64,
    /// Frames for stations that are not: they go everywhere.
    pub unknown: u64,
    /// Frames for groups and for all.
    pub group: u64,
}

impl Lookup {
    /// Decides about a burst that came from `port`; `all` are the members of its switch, the uplink included.
    #[inline]
    pub fn run(
        &mut self,
        work: &mut Work,
        port: PortId,
        all: PortSet,
        table: &MacTable,
        snoop: &Snoop,
        now_s: u32,
    ) {
        let mut last: Option<(u16, Mac, Fate, bool)> = None;
        for item in work.open() {
            let dst = item.ether.dst;
            if let Some((vid, mac, fate, known)) = last
                && vid == item.vid
                && mac == dst
            {
                self.known += u64::from(known);
                self.unknown += u64::from(!known);
                item.fate = fate;
                continue;
            }
            if dst.is_group() {
                self.group += 1;
                item.fate = if dst.is_link_local_control() {
                    Fate::Drop(Reason::Reserved)
                } else {
                    let wanted = snoop.members(item.vid, dst, now_s);
                    many(wanted.map_or(all, |wanted| wanted.and(all)).without(port))
                };
                continue;
            }
            let (fate, known) = match table.get(item.vid, dst, now_s) {
                Some(there) if there == port => (Fate::Drop(Reason::SamePort), true),
                Some(there) => (Fate::To(there), true),
                None => (many(all.without(port)), false),
            };
            self.known += u64::from(known);
            self.unknown += u64::from(!known);
            item.fate = fate;
            last = Some((item.vid, dst, fate, known));
        }
    }
}

fn many(targets: PortSet) -> Fate {
    let mut each = targets.iter();
    match (each.next(), each.next()) {
        (None, _) => Fate::Drop(Reason::Nobody),
        // With one target it is like any other frame for that one, which may wait for it.
        (Some(only), None) => Fate::To(only),
        _ => Fate::Many(targets),
    }
}
