//! Standard INQUIRY data (SPC-4 6.6.2).

use super::{DataError, need};

/// Peripheral device type of a direct-access block device.
pub const TYPE_DISK: u8 = 0x00;
/// Peripheral device type of "unknown or no device", as sent for a LUN that does not exist.
pub const TYPE_NONE: u8 = 0x1F;

/// The parts of standard INQUIRY data that matter here.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Inquiry {
    /// Peripheral qualifier: 0 connected, 1 not connected at the moment, 3 there can be none.
    pub qualifier: u8,
    /// Peripheral device type.
    pub device_type: u8,
    /// Removable medium.
    pub removable: bool,
    /// Version of the standard claimed (5: SPC-3, 6: SPC-4).
    pub version: u8,
    /// TPGS: asymmetric access is supported, implicitly (bit 0) or by command (bit 1); 0: it is not.
    #[serde(default)]
    pub tpgs: u8,
    /// Protection information (T10 PI) is supported.
    pub protect: bool,
    /// T10 vendor identification.
    pub vendor: String,
    /// Product identification.
    pub product: String,
    /// Product revision level.
    pub revision: String,
}

impl Inquiry {
    /// Decodes standard INQUIRY data.
    pub fn parse(data: &[u8]) -> Result<Self, DataError> {
        need("INQUIRY data", data, 5)?;
        Ok(Self {
            qualifier: data[0] >> 5,
            device_type: data[0] & 0x1F,
            removable: data[1] & 0x80 != 0,
            version: data[2],
            tpgs: data.get(5).map_or(0, |b| b >> 4 & 3),
            protect: data.get(5).is_some_and(|b| b & 1 != 0),
            vendor: ascii(data, 8, 16),
            product: ascii(data, 16, 32),
            revision: ascii(data, 32, 36),
        })
    }

    /// A disk that is there.
    pub fn is_disk(&self) -> bool {
        self.qualifier == 0 && self.device_type == TYPE_DISK
    }
}

/// The peripheral device type in words.
pub fn type_name(device_type: u8) -> &'static str {
    match device_type {
        0x00 => "disk",
        0x01 => "tape",
        0x03 => "processor",
        0x04 => "write-once",
        0x05 => "cd/dvd",
        0x07 => "optical",
        0x08 => "changer",
        0x0C => "array controller",
        0x0D => "enclosure",
        0x0E => "simplified disk",
        0x11 => "object storage",
        0x14 => "zoned disk",
        0x1F => "none",
        _ => "other",
    }
}

/// Printable ASCII of `data[from..to]` without the padding; what is not printable becomes `?`.
pub(crate) fn ascii(data: &[u8], from: usize, to: usize) -> String {
    let field = data.get(from..to.min(data.len())).unwrap_or_default();
    let field = field.split(|&b| b == 0).next().unwrap_or_default();
    let text: String =
        field.iter().map(|&b| if (0x20..0x7F).contains(&b) { char::from(b) } else { '?' }).collect();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_data() {
        let mut data = vec![0x00, 0x80, 0x05, 0x02, 31, 0x01, 0, 0];
        data.extend_from_slice(b"IET     VIRTUAL-DISK    0001");
        let inquiry = Inquiry::parse(&data).unwrap();
        assert!(inquiry.is_disk() && inquiry.removable && inquiry.protect);
        assert_eq!(
            (inquiry.vendor.as_str(), inquiry.product.as_str(), inquiry.revision.as_str()),
            ("IET", "VIRTUAL-DISK", "0001")
        );
        let none = Inquiry::parse(&[0x7F, 0, 5, 2, 0]).unwrap();
        assert!(!none.is_disk());
        assert_eq!(none.vendor, "");
        assert!(Inquiry::parse(&[]).is_err());
    }

    #[test]
    fn control_characters_do_not_get_through() {
        assert_eq!(ascii(b"a\x1b[31mb\xff", 0, 8), "a?[31mb?");
        assert_eq!(ascii(b"abc", 1, 9), "bc");
        assert_eq!(ascii(b"abc", 4, 9), "");
    }
}
