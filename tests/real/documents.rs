//! Every command that README.md and docs/ tell the reader to type works as it is written there.
//!
//! Above each block of commands, a comment says in which directory it is tried, and the exit code of its lines if that
//! is not 0: `<!-- try: stuck, ends: 2 -->`. If a block cannot be tried like this, the comment names the file of this
//! repository in which it is tried: `<!-- tried in: Makefile -->`. The file must contain the block's lines. In a
//! `console` block, the lines with a `$ ` are typed, and the lines below them must be the output, except for numbers
//! and IDs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::locks_doctor::unfit;
use super::locks_release::old_lock;
use crate::support::process::Run;
use crate::support::terminal::Terminal;
use crate::support::test_env::which;
use crate::support::{Lock, Subject, TestEnv};

/// A block of a document, with the comment above it.
#[derive(Debug)]
struct Block {
    /// Its file and line.
    at: String,
    language: String,
    comment: String,
    lines: Vec<String>,
}

/// The languages of blocks that a reader types. The shell is bash unless the language is another shell.
const TYPED: [&str; 4] = ["sh", "console", "zsh", "fish"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn documents() -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    all.push(root().join("README.md"));
    all.sort();
    all
}

/// Returns the fenced blocks of a document, however they are indented.
fn blocks(path: &Path) -> Vec<Block> {
    let text = fs::read_to_string(path).unwrap();
    let mut blocks = Vec::new();
    let mut comment = String::new();
    let mut open: Option<Block> = None;
    for (number, line) in text.lines().enumerate() {
        let at = format!("{}:{}", path.strip_prefix(root()).unwrap().display(), number + 1);
        let line = line.trim();
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(language)) => {
                let (language, comment) = (language.to_owned(), std::mem::take(&mut comment));
                open = Some(Block { at, language, comment, lines: Vec::new() });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.lines.push(line.to_owned()),
            (None, None) if line.starts_with("<!--") => line.clone_into(&mut comment),
            (None, None) if line.is_empty() => {}
            (None, None) => comment.clear(),
        }
    }
    assert!(open.is_none(), "{}: a block does not end", path.display());
    blocks
}

/// Returns the directory in which a block is tried.
fn situation(name: &str) -> TestEnv {
    let mut env = match name {
        "directory" | "both" => TestEnv::new(Lock::Both, "true"),
        "lockfile" => TestEnv::new(Lock::File, "true"),
        // A lock of this user on this host whose terraform is dead.
        "stuck" | "stuck-table" => {
            let env = TestEnv::new(if name == "stuck" { Lock::File } else { Lock::DynamoDb }, "true");
            old_lock(&env);
            env
        }
        "digest" => unfit(Lock::DynamoDb),
        "errored" => {
            let env = TestEnv::new(Lock::File, "true");
            assert_eq!(env.run(Subject::Bare, &["apply", "-auto-approve"]).code(), Some(0));
            env.write("errored.tfstate", &env.run(Subject::Bare, &["state", "pull"]).out);
            env
        }
        _ => panic!("there is no situation {name}"),
    };
    env.set("AWS_REGION", "us-east-1");
    fs::write(env.directory.join("deploy.sh"), "#!/bin/sh\nterraform apply -auto-approve\n").unwrap();
    env
}

/// Replaces the example names in the documents by the real ones.
fn with_real_names(line: &str, env: &TestEnv) -> String {
    line.replace("terraform-locks", &env.table).replace("example-terraform-state", &env.bucket)
}

/// Returns the output without everything that differs between runs.
fn gist(text: &str) -> String {
    let words = text.split_whitespace().map(|word| {
        let hexadecimal = |character: char| character.is_ascii_hexdigit() || character == '-';
        let plain = word.trim_matches(|character: char| !character.is_alphanumeric());
        if plain.len() == 36 && plain.chars().all(hexadecimal) {
            return "ID".to_owned();
        }
        let mut gist = String::new();
        for character in word.chars() {
            if !character.is_ascii_digit() {
                gist.push(character);
            } else if !gist.ends_with('0') {
                gist.push('0');
            }
        }
        gist
    });
    words.collect::<Vec<_>>().join(" ")
}

fn value<'a>(comment: &'a str, key: &str) -> Option<&'a str> {
    let words = comment.strip_prefix("<!--")?.strip_suffix("-->")?;
    words.split(',').find_map(|word| word.trim().strip_prefix(key)).map(str::trim)
}

fn try_out(block: &Block) {
    if let Some(file) = value(&block.comment, "tried in:") {
        let text =
            fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{}: {file}: {error}", block.at));
        for line in &block.lines {
            let command = line.strip_prefix("$ ").unwrap_or(line).split("  #").next().unwrap().trim();
            assert!(text.contains(command), "{}: {command:?} does not stand in {file}", block.at);
        }
        return;
    }
    let name =
        value(&block.comment, "try:").unwrap_or_else(|| panic!("{}: no comment says where it is tried", block.at));
    let env = situation(name);
    let console = block.language == "console";
    let mut ends =
        value(&block.comment, "ends:").unwrap_or("0").split(' ').map(|end| end.parse::<i32>().unwrap()).cycle();
    let mut answer = String::new();
    for line in block.lines.iter().filter(|line| !line.is_empty()) {
        let command = if console { line.strip_prefix("$ ") } else { Some(line.as_str()) };
        let Some(command) = command else {
            let expected = with_real_names(line, &env);
            assert!(
                expected == "..." || gist(&answer).contains(&gist(&expected)),
                "{}: {expected:?} is not in\n{answer}",
                block.at
            );
            continue;
        };
        let shell = if ["zsh", "fish"].contains(&&*block.language) { &block.language } else { "bash" };
        if which(shell).is_none() {
            return;
        }
        let mut typed = env.command(shell);
        let command = with_real_names(command, &env);
        let code = if console {
            typed.args(["-c", &format!("stty cols 110\n{command}")]);
            let mut terminal = Terminal::start(typed);
            if let Some(answer) = value(&block.comment, "answers:") {
                terminal.wait_for("To confirm, type");
                terminal.type_in(&format!("{answer}\r"));
            }
            let code = terminal.wait().code();
            answer = terminal.screen_at_its_end();
            code
        } else {
            typed.args(["-c", &command]);
            let end = Run::start(typed).wait();
            answer = format!("{}{}", end.out, end.err);
            end.code()
        };
        assert_eq!(code, ends.next(), "{}: {command}\n{answer}\n{}", block.at, env.trace());
    }
}

#[test]
fn every_command_of_the_documents_works_as_it_stands_there() {
    let blocks: Vec<Block> = documents().iter().flat_map(|path| blocks(path)).collect();
    let typed: Vec<&Block> = blocks.iter().filter(|block| TYPED.contains(&&*block.language)).collect();
    assert!(typed.len() > 20, "the documents are read: {}", typed.len());
    for block in &blocks {
        let known =
            TYPED.iter().chain(&["text", "yaml", "hcl", "json", "go"]).any(|language| *language == block.language);
        assert!(known, "{}: what is {:?}?", block.at, block.language);
    }
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let (one, other) = typed.split_at(typed.len() / 2);
        for half in [one, other] {
            let failed = &failed;
            scope.spawn(move || {
                for block in half {
                    // Each panic prints its own message.
                    if std::panic::catch_unwind(|| try_out(block)).is_err() {
                        failed.lock().unwrap().push(&block.at);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "not as the document says: {failed:?}");
}

/// The target of each link within the repository exists, and so does the heading.
#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let anchor = |heading: &str| {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.chars().filter(|character| character.is_alphanumeric() || "-_".contains(*character)).collect::<String>()
    };
    let mut seen = 0;
    for path in documents().into_iter().chain(["ARCHITECTURE.md", "CHANGELOG.md"].map(|name| root().join(name))) {
        let text = fs::read_to_string(&path).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") {
                continue;
            }
            seen += 1;
            let (file, heading) =
                target.split_once('#').map_or((target, None), |(file, heading)| (file, Some(heading)));
            let file = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(file.exists(), "{}: {target}", path.display());
            if let Some(heading) = heading {
                let text = fs::read_to_string(&file).unwrap();
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                let found = headings.any(|line| anchor(line.trim_start_matches('#').trim()) == heading);
                assert!(found, "{}: {target}", path.display());
            }
        }
    }
    assert!(seen > 10, "the documents are read: {seen}");
}

/// Each test with real processes that docs/protocol.md names exists.
#[test]
fn every_invariant_of_the_protocol_has_a_test_that_is_there() {
    let text = fs::read_to_string(root().join("docs/protocol.md")).unwrap();
    let tables = text.split("\n| what is always true").skip(1);
    let rows: Vec<_> =
        tables.flat_map(|table| table.lines().skip(2).take_while(|line| line.starts_with('|'))).collect();
    assert!(rows.len() >= 15, "both tables are read: {rows:?}");
    for row in rows {
        let cell = row.trim_matches('|').split(" | ").nth(2).unwrap_or_default();
        let names: Vec<_> = cell.split('`').skip(1).step_by(2).filter(|name| *name != "tf").collect();
        assert!(!names.is_empty(), "no test: {row}");
        for name in names {
            let (module, function) = name.rsplit_once("::").unwrap_or((name, ""));
            let file = fs::read_to_string(root().join(format!("tests/real/{}.rs", module.replace("::", "/"))));
            assert!(file.is_ok_and(|text| text.contains(&format!("fn {function}"))), "there is no test {name}");
        }
    }
}

/// Each test that docs/promises.md names exists, and each document with promises is in its table.
#[test]
fn every_promise_has_a_test_that_is_there() {
    let text = fs::read_to_string(root().join("docs/promises.md")).unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| promise"))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    assert!(rows.len() > 200, "the table is read: {}", rows.len());
    let has = |path: String, function: &str| {
        fs::read_to_string(root().join(path)).is_ok_and(|text| text.contains(&format!("fn {function}(")))
    };
    for row in &rows {
        let [promise, _, holders] = row[..] else { panic!("not three cells: {row:?}") };
        for holder in holders.split('`').skip(1).step_by(2).filter(|holder| holder.contains("::")) {
            let (place, function) = holder.rsplit_once("::").unwrap();
            let path = match place.strip_prefix("elsewhere::") {
                Some(module) => format!("tests/elsewhere/{module}.rs"),
                None if place.starts_with("src/") => place.to_owned(),
                None => format!("tests/real/{}.rs", place.replace("::", "/")),
            };
            assert!(has(path, function), "{promise}: there is no test {holder}");
        }
    }
    for path in documents() {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        let generated = ["docs/backends.md", "docs/promises.md"].contains(&name.as_str());
        assert!(generated || text.contains(&format!("`{name}`")), "{name} promises nothing?");
    }
}
