//! `tf locks shell-init`: prints shell code that makes the command `terraform` run `tf`. In an interactive shell, it
//! also sets up Tab completion for both names.
//!
//! The code is only printed, because `tf` never edits a user's start-up files.

use clap::{Args, ValueEnum};

use super::connection::Trouble;
use super::{Finding, own_path};
use crate::console;

pub(super) const EXAMPLES: &str = "Examples:
  eval \"$(tf locks shell-init bash)\"          in ~/.bashrc
  eval \"$(tf locks shell-init zsh)\"           in ~/.zshrc
  tf locks shell-init fish | source           in ~/.config/fish/config.fish
  begin=$(tf locks shell-init sh) && eval \"$begin\"
                                              in a script: see also `tf locks shim`

Exit codes: 0 it was printed, 1 the command failed.";

/// A shell that `tf` supports.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
    /// A POSIX shell script: puts links named terraform and tofu on PATH, and removes them when the script exits
    Sh,
}

#[derive(Args, Clone, Debug)]
pub(super) struct ShellInit {
    /// The shell that reads the output
    shell: Shell,
    /// Do not define the alias `terraform`; only complete `tf`
    #[arg(long)]
    no_alias: bool,
}

impl ShellInit {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let own = own_path::find().map_err(|error| Trouble::Said(format!("could not find the path of tf: {error}")))?;
        let program = if own.on_path {
            "tf"
        } else {
            own.path
                .to_str()
                .ok_or_else(|| Trouble::Said(format!("the path of tf is not UTF-8: {}", own.path.display())))?
        };
        console::print_for_program(&text(self.shell, program, !self.no_alias));
        Ok(Finding::Nothing)
    }
}

/// Returns the code for `shell`. `program` is `tf`, or the path of this program if `tf` on PATH is another one. `alias`
/// says whether to define the alias `terraform`.
///
/// The alias is `command tf` and not `tf`, because many users have an alias `tf` for terraform. Each alias would then
/// expand to the other, and `terraform` would run terraform without `tf`.
fn text(shell: Shell, program: &str, alias: bool) -> String {
    let word = if let Shell::Fish = shell { quoted_for_fish(program) } else { console::quoted(program) };
    let command = if program == "tf" { "command tf" } else { word.as_str() };
    // The shell code, the text before the program's name in the line that sets it, and the lines that define the alias.
    let (text, line, alias_lines) = match shell {
        Shell::Bash => (
            include_str!("../../shell/completions/tf.bash"),
            "_tf_program=",
            format!("alias terraform={}\ncomplete -F _tf_or_terraform terraform\n", console::quoted(command)),
        ),
        // This arm is only for the command `tf`. zsh does not complete an alias for a path with a quote in it, so the
        // next arm defines a function.
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
        // The user's options, for example KSH_ARRAYS, do not apply inside this function. What the code defines is still
        // defined for the whole shell.
        text = format!("() {{\nemulate -L zsh\n{text}}}\n");
    }
    text
}

/// Quotes a word for fish. Inside single quotes, fish needs a backslash before a quote and before a backslash (fish(1),
/// Quotes).
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
