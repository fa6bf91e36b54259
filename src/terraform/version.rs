//! Which program and version a terraform is, and how much its log reports about its locks.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The program that is started under the name terraform or tofu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Product {
    /// HashiCorp's Terraform.
    Terraform,
    /// OpenTofu, the fork of Terraform.
    OpenTofu,
}

/// A program and its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Version {
    product: Product,
    /// The version as the program writes it: `1.11.4`, `1.6.0 dev`.
    text: String,
}

/// How much a log reports about a lock of the S3 backend, and at which log level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogDetail {
    /// Terraform since 1.10 logs, at INFO: the lock's ID before the request, the acquisition, and the release.
    Full,
    /// Terraform 1.6 to 1.9 logs, at INFO: the lock's ID before the request and before the release, but no results.
    IdsOnly,
    /// Terraform 0.15 to 1.5 and OpenTofu since 1.11 log, at DEBUG: the requests to the services and their responses.
    HttpTraffic,
    /// OpenTofu up to 1.10 logs, at TRACE: that a lock was acquired, but not which one.
    AcquireOnly,
    /// Terraform before 0.15 logs nothing about a lock.
    None,
}

impl LogDetail {
    /// Returns the value of terraform's `TF_LOG_CORE` that is necessary for this log detail.
    pub(crate) fn level(self) -> &'static str {
        match self {
            Self::Full | Self::IdsOnly | Self::None => "INFO",
            Self::HttpTraffic => "DEBUG",
            Self::AcquireOnly => "TRACE",
        }
    }
}

/// The maximum length of a version from a log, in characters. The rest is cut off.
const MAX_TEXT_CHARACTERS: usize = 128;

impl Version {
    /// Parses the first record of a log. `message` is `Terraform version` or `OpenTofu version`, and `rest` is the text
    /// after it (main.go of both programs). `None` if the record does not report a version.
    pub(crate) fn of_record(message: &str, rest: &str) -> Option<Self> {
        let product = match message {
            "Terraform version" => Product::Terraform,
            "OpenTofu version" => Product::OpenTofu,
            _ => return None,
        };
        Some(Self { product, text: rest.trim().chars().take(MAX_TEXT_CHARACTERS).collect() })
    }

    /// Parses the first line of the output of `terraform version`: `Terraform v1.11.4`. `None` if it has another form.
    pub(crate) fn of_command(output: &str) -> Option<Self> {
        let mut words = output.lines().next()?.split_whitespace();
        let product = match words.next()? {
            "Terraform" => Product::Terraform,
            "OpenTofu" => Product::OpenTofu,
            _ => return None,
        };
        let text = words.next()?.strip_prefix('v')?;
        text.starts_with(|first: char| first.is_ascii_digit()).then(|| Self { product, text: text.to_owned() })
    }

    /// Returns the version as the program writes it, for example `1.11.4` or `1.6.0 dev`.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Returns the version in the form in which terraform writes it into a lock: without a suffix such as `-rc1`.
    pub(crate) fn in_locks(&self) -> &str {
        self.text.split([' ', '-', '+']).next().unwrap_or_default()
    }

    /// Returns whether this is Terraform or OpenTofu.
    pub(crate) fn product(&self) -> Product {
        self.product
    }

    fn numbers(&self) -> (u32, u32) {
        let mut numbers = self.in_locks().split('.').map(|part| part.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }

    /// Returns how much the log of this version reports about a lock.
    pub(crate) fn log_detail(&self) -> LogDetail {
        match (self.product, self.numbers()) {
            (Product::Terraform, (1, 10..) | (2.., _)) => LogDetail::Full,
            (Product::Terraform, (1, 6..)) => LogDetail::IdsOnly,
            (Product::Terraform, (1, _) | (0, 15..)) | (Product::OpenTofu, (1, 11..) | (2.., _)) => {
                LogDetail::HttpTraffic
            }
            (Product::OpenTofu, _) => LogDetail::AcquireOnly,
            (Product::Terraform, _) => LogDetail::None,
        }
    }

    /// Whether this version runs as two processes (panicwrap, up to Terraform 1.0). The outer process ignores
    /// interrupts, because it expects that the terminal sends them to both processes.
    pub(crate) fn is_two_processes(&self) -> bool {
        self.product == Product::Terraform && self.numbers() < (1, 1)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} {}", self.product, self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terraform(text: &str) -> Version {
        Version::of_record("Terraform version", text).unwrap()
    }

    fn tofu(text: &str) -> Version {
        Version::of_record("OpenTofu version", text).unwrap()
    }

    #[test]
    fn each_version_has_its_own_telling() {
        for (version, log_detail) in [
            (terraform("0.14.11"), LogDetail::None),
            (terraform("0.15.0 rc2"), LogDetail::HttpTraffic),
            (terraform("1.0.11"), LogDetail::HttpTraffic),
            (terraform("1.5.7"), LogDetail::HttpTraffic),
            (terraform("1.6.0 beta1"), LogDetail::IdsOnly),
            (terraform("1.9.8"), LogDetail::IdsOnly),
            (terraform("1.10.0"), LogDetail::Full),
            (terraform("1.17.0 dev"), LogDetail::Full),
            (terraform("2.0.0"), LogDetail::Full),
            (tofu("1.6.0 dev"), LogDetail::AcquireOnly),
            (tofu("1.10.9"), LogDetail::AcquireOnly),
            (tofu("1.11.0"), LogDetail::HttpTraffic),
            (tofu("1.12.6"), LogDetail::HttpTraffic),
        ] {
            assert_eq!(version.log_detail(), log_detail, "{version}");
        }
    }

    #[test]
    fn what_the_command_says_is_read() {
        assert_eq!(Version::of_command("Terraform v1.11.4\non linux_amd64\n"), Some(terraform("1.11.4")));
        assert_eq!(Version::of_command("OpenTofu v1.6.2\non linux_amd64\n"), Some(tofu("1.6.2")));
        for other in
            ["", "Terraform", "Terraform 1.5", "tenv version v1.2.3", "No version is set for command terraform"]
        {
            assert_eq!(Version::of_command(other), None, "{other:?}");
        }
        assert_eq!(terraform("1.6.0 dev").in_locks(), "1.6.0");
        assert_eq!(terraform("1.12.0-rc1").in_locks(), "1.12.0");
    }

    #[test]
    fn only_an_old_terraform_is_two_processes() {
        assert!(terraform("1.0.11").is_two_processes() && terraform("0.15.0").is_two_processes());
        assert!(!terraform("1.1.0").is_two_processes() && !tofu("1.0.0").is_two_processes());
    }
}
