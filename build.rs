//! Links the program at a fixed address.
//!
//! As a position-independent one it has 17,000 pointers to correct each time it starts, most of them in tables of the
//! AWS SDK that a run which ends well never looks at. That is a third of what an exec through `tf` costs.

#![expect(clippy::disallowed_macros, reason = "cargo reads the stdout of this program")]

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
}
