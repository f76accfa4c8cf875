//! Vital product data pages (SPC-4 7.8, SBC-3 6.6).

use std::fmt;

use super::inquiry::ascii;
use super::{DataError, be16, be32, be64, need};

/// Supported VPD pages.
pub const SUPPORTED_PAGES: u8 = 0x00;
/// Unit serial number.
pub const UNIT_SERIAL_NUMBER: u8 = 0x80;
/// Device identification.
pub const DEVICE_IDENTIFICATION: u8 = 0x83;
/// Block limits.
pub const BLOCK_LIMITS: u8 = 0xB0;
/// Block device characteristics.
pub const BLOCK_CHARACTERISTICS: u8 = 0xB1;
/// Logical block provisioning.
pub const PROVISIONING: u8 = 0xB2;

/// Checks the header of a page and gives its payload, cut to what came.
fn payload<'a>(what: &'static str, page: u8, data: &'a [u8]) -> Result<&'a [u8], DataError> {
    need(what, data, 4)?;
    if data[1] != page {
        return Err(DataError::Field { what, field: "page code", value: u64::from(data[1]) });
    }
    let end = data.len().min(4 + usize::from(be16(data, 2)));
    Ok(&data[4..end])
}

/// Page 00h: the pages that there are.
pub fn supported_pages(data: &[u8]) -> Result<&[u8], DataError> {
    payload("VPD page 00h", SUPPORTED_PAGES, data)
}

/// Page 80h: the unit serial number.
pub fn serial_number(data: &[u8]) -> Result<String, DataError> {
    let payload = payload("VPD page 80h", UNIT_SERIAL_NUMBER, data)?;
    Ok(ascii(payload, 0, payload.len()))
}

/// Kinds of designators (SPC-4 table 459) that name a logical unit, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum DesignatorKind {
    /// NAA: a world-wide name.
    Naa,
    /// EUI-64.
    Eui64,
    /// A SCSI name string.
    Name,
    /// T10 vendor identification and what follows.
    T10,
}

/// One name of a logical unit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Designator {
    /// Its kind.
    pub kind: DesignatorKind,
    /// NAA and EUI-64 (and whatever is binary) in lower-case hexadecimal, the others as they are.
    pub text: String,
}

impl fmt::Display for Designator {
    /// `naa.HEX`, `eui.HEX`, `t10.TEXT`; SCSI name strings have such a beginning of their own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            DesignatorKind::Naa => "naa.",
            DesignatorKind::Eui64 => "eui.",
            DesignatorKind::T10 => "t10.",
            DesignatorKind::Name => "",
        })?;
        f.write_str(&self.text)
    }
}

/// Page 83h.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Designators {
    /// Names of the logical unit itself (association 0), best kind first.
    pub unit: Vec<Designator>,
    /// Relative target port identifier of the port that answered (association 1, type 4).
    pub relative_port: Option<u16>,
    /// Its target port group (association 1, type 5).
    pub port_group: Option<u16>,
}

impl Designators {
    /// Decodes page 83h, as far as it came.
    pub fn parse(data: &[u8]) -> Result<Self, DataError> {
        let list = payload("VPD page 83h", DEVICE_IDENTIFICATION, data)?;
        let mut found = Self::default();
        let mut at = 0;
        while let Some(header) = list.get(at..at + 4) {
            let Some(body) = list.get(at + 4..at + 4 + usize::from(header[3])) else { break };
            at += 4 + body.len();
            let (code_set, association, kind) = (header[0] & 0xF, header[1] >> 4 & 3, header[1] & 0xF);
            match (association, kind) {
                (0, 1 | 2 | 3 | 8) if !body.is_empty() => {
                    let kind = match kind {
                        3 => DesignatorKind::Naa,
                        2 => DesignatorKind::Eui64,
                        8 => DesignatorKind::Name,
                        _ => DesignatorKind::T10,
                    };
                    let text = if code_set == 1 { hex(body) } else { ascii(body, 0, body.len()) };
                    found.unit.push(Designator { kind, text });
                }
                (1, 4) if body.len() >= 4 => found.relative_port = Some(be16(body, 2)),
                (1, 5) if body.len() >= 4 => found.port_group = Some(be16(body, 2)),
                _ => {}
            }
        }
        // Stable: what the unit names first stays first among its kind.
        found.unit.sort_by_key(|designator| designator.kind);
        Ok(found)
    }
}

/// Page 83h: the best designator of the logical unit itself (association 0), as text: NAA and EUI-64 in
/// hexadecimal, the others as they are.
pub fn designator(data: &[u8]) -> Result<Option<(DesignatorKind, String)>, DataError> {
    let first = Designators::parse(data)?.unit.into_iter().next();
    Ok(first.map(|designator| (designator.kind, designator.text)))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Page B0h: block limits. A zero means that the unit does not tell, except where said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BlockLimits {
    /// WRITE SAME with a number of blocks of zero is refused (WSNZ).
    pub write_same_non_zero: bool,
    /// Largest number of blocks of COMPARE AND WRITE.
    pub max_compare_blocks: u8,
    /// Optimal transfer length granularity in blocks.
    pub optimal_granularity_blocks: u16,
    /// Largest transfer in blocks.
    pub max_transfer_blocks: u32,
    /// Optimal transfer length in blocks.
    pub optimal_transfer_blocks: u32,
    /// Largest number of blocks that one UNMAP command may name; `u32::MAX`: no limit.
    pub max_unmap_blocks: u32,
    /// Largest number of descriptors of one UNMAP command; `u32::MAX`: no limit.
    pub max_unmap_descriptors: u32,
    /// Optimal unmap granularity in blocks.
    pub unmap_granularity_blocks: u32,
    /// Alignment of that granularity in blocks, if the unit tells it (UGAVALID).
    pub unmap_alignment_blocks: Option<u32>,
    /// Largest number of blocks of one WRITE SAME.
    pub max_write_same_blocks: u64,
}

impl BlockLimits {
    /// Decodes page B0h; an old unit may send only the first 12 bytes of it.
    pub fn parse(data: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "VPD page B0h";
        // Offsets below are those of the whole page, as the standard counts them.
        let len = 4 + payload(WHAT, BLOCK_LIMITS, data)?.len();
        let page = &data[..len];
        need(WHAT, page, 16)?;
        let alignment = be32(page, 32);
        Ok(Self {
            write_same_non_zero: page[4] & 1 != 0,
            max_compare_blocks: page[5],
            optimal_granularity_blocks: be16(page, 6),
            max_transfer_blocks: be32(page, 8),
            optimal_transfer_blocks: be32(page, 12),
            max_unmap_blocks: be32(page, 20),
            max_unmap_descriptors: be32(page, 24),
            unmap_granularity_blocks: be32(page, 28),
            unmap_alignment_blocks: (alignment & 0x8000_0000 != 0).then_some(alignment & 0x7FFF_FFFF),
            max_write_same_blocks: be64(page, 36),
        })
    }
}

/// Page B1h: the medium rotation rate field: 0 not reported, 1 no rotation (solid state), else revolutions per
/// minute.
pub fn rotation_rate(data: &[u8]) -> Result<u16, DataError> {
    const WHAT: &str = "VPD page B1h";
    let payload = payload(WHAT, BLOCK_CHARACTERISTICS, data)?;
    need(WHAT, payload, 2)?;
    Ok(be16(payload, 0))
}

/// Page B2h: how space is given and taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Provisioning {
    /// UNMAP is supported (LBPU).
    pub unmap: bool,
    /// WRITE SAME(16) may unmap (LBPWS).
    pub write_same_16: bool,
    /// WRITE SAME(10) may unmap (LBPWS10).
    pub write_same_10: bool,
    /// Unmapped blocks read as zeroes (LBPRZ).
    pub reads_zero: bool,
    /// Provisioning type: 0 not told, 1 resource, 2 thin.
    pub kind: u8,
}

impl Provisioning {
    /// Decodes page B2h.
    pub fn parse(data: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "VPD page B2h";
        let payload = payload(WHAT, PROVISIONING, data)?;
        need(WHAT, payload, 2)?;
        Ok(Self {
            unmap: payload[1] & 0x80 != 0,
            write_same_16: payload[1] & 0x40 != 0,
            write_same_10: payload[1] & 0x20 != 0,
            reads_zero: payload[1] & 0x1C != 0,
            kind: payload.get(2).copied().unwrap_or(0) & 0x07,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_told_from_each_other_and_cut_to_what_came() {
        assert_eq!(supported_pages(&[0, 0, 0, 3, 0, 0x80, 0xB0]).unwrap(), [0, 0x80, 0xB0]);
        assert_eq!(supported_pages(&[0, 0, 0, 9, 0, 0x80]).unwrap(), [0, 0x80]);
        assert!(supported_pages(&[0, 0x80, 0, 0]).is_err());
        assert_eq!(serial_number(b"\x00\x80\x00\x08  beaf11").unwrap(), "beaf11");
        assert!(serial_number(&[0, 0x80]).is_err());
    }

    #[test]
    fn naa_wins_over_vendor_text_and_ports_are_skipped() {
        let mut page = vec![0, 0x83, 0, 0];
        page.extend_from_slice(&[0x02, 0x01, 0, 4]);
        page.extend_from_slice(b"IET ");
        page.extend_from_slice(&[0x01, 0x13, 0, 8, 1, 1, 1, 1, 1, 1, 1, 1]); // association: target port
        page.extend_from_slice(&[0x01, 0x03, 0, 8, 0x60, 0, 0, 0, 0, 0x0E, 0, 1]);
        let len = page.len() - 4;
        page[3] = len as u8;
        assert_eq!(designator(&page).unwrap(), Some((DesignatorKind::Naa, "60000000000e0001".into())));
        // A designator that claims more than there is ends the list.
        assert_eq!(designator(&[0, 0x83, 0, 8, 0x01, 0x03, 0, 200, 1, 2, 3, 4]).unwrap(), None);
    }

    #[test]
    fn all_names_of_the_unit_and_where_it_was_asked() {
        let mut page = vec![0, 0x83, 0, 0];
        page.extend_from_slice(&[0x02, 0x01, 0, 4, b'I', b'E', b'T', b' ']);
        page.extend_from_slice(&[0x01, 0x14, 0, 4, 0, 0, 0, 2]); // relative target port
        page.extend_from_slice(&[0x01, 0x15, 0, 4, 0, 0, 1, 3]); // target port group
        page.extend_from_slice(&[0x01, 0x03, 0, 8, 0x60, 0, 0, 0, 0, 0x0E, 0, 1]);
        page.extend_from_slice(&[0x01, 0x15, 0, 2, 0, 0]); // too short to be one
        page[3] = (page.len() - 4) as u8;
        let found = Designators::parse(&page).unwrap();
        let names: Vec<_> = found.unit.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["naa.60000000000e0001", "t10.IET"]);
        assert_eq!((found.relative_port, found.port_group), (Some(2), Some(0x103)));
    }

    #[test]
    fn block_limits_long_and_short() {
        let mut page = [0; 64];
        page[1] = 0xB0;
        page[3] = 60;
        page[4] = 1;
        page[8..12].copy_from_slice(&2048u32.to_be_bytes());
        page[20..24].copy_from_slice(&u32::MAX.to_be_bytes());
        page[28..32].copy_from_slice(&8u32.to_be_bytes());
        page[32..36].copy_from_slice(&0x8000_0003u32.to_be_bytes());
        page[36..44].copy_from_slice(&0x1_0000u64.to_be_bytes());
        let limits = BlockLimits::parse(&page).unwrap();
        assert!(limits.write_same_non_zero);
        assert_eq!(limits.max_transfer_blocks, 2048);
        assert_eq!((limits.max_unmap_blocks, limits.unmap_granularity_blocks), (u32::MAX, 8));
        assert_eq!((limits.unmap_alignment_blocks, limits.max_write_same_blocks), (Some(3), 0x1_0000));
        page[3] = 12;
        let old = BlockLimits::parse(&page).unwrap();
        assert_eq!((old.max_transfer_blocks, old.max_unmap_blocks), (2048, 0));
        page[3] = 4;
        assert!(BlockLimits::parse(&page).is_err());
    }

    #[test]
    fn provisioning() {
        let page = [0, 0xB2, 0, 4, 0, 0xC4, 0x02, 0];
        let provisioning = Provisioning::parse(&page).unwrap();
        assert!(provisioning.unmap && provisioning.write_same_16 && !provisioning.write_same_10);
        assert!(provisioning.reads_zero);
        assert_eq!(provisioning.kind, 2);
    }
}
