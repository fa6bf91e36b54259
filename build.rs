//! Makes the linker place the program at a fixed address.
//!
//! In a position-independent program, 17,000 pointers would have to be corrected at each start. The corrections would
//! be a third of the cost of an exec through `tf`. Most of these pointers are in tables of the AWS SDK. A run that ends
//! well never reads these tables.

#![expect(clippy::disallowed_macros, reason = "cargo reads the stdout of this program")]

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
}
