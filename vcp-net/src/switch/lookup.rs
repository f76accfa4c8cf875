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
        let mut last: Option<(u16, Mac, Fate)> = None;
        for item in work.open() {
            let dst = item.ether.dst;
            if let Some((vid, mac, fate)) = last
                && vid == item.vid
                && mac == dst
            {
                self.known += 1;
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
            item.fate = match table.get(item.vid, dst, now_s) {
                Some(there) if there == port => Fate::Drop(Reason::SamePort),
                Some(there) => Fate::To(there),
                None => {
                    self.unknown += 1;
                    item.fate = many(all.without(port));
                    continue;
                }
            };
            self.known += 1;
            last = Some((item.vid, dst, item.fate));
        }
    }
}

fn many(targets: PortSet) -> Fate {
    if targets.is_empty() { Fate::Drop(Reason::Nobody) } else { Fate::Many(targets) }
}
