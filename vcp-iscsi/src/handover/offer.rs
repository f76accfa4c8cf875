//! [`Offer`]: what a process that takes over can build before anything stops.

use std::path::PathBuf;

use iscsi::scsi;
use serde::{Deserialize, Serialize};
use vcp_core::poll::PollMode;
use vcp_core::process::confine::Mode as ConfineMode;
use vcp_core::uring::IoMode;

use crate::portal::options::{Credentials, DigestChoice, PathPolicy, Timeouts};
use crate::portal::probe::{Found, UnitId};
use crate::portal::{IscsiEngine, Options};
use crate::recorder::StoreOptions;
use crate::url::{Portal, Secret, Url};

/// See the module.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// `--cpu`.
    pub cpu: Option<usize>,
    /// `--poll-us`.
    pub poll_us: String,
    /// `--io`.
    #[serde(default)]
    pub io: IoMode,
    /// `--poll-share`.
    #[serde(default = "whole")]
    pub poll_share: String,
    /// What is logged.
    pub log: Option<String>,
    /// `--confine`.
    pub confine: ConfineMode,
    /// The devices, in order.
    pub disks: Vec<DiskOffer>,
    /// The device for msgq clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub msgq: Option<DiskOffer>,
}

fn whole() -> String {
    "100".into()
}

/// One device.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOffer {
    /// Its name in logs and metrics.
    pub name: String,
    /// Where front ends connect.
    pub socket: PathBuf,
    /// Virtqueues.
    pub queues: u16,
    /// Where the unit is at its target, as it was found.
    pub lun_address: [u8; 8],
    /// What the unit was at the start.
    pub found: Found,
    /// What its sessions are opened with.
    pub options: OptionsOffer,
}

/// [`Options`] as text, secrets included.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptionsOffer {
    url: UrlOffer,
    initiator: String,
    chap: Option<(String, String)>,
    mutual_chap: Option<(String, String)>,
    header_digest: DigestChoice,
    data_digest: DigestChoice,
    timeouts: Timeouts,
    queue_depth: u16,
    read_only: bool,
    instance: String,
    fixed_isid: Option<[u8; 6]>,
    paths: Vec<UrlOffer>,
    sessions: u16,
    path_policy: PathPolicy,
    unit_id: Option<String>,
    recorder: Option<StoreOptions>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UrlOffer {
    user: Option<String>,
    password: Option<String>,
    host: String,
    port: u16,
    target: Option<String>,
    lun: Option<[u8; 8]>,
}

impl DiskOffer {
    /// Where its captures go.
    pub(crate) fn capture_dir(&self) -> Option<PathBuf> {
        self.options.recorder.as_ref().map(|store| store.dir.clone())
    }

    /// Of a device that is about to be served.
    #[must_use]
    pub fn of(name: &str, socket: PathBuf, queues: u16, engine: &IscsiEngine) -> Self {
        Self {
            name: name.to_owned(),
            socket,
            queues,
            lun_address: engine.lun_address().0,
            found: engine.found().clone(),
            options: OptionsOffer::of(engine.options()),
        }
    }

    /// Address of the unit.
    #[must_use]
    pub fn lun(&self) -> scsi::Lun {
        scsi::Lun(self.lun_address)
    }
}

impl OptionsOffer {
    fn of(options: &Options) -> Self {
        // By name, so that an option that is added later is not forgotten here.
        let Options {
            url,
            initiator,
            chap,
            mutual_chap,
            header_digest,
            data_digest,
            timeouts,
            queue_depth,
            read_only,
            instance,
            fixed_isid,
            paths,
            sessions,
            path_policy,
            unit_id,
            recorder,
            // The new process makes connections of its own, and has jitter of its own.
            network: _,
            jitter_seed: _,
        } = options.clone();
        let pair = |it: Credentials| (it.user, it.secret.reveal().to_owned());
        Self {
            url: (&url).into(),
            initiator,
            chap: chap.map(pair),
            mutual_chap: mutual_chap.map(pair),
            header_digest,
            data_digest,
            timeouts,
            queue_depth,
            read_only,
            instance,
            fixed_isid,
            paths: paths.iter().map(Into::into).collect(),
            sessions,
            path_policy,
            unit_id: unit_id.map(|id| id.to_string()),
            recorder,
        }
    }

    /// As options again.
    ///
    /// # Errors
    /// In words, what cannot be.
    pub fn options(self) -> Result<Options, String> {
        let pair = |(user, secret)| Credentials { user, secret: Secret::new(secret) };
        if !(1..=iscsi::initiator::Config::MAX_SLOTS / 2).contains(&self.queue_depth) {
            return Err(format!("a queue depth of {}", self.queue_depth));
        }
        let unit_id = self.unit_id.map(|id| id.parse::<UnitId>().map_err(|error| error.to_string()));
        let mut options = Options::new(self.url.into());
        options.initiator = self.initiator;
        options.chap = self.chap.map(pair);
        options.mutual_chap = self.mutual_chap.map(pair);
        options.header_digest = self.header_digest;
        options.data_digest = self.data_digest;
        options.timeouts = self.timeouts;
        options.queue_depth = self.queue_depth;
        options.read_only = self.read_only;
        options.instance = self.instance;
        options.fixed_isid = self.fixed_isid;
        options.paths = self.paths.into_iter().map(Into::into).collect();
        options.sessions = self.sessions;
        options.path_policy = self.path_policy;
        options.unit_id = unit_id.transpose()?;
        options.recorder = self.recorder;
        Ok(options)
    }
}

impl From<&Url> for UrlOffer {
    fn from(url: &Url) -> Self {
        let Url { user, password, portal: Portal { host, port }, target, lun } = url.clone();
        let password = password.map(|secret| secret.reveal().to_owned());
        Self { user, password, host, port, target, lun: lun.map(|lun| lun.0) }
    }
}

impl From<UrlOffer> for Url {
    fn from(offer: UrlOffer) -> Self {
        let UrlOffer { user, password, host, port, target, lun } = offer;
        let (password, lun) = (password.map(Secret::new), lun.map(scsi::Lun));
        Self { user, password, portal: Portal { host, port }, target, lun }
    }
}

/// `--poll-us` as it was given.
#[must_use]
pub fn poll_us(mode: PollMode) -> String {
    match mode {
        PollMode::Adaptive => "adaptive".into(),
        PollMode::Always => "always".into(),
        PollMode::Fixed(budget) => budget.as_micros().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_out_as_they_went_in() {
        let url = "iscsi://alice%se%63ret@[::1]:3261/iqn.2026-01.a:b/7".parse().unwrap();
        let mut options = Options::new(url);
        options.mutual_chap =
            Some(Credentials { user: "target".into(), secret: Secret::new("other".into()) });
        options.instance = "/run/a".into();
        options.paths = vec!["iscsi://host/iqn.2026-01.a:c/0".parse().unwrap()];
        options.timeouts.give_up = Some(std::time::Duration::from_secs(7));
        options.unit_id = Some("naa.6001405123456789".parse().unwrap());
        let text = serde_json::to_string(&OptionsOffer::of(&options)).unwrap();
        let again = serde_json::from_str::<OptionsOffer>(&text).unwrap().options().unwrap();
        // The same name to the target, so the same sessions.
        assert_eq!(again.isid(), options.isid());
        assert_eq!(again.each_path().len(), 2);
        assert_eq!((again.chap, again.mutual_chap), (options.chap, options.mutual_chap));
        assert_eq!((again.url, again.paths, again.timeouts), (options.url, options.paths, options.timeouts));
        assert_eq!(again.unit_id, options.unit_id);
    }

    #[test]
    fn what_another_version_added_is_refused() {
        let options = Options::new("iscsi://host/iqn.2026-01.a:c/0".parse().unwrap());
        let mut value = serde_json::to_value(OptionsOffer::of(&options)).unwrap();
        value["later"] = 1.into();
        assert!(serde_json::from_value::<OptionsOffer>(value).is_err());
    }

    #[test]
    fn poll_modes_are_written_as_they_are_read() {
        for text in ["adaptive", "always", "0", "100"] {
            assert_eq!(poll_us(text.parse().unwrap()), text);
        }
    }
}
