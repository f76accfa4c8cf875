//! MODE SENSE parameter data (SPC-4 7.5) and the caching mode page (SBC-3 6.5.6).

use super::{DataError, be16, need};

/// Page code of the caching mode page.
pub const CACHING_PAGE: u8 = 0x08;
/// Page code that asks for all pages.
pub const ALL_PAGES: u8 = 0x3F;

/// What the header and the caching page say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ModeData {
    /// Write protected (device-specific parameter, WP).
    pub write_protected: bool,
    /// FUA and DPO are supported (DPOFUA).
    pub dpo_fua: bool,
    /// Write cache enable of the caching page; `None` if the page is not there.
    pub write_cache: Option<bool>,
    /// Read cache disable of the caching page; `None` if the page is not there.
    pub read_cache_disabled: Option<bool>,
}

impl ModeData {
    /// Decodes the parameter data of MODE SENSE(6).
    pub fn parse_6(data: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "MODE SENSE(6) data";
        need(WHAT, data, 4)?;
        let end = data.len().min(1 + usize::from(data[0]));
        Ok(Self::parse(data[2], data.get(4 + usize::from(data[3])..end.max(4)).unwrap_or_default()))
    }

    /// Decodes the parameter data of MODE SENSE(10).
    pub fn parse_10(data: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "MODE SENSE(10) data";
        need(WHAT, data, 8)?;
        let end = data.len().min(2 + usize::from(be16(data, 0)));
        Ok(Self::parse(data[3], data.get(8 + usize::from(be16(data, 6))..end.max(8)).unwrap_or_default()))
    }

    fn parse(device_specific: u8, mut pages: &[u8]) -> Self {
        let mut mode = Self {
            write_protected: device_specific & 0x80 != 0,
            dpo_fua: device_specific & 0x10 != 0,
            ..Self::default()
        };
        // Page 0 has no format of its own and is the last one (SPC-4 7.5.7).
        while pages.len() >= 2 && pages[0] & 0x3F != 0 {
            let sub_page = pages[0] & 0x40 != 0;
            let len = if sub_page { 4 + usize::from(be16(pages, 2)) } else { 2 + usize::from(pages[1]) };
            if !sub_page
                && pages[0] & 0x3F == CACHING_PAGE
                && let Some(flags) = pages.get(2)
            {
                mode.write_cache = Some(flags & 0x04 != 0);
                mode.read_cache_disabled = Some(flags & 0x01 != 0);
            }
            pages = pages.get(len..).unwrap_or_default();
        }
        mode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caching_page_behind_a_block_descriptor() {
        let mut data = vec![3 + 8 + 20, 0, 0x90, 8, 0, 0, 0, 0, 0, 0, 2, 0];
        data.extend_from_slice(&[0x88, 0x12, 0x04]);
        data.resize(4 + 8 + 20, 0);
        let mode = ModeData::parse_6(&data).unwrap();
        assert!(mode.write_protected && mode.dpo_fua);
        assert_eq!((mode.write_cache, mode.read_cache_disabled), (Some(true), Some(false)));
    }

    #[test]
    fn ten_byte_form_and_missing_page() {
        let data = [0, 8, 0, 0x10, 0, 0, 0, 0, 0x0A, 0];
        let mode = ModeData::parse_10(&data).unwrap();
        assert!(mode.dpo_fua && !mode.write_protected);
        assert_eq!(mode.write_cache, None);
    }

    #[test]
    fn lengths_that_lie() {
        assert!(ModeData::parse_6(&[0, 0]).is_err());
        assert_eq!(ModeData::parse_6(&[255, 0, 0, 255, 8, 8]).unwrap(), ModeData::default());
        assert_eq!(ModeData::parse_6(&[0, 0, 0, 0]).unwrap(), ModeData::default());
        assert_eq!(ModeData::parse_6(&[255, 0, 0, 0, 0x48, 0, 255, 255]).unwrap(), ModeData::default());
    }
}
