//! Learns where stations are, from what they send.

use super::account::Reason;
use super::table::{Learned, MacTable};
use super::work::{Fate, PortId, Work};

/// See the module.
#[derive(Debug, Default)]
pub struct Learn {
    /// Stations that were new.
    pub new: u64,
    /// Stations that came from another port.
    pub moved: u64,
    /// Stations that there was no room for.
    pub no_room: u64,
}

impl Learn {
    /// Learns from a burst that came from `port`.
    #[inline]
    pub fn run(&mut self, work: &mut Work, port: PortId, table: &mut MacTable, now_s: u32) {
        // Frames of a burst are mostly of one station.
        let mut last = None;
        for item in work.open() {
            let who = (item.vid, item.ether.src);
            if last == Some(who) {
                continue;
            }
            last = Some(who);
            match table.learn(item.vid, item.ether.src, port, now_s) {
                Learned::Known => {}
                Learned::New => self.new += 1,
                Learned::Moved => self.moved += 1,
                Learned::NoRoom => self.no_room += 1,
                Learned::Foreign => {
                    item.fate = Fate::Drop(Reason::Spoofed);
                    last = None;
                }
            }
        }
    }
}
