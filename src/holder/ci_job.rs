//! Recognizes the CI job that this process is part of, by the variables that its CI system sets.
//!
//! The variables of a CI job contain many secrets. So only the variables named here are read, and only a value that has
//! the form of a number, a name or a URL is used.

use std::ffi::OsString;

/// A CI job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CiJob {
    /// The name of the CI system.
    pub(crate) system: &'static str,
    /// The URL of the job. If the system does not say it, the URL of the run, or the run's ID. Empty if there is none.
    pub(crate) job: String,
    /// Which attempt of the job it is, from 1. Empty if the system does not say it.
    pub(crate) attempt: String,
}

/// What one CI system says.
struct System {
    name: &'static str,
    /// The variable that the system always sets, and the value that it has. `None`: any value but an empty one.
    marker: (&'static str, Option<&'static str>),
    job: fn(&Variables<'_>) -> Option<String>,
    attempt: fn(&Variables<'_>) -> Option<u64>,
}

const fn no_attempt(_: &Variables<'_>) -> Option<u64> {
    None
}

/// The CI systems. A system whose jobs another system can start comes after that system: CodeBuild runs GitHub's and
/// Buildkite's runners. Gitea and Forgejo also set GitHub's variables.
///
/// The variables are those in the documentation of each system, and in env-ci (services/*.js).
const SYSTEMS: [System; 17] = [
    System {
        name: "Gitea Actions",
        marker: ("GITEA_ACTIONS", Some("true")),
        // The URL of a run has another number in different versions.
        job: |all| Some(format!("{}/{}/actions", all.url("GITHUB_SERVER_URL")?, all.path("GITHUB_REPOSITORY")?)),
        attempt: |all| all.number("GITHUB_RUN_ATTEMPT"),
    },
    System {
        name: "GitHub Actions",
        marker: ("GITHUB_ACTIONS", Some("true")),
        job: |all| {
            let (server, repository) = (all.url("GITHUB_SERVER_URL")?, all.path("GITHUB_REPOSITORY")?);
            let attempt = all.number("GITHUB_RUN_ATTEMPT").map_or_else(String::new, |all| format!("/attempts/{all}"));
            Some(format!("{server}/{repository}/actions/runs/{}{attempt}", all.number("GITHUB_RUN_ID")?))
        },
        attempt: |all| all.number("GITHUB_RUN_ATTEMPT"),
    },
    System {
        name: "GitLab CI",
        marker: ("GITLAB_CI", None),
        job: |all| all.url("CI_JOB_URL"),
        attempt: |all| all.number("CI_JOB_RETRY_COUNT")?.checked_add(1),
    },
    System { name: "Jenkins", marker: ("JENKINS_URL", None), job: |all| all.url("BUILD_URL"), attempt: no_attempt },
    System {
        name: "Buildkite",
        marker: ("BUILDKITE", Some("true")),
        job: |all| {
            let job = all.word("BUILDKITE_JOB_ID").map_or_else(String::new, |job| format!("#{job}"));
            Some(format!("{}{job}", all.url("BUILDKITE_BUILD_URL")?))
        },
        attempt: |all| all.number("BUILDKITE_RETRY_COUNT")?.checked_add(1),
    },
    System {
        name: "CircleCI",
        marker: ("CIRCLECI", Some("true")),
        job: |all| all.url("CIRCLE_BUILD_URL"),
        attempt: no_attempt,
    },
    System {
        name: "Azure Pipelines",
        marker: ("TF_BUILD", None),
        job: |all| {
            let (collection, project) = (all.url("SYSTEM_COLLECTIONURI")?, all.encoded("SYSTEM_TEAMPROJECT")?);
            Some(format!("{collection}/{project}/_build/results?buildId={}", all.number("BUILD_BUILDID")?))
        },
        attempt: |all| all.number("SYSTEM_JOBATTEMPT"),
    },
    System {
        name: "Bitbucket Pipelines",
        marker: ("BITBUCKET_BUILD_NUMBER", None),
        job: |all| {
            let (repository, build) = (all.path("BITBUCKET_REPO_FULL_NAME")?, all.number("BITBUCKET_BUILD_NUMBER")?);
            Some(format!("https://bitbucket.org/{repository}/addon/pipelines/home#!/results/{build}"))
        },
        attempt: |all| all.number("BITBUCKET_STEP_RUN_NUMBER"),
    },
    System {
        name: "Travis CI",
        marker: ("TRAVIS", Some("true")),
        job: |all| all.url("TRAVIS_JOB_WEB_URL"),
        attempt: no_attempt,
    },
    System {
        name: "Drone",
        marker: ("DRONE", Some("true")),
        job: |all| all.url("DRONE_BUILD_LINK"),
        attempt: no_attempt,
    },
    System {
        name: "Woodpecker",
        marker: ("CI", Some("woodpecker")),
        job: |all| all.url("CI_STEP_URL").or_else(|| all.url("CI_PIPELINE_URL")),
        attempt: no_attempt,
    },
    System {
        name: "TeamCity",
        marker: ("TEAMCITY_VERSION", None),
        job: |all| all.url("BUILD_URL").or_else(|| all.word("BUILD_NUMBER")),
        attempt: no_attempt,
    },
    System {
        name: "Semaphore",
        marker: ("SEMAPHORE", Some("true")),
        job: |all| Some(format!("{}/jobs/{}", all.url("SEMAPHORE_ORGANIZATION_URL")?, all.word("SEMAPHORE_JOB_ID")?)),
        attempt: no_attempt,
    },
    System {
        name: "Atlantis",
        marker: ("ATLANTIS_TERRAFORM_VERSION", None),
        // Only custom steps have this variable (server/core/runtime/run_step_runner.go).
        job: |all| all.url("PULL_URL"),
        attempt: no_attempt,
    },
    System {
        name: "Spacelift",
        marker: ("TF_VAR_spacelift_run_id", None),
        job: |all| Some(format!("{}/{}", all.word("TF_VAR_spacelift_stack_id")?, all.word("TF_VAR_spacelift_run_id")?)),
        attempt: no_attempt,
    },
    System {
        name: "HCP Terraform",
        marker: ("TFC_RUN_ID", None),
        job: |all| {
            let run = all.word("TFC_RUN_ID")?;
            Some(all.path("TFC_WORKSPACE_SLUG").map_or_else(|| run.clone(), |workspace| format!("{workspace}/{run}")))
        },
        attempt: no_attempt,
    },
    System {
        name: "CodeBuild",
        marker: ("CODEBUILD_BUILD_ID", None),
        // The URL is `https://REGION.console.aws.amazon.com/codebuild/home?region=REGION#/builds/ID/view/new`.
        job: |all| {
            let (project, build) =
                all.text("CODEBUILD_BUILD_ID")?.split_once(':').map(|(project, build)| (word(project), word(build)))?;
            let id = format!("{}:{}", project?, build?);
            let url = all.url("CODEBUILD_BUILD_URL").zip(all.word("AWS_REGION"));
            Some(url.map_or_else(|| id.clone(), |(url, region)| format!("{url}?region={region}#/builds/{id}/view/new")))
        },
        attempt: no_attempt,
    },
];

impl CiJob {
    /// Returns the CI job of the process that has these environment variables. `None` if it is part of no CI job, or if
    /// its CI system is not known.
    pub(crate) fn of(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<Self> {
        let all = Variables(variable);
        let is_here = |(name, value): (&str, Option<&str>)| {
            all.text(name).is_some_and(|found| value.is_none_or(|value| found == value))
        };
        let system = SYSTEMS.iter().find(|system| is_here(system.marker))?;
        Some(Self {
            system: system.name,
            job: (system.job)(&all).unwrap_or_default(),
            attempt: (system.attempt)(&all).map_or_else(String::new, |attempt| attempt.to_string()),
        })
    }
}

/// The environment variables of a process.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Variables<'_> {
    /// Returns a variable that is set to UTF-8 and is not empty.
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name)?.into_string().ok().filter(|text| !text.is_empty())
    }

    fn number(&self, name: &str) -> Option<u64> {
        let text = self.text(name)?;
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
    }

    /// Returns an ID or a name, as [`word`].
    fn word(&self, name: &str) -> Option<String> {
        word(&self.text(name)?)
    }

    /// Returns words with a slash between them, such as `owner/repository`.
    fn path(&self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        text.split('/').all(|part| word(part).is_some()).then_some(text)
    }

    /// Returns a name with every character that a URL does not allow in its percent-encoded form (RFC 3986).
    fn encoded(&self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let encode = |byte: u8| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        };
        (text.len() <= MAX_WORD).then(|| text.bytes().map(encode).collect())
    }

    /// Returns a URL without its secrets, as [`public_url`], and without a slash at its end.
    fn url(&self, name: &str) -> Option<String> {
        Some(public_url(&self.text(name)?)?.trim_end_matches('/').to_owned())
    }
}

const MAX_WORD: usize = 100;
const MAX_URL: usize = 300;

/// Returns `text` if it is an ID or a name: up to 100 letters, digits, `.`, `_` and `-`.
pub(super) fn word(text: &str) -> Option<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (!text.is_empty() && text.len() <= MAX_WORD && text.bytes().all(is_plain)).then(|| text.to_owned())
}

/// Returns a URL without what may be secret in it: user and password, the fragment, and the query unless it consists of
/// numbers. `None` if it is not a URL of HTTP with at most 300 visible ASCII characters, or if a password can be in
/// another part because it was not percent-encoded.
fn public_url(text: &str) -> Option<String> {
    if text.len() > MAX_URL || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let (scheme, rest) = text.split_once("://")?;
    if !["http", "https"].contains(&scheme) {
        return None;
    }
    let (authority, rest) = rest.split_at(rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len()));
    if rest.contains('@') {
        return None;
    }
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    };
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let is_address = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte));
    let is_host = match name.strip_prefix('[') {
        Some(address) => address.strip_suffix(']').is_some_and(is_address),
        None => !name.is_empty() && name.bytes().all(is_name),
    };
    let is_port = port.is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()));
    if !is_host || !is_port {
        return None;
    }
    let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let is_number = |parameter: &str| {
        let pair = parameter.split_once('=');
        pair.is_some_and(|(name, value)| word(name).is_some() && value.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let query = if query.split('&').all(is_number) { format!("?{query}") } else { String::new() };
    Some(format!("{scheme}://{host}{path}{query}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The name of a CI system, the variables that it sets as in its documentation, and the expected job and attempt.
    type Environment = (&'static str, &'static [(&'static str, &'static str)], &'static str, &'static str);

    pub(in crate::holder) const ENVIRONMENTS: [Environment; 20] = [
        (
            "GitHub Actions",
            &[
                ("CI", "true"),
                ("GITHUB_ACTIONS", "true"),
                ("GITHUB_SERVER_URL", "https://github.com"),
                ("GITHUB_REPOSITORY", "octo-org/infra.live"),
                ("GITHUB_RUN_ID", "6330292032"),
                ("GITHUB_RUN_ATTEMPT", "2"),
            ],
            "https://github.com/octo-org/infra.live/actions/runs/6330292032/attempts/2",
            "2",
        ),
        (
            "Gitea Actions",
            &[
                ("CI", "true"),
                ("GITHUB_ACTIONS", "true"),
                ("GITEA_ACTIONS", "true"),
                ("GITHUB_SERVER_URL", "https://git.example.com:3000/"),
                ("GITHUB_REPOSITORY", "anna/infra"),
                ("GITHUB_RUN_ID", "17"),
            ],
            "https://git.example.com:3000/anna/infra/actions",
            "",
        ),
        (
            "GitLab CI",
            &[
                ("CI", "true"),
                ("GITLAB_CI", "true"),
                ("CI_JOB_URL", "https://gitlab.example.com/group/infra/-/jobs/4711"),
                ("CI_JOB_RETRY_COUNT", "1"),
            ],
            "https://gitlab.example.com/group/infra/-/jobs/4711",
            "2",
        ),
        (
            "Jenkins",
            &[
                ("JENKINS_URL", "https://jenkins.example.com/"),
                ("BUILD_URL", "https://jenkins.example.com/job/infra/job/main%252Fprod/15/"),
            ],
            "https://jenkins.example.com/job/infra/job/main%252Fprod/15",
            "",
        ),
        (
            "Buildkite",
            &[
                ("CI", "true"),
                ("BUILDKITE", "true"),
                ("BUILDKITE_BUILD_URL", "https://buildkite.com/acme-inc/my-project/builds/1514"),
                ("BUILDKITE_JOB_ID", "e44f9784-e20e-4b93-a21d-f41fd5869db9"),
                ("BUILDKITE_RETRY_COUNT", "0"),
            ],
            "https://buildkite.com/acme-inc/my-project/builds/1514#e44f9784-e20e-4b93-a21d-f41fd5869db9",
            "1",
        ),
        (
            "CircleCI",
            &[
                ("CI", "true"),
                ("CIRCLECI", "true"),
                ("CIRCLE_BUILD_URL", "https://circleci.com/gh/circleci/frontend/933"),
            ],
            "https://circleci.com/gh/circleci/frontend/933",
            "",
        ),
        (
            "Azure Pipelines",
            &[
                ("TF_BUILD", "True"),
                ("SYSTEM_COLLECTIONURI", "https://dev.azure.com/fabrikamfiber/"),
                ("SYSTEM_TEAMPROJECT", "Fabrikam Live"),
                ("BUILD_BUILDID", "42"),
                ("SYSTEM_JOBATTEMPT", "1"),
            ],
            "https://dev.azure.com/fabrikamfiber/Fabrikam%20Live/_build/results?buildId=42",
            "1",
        ),
        (
            "Bitbucket Pipelines",
            &[
                ("CI", "true"),
                ("BITBUCKET_BUILD_NUMBER", "7"),
                ("BITBUCKET_REPO_FULL_NAME", "ondrejmachulda/ci-detector"),
                ("BITBUCKET_STEP_RUN_NUMBER", "1"),
            ],
            "https://bitbucket.org/ondrejmachulda/ci-detector/addon/pipelines/home#!/results/7",
            "1",
        ),
        (
            "Travis CI",
            &[("CI", "true"), ("TRAVIS", "true"), ("TRAVIS_JOB_WEB_URL", "https://app.travis-ci.com/a/b/jobs/9")],
            "https://app.travis-ci.com/a/b/jobs/9",
            "",
        ),
        (
            "Drone",
            &[("CI", "drone"), ("DRONE", "true"), ("DRONE_BUILD_LINK", "https://drone.company.com/octocat/hello/42")],
            "https://drone.company.com/octocat/hello/42",
            "",
        ),
        (
            "Woodpecker",
            &[("CI", "woodpecker"), ("CI_STEP_URL", "https://ci.example.com/repos/7/pipeline/8")],
            "https://ci.example.com/repos/7/pipeline/8",
            "",
        ),
        (
            "Woodpecker",
            &[("CI", "woodpecker"), ("CI_PIPELINE_URL", "https://ci.example.com/repos/7/pipeline/8")],
            "https://ci.example.com/repos/7/pipeline/8",
            "",
        ),
        (
            "TeamCity",
            &[
                ("TEAMCITY_VERSION", "2025.07"),
                ("BUILD_NUMBER", "15"),
                ("BUILD_URL", "https://tc.example.com/viewLog.html?buildId=123"),
            ],
            "https://tc.example.com/viewLog.html?buildId=123",
            "",
        ),
        ("TeamCity", &[("TEAMCITY_VERSION", "8.0"), ("BUILD_NUMBER", "15")], "15", ""),
        (
            "Semaphore",
            &[
                ("CI", "true"),
                ("SEMAPHORE", "true"),
                ("SEMAPHORE_ORGANIZATION_URL", "https://acme.semaphoreci.com"),
                ("SEMAPHORE_JOB_ID", "a26d42cf-89ac-4c3f-9e2d-51bb231897bf"),
            ],
            "https://acme.semaphoreci.com/jobs/a26d42cf-89ac-4c3f-9e2d-51bb231897bf",
            "",
        ),
        (
            "Atlantis",
            &[("ATLANTIS_TERRAFORM_VERSION", "1.11.4"), ("PULL_URL", "https://github.com/acme/infra/pull/12")],
            "https://github.com/acme/infra/pull/12",
            "",
        ),
        ("Atlantis", &[("ATLANTIS_TERRAFORM_VERSION", "1.11.4"), ("WORKSPACE", "default")], "", ""),
        (
            "Spacelift",
            &[("TF_VAR_spacelift_run_id", "01HXYZ"), ("TF_VAR_spacelift_stack_id", "infra-prod")],
            "infra-prod/01HXYZ",
            "",
        ),
        (
            "HCP Terraform",
            &[("TFC_RUN_ID", "run-CKuwsxMGgMd6W7Ui"), ("TFC_WORKSPACE_SLUG", "acme-corp/prod-load-balancers")],
            "acme-corp/prod-load-balancers/run-CKuwsxMGgMd6W7Ui",
            "",
        ),
        (
            "CodeBuild",
            &[
                ("CODEBUILD_BUILD_ID", "api-pr:cf59169d-ddc7-4292-a5ab-06e6f5b8c8c4"),
                (
                    "CODEBUILD_BUILD_URL",
                    "https://eu-west-1.console.aws.amazon.com/codebuild/home?region=eu-west-1#/builds/api-pr:cf59169d-ddc7-4292-a5ab-06e6f5b8c8c4/view/new",
                ),
                ("AWS_REGION", "eu-west-1"),
            ],
            "https://eu-west-1.console.aws.amazon.com/codebuild/home?region=eu-west-1#/builds/api-pr:cf59169d-ddc7-4292-a5ab-06e6f5b8c8c4/view/new",
            "",
        ),
    ];

    pub(in crate::holder) fn lookup(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
        let all: Vec<(String, OsString)> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        move |asked| all.iter().find(|(name, _)| name == asked).map(|(_, value)| value.clone())
    }

    #[test]
    fn every_ci_system_is_recognized_by_its_variables() {
        for (system, variables, job, attempt) in ENVIRONMENTS {
            let found = CiJob::of(&lookup(variables));
            let expected = CiJob { system, job: job.to_owned(), attempt: attempt.to_owned() };
            assert_eq!(found, Some(expected), "{variables:?}");
        }
        let named: Vec<&str> = ENVIRONMENTS.iter().map(|(system, ..)| *system).collect();
        assert!(SYSTEMS.iter().all(|system| named.contains(&system.name)));
    }

    #[test]
    fn a_process_outside_of_ci_has_no_job() {
        for variables in [
            &[][..],
            &[("CI", "true")],
            &[("CI", "drone")],
            &[("GITHUB_ACTIONS", ""), ("GITHUB_RUN_ID", "1")],
            &[("GITHUB_ACTIONS", "false"), ("CIRCLECI", "false")],
        ] {
            assert_eq!(CiJob::of(&lookup(variables)), None, "{variables:?}");
        }
    }

    #[test]
    fn a_runner_in_another_systems_job_is_of_its_own_system() {
        let variables = [("CODEBUILD_BUILD_ID", "a:b"), ("GITHUB_ACTIONS", "true"), ("TF_BUILD", "")];
        assert_eq!(CiJob::of(&lookup(&variables)).unwrap().system, "GitHub Actions");
    }

    #[test]
    fn a_url_is_cut_down_to_what_everybody_may_read() {
        for (url, expected) in [
            ("https://ci.example.com/job/1", Some("https://ci.example.com/job/1")),
            ("http://ci:8080/", Some("http://ci:8080/")),
            ("https://ci.example.com", Some("https://ci.example.com")),
            ("https://[2001:db8::1]:8443/a", Some("https://[2001:db8::1]:8443/a")),
            ("https://[2001:db8::1]/a", Some("https://[2001:db8::1]/a")),
            ("https://anna:secret@ci.example.com/job/1", Some("https://ci.example.com/job/1")),
            ("https://secret@ci.example.com:1/job/1", Some("https://ci.example.com:1/job/1")),
            ("https://anna:sec@ret@ci.example.com/1", Some("https://ci.example.com/1")),
            ("https://ci/1?token=secret", Some("https://ci/1")),
            ("https://ci/1?buildId=5&token=secret", Some("https://ci/1")),
            ("https://ci/1?buildId=5&x=6", Some("https://ci/1?buildId=5&x=6")),
            ("https://ci/1?", Some("https://ci/1")),
            ("https://ci/1#access_token=secret", Some("https://ci/1")),
            ("https://ci?token=secret", Some("https://ci")),
            // A password that was not percent-encoded.
            ("https://anna:12/secret@ci/1", None),
            ("https://anna:12#secret@ci/1", None),
            ("https://anna:12?secret@ci/1", None),
            ("https://anna:12\\secret@ci/1", None),
            ("https://anna:secret", None),
            ("https://anna:secret/1", None),
            ("https://:secret@/1", None),
            ("https://ci:/1", None),
            ("https://[secret]/1", None),
            ("https://ci/a b", None),
            ("https://ci/\u{1b}[31m", None),
            ("https://ci/\u{202e}", None),
            ("https://\u{e4}/", None),
            ("file:///etc/passwd", None),
            ("javascript:alert(1)", None),
            ("secret", None),
            ("", None),
        ] {
            assert_eq!(public_url(url).as_deref(), expected, "{url:?}");
        }
        assert_eq!(public_url(&format!("https://ci/{}", "a".repeat(MAX_URL))), None);
    }

    #[test]
    fn a_value_of_another_form_is_not_used() {
        for (name, value) in [
            ("GITHUB_RUN_ID", "secret"),
            ("GITHUB_RUN_ID", "1?x"),
            ("GITHUB_RUN_ID", "-1"),
            ("GITHUB_RUN_ID", "99999999999999999999"),
            ("GITHUB_REPOSITORY", "a b"),
            ("GITHUB_REPOSITORY", "a//b"),
            ("GITHUB_REPOSITORY", "a/b?token=secret"),
            ("GITHUB_SERVER_URL", "github.com"),
        ] {
            let (_, variables, ..) = ENVIRONMENTS[0];
            let changed: Vec<(&str, &str)> =
                variables.iter().map(|(known, old)| (*known, if *known == name { value } else { *old })).collect();
            assert_eq!(CiJob::of(&lookup(&changed)).unwrap().job, "", "{name} {value}");
        }
    }
}
