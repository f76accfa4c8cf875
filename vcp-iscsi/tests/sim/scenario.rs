//! What a seed stands for: the disk, the target, the network, the engine's settings, the load and the faults.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::scsi;
use vcp_core::device::RingDevice;
use vcp_iscsi::blk::BlkDevice;
use vcp_iscsi::portal::options::{DigestChoice, PathPolicy};
use vcp_iscsi::portal::probe::{Found, Next, Probe, Reply};
use vcp_iscsi::portal::{IscsiEngine, Options};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::faults::{Faults, Kind};
use crate::net::SimNetwork;
use crate::peer::{self, IQN, Portal, Settings, Target, Unit};
use crate::rng::Rng;
use crate::world::{MS, S, US};

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    /// Requests of the guest.
    pub ops: u64,
    /// Requests at once.
    pub depth: usize,
    pub queues: u16,
    pub unit: Unit,
    pub settings: Settings,
    /// The guest wants every write durable when it is answered.
    pub write_through: bool,
    /// By leaving the FLUSH feature out, in place of turning the cache mode.
    pub no_flush_feature: bool,
    /// Requests fail when the target is away for long.
    pub give_up: bool,
    pub link_ns: (u64, u64),
    pub think_ns: u64,
    pub fault_tick_ns: u64,
    pub send_buffer_bytes: usize,
    pub engine_depth: u16,
    pub digests: (DigestChoice, DigestChoice),
    /// Paths of the engine: of each portal, so many sessions.
    pub paths: (usize, u16),
    pub policy: PathPolicy,
    /// The data thread has a ring (io_uring); without one on this machine it makes plain calls all the same.
    pub ring: bool,
    /// Only these kinds of faults.
    pub only: Option<Vec<Kind>>,
}

impl Scenario {
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 0);
        let digests = rng.permille(300);
        let choice = |rng: &mut Rng| {
            if digests && rng.permille(800) { DigestChoice::Crc32c } else { DigestChoice::None }
        };
        let digest_choices = (choice(&mut rng), choice(&mut rng));
        let write_cache = rng.permille(750);
        let blocks = rng.range(16, 128);
        let address = |n: u8| format!("10.0.0.{n}:3260").parse().expect("an address");
        // A second portal, reached by redirection; of the same group or of another.
        let second = rng.pick(&[1, 2]);
        let portals =
            vec![Portal { address: address(1), group: 1 }, Portal { address: address(2), group: second }];
        let latency = rng.pick(&[10 * US, 100 * US, 2 * MS, 20 * MS]);
        let link = rng.pick(&[5 * US, 50 * US, MS, 20 * MS]);
        let (depth, ops) = (rng.range(1, 16) as usize, rng.range(20, 90));
        let paths = rng.pick(&[(1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (2, 1), (2, 2)]);
        let policy = rng.pick(&[PathPolicy::LeastQueue, PathPolicy::RoundRobin]);
        // With two groups and a path to each, the unit has access states.
        let groups =
            if paths.0 > 1 && second == 2 { vec![(1, 0), (2, rng.pick(&[0, 1, 2]))] } else { vec![(1, 0)] };
        let segment_bytes = rng.pick(&[512, 1024, 4096, 262_144]);
        Self {
            seed,
            ops,
            depth,
            queues: rng.range(1, 2) as u16,
            unit: Unit {
                blocks,
                write_cache,
                fua: rng.permille(500),
                max_transfer_blocks: rng.pick(&[4, 16, 64, 64]),
                thin: rng.permille(600),
                serial: "SIM-1".to_owned(),
                groups,
            },
            settings: Settings {
                portals,
                params: peer::params(&mut rng, digests),
                segment_bytes,
                window: rng.pick(&[1, 2, 8, 32]),
                latency_ns: (latency / 10, latency * 4),
                attention_at_login: rng.permille(500),
            },
            write_through: rng.permille(300),
            no_flush_feature: rng.permille(500),
            give_up: rng.permille(150),
            link_ns: (link / 5, link * 3),
            think_ns: rng.pick(&[10 * US, MS, 50 * MS]),
            fault_tick_ns: rng.pick(&[2 * MS, 20 * MS, 200 * MS, S]),
            send_buffer_bytes: rng.pick(&[4096, 16384, 262_144]),
            engine_depth: rng.pick(&[1, 4, 16, 32]),
            digests: digest_choices,
            paths,
            policy,
            ring: seed % 2 == 1,
            only: None,
        }
    }

    pub fn faults(&self, skip: &BTreeSet<usize>) -> Faults {
        match &self.only {
            Some(kinds) => Faults::only(self.seed, kinds, skip),
            None => Faults::new(self.seed, skip),
        }
    }

    /// The engine, without a session yet, and whether the unit has a volatile cache.
    pub fn engine(&self, net: &SimNetwork, target: &Target, now: Instant) -> (IscsiEngine, bool) {
        let url = format!("iscsi://10.0.0.1:3260/{IQN}/0").parse().expect("a URL");
        let mut options = Options::new(url);
        options.initiator = "iqn.2026-01.sim:initiator".to_owned();
        options.network = Arc::new(net.clone());
        options.jitter_seed = self.seed;
        options.queue_depth = self.engine_depth;
        let other = |n: usize| format!("iscsi://10.0.0.{n}:3260/{IQN}/0").parse().expect("a URL");
        options.paths = (2..=self.paths.0).map(other).collect();
        options.sessions = self.paths.1;
        options.path_policy = self.policy;
        (options.header_digest, options.data_digest) = self.digests;
        let timeouts = &mut options.timeouts;
        timeouts.connect = Duration::from_secs(2);
        timeouts.login = Duration::from_secs(2);
        timeouts.command = Duration::from_secs(6);
        timeouts.task_management = Duration::from_secs(2);
        timeouts.nop_interval = Duration::from_secs(2);
        timeouts.nop_timeout = Duration::from_secs(2);
        timeouts.give_up = self.give_up.then_some(Duration::from_secs(5));
        let found = self.found(target);
        let write_cache = found.mode.write_cache.unwrap_or(false);
        (IscsiEngine::detached(Arc::new(options), scsi::Lun::ZERO, found, now), write_cache)
    }

    /// What a probe of the unit finds.
    fn found(&self, target: &Target) -> Found {
        let mut probe = Probe::new(scsi::Lun::ZERO);
        loop {
            let command = probe.next();
            let told = target.unit.tell(&command.cdb.0, 1);
            let mut data = told.clone().unwrap_or_default();
            data.truncate(command.len_bytes as usize);
            let sense = scsi::Sense::new(scsi::SenseKey::IllegalRequest, scsi::sense::asc::INVALID_OPCODE);
            let reply = match told {
                Some(_) => Reply { status: scsi::Status::GOOD, sense: None, data: &data },
                None => Reply { status: scsi::Status::CHECK_CONDITION, sense: Some(sense), data: &[] },
            };
            if probe.answer(reply).expect("a unit that can be used") == Next::Done {
                return probe.finish().expect("a unit that can be used");
            }
        }
    }

    /// The driver's choice of features and cache mode.
    pub fn negotiate(&self, device: &mut BlkDevice<IscsiEngine>) {
        let bit = |feature: u32| 1u64 << feature;
        let offered = device.features();
        if self.write_through && self.no_flush_feature {
            device.set_features(offered & !bit(VIRTIO_BLK_F_FLUSH) & !bit(VIRTIO_BLK_F_CONFIG_WCE));
            return;
        }
        device.set_features(offered);
        if self.write_through {
            device.write_config(32, &[0]);
        }
    }
}
