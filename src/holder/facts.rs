//! Collects who and where this process is, for the people who find its lock: user, host, container, CI job and cloud.
//!
//! The result is stored beside the lock, where everybody who may read the lock can read it. So it contains no argument,
//! and a variable or a file is used only if its text has the form of what is expected there.

use std::ffi::OsString;

use serde::Deserialize;

use super::ci_job::{CiJob, word};
use crate::journal::host;
use crate::lease::grade::Cloud;
use crate::lease::record::Holder;
use crate::sys::host_facts::{Dmi, HostFacts};
use crate::sys::machine;
use crate::terraform::lock_info;

/// The files that say in which container, task, pod or machine this process is.
const CGROUPS: &str = "/proc/self/cgroup";
const MOUNTS: &str = "/proc/self/mountinfo";
/// A pod's token (a JWT) and namespace, unless the pod has `automountServiceAccountToken: false`. Only the names among
/// the token's claims are used.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
const NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// The variables in which the documentation of Kubernetes and many charts give a pod its namespace, its name and its
/// node (the downward API).
const POD_VARIABLES: [&str; 3] = ["POD_NAMESPACE", "POD_NAME", "NODE_NAME"];
/// The instance's ID that cloud-init found at this boot (cloudinit/stages.py).
const INSTANCE: &str = "/run/cloud-init/.instance-id";
/// The files that Docker and Podman create in each container.
const CONTAINER_MARKS: [&str; 2] = ["/.dockerenv", "/run/.containerenv"];

/// The longest user or host name that is stored, in bytes.
const MAX_NAME: usize = 64;

/// What a process knows about itself.
pub(crate) struct Sources<'a> {
    /// Returns an environment variable. `None` if it is not set.
    pub(crate) variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// Returns the text of a file. `None` if it cannot be read.
    pub(crate) file: &'a dyn Fn(&str) -> Option<String>,
    /// `user@host`, as terraform writes it into a lock.
    pub(crate) who: &'a str,
    /// [`machine::id`].
    pub(crate) machine: Option<&'a str>,
    /// [`machine::boot_id`].
    pub(crate) boot: Option<&'a str>,
    pub(crate) dmi: &'a Dmi,
}

/// Returns the facts about this process, its host and its CI job. It sends no request.
pub(crate) fn here(facts: &HostFacts) -> Holder {
    let file = |path: &str| std::fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    holder(&Sources {
        variable: &|name| std::env::var_os(name),
        file: &file,
        who: &lock_info::who(),
        machine: machine::id().as_deref(),
        boot: machine::boot_id().as_deref(),
        dmi: &facts.dmi,
    })
}

/// Returns the facts that `sources` contain.
pub(crate) fn holder(sources: &Sources<'_>) -> Holder {
    // A user name may contain an @, and a host name may not.
    let (user, host) = sources.who.rsplit_once('@').unwrap_or((sources.who, ""));
    let job = CiJob::of(sources.variable).unwrap_or_default();
    let file = sources.file;
    let mounts = file(MOUNTS).unwrap_or_default();
    let cgroups = file(CGROUPS).unwrap_or_default();
    let is_marked = CONTAINER_MARKS.into_iter().any(|path| file(path).is_some());
    let places = [pod(sources, &mounts, &cgroups), task(sources, &cgroups), instance(sources)];
    Holder {
        user: name(user),
        host: name(host),
        machine: sources.machine.map_or_else(String::new, |machine| host::hash("machine", machine)),
        boot: sources.boot.and_then(word).unwrap_or_default(),
        container: container(&mounts, &cgroups, host, is_marked).unwrap_or_default(),
        ci: job.system.to_owned(),
        job: job.job,
        attempt: job.attempt,
        cloud: places.into_iter().flatten().collect::<Vec<_>>().join(", "),
    }
}

/// Returns the name of a user or of a host, with `_` in place of each character that is neither visible ASCII nor a
/// letter, and with at most 64 bytes.
fn name(text: &str) -> String {
    let shown = |one: char| if one.is_ascii_graphic() || one.is_alphanumeric() { one } else { '_' };
    let mut name: String = text.chars().map(shown).collect();
    name.truncate(name.floor_char_boundary(MAX_NAME));
    name
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether the text is an ID of 8-4-4-4-12 hexadecimal digits.
fn is_uuid(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    parts.len() == 5 && parts.iter().zip([8, 4, 4, 4, 12]).all(|(part, digits)| is_hex(part, digits))
}

/// Returns each mount's root and mount point (proc_pid_mountinfo(5)).
fn mounted(mounts: &str) -> impl Iterator<Item = (&str, &str)> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        Some((fields.next()?, fields.next()?))
    })
}

/// Returns the path of each control group.
fn cgroup_paths(cgroups: &str) -> impl Iterator<Item = &str> {
    cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2))
}

/// Returns the first 12 of the 64 digits of the container's ID, as `docker ps` shows them. `None` outside of a
/// container, and if the ID cannot be found.
///
/// The name of the control group has the ID: `/docker/ID`, `/kubepods/podUID/ID`, `docker-ID.scope`,
/// `cri-containerd-ID.scope`. In a cgroup namespace of its own, a container does not see that name. But Docker and
/// Podman mount files from a directory with that name. A file of a pod's sandbox has another ID, which is not used.
/// Docker also uses the ID as the host's name.
fn container(mounts: &str, cgroups: &str, host: &str, is_marked: bool) -> Option<String> {
    let in_cgroup = |path: &str| {
        let last = path.rsplit('/').next().unwrap_or_default();
        let last = last.strip_suffix(".scope").unwrap_or(last);
        let id = last.rsplit('-').next().unwrap_or_default();
        is_hex(id, 64).then(|| id.to_owned())
    };
    let in_mount = |(root, point): (&str, &str)| {
        // CRI-O and Podman mount the first two from the container, and the others from its pod.
        let is_own = ["/run/.containerenv", "/run/secrets", "/etc/hostname", "/etc/hosts"].contains(&point);
        let parts: Vec<&str> = root.split('/').collect();
        let id = parts
            .windows(2)
            .find(|pair| ["containers", "overlay-containers"].contains(&pair[0]) && is_hex(pair[1], 64))?[1];
        is_own.then(|| id.to_owned())
    };
    let in_mounts = || {
        let mut all: Vec<(&str, &str)> = mounted(mounts).collect();
        all.sort_by_key(|(_, point)| !point.starts_with("/run/"));
        all.into_iter().find_map(in_mount)
    };
    let id = cgroup_paths(cgroups).find_map(in_cgroup).or_else(in_mounts);
    let id = id.or_else(|| (is_marked && is_hex(host, 12)).then(|| host.to_owned()))?;
    Some(id[..12].to_owned())
}

/// The claims of a pod's token that are used (Kubernetes, pkg/serviceaccount/claims.go, `privateClaims`).
#[derive(Default, Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io", default)]
    kubernetes: PodClaims,
}

#[derive(Default, Deserialize)]
struct PodClaims {
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    pod: Named,
    /// Since Kubernetes 1.30.
    #[serde(default)]
    node: Named,
}

#[derive(Default, Deserialize)]
struct Named {
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
}

/// Returns the claims of a JSON Web Token (RFC 7519): its second part, in the base64 of RFC 4648, section 5, without
/// padding. `None` if it cannot be parsed. Its signature is not used.
fn claims(token: &str) -> Option<Claims> {
    let mut payload = token.trim().split('.').nth(1)?.replace('-', "+").replace('_', "/");
    payload.push_str(["", "", "==", "="][payload.len() % 4]);
    serde_json::from_slice(&aws_smithy_types::base64::decode(payload).ok()?).ok()
}

/// Returns the pod: `pod NAMESPACE/NAME (UID) on node NODE`, without the parts that are not known. `None` outside of
/// Kubernetes.
///
/// A pod without a token may have its namespace, its name and its node in variables ([`POD_VARIABLES`]). They count
/// only in a pod whose UID is known: outside of Kubernetes, they may mean anything. A wrong name does no harm, because
/// a witness compares the UID.
fn pod(sources: &Sources<'_>, mounts: &str, cgroups: &str) -> Option<String> {
    let PodClaims { namespace, pod, node } =
        (sources.file)(TOKEN).and_then(|token| claims(&token)).unwrap_or_default().kubernetes;
    let uid = Some(pod.uid).filter(|uid| is_uuid(uid)).or_else(|| pod_uid(mounts, cgroups)).unwrap_or_default();
    let variable = |name| (sources.variable)(name).filter(|_| !uid.is_empty())?.into_string().ok();
    let [of_namespace, of_name, of_node] = POD_VARIABLES.map(variable);
    let first =
        |texts: [Option<String>; 3]| texts.into_iter().flatten().find_map(|text| word(text.trim())).unwrap_or_default();
    let namespace = first([Some(namespace), (sources.file)(NAMESPACE), of_namespace]);
    let name = first([Some(pod.name), of_name, None]);
    let node = first([Some(node.name), of_node, None]);
    let place = [namespace, name].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
    let id = match (place.is_empty(), uid.is_empty()) {
        (true, true) => return None,
        (_, true) => String::new(),
        (true, false) => uid,
        (false, false) => format!(" ({uid})"),
    };
    let node = if node.is_empty() { node } else { format!(" on node {node}") };
    Some(format!("pod {place}{id}{node}"))
}

/// Returns the UID of the pod. The kubelet mounts `/etc/hosts` from `/var/lib/kubelet/pods/UID/etc-hosts`, and names
/// the control group `podUID`, with underscores under systemd.
fn pod_uid(mounts: &str, cgroups: &str) -> Option<String> {
    let mounted = mounted(mounts).filter(|(_, point)| *point == "/etc/hosts").find_map(|(root, _)| {
        let parts: Vec<&str> = root.split('/').collect();
        Some(parts.windows(2).find(|pair| pair[0] == "pods" && is_uuid(pair[1]))?[1].to_owned())
    });
    mounted.or_else(|| {
        cgroup_paths(cgroups).flat_map(|path| path.split('/')).find_map(|part| {
            let part = part.strip_suffix(".slice").unwrap_or(part);
            let uid = part.rsplit_once("pod")?.1.replace('_', "-");
            is_uuid(&uid).then_some(uid)
        })
    })
}

/// Returns the task of Amazon ECS: `ECS task ID`. `None` if there is none, or if its ID cannot be found.
///
/// The ID is in the path of the control group, `/ecs/ID/CONTAINER`. On Fargate it is also the first part of the
/// container's ID in `ECS_CONTAINER_METADATA_URI_V4`: `http://169.254.170.2/v4/ID-NUMBER`. The ID in
/// `AWS_CONTAINER_CREDENTIALS_RELATIVE_URI` is a secret, and is not read.
fn task(sources: &Sources<'_>, cgroups: &str) -> Option<String> {
    let is_id = |text: &&str| is_hex(text, 32) || is_uuid(text);
    let in_cgroup = cgroup_paths(cgroups).find_map(|path| {
        let mut parts = path.split('/').skip_while(|part| *part != "ecs").skip(1);
        parts.find(is_id).map(str::to_owned)
    });
    let id = in_cgroup.or_else(|| {
        let uri = (sources.variable)("ECS_CONTAINER_METADATA_URI_V4")?.into_string().ok()?;
        let (id, number) = uri.strip_prefix("http://169.254.170.2/v4/")?.split_once('-')?;
        let is_task = is_hex(id, 32) && number.bytes().all(|byte| byte.is_ascii_digit());
        is_task.then(|| id.to_owned())
    })?;
    let is_fargate = (sources.variable)("AWS_EXECUTION_ENV").is_some_and(|value| value == "AWS_ECS_FARGATE");
    Some(format!("ECS task {id}{}", if is_fargate { " (Fargate)" } else { "" }))
}

/// Returns the cloud and the ID of its instance: `Amazon EC2 i-0123456789abcdef0`. Without an ID, only the cloud.
/// `None` if the cloud is not known.
fn instance(sources: &Sources<'_>) -> Option<String> {
    let cloud = Cloud::of(sources.dmi)?;
    let is_id = |text: &str| text.strip_prefix("i-").is_some_and(|id| is_hex(id, 8) || is_hex(id, 17));
    let tag = Some(&sources.dmi.board_asset_tag).filter(|tag| cloud == Cloud::Aws && is_id(tag)).cloned();
    let id = tag.or_else(|| word((sources.file)(INSTANCE)?.trim()));
    Some(id.map_or_else(|| cloud.to_string(), |id| format!("{cloud} {id}")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::ci_job::tests::{ENVIRONMENTS, lookup};
    use super::*;
    use crate::holder::lease_text;

    const ID: &str = "3f2a1b9c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f8";
    const OTHER: &str = "443579c837e6de9d2b28c81ff56328e90c168aa99c4f7afa741978c93f4417c0";
    const UID: &str = "fd698699-eabf-4c23-92ef-cf0bbdb78261";
    const TASK: &str = "e4e1c46c373947bc90d0a6f580c1f5d4";

    /// A test's variables, files and firmware.
    #[derive(Default)]
    struct Process {
        variables: Vec<(String, String)>,
        files: BTreeMap<&'static str, String>,
        dmi: Dmi,
    }

    impl Process {
        fn with(mut self, file: &'static str, text: &str) -> Self {
            self.files.insert(file, text.to_owned());
            self
        }

        fn set(mut self, name: &str, value: &str) -> Self {
            self.variables.push((name.to_owned(), value.to_owned()));
            self
        }

        fn holder(&self, who: &str) -> Holder {
            let variables: Vec<(&str, &str)> = self.variables.iter().map(|(name, value)| (&**name, &**value)).collect();
            holder(&Sources {
                variable: &lookup(&variables),
                file: &|path| self.files.get(path).cloned(),
                who,
                machine: Some("0123456789abcdef0123456789abcdef"),
                boot: Some("f2ff6d35-5d2b-4a2c-9b26-3fca40f4e8d1"),
                dmi: &self.dmi,
            })
        }
    }

    fn token(claims: &str) -> String {
        let encode = |text: &str| {
            let text = aws_smithy_types::base64::encode(text);
            text.replace('+', "-").replace('/', "_").trim_end_matches('=').to_owned()
        };
        format!("{}.{}.SIGNATURE\n", encode(r#"{"alg":"RS256","kid":"k"}"#), encode(claims))
    }

    #[test]
    fn a_host_is_known_by_its_names_and_not_by_its_ids() {
        let holder = Process::default().holder("DOMAIN\\anna@example@ci-7.internal");
        assert_eq!((holder.user.as_str(), holder.host.as_str()), ("DOMAIN\\anna@example", "ci-7.internal"));
        assert_eq!(holder.machine, host::hash("machine", "0123456789abcdef0123456789abcdef"));
        assert_eq!(holder.boot, "f2ff6d35-5d2b-4a2c-9b26-3fca40f4e8d1");
        let rest = Holder {
            user: holder.user.clone(),
            host: holder.host.clone(),
            machine: holder.machine.clone(),
            boot: holder.boot.clone(),
            ..Holder::default()
        };
        assert_eq!(holder, rest);
        assert!(!crate::json::to_string(&holder).unwrap().contains("0123456789abcdef0123456789abcdef"));
        let strange = Process::default().holder("\u{e4}nn\u{1b}[31m a\u{202e}@h\nost");
        assert_eq!((strange.user.as_str(), strange.host.as_str()), ("\u{e4}nn_[31m_a_", "h_ost"));
        let long = Process::default().holder(&format!("{}@{}", "\u{e4}".repeat(100), "h".repeat(100)));
        assert_eq!((long.user.len(), long.host.len()), (64, 64));
        assert_eq!(Process::default().holder("nobody").user, "nobody");
    }

    #[test]
    fn a_container_is_known_by_its_id() {
        let scope = |name: &str| format!("0::/system.slice/{name}-{ID}.scope\n");
        let mount = |root: &str, point: &str| format!("869 857 253:0 {root} {point} rw,relatime - ext4 /dev/vda1 rw\n");
        for (cgroups, mounts, expected) in [
            (format!("12:freezer:/docker/{ID}\n0::/\n"), String::new(), true),
            (format!("11:memory:/kubepods/besteffort/pod{UID}/{ID}\n"), String::new(), true),
            (format!("4:memory:/ecs/{TASK}/{ID}\n"), String::new(), true),
            (format!("0::/docker/{OTHER}/docker/{ID}\n"), String::new(), true),
            (scope("docker"), String::new(), true),
            (scope("libpod"), String::new(), true),
            (scope("cri-containerd"), String::new(), true),
            (scope("crio"), String::new(), true),
            // In a cgroup namespace of its own.
            ("0::/\n".to_owned(), mount(&format!("/var/lib/docker/containers/{ID}/hostname"), "/etc/hostname"), true),
            ("0::/\n".to_owned(), mount(&format!("/docker/containers/{ID}/hosts"), "/etc/hosts"), true),
            (
                "0::/\n".to_owned(),
                mount(&format!("/containers/storage/overlay-containers/{OTHER}/userdata/hostname"), "/etc/hostname")
                    + &mount(
                        &format!("/containers/storage/overlay-containers/{ID}/userdata/run/secrets"),
                        "/run/secrets",
                    ),
                true,
            ),
            // A pod's sandbox, a volume, and a directory of the user.
            (
                "0::/\n".to_owned(),
                mount(
                    &format!("/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/{ID}/hostname"),
                    "/etc/hostname",
                ),
                false,
            ),
            (
                "0::/\n".to_owned(),
                mount(&format!("/docker/volumes/{ID}/_data/lib/kubelet/pods/{UID}/etc-hosts"), "/etc/hosts"),
                false,
            ),
            ("0::/\n".to_owned(), mount(&format!("/home/anna/containers/{ID}"), "/work"), false),
            ("0::/user.slice/user-1000.slice/session-2.scope\n".to_owned(), String::new(), false),
            (format!("0::/docker/{}\n", ID.to_uppercase()), String::new(), false),
            ("nonsense\n".to_owned(), "nonsense\n1 2\n".to_owned(), false),
        ] {
            let process = Process::default().with(CGROUPS, &cgroups).with(MOUNTS, &mounts);
            let found = process.holder("root@host").container;
            assert_eq!(found, if expected { &ID[..12] } else { "" }, "{cgroups} {mounts}");
        }
        for (mark, host, expected) in [
            (Some("/.dockerenv"), "aab69035680f", "aab69035680f"),
            (Some("/run/.containerenv"), "aab69035680f", "aab69035680f"),
            (Some("/.dockerenv"), "web-1", ""),
            (None, "aab69035680f", ""),
        ] {
            let process = mark.into_iter().fold(Process::default(), |process, mark| process.with(mark, ""));
            assert_eq!(process.holder(&format!("root@{host}")).container, expected, "{mark:?} {host}");
        }
    }

    #[test]
    fn a_pod_is_known_by_its_token_or_by_its_mounts() {
        let claims = format!(
            r#"{{"aud":["https://kubernetes.default.svc"],"exp":1776088374,"iat":1776005498,"iss":"https://k","kubernetes.io":
            {{"namespace":"prod","node":{{"name":"ip-192-168-12-71.compute.internal","uid":"256e954c-bfc0-470e-9d8d-7f8e1bd62f6b"}},
            "pod":{{"name":"runner-6bd7c9797d-zvdv6","uid":"{UID}"}},"serviceaccount":{{"name":"sa"}}}},"sub":"system"}}"#
        );
        let hosts =
            format!("870 857 253:0 /var/lib/kubelet/pods/{UID}/etc-hosts /etc/hosts rw,relatime - ext4 /dev/vda1 rw\n");
        let slice = format!(
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{}.slice/a.scope\n",
            UID.replace('-', "_")
        );
        let process = Process::default;
        let named = |process: Process| {
            process.set("POD_NAMESPACE", "infra").set("POD_NAME", "apply-x7x2c").set("NODE_NAME", "ip-10-0-0-7")
        };
        for (process, expected) in [
            (
                process().with(TOKEN, &token(&claims)),
                format!("pod prod/runner-6bd7c9797d-zvdv6 ({UID}) on node ip-192-168-12-71.compute.internal"),
            ),
            (
                process().with(TOKEN, &token(&claims)).with(MOUNTS, &hosts).with(NAMESPACE, "prod"),
                format!("pod prod/runner-6bd7c9797d-zvdv6 ({UID}) on node ip-192-168-12-71.compute.internal"),
            ),
            (
                process().with(TOKEN, &token(r#"{"kubernetes.io":{"namespace":"prod","pod":{"name":"a","uid":"x"}}}"#)),
                "pod prod/a".to_owned(),
            ),
            (process().with(MOUNTS, &hosts).with(NAMESPACE, "prod\n"), format!("pod prod ({UID})")),
            (process().with(MOUNTS, &hosts), format!("pod {UID}")),
            (process().with(CGROUPS, &slice), format!("pod {UID}")),
            (process().with(CGROUPS, &format!("3:cpu:/kubepods/pod{UID}/x\n")), format!("pod {UID}")),
            // Variables, in a pod without a token.
            (named(process().with(MOUNTS, &hosts)), format!("pod infra/apply-x7x2c ({UID}) on node ip-10-0-0-7")),
            (
                named(process().with(MOUNTS, &hosts).with(NAMESPACE, "prod")),
                format!("pod prod/apply-x7x2c ({UID}) on node ip-10-0-0-7"),
            ),
            (
                named(process().with(TOKEN, &token(&claims))),
                format!("pod prod/runner-6bd7c9797d-zvdv6 ({UID}) on node ip-192-168-12-71.compute.internal"),
            ),
            (process().with(MOUNTS, &hosts).set("POD_NAME", "a b; c"), format!("pod {UID}")),
            (named(process()), String::new()),
            // A token that is none, or whose claims have another form.
            (process().with(TOKEN, "secret"), String::new()),
            (process().with(TOKEN, "a.secret.b"), String::new()),
            (process().with(TOKEN, &token("[]")), String::new()),
            (process().with(TOKEN, &token(r#"{"kubernetes.io":{"pod":{"name":"sec ret"}}}"#)), String::new()),
            (process().with(TOKEN, &token(r#"{"sub":"secret"}"#)), String::new()),
            (process().with(MOUNTS, &hosts.replace("/etc/hosts rw", "/mnt rw")), String::new()),
        ] {
            assert_eq!(process.holder("a@b").cloud, expected, "{:?}", process.files);
        }
    }

    #[test]
    fn a_task_and_an_instance_are_known_offline() {
        let nitro =
            |tag: &str| Dmi { sys_vendor: "Amazon EC2".to_owned(), board_asset_tag: tag.to_owned(), ..Dmi::default() };
        let azure = || Dmi {
            sys_vendor: "Microsoft Corporation".to_owned(),
            chassis_asset_tag: "7783-7084-3265-9085-8269-3286-77".to_owned(),
            ..Dmi::default()
        };
        let uri = |end: &str| {
            Process::default().set("ECS_CONTAINER_METADATA_URI_V4", &format!("http://169.254.170.2/v4/{end}"))
        };
        let of = |dmi: Dmi| Process { dmi, ..Process::default() };
        for (process, expected) in [
            (
                uri(&format!("{TASK}-1019270606")).set("AWS_EXECUTION_ENV", "AWS_ECS_FARGATE"),
                format!("ECS task {TASK} (Fargate)"),
            ),
            (Process::default().with(CGROUPS, &format!("4:cpu:/ecs/{TASK}/{ID}\n")), format!("ECS task {TASK}")),
            (Process::default().with(CGROUPS, &format!("4:cpu:/ecs/cluster/{UID}/x\n")), format!("ECS task {UID}")),
            // This ID is not the task's.
            (uri(UID), String::new()),
            (uri("secret"), String::new()),
            (of(nitro("i-0123456789abcdef0")), "Amazon EC2 i-0123456789abcdef0".to_owned()),
            (of(nitro("i-1234abcd")), "Amazon EC2 i-1234abcd".to_owned()),
            (of(nitro("Not Specified")), "Amazon EC2".to_owned()),
            (of(nitro("")).with(INSTANCE, "i-0123456789abcdef0\n"), "Amazon EC2 i-0123456789abcdef0".to_owned()),
            (of(azure()).with(INSTANCE, &format!("{UID}\n")), format!("Azure {UID}")),
            (of(azure()).with(INSTANCE, "sec ret"), "Azure".to_owned()),
            // cloud-init also runs where no cloud is known.
            (Process::default().with(INSTANCE, "nocloud"), String::new()),
            (
                Process { dmi: nitro("i-0123456789abcdef0"), ..Process::default() }.with(NAMESPACE, "prod"),
                "pod prod, Amazon EC2 i-0123456789abcdef0".to_owned(),
            ),
        ] {
            assert_eq!(process.holder("a@b").cloud, expected, "{:?} {:?}", process.files, process.variables);
        }
    }

    /// A text that no record may contain.
    const SECRET: &str = "S3CR3T";

    #[test]
    fn no_secret_of_any_environment_is_stored() {
        let secrets = [
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
            "ACTIONS_RUNTIME_TOKEN",
            "ATLANTIS_GH_TOKEN",
            "ATLANTIS_GH_WEBHOOK_SECRET",
            "AWS_ACCESS_KEY_ID",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "BITBUCKET_STEP_OIDC_TOKEN",
            "BUILDKITE_AGENT_ACCESS_TOKEN",
            "CI_BUILD_TOKEN",
            "CI_DEPLOY_PASSWORD",
            "CI_JOB_JWT",
            "CI_JOB_TOKEN",
            "CI_NETRC_PASSWORD",
            "CI_REGISTRY_PASSWORD",
            "CI_REPOSITORY_URL",
            "CIRCLE_OIDC_TOKEN",
            "CIRCLE_TOKEN",
            "DRONE_NETRC_PASSWORD",
            "DRONE_REMOTE_URL",
            "GITHUB_TOKEN",
            "HTTPS_PROXY",
            "SEMAPHORE_CACHE_PRIVATE_KEY_PATH",
            "SPACELIFT_API_TOKEN",
            "SYSTEM_ACCESSTOKEN",
            "TF_CLI_ARGS",
            "TF_TOKEN_app_terraform_io",
            "TF_VAR_password",
            "TFC_WORKLOAD_IDENTITY_TOKEN",
            "VAULT_TOKEN",
        ];
        let token = token(&format!(
            r#"{{"jti":"{SECRET}","sub":"{SECRET}","kubernetes.io":{{"namespace":"prod","secret":{{"name":"{SECRET}"}},
            "pod":{{"name":"a","uid":"{UID}"}},"serviceaccount":{{"name":"{SECRET}","uid":"{SECRET}"}}}}}}"#
        ));
        let token = token.replace("SIGNATURE", SECRET);
        for (system, variables, job, _) in ENVIRONMENTS {
            let mut process = Process::default().with(TOKEN, &token);
            for (name, value) in variables {
                // A secret in each place of a URL where one can be.
                let value = match value.strip_prefix("https://") {
                    Some(rest) if rest.contains(['?', '#']) => format!("https://{SECRET}:{SECRET}@{rest}"),
                    Some(rest) => format!("https://anna:{SECRET}@{rest}?token={SECRET}#{SECRET}"),
                    None => (*value).to_owned(),
                };
                process = process.set(name, &value);
            }
            for name in secrets {
                process = process.set(name, &format!("https://{SECRET}:{SECRET}@host/{SECRET}"));
            }
            let holder = process.holder("anna@ci-7");
            let text = format!(
                "{} {}",
                crate::json::to_string(&holder).unwrap(),
                lease_text::name(&holder).unwrap_or_default()
            );
            assert!(!text.contains(SECRET), "{text}");
            assert_eq!((holder.ci.as_str(), holder.job.as_str()), (system, job));
            assert!(holder.cloud.starts_with("pod prod/a "), "{text}");
        }
    }

    #[test]
    fn no_text_reaches_the_record_with_a_control_character() {
        use proptest::prelude::*;
        let strategy =
            crate::generated_input::changed_text("https://a:b@ci.example/1?x=2#\u{1b}[2J\u{202e}b\r\n\u{7f}c");
        crate::generated_input::for_all(file!(), &strategy, |text| {
            for (_, variables, ..) in ENVIRONMENTS {
                let markers = ["true", "True", "woodpecker", "drone"];
                let mut process = Process::default();
                for (name, value) in variables {
                    process = process.set(name, if markers.contains(value) { value } else { &text });
                }
                let files = [CGROUPS, MOUNTS, TOKEN, NAMESPACE, INSTANCE];
                process = files.into_iter().fold(process, |process, file| process.with(file, &text));
                let holder = process.holder(&text);
                let stored = [
                    &holder.user,
                    &holder.host,
                    &holder.boot,
                    &holder.container,
                    &holder.job,
                    &holder.attempt,
                    &holder.cloud,
                ];
                for fact in stored {
                    prop_assert!(
                        fact.chars().all(|one| !one.is_control() && !('\u{202a}'..='\u{202e}').contains(&one)),
                        "{fact:?}"
                    );
                    prop_assert!(fact.len() <= 700, "{fact:?}");
                }
                prop_assert!(!holder.job.contains("a:b@"), "{holder:?}");
            }
            Ok(())
        });
    }

    #[test]
    fn this_process_has_a_user_or_a_host() {
        let holder = here(&HostFacts::read());
        assert!(!holder.user.is_empty() || !holder.host.is_empty(), "{holder:?}");
        assert!(lease_text::name(&holder).is_some());
    }
}
