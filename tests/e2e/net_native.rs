//! The guest at native speed that measures user-mode stacks, as a front end: with offloads and without, every byte both ways,
//! and answers.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::native::{Bed, Guest, Link};
use vcp_tests::switch::Switch;

#[test]
fn a_guest_at_native_speed_is_served_with_offloads_and_without() -> Result<()> {
    for offloads in [true, false] {
        let switch = Switch::start(["", ""], &["--uplink", "user"])?;
        let (address, gateway) = (Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(10, 0, 2, 2));
        let link = Link::rings(&switch.socket(0), offloads)?;
        let mut bed = Bed::connect(link, Guest { address, gateway, mtu: 1500 })?;
        let time = Duration::from_millis(100);
        // These fail unless all that was sent arrives.
        let from = bed.from_guest(time)?;
        let to = bed.to_guest(time)?;
        let took = bed.requests(time, Duration::from_micros(500))?;
        ensure!(from.bytes != 0 && to.bytes != 0 && !took.is_empty(), "{from:?}, {to:?}");
    }
    Ok(())
}
