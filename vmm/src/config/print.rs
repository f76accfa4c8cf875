//! `vcp run --print-config`: the TOML file that gives the same virtual machine.

use super::{Endpoint, VmConfig, VmFile};
use crate::error::{Error, Result};

impl VmConfig {
    /// The machine as a TOML file, with all defaults written out and all paths absolute. If it holds a secret, its first
    /// line says so.
    pub fn to_toml(&self) -> Result<String> {
        let file = self.to_file()?;
        let text = toml::to_string(&file)
            .map_err(|e| Error::Usage(format!("this machine cannot be written as TOML: {e}")))?;
        let urls = self.disks.iter().flat_map(|disk| disk.url.iter().chain(&disk.path));
        let secret = urls.into_iter().any(super::SecretUrl::has_secret);
        let warning = if secret { "# Holds secrets: keep it readable for its owner only.\n" } else { "" };
        Ok(format!("{warning}{text}"))
    }

    fn to_file(&self) -> Result<VmFile> {
        let absolute = |path: &std::path::PathBuf| {
            std::path::absolute(path).map_err(|source| Error::File {
                action: "make an absolute path of",
                path: path.clone(),
                source,
            })
        };
        let maybe = |path: &Option<std::path::PathBuf>| path.as_ref().map(absolute).transpose();
        let (mut disk, mut net) = (self.disks.clone(), self.nets.clone());
        let sockets =
            disk.iter_mut().map(|disk| &mut disk.socket).chain(net.iter_mut().map(|net| &mut net.socket));
        for socket in sockets.flatten() {
            *socket = absolute(socket)?;
        }
        let metrics = match &self.metrics {
            Some(Endpoint::Unix(path)) => Some(Endpoint::Unix(absolute(path)?)),
            other => other.clone(),
        };
        Ok(VmFile {
            name: Some(self.name.clone()),
            // Of a machine that goes on with a snapshot, it is the snapshot's name.
            kernel: if self.restore.is_none() { Some(absolute(&self.kernel)?) } else { None },
            restore: maybe(&self.restore)?,
            initrd: maybe(&self.initrd)?,
            cmdline: Some(self.cmdline.clone()),
            memory: Some(super::size::Size(self.memory_bytes)),
            cpus: Some(self.vcpus),
            hugepages: Some(self.hugepages),
            memory_node: self.memory_node,
            transport: self.transport,
            vcpu_cpus: self.vcpu_cpus.clone().map(super::size::CpuList),
            api_socket: maybe(&self.api_socket)?,
            metrics,
            log: self.log.clone(),
            log_json: self.log_json.then_some(true),
            vcp_iscsi: maybe(&self.vcp_iscsi)?,
            vcp_net: maybe(&self.vcp_net)?,
            disk,
            net,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_gives_the_same_machine() {
        let text = "name='a b'\nkernel='/k'\ninitrd='/i'\ncmdline='root=\"x\" \\y'\ncpus=3\nmemory='1G'\nhugepages=true\nmemory-node=0\ntransport='mmio'\n\
            vcpu-cpus='0,2-3'\napi-socket='/a'\nmetrics='127.0.0.1:9100'\nlog='info'\nlog-json=true\nvcp-iscsi='/p'\nvcp-net='/q'\n\
            [[disk]]\nurl='iscsi://u%p@h/iqn.a:b/0'\nread-only=true\nqueues=2\ncpu=1\nmsgq='/q'\npacked=true\nreconnect=false\n\
            [[disk]]\nsocket='/s'\n\
            [[net]]\nuser=true\nhostfwd=['tcp:127.0.0.1:2222-22','udp::5-6']\nmac='52:54:00:12:34:56'\ncpu=0\n\
            [[net]]\ntap='tap0'\n[[net]]\nswitch='lan'\n[[net]]\nsocket='/n'\npacked=true\nreconnect=false\n";
        let vm = VmFile::parse(text).unwrap().finish().unwrap();
        let printed = vm.to_toml().unwrap();
        assert!(printed.starts_with("# Holds secrets"), "{printed}");
        let again = VmFile::parse(&printed).unwrap().finish().unwrap();
        assert_eq!(again, vm, "{printed}");
        assert_eq!(again.to_toml().unwrap(), printed);
    }

    #[test]
    fn defaults_are_written_out() {
        let printed = VmFile::parse("kernel='/k'\n").unwrap().finish().unwrap().to_toml().unwrap();
        for line in ["memory = \"512M\"", "cpus = 1", "hugepages = false", "name = \"k\""] {
            assert!(printed.lines().any(|found| found == line), "no {line} in:\n{printed}");
        }
    }
}
