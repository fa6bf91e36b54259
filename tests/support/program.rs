//! The modules of the program, for a test program that includes them.

/// Includes the modules of the program, as src/main.rs does. Call this in the root of a program in tests/. It does not
/// use most of their items.
macro_rules! modules_of_the_program {
    () => {
        modules_of_the_program! {
            another_tf "../src/another_tf.rs"
            aws "../src/aws/mod.rs"
            cleanup "../src/cleanup/mod.rs"
            commands "../src/commands/mod.rs"
            console "../src/console.rs"
            crash_point "../src/crash_point.rs"
            generated_input "../src/generated_input.rs"
            holder "../src/holder/mod.rs"
            journal "../src/journal/mod.rs"
            json "../src/json.rs"
            lease "../src/lease/mod.rs"
            lock "../src/lock/mod.rs"
            notice "../src/notice/mod.rs"
            panics "../src/panics.rs"
            random "../src/random.rs"
            runtime "../src/runtime.rs"
            settings "../src/settings.rs"
            supervise "../src/supervise/mod.rs"
            sys "../src/sys/mod.rs"
            terraform "../src/terraform/mod.rs"
            time "../src/time.rs"
            trace "../src/trace.rs"
        }
    };
    ($($name:ident $path:literal)*) => {
        $(#[allow(dead_code, unused_imports, clippy::allow_attributes)] #[path = $path] mod $name;)*
    };
}
