# What the scripts beside this one share. They source it, after `set -euo pipefail`.
# shellcheck shell=bash disable=SC2034 # What is set here is read there.

# Whatever a product could take from its surroundings is fixed here: order, language, hours, file modes.
export LC_ALL=C TZ=UTC
unset LANG LANGUAGE
umask 022

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root" || exit

# What is built, and what is passed on. `package/twice` builds in two clones, and so in two of these.
out=$root/target/package
dist=$out/dist
tools=$root/target/tools/package

# Debian has a package `tf` already, the game TinyFugue.
deb_name=tf-locks

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# unavailable TEXT: dies because of something outside of this project, such as a registry that cannot be reached, or a
# kernel that forbids namespaces. .ci/run sets LEFT_OUT, and then goes on.
unavailable() {
  [ -z "${LEFT_OUT:-}" ] || printf '%s\n' "$*" >"$LEFT_OUT"
  die "$@"
}

say() {
  printf '== %s\n' "$*"
}

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
[ -n "$version" ] || die "Cargo.toml has no version"

# Of every file in every product: when the last commit was made. An image is built without .git and is told.
date_of_products() {
  if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) || die "there is no git history here: set SOURCE_DATE_EPOCH"
  fi
  export SOURCE_DATE_EPOCH
}

# What `tf locks version` prints as the commit. An image is built without .git and is told, or the commit is unknown.
commit_of_products() {
  if [ -z "${TF_COMMIT:-}" ]; then
    TF_COMMIT=unknown
    # Not the commit of another project, in whose checkout the source was unpacked.
    if [ "$(git rev-parse --show-toplevel 2>/dev/null)" = "$root" ]; then
      TF_COMMIT=$(git describe --always --dirty --abbrev=64 '--exclude=*')
    fi
  fi
  export TF_COMMIT
}

# need COMMAND PACKAGE ...: names everything that is missing at once, with the command that installs it.
need() {
  local missing=()
  while [ $# -gt 0 ]; do
    command -v "$1" >/dev/null || missing+=("$2")
    shift 2
  done
  if [ ${#missing[@]} -gt 0 ]; then
    die "missing here: apt-get install ${missing[*]}"
  fi
}

# The names that others have for a target.
arch_of() {
  case $1 in
  x86_64-unknown-linux-gnu) echo x86_64 ;;
  aarch64-unknown-linux-gnu) echo aarch64 ;;
  *) die "no such target: $1 (x86_64-unknown-linux-gnu or aarch64-unknown-linux-gnu)" ;;
  esac
}

deb_arch_of() {
  case $(arch_of "$1") in
  x86_64) echo amd64 ;;
  aarch64) echo arm64 ;;
  esac
}

# The name of the archive for a target: of Linux one for each, of macOS one for both.
archive_name() {
  case $1 in
  *-apple-darwin) echo "tf-$version-macos.tar.gz" ;;
  *) echo "tf-$version-$(arch_of "$1")-linux.tar.gz" ;;
  esac
}

# lay_out_archive DIR: everything in an archive but the program and the licences of its parts. The documents are in the
# same places as in the repository, so that their links lead to files in the archive.
lay_out_archive() {
  install -d -m 755 "$1" "$1/man" "$1/completions" "$1/shell"
  install -m 644 README.md CHANGELOG.md Dockerfile ARCHITECTURE.md CONTRIBUTING.md RELEASING.md SECURITY.md LICENSE LICENSE-* "$1/"
  install -m 644 man/*.1 "$1/man/"
  install -m 644 shell/completions/* "$1/completions/"
  install -m 644 shell/tf.sh "$1/shell/"
  cp -R docs examples "$1/"
  cp -R shell/ci shell/audit shell/witness "$1/shell/"
  # These check this repository.
  rm "$1/shell/ci/lint" "$1/examples/check"
}

host_target() {
  rustc -vV | sed -n 's/^host: //p'
}

# The targets that have been built.
built_targets() {
  local target
  for target in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu; do
    if [ -e "$out/$target/tf" ]; then echo "$target"; fi
  done
}

# The targets of macOS that have been built (package/macos/release).
built_macos_targets() {
  local target
  for target in aarch64-apple-darwin x86_64-apple-darwin; do
    if [ -e "$out/$target/tf" ]; then echo "$target"; fi
  done
}

# Sets macos_python: a Python with macholib, which reads programs for macOS, and with fat-macho, which joins them.
macos_reader() {
  local where=$tools/macos/release requirements=$root/package/macos/release-requirements.txt
  macos_python=$where/bin/python3
  if cmp --silent "$requirements" "$where/.made"; then return; fi
  need python3 "python3 python3-venv"
  python3 -m venv --clear "$where"
  "$macos_python" -m pip install --quiet --disable-pip-version-check --only-binary=:all: --require-hashes \
    --requirement "$requirements" || unavailable "PyPI's packages cannot be had: fat-macho, macholib"
  cp "$requirements" "$where/.made"
}

# with_apt_of DIRECTORY SUITE COMMAND...: runs a command whose apt reads one suite of Debian, or what this machine's apt
# reads if SUITE is "". Its lists and its cache are in DIRECTORY, which the caller removes: apt's own state is left
# alone, and no root is needed. MIRROR sets another Debian mirror than that of apt's sources.
with_apt_of() {
  local where=$1 suite=$2
  shift 2
  need apt-get apt dpkg-deb dpkg
  mkdir -p "$where/lists/partial" "$where/archives/partial" "$where/parts"
  cat >"$where/apt.conf" <<CONF
APT::Sandbox::User "root";
Dir::State::lists "$where/lists";
Dir::Cache "$where";
CONF
  if [ -n "$suite" ]; then
    [ -e "$debian_keys" ] || unavailable "missing here: apt-get install debian-archive-keyring"
    debian_mirror
    echo "deb [signed-by=$debian_keys] $MIRROR $suite main" >"$where/sources.list"
    cat >>"$where/apt.conf" <<CONF
Dir::Etc::SourceList "$where/sources.list";
Dir::Etc::SourceParts "$where/parts";
CONF
  fi
  # Foreign machines are asked for only where a package of theirs is wanted: their lists are large.
  case "$*" in
  *:arm64*) echo 'APT::Architectures { "amd64"; "arm64"; };' ;;
  *) echo 'APT::Architectures { "amd64"; };' ;;
  esac >>"$where/apt.conf"
  APT_CONFIG=$where/apt.conf "$@"
}

debian_keys=/usr/share/keyrings/debian-archive-keyring.gpg

# Sets MIRROR to the Debian mirror that this machine uses already, or else to Debian's own.
debian_mirror() {
  need apt-get apt
  # shellcheck disable=SC2016 # The name is apt's.
  MIRROR=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' "Created-By: Packages" | awk '/\/debian\/$/ && !found++')}
  MIRROR=${MIRROR:-http://deb.debian.org/debian/}
}

# download_from SUITE DIRECTORY PACKAGE...: downloads packages of Debian (PACKAGE=VERSION and PACKAGE:arm64 as well).
download_from() {
  local suite=$1 where=$2
  shift 2
  mkdir -p "$where"
  # shellcheck disable=SC2016 # The inner shell expands these.
  with_apt_of "$where/apt" "$suite" bash -c 'cd "$1" && shift && apt-get update -qq && apt-get download -qq "$@"' _ "$where" "$@" ||
    unavailable "Debian's packages cannot be had: $*"
  rm -rf "$where/apt"
}

# unpack NAME PACKAGE...: packages of Debian, unpacked below target/tools/package/NAME. Nothing is installed.
unpack() {
  local name=$1 where=$tools/$1
  shift
  if [ -e "$where/.made" ] && [ "$(cat "$where/.made")" = "$*" ]; then
    return
  fi
  say "fetching $name from Debian, into ${where#"$root"/}"
  rm -rf "$where"
  download_from "" "$where/debs" "$@"
  local deb
  for deb in "$where"/debs/*.deb; do
    dpkg-deb -x "$deb" "$where"
  done
  # What was unpacked is named in the licences and in the .deb.
  for deb in "$where"/debs/*.deb; do
    # shellcheck disable=SC2016 # The names are dpkg's.
    dpkg-deb -W --showformat='${Package} ${Architecture} ${Version} ${source:Package} ${source:Version}\n' "$deb"
  done >"$where/versions"
  rm -rf "$where/debs"
  echo "$*" >"$where/.made"
}

# python PACKAGE==VERSION ...: a virtual environment of PyPI's packages, in target/tools/package/python.
python_tools() {
  local where=$tools/python
  if [ -e "$where/.made" ] && [ "$(cat "$where/.made")" = "$*" ]; then
    return
  fi
  need python3 "python3 python3-venv"
  python3 -m venv --clear "$where"
  "$where/bin/python3" -m pip install --quiet --disable-pip-version-check "$@"
  echo "$*" >"$where/.made"
}
