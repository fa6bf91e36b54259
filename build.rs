//! Makes the linker place the program at a fixed address.
//!
//! A position-independent program would have 17,000 pointers to correct at each start. Most of them are in tables of
//! the AWS SDK, which a run never reads if it ends well. The corrections would be a third of the cost of an exec
//! through `tf`.

#![expect(clippy::disallowed_macros, reason = "cargo reads the stdout of this program")]

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
}
