//! `tf locks shell-init`: what a shell has to read so that a person who types `terraform` there gets `tf`, and Tab completes
//! both.
//!
//! The text is printed and never written: nobody's start-up file is ours.

use crate::console;
use clap::{Args, ValueEnum};

use super::Finding;
use super::connection::Trouble;
use super::own_path;

pub(super) const EXAMPLES: &str = "Examples:
  eval \"$(tf locks shell-init bash)\"          in ~/.bashrc
  eval \"$(tf locks shell-init zsh)\"           in ~/.zshrc
  tf locks shell-init fish | source           in ~/.config/fish/config.fish
  begin=$(tf locks shell-init sh) && eval \"$begin\"
                                              in a script: see also `tf locks shim`

Exit codes: 0 it was printed, 1 it could not be.";

/// A shell that we know.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
    /// Any POSIX shell, for a script: links on PATH, which are gone at its exit
    Sh,
}

#[derive(Args, Clone, Debug)]
pub(super) struct ShellInit {
    /// The shell that reads it
    shell: Shell,
    /// Leave `terraform` what it is: only complete `tf`
    #[arg(long)]
    no_alias: bool,
}

impl ShellInit {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let own = own_path::find().map_err(|error| Trouble::Said(format!("where tf lies is not known: {error}")))?;
        let program = if own.on_path {
            "tf"
        } else {
            own.path.to_str().ok_or_else(|| Trouble::Said(format!("{} is not UTF-8", own.path.display())))?
        };
        console::print(&text(self.shell, program, !self.no_alias));
        Ok(Finding::Nothing)
    }
}

/// What `shell` has to read, where `program` is how `tf` is called.
///
/// The alias stands for `command tf` and not for `tf`: many people have an alias of that name, for terraform. Each of the
/// two would then stand for the other, and whoever types `terraform` would get terraform alone.
fn text(shell: Shell, program: &str, alias: bool) -> String {
    let word = if let Shell::Fish = shell { quoted_for_fish(program) } else { console::quoted(program) };
    let command = if program == "tf" { "command tf" } else { word.as_str() };
    // What stands before the program's name in the line that gives it, and what makes the alias.
    let (text, line, alias_lines) = match shell {
        Shell::Bash => (
            include_str!("../../shell/completions/tf.bash"),
            "_tf_program=",
            format!("alias terraform={}\ncomplete -F _tf_or_terraform terraform\n", console::quoted(command)),
        ),
        // An alias that is a path with a quote in it is not completed as what it stands for.
        Shell::Zsh if program == "tf" => (
            include_str!("../../shell/completions/_tf"),
            "_tf_program=",
            "alias terraform='command tf'\n_tf_complete terraform\n".to_owned(),
        ),
        Shell::Zsh => (
            include_str!("../../shell/completions/_tf"),
            "_tf_program=",
            format!(
                "unalias terraform 2>/dev/null || :\nfunction terraform {{\n{word} \"$@\"\n}}\n_tf_complete terraform\n"
            ),
        ),
        Shell::Fish => (
            include_str!("../../shell/completions/tf.fish"),
            "__tf_program ",
            format!("alias terraform {}\ncomplete -c terraform -w tf\n", quoted_for_fish(command)),
        ),
        Shell::Sh => (include_str!("../../shell/tf.sh"), "_tf_program=", String::new()),
    };
    let mut text = text.replacen(&format!("{line}tf\n"), &format!("{line}{word}\n"), 1);
    if alias {
        text.push_str(&alias_lines);
    }
    if let Shell::Zsh = shell {
        // Whatever options somebody has set (KSH_ARRAYS, for one) stay out of it. What is defined here is for the shell.
        text = format!("() {{\nemulate -L zsh\n{text}}}\n");
    }
    text
}

/// A word that fish takes as it is: within its quotes a backslash stands before a quote and before itself (fish(1), Quotes).
fn quoted_for_fish(word: &str) -> String {
    if console::quoted(word) == word {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\\', r"\\").replace('\'', r"\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_named_where_each_shell_looks_for_it() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Sh] {
            let here = text(shell, "/opt/it's here/tf", true);
            let quoted = if let Shell::Fish = shell { r"'/opt/it\'s here/tf'" } else { r"'/opt/it'\''s here/tf'" };
            assert!(here.contains(quoted), "{shell:?}");
            assert_eq!(text(shell, "tf", false).matches("alias terraform").count(), 0, "{shell:?}");
        }
    }
}
