//! Terraform's command line. `tf` parses only the parts that it needs, and never changes the command line.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The parts of a command line that `tf` needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CommandLine {
    /// The value of the last `-chdir`. `None` if there is none. Terraform accepts `-chdir` only before the subcommand
    /// and only with `=` (main.go, extractChdirOption).
    pub(crate) directory: Option<PathBuf>,
    /// The subcommand. After `state`, `workspace` and `providers`, also the next word, unless that word is a flag.
    words: Vec<OsString>,
    /// The words after the subcommand that do not begin with `-`: the names of workspaces and files, and also the
    /// values of flags, if a value is a separate word.
    pub(crate) operands: Vec<OsString>,
    /// The values of `-backend-config`, in their order. Each is `NAME=VALUE` or the path of a file.
    pub(crate) backend_configs: Vec<OsString>,
    asks_for_help_or_version: bool,
}

impl CommandLine {
    /// Parses `arguments`, which do not include the name of the program.
    pub(crate) fn parse(arguments: &[OsString]) -> Self {
        let mut directory = None;
        let mut rest = arguments;
        let mut asks = false;
        while let [first, others @ ..] = rest {
            let bytes = first.as_bytes();
            if let Some(value) = bytes.strip_prefix(b"-chdir=") {
                directory = Some(PathBuf::from(OsStr::from_bytes(value)));
            } else if bytes.starts_with(b"-") {
                asks |= is_help(first) || is_version(first);
            } else {
                break;
            }
            rest = others;
        }
        let (words, operands) = match rest {
            [] => (Vec::new(), &[][..]),
            [command, others @ ..] => {
                // `env` is the earlier name of `workspace`. Terraform still accepts it (commands.go).
                let command = if command == "env" { OsStr::new("workspace") } else { command.as_os_str() };
                let mut words = vec![command.to_owned()];
                let nested = ["state", "workspace", "providers"].iter().any(|name| command == *name);
                match others {
                    [word, behind @ ..] if nested && !word.as_bytes().starts_with(b"-") => {
                        words.push(word.clone());
                        (words, behind)
                    }
                    _ => (words, others),
                }
            }
        };
        // `-help` directly after the subcommand cannot be the value of another flag.
        asks |= operands.first().is_some_and(|first| is_help(first));
        let backend_configs = backend_configs(operands);
        let operands = operands.iter().filter(|operand| !operand.as_bytes().starts_with(b"-")).cloned().collect();
        Self { directory, words, operands, backend_configs, asks_for_help_or_version: asks }
    }

    /// Returns the subcommand in the form of terraform's help: `apply`, `state mv`. Empty if there is none.
    pub(crate) fn command(&self) -> String {
        let words: Vec<_> = self.words.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    /// Whether the command can take a state lock. True for an unknown command.
    ///
    /// Nearly every command can take a lock, even one that only reads. The reason is that the S3 backend takes a lock
    /// while it creates the state of a workspace that does not exist yet, for any command that needs that state
    /// (backend/remote-state/s3/backend_state.go, StateMgr).
    ///
    /// `more_arguments` is true if `TF_CLI_ARGS` or a `TF_CLI_ARGS_*` variable is set. Terraform inserts the words of
    /// these variables after the first word that is not a flag (main.go, mergeEnvArgs). There they may change the
    /// command.
    pub(crate) fn can_lock(&self, more_arguments: bool) -> bool {
        let words: Vec<_> = self.words.iter().map(|word| word.as_bytes()).collect();
        match words.as_slice() {
            [] => more_arguments,
            _ if self.asks_for_help_or_version => false,
            [b"version" | b"fmt" | b"validate" | b"get" | b"login" | b"logout" | b"metadata"] => false,
            [b"providers", b"lock" | b"mirror"] | [b"workspace", b"show"] => more_arguments,
            _ => true,
        }
    }

    /// Whether the command locks the state of the selected workspace, unless it has the argument `-lock=false`. `init`
    /// and `workspace` commands lock too, but only while they create or migrate a state. `arguments` is the whole
    /// command line. `variable` returns the value of an environment variable: the words of `TF_CLI_ARGS` and of
    /// `TF_CLI_ARGS_COMMAND` are arguments, too.
    pub(crate) fn locks_selected_state(
        &self,
        arguments: &[OsString],
        variable: impl Fn(&str) -> Option<String>,
    ) -> bool {
        let words: Vec<_> = self.words.iter().map(|word| word.as_bytes()).collect();
        let locks = match words.as_slice() {
            [b"plan" | b"apply" | b"destroy" | b"refresh" | b"import" | b"console" | b"taint" | b"untaint"] => true,
            [b"state", word] => matches!(*word, b"mv" | b"rm" | b"push" | b"replace-provider"),
            _ => false,
        };
        locks && !self.asks_for_help_or_version && {
            let mut all = words_of_variables(&self.command(), variable);
            all.extend_from_slice(arguments);
            !disables_locking(&all)
        }
    }

    /// Whether terraform ignores every SIGINT and SIGTERM during this command. Terraform catches both signals for all
    /// commands (commands.go, makeShutdownCh), but these commands never check whether a signal has arrived.
    pub(crate) fn ignores_interrupts(&self) -> bool {
        let first = self.words.first().map(|word| word.as_bytes());
        matches!(
            first,
            Some(
                b"import"
                    | b"state"
                    | b"taint"
                    | b"untaint"
                    | b"workspace"
                    | b"console"
                    | b"force-unlock"
                    | b"show"
                    | b"graph"
            )
        )
    }

    /// Whether the log of this command reports, for every backend, that a lock was acquired
    /// (internal/backend/local/backend_local.go, and its callers).
    pub(crate) fn logs_its_lock(&self) -> bool {
        logs_its_lock(&self.command())
    }

    /// Returns the path of the plan that `apply` applies: the last word after `apply` that is the path of a file.
    /// `None` if there is no such word, or for another command. The result is a guess, because only terraform can
    /// distinguish the values of flags from other words.
    pub(crate) fn plan(&self, current: &Path) -> Option<PathBuf> {
        let directory = self.working_directory(current);
        let mut words = self.operands.iter().rev().filter(|_| self.command() == "apply");
        words.find_map(|word| Some(directory.join(word)).filter(|path| path.is_file()))
    }

    /// Returns the directory in which terraform works: `current`, changed by `-chdir`.
    pub(crate) fn working_directory(&self, current: &Path) -> PathBuf {
        match &self.directory {
            Some(directory) => current.join(directory),
            None => current.to_owned(),
        }
    }
}

/// Returns the same as [`CommandLine::logs_its_lock`] for `command`, which has the form of [`CommandLine::command`].
pub(crate) fn logs_its_lock(command: &str) -> bool {
    matches!(command, "plan" | "apply" | "destroy" | "refresh" | "import" | "console")
}

/// Whether `arguments` contain `-lock=false` in any of Go's spellings of false (strconv.ParseBool).
fn disables_locking(arguments: &[OsString]) -> bool {
    let value = |argument: &OsString| {
        let flag = argument.as_bytes().strip_prefix(b"-")?;
        flag.strip_prefix(b"-").unwrap_or(flag).strip_prefix(b"lock=").map(<[u8]>::to_vec)
    };
    arguments
        .iter()
        .rev()
        .find_map(value)
        .is_some_and(|last| matches!(last.as_slice(), b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False"))
}

/// Returns the values of `-backend-config` in `arguments`. A value is the text after `=`, or the next word.
pub(crate) fn backend_configs(arguments: &[OsString]) -> Vec<OsString> {
    let mut found = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.as_bytes().strip_prefix(b"-") else { continue };
        let flag = flag.strip_prefix(b"-").unwrap_or(flag);
        match flag.strip_prefix(b"backend-config") {
            Some(b"") => found.extend(arguments.next().cloned()),
            Some([b'=', value @ ..]) => found.push(OsStr::from_bytes(value).to_owned()),
            _ => {}
        }
    }
    found
}

/// Returns the words of the `TF_CLI_ARGS` variables for `command`, in the order in which terraform inserts them before
/// the arguments of the command line: first those for the command, and then those for all commands (main.go,
/// `mergeEnvArgs`). `variable` returns the value of an environment variable.
pub(crate) fn words_of_variables(command: &str, variable: impl Fn(&str) -> Option<String>) -> Vec<OsString> {
    let of_command = format!("TF_CLI_ARGS_{}", command.replace(['-', ' '], "_"));
    [&of_command, "TF_CLI_ARGS"].into_iter().filter_map(variable).flat_map(|text| words_of_variable(&text)).collect()
}

/// Returns the words in `text`, the value of a `TF_CLI_ARGS` variable. Empty if a quote is not closed: terraform does
/// not start then (main.go, `mergeEnvArgs`).
fn words_of_variable(text: &str) -> Vec<OsString> {
    shell_words::split(text).unwrap_or_default().into_iter().map(OsString::from).collect()
}

/// Whether the argument requests help (hashicorp/cli, `processArgs`).
fn is_help(argument: &OsStr) -> bool {
    ["-h", "-help", "--help"].iter().any(|name| argument == *name)
}

/// Whether terraform replaces the argument with the `version` command (main.go).
fn is_version(argument: &OsStr) -> bool {
    ["-v", "-version", "--version"].iter().any(|name| argument == *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> CommandLine {
        let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        CommandLine::parse(&arguments)
    }

    #[test]
    fn a_command_that_locks_the_selected_state_is_known() {
        for (line, expected) in [
            ("plan", true),
            ("-chdir=a apply -auto-approve", true),
            ("destroy", true),
            ("state mv a b", true),
            ("state list", false),
            ("untaint a", true),
            ("plan -lock=true", true),
            ("plan -lock-timeout=1m", true),
            ("plan -lock=false", false),
            ("plan --lock=F", false),
            ("plan -lock=false -lock=true", true),
            ("plan -help", false),
            ("init", false),
            ("output", false),
            ("force-unlock x", false),
            ("workspace new a", false),
            ("env new a", false),
            ("", false),
        ] {
            let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            let command = CommandLine::parse(&arguments);
            assert_eq!(command.locks_selected_state(&arguments, |_| None), expected, "{line}");
        }
    }

    #[test]
    fn the_words_of_variables_come_before_the_arguments() {
        for (line, variables, expected) in [
            ("plan", &[("TF_CLI_ARGS_plan", "-lock=false")][..], false),
            ("plan", &[("TF_CLI_ARGS", "-no-color -lock=false")], false),
            ("plan", &[("TF_CLI_ARGS_apply", "-lock=false")], true),
            ("plan", &[("TF_CLI_ARGS_plan", "-lock=false"), ("TF_CLI_ARGS", "-lock=true")], true),
            ("plan", &[("TF_CLI_ARGS_plan", "-lock=true"), ("TF_CLI_ARGS", "-lock=false")], false),
            ("plan -lock=true", &[("TF_CLI_ARGS_plan", "-lock=false")], true),
            ("state mv a b", &[("TF_CLI_ARGS_state_mv", "-lock=false")], false),
            ("state replace-provider a b", &[("TF_CLI_ARGS_state_replace_provider", "'-lock=false'")], false),
            ("plan", &[("TF_CLI_ARGS_plan", "-lock=false '")], true),
        ] {
            let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            let variable =
                |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned());
            let command = CommandLine::parse(&arguments);
            assert_eq!(command.locks_selected_state(&arguments, variable), expected, "{line} {variables:?}");
        }
    }

    #[test]
    fn only_commands_that_cannot_lock_are_let_go() {
        for line in [
            "",
            "version",
            "-version",
            "--version",
            "-v",
            "fmt -check",
            "fmt",
            "validate -json",
            "-help",
            "-h",
            "apply -help",
            "plan -h",
            "-chdir=x version",
            "get -update",
            "login",
            "logout host",
            "providers lock",
            "providers mirror dir",
            "workspace show",
            "state -help",
            "state mv -help",
        ] {
            assert!(!parse(line).can_lock(false), "{line:?}");
        }
        for line in [
            "apply",
            "plan",
            "destroy",
            "refresh",
            "import a b",
            "init",
            "console",
            "state mv a b",
            "state list",
            "taint a",
            "workspace new w",
            "workspace select w",
            "workspace list",
            "show",
            "output",
            "test",
            "query",
            "graph",
            "providers",
            "providers schema -json",
            "force-unlock id",
            "a-command-of-tomorrow",
            "state",
            "-chdir=x apply",
            "apply -var -help",
            "state mv a -help",
        ] {
            assert!(parse(line).can_lock(false), "{line:?}");
        }
    }

    #[test]
    fn words_from_the_environment_may_make_another_command() {
        assert!(parse("").can_lock(true));
        assert!(parse("workspace show").can_lock(true));
        assert!(!parse("version").can_lock(true));
    }

    #[test]
    fn the_last_chdir_before_the_subcommand_counts() {
        assert_eq!(parse("-chdir=a plan -chdir=b").directory, Some(PathBuf::from("a")));
        assert_eq!(parse("plan -chdir=b").directory, None);
        assert_eq!(parse("-chdir=sub plan").working_directory(Path::new("/w")), Path::new("/w/sub"));
        assert_eq!(parse("-chdir=/abs plan").working_directory(Path::new("/w")), Path::new("/abs"));
    }

    #[test]
    fn the_command_has_one_word_or_two() {
        assert_eq!(parse("apply plan.out").command(), "apply");
        assert_eq!(parse("state mv -lock=true a b").command(), "state mv");
        assert_eq!(parse("workspace new green").operands, ["green"]);
        assert_eq!(parse("").command(), "");
    }

    #[test]
    fn each_backend_config_is_found_in_its_order() {
        let found = parse("init -backend-config=a=b --backend-config c.tfbackend -input=false -backend-config=d=e=f")
            .backend_configs;
        assert_eq!(found, ["a=b", "c.tfbackend", "d=e=f"]);
        assert!(parse("init -backend=false").backend_configs.is_empty());
    }

    #[test]
    fn a_plan_is_the_last_word_that_is_a_file() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("plan.out"), "").unwrap();
        let plan = |line: &str| parse(line).plan(directory.path());
        assert_eq!(plan("apply -var a=b plan.out"), Some(directory.path().join("plan.out")));
        for line in ["apply", "apply other", "plan -out plan.out", "show plan.out"] {
            assert_eq!(plan(line), None, "{line}");
        }
    }

    #[test]
    fn arguments_that_are_not_utf_8_are_read() {
        let arguments = [OsString::from("plan"), OsStr::from_bytes(b"\xff\xfe").to_owned(), OsString::new()];
        assert_eq!(CommandLine::parse(&arguments).command(), "plan");
        assert!(CommandLine::parse(&[OsStr::from_bytes(b"\xff").to_owned()]).can_lock(false));
    }

    /// Every command of Terraform 1.14 and OpenTofu 1.11 that can lock (commands.go of both), and names that are none.
    /// `output`, `graph` and `providers` are among them, because they create the state of a workspace that has none.
    const CAN_LOCK: [&str; 34] = [
        "apply",
        "console",
        "destroy",
        "force-unlock",
        "graph",
        "import",
        "init",
        "modules",
        "output",
        "plan",
        "providers",
        "providers schema",
        "push",
        "query",
        "refresh",
        "show",
        "stacks",
        "state",
        "state identities",
        "state list",
        "state mv",
        "state pull",
        "state push",
        "state replace-provider",
        "state rm",
        "state show",
        "taint",
        "test",
        "untaint",
        "workspace delete",
        "workspace list",
        "workspace new",
        "workspace select",
        "aply",
    ];

    /// A word that may follow the command: a flag, its value, a name or a path. It asks neither for help nor for the
    /// version. Many such words are also names of commands that cannot lock.
    fn word() -> impl proptest::strategy::Strategy<Value = String> {
        use proptest::prelude::*;
        prop_oneof![
            prop::sample::select(vec![
                "version",
                "fmt",
                "validate",
                "show",
                "lock",
                "-",
                "--",
                "-lock=false",
                "-var",
                "x=1",
                "-out=plan",
                "-json",
                "-no-color",
                "-state",
                "-chdir=x",
                "help",
                "-input=false",
                "",
            ])
            .prop_map(str::to_owned),
            "[a-z=./-]{0,12}",
        ]
        .prop_filter("asks for help or for the version", |word| {
            !["-h", "-help", "--help", "-v", "-version", "--version"].contains(&word.as_str())
        })
    }

    #[test]
    fn the_words_of_a_variable_are_split_at_blanks_and_quotes_are_removed() {
        for (text, words) in [
            ("", vec![]),
            ("  -a\t-b\n", vec!["-a", "-b"]),
            ("-a='b c' \"d e\"f", vec!["-a=b c", "d ef"]),
            (r#"a\ b \'c \"d\\"#, vec!["a b", "'c", "\"d\\"]),
            ("'' \"\"", vec!["", ""]),
            ("-a 'b", vec![]),
            ("-a \"b", vec![]),
        ] {
            assert_eq!(words_of_variable(text), words, "{text:?}");
        }
    }

    #[test]
    fn quoted_words_of_a_variable_are_read_back_and_any_other_text_has_bounded_words() {
        use proptest::prelude::*;
        let sample = "-backend-config=key=a -backend-config \"path/b c\" -var='x=\\y' '' \\\" #z";
        let strategy = (prop::collection::vec("\\PC{0,12}", 0..6), crate::generated_input::changed_text(sample));
        crate::generated_input::for_all(file!(), &strategy, |(words, text)| {
            let quoted: Vec<String> = words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect();
            let expected: Vec<OsString> = words.into_iter().map(OsString::from).collect();
            prop_assert_eq!(words_of_variable(&quoted.join(" ")), expected);
            // No splitting makes a text longer, and no word is made from nothing.
            let words = words_of_variable(&text);
            prop_assert!(words.len() + words.iter().map(|word| word.len()).sum::<usize>() <= text.len() + 1);
            backend_configs(&words);
            Ok(())
        });
    }

    #[test]
    fn a_command_that_can_lock_is_never_let_go() {
        let strategy = (
            proptest::option::of("[a-z/.-]{0,8}"),
            proptest::sample::select(CAN_LOCK.to_vec()),
            proptest::collection::vec(word(), 0..5),
            proptest::bool::ANY,
        );
        crate::generated_input::for_all(file!(), &strategy, |(directory, command, words, more_arguments)| {
            let directory = directory.map(|directory| format!("-chdir={directory}"));
            let arguments: Vec<OsString> = directory
                .into_iter()
                .chain(command.split(' ').map(str::to_owned))
                .chain(words)
                .map(OsString::from)
                .collect();
            let line = CommandLine::parse(&arguments);
            // `providers` and `workspace` take the next word for a part of the command, as terraform does.
            let is_other = matches!(line.command().as_str(), "providers lock" | "providers mirror" | "workspace show");
            proptest::prop_assert!(line.can_lock(more_arguments) || is_other, "{:?}", arguments);
            Ok(())
        });
    }
}
