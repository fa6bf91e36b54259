//! The backend that the configuration and the arguments of an `init` specify. A migration locks this backend as well as
//! the cached one. If `init` is killed during a migration, the data directory contains only the cached one.
//!
//! In Terraform, a backend block contains only literals (internal/configs/backend.go decodes it without variables).
//! OpenTofu allows variables there. An attribute that depends on a variable is left out. If the location of a lock
//! depends on such an attribute, the lock is reported and not released.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use hcl::eval::{Context, Evaluate};
use hcl::expr::ObjectKey;
use hcl::template::Element;
use hcl::{Body, Expression, Template};
use serde_json::{Map, Value};

use super::backend::CachedBackend;
use crate::sys::plain_file;

/// The maximum size of a configuration file: 8 MiB, in bytes. Larger files are ignored.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// Returns the backends of the configuration in `directory`, with the values of `-backend-config` applied: the backend
/// that OpenTofu reads, and that of Terraform if it is another one. Terraform does not read `.tofu` files. Empty if no
/// file has a backend block or a cloud block that can be parsed. A cloud block is a backend of the type `cloud`
/// (internal/configs/cloud.go).
pub(crate) fn backends(directory: &Path, backend_configs: &[OsString]) -> Vec<CachedBackend> {
    let files = files(directory);
    let (for_both, for_tofu): (Vec<_>, Vec<_>) = files.into_iter().partition(|path| !is_for_tofu(path));
    let mut found: Vec<_> =
        [in_files(for_both.iter().chain(&for_tofu)), in_files(for_both.iter())].into_iter().flatten().collect();
    found.dedup();
    let with_arguments = |(kind, mut config): (String, Map<String, Value>)| {
        for given in backend_configs {
            config.extend(of_argument(directory, given));
        }
        CachedBackend::of_parts(&kind, config, "")
    };
    found.into_iter().map(with_arguments).collect()
}

/// Returns the type and the attributes of the backend in `files`. `None` if they have none.
fn in_files<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Option<(String, Map<String, Value>)> {
    let (plain, overriding): (Vec<_>, Vec<_>) = files.partition(|path| !overrides(path));
    // A block in an override file replaces the earlier block as a whole (internal/configs/module.go).
    plain.into_iter().chain(overriding).rev().find_map(|path| in_file(path))
}

/// Whether only OpenTofu reads the file.
fn is_for_tofu(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    [&b".tofu"[..], b".tofu.json"].iter().any(|ending| name.ends_with(ending))
}

/// Whether `directory` contains any configuration file.
pub(crate) fn is_there(directory: &Path) -> bool {
    !files(directory).is_empty()
}

/// Returns the sorted paths of the configuration files that Terraform reads (internal/configs/parser_config_dir.go),
/// and of those that only OpenTofu reads.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_read = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().as_bytes();
        let ignored =
            name.starts_with(b".") || name.ends_with(b"~") || (name.starts_with(b"#") && name.ends_with(b"#"));
        !ignored && [&b".tf"[..], b".tf.json", b".tofu", b".tofu.json"].iter().any(|ending| name.ends_with(ending))
    };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_read).collect();
    files.sort();
    files
}

fn overrides(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.split(".t").next().unwrap_or_default();
    stem == "override" || stem.ends_with("_override")
}

fn in_file(path: &Path) -> Option<(String, Map<String, Value>)> {
    let text = small(path).filter(|text| ["backend", CLOUD].iter().any(|word| text.contains(word)))?;
    if path.extension().is_some_and(|ending| ending == "json") {
        return in_json(&serde_json::from_str(&text).ok()?);
    }
    in_hcl(&text)
}

/// The type of a backend that is a cloud block, and the name of that block.
const CLOUD: &str = "cloud";

/// Returns the type and the attributes of the backend block or of the cloud block in a file. `None` if the file has
/// neither.
fn in_hcl(text: &str) -> Option<(String, Map<String, Value>)> {
    let body = hcl::parse(text).ok()?;
    let backend = body
        .blocks()
        .filter(|block| block.identifier.as_str() == "terraform")
        .flat_map(|block| block.body.blocks())
        .find(|block| ["backend", CLOUD].contains(&block.identifier.as_str()))?;
    let kind = if backend.identifier.as_str() == CLOUD { CLOUD } else { backend.labels.first()?.as_str() };
    Some((kind.to_owned(), attributes(&backend.body)))
}

fn small(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = plain_file::open(path).ok()?;
    let length = file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).ok()?;
    (length as u64 <= MAX_FILE_BYTES).then_some(text)
}

/// Returns the type and the attributes of the backend in a JSON file: `{"terraform": {"backend": {"s3": {...}}}}`. Each
/// of these objects may also be a list of such objects. A cloud block is `{"terraform": {"cloud": {...}}}`. `None` if
/// the file has neither.
fn in_json(file: &Value) -> Option<(String, Map<String, Value>)> {
    let each = |value: &Value| match value {
        Value::Array(list) => list.clone(),
        one => vec![one.clone()],
    };
    let terraform = each(file.get("terraform")?);
    let block = |name| terraform.iter().filter_map(|block| block.get(name)).flat_map(each).next();
    if let Some(cloud) = block(CLOUD) {
        return Some((CLOUD.to_owned(), cloud.as_object()?.clone()));
    }
    let backend = block("backend")?;
    let (kind, config) = backend.as_object()?.iter().next()?;
    let config = each(config).into_iter().next()?;
    Some((kind.clone(), config.as_object()?.clone()))
}

fn attributes(body: &Body) -> Map<String, Value> {
    body.attributes().filter_map(|attribute| Some((attribute.key.to_string(), value(&attribute.expr)?))).collect()
}

/// Returns the value of an expression. `None` if it is not a literal, or a template, a list or an object of literals.
/// Other expressions are not evaluated: a comprehension may take any time, and a division by zero panics.
fn value(expression: &Expression) -> Option<Value> {
    is_literal(expression).then(|| serde_json::to_value(expression.evaluate(&Context::new()).ok()?).ok())?
}

fn is_literal(expression: &Expression) -> bool {
    match expression {
        Expression::Null | Expression::Bool(_) | Expression::Number(_) | Expression::String(_) => true,
        Expression::Array(list) => list.iter().all(is_literal),
        Expression::Object(object) => object.iter().all(|(key, value)| {
            let is_name = match key {
                ObjectKey::Expression(key) => is_literal(key),
                _ => true,
            };
            is_name && is_literal(value)
        }),
        Expression::TemplateExpr(template) => Template::from_expr(template).is_ok_and(|template| {
            template.elements().iter().all(|element| match element {
                Element::Literal(_) => true,
                Element::Interpolation(interpolation) => is_literal(&interpolation.expr),
                Element::Directive(_) => false,
            })
        }),
        Expression::Parenthesis(inner) => is_literal(inner),
        _ => false,
    }
}

/// Returns the attributes of one `-backend-config`, which is `NAME=VALUE` or the path of a file in HCL or JSON
/// (internal/command/init.go, `backendConfigOverrideBody`). Empty if the file cannot be read or parsed.
fn of_argument(directory: &Path, given: &OsString) -> Map<String, Value> {
    let text = given.to_string_lossy();
    if let Some((name, value)) = text.split_once('=') {
        return Map::from_iter([(name.trim().to_owned(), of_text(name.trim(), value))]);
    }
    let path = directory.join(given);
    let Some(text) = small(&path).filter(|_| !given.is_empty()) else { return Map::new() };
    if path.extension().is_some_and(|ending| ending == "json") {
        return serde_json::from_str(&text).unwrap_or_default();
    }
    hcl::parse(&text).map(|body| attributes(&body)).unwrap_or_default()
}

/// Converts a value from the command line. Text that begins with a bracket or a brace is parsed as HCL. `true` and
/// `false` are parsed as booleans, unless the attribute is known to be a string. Any other value remains text.
fn of_text(name: &str, text: &str) -> Value {
    let as_expression = || {
        let body = hcl::parse(&format!("value = {text}\n")).ok()?;
        attributes(&body).remove("value")
    };
    let nested = text.trim_start().starts_with(['{', '[']);
    let flag = matches!(text, "true" | "false") && !matches!(name, "bucket" | "key" | "dynamodb_table" | "profile");
    if nested || flag { as_expression().unwrap_or_else(|| text.into()) } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend_of(files: &[(&str, &str)], given: &[&str]) -> Option<CachedBackend> {
        backends_of(files, given).into_iter().next()
    }

    fn backends_of(files: &[(&str, &str)], given: &[&str]) -> Vec<CachedBackend> {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let given: Vec<OsString> = given.iter().map(OsString::from).collect();
        backends(directory.path(), &given)
    }

    const MAIN: &str = r#"
        terraform {
          required_version = ">= 1.0"
          backend "s3" {
            bucket       = "b"
            key          = "dir/${"k"}"
            use_lockfile = true
            endpoints    = { s3 = "http://x", dynamodb = "http://y" }
            shared_config_files = ["a", "b"]
          }
        }
        resource "null_resource" "a" { triggers = { x = var.y } }
    "#;

    #[test]
    fn only_literals_are_evaluated() {
        for (text, expected) in [
            (r#"["a", "b${"c"}", 1, true, null]"#, serde_json::json!(["a", "bc", 1, true, null])),
            (r#"{ a = ("x"), "b" = { c = [] } }"#, serde_json::json!({ "a": "x", "b": { "c": [] } })),
        ] {
            assert_eq!(of_text("x", text), expected, "{text}");
        }
        let ten = "[0,1,2,3,4,5,6,7,8,9]";
        let nested = (0..40).fold("1".to_owned(), |inner, _| format!("[for a in {ten} : {inner}]"));
        let nested = format!("[{nested}]");
        for text in [
            "[1 % 0]",
            "[1 / 0]",
            "[9223372036854775807 + 1]",
            "[-9223372036854775808 * 2]",
            "[var.a]",
            "[upper(\"a\")]",
            "[true ? 1 : 2]",
            "[\"%{ if true }a%{ endif }\"]",
            "[\"${1 % 0}\"]",
            "{ (1 % 0) = 1 }",
            nested.as_str(),
        ] {
            assert_eq!(of_text("x", text), Value::from(text), "{text}");
        }
    }

    #[test]
    fn the_block_is_read_with_its_literals() {
        let backend = backend_of(&[("main.tf", MAIN)], &[]).unwrap();
        assert_eq!((backend.kind.as_str(), backend.string("bucket")), ("s3", Some("b")));
        assert_eq!(backend.string("key"), Some("dir/k"));
        assert!(backend.flag("use_lockfile"));
        assert_eq!(backend.string("endpoints.dynamodb"), Some("http://y"));
        assert_eq!(backend.strings("shared_config_files"), ["a", "b"]);
    }

    #[test]
    fn arguments_go_before_the_block_the_later_before_the_earlier() {
        let files = [
            ("main.tf", MAIN),
            ("prod.tfbackend", "bucket = \"from-file\"\nregion = \"r\"\n"),
            ("more.json", r#"{"dynamodb_table": "t"}"#),
        ];
        let given =
            ["prod.tfbackend", "more.json", "bucket=last=b", "use_lockfile=false", "endpoints={ s3 = \"http://z\" }"];
        let backend = backend_of(&files, &given).unwrap();
        assert_eq!(backend.string("bucket"), Some("last=b"));
        assert_eq!(backend.string("region"), Some("r"));
        assert_eq!(backend.string("dynamodb_table"), Some("t"));
        assert!(!backend.flag("use_lockfile"));
        assert_eq!((backend.string("endpoints.s3"), backend.string("endpoints.dynamodb")), (Some("http://z"), None));
        assert_eq!(backend_of(&files, &["true.tfbackend", "bucket=true"]).unwrap().string("bucket"), Some("true"));
    }

    #[test]
    fn json_and_overrides_are_read_as_terraform_reads_them() {
        let json = r#"{"terraform": [{"backend": {"s3": {"bucket": "j", "key": "${not.interpreted}"}}}]}"#;
        let backend = backend_of(&[("main.tf.json", json)], &[]).unwrap();
        assert_eq!((backend.string("bucket"), backend.string("key")), (Some("j"), Some("${not.interpreted}")));
        let other = "terraform {\n backend \"s3\" {\n key = \"o\"\n }\n}\n";
        for name in ["override.tf", "a_override.tf"] {
            let backend = backend_of(&[("zz.tf", MAIN), (name, other)], &[]).unwrap();
            assert_eq!((backend.string("key"), backend.string("bucket")), (Some("o"), None), "{name}");
        }
        for name in [".hidden.tf", "x.tf~", "x.txt"] {
            assert!(backend_of(&[(name, MAIN)], &[]).is_none(), "{name}");
        }
    }

    #[test]
    fn a_file_that_only_opentofu_reads_does_not_hide_the_backend_of_terraform() {
        let of = |key: &str| format!("terraform {{\n backend \"s3\" {{\n key = \"{key}\"\n }}\n}}\n");
        let json = r#"{"terraform":{"backend":{"s3":{"key":"j"}}}}"#;
        let (a, b, none) = (of("a"), of("b"), "locals {}".to_owned());
        for (files, expected) in [
            (vec![("main.tf", &a), ("main.tofu", &b)], vec!["b", "a"]),
            (vec![("main.tf", &a), ("override.tofu", &b)], vec!["b", "a"]),
            (vec![("main.tf", &a), ("x.tofu.json", &json.to_owned())], vec!["j", "a"]),
            (vec![("main.tf", &a), ("main.tofu", &a)], vec!["a"]),
            (vec![("main.tf", &a), ("main.tofu", &none)], vec!["a"]),
            (vec![("main.tf", &none), ("main.tofu", &b)], vec!["b"]),
        ] {
            let files: Vec<(&str, &str)> = files.into_iter().map(|(name, text)| (name, text.as_str())).collect();
            let found = backends_of(&files, &["bucket=b"]);
            assert_eq!(found.iter().map(|one| one.string("key").unwrap()).collect::<Vec<_>>(), expected, "{files:?}");
            assert!(found.iter().all(|one| one.string("bucket") == Some("b")), "the arguments belong to each");
        }
    }

    #[test]
    fn what_depends_on_something_is_left_out() {
        let text = "terraform {\n backend \"s3\" {\n bucket = var.b\n key = \"k\"\n }\n}\n";
        let backend = backend_of(&[("main.tf", text)], &[]).unwrap();
        assert_eq!((backend.string("bucket"), backend.string("key")), (None, Some("k")));
        assert!(backend_of(&[("main.tf", "this is { no HCL")], &[]).is_none());
        assert!(backend_of(&[("main.tf", "backend")], &["bucket=b"]).is_none());
    }

    #[test]
    fn a_configuration_with_any_change_is_rejected_or_read() {
        use crate::generated_input::changed_text;
        let block = "terraform {\n  backend \"s3\" {\n    bucket = \"b\"\n    key = \"a${1 + 2}\"\n    \
                     endpoints = { s3 = \"http://x\" }\n    list = [1, \"two\", [3]]\n  }\n}\n";
        let json = r#"{"terraform": [{"backend": {"s3": {"bucket": "b", "list": [1, [2]]}}}]}"#;
        let strategy =
            (changed_text(block), changed_text(json), changed_text("[{a = \"b\"}, true, 7 % 2, [for x in [1] : x]]"));
        crate::generated_input::for_all(file!(), &strategy, |(block, json, value)| {
            let _ = in_hcl(&block);
            let _ = serde_json::from_str(&json).ok().and_then(|json| in_json(&json));
            let _ = of_text("endpoints", &value);
            Ok(())
        });
    }

    /// A value that is nested deeply must not overflow the stack, which no handler of panics catches.
    #[test]
    fn a_value_that_is_nested_deeply_is_rejected_or_read() {
        for depth in [10, 1000, 100_000] {
            for (open, close) in
                [("[", "]"), ("{a=", "}"), ("(", ")"), ("\"${", "}\""), ("f(", ")"), ("!", ""), ("-", "")]
            {
                let value = format!("{}1{}", open.repeat(depth), close.repeat(depth));
                let _ = of_text("endpoints", &value);
                let _ = of_text("endpoints", &format!("[{value}]"));
                let _ = in_hcl(&format!("terraform {{\nbackend \"s3\" {{\nbucket = {value}\n}}\n}}\n"));
            }
            let blocks = format!("{}{}", "a {\n".repeat(depth), "}\n".repeat(depth));
            let _ = in_hcl(&blocks);
        }
    }
}
