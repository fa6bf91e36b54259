//! The AWS account that a run used for its backend, as far as `tf` can determine it without a request.
//!
//! A later process may have other credentials than the run had: the default profile was switched, a person logged in to
//! another account, or the recovery runs in another shell. So the run records its account, if the account can be
//! derived without a request: from the ARN of a role, the account of an SSO profile, the ID of an access key (which
//! contains the account), or `allowed_account_ids`. Terraform's own log cannot be used instead: it does not contain the
//! account at INFO (aws-sdk-go-base, `Retrieved caller identity from STS`).

use std::fmt::Write as _;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use aws_runtime::env_config::section::EnvConfigSections;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::credentials::{self, Owner};
use super::{connect, settings};
use crate::terraform::backend::CachedBackend;

/// The account of a backend's credentials, as far as it is known without a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AccountIdentity {
    /// The ID of the account, 12 digits. `None` if it is not known.
    pub(crate) account: Option<String>,
    /// A hash of the access key's ID. `None` if the account is known, or if the ID of the access key is unknown.
    pub(crate) key: Option<String>,
    /// A hash of the profile's settings for endpoints (`PLACE`). `None` if the shared files were not read, and in a
    /// record of an earlier version.
    #[serde(default)]
    reach: Option<String>,
}

impl AccountIdentity {
    /// Returns the identity for `backend`. `sections` are the shared files, or the reason why they cannot be read.
    /// `set` returns the value of an environment variable, or `None` if it is unset or empty. The hashes include the ID
    /// `run`, so the same access key has a different hash in each run.
    pub(crate) fn new(
        run: &str,
        backend: &CachedBackend,
        sections: Result<&EnvConfigSections, &str>,
        set: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let profile = sections.ok().and_then(|sections| sections.get_profile(sections.selected_profile()));
        let mut reach = String::new();
        for name in PLACE {
            let _ = writeln!(reach, "{}", profile.and_then(|profile| profile.get(name)).unwrap_or_default());
        }
        let (account, key) = match credentials::owner(backend, sections, set) {
            Owner::Account(account) => (is_account(&account).then_some(account), None),
            Owner::Role(arn) => (account_of_role(&arn), None),
            Owner::Key(id) => match account_of_key(&id) {
                Some(account) => (Some(account), None),
                None => (None, Some(hash(run, &id))),
            },
            Owner::Unknown => (None, None),
        };
        Self { account, key, reach: Some(hash(run, &reach)) }
    }

    /// Returns the identity for `backend` in the current environment of this process, with the current shared files.
    pub(crate) fn now(run: &str, backend: &CachedBackend) -> Self {
        // `profile_of` is asynchronous only because it reads files. The SDK reads a file without ever returning
        // `Pending` (aws-types, os_shim_internal), so a single poll is enough.
        let sections = at_once(connect::profile_of(backend)).unwrap_or_else(|| Err("they are read later".to_owned()));
        Self::new(run, backend, sections.as_ref().map_err(String::as_str), settings::set)
    }

    /// Returns the identity for `backend` as far as it is known without reading a file. The record that is written
    /// before terraform starts contains this identity.
    pub(crate) fn without_files(run: &str, backend: &CachedBackend) -> Self {
        let identity = Self::new(run, backend, Err("they are read later"), settings::set);
        // `reach` is a hash of the profile's endpoint settings. The shared files were not read, so the settings are
        // unknown.
        Self { reach: None, ..identity }
    }

    /// Returns the identity for a terraform that is about to start. If the account is not known otherwise and
    /// `allowed_account_ids` contains a single account, the result has that account. The reason is that terraform
    /// refuses to work in any other account (backend/remote-state/s3/backend.go, `VerifyAccountIDAllowed`).
    pub(crate) fn at_start(run: &str, backend: &CachedBackend) -> Self {
        let mut identity = Self::now(run, backend);
        if let (None, [only]) = (&identity.account, backend.strings("allowed_account_ids").as_slice())
            && is_account(only)
        {
            identity.account = Some((*only).to_owned());
        }
        identity
    }
}

/// The keys of a profile that decide to which endpoint a request is sent.
const PLACE: [&str; 5] =
    ["endpoint_url", "services", "use_fips_endpoint", "use_dualstack_endpoint", "ignore_configured_endpoint_urls"];

/// Polls a future once and returns its result. `None` if the future is not ready.
fn at_once<T>(work: impl Future<Output = T>) -> Option<T> {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

fn hash(run: &str, text: &str) -> String {
    let digest = Sha256::new().chain_update(run).chain_update([0]).chain_update(text).finalize();
    digest.iter().take(16).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns the account in `arn:PARTITION:iam::ACCOUNT:role/NAME`. `None` if `arn` has no account in this position.
fn account_of_role(arn: &str) -> Option<String> {
    let account = arn.split(':').nth(4)?;
    is_account(account).then(|| account.to_owned())
}

fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns the account that the ID of an access key contains. IDs that were created since 2019 contain it in base 32,
/// after the first four letters. `None` for an older ID, which contains no account: its fifth letter is in the first
/// half of the base-32 alphabet. With LocalStack and similar services, an account ID is itself the ID of a key. Such an
/// ID is returned unchanged.
fn account_of_key(key: &str) -> Option<String> {
    if is_account(key) {
        return Some(key.to_owned());
    }
    let letters = key.get(4..).filter(|letters| key.is_ascii() && letters.len() >= 12)?;
    let mut number: u128 = 0;
    for letter in letters.bytes().take(10) {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'2'..=b'7' => letter - b'2' + 26,
            _ => return None,
        };
        number = number << 5 | u128::from(value);
    }
    // The ten letters are 50 bits. The first bit is set if the ID contains an account. The next 40 bits are the
    // account.
    let first = u64::try_from(number >> 2).ok()?;
    let account = (first & 0x7fff_ffff_ff80) >> 7;
    (first >> 47 == 1).then(|| format!("{account:012}"))
}

/// How the current identity relates to the identity that a run recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// The account or the access key is the same. The endpoints are the same too, or the run did not record them.
    Same,
    /// The account, the access key or the endpoints differ. Or the run recorded an access key, and the current access
    /// key is unknown.
    Another,
    /// The run recorded this account. The current account is unknown, and must be requested from STS.
    Ask(String),
    /// The run recorded neither an account nor an access key.
    Unknown,
}

/// Compares the identity `then`, which a run recorded, with the current identity `now`. The endpoints are compared only
/// if the run recorded them.
pub(crate) fn relation(then: &AccountIdentity, now: &AccountIdentity) -> Relation {
    if then.reach.is_some() && then.reach != now.reach {
        return Relation::Another;
    }
    match (then, now) {
        (AccountIdentity { account: Some(then), .. }, AccountIdentity { account: Some(now), .. }) if then == now => {
            Relation::Same
        }
        (AccountIdentity { account: Some(_), .. }, AccountIdentity { account: Some(_), .. }) => Relation::Another,
        (AccountIdentity { account: Some(then), .. }, _) => Relation::Ask(then.clone()),
        (AccountIdentity { key: Some(then), .. }, AccountIdentity { key: Some(now), .. }) if then == now => {
            Relation::Same
        }
        (AccountIdentity { key: Some(_), .. }, _) => Relation::Another,
        (AccountIdentity { account: None, key: None, .. }, _) => Relation::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
    use aws_types::os_shim_internal::{Env, Fs};

    use super::*;
    use crate::terraform::backend::tests::backend;

    #[test]
    fn the_account_of_a_key() {
        // Keys with the prefix ASIA contain an account too. The example in the AWS documentation, AKIAIOSFODNN7EXAMPLE,
        // has none.
        assert_eq!(account_of_key("ASIAQNZGKIQY56JQ7WML").as_deref(), Some("029608264753"));
        assert_eq!(account_of_key("123456789012").as_deref(), Some("123456789012"));
        for key in ["AKIAIOSFODNN7EXAMPLE", "test", "", "AKIA", "AKIA0000000000000000"] {
            assert_eq!(account_of_key(key), None, "{key}");
        }
    }

    /// Returns the identity for the backend block `block` with the shared file `file` and the environment `variables`.
    fn identity(block: &str, file: &'static str, variables: &[(&str, &str)]) -> AccountIdentity {
        let backend = backend(block);
        let set = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        let files = EnvConfigFiles::builder().with_contents(EnvConfigFileKind::Config, file).build();
        let name = settings::profile_name(&backend, set);
        let (fs, env) = (Fs::real(), Env::from_slice(&[]));
        let sections = at_once(aws_config::profile::load(&fs, &env, &files, name.map(Into::into))).unwrap().unwrap();
        AccountIdentity::new("run", &backend, Ok(&sections), set)
    }

    #[test]
    fn the_account_is_known_where_something_says_it() {
        const ENV: &[(&str, &str)] = &[("AWS_ACCESS_KEY_ID", "111111111111"), ("AWS_SECRET_ACCESS_KEY", "s")];
        const WEB: &[(&str, &str)] =
            &[("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn:aws:iam::444455556666:role/x")];
        const STATIC: &str = "[default]\naws_access_key_id = 222222222222\naws_secret_access_key = s\n";
        const ROLE: &str = "[default]\nrole_arn = arn:aws:iam::333333333333:role/x\nsource_profile = p\n\
                            [profile p]\naws_access_key_id = 222222222222\naws_secret_access_key = s\n";
        const SSO: &str = "[default]\nsso_session = s\nsso_account_id = 555555555555\nsso_role_name = r\n";
        const PROCESS: &str = "[default]\ncredential_process = /bin/x\n";
        const ASSUME: &str = r#"{"assume_role":{"role_arn":"arn:aws:iam::666666666666:role/x"}}"#;
        for (block, file, variables, expected) in [
            ("{}", STATIC, ENV, Some("111111111111")),
            ("{}", STATIC, &[][..], Some("222222222222")),
            (r#"{"profile":"default"}"#, STATIC, ENV, Some("222222222222")),
            ("{}", ROLE, &[], Some("333333333333")),
            ("{}", STATIC, WEB, Some("444455556666")),
            ("{}", SSO, &[], Some("555555555555")),
            (ASSUME, STATIC, ENV, Some("666666666666")),
            (r#"{"role_arn":"arn:aws:iam::666666666666:role/x"}"#, STATIC, ENV, Some("666666666666")),
            (r#"{"access_key":"777777777777","secret_key":"s"}"#, STATIC, ENV, Some("777777777777")),
            ("{}", PROCESS, &[], None),
            ("{}", "", &[], None),
            ("{}", STATIC, &[("AWS_PROFILE", "gone")], None),
        ] {
            let found = identity(block, file, variables);
            assert_eq!((found.account.as_deref(), found.key), (expected, None), "{block} {file} {variables:?}");
        }
        let by = |key: &str| identity("{}", "", &[("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", "s")]);
        assert!(by("test").key.is_some() && by("test") == by("test") && by("test") != by("other"));
        assert!(!serde_json::to_string(&by("AKIAIOSFODNN7EXAMPLE")).unwrap().contains("AKIA"));
    }

    #[test]
    fn an_endpoint_of_the_profile_is_part_of_the_identity() {
        let at = |file: &'static str| identity(r#"{"access_key":"777777777777","secret_key":"s"}"#, file, &[]);
        let (plain, other) = (at(""), at("[default]\nendpoint_url = http://u:hunter2@x\n"));
        assert_eq!(relation(&plain, &other), Relation::Another);
        assert_eq!(relation(&other, &other), Relation::Same);
        assert!(!serde_json::to_string(&other).unwrap().contains("hunter2"));
        let of_an_earlier_version = AccountIdentity { reach: None, ..plain };
        assert_eq!(relation(&of_an_earlier_version, &other), Relation::Same);
    }

    #[test]
    fn only_what_is_known_to_be_the_same_is_the_same() {
        let account = |account: &str| AccountIdentity { account: Some(account.into()), ..AccountIdentity::default() };
        let key = |key: &str| AccountIdentity { key: Some(key.into()), ..AccountIdentity::default() };
        let unknown = AccountIdentity::default;
        for (then, now, expected) in [
            (account("1"), account("1"), Relation::Same),
            (account("1"), account("2"), Relation::Another),
            (account("1"), key("k"), Relation::Ask("1".into())),
            (account("1"), unknown(), Relation::Ask("1".into())),
            (key("k"), key("k"), Relation::Same),
            (key("k"), key("l"), Relation::Another),
            (key("k"), account("1"), Relation::Another),
            (key("k"), unknown(), Relation::Another),
            (unknown(), unknown(), Relation::Unknown),
            (unknown(), account("1"), Relation::Unknown),
            (unknown(), key("k"), Relation::Unknown),
        ] {
            assert_eq!(relation(&then, &now), expected, "{then:?} {now:?}");
        }
    }

    #[test]
    fn terraform_works_in_no_account_but_the_one_that_is_allowed() {
        let block =
            |ids: &str| backend(&format!(r#"{{"access_key":"test","secret_key":"s","allowed_account_ids":{ids}}}"#));
        let at_start = |ids: &str| AccountIdentity::at_start("run", &block(ids)).account;
        assert_eq!(at_start(r#"["888888888888"]"#).as_deref(), Some("888888888888"));
        assert_eq!(at_start(r#"["888888888888","999999999999"]"#), None);
        // `allowed_account_ids` is not used here, because no terraform has checked it against the current account.
        assert_eq!(AccountIdentity::now("run", &block(r#"["888888888888"]"#)).account, None);
    }

    #[test]
    fn only_an_account_in_its_place_is_one() {
        use proptest::prelude::*;
        let arn = crate::generated_input::changed_text("arn:aws-cn:iam::123456789012:role/path/name");
        crate::generated_input::for_all(file!(), &(arn, "[0-9]{12}"), |(arn, account)| {
            let found = account_of_role(&arn);
            prop_assert!(found.is_none_or(|found| is_account(&found) && arn.contains(&found)), "{arn:?}");
            let arn = format!("arn:aws:iam::{account}:role/x:{arn}");
            prop_assert_eq!(account_of_role(&arn), Some(account));
            Ok(())
        });
    }
}
