#!/bin/sh
# Installs tf from a release: sh install.sh [--to DIR] [--force]
#
# It downloads the archive for this machine, and checks its SHA-256 against the release's SHA256SUMS. It writes one file,
# tf, into DIR, and needs no root. The file is complete before it gets its name.
#
#   --to DIR   the directory to install into. Default: $TF_INSTALL_DIR, or else ~/.local/bin
#   --force    also replace a DIR/tf that is not this program
#   --help     print this text
#
#   TF_RELEASES_URL   the directory with the files of the release. Default: the release that this script is a file of
#
# All commands are in functions, so if the download of this script is cut off, the rest of it does nothing.

set -eu

# The release writes its URL into this line (package/installers).
release_url=

program=install.sh
work=
child=

fail() {
  printf '%s: %s\n' "$program" "$1" >&2
  shift
  for line in "$@"; do
    printf '%s: %s\n' "$program" "$line" >&2
  done
  exit 1
}

usage() {
  cat <<'END'
usage: sh install.sh [--to DIR] [--force]

Installs the program tf from its release, without root.

  --to DIR   the directory to install into. Default: $TF_INSTALL_DIR, or else ~/.local/bin
  --force    also replace a DIR/tf that is not this program
  --help     print this text

  TF_RELEASES_URL   the directory with the files of the release. Default: the release that this script is a file of
END
}

# quit CODE: ends after a signal. In mksh, an EXIT trap would change the exit code.
quit() {
  trap - EXIT
  clean_up
  exit "$1"
}

has() {
  command -v "$1" >/dev/null 2>&1
}

clean_up() {
  if [ -n "$child" ]; then kill "$child" 2>/dev/null || :; fi
  if [ -n "$work" ]; then rm -rf "$work"; fi
}

# Sets `kind` to the end of the archive's name.
find_kind() {
  system=$(uname -s)
  machine=$(uname -m)
  case $system in
  Linux)
    case $machine in
    x86_64 | amd64) kind=x86_64-linux ;;
    aarch64 | arm64) kind=aarch64-linux ;;
    *) fail "there is no tf for this processor: $machine" "the release has one for x86_64 and one for aarch64" ;;
    esac
    ;;
  Darwin)
    case $machine in
    x86_64 | arm64) kind=macos ;;
    *) fail "there is no tf for this processor: $machine" ;;
    esac
    ;;
  *) fail "there is no tf for this system: $system" "the release has files for Linux and macOS" ;;
  esac
}

# Without TLS, somebody who can change the archive can also change its checksum. So plain HTTP is only for this machine,
# and a redirect may lead only to https. In http://localhost:80@example.com, the host is example.com.
check_url() {
  authority=${url#*://}
  authority=${authority%%/*}
  case $url in
  '') fail "TF_RELEASES_URL is not set" "set it to the directory with the files of a release" ;;
  esac
  case $authority in
  *@*) fail "the URL of the release must not contain a user name or a password" ;;
  esac
  case $url in
  https://?*) protocols='=https' ;;
  http://*)
    case $authority in
    127.0.0.1 | localhost | '[::1]') ;;
    127.0.0.1:* | localhost:*) check_port "${authority#*:}" ;;
    '[::1]:'*) check_port "${authority#'[::1]:'}" ;;
    *) refuse_url ;;
    esac
    protocols='=http,https'
    # A proxy is another machine.
    no_proxy=127.0.0.1,localhost,::1,${no_proxy:-${NO_PROXY:-}}
    export no_proxy
    ;;
  *) refuse_url ;;
  esac
}

check_port() {
  case $1 in
  '' | *[!0-9]*) refuse_url ;;
  esac
}

refuse_url() {
  fail "the URL of the release must begin with https://: $url"
}

find_downloader() {
  if has curl; then
    downloader=curl
  elif has wget; then
    downloader=wget
    # BusyBox's wget may not check the certificate of the server.
    if wget --help 2>&1 | grep BusyBox >/dev/null; then
      downloader='wget of BusyBox'
      case $url in
      https:*) fail "the wget of BusyBox cannot be trusted with https" "install curl" ;;
      esac
    # Wget2 1.99.1 follows redirects in spite of --max-redirect=0, and exits with 0.
    elif wget --version 2>&1 | grep '^GNU Wget2 ' >/dev/null; then
      fail "this wget is Wget2, which also follows a redirect to a URL that does not begin with https://" "install curl"
    fi
  else
    fail "curl or wget is needed to download tf" "install one of them"
  fi
}

find_checksum_tool() {
  if has sha256sum; then
    checksum_tool=sha256sum
  elif has shasum; then
    checksum_tool='shasum -a 256'
  elif has openssl; then
    checksum_tool='openssl dgst -sha256 -r'
  else
    fail "sha256sum, shasum or openssl is needed to check the download" "install one of them"
  fi
}

# download NAME: from the directory of the release into $work.
download() {
  name=$1
  from=$url/$name
  case $downloader in
  curl)
    fetch curl --fail --silent --show-error --location --proto "$protocols" --proto-redir '=https' --connect-timeout 20 \
      --speed-limit 1 --speed-time 60 --output "$work/$name" "$from" || could_not_download
    ;;
  wget)
    # It has no option that allows a redirect only to https. So it follows none, and names the first one.
    redirects=0
    until fetch wget --no-verbose --tries=2 --timeout=60 --max-redirect=0 --server-response \
      --output-document="$work/$name" "$from"; do
      redirects=$((redirects + 1))
      find_redirect
      case $from in
      https://?*) [ "$redirects" -le 10 ] || could_not_download ;;
      '') could_not_download ;;
      *) refuse_redirect ;;
      esac
    done
    ;;
  *)
    # It follows every redirect, and names it. With -T, that of Debian 12 crashes.
    fetch wget -S -O "$work/$name" "$from" || could_not_download
    find_redirect
    [ -z "$from" ] || refuse_redirect
    ;;
  esac
}

# fetch COMMAND...: runs it in the background, because a shell runs no trap while it waits for a command in the foreground.
fetch() {
  "$@" >"$work/errors" 2>&1 &
  child=$!
  status=0
  wait "$child" || status=$?
  child=
  return "$status"
}

# Sets `from` to the last redirect that wget has named, or to nothing.
find_redirect() {
  carriage_return=$(printf '\r')
  from=
  while read -r header value _; do
    case $header in
    [Ll]ocation:) from=${value%"$carriage_return"} ;;
    esac
  done <"$work/errors"
}

# fail_to_get LINE...: like fail, and names each file with settings for the downloader as a possible cause. The downloader
# obeys these files, because a proxy may be set there.
fail_to_get() {
  named=
  case $downloader in
  curl)
    # An older curl reads .curlrc in XDG_CONFIG_HOME, a newer one curlrc.
    for file in "${CURL_HOME:-}/.curlrc" "${XDG_CONFIG_HOME:-}/.curlrc" "${XDG_CONFIG_HOME:-}/curlrc" "${HOME:-}/.curlrc" \
      "${HOME:-}/.config/curlrc"; do
      case $file in
      /.curlrc | /curlrc | /.config/curlrc | "$named") continue ;;
      esac
      if [ -e "$file" ]; then
        set -- "$@" "a setting in $file may be the cause: rename that file, and try again"
        named=$file
      fi
    done
    ;;
  wget)
    file=${WGETRC:-${HOME:-}/.wgetrc}
    if [ -e "$file" ]; then set -- "$@" "a setting in $file may be the cause: rename that file, and try again"; fi
    ;;
  esac
  fail "$@"
}

could_not_download() {
  cat "$work/errors" >&2
  fail_to_get "could not download $url/$name"
}

refuse_redirect() {
  fail "could not download $url/$name: it is redirected to a URL that does not begin with https://: $from" "install curl"
}

# Sets `archive`, `checksum` and `version` from the one line of SHA256SUMS that is for this machine.
find_archive() {
  archive=
  while read -r sum name; do
    name=${name#\*}
    case $name in
    *[!A-Za-z0-9._+-]*) ;;
    tf-*"-$kind.tar.gz")
      [ -z "$archive" ] || fail "SHA256SUMS has two archives for $kind: $archive and $name"
      archive=$name
      checksum=$sum
      ;;
    esac
  done <"$work/SHA256SUMS"
  [ -n "$archive" ] || fail_to_get "this release has no archive for $kind: $url/SHA256SUMS"
  case $checksum in
  *[!0-9a-f]*) fail_to_get "SHA256SUMS has no valid checksum of $archive" ;;
  esac
  [ ${#checksum} -eq 64 ] || fail_to_get "SHA256SUMS has no valid checksum of $archive"
  version=${archive#tf-}
  version=${version%"-$kind.tar.gz"}
}

check_checksum() {
  # shellcheck disable=SC2086 # These are words.
  found=$($checksum_tool <"$work/$archive")
  found=${found%% *}
  [ "$found" = "$checksum" ] ||
    fail_to_get "the checksum of $archive is wrong, so it was not installed" "expected $checksum" "found    $found"
}

# Takes the program out of the archive, into $work/tf. Nothing else is unpacked.
unpack() {
  top=${archive%.tar.gz}
  tar -tzf "$work/$archive" >"$work/members" || fail "could not read $archive with tar and gzip"
  programs=0
  while IFS= read -r member; do
    case $member in
    ../* | */../* | */..) fail "$archive has an unexpected member: $member" ;;
    "$top/tf") programs=$((programs + 1)) ;;
    "$top/" | "$top"/*.md | "$top"/LICENSE* | "$top/THIRD-PARTY-LICENSES" | "$top/Dockerfile") ;;
    "$top"/man/* | "$top"/completions/* | "$top"/docs/* | "$top"/shell/* | "$top"/examples/*) ;;
    *) fail "$archive has an unexpected member: $member" ;;
    esac
  done <"$work/members"
  [ "$programs" -eq 1 ] || fail "$archive has $programs files named $top/tf"
  mkdir "$work/unpacked"
  # Not by tar -C: GNU tar reads a backslash in that directory as the beginning of an escape sequence.
  (cd "$work/unpacked" && tar -xzof "$work/$archive" "$top/tf") || fail "could not unpack $archive"
  new=$work/unpacked/$top/tf
  { [ -f "$new" ] && [ ! -h "$new" ]; } || fail "$archive has an unexpected member: $top/tf is not a file"
  chmod 755 "$new"
  told=$("$new" locks --version 2>&1) || fail "the program in $archive does not run here" "$told"
  [ "$told" = "tf locks $version" ] || fail "the program in $archive is not tf $version: $told"
}

# Whether the file $1 is a tf of any version: a program that is no script, and names one of tf's variables.
is_tf() {
  [ -f "$1" ] && [ ! -h "$1" ] && [ -r "$1" ] || return 1
  if [ "$(dd if="$1" bs=2 count=1 2>/dev/null)" = '#!' ]; then return 1; fi
  LC_ALL=C grep TFW_STOP_TIMEOUT "$1" >/dev/null 2>&1
}

check_place() {
  if [ -d "$to/tf" ]; then fail "$to/tf is a directory" "choose another directory with --to DIR"; fi
  if [ -e "$to/tf" ] || [ -h "$to/tf" ]; then
    if [ -z "$force" ] && ! is_tf "$to/tf"; then
      fail "$to/tf is something else, so it was not replaced" "choose another directory with --to DIR, or replace it with --force"
    fi
  fi
}

# Sets `first` to the first tf on PATH. `command -v` of ksh93 prints some paths in quotes.
find_first() {
  first=
  rest=$PATH:
  while [ -n "$rest" ] && [ -z "$first" ]; do
    directory=${rest%%:*}
    rest=${rest#*:}
    if [ -f "${directory:-.}/tf" ] && [ -x "${directory:-.}/tf" ]; then first=${directory:-.}/tf; fi
  done
}

# escape CHARACTER REPLACEMENT: replaces each CHARACTER in `quoted`.
escape() {
  rest=$quoted
  quoted=
  while :; do
    case $rest in
    *"$1"*)
      quoted=$quoted${rest%%"$1"*}$2
      rest=${rest#*"$1"}
      ;;
    *) break ;;
    esac
  done
  quoted=$quoted$rest
}

# Sets `quoted` to $1 as one word for the shell of this user.
quote() {
  quoted=$1
  if [ "$shell" = fish ]; then
    # shellcheck disable=SC1003 # These are backslashes.
    escape '\' '\\'
    escape "'" "\\'"
  else
    escape "'" "'\\''"
  fi
  quoted="'$quoted'"
}

# Says what to type next, in the shell of this user.
say_next() {
  printf 'tf %s is installed: %s/tf\n\n' "$version" "$to"
  shell=${SHELL:-}
  shell=${shell##*/}
  case $to in
  *:*)
    quote "$to/tf"
    printf 'A directory with a colon in its name cannot be in PATH. To run tf by its name, install it into another\n'
    printf 'directory, with --to DIR. It runs by its full path too:\n\n  %s locks version\n' "$quoted"
    return
    ;;
  esac
  quote "$to"
  path_line=
  program=tf
  word=tf
  case :${PATH:-}: in
  *":$to:"*)
    find_first
    if [ "$first" != "$to/tf" ]; then
      printf 'Another program named tf is first on PATH: %s\n\n' "$first"
      # So the lines name this one by its full path.
      quote "$to/tf"
      program=$quoted
      quote "$program"
      word=$quoted
    fi
    ;;
  *)
    if [ "$shell" = fish ]; then
      path_line="fish_add_path $quoted"
    else
      path_line="export PATH=$quoted:\"\$PATH\""
    fi
    ;;
  esac
  case $shell in
  fish) alias_line="$program locks shell-init fish | source" ;;
  # The user's shell expands it.
  bash | zsh) alias_line="eval \"\$($program locks shell-init $shell)\"" ;;
  # The output of shell-init is for the three above. An alias is read as a command once more.
  *) alias_line="alias terraform=$word" ;;
  esac
  if [ -n "$path_line" ]; then
    printf 'Type these lines, and add them to the start-up file of your shell:\n\n  %s\n' "$path_line"
    which='The last line'
  else
    printf 'Type this line, and add it to the start-up file of your shell:\n\n'
    which=It
  fi
  printf '  %s\n\n%s makes terraform an alias of tf. Then type:\n\n  %s locks version\n' "$alias_line" "$which" "$program"
}

main() {
  to=${TF_INSTALL_DIR:-}
  force=
  while [ $# -gt 0 ]; do
    case $1 in
    --to)
      [ $# -ge 2 ] && [ -n "$2" ] || fail "--to needs a directory"
      to=$2
      shift
      ;;
    --to=?*) to=${1#--to=} ;;
    --force) force=yes ;;
    --help)
      usage
      exit 0
      ;;
    *) fail "unknown argument: $1" "type: sh install.sh --help" ;;
    esac
    shift
  done
  if [ -z "$to" ]; then
    [ -n "${HOME:-}" ] || fail "HOME is not set" "choose a directory with --to DIR"
    to=$HOME/.local/bin
  fi
  url=${TF_RELEASES_URL:-$release_url}
  url=${url%/}
  umask 022
  trap clean_up EXIT
  trap 'quit 129' HUP
  trap 'quit 130' INT
  trap 'quit 141' PIPE
  trap 'quit 143' TERM

  find_kind
  check_url
  find_downloader
  find_checksum_tool
  for tool in tar mktemp grep; do
    has "$tool" || fail "$tool is needed, and is not installed"
  done
  case $to in
  /*) ;;
  *) to=$PWD/$to ;;
  esac
  if [ "$to" != / ]; then to=${to%/}; fi
  mkdir -p "$to" || fail "could not create $to" "choose another directory with --to DIR"
  check_place
  # In the same directory, because a rename is atomic only within a file system.
  work=$(mktemp -d "$to/.tf-install.XXXXXX") || fail "could not write to $to" "choose another directory with --to DIR"

  download SHA256SUMS
  find_archive
  download "$archive"
  check_checksum
  unpack
  # Somebody may have put another file there meanwhile.
  check_place
  mv -f "$new" "$to/tf" || fail "could not write $to/tf"
  clean_up
  work=
  say_next
}

# In braces, because a last line that was cut off would call main without the arguments.
{ main "$@"; }
