//! What describes a machine: TOML files and specifications. No text makes it fail other than with an error of one line, and
//! what is printed of a machine gives the same machine.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::config::{DiskSpec, NetSpec, VmFile};

fuzz_target!(|text: &str| {
    for error in [DiskSpec::parse(text).err(), NetSpec::parse(text).err()].into_iter().flatten() {
        assert!(!error.is_empty());
    }
    match VmFile::parse(text) {
        Err(error) => assert!(!error.contains('\n'), "{error}"),
        Ok(file) => {
            let Ok(vm) = file.finish() else { return };
            let printed = vm.to_toml().expect("a machine that cannot be printed");
            let again = VmFile::parse(&printed).expect(&printed).finish().expect(&printed);
            assert_eq!(again.to_toml().expect("printed once"), printed);
        }
    }
});
