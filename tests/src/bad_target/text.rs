//! Text requests: SendTargets, whole or in pieces (RFC 7143 11.10, 6.2).

use iscsi::pdu::{TextRequest, TextResponse, Ttt};
use iscsi::scsi::Lun;

use super::IQN;
use super::answer::{Numbers, Out};
use super::conn::SN;
use super::event::Event;
use super::script::Action;
use super::server::State;

impl State {
    pub(super) fn text(&mut self, id: usize, pdu: &TextRequest, data: &[u8]) {
        let actions = self.turn(Event::Text);
        let mut left = if pdu.ttt.is_none() {
            if data != b"SendTargets=All\0" {
                self.breach(
                    id,
                    [format!("text that is no SendTargets: {:?}", String::from_utf8_lossy(data))],
                );
            }
            let portal = self.conns[id].stream.local_addr().map(|a| a.to_string()).unwrap_or_default();
            let group = self.options.group;
            // Enough of it for several pieces.
            let others = (0..8).map(|n| format!("TargetName={IQN}.{n}\0TargetAddress={portal},{group}\0"));
            let all = format!("TargetName={IQN}\0TargetAddress={portal},{group}\0");
            [all].into_iter().chain(others).collect::<String>().into_bytes()
        } else {
            match self.conns[id].text.take() {
                Some((itt, ttt, left)) if itt == pdu.itt.0 && ttt == pdu.ttt.0 && data.is_empty() => left,
                other => {
                    let what = format!("task {:#x}, tag {:#x}, {} bytes", pdu.itt.0, pdu.ttt.0, data.len());
                    return self.breach(id, [format!("text goes on as {what}, not as {other:x?} (11.10.4)")]);
                }
            }
        };
        let piece = actions.iter().find_map(|a| if let Action::Pieces(n) = a { Some(*n) } else { None });
        let rest = left.split_off(piece.unwrap_or(left.len()).min(left.len()));
        let ttt = if rest.is_empty() {
            Ttt::NONE
        } else {
            let conn = &mut self.conns[id];
            conn.next_ttt += 1;
            conn.text = Some((pdu.itt.0, conn.next_ttt, rest));
            Ttt(conn.next_ttt)
        };
        let answer = TextResponse {
            final_bit: ttt.is_none(),
            continues: !ttt.is_none(),
            data_len_bytes: left.len() as u32,
            lun: Lun::ZERO,
            itt: pdu.itt,
            ttt,
            sn: SN,
        };
        self.finish(id, &mut vec![Out::new(&answer, left, Numbers::Status)], &actions);
    }
}
